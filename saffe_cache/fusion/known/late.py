"""Late fusion: each modality is mapped alone, and the vectors are added with a learned weight.

Source: Snoek et al. 2005, Early versus late fusion in semantic video analysis (doi 10.1145/1101149.1101236). There a
classifier of each modality gives scores, and one more combines them. Here the photo's vector v and the text's t are
added, and so are their scores for a query q, but for the norm of the sum: z . q = (v . q + w t . q) / |v + w t|.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saffe_cache.fusion.base import Blocks, Texts
from saffe_cache.fusion.known.correction import CorrectingFusion, Correction
from saffe_cache.fusion.options import FusionShape


class LateFusion(CorrectingFusion):
    """Nothing is corrected: a linear map of the photo's summary, and the mapped vector of the text.

    The frame's parameters alone, 1,379,201 of them where d = e = k = 384, with one layer and texts beside photos.
    """

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)

    def correct(
        self, states: Sequence[torch.Tensor], mask: torch.Tensor | None, texts: Texts | None, summary: torch.Tensor
    ) -> Correction:
        return Correction(None, states[-1], mask)
