"""What fusions are fed: a cache's own vectors, or its hidden states, of the photos and texts that a command needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.store.reader import EncoderCache
from saffe_cache.studies.matching.degrading import Degradation

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Photos [n, tokens, d], texts [n, tokens, d], the texts' mask, bool [n, tokens]."""
_ROWS_AT_ONCE = 512


class Inputs(Protocol):
    """Photos and texts by their rows in the encoders' arrays."""

    def batch(self, photos: np.ndarray, texts: np.ndarray) -> Batch: ...

    @property
    def widths(self) -> tuple[int, int]:
        """Of photos and of texts."""


@dataclass(frozen=True)
class Vectors:
    """Unit vectors of some photos and texts."""

    photo_rows: np.ndarray
    """Ascending: the row of each of `photos`."""
    text_rows: np.ndarray
    photos: np.ndarray
    """float32 [photos, d]"""
    texts: np.ndarray
    """float32 [texts, d]"""

    @staticmethod
    def read(photo: EncoderCache, text: EncoderCache, photo_rows: np.ndarray, text_rows: np.ndarray) -> Vectors:
        """The encoders' own vectors."""
        return Vectors(photo_rows, text_rows, unit_rows(photo.vectors(photo_rows)), unit_rows(text.vectors(text_rows)))

    def degraded(self, degradation: Degradation, seed: int) -> Vectors:
        photos, texts = degradation.apply(self.photos, self.texts, seed)
        return replace(self, photos=photos, texts=texts)

    def mapped(self, to_texts: Callable[[np.ndarray], np.ndarray]) -> Vectors:
        """Photos as the map places them among the texts, unit vectors again."""
        return replace(self, photos=unit_rows(to_texts(self.photos)))

    @property
    def widths(self) -> tuple[int, int]:
        return self.photos.shape[1], self.texts.shape[1]

    def of_photos(self, rows: np.ndarray) -> np.ndarray:
        return self.photos[np.searchsorted(self.photo_rows, rows)]

    def of_texts(self, rows: np.ndarray) -> np.ndarray:
        return self.texts[np.searchsorted(self.text_rows, rows)]

    def batch(self, photos: np.ndarray, texts: np.ndarray) -> Batch:
        """Sequences of one; of length sqrt(d), so that coordinates are about 1, as starting weights expect."""
        found = [
            torch.from_numpy(vectors * np.float32(vectors.shape[1] ** 0.5))[:, None]
            for vectors in (self.of_photos(photos), self.of_texts(texts))
        ]
        return found[0], found[1], torch.ones(len(texts), 1, dtype=torch.bool)


@dataclass(frozen=True)
class Tokens:
    """Hidden states of one layer, divided by their deviation; in half precision, to take half of the memory."""

    photo_rows: np.ndarray
    text_rows: np.ndarray
    photos: torch.Tensor
    """float16 [photos, tokens, d]"""
    texts: torch.Tensor
    """float16 [texts, tokens, d], padded with zeros."""
    lengths: torch.Tensor
    """int64 [texts]"""

    @staticmethod
    def read(
        photo: EncoderCache, text: EncoderCache, photo_rows: np.ndarray, text_rows: np.ndarray, layers: tuple[int, int]
    ) -> Tokens:
        """Of the given layers of both.

        Raises:
            CacheError: one is not cached.
        """
        photos = _read(photo, photo_rows, layers[0])
        texts = _read(text, text_rows, layers[1])
        _, mask = text.token_rows(text_rows)
        assert mask is not None
        return Tokens(photo_rows, text_rows, photos, texts, torch.from_numpy(mask.sum(axis=1)))

    @property
    def widths(self) -> tuple[int, int]:
        return self.photos.shape[2], self.texts.shape[2]

    def batch(self, photos: np.ndarray, texts: np.ndarray) -> Batch:
        """No longer than the longest of these texts."""
        at_photos, at_texts = np.searchsorted(self.photo_rows, photos), np.searchsorted(self.text_rows, texts)
        lengths = self.lengths[at_texts]
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        return self.photos[at_photos].float(), self.texts[at_texts, :longest].float(), mask


def _read(encoder: EncoderCache, rows: np.ndarray, layer: int) -> torch.Tensor:
    """float16 [rows, tokens, d]"""
    deviation = encoder.statistics(f"hidden_states/{layer}").std
    whole = None
    longest = int(np.diff(encoder.offsets)[rows].max()) if encoder.manifest.is_ragged else 0
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        these = slice(start, start + _ROWS_AT_ONCE)
        states = encoder.tokens(rows[these], (layer,)).states[0]
        if whole is None:
            whole = np.zeros((len(rows), longest or states.shape[1], states.shape[2]), np.float16)
        whole[these, : states.shape[1]] = states / deviation
    assert whole is not None
    return torch.from_numpy(whole)
