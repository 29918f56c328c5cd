"""An encoder's own block, rebuilt from cached weights, and the decoder that grows out of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.features import BlockSpec, BlockWeights


class EncoderBlock(nn.Module):
    """One frozen transformer layer. `forward(hidden_states[i])` equals the model's `hidden_states[i + 1]`.

    Args of all methods: `hidden` [batch, tokens, d]; `mask` bool [batch, tokens], True on real tokens.
    """

    def __init__(self, weights: BlockWeights) -> None:
        super().__init__()
        self.spec = weights.spec
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(value), requires_grad=False) for name, value in weights.tensors.items()}
        )

    @property
    def hidden_size(self) -> int:
        return int(self.weights["output_weight"].shape[0])

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.feed_forward(self.attend(hidden, mask))

    def attend(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The first half: self-attention with its residual and norm."""
        entering = self._norm("attention_norm", hidden) if self.spec.norm_first else hidden
        queries, keys, values = self.project(entering)
        bias = attention_bias(mask, self.spec, self._position_bias(hidden.shape[1]), hidden.shape[1], hidden)
        attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        attended = self._linear("output", attended.transpose(1, 2).flatten(2))
        if "attention_layer_scale" in self.weights:
            attended = attended * self.weights["attention_layer_scale"]
        attended = attended + hidden
        return attended if self.spec.norm_first else self._norm("attention_norm", attended)

    def feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The second half: the MLP with its residual and norm."""
        entering = self._norm("mlp_norm", hidden) if self.spec.norm_first else hidden
        inner = _ACTIVATIONS[self.spec.activation](self._linear("mlp_gate" if self._is_gated else "mlp_in", entering))
        if self._is_gated:
            inner = inner * self._linear("mlp_in", entering)
        outer = self._linear("mlp_out", inner)
        if "mlp_layer_scale" in self.weights:
            outer = outer * self.weights["mlp_layer_scale"]
        outer = outer + hidden
        return outer if self.spec.norm_first else self._norm("mlp_norm", outer)

    def project(self, entering: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, each [batch, heads, tokens, d / heads], of what enters the attention."""
        queries, keys, values = (
            _split_heads(self._linear(role, entering), self.spec.num_attention_heads)
            for role in ("query", "key", "value")
        )
        return queries, keys, values

    @property
    def _is_gated(self) -> bool:
        return "mlp_gate_weight" in self.weights

    def _linear(self, role: str, values: torch.Tensor) -> torch.Tensor:
        return functional.linear(values, self.weights[f"{role}_weight"], self.weights.get(f"{role}_bias"))

    def _norm(self, role: str, values: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{role}_weight"], self.weights[f"{role}_bias"]
        return functional.layer_norm(values, weight.shape, weight, bias, self.spec.layer_norm_eps)

    def _position_bias(self, length: int) -> torch.Tensor | None:
        if not self.spec.relative_attention_num_buckets:
            return None
        positions = torch.arange(length)
        buckets = relative_position_buckets(positions[None, :] - positions[:, None], self.spec)
        table: torch.Tensor = self.weights["relative_position_bias"]
        return table[buckets.to(table.device)].permute(2, 0, 1).unsqueeze(0)


def attention_bias(
    mask: torch.Tensor | None, spec: BlockSpec, position_bias: torch.Tensor | None, length: int, like: torch.Tensor
) -> torch.Tensor | None:
    """What is added to attention scores, broadcastable to [batch, heads, tokens, tokens]; None for nothing."""
    bias = position_bias
    allowed: torch.Tensor | None = None if mask is None else mask[:, None, None, :]
    if spec.is_causal:
        causal = torch.ones(length, length, dtype=torch.bool, device=like.device).tril()
        allowed = causal if allowed is None else allowed & causal
    if allowed is not None:
        blocked = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(
            ~allowed, torch.finfo(like.dtype).min
        )
        bias = blocked if bias is None else bias + blocked
    return bias


def relative_position_buckets(relative: torch.Tensor, spec: BlockSpec) -> torch.Tensor:
    """Bucket of each key position minus query position, as T5 and MPNet learn it (Raffel et al. 2020)."""
    half = spec.relative_attention_num_buckets // 2
    exact = half // 2
    distance = relative.abs()
    scale = (half - exact) / math.log(spec.relative_attention_max_distance / exact)
    far = exact + (torch.log(distance.float() / exact) * scale).long()
    return torch.where(relative > 0, half, 0) + torch.where(distance < exact, distance, far.clamp(max=half - 1))


def _split_heads(projected: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[batch, heads, tokens, d / heads] of [batch, tokens, d]."""
    batch, tokens, _ = projected.shape
    return projected.reshape(batch, tokens, num_heads, -1).transpose(1, 2)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "silu": functional.silu,
}


class CrossAttention(nn.Module):
    """Attention from one modality's tokens to the other's, started from both encoders' own projections.

    Queries start as the querying block's, keys and values as the context block's where the widths agree;
    where they differ the context is projected first and the querying block's projections serve for all.
    The queries and keys come from models that never met, so all four projections train.
    """

    def __init__(self, query_block: BlockWeights, context_block: BlockWeights) -> None:
        super().__init__()
        width, context_width = (len(block.tensors["output_weight"]) for block in (query_block, context_block))
        self.num_heads = query_block.spec.num_attention_heads
        self.query_norm = _norm_from(query_block)
        self.context_norm = _norm_from(context_block)
        same = width == context_width
        self.context_projection = nn.Identity() if same else nn.Linear(context_width, width)
        self.query = _linear_from(query_block, "query")
        self.key = _linear_from(context_block if same else query_block, "key")
        self.value = _linear_from(context_block if same else query_block, "value")
        self.output = _linear_from(query_block, "output")

    def forward(self, hidden: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[batch, tokens, d] for `hidden` [batch, tokens, d] and `context` [batch, keys, d of the context]."""
        entering = self.context_projection(self.context_norm(context))
        queries, keys, values = (
            _split_heads(projected, self.num_heads)
            for projected in (self.query(self.query_norm(hidden)), self.key(entering), self.value(entering))
        )
        allowed = None if mask is None else mask[:, None, None, :]
        attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
        return self.output(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def to_one_key(self, token: torch.Tensor) -> torch.Tensor:
        """What `forward` gives for a context of one token [batch, 1, d]: softmax over one key is 1."""
        return self.output(self.value(self.context_projection(self.context_norm(token))))  # type: ignore[no-any-return]


class DecoderBlock(nn.Module):
    """An encoder's next layer with a gated cross-attention between its halves.

        a = the block's self-attention half of h          frozen
        y = the block's MLP half of  a + tanh(g) CrossAttention(a, context)

    With g = 0, where it starts, y is the encoder's own next hidden state. Deviates from the SAFFE paper's
    eq. 2-4, which has no gate and no MLP; the gate is Flamingo's (Alayrac et al. 2022, eq. 1).
    """

    def __init__(self, query_block: BlockWeights, context_block: BlockWeights) -> None:
        super().__init__()
        self.block = EncoderBlock(query_block)
        self.cross_attention = CrossAttention(query_block, context_block)
        self.null_token = nn.Parameter(torch.randn(1, 1, len(context_block.tensors["output_weight"])) * 0.02)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        context: torch.Tensor | None,
        context_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """`context` None stands for no text: the learned null token is its only key."""
        attended = self.block.attend(hidden, mask)
        if context is None:
            crossed = self.cross_attention.to_one_key(self.null_token)
        else:
            crossed = self.cross_attention(attended, context, context_mask)
        return self.block.feed_forward(attended + torch.tanh(self.gate) * crossed)


def _linear_from(block: BlockWeights, role: str) -> nn.Linear:
    weight = torch.tensor(block.tensors[f"{role}_weight"])
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        bias = block.tensors.get(f"{role}_bias")
        linear.bias.zero_() if bias is None else linear.bias.copy_(torch.tensor(bias))
    return linear


def _norm_from(block: BlockWeights) -> nn.LayerNorm:
    """The norm in front of the block's attention; a plain one for post-LN blocks, whose input is normed."""
    norm = nn.LayerNorm(len(block.tensors["output_weight"]), eps=block.spec.layer_norm_eps)
    if block.spec.norm_first:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor(block.tensors["attention_norm_weight"]))
            norm.bias.copy_(torch.tensor(block.tensors["attention_norm_bias"]))
    return norm
