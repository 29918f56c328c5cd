"""The normalised sum of photo and text: the least that composes, and the baseline of the published fusions.

    f(x, t) = unit(r(x) + g(t))   g(t) = W m + w, from the identity

It cannot make a text mean different things for different photos. It adds (k + 1) k parameters for texts of width k.
CLIP4Cir's "sum" (Baldrati et al. 2022) adds CLIP's vectors of any length, where photos and texts share a space; here
both have length 1, and a text alone searches as g(t).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from saffe_cache.fusion.base import Blocks
from saffe_cache.fusion.composed.frame import ComposedFusion
from saffe_cache.fusion.layers import identity_linear
from saffe_cache.fusion.options import FusionShape


class SumFusion(ComposedFusion):
    """A linear map for photos, one for texts."""

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        self.text_linear = identity_linear(shape.text_size)

    def compose(self, photos: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        return photos + self.text_linear(texts)  # type: ignore[no-any-return]

    def encode_queries(self, vectors: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.text_linear(functional.normalize(vectors, dim=-1)).float(), dim=-1)
