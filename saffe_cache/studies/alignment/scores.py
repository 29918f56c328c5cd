"""What a measure of alignment says of every pair of layers, and of none: value, interval, null."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One measure of all photo layers with all text layers: float64 [photo layers, text layers]; NaN where absent."""

    value: np.ndarray
    low: np.ndarray
    """Of the 95 % interval over photos."""
    high: np.ndarray
    null_mean: np.ndarray
    """The same measure where pairs are permuted: mean over permutations."""
    null_high: np.ndarray
    """Their 95 % quantile."""


def grid_of(value: np.ndarray, deviations: np.ndarray, nulls: np.ndarray) -> Grid:
    """A grid whose interval is 1.96 standard deviations wide to each side.

    Args:
        value: [photo layers, text layers].
        deviations: standard deviation of each.
        nulls: [permutations, photo layers, text layers].
    """
    return Grid(
        value=value,
        low=value - 1.96 * deviations,
        high=value + 1.96 * deviations,
        null_mean=nulls.mean(axis=0),
        null_high=np.quantile(nulls, 0.95, axis=0),
    )


def half_sample_deviations(
    num_photos: int, statistic: Callable[[np.ndarray], np.ndarray], num_samples: int, seed: int
) -> np.ndarray:
    """Standard deviation of a statistic of all photos, from random halves of them.

    A photo drawn twice, as a bootstrap draws, is its own nearest neighbour and as similar to itself as can be, in both
    encoders: that raises kernel measures. Halves hold each photo once. They are drawn without replacement, so the
    statistic of n / 2 photos varies about that of all n with the variance s² (2 / n - 1 / n) = s² / n: as the statistic
    of n photos does. Source: Shao and Wu, Annals of Statistics 17 (1989), the delete-d jackknife with d = n / 2.

    Args:
        num_photos: n.
        statistic: of the photos with these positions, int [n / 2].
        num_samples: halves drawn.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    drawn = [statistic(generator.permutation(num_photos)[: num_photos // 2]) for _ in range(num_samples)]
    return np.asarray(np.std(np.stack(drawn), axis=0, ddof=1))


def unit_rows_clipped(vectors: np.ndarray, quantile: float = 0.95) -> np.ndarray:
    """Rows of unit length after magnitudes are cut off at the mean over rows of their 95 % quantile.

    A few channels of a transformer are large for every input, and would alone decide who is near.
    Source: Huh et al., The Platonic Representation Hypothesis (2024), their released code.
    """
    most = np.quantile(np.abs(vectors), quantile, axis=1).mean()
    clipped = np.clip(vectors, -most, most)
    return np.asarray(clipped / np.maximum(np.linalg.norm(clipped, axis=1, keepdims=True), 1e-12), np.float32)


def permutations(num: int, count: int, seed: int) -> Sequence[np.ndarray]:
    """Random orders of `num` things."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(num) for _ in range(count)]
