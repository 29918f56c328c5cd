"""dino.txt: class token and patch mean side by side (Jose et al. 2024, arXiv 2412.16334).

    f(x) = unit([A c(x); B m(x)]),   g(t) = unit(W sqrt(k) unit(t) + w)

with the normed class tokens c(x) of P layers and the means m(x) of their other normed tokens. One half of the text's
vector faces the class token, the other one the mean. Both are put side by side before they are made a unit vector, so
that their lengths count.

Two maps (P d + 1) P d on the photo side, and (k + 1) 2 P d for the text. Without a class token there is B alone.

The paper trains two transformer blocks on the photo's tokens, whose scales start at 1e-5; here A and B, which start as
the identity, take their place, and the start is the paper's vector with no block: the cached class token and the mean.
Its text encoder is trained from scratch; here a linear map takes the text's own vector.
Its learning rate, 7e-4 over 50,000 steps, is 3e-3 here, for hundreds of steps.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from saffe_cache.fusion.base import Blocks
from saffe_cache.fusion.layers import Dropout, Learning, identity_linear
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.two_sided import TwoSided


class DinoTxtFusion(TwoSided):
    """A map of each half of the photo's vector, and one of the text."""

    learning: ClassVar = {"parts": Learning(0.15, decays=False)}

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        size = shape.num_layers * shape.hidden_size
        self.parts = nn.ModuleList(identity_linear(size) for _ in range(shape.summary_size // size))
        self.text_linear = nn.Linear(shape.text_size, shape.summary_size)
        self.dropout = Dropout(shape.dropout)
        self._make_match_head(shape.summary_size)

    def photo_side(self, summary: torch.Tensor) -> torch.Tensor:
        layers = self.dropout(summary).unflatten(1, (self.shape.num_layers, len(self.parts), -1))
        return torch.cat([part(layers[:, :, i].flatten(1)) for i, part in enumerate(self.parts)], dim=1)

    def text_side(self, unit: torch.Tensor) -> torch.Tensor:
        return self.text_linear(self.dropout(unit * self.shape.text_size**0.5))  # type: ignore[no-any-return]
