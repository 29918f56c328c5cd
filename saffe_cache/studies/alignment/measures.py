"""Measures of how well two encoders agree on the same items, for all pairs of layers, with intervals and nulls.

CKA and shared nearest neighbours compare which items are alike. Both ignore rotations of either space, so they need no
map between the spaces, and say nothing about whether a cosine between them means anything. A matrix of similarities is
computed once for each layer; n photos take 4 n² bytes for each. Intervals come from random halves of the photos.

SVCCA finds directions of both spaces that go together, and is measured on photos that it was not fitted on. On the same
photos, canonical correlations are high for anything: about sqrt(r / n) for r random directions each. So principal
components and canonical directions come from one part of the photos, correlations from another. Source: Raghu et al.,
NeurIPS 2017, sec. 2.

Arrays of all pairs of layers are float64 [photo layers, text layers], nulls [permutations, photo layers, text layers].
`num_halves` and `seed` are those of `half_sample_deviations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.studies.alignment.result import LayerMeasure

_LEAST = 1e-6
"""Share of the largest deviation below which a component is rounding."""


def layer_measure(
    value: np.ndarray,
    deviations: np.ndarray,
    nulls: np.ndarray,
    chance: float = 0.0,
    limits: tuple[float, float] = (-math.inf, math.inf),
    **others: np.ndarray,
) -> LayerMeasure:
    """A measure whose interval extends 1.96 standard deviations to each side, within the limits; NaN becomes None."""
    grids = {
        "value": value,
        "low": np.clip(value - 1.96 * deviations, *limits),
        "high": np.clip(value + 1.96 * deviations, *limits),
        "null_mean": nulls.mean(axis=0),
        "null_high": np.quantile(nulls, 0.95, axis=0),
        **others,
    }
    cells = {
        name: tuple(tuple(None if math.isnan(one) else one for one in row) for row in grid.tolist())
        for name, grid in grids.items()
    }
    return LayerMeasure(chance=chance, **cells)


def half_sample_deviations(
    photos: np.ndarray,
    texts: np.ndarray,
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    num_halves: int,
    seed: int,
) -> np.ndarray:
    """Standard deviation of a statistic of matrices [layers, n, n] of photos and texts, from random halves of them.

    A photo drawn twice, as in a bootstrap, is its own nearest neighbour in both encoders, which raises kernel measures.
    Halves hold each photo once. Drawn without replacement, the statistic of n / 2 photos varies about that of all n
    with the variance s² (2 / n - 1 / n) = s² / n: as the statistic of n photos does. Source: Shao and Wu, Annals of
    Statistics 17 (1989), the delete-d jackknife with d = n / 2.
    """
    num_photos, drawn = photos.shape[1], []
    for order in permutations(num_photos, num_halves, seed):
        half = order[: num_photos // 2]
        drawn.append(statistic(part(photos, half), part(texts, half)))
    return np.asarray(np.std(drawn, axis=0, ddof=1))


def permutations(num: int, count: int, seed: int) -> list[np.ndarray]:
    """Random orders of `num` things."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(num) for _ in range(count)]


def part(matrices: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Rows and columns of some photos, in their order, of [..., n, n]."""
    return np.asarray(matrices[..., chosen[:, None], chosen])


def _products(photos: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Sums of products of all pairs of matrices."""
    return np.asarray(np.tensordot(photos, texts, axes=((1, 2), (1, 2))), np.float64)


def unit_rows_clipped(vectors: np.ndarray, quantile: float = 0.95) -> np.ndarray:
    """Rows of unit length after magnitudes are cut off at the mean over rows of their 95 % quantile.

    A few channels of a transformer are large for every input, and would otherwise decide what is near.
    Source: Huh et al., The Platonic Representation Hypothesis (2024), their released code.
    """
    most = np.quantile(np.abs(vectors), quantile, axis=1).mean()
    return unit_rows(np.clip(vectors, -most, most))


def centered_gram(vectors: np.ndarray) -> np.ndarray:
    """Inner products, centred so that the estimate of dependence has no bias, float32 [n, n]; see `u_centered`."""
    return u_centered(vectors.astype(np.float32) @ vectors.T.astype(np.float32))


def u_centered(grams: np.ndarray) -> np.ndarray:
    """Gram matrices [..., n, n] without diagonal whose rows sum to zero; sums of products of two are n (n - 3) HSIC_1.

        k_ij - r_i / (n - 2) - r_j / (n - 2) + s / ((n - 1) (n - 2)),   r row sums and s sum without diagonal

    A part of such a matrix, centred again, is what centring that part of the Gram matrix gives.
    Source: Székely and Rizzo, Annals of Statistics 42 (2014), sec. 2; HSIC_1 of Song et al., JMLR 13 (2012).
    n is at least 4.
    """
    n = grams.shape[-1]
    centered, diagonal = grams.copy(), np.arange(n)
    centered[..., diagonal, diagonal] = 0
    rows = centered.sum(axis=-1, dtype=np.float64)
    offsets = (rows / (n - 2) - rows.sum(axis=-1, keepdims=True) / (2 * (n - 1) * (n - 2))).astype(grams.dtype)
    centered -= offsets[..., None, :]
    centered -= offsets[..., None]
    centered[..., diagonal, diagonal] = 0
    return centered


def cka(photos: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Unbiased linear CKA of all pairs, from `centered_gram` of each layer: 0 on average where nothing is shared.

        HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L))

    It may be a little below 0. (The usual biased estimate is 0.43 for 1,024 independent Gaussians of width 768.)
    Source: Kornblith et al., ICML 2019, sec. 3, with HSIC_1 as in Nguyen et al., ICLR 2021, sec. 3.
    """
    lengths = [np.linalg.norm(side.reshape(len(side), -1), axis=1).astype(np.float64) for side in (photos, texts)]
    return np.asarray(_products(photos, texts) / np.maximum(np.outer(*lengths), 1e-30))


def measure_cka(
    photos: np.ndarray, texts: np.ndarray, shuffled: Iterable[np.ndarray], num_halves: int, seed: int
) -> LayerMeasure:
    """`cka` with its interval and its null: by `shuffled`, like `texts`, after texts were assigned at random."""

    def of_half(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        return cka(u_centered(ours), u_centered(theirs))

    deviations = half_sample_deviations(photos, texts, of_half, num_halves, seed)
    return layer_measure(cka(photos, texts), deviations, np.stack([cka(photos, others) for others in shuffled]))


def neighbours(similarities: np.ndarray, k: int) -> np.ndarray:
    """Which others are among the k nearest of each, by similarities [layers, n, n]: float32 of 0 and 1.

    By bool [layers, n, n], who is of the same class: which others are.
    """
    own = np.eye(similarities.shape[-1], dtype=bool)
    if similarities.dtype == bool:
        return (similarities & ~own).astype(np.float32)
    found = np.zeros(similarities.shape, np.float32)
    for near, of in zip(found, similarities, strict=True):
        nearest = np.argpartition(np.where(own, np.inf, -of), k - 1, axis=1)[:, :k]
        np.put_along_axis(near, nearest, 1, axis=1)
    return found


def mutual_neighbours(photos: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Mean share of each one's nearest, by `neighbours`, that are also near in the other space.

        (1 / n) sum over i of |N_photo(i) and N_text(i)| / k

    It depends on n: chance is k / (n - 1), or the share of classmates, and real values also shrink with n. Compare only
    equal n. Source: Huh et al., The Platonic Representation Hypothesis (2024), appendix A.
    """
    return np.asarray(_products(photos, texts) / photos[0].sum())


