"""FuseMix's adapters: a residual MLP on each side, trained on mixed pairs (Vouitsis et al. 2023, arXiv 2312.10144).

    z <- z + W2 drop(GELU(W1 LN(z)))   in each block,   then   unit(W LN(z) + w)

W1: D -> h and W2: h -> D with h = 4 D, at most INNER. The mixing itself is the option --mixup, for every fusion.

BLOCKS (2 D h + h + 3 D) + 2 D + 512 (D + 1) parameters for a side whose vectors are D wide.

The released run has 4 blocks, dropout 0.6, no bound on h, and 500 epochs of 20,480 mixed pairs, for 5 million pairs.
A few thousand pairs get one block, the --dropout of all heads here, and an inner width that does not grow with the
number of cached layers. The paper mixes the two halves of a batch; here each pair is mixed with another pair of the
whole batch, so that the loss sees all of it. The photo's summary has normed tokens, the original's class token has
passed the encoder's last norm.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from saffe_cache.fusion.base import Blocks
from saffe_cache.fusion.layers import Dropout
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.two_sided import TwoSided


class Adapter(nn.Module):
    """The residual MLP of one side."""

    BLOCKS, INNER = 1, 2048

    def __init__(self, size: int, output_size: int, dropout: float) -> None:
        super().__init__()
        inner = min(4 * size, self.INNER)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(size), nn.Linear(size, inner), nn.GELU(), Dropout(dropout), nn.Linear(inner, size)
            )
            for _ in range(self.BLOCKS)
        )
        self.norm = nn.LayerNorm(size)
        self.output = nn.Linear(size, output_size)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            vectors = vectors + block(vectors)
        return cast("torch.Tensor", self.output(self.norm(vectors)))


class FuseMixFusion(TwoSided):
    """An `Adapter` into 512 dimensions on each side."""

    WIDTH = 512

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        self.photo_adapter = Adapter(shape.summary_size, self.WIDTH, shape.dropout)
        self.text_adapter = Adapter(shape.text_size, self.WIDTH, shape.dropout)
        self._make_match_head(self.WIDTH)

    def photo_side(self, summary: torch.Tensor) -> torch.Tensor:
        return self.photo_adapter(summary)  # type: ignore[no-any-return]

    def text_side(self, unit: torch.Tensor) -> torch.Tensor:
        return self.text_adapter(unit * self.shape.text_size**0.5)  # type: ignore[no-any-return]
