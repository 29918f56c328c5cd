"""What the SAFFE authors' released code computes, to show its behaviour. Not for use.

Its attention outputs and its MLP's input are detached, and W_o, W_1 and W_2 are redrawn after every forward pass, also
in evaluation. So no gradient trains the attention, and each input meets different random matrices, whose mean
contribution is zero. Only the final linear map, three norms and one bias learn; the result is a linear regression of
the photo's tokens with multiplicative noise. See pipelines/REFERENCE.md.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.core.features import BlockWeights, LibraryBlockSpec
from saffe_cache.fusion.block import split_heads
from saffe_cache.fusion.decoders import KeysValues

NUM_HEADS = 8
INNER_SIZE = 2048
DROPOUT = 0.1


class ReferenceLayer(nn.Module):
    """One layer's projections, frozen: queries, keys and values of the photo, keys and values of the text.

    The release applies them without the norm that precedes them in the encoder.
    """

    def __init__(self, query_block: BlockWeights, context_block: BlockWeights) -> None:
        super().__init__()
        for block in (query_block, context_block):
            if isinstance(block.spec, LibraryBlockSpec):
                raise ValueError(
                    f"--fusion reference: {block.spec.model_class} has no layers with known queries, keys and values, "
                    "which the released code takes apart. Use --fusion reuse or paper."
                )
        width, context_width = query_block.hidden_size, context_block.hidden_size
        if width != context_width:
            raise ValueError(
                f"--fusion reference: the encoders are {width} and {context_width} wide, the released code takes equal "
                "widths alone. Use --fusion reuse or paper."
            )
        for prefix, block in (("own", query_block), ("other", context_block)):
            for role in ("query", "key", "value"):
                for part in ("weight", "bias"):
                    value = block.tensors.get(f"{role}_{part}")
                    self.register_buffer(f"{prefix}_{role}_{part}", None if value is None else torch.tensor(value))

    def project(self, owner: str, role: str, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, 8, tokens, d / 8]: eight heads, whatever the encoder has."""
        weight, bias = (getattr(self, f"{owner}_{role}_{part}") for part in ("weight", "bias"))
        return split_heads(functional.linear(hidden, weight, bias), NUM_HEADS)


class ReferenceDecoder(nn.Module):
    """The release's decoder; one serves all layers.

        y1 = LN1(drop(sg(W_o1 MHA(q y0, k y0, v y0))) + y0)        sg: no gradient passes
        y2 = LN2(drop(sg(W_o2 MHA(q y0, k' x, v' x))) + y1)
        y3 = LN3(drop(W_2 sg(drop(relu(W_1 y2)))) + y2)

    `qkv_layer`, `kv_layer` and `q_layer` are never used but count among its parameters, 67 M with two layers and the
    head: the decoder has 8 d² + 4,111 d + 2,048, of which 6 d² + 6 d belong to them.
    Here padded text is masked; the release attends to it.
    """

    def __init__(self, query_block: BlockWeights, context_block: BlockWeights) -> None:
        super().__init__()
        width = query_block.hidden_size
        self.qkv_layer, self.kv_layer, self.q_layer = (nn.Linear(width, times * width) for times in (3, 2, 1))
        self.self_output, self.cross_output = nn.Linear(width, width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, INNER_SIZE), nn.Linear(INNER_SIZE, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.dropout = nn.Dropout(DROPOUT)
        self._draw()

    @staticmethod
    def layer_of(query_block: BlockWeights, context_block: BlockWeights) -> nn.Module:
        """The frozen projections of both encoders."""
        return ReferenceLayer(query_block, context_block)

    @torch.no_grad()
    def _draw(self) -> None:
        for part in (self.self_output, self.cross_output, self.inner, self.outer):
            nn.init.xavier_uniform_(part.weight)

    def enter(self, layer: ReferenceLayer, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        queries, keys, values = (layer.project("own", role, hidden) for role in ("query", "key", "value"))
        attended = _attend(queries, (keys, values), mask)
        return self.norms[0](self.dropout(self.self_output(attended).detach()) + hidden)  # type: ignore[no-any-return]

    def keys_values(self, layer: ReferenceLayer, context: torch.Tensor) -> KeysValues:
        return layer.project("other", "key", context), layer.project("other", "value", context)

    def forward(
        self,
        layer: ReferenceLayer,
        hidden: torch.Tensor,
        entered: torch.Tensor,
        keys_values: KeysValues,
        context_mask: torch.Tensor | None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        attended = _attend(layer.project("own", "query", hidden), keys_values, context_mask)
        crossed = self.norms[1](self.dropout(self.cross_output(attended).detach()) + entered)
        inner = self.dropout(functional.relu(self.inner(crossed))).detach()
        fused: torch.Tensor = self.norms[2](self.dropout(self.outer(inner)) + crossed)
        self._draw()
        return fused


def _attend(queries: torch.Tensor, keys_values: KeysValues, mask: torch.Tensor | None) -> torch.Tensor:
    allowed = None if mask is None else mask[:, None, None, :]
    keys, values = (part.expand(len(queries), -1, -1, -1) for part in keys_values)
    attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
    return attended.transpose(1, 2).flatten(2)
