"""Means and covariances of photos and texts, from which all linear maps in closed form follow. Pure numpy, float64.

Photos are unit vectors a_i, texts unit vectors b_j. Each caption makes a pair with its photo, and each photo counts
once: a caption of a photo with c captions has the weight 1 / c. A mean of a photo's captions would have the same
covariance with the photos, but less of its own than the single captions that search have. Equal texts are one row, with
the sum of their weights.

With n photos, X the centred vectors of one side and w their weights,

    covariance of a side      S = sum_j w_j x_j x_j' / n = V diag(e) V'
    covariance of both        C = sum_ij w_ij a_i b_j' / n

V and e come from the matrix X X' if there are fewer vectors than coordinates (the dual form), else from X' X.
Directions without variance are left out: C has no part in them, so that penalised maps are the same without them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from saffe_cache.core.items import Ragged
from saffe_cache.fusion.base import TrainingVectors

_LEAST = 1e-10
"""Eigenvalues below this fraction of the largest one are rounding errors."""


@dataclass(frozen=True)
class Side:
    """One side's vectors."""

    mean: np.ndarray
    """[d]"""
    variances: np.ndarray
    """e, [r], descending; at least one, and all above 0."""
    axes: np.ndarray
    """V, [d, r]: orthonormal columns."""

    @classmethod
    def of(cls, vectors: np.ndarray, weights: np.ndarray) -> Side:
        """Of vectors [n, d] and their weights [n]."""
        total = weights.sum()
        mean = weights @ vectors / total
        rows = (vectors - mean) * np.sqrt(weights / total)[:, None]
        is_dual = len(rows) < rows.shape[1]
        variances, axes = np.linalg.eigh(rows @ rows.T if is_dual else rows.T @ rows)
        variances, axes = variances[::-1], axes[:, ::-1]
        count = max(1, int(np.count_nonzero(variances > _LEAST * max(variances[0], _LEAST))))
        variances, axes = variances[:count], axes[:, :count]
        if is_dual:
            axes = rows.T @ axes / np.sqrt(np.maximum(variances, _LEAST**2))
        return cls(mean, np.where(variances > _LEAST**2, variances, 1.0), axes)

    @property
    def mean_variance(self) -> float:
        """Mean of all d eigenvalues, the unit of penalties."""
        return float(self.variances.sum() / len(self.mean))

    def whitening(self, strength: float) -> np.ndarray:
        """V (e + strength * mean variance)^-1/2, [d, r]."""
        return np.asarray(self.axes / np.sqrt(self.variances + strength * self.mean_variance))


@dataclass(frozen=True)
class Moments:
    """Both sides of some pairs."""

    photos: Side
    texts: Side
    shared: np.ndarray
    """C, [photo size, text size]."""

    @classmethod
    def of(cls, photos: np.ndarray, texts: np.ndarray, positives: Ragged) -> Moments:
        """Of unit vectors of photos and of distinct texts, and each photo's rows of these."""
        ones = np.ones(len(photos))
        weights = (1 / positives.lengths)[positives.owners]
        used, places = np.unique(positives.values, return_inverse=True)
        own = Side.of(photos, ones)
        other = Side.of(texts[used], np.bincount(places, weights))
        mean_texts = np.add.reduceat(texts[positives.values] * weights[:, None], positives.offsets[:-1], axis=0)
        return cls(own, other, (photos - own.mean).T @ (mean_texts - other.mean) / len(photos))

    @classmethod
    def of_training(cls, seen: TrainingVectors) -> Moments:
        """Of a run's training pairs."""
        return cls.of(unit(seen.photos), seen.texts.astype(np.float64), seen.positives)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit length, float64; a zero row stays zero."""
    vectors = vectors.astype(np.float64)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))
