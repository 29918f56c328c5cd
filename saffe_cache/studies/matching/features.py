"""What fusions are given: a cache's own vectors or hidden states of the photos and texts that a command needs.

Vectors may be degraded, by noise, which destroys information, or by a rotation, which only separates the two spaces.
Gaussian noise on unit vectors of width d leaves a cosine of 1 / sqrt(1 + sigma^2 d) with the clean ones and the square
of that of a pair's, so it destroys each modality as well as the alignment of both (arXiv 2606.01207, eq. 4, treats it
as a control of alignment alone). A rotation of the photos keeps every cosine among photos.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from scipy.linalg import expm

from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.store.reader import EncoderCache

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Photos [n, tokens, d], texts [n, tokens, d], the texts' mask, bool [n, tokens]."""
Kind = Literal["clean", "noise", "rotation"]
_ROWS_AT_ONCE = 512
_FIRST_ZERO = 3.8317
"""Of the Bessel function J1: the largest angle at which the mean cosine, 2 J1(a) / a, is 0."""
_MEASURED = 2000


@dataclass(frozen=True)
class Degradation:
    """What is done to unit vectors."""

    kind: Kind = "clean"
    level: float = 0.0
    """Noise: its standard deviation in each coordinate. Rotation: 0 for none, 1 for a mean cosine of 0."""

    def __str__(self) -> str:
        return self.kind if self.kind == "clean" else f"{self.kind} {self.level:g}"

    def apply(self, photos: np.ndarray, texts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Noise on both, a rotation of the photos only; the results are unit vectors."""
        generator = np.random.default_rng([seed, 3])
        if self.kind == "noise":
            return add_noise(photos, self.level, generator), add_noise(texts, self.level, generator)
        if self.kind == "rotation":
            return unit_rows(photos @ partial_rotation(photos.shape[1], self.level, generator)), texts
        return photos, texts


def add_noise(vectors: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    """unit(x + e) with e of standard deviation sigma in each coordinate: eq. 4."""
    return unit_rows(vectors + sigma * generator.standard_normal(vectors.shape, np.float32))


def partial_rotation(width: int, turn: float, generator: np.random.Generator) -> np.ndarray:
    """A random rotation [d, d], exp(turn S) for a random skew-symmetric S, from none at 0 to no similarity at 1.

    The angles of its planes follow Wigner's semicircle up to a = 3.83 turn, so a vector's mean cosine with itself
    before is 2 J1(a) / a with the Bessel function J1: 0.89 at a quarter, 0.61 at a half, 0.27 at three quarters.
    """
    drawn = generator.standard_normal((width, width))
    skew = (drawn - drawn.T) / np.sqrt(2)  # its spectrum ends at 2 sqrt(d)
    return np.asarray(expm(turn * _FIRST_ZERO * skew / (2 * np.sqrt(width))), np.float32)


def measure_alignment(
    clean: tuple[np.ndarray, np.ndarray], now: tuple[np.ndarray, np.ndarray], matches: tuple[np.ndarray, np.ndarray]
) -> Mapping[str, float]:
    """Mean cosines: of photos and of texts with their clean versions; of matching and of other pairs if widths agree.

    Args:
        clean: unit vectors of photos and of texts.
        now: the same degraded.
        matches: rows of photos and of texts that belong together.
    """
    found = {}
    for name, before, after, rows in zip(("photos", "texts"), clean, now, matches, strict=True):
        some = np.unique(rows)[:_MEASURED]
        found[f"{name}_with_clean"] = float((before[some] * after[some]).sum(axis=1).mean())
    if now[0].shape[1] == now[1].shape[1]:
        photos, texts = now[0][matches[0]], now[1][matches[1]]
        found["matching_pairs"] = float((photos * texts).sum(axis=1).mean())
        found["other_pairs"] = float((photos * np.roll(texts, 1, axis=0)).sum(axis=1).mean())
    return found


class Inputs(Protocol):
    """Photos and texts by their rows in the encoders' arrays."""

    def batch(self, photos: np.ndarray, texts: np.ndarray) -> Batch: ...

    @property
    def widths(self) -> tuple[int, int]:
        """Of photos and of texts."""


@dataclass(frozen=True)
class PairVectors:
    """Unit vectors of some photos and texts."""

    photo_rows: np.ndarray
    """Ascending: the row of each of `photos`."""
    text_rows: np.ndarray
    photos: np.ndarray
    """float32 [photos, d]"""
    texts: np.ndarray
    """float32 [texts, d]"""

    @staticmethod
    def read(photo: EncoderCache, text: EncoderCache, photo_rows: np.ndarray, text_rows: np.ndarray) -> PairVectors:
        """The encoders' own vectors."""
        return PairVectors(
            photo_rows, text_rows, unit_rows(photo.vectors(photo_rows)), unit_rows(text.vectors(text_rows))
        )

    def degraded(self, degradation: Degradation, seed: int) -> PairVectors:
        photos, texts = degradation.apply(self.photos, self.texts, seed)
        return replace(self, photos=photos, texts=texts)

    def mapped(self, to_texts: Callable[[np.ndarray], np.ndarray]) -> PairVectors:
        """Photos mapped into the space of the texts, as unit vectors."""
        return replace(self, photos=unit_rows(to_texts(self.photos)))

    @property
    def widths(self) -> tuple[int, int]:
        return self.photos.shape[1], self.texts.shape[1]

    def of_photos(self, rows: np.ndarray) -> np.ndarray:
        return self.photos[np.searchsorted(self.photo_rows, rows)]

    def of_texts(self, rows: np.ndarray) -> np.ndarray:
        return self.texts[np.searchsorted(self.text_rows, rows)]

    def batch(self, photos: np.ndarray, texts: np.ndarray) -> Batch:
        """Sequences of one, of length sqrt(d), so that coordinates are about 1, as starting weights expect."""
        found = [
            torch.from_numpy(vectors * np.float32(vectors.shape[1] ** 0.5))[:, None]
            for vectors in (self.of_photos(photos), self.of_texts(texts))
        ]
        return found[0], found[1], torch.ones(len(texts), 1, dtype=torch.bool)


@dataclass(frozen=True)
class PairTokens:
    """Hidden states of one layer, divided by their deviation, in half precision to halve the memory."""

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
    ) -> PairTokens:
        """Hidden states of one layer of each.

        Raises:
            CacheError: one is not cached.
        """
        photos = _read(photo, photo_rows, layers[0])
        texts = _read(text, text_rows, layers[1])
        _, mask = text.token_rows(text_rows)
        assert mask is not None
        return PairTokens(photo_rows, text_rows, photos, texts, torch.from_numpy(mask.sum(axis=1)))

    @property
    def widths(self) -> tuple[int, int]:
        return self.photos.shape[2], self.texts.shape[2]

    def batch(self, photos: np.ndarray, texts: np.ndarray) -> Batch:
        """Padded to the longest of these texts."""
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
