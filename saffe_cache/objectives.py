"""Losses. Pure torch."""

from __future__ import annotations

import math

import torch
from torch import nn


def info_nce(
    gallery: torch.Tensor, queries: torch.Tensor, positives: torch.Tensor, temperature: torch.Tensor
) -> torch.Tensor:
    """InfoNCE with several positives per row, in both directions.

        L = 1/2 (l(S, P) + l(S^T, P^T)),  S = gallery queries^T / temperature
        l(S, P) = -mean_i 1/|P_i| sum_{j in P_i} log softmax(S_i)_j

    With one positive per row it is CLIP's loss (Radford et al. 2021, fig. 3); averaging over the positives
    is SupCon's "out" form (Khosla et al. 2020, eq. 2). It does not reach 0 where a row has several.

    Args:
        gallery: unit vectors [n, d].
        queries: unit vectors [m, d].
        positives: bool [n, m], at least one True in each row and column.
        temperature: positive scalar.
    """
    scores = gallery @ queries.T / temperature
    return (_one_direction(scores, positives) + _one_direction(scores.T, positives.T)) / 2


def _one_direction(scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    weights = positives.to(scores.dtype) / positives.sum(dim=1, keepdim=True)
    return -(weights * scores.log_softmax(dim=1)).sum(dim=1).mean()


class Temperature(nn.Module):
    """A learned temperature, kept within [0.01, 0.5]. Start 0.07 as in CLIP."""

    def __init__(self, start: float = 0.07) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(start).log())

    def forward(self) -> torch.Tensor:
        # The parameter itself is kept in range, as in CLIP: clamping its value has no gradient outside, from
        # where it would never come back.
        with torch.no_grad():
            self.log.clamp_(math.log(0.01), math.log(0.5))
        return self.log.exp()
