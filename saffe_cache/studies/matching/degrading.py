"""Vectors made worse: by noise, which destroys what they say, or by a rotation, which only parts the two spaces.

Gaussian noise on unit vectors of width d leaves a cosine of 1 / sqrt(1 + sigma^2 d) to the clean ones and the square of
that of a pair's, and so destroys each modality as well as the alignment of both (arXiv 2606.01207, eq. 4, takes it for
a knob of alignment alone). A rotation of the photos keeps every cosine among photos.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.linalg import expm

from saffe_cache.retrieval.baselines import unit_rows

Kind = Literal["clean", "noise", "rotation"]
_FIRST_ZERO = 3.8317
"""Of the Bessel function J1: the largest angle at which the mean cosine, 2 J1(a) / a, is 0."""
_MEASURED = 2000


@dataclass(frozen=True)
class Degradation:
    """What is done to unit vectors."""

    kind: Kind = "clean"
    level: float = 0.0
    """Noise: its deviation in each coordinate. Rotation: 0 for none, 1 for one that leaves a mean cosine of 0."""

    def __str__(self) -> str:
        return self.kind if self.kind == "clean" else f"{self.kind} {self.level:g}"

    def apply(self, photos: np.ndarray, texts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Noise on both, a rotation of the photos alone; unit vectors again."""
        generator = np.random.default_rng([seed, 3])
        if self.kind == "noise":
            return add_noise(photos, self.level, generator), add_noise(texts, self.level, generator)
        if self.kind == "rotation":
            return unit_rows(photos @ partial_rotation(photos.shape[1], self.level, generator)), texts
        return photos, texts


def add_noise(vectors: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    """unit(x + e), e of deviation sigma in each coordinate: eq. 4."""
    return unit_rows(vectors + sigma * generator.standard_normal(vectors.shape, np.float32))


def partial_rotation(width: int, turn: float, generator: np.random.Generator) -> np.ndarray:
    """A random rotation [d, d], exp(turn S) for a random skew-symmetric S, from none at 0 to "no likeness" at 1.

    The angles of its planes follow Wigner's semicircle up to a = 3.83 turn, so that a vector's mean cosine with itself
    before is 2 J1(a) / a, J1 being the Bessel function: 0.89 at a quarter, 0.61 at a half, 0.27 at three quarters.
    """
    drawn = generator.standard_normal((width, width))
    skew = (drawn - drawn.T) / np.sqrt(2)  # its spectrum ends at 2 sqrt(d)
    return np.asarray(expm(turn * _FIRST_ZERO * skew / (2 * np.sqrt(width))), np.float32)


def measure_alignment(
    clean: tuple[np.ndarray, np.ndarray], now: tuple[np.ndarray, np.ndarray], matches: tuple[np.ndarray, np.ndarray]
) -> Mapping[str, float]:
    """Mean cosines: of photos and of texts with what they were; where widths agree, of matching and of other pairs.

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
