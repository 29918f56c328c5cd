"""Building blocks of fusions: dropout, sums over normed tokens, and learning rates of parameters.

Sums over normed tokens are computed without the normed tokens. A layer norm without gain and bias is s (x - mean(x)),
with a scale s of each token. Subtracting the mean commutes with sums over tokens, and can be left to the other factor
of a product with a vector:

    LN(x) . q = s x . (q - mean(q))        sum_t w_t LN(x_t) = y - mean(y)   with   y = sum_t w_t s_t x_t

So pooling normed tokens reads the tokens as they are and never allocates a second array of their size: not in the
forward pass and, since cached tokens take no gradient, not in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

States = Sequence[torch.Tensor]
"""Tokens of P layers, [batch, tokens, width] each."""
Mask = torch.Tensor | None
"""bool [batch, tokens], True on real tokens; None where no token is padded."""

_LEVELS = 2**16


class Dropout(nn.Dropout):
    """torch's dropout on an accelerator. On a CPU, where torch draws a double for every number, 16 random bits decide.

    The probability is rounded to a multiple of 2^-16, and the numbers that are kept are scaled accordingly.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu" or not self.training or not self.p:
            return functional.dropout(input, self.p, self.training)
        num_dropped = min(round(self.p * _LEVELS), _LEVELS - 1)
        words = torch.empty(input.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
        levels = words.view(torch.int16)[: input.numel()].view(input.shape)
        is_kept = levels >= num_dropped - _LEVELS // 2
        return input * is_kept.to(input.dtype).mul_(_LEVELS / (_LEVELS - num_dropped))


_EPS = 1e-5
"""torch's default for layer norms."""


class NormedTokens:
    """A layer's tokens [batch, tokens, d], normed where they are used. Float32, also under autocast."""

    def __init__(self, state: torch.Tensor) -> None:
        self._state = state.float()
        squares = torch.linalg.vector_norm(self._state, dim=-1).square() / state.shape[-1]
        variances = squares - self._state.mean(dim=-1).square()
        self._scales = (variances.clamp(min=0) + _EPS).rsqrt().unsqueeze(1)

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        """Products of the tokens with each of `vectors` [d, n]: [batch, n, tokens]."""
        centred = (vectors - vectors.mean(dim=0)).T.contiguous()  # this layout makes the backward product fast on a CPU
        with torch.autocast(vectors.device.type, enabled=False):
            products = functional.linear(self._state, centred)
        return products.transpose(1, 2) * self._scales  # type: ignore[no-any-return]

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums over the tokens with `weights` [batch, n, tokens]: [batch, n, d]."""
        with torch.autocast(weights.device.type, enabled=False):
            sums = (weights * self._scales) @ self._state
        return sums - sums.mean(dim=-1, keepdim=True)  # type: ignore[no-any-return]


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
    weights = state.new_zeros(len(state), 2, state.shape[1])
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
