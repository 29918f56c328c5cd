"""STRUCTURE: each side keeps its encoder's neighbourhoods (Groeger et al. 2025, arXiv 2506.16895).

For the encoder's own vectors X of a batch and what a fusion makes of them, Z = f(X):

    P = softmax(C C' / tau),  C = unit rows of X less their mean;  Q the same of Z
    R(X, Z) = 1/L sum_{l = 1..L} 1/l JS(P^l, Q^l),  JS averaged over rows
    loss = info_nce + lambda (R(photos) + R(texts))

lambda is the objective's weight; it rises linearly over the first steps. tau is 0.05.

`structure` is this formula. `structure_published` is what the paper's code computes, which differs in four ways: KL's
arguments are the other way round, so that the divergence has no upper bound; the two sides are averaged instead of
added; the weights 1/l count only with several levels (with one they are 1 anyway); and tau is the temperature of
info_nce, which is 0.05 in the fusion `structure` too. A row's similarity to itself holds most of its mass at this
temperature, which makes the term small; `structure` can leave it out.

The fusion `structure` is `contrastive`, a linear map with bias on each side, trained with this loss. lambda and the
fixed temperature are the paper's, epochs and learning rate those of `contrastive`. The paper's other head adds a
low-rank residual behind a gate that starts at exactly 0. The gate multiplies the gradient of its output map, and a
sigmoid that is 0 has no slope, so neither ever moves and that head stays linear: it is left out. The paper has batches
of 4,096 pairs, one caption of each photo, and up to 1,000 epochs with early stopping, on 80,000 pairs. Here every
caption takes part in the contrast, and --dropout applies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.losses import Contrast
from saffe_cache.fusion.options import ObjectiveOptions

TEMPERATURE = 0.05
_LEAST = 1e-30
"""Smallest number whose logarithm is taken: at 0 the gradient of q log q is infinite."""
_PUBLISHED_LEAST = 1e-12
"""What the paper's code adds before each logarithm."""


def neighbourhoods(
    vectors: torch.Tensor, temperature: float = TEMPERATURE, *, has_diagonal: bool = True
) -> torch.Tensor:
    """How similar each row of `vectors` [n, d] is to all: [n, n], rows that sum to 1.

    Without `has_diagonal`, a row's similarity to itself does not count; n is then at least 2.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        unit = functional.normalize(vectors if vectors.dtype == torch.float64 else vectors.float(), dim=1)
        centred = unit - unit.mean(dim=0)
        scores = centred @ centred.T / temperature
    if not has_diagonal:
        scores = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool, device=scores.device), -torch.inf)
    return scores.softmax(dim=1)


def jensen_shannon(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """1/2 KL(P || M) + 1/2 KL(Q || M), M = (P + Q) / 2, mean over rows: from 0 to ln 2."""
    middle = ((left + right) / 2).clamp(min=_LEAST).log()
    parts = [one * (one.clamp(min=_LEAST).log() - middle) for one in (left, right)]
    return torch.stack(parts).sum(dim=-1).mean()


def published_divergence(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """1/2 KL(M || P) + 1/2 KL(M || Q), as coded: at least 0, without an upper bound."""
    middle = (left + right) / 2 + _PUBLISHED_LEAST
    parts = [middle * (middle.log() - (one + _PUBLISHED_LEAST).log()) for one in (left, right)]
    return torch.stack(parts).sum(dim=-1).mean()


def structure_term(
    own: torch.Tensor,
    mapped: torch.Tensor,
    *,
    levels: int = 1,
    temperature: float = TEMPERATURE,
    has_diagonal: bool = True,
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = jensen_shannon,
) -> torch.Tensor:
    """R(X, Z) of the module's docstring: `own` is X [n, D], without gradient, `mapped` Z [n, d]; L is `levels`.

    It does not change if Z is scaled, rotated, or permuted together with X. Memory grows with n^2, and time with n^3
    where there are several levels.
    """
    first = [neighbourhoods(of, temperature, has_diagonal=has_diagonal) for of in (own.detach(), mapped)]
    total, (left, right) = divergence(*first), first
    for level in range(2, levels + 1):
        left, right = left @ first[0], right @ first[1]
        total = total + divergence(left, right) / level
    return total / levels


class Structure(nn.Module):
    """The two terms of a batch, and of its unpaired photos and texts; of a photo's texts, one takes part."""

    step: torch.Tensor

    def __init__(self, options: ObjectiveOptions) -> None:
        super().__init__()
        self._options = options
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))  # so that a resumed run rises on

    def forward(self, seen: Contrast) -> torch.Tensor:
        rising = self._options.structure_warmup
        part = (self.step / rising).clamp(max=1) if rising else 1.0
        self.step += 1
        return part * self.combine(self.term(*seen.photo_side()), self.term(*seen.text_side()))

    def term(self, own: torch.Tensor, mapped: torch.Tensor) -> torch.Tensor:
        """R of one side."""
        options = self._options
        has_diagonal = options.structure_diagonal
        return structure_term(own, mapped, levels=options.structure_levels, has_diagonal=has_diagonal)

    def combine(self, photos: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Both sides' terms as one."""
        return photos + texts


class PublishedStructure(Structure):
    """The same as the paper's code computes it."""

    def term(self, own: torch.Tensor, mapped: torch.Tensor) -> torch.Tensor:
        return structure_term(own, mapped, levels=self._options.structure_levels, divergence=published_divergence)

    def combine(self, photos: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return (photos + texts) / 2
