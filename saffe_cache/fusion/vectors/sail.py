"""SAIL's gated head on each side, with a sigmoid loss (Zhang, Yang, Agrawal 2024, arXiv 2412.04616).

    h(z) = G( relu6(F1 z') * F2 z' ),   z' = LN(z),   F1, F2: D -> m,  G: m -> 512,  all with bias

F1 and F2 are clamped to +-1000 before the product. Weights start as Xavier's uniform ones, biases at 0.

    loss = -mean_ij log sigmoid(y_ij (s cos_ij + b)),   y_ij = 1 for positives, else -1

It is SigLIP's loss divided by the number of texts. s starts at 20 and is kept within [1, 100]. All captions of a photo
are positives: texts are contrasted with photos, not with one another.

2 D + 2 m (D + 1) + 512 (m + 1) parameters for a side whose vectors are D wide.

The release has m = 8 D, outputs of 1,024, Lion at a learning rate of 1e-5 and batches of 32,768 for 23 million pairs.
Its bias starts at -10, which is -ln 32,768 + 0.4: the odds of a positive in its batches. Batches are small here, so
b = b' - ln N for N photos, and b', which is learned, starts at 0. m is 4 D, at most INNER. Lion's rate is 3e-4, the
better one of 1e-4 and 3e-4 on validation photos: a run has hundreds of steps, not 70,000.

Published features are the class token and the patch mean of the last layer, side by side: the photo's summary with the
image layers left to choose.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import Blocks
from saffe_cache.fusion.layers import Dropout, Learning
from saffe_cache.fusion.losses import Contrast, siglip_of
from saffe_cache.fusion.options import FusionShape, ObjectiveOptions
from saffe_cache.fusion.two_sided import TwoSided


class StarHead(nn.Module):
    """The gated head of one side."""

    FACTOR, INNER, LARGEST = 4, 2048, 1000.0

    def __init__(self, size: int, output_size: int, dropout: float) -> None:
        super().__init__()
        inner = min(self.FACTOR * size, self.INNER)
        self.norm = nn.LayerNorm(size)
        self.gate, self.value = nn.Linear(size, inner), nn.Linear(size, inner)
        self.output = nn.Linear(inner, output_size)
        self.dropout = Dropout(dropout)
        for linear in (self.gate, self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        normed = self.norm(vectors)
        gate, value = (part(normed).clamp(-self.LARGEST, self.LARGEST) for part in (self.gate, self.value))
        return self.output(self.dropout(functional.relu6(gate) * value))  # type: ignore[no-any-return]


class SailFusion(TwoSided):
    """A `StarHead` into 512 dimensions on each side."""

    WIDTH = 512

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        self.photo_head = StarHead(shape.summary_size, self.WIDTH, shape.dropout)
        self.text_head = StarHead(shape.text_size, self.WIDTH, shape.dropout)
        self._make_match_head(self.WIDTH)

    def photo_side(self, summary: torch.Tensor) -> torch.Tensor:
        return self.photo_head(summary)  # type: ignore[no-any-return]

    def text_side(self, unit: torch.Tensor) -> torch.Tensor:
        return self.text_head(unit * self.shape.text_size**0.5)  # type: ignore[no-any-return]


class Sail(nn.Module):
    """The sigmoid loss, averaged over all cells, with a bias for batches of any size."""

    learning: ClassVar = {"*": Learning(1.5)}

    def __init__(self, options: ObjectiveOptions) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(20.0).log())
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, seen: Contrast) -> torch.Tensor:
        with torch.no_grad():  # the parameter itself, which could not return from outside otherwise
            self.log_scale.clamp_(0.0, math.log(100))
        bias = self.bias - math.log(len(seen.photos))
        cells = seen.batch.positives, self.log_scale.exp(), bias, seen.batch.ignored
        loss = siglip_of(seen.scores, *cells)
        return loss / len(seen.queries)
