"""A linear contrastive map: one linear map on each side, and nothing else.

    f(x) = unit(A s(x) + a),   g(t) = unit(B sqrt(k) unit(t) + b)

with the photo's summary s(x) and the text's own vector t of width k. It is the baseline of STRUCTURE (Groeger et al.
2025, arXiv 2506.16895: Linear(D, 512) on each side, InfoNCE) and of SOTAlign (Roschmann et al. 2026, arXiv 2602.23353),
who found linear maps more robust than deeper heads at 10,000 pairs. `two_tower` is the same with the class token alone
and SigLIP's loss.

512 (s + k + 2) parameters for a summary of width s.

The weights start at random, as torch draws them. Text vectors enter at a root mean square of 1, as summaries do.
"""

from __future__ import annotations

import torch
from torch import nn

from saffe_cache.fusion.base import Blocks
from saffe_cache.fusion.layers import Dropout
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.two_sided import TwoSided


class ContrastiveFusion(TwoSided):
    """One linear map into 512 dimensions on each side."""

    WIDTH = 512

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        self.dropout = Dropout(shape.dropout)
        self.photo_linear = nn.Linear(shape.summary_size, self.WIDTH)
        self.text_linear = nn.Linear(shape.text_size, self.WIDTH)
        self._make_match_head(self.WIDTH)

    def photo_side(self, summary: torch.Tensor) -> torch.Tensor:
        return self.photo_linear(self.dropout(summary))  # type: ignore[no-any-return]

    def text_side(self, unit: torch.Tensor) -> torch.Tensor:
        return self.text_linear(self.dropout(unit * self.shape.text_size**0.5))  # type: ignore[no-any-return]
