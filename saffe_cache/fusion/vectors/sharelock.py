"""ShareLock: texts are mapped into the photo encoder's own space (Ruthardt et al. 2024, arXiv 2410.07173).

    f(x) = unit(s(x)),   g(t) = unit(W h3 + w),   h <- drop(ReLU(BN(V h + v))), three times, from the text's vector

The photo side has no parameters, so the shared width is that of the photo's summary s(x). The loss is InfoNCE at the
fixed temperature 1 / exp(2.6592) = 0.07.

m (k + 1) + 2 m (m + 1) + 6 m + s (m + 1) parameters for text vectors of width k, inner layers of m, summaries of s.

The paper's text encoder is a language model, whose last token's state, 4,096 wide, passes layers of the same width at a
learning rate of 1e-3, with 0.2 of the units dropped. Here the text is the encoder's own vector, and m is INNER. At the
default --dropout of 0.5 the same 0.2 are dropped, since three layers with more learn slowly. The paper draws one of an
item's captions in each step; here all of them are positives.

The batch norm sees the distinct texts of a batch. Ranks would each see their own, so a training on several is refused.
In evaluation it uses running means, and no text depends on the others.
"""

from __future__ import annotations

import torch
from torch import nn

from saffe_cache.fusion.base import Blocks
from saffe_cache.fusion.layers import Dropout
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.two_sided import TwoSided


class ShareLockFusion(TwoSided):
    """The identity for photos, an MLP with batch norms for texts."""

    LAYERS, INNER, DROPOUT = 3, 1024, 0.4
    """DROPOUT is relative to --dropout."""

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        size, dropout, layers = shape.text_size, self.DROPOUT * shape.dropout, list[nn.Module]()
        for _ in range(self.LAYERS):
            layers += [nn.Linear(size, self.INNER), nn.BatchNorm1d(self.INNER), nn.ReLU(), Dropout(dropout)]
            size = self.INNER
        self.text_mlp = nn.Sequential(*layers, nn.Linear(size, shape.summary_size))
        self._make_match_head(shape.summary_size)

    def photo_side(self, summary: torch.Tensor) -> torch.Tensor:
        return summary

    def text_side(self, unit: torch.Tensor) -> torch.Tensor:
        return self.text_mlp(unit * self.shape.text_size**0.5)  # type: ignore[no-any-return]
