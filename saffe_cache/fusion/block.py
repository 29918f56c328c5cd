"""An encoder's own block, rebuilt from cached weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.core.features import BlockSpec, BlockWeights

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of the tokens that a causal block has seen, each [batch, heads, tokens, d / heads]."""

_PORTION_TOKENS = 1024
"""Tokens that pass a block together on a CPU."""


class EncoderBlock(nn.Module):
    """One frozen transformer layer. `forward(hidden_states[i])` equals the model's `hidden_states[i + 1]`.

    Args of all methods: `hidden` [batch, tokens, d]; `mask` bool [batch, tokens], True on real tokens.
    """

    def __init__(self, weights: BlockWeights) -> None:
        super().__init__()
        assert isinstance(weights.spec, BlockSpec)
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
        if self.weights["output_weight"].requires_grad:  # each portion would add its own gradient of the weights
            return self._attend(hidden, mask)
        return _in_portions(self._attend, hidden) if mask is None else _in_portions(self._attend, hidden, mask)

    def extend(self, hidden: torch.Tensor, past: KeysValues | None) -> tuple[torch.Tensor, KeysValues]:
        """Run a causal block on new tokens, given the keys and values of the tokens before them.

        Returns:
            The output of the new tokens, and the keys and values of all tokens.
        """
        assert self.spec.is_causal
        queries, keys, values = self.project(self._norm("attention_norm", hidden) if self.spec.norm_first else hidden)
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        num_new, num_all = hidden.shape[1], keys.shape[2]
        allowed = torch.ones(num_new, num_all, dtype=torch.bool, device=hidden.device).tril(num_all - num_new)
        attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
        return self._feed_forward(self._attended(attended, hidden)), (keys, values)

    def at(self, hidden: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """`forward` at one place of each row, int64 [batch]: [batch, d], without what other places need."""
        rows, numbers = torch.arange(len(hidden), device=hidden.device), torch.arange(mask.shape[1], device=mask.device)
        entering = self._norm("attention_norm", hidden) if self.spec.norm_first else hidden
        given = {"query": entering[rows, places][:, None], "key": entering, "value": entering}
        queries, keys, values = (
            split_heads(self._linear(role, one), self.spec.num_attention_heads) for role, one in given.items()
        )
        seen = mask & (numbers <= places[:, None]) if self.spec.is_causal else mask
        bias, allowed = self._position_bias(mask.shape[1]), seen[:, None, None]
        if bias is not None:
            allowed = bias[0, :, places].transpose(0, 1)[:, :, None].masked_fill(~allowed, torch.finfo(bias.dtype).min)
        attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
        return self._feed_forward(self._attended(attended, hidden[rows, places][:, None]))[:, 0]

    def feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The second half: the MLP with its residual and norm."""
        return _in_portions(self._feed_forward, hidden)

    def _attend(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        entering = self._norm("attention_norm", hidden) if self.spec.norm_first else hidden
        queries, keys, values = self.project(entering)
        bias = attention_bias(mask, self.spec, self._position_bias(hidden.shape[1]), hidden.shape[1], hidden)
        return self._attended(functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias), hidden)

    def _attended(self, attended: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Output projection, residual and norm of the heads' output [batch, heads, tokens, d / heads]."""
        attended = self._linear("output", attended.transpose(1, 2).flatten(2))
        if "attention_layer_scale" in self.weights:
            attended = attended * self.weights["attention_layer_scale"]
        attended = attended + hidden
        return attended if self.spec.norm_first else self._norm("attention_norm", attended)

    def _feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
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
        """Queries, keys and values, each [batch, heads, tokens, d / heads], of the attention's input."""
        queries, keys, values = (
            split_heads(self._linear(role, entering), self.spec.num_attention_heads)
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


def _in_portions(half: Callable[..., torch.Tensor], hidden: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Run one half of a block over a batch, on a CPU a few rows at a time.

    Intermediate results are then small enough to stay in the processor's caches, and for the C library to reuse their
    memory: above 32 MB it requests every array from the system, which clears each page and maps it again.
    """
    rows = max(1, _PORTION_TOKENS // hidden.shape[1])
    if torch.compiler.is_compiling() or hidden.device.type != "cpu" or len(hidden) <= rows:
        return half(hidden, *others)
    return torch.cat(
        [half(*parts) for parts in zip(*(torch.split(one, rows) for one in (hidden, *others)), strict=True)]
    )


def attention_bias(
    mask: torch.Tensor | None, spec: BlockSpec, position_bias: torch.Tensor | None, length: int, like: torch.Tensor
) -> torch.Tensor | None:
    """The bias of attention scores, broadcastable to [batch, heads, tokens, tokens]; None for no bias."""
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


def split_heads(projected: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[batch, heads, tokens, d / heads] of [batch, tokens, d]."""
    batch, tokens, _ = projected.shape
    return projected.reshape(batch, tokens, num_heads, -1).transpose(1, 2)


def key_weights(queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The weights of scaled dot-product attention, [batch, heads * queries, keys].

    `queries` and `keys` [batch, heads, tokens, d / heads]; `mask` bool [batch, keys], True on real keys.
    """
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    weights: torch.Tensor = scores.softmax(dim=-1)
    return weights.flatten(1, 2)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "silu": functional.silu,
}
