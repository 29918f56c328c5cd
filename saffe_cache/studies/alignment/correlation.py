"""SVCCA, judged on photos that it was not fitted on: directions of both spaces that go together.

Fitted and judged on the same photos, canonical correlations are high for anything: of r random directions each, about
sqrt(r / n). So principal components and canonical directions come from one part of the photos, correlations from
another. Source: Raghu et al., NeurIPS 2017, sec. 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saffe_cache.studies.alignment.scores import Grid, grid_of

_LEAST = 1e-6
"""Of a component's share of the largest deviation: below it is rounding."""


@dataclass(frozen=True)
class Components:
    """The first principal components of a layer, of unit variance over the photos that they were fitted on."""

    fitted: np.ndarray
    """[photos, r]"""
    judged: np.ndarray
    """[other photos, r]"""


def principal_components(fitted: np.ndarray, judged: np.ndarray, most: int) -> Components:
    """Of vectors [n, d] and other vectors [m, d]: at most `most`, and no more than there are directions."""
    center = fitted.mean(axis=0, dtype=np.float64)
    _, deviations, directions = np.linalg.svd(fitted - center, full_matrices=False)
    kept = min(most, int((deviations > _LEAST * deviations[0]).sum()))
    whitening = directions[:kept].T / deviations[:kept] * len(fitted) ** 0.5
    return Components((fitted - center) @ whitening, (judged - center) @ whitening)


def canonical_variates(photos: Components, texts: Components) -> tuple[np.ndarray, np.ndarray]:
    """The judged photos and their texts along the directions that go together best in the fitted part: [m, r] each."""
    ours, _, theirs = np.linalg.svd(photos.fitted.T @ texts.fitted, full_matrices=False)
    return photos.judged @ ours, texts.judged @ theirs.T


def mean_correlation(photos: np.ndarray, texts: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Mean over columns of the correlation of two sets of variates [m, r], with each row counted so often.

    Args:
        photos, texts: variates.
        counts: [resamples, m]; None for each row once.

    Returns:
        float64 [resamples], or [1].
    """
    weights = np.ones((1, len(photos))) if counts is None else counts
    weights = weights / weights.sum(axis=1, keepdims=True)
    mean_photo, mean_text = weights @ photos, weights @ texts
    covariances = weights @ (photos * texts) - mean_photo * mean_text
    variances = (weights @ photos**2 - mean_photo**2) * (weights @ texts**2 - mean_text**2)
    return np.asarray((covariances / np.sqrt(np.maximum(variances, 1e-30))).mean(axis=1))


def svcca_grid(
    photos: Sequence[Components], texts: Sequence[Components], num_permutations: int, resamples: int, seed: int
) -> Grid:
    """Mean canonical correlation of all pairs on the judged photos, with intervals and null.

    The interval is a bootstrap over judged photos, given the directions: a correlation takes no harm from a photo that
    is drawn twice. The null permutes the photos of both parts and fits again.
    """
    generator = np.random.default_rng(seed)
    num_fitted, num_judged = len(photos[0].fitted), len(photos[0].judged)
    counts = generator.multinomial(num_judged, np.full(num_judged, 1 / num_judged), size=resamples).astype(np.float64)
    orders = [(generator.permutation(num_fitted), generator.permutation(num_judged)) for _ in range(num_permutations)]
    shape = (len(photos), len(texts))
    value, deviation, nulls = np.zeros(shape), np.zeros(shape), np.zeros((num_permutations, *shape))
    for column, text in enumerate(texts):
        permuted = [Components(text.fitted[first], text.judged[second]) for first, second in orders]
        for row, photo in enumerate(photos):
            variates = canonical_variates(photo, text)
            value[row, column] = mean_correlation(*variates)[0]
            deviation[row, column] = mean_correlation(*variates, counts).std(ddof=1)
            nulls[:, row, column] = [mean_correlation(*canonical_variates(photo, one))[0] for one in permuted]
    return grid_of(value, deviation, nulls)
