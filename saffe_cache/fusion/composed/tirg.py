"""TIRG: the text gates the photo's vector and adds a residual (Vo et al. 2019, arXiv 1812.07119; code google/tirg).

    c = [r; m]   out = a1 sigmoid(gate(c)) * r + a2 residual(c)
    gate = Linear(2 k -> k) relu BN          residual = Linear(2 k -> k) relu Linear(2 k -> 2 k) relu BN

It adds 8 k² + 12 k + 2 parameters to the frame's: 2.10 M at the paper's width of 512. Its loss is the cross-entropy of
query-target products over a batch with a learned scale, 4 x 4 at first: `info_nce` at its learned temperature, which
starts at 1/14. Ours also contrasts targets with queries.

Differs from the source: the encoders are frozen and photos mapped as the frame does, r and m enter with length sqrt(k),
so that their numbers are as large as the gate's, and the optimiser is not SGD over 160,000 steps. a1 starts at 1 as
published, a2 at A2: the published 10 drowns the reference at first, and few queries do not bring it back.

The batch norms see the queries of a batch. Ranks would each see their own, so a training on several is refused. In
evaluation they use running means, and no query depends on the others.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from saffe_cache.fusion.base import Blocks, Fusion
from saffe_cache.fusion.composed.frame import ComposedFusion
from saffe_cache.fusion.layers import Learning
from saffe_cache.fusion.options import FusionShape


class TirgFusion(ComposedFusion):
    """A gated reference and a residual, with one learned weight each."""

    learning: ClassVar = {**Fusion.learning, "weights": Learning(5.0, decays=False)}
    A2 = 0.1

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        size = shape.text_size
        both = 2 * size
        self.gate = nn.Sequential(nn.BatchNorm1d(both), nn.ReLU(), nn.Linear(both, size))
        self.residual = nn.Sequential(
            nn.BatchNorm1d(both), nn.ReLU(), nn.Linear(both, both), nn.ReLU(), nn.Linear(both, size)
        )
        self.weights = nn.Parameter(torch.tensor([1.0, self.A2]))

    def compose(self, photos: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        scale = self.shape.text_size**0.5
        both = scale * torch.cat([photos, texts], dim=-1)
        gated = torch.sigmoid(self.gate(both)) * photos * scale
        return self.weights[0] * gated + self.weights[1] * self.residual(both)  # type: ignore[no-any-return]
