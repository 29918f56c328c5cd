"""Sums over normed tokens, without the normed tokens.

A layer norm without gain and bias is s (x - mean(x)), with a scale s of each token. Taking the mean away commutes with
sums over tokens, and can be left to the other factor of a product with a vector:

    LN(x) . q = s x . (q - mean(q))        sum_t w_t LN(x_t) = y - mean(y)   with   y = sum_t w_t s_t x_t

So what pools normed tokens reads the tokens as they are, and never makes a second array of their size, neither
forward nor, where they are cached and take no gradient, backward.
"""

from __future__ import annotations

import torch
from torch.nn import functional

_EPS = 1e-5
"""torch's own for layer norms."""


class NormedTokens:
    """A layer's tokens [batch, tokens, d], each normed where it is used. Float32, under autocast too."""

    def __init__(self, state: torch.Tensor) -> None:
        self._state = state.float()
        squares = torch.linalg.vector_norm(self._state, dim=-1).square() / state.shape[-1]
        variances = squares - self._state.mean(dim=-1).square()
        self._scales = (variances.clamp(min=0) + _EPS).rsqrt().unsqueeze(1)

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        """With each of `vectors` [d, n]: [batch, n, tokens]."""
        centred = (vectors - vectors.mean(dim=0)).T.contiguous()  # in this order the backward product is fast on a CPU
        with torch.autocast(vectors.device.type, enabled=False):
            products = functional.linear(self._state, centred)
        return products.transpose(1, 2) * self._scales  # type: ignore[no-any-return]

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """[batch, n, d], weighted by `weights` [batch, n, tokens]."""
        with torch.autocast(weights.device.type, enabled=False):
            sums = (weights * self._scales) @ self._state
        return sums - sums.mean(dim=-1, keepdim=True)  # type: ignore[no-any-return]


def mean_weights(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[batch, 1, tokens]: those of the mean over the tokens that the mask keeps; zeros where it keeps none."""
    kept = state.new_ones(state.shape[:2]) if mask is None else mask.to(state.dtype)
    return (kept / kept.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(1)


def summary_weights(state: torch.Tensor, mask: torch.Tensor | None, *, has_class_token: bool = True) -> torch.Tensor:
    """[batch, 2, tokens]: those of the first token, and of the mean of the others.

    [batch, 1, tokens] where the first token is one of many: those of the mean of all.
    """
    if not has_class_token:
        return mean_weights(state, mask)
    weights = state.new_zeros(len(state), 2, state.shape[1])
    weights[:, 0, 0] = 1
    weights[:, 1:, 1:] = mean_weights(state[:, 1:], None if mask is None else mask[:, 1:])
    return weights
