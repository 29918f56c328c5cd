"""The frame of fusions for composed queries: a photo and a text search photos ("this shirt, in grey").

    gallery  f(x, null) = r(x)                     r(x) = unit(M s(x) + b)
    query    f(x, t)    = unit(compose(r(x), m))   m = t / ||t||

s(x) is the photo's summary, t the text encoder's own vector, of width k. The published fusions take photos and texts of
one width, from encoders that were trained together or with them. Frozen encoders differ in width and space, so one
linear map M brings photos into the text's space, the same one for references and gallery. It may start as the ridge
regression from photos to their captions (`--start ridge`), so that a photo and a text can be added before any training;
each map inside `compose` starts as its paper says. M and b have (s + 1) k parameters for summaries of width s.

Where a text alone searches, it is m: the query of captions, and of the text-only baseline.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from saffe_cache.fusion.base import ROW_BY_ROW, Fused, Fusion, Pairing, Texts, gathered
from saffe_cache.fusion.layers import Dropout, Mask, MatchHead, States
from saffe_cache.fusion.options import FusionShape


class ComposedFusion(Fusion):
    """`compose` makes the query of a photo and a text; a photo with the null text is its own vector."""

    def __init__(self, shape: FusionShape) -> None:
        super().__init__(shape)
        self.photo_map = nn.Linear(shape.summary_size, shape.text_size)
        self.dropout = Dropout(shape.dropout)
        if shape.matches:
            self.match_head = MatchHead(shape.read_size, 1, shape.text_size)

    @property
    def linear_start(self) -> nn.Linear | None:
        return self.photo_map

    def compose(self, photos: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """[pairs, width] of the unit vectors of photos and of texts, [pairs, text_size] each; of any length."""
        raise NotImplementedError

    def encode_queries(self, vectors: torch.Tensor) -> torch.Tensor:
        return functional.normalize(vectors, dim=-1)

    def fuse(
        self, states: States, mask: Mask = None, texts: Texts | None = None, pairing: Pairing = ROW_BY_ROW
    ) -> Fused:
        vectors = functional.normalize(self.photo_map(self.dropout(states[0].squeeze(1))).float(), dim=-1)
        vectors = gathered(vectors, pairing.gallery)
        if texts is not None:
            vectors = self._queries(vectors, texts.rows(pairing.text))
        return Fused(vectors, [gathered(states[0], pairing.gallery)], gathered(mask, pairing.gallery))

    def _queries(self, photos: torch.Tensor, texts: Texts) -> torch.Tensor:
        """Unit vectors of photos and texts; those of the photos for null texts."""
        composed = self.compose(photos, functional.normalize(texts.vectors, dim=-1))
        return torch.where(texts.is_text, functional.normalize(composed.float(), dim=-1), photos)
