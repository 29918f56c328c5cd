"""Late fusion: each modality is mapped alone, and the vectors are added with a learned weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saffe_cache.fusion.base import Blocks, Texts
from saffe_cache.fusion.known.correction import CorrectingFusion, Correction
from saffe_cache.fusion.shape import FamShape


class LateFusion(CorrectingFusion):
    """Nothing is corrected: a linear map of the photo's summary, and the mapped vector of the text."""

    def __init__(self, shape: FamShape, blocks: Blocks) -> None:
        super().__init__(shape)

    def correct(
        self, states: Sequence[torch.Tensor], mask: torch.Tensor | None, texts: Texts | None, summary: torch.Tensor
    ) -> Correction:
        return Correction(None, states[-1], mask)
