"""Building blocks of fusions: dropout, sums over normed tokens, learning rates of parameters, and heads.

Sums over normed tokens are computed without the normed tokens. A layer norm without gain and bias is s (x - mean(x)),
with a scale s of each token. Subtracting the mean commutes with sums over tokens, and can be left to the other factor
of a product with a vector:

    LN(x) . q = s x . (q - mean(q))        sum_t w_t LN(x_t) = y - mean(y)   with   y = sum_t w_t s_t x_t

So pooling normed tokens reads the tokens as they are and never allocates a second array of their size: not in the
forward pass and, since cached tokens take no gradient, not in the backward pass.

A head makes one vector, [batch, out], of the tokens of P layers; a `TextMap` maps a text's own vector into its space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.core import ranks

States = Sequence[torch.Tensor]
"""Tokens of P layers, [batch, tokens, width] each."""
Mask = torch.Tensor | None
"""bool [batch, tokens], True on real tokens; None where no token is padded."""

_LEVELS = 2**16


class Dropout(nn.Dropout):
    """torch's dropout on an accelerator. On a CPU, where torch draws a double for every number, 16 random bits decide.

    The probability is rounded to a multiple of 2^-16, and the numbers that are kept are scaled accordingly.

    A rank that computes some rows of a batch drops in them what one process would, and draws as much: torch's own
    dropout would draw other numbers. The rows are the first axis.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = ranks.drawn_rows() if self.training and self.p else None
        shape = input.shape if rows is None else (rows.total, *input.shape[1:])
        if input.device.type != "cpu" or not self.training or not self.p:
            if rows is None:
                return functional.dropout(input, self.p, self.training)
            return input * functional.dropout(input.new_ones(shape), self.p)[rows.own]
        num_dropped, count = min(round(self.p * _LEVELS), _LEVELS - 1), math.prod(shape)
        words = torch.empty(count // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
        levels = words.view(torch.int16)[:count].view(shape)
        if rows is not None:
            levels = levels[rows.own]
        is_kept = levels >= num_dropped - _LEVELS // 2
        return input * is_kept.to(input.dtype).mul_(_LEVELS / (_LEVELS - num_dropped))


_EPS = 1e-5
"""torch's default for layer norms."""


class NormedTokens:
    """A layer's tokens [batch, tokens, d], normed where they are used.

    Sums over tokens are float32, also under autocast.
    """

    def __init__(self, state: torch.Tensor) -> None:
        self._state = state.float()
        squares = torch.linalg.vector_norm(self._state, dim=-1).square() / state.shape[-1]
        self._means = self._state.mean(dim=-1)
        variances = squares - self._means.square()
        self._scales = (variances.clamp(min=0) + _EPS).rsqrt().unsqueeze(1)

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        """Products of the tokens with each of `vectors` [d, n]: [batch, n, tokens]."""
        centred = (vectors - vectors.mean(dim=0)).T.contiguous()  # this layout makes the backward product fast on a CPU
        tokens = self._state
        if torch.is_autocast_enabled(tokens.device.type):  # a large mean would leave no digits for the rest
            tokens = tokens - self._means.unsqueeze(-1)
        products = functional.linear(tokens, centred)
        return products.transpose(1, 2) * self._scales  # type: ignore[no-any-return]

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums over the tokens with `weights` [batch, n, tokens]: [batch, n, d]."""
        with torch.autocast(weights.device.type, enabled=False):
            sums = (weights * self._scales) @ self._state
        return sums - sums.mean(dim=-1, keepdim=True)  # type: ignore[no-any-return]

    def sums_of_squares(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums over the squares of the tokens' numbers with `weights` [batch, n, tokens]: [batch, n, d]."""
        means = self._means.unsqueeze(1)
        with torch.autocast(weights.device.type, enabled=False):
            scaled = weights * self._scales.square()
            squares = scaled @ self._state.square() - 2 * (scaled * means) @ self._state
        return squares + (scaled * means.square()).sum(dim=-1, keepdim=True)  # type: ignore[no-any-return]


def mean_weights(state: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Weights of the mean over the tokens that the mask keeps, [batch, 1, tokens]; zeros if it keeps none."""
    kept = state.new_ones(state.shape[:2]) if mask is None else mask.to(state.dtype)
    return (kept / kept.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(1)


def summary_weights(state: torch.Tensor, mask: Mask, *, has_class_token: bool = True) -> torch.Tensor:
    """Weights of the first token, and of the mean of the others: [batch, 2, tokens].

    Without a class token, weights of the mean of all tokens: [batch, 1, tokens].
    """
    if not has_class_token:
        return mean_weights(state, mask)
    weights = state.new_zeros(state.shape[0], 2, state.shape[1])
    weights[:, 0, 0] = 1
    weights[:, 1:, 1:] = mean_weights(state[:, 1:], None if mask is None else mask[:, 1:])
    return weights


class Learning(NamedTuple):
    """How fast a parameter learns, and whether it decays.

    A module may have a class attribute `learning`: a `Learning` by the name of one of its parameters or submodules, or
    by "*" for everything in it. What is declared further inside wins. Everything else learns at the run's rate, and its
    matrices decay.
    """

    rate: float = 1.0
    """Multiple of the run's learning rate."""
    decays: bool = True
    """Whether it decays if it is a matrix; vectors and scalars never do."""


def parameter_groups(module: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, object]]:
    """Groups of trainable parameters for AdamW."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, learning in _parameters(module, Learning()):
        if parameter.requires_grad:
            decay = weight_decay if learning.decays and parameter.ndim > 1 else 0.0
            groups.setdefault((learning.rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _parameters(module: nn.Module, usual: Learning) -> Iterator[tuple[nn.Parameter, Learning]]:
    """In the order of `module.parameters()`."""
    declared: Mapping[str, Learning] = getattr(module, "learning", {})
    usual = declared.get("*", usual)
    for name, parameter in module.named_parameters(recurse=False):
        yield parameter, declared.get(name, usual)
    for name, child in module.named_children():
        yield from _parameters(child, declared.get(name, usual))


def zero_linear(in_size: int, out_size: int) -> nn.Linear:
    """A linear map that starts at zero."""
    linear = nn.Linear(in_size, out_size)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def identity_linear(size: int) -> nn.Linear:
    """A linear map that starts as the identity."""
    linear = nn.Linear(size, size)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def summarize(states: States, mask: Mask, *, has_class_token: bool = True, has_spread: bool = False) -> torch.Tensor:
    """First token and mean of the other tokens of each layer, each token normed: [batch, 2 P d].

    Without a class token, the mean of all tokens: [batch, P d]. The linear baselines and the attention head's linear
    path see this. `has_spread`: the standard deviation over the tokens that are averaged follows in each layer.
    """
    parts = []
    for state in states:
        tokens, weights = NormedTokens(state), summary_weights(state, mask, has_class_token=has_class_token)
        sums = tokens.sums(weights)
        parts.append(sums.flatten(1))
        if has_spread:
            squares = tokens.sums_of_squares(weights[:, -1:]).squeeze(1)
            parts.append((squares - sums[:, -1].square()).clamp(min=0).sqrt())
    return torch.cat(parts, dim=-1)


def masked_mean(values: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Mean over tokens that the mask keeps; zero where it keeps none."""
    if mask is None:
        return values.mean(dim=1)
    return (values * mean_weights(values, mask).transpose(1, 2)).sum(dim=1)


class AttentionHead(nn.Module):
    """Learned queries pool the tokens of each layer; an MLP on the pooled vectors corrects a linear map.

    A learned query q needs no key projection: (K x) . q = x . (K^T q), so K is folded into it. Values are
    projected after pooling, which is the same by linearity. Both save a d x d product for every token, and
    the head then costs little more than reading the tokens: three times, normed nowhere.

        z = linear(summary) + mlp(norm([pooled; summary; extra]))

    The MLP starts at zero, and `linear` may be started from the ridge regression: the head then is
    that regression before it is trained.

    392 P d + 1,026 f + 1,024 + (s + 1,026) k parameters by default: P layers of width d, a summary of s, of which the
    MLP sees f = 384 P + s + extra_size, and results of width k.
    """

    learning: ClassVar = {"pool_queries": Learning(2.5, decays=False)}

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        output_size: int,
        *,
        summary_size: int,
        extra_size: int = 0,
        num_heads: int = 8,
        head_size: int = 48,
        mlp_size: int = 1024,
        dropout: float = 0.5,
        has_class_token: bool = True,
    ) -> None:
        """Pool tokens of width `hidden_size` of `num_layers` = P layers.

        Args:
            summary_size: width of what `summarize` returns.
            extra_size: width of a vector that the MLP sees besides the tokens; 0 for none.
            num_heads: learned queries for each layer.
            head_size: width of what each of them pools.
            dropout: of the summary and in the MLP.
        """
        super().__init__()
        self.has_class_token = has_class_token
        self.pool_queries = nn.Parameter(torch.randn(num_layers, hidden_size, num_heads) * 0.02)
        self.pool_values = nn.Parameter(torch.randn(num_layers, num_heads, hidden_size, head_size) * hidden_size**-0.5)
        feature_size = num_layers * num_heads * head_size + summary_size + extra_size
        self.norm = nn.LayerNorm(feature_size)
        inner, last = nn.Linear(feature_size, mlp_size), zero_linear(mlp_size, output_size)
        self.mlp = nn.Sequential(Dropout(dropout), inner, nn.GELU(), Dropout(dropout), last)
        self.linear = nn.Linear(summary_size, output_size)
        self.dropout = Dropout(dropout)

    def forward(
        self, states: States, mask: Mask, summary: torch.Tensor | None = None, extra: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`summary` [batch, summary_size]: of other tokens than those that are pooled. `extra` [batch, extra_size]."""
        pooled, summaries = [], []
        for state, queries, values in zip(states, self.pool_queries.unbind(), self.pool_values.unbind(), strict=True):
            summary_part = None
            if summary is None:
                summary_part = summary_weights(state, mask, has_class_token=self.has_class_token)
            sums = _pool(state, mask, queries, summary_part)
            pooled.append(torch.einsum("bhd,hdv->bhv", sums[:, : len(values)], values).flatten(1))
            summaries.append(sums[:, len(values) :].flatten(1))
        summary = torch.cat(summaries, dim=-1) if summary is None else summary
        seen = [*pooled, summary] if extra is None else [*pooled, summary, extra]
        return self.linear(self.dropout(summary)) + self.mlp(self.norm(torch.cat(seen, dim=-1)))  # type: ignore[no-any-return]

    def attention_weights(self, states: States, mask: Mask, *_: torch.Tensor | None) -> torch.Tensor:
        """Weights with which the learned queries of all layers pool the tokens, [batch, layers * heads, tokens]."""
        layers = zip(states, self.pool_queries.unbind(), strict=True)
        return torch.cat([_pool_weights(NormedTokens(state), mask, queries) for state, queries in layers], dim=1)


def _pool(state: torch.Tensor, mask: Mask, queries: torch.Tensor, summary: torch.Tensor | None) -> torch.Tensor:
    """What each of `queries` [d, heads] pools from a layer, [batch, heads, d].

    With `summary`, weights [batch, n, tokens], the n sums with these weights follow: [batch, heads + n, d].
    """
    tokens = NormedTokens(state)
    weights = _pool_weights(tokens, mask, queries)
    return tokens.sums(weights if summary is None else torch.cat([weights, summary], dim=1))


def _pool_weights(tokens: NormedTokens, mask: Mask, queries: torch.Tensor) -> torch.Tensor:
    """Softmax over the tokens, for each of `queries` [d, heads]: [batch, heads, tokens]."""
    scores = tokens.products(queries)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


class MeanHead(nn.Module):
    """Mean of the tokens of each layer, then one linear map."""

    def __init__(self, hidden_size: int, num_layers: int, output_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_layers * hidden_size, output_size)

    def forward(self, states: States, mask: Mask) -> torch.Tensor:
        return self.linear(torch.cat([masked_mean(state, mask) for state in states], dim=-1))  # type: ignore[no-any-return]


class FlattenHead(nn.Module):
    """All tokens of all layers, concatenated, enter one linear map: the SAFFE paper's head.

    For reproduction: on Flickr8k it overfits at once and loses to a ridge regression on two pooled vectors.
    """

    def __init__(
        self, hidden_size: int, num_layers: int, num_tokens: int, output_size: int, *, has_relu: bool = False
    ) -> None:
        """`has_relu`: as in the release; cosines to targets of both signs then cannot exceed about 0.7."""
        super().__init__()
        self.linear = nn.Linear(num_layers * num_tokens * hidden_size, output_size)
        self.has_relu = has_relu

    def forward(self, states: States, mask: Mask) -> torch.Tensor:
        assert mask is None, "a flattened layer needs a fixed number of tokens"
        vectors: torch.Tensor = self.linear(torch.cat(list(states), dim=1).flatten(1))
        return functional.relu(vectors) + 1e-9 if self.has_relu else vectors  # a dead row keeps a direction


class MatchHead(nn.Module):
    """Do this photo and this text belong together? One logit, from the fused tokens and the agreement of both vectors.

    Separate from the head that retrieval uses, as in ALBEF (Li et al. 2021), so that matching does not harm retrieval:
    no gradient passes to the two vectors.
    """

    def __init__(self, hidden_size: int, num_layers: int, output_size: int, inner_size: int = 512) -> None:
        super().__init__()
        inner = nn.Linear(num_layers * hidden_size + output_size, inner_size)
        self.mlp = nn.Sequential(inner, nn.GELU(), nn.Linear(inner_size, 1))

    def forward(self, states: States, mask: Mask, vectors: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Logits [batch] of fused `states`, their unit vectors and the unit vectors of the texts as queries."""
        pooled = [NormedTokens(state).sums(mean_weights(state, mask)).flatten(1) for state in states]
        agreement = (vectors * queries).detach() * queries.shape[-1] ** 0.5
        return self.mlp(torch.cat([*pooled, agreement], dim=-1)).squeeze(-1)  # type: ignore[no-any-return]


class TextMap(nn.Module):
    """Maps the text encoder's vector into the shared space: starts as the identity, learns a small correction.

    k² + 1,026 k + 512 parameters for vectors of width k.
    """

    learning: ClassVar = {"*": Learning(0.15, decays=False)}

    def __init__(self, size: int, dropout: float, inner_size: int = 512) -> None:
        super().__init__()
        self.linear = identity_linear(size)
        inner = nn.Linear(size, inner_size)
        self.mlp = nn.Sequential(inner, nn.GELU(), Dropout(dropout), zero_linear(inner_size, size))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """`vectors` [batch, size] of any length; only their direction counts."""
        unit = functional.normalize(vectors, dim=-1)
        return self.linear(unit) + self.mlp(unit * unit.shape[-1] ** 0.5)  # type: ignore[no-any-return]
