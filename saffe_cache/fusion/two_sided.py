"""The base of fusions of two separate sides: a photo's vector and a text's meet in a shared space alone."""

from __future__ import annotations

import torch
from torch.nn import functional

from saffe_cache.fusion.base import ROW_BY_ROW, Fused, Fusion, Pairing, Texts, gathered
from saffe_cache.fusion.layers import Mask, MatchHead, States


class TwoSided(Fusion):
    """`photo_side` and `text_side` map into a space of any width w, where vectors are of unit length.

    Nothing is fused: a paired text is averaged with the photo in the shared space.
    """

    def _make_match_head(self, width: int) -> None:
        """Make the head for image-text matching, if there is one; `width` is that of the shared space."""
        if self.shape.matches:
            self.match_head = MatchHead(self.shape.read_size, 1, width)

    def photo_side(self, summary: torch.Tensor) -> torch.Tensor:
        """[inputs, w] of what `photo_summary` makes of photos."""
        raise NotImplementedError

    def text_side(self, unit: torch.Tensor) -> torch.Tensor:
        """[texts, w] of the texts' unit vectors, [texts, text_size]."""
        raise NotImplementedError

    def photo_summary(self, states: States, mask: Mask) -> torch.Tensor:
        """What `photo_side` sees: by default the summaries that the fusion reads, [inputs, summary_size]."""
        return states[0].squeeze(1)

    def encode_summaries(self, summary: torch.Tensor) -> torch.Tensor:
        """Unit vectors [inputs, w] of what `photo_summary` makes of photos."""
        return _unit(self.photo_side(summary))

    def encode_queries(self, vectors: torch.Tensor) -> torch.Tensor:
        return _unit(self.text_side(functional.normalize(vectors, dim=-1)))

    def fuse(
        self, states: States, mask: Mask = None, texts: Texts | None = None, pairing: Pairing = ROW_BY_ROW
    ) -> Fused:
        vectors = gathered(self.encode_summaries(self.photo_summary(states, mask)), pairing.gallery)
        if texts is not None:
            paired = texts.rows(pairing.text)
            vectors = _unit(vectors + self.encode_texts(paired) * paired.is_text)
        return Fused(vectors, [gathered(states[-1], pairing.gallery)], gathered(mask, pairing.gallery))


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Unit vectors; one of length 0, which points nowhere, becomes that of equal numbers."""
    is_zero = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True) < 1e-12
    return functional.normalize(torch.where(is_zero, 1.0, vectors), dim=-1)
