"""Low-rank bilinear pooling by the Hadamard product (MLB, Kim et al. 2017, arXiv 1610.04325, eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import Blocks, Texts
from saffe_cache.fusion.known.correction import CorrectingFusion, Correction, masked, zero_linear
from saffe_cache.fusion.options import FusionShape


class HadamardFusion(CorrectingFusion):
    """P^T (tanh(U^T s) * tanh(V^T t)) + b of the photo's summary s and the text's own vector t; 0 for the null text.

    It adds (2 P d + 1) r + (k + 1) r + (r + 1) k parameters, for P layers and r = 1,200 as in the paper.
    """

    idle_with_null = ("of_photo.", "of_text.", "out.")
    RANK = 1200

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        self.of_photo = nn.Linear(shape.summary_size, self.RANK)
        self.of_text = nn.Linear(shape.text_size, self.RANK)
        self.out = zero_linear(self.RANK, shape.text_size)

    def correct(
        self, states: Sequence[torch.Tensor], mask: torch.Tensor | None, texts: Texts | None, summary: torch.Tensor
    ) -> Correction:
        if texts is None:
            return Correction(None, states[-1], mask)
        text = functional.normalize(texts.vectors, dim=-1) * self.shape.text_size**0.5
        joint = torch.tanh(self.of_photo(self.dropout(summary))) * torch.tanh(self.of_text(text))
        return Correction(masked(self.out(joint), texts.is_text), states[-1], mask)
