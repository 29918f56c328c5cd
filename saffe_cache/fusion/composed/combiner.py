"""Combiner: a convex combination of photo and text, plus a learned vector (Baldrati et al. 2022; CLIP4Cir, extended in
arXiv 2308.11485).

    p_m = drop(relu(Linear(k -> P) m))   p_r the same of r   c = [p_m; p_r]
    v = Linear(H -> k) drop(relu(Linear(2 P -> H) c))
    lam = sigmoid(Linear(H -> 1) drop(relu(Linear(2 P -> H) c)))
    out = v + lam m + (1 - lam) r

P = 4 k and H = 8 k, so it adds 144 k² + 33 k + 1 parameters to the frame's: 59.0 M at the paper's width of 640. The
fixed temperature is 0.01 as published, where targets are only contrasted with each query, not the reverse too.

Differs from the source: the photo is mapped as the frame does (CLIP needs no map), r and m enter with length sqrt(k) in
place of CLIP's own lengths, and dropout is --dropout, 0.5 as published. The published 2e-5 for 300 epochs of batches of
4,096 takes too few steps with thousands of queries: the learning rate is 5e-4 with the usual epochs and batches.
"""

from __future__ import annotations

import torch
from torch import nn

from saffe_cache.fusion.base import Blocks
from saffe_cache.fusion.composed.frame import ComposedFusion
from saffe_cache.fusion.layers import Dropout
from saffe_cache.fusion.options import FusionShape


class CombinerFusion(ComposedFusion):
    """Two projections, a vector and a weight of them."""

    PROJECTION, INNER = 4, 8
    """Multiples of the width: P and H."""

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        size, projection, inner = shape.text_size, self.PROJECTION * shape.text_size, self.INNER * shape.text_size

        def hidden(in_size: int, out_size: int) -> list[nn.Module]:
            return [nn.Linear(in_size, out_size), nn.ReLU(), Dropout(shape.dropout)]

        self.of_text = nn.Sequential(*hidden(size, projection))
        self.of_photo = nn.Sequential(*hidden(size, projection))
        self.vector = nn.Sequential(*hidden(2 * projection, inner), nn.Linear(inner, size))
        self.share = nn.Sequential(*hidden(2 * projection, inner), nn.Linear(inner, 1))

    def compose(self, photos: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        scale = self.shape.text_size**0.5
        photos, texts = scale * photos, scale * texts
        both = torch.cat([self.of_text(texts), self.of_photo(photos)], dim=-1)
        share = torch.sigmoid(self.share(both))
        return self.vector(both) + share * texts + (1 - share) * photos  # type: ignore[no-any-return]
