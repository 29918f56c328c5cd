"""Decoders: an encoder's next layer, with attention to the other modality.

A decoder works in three steps, so that whatever depends on one modality is computed once for each of its inputs,
however many partners it is fused with:

    entered     = decoder.enter(layer, hidden, mask)         the querying modality, one row for each input
    keys_values = decoder.keys_values(layer, context)        the other modality, one row for each input
    fused       = decoder(layer, hidden, entered, keys_values, context_mask)      one row for each pair

`layer` holds what belongs to one layer and does not train; the decoder itself trains, and may serve several layers.
`PaperDecoder` is eq. 1-4 of the SAFFE paper; its authors' released code is in reference.py.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.core.features import BlockSpec, BlockWeights, LibraryBlockSpec
from saffe_cache.fusion.block import EncoderBlock, key_weights, split_heads
from saffe_cache.fusion.layers import Learning
from saffe_cache.fusion.library_block import make_block

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Each [batch, heads, keys, d / heads]."""


class CrossAttention(nn.Module):
    """Attention from one modality's tokens to the other's, initialised from both encoders' own projections.

    If the widths agree, queries start as the querying block's, and keys and values as the context block's. If they
    differ, the context is projected first and all projections start as the querying block's. Queries and keys come
    from models that were trained apart, so all four projections train. What a block has in another shape (grouped
    keys, heads wider than their share) or under no known name starts at random.
    """

    def __init__(self, query_block: BlockWeights, context_block: BlockWeights, *, has_norms: bool) -> None:
        """`has_norms`: whether both sides first pass the norm that precedes their block's attention."""
        super().__init__()
        width, context_width = query_block.hidden_size, context_block.hidden_size
        self.num_heads = math.gcd(width, query_block.spec.num_attention_heads)
        self.query_norm = norm_of(query_block) if has_norms else nn.Identity()
        self.context_norm = norm_of(context_block) if has_norms else nn.Identity()
        same = width == context_width
        self.context_projection = nn.Identity() if same else nn.Linear(context_width, width)
        self.query = _linear_from(query_block, "query")
        self.key = _linear_from(context_block if same else query_block, "key")
        self.value = _linear_from(context_block if same else query_block, "value")
        self.output = _linear_from(query_block, "output")

    def keys_values(self, context: torch.Tensor) -> KeysValues:
        """Keys and values of `context` [batch, keys, width of the context]."""
        entering = self.context_projection(self.context_norm(context))
        keys, values = (split_heads(part(entering), self.num_heads) for part in (self.key, self.value))
        return keys, values

    def forward(self, hidden: torch.Tensor, keys_values: KeysValues, mask: torch.Tensor | None) -> torch.Tensor:
        """[batch, tokens, d] for `hidden` [batch, tokens, d]; one token for all where there is a single key."""
        keys, values = keys_values
        if keys.shape[2] == 1:  # softmax over one key is 1
            attended = values
        else:
            queries = split_heads(self.query(self.query_norm(hidden)), self.num_heads)
            allowed = None if mask is None else mask[:, None, None, :]
            attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
        return self.output(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def attention_weights(
        self, hidden: torch.Tensor, keys_values: KeysValues, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Weights of the keys, [batch, heads * tokens, keys]."""
        queries = split_heads(self.query(self.query_norm(hidden)), self.num_heads)
        return key_weights(queries, keys_values[0], mask)


class ReuseDecoder(nn.Module):
    """An encoder's next layer, frozen, with a gated cross-attention between its halves.

        a = the block's self-attention half of h
        y = the block's MLP half of  a + tanh(g) CrossAttention(a, context)

    With g = 0, where it starts, y is the encoder's own next hidden state. Deviates from the SAFFE paper's
    eq. 2-4, which has no gate and no MLP; the gate is Flamingo's (Alayrac et al. 2022, eq. 1).

    4 d² + 6 d + 2 e + 1 parameters for queries of width d and a context of width e, and (e + 1) d more if d and e
    differ.
    """

    learning: ClassVar = {"gate": Learning(5.0)}

    def __init__(self, query_block: BlockWeights, context_block: BlockWeights) -> None:
        super().__init__()
        self.cross_attention = CrossAttention(query_block, context_block, has_norms=True)
        self.gate = nn.Parameter(torch.zeros(()))

    @staticmethod
    def layer_of(query_block: BlockWeights, context_block: BlockWeights) -> nn.Module:
        """The querying encoder's whole block."""
        return EncoderBlock(query_block)

    def enter(self, layer: EncoderBlock, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return layer.attend(hidden, mask)

    def keys_values(self, layer: EncoderBlock, context: torch.Tensor) -> KeysValues:
        return self.cross_attention.keys_values(context)

    def forward(
        self,
        layer: EncoderBlock,
        hidden: torch.Tensor,
        entered: torch.Tensor,
        keys_values: KeysValues,
        context_mask: torch.Tensor | None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        crossed = self.cross_attention(entered, keys_values, context_mask)
        return layer.feed_forward(entered + torch.tanh(self.gate) * crossed)


class PaperDecoder(nn.Module):
    """The SAFFE paper's decoder, eq. 1-4, all of it trainable, from the weights of the next layer.

        u' = MSA(LN(h_A)) + h_A,   Z' = MCA(h_A, h_B) + u',   D = LN(Z')
        MCA(A, B) = Attention(W^Q A, W^K B, W^V B)

    MCA takes the raw hidden states of both modalities, as the paper writes it. The paper does not specify heads and
    output projection; they are the querying block's. There is no MLP. A post-LN encoder's self-attention keeps its
    own order of norm and residual.

    8 d² + 12 d parameters for queries of width d, d more of layer scales if the encoder has them (DINOv2), and
    (e + 1) d more for a context of another width e.
    """

    def __init__(self, query_block: BlockWeights, context_block: BlockWeights) -> None:
        super().__init__()
        assert isinstance(query_block.spec, BlockSpec)
        own = {name: value for name, value in query_block.tensors.items() if not name.startswith("mlp_")}
        self.self_attention = EncoderBlock(BlockWeights(query_block.spec, own)).requires_grad_(True)
        self.cross_attention = CrossAttention(query_block, context_block, has_norms=False)
        self.norm = nn.LayerNorm(len(own["output_weight"]), eps=query_block.spec.layer_norm_eps)

    @staticmethod
    def layer_of(query_block: BlockWeights, context_block: BlockWeights) -> nn.Module:
        """Nothing: everything trains."""
        return nn.Identity()

    def enter(self, layer: nn.Module, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.self_attention.attend(hidden, mask)

    def keys_values(self, layer: nn.Module, context: torch.Tensor) -> KeysValues:
        return self.cross_attention.keys_values(context)

    def forward(
        self,
        layer: nn.Module,
        hidden: torch.Tensor,
        entered: torch.Tensor,
        keys_values: KeysValues,
        context_mask: torch.Tensor | None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.norm(self.cross_attention(hidden, keys_values, context_mask) + entered)  # type: ignore[no-any-return]


class OpaqueDecoder(ReuseDecoder):
    """An encoder's next layer of any family, frozen, with a gated cross-attention before it.

        y = layer(h + tanh(g) CrossAttention(h, context))

    For layers whose halves are unknown; stands for `reuse` and `paper`. With g = 0, where it starts, y is the encoder's
    own next hidden state.
    """

    @staticmethod
    def layer_of(query_block: BlockWeights, context_block: BlockWeights) -> nn.Module:
        """The querying encoder's whole layer."""
        return make_block(query_block)

    def enter(self, layer: nn.Module, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return hidden

    def forward(
        self,
        layer: nn.Module,
        hidden: torch.Tensor,
        entered: torch.Tensor,
        keys_values: KeysValues,
        context_mask: torch.Tensor | None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        crossed = self.cross_attention(hidden, keys_values, context_mask)
        return layer(hidden + torch.tanh(self.gate) * crossed, mask)  # type: ignore[no-any-return]


_NAMES = {
    "query": ("query", "q_proj", "q", "q_lin", "query_proj", "wq", "queries_linear"),
    "key": ("key", "k_proj", "k", "k_lin", "key_proj", "wk", "keys_linear"),
    "value": ("value", "v_proj", "v", "v_lin", "value_proj", "wv", "values_linear"),
    "output": ("o_proj", "out_proj", "o", "out_lin", "wo", "projection_layer"),
}
"""Last names of the parts of an attention in transformers, by role."""


def attention_part(block: BlockWeights, role: str) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight [d, d] and bias of a block's projection of a role; None where no name or shape tells it."""
    tensors, width = block.tensors, block.hidden_size
    names = [f"{role}_weight"]
    if isinstance(block.spec, LibraryBlockSpec):
        own = [name for name in tensors if not name.startswith(("model.", "check."))]
        names = [name for name in own if name.endswith(".weight") and name.split(".")[-2] in _NAMES[role]]
    found = [name for name in names if tensors[name].shape == (width, width)]
    if len(found) != 1:
        return None
    bias = tensors.get(found[0].removesuffix("weight") + "bias")
    return torch.tensor(tensors[found[0]]), None if bias is None else torch.tensor(bias)


def _linear_from(block: BlockWeights, role: str) -> nn.Linear:
    found = attention_part(block, role)
    linear = nn.Linear(block.hidden_size, block.hidden_size)
    with torch.no_grad():
        if found is None:
            nn.init.xavier_uniform_(linear.weight)
        else:
            linear.weight.copy_(found[0])
        bias = None if found is None else found[1]
        linear.bias.zero_() if bias is None else linear.bias.copy_(bias)
    return linear


def norm_of(block: BlockWeights) -> nn.LayerNorm:
    """The norm that precedes the block's attention; a plain one for post-LN blocks, whose input is normed already, and
    for layers of unknown families."""
    if isinstance(block.spec, LibraryBlockSpec):
        return nn.LayerNorm(block.hidden_size)
    norm = nn.LayerNorm(block.hidden_size, eps=block.spec.layer_norm_eps)
    if block.spec.norm_first:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor(block.tensors["attention_norm_weight"]))
            norm.bias.copy_(torch.tensor(block.tensors["attention_norm_bias"]))
    return norm