def measure_mutual_neighbours(
    photos: np.ndarray, texts: np.ndarray, k: int, orders: Sequence[np.ndarray], num_halves: int, seed: int
) -> LayerMeasure:
    """Shared neighbours by similarities, with their interval and their null: by `orders` of the n photos.

    In a half, k / 2 nearest are the same share of the photos as k, an even number, among all. So few vary slightly
    more, which makes the interval too wide rather than too narrow (on simulated photos it covered 98 %, that of CKA 90
    to 96 %).
    """

    def of_half(*halves: np.ndarray) -> np.ndarray:
        return mutual_neighbours(*(neighbours(half, k // 2) for half in halves))

    n, deviations = photos.shape[1], half_sample_deviations(photos, texts, of_half, num_halves, seed)
    ours, theirs = neighbours(photos, k), neighbours(texts, k)
    value, chance = mutual_neighbours(ours, theirs), float(theirs[0].sum(dtype=np.float64)) / n / (n - 1)
    nulls = np.stack([mutual_neighbours(ours, part(theirs, order)) for order in orders])
    return layer_measure(value, deviations, nulls, chance, normalised=(value - chance) / (1 - chance))


class Components(NamedTuple):
    """The first principal components of a layer, of unit variance over the photos that they were fitted on."""

    fitted: np.ndarray
    judged: np.ndarray


def principal_components(fitted: np.ndarray, judged: np.ndarray, most: int) -> Components:
    """[n, r] and [m, r] of vectors [n, d] and others [m, d]: at most `most`, and no more than there are directions."""
    center = fitted.mean(axis=0, dtype=np.float64)
    _, deviations, directions = np.linalg.svd(fitted - center, full_matrices=False)
    kept = min(most, int((deviations > _LEAST * deviations[0]).sum()))
    whitening = directions[:kept].T / deviations[:kept] * len(fitted) ** 0.5
    return Components((fitted - center) @ whitening, (judged - center) @ whitening)


def canonical_variates(photos: Components, texts: Components) -> tuple[np.ndarray, np.ndarray]:
    """The judged photos and their texts along the directions that agree best in the fitted part: [m, r] each."""
    ours, _, theirs = np.linalg.svd(photos.fitted.T @ texts.fitted, full_matrices=False)
    return photos.judged @ ours, texts.judged @ theirs.T


def mean_correlation(photos: np.ndarray, texts: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Mean over columns of the correlation of two sets of variates [m, r], float64 [resamples] or [1].

    `counts`: how often each row counts, [resamples, m]; None for once.
    """
    weights = np.ones((1, len(photos))) if counts is None else counts
    weights = weights / weights.sum(axis=1, keepdims=True)
    mean_photo, mean_text = weights @ photos, weights @ texts
    covariances = weights @ (photos * texts) - mean_photo * mean_text
    variances = (weights @ photos**2 - mean_photo**2) * (weights @ texts**2 - mean_text**2)
    return np.asarray((covariances / np.sqrt(np.maximum(variances, 1e-30))).mean(axis=1))


def measure_svcca(
    photos: Sequence[Components], texts: Sequence[Components], num_permutations: int, resamples: int, seed: int
) -> LayerMeasure:
    """Mean canonical correlation of all pairs on the judged photos, with intervals and null.

    The interval is a bootstrap over judged photos, given the directions: drawing a photo twice does not bias a
    correlation. The null permutes the photos of both parts and fits again.
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
    return layer_measure(value, deviation, nulls)
