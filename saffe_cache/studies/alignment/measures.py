"""Measures of how well two encoders agree on the same items, for all pairs of layers, with intervals and nulls.

CKA and shared nearest neighbours compare which items are alike. Both ignore rotations of either space, so they need no
map between the spaces, and say nothing about whether a cosine between them means anything. A Gram matrix is computed
once for each layer; n photos take 4 n² bytes for each.

SVCCA finds directions of both spaces that go together, and is measured on photos that it was not fitted on. On the same
photos, canonical correlations are high for anything: about sqrt(r / n) for r random directions each. So principal
components and canonical directions come from one part of the photos, correlations from another. Source: Raghu et al.,
NeurIPS 2017, sec. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_LEAST = 1e-6
"""Share of the largest deviation below which a component is rounding."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One measure of all photo layers with all text layers: float64 [photo layers, text layers]; NaN where absent."""

    value: np.ndarray
    low: np.ndarray
    """Of the 95 % interval over photos."""
    high: np.ndarray
    null_mean: np.ndarray
    """The mean of the same measure over permutations of the pairs."""
    null_high: np.ndarray
    """Their 95 % quantile."""


def grid_of(value: np.ndarray, deviations: np.ndarray, nulls: np.ndarray) -> Grid:
    """A grid whose interval extends 1.96 standard deviations to each side.

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

    A photo drawn twice, as in a bootstrap, is its own nearest neighbour and most similar to itself, in both encoders,
    which raises kernel measures. Halves hold each photo once. They are drawn without replacement, so the
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

    A few channels of a transformer are large for every input, and would otherwise decide what is near.
    Source: Huh et al., The Platonic Representation Hypothesis (2024), their released code.
    """
    most = np.quantile(np.abs(vectors), quantile, axis=1).mean()
    clipped = np.clip(vectors, -most, most)
    return np.asarray(clipped / np.maximum(np.linalg.norm(clipped, axis=1, keepdims=True), 1e-12), np.float32)


def permutations(num: int, count: int, seed: int) -> Sequence[np.ndarray]:
    """Random orders of `num` things."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(num) for _ in range(count)]


def centered_gram(vectors: np.ndarray) -> np.ndarray:
    """Inner products, centred so that the estimate of dependence has no bias, float32 [n, n].

    See `u_centered`.
    """
    return u_centered(vectors.astype(np.float32) @ vectors.T.astype(np.float32))


def u_centered(gram: np.ndarray) -> np.ndarray:
    """A Gram matrix without diagonal whose rows sum to zero; sums of products of two are n (n - 3) HSIC_1.

        k_ij - r_i / (n - 2) - r_j / (n - 2) + s / ((n - 1) (n - 2)),   r row sums and s sum without diagonal

    A part of such a matrix, centred again, is what centring that part of the Gram matrix gives.
    Source: Székely and Rizzo, Annals of Statistics 42 (2014), sec. 2; HSIC_1 of Song et al., JMLR 13 (2012).

    Args:
        gram: [n, n], n at least 4.
    """
    n = len(gram)
    centered = gram.copy()
    np.fill_diagonal(centered, 0)
    rows = centered.sum(axis=1, dtype=np.float64)
    offsets = (rows / (n - 2) - rows.sum() / (2 * (n - 1) * (n - 2))).astype(gram.dtype)
    centered -= offsets
    centered -= offsets[:, None]
    np.fill_diagonal(centered, 0)
    return centered


def cka(photos: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Unbiased linear CKA of all pairs, float64 [photo layers, text layers]: 0 on average where nothing is shared.

        HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L))

    It may be a little below 0. (The usual biased estimate is 0.43 for 1,024 independent Gaussians of width 768.)
    Source: Kornblith et al., ICML 2019, sec. 3, with HSIC_1 as in Nguyen et al., ICLR 2021, sec. 3.

    Args:
        photos: `centered_gram` of each photo layer, [photo layers, n, n].
        texts: the same of text layers.
    """
    lengths = [np.linalg.norm(_flat(side), axis=1).astype(np.float64) for side in (photos, texts)]
    return np.asarray(_products(photos, texts) / np.maximum(np.outer(*lengths), 1e-30))


def cka_grid(photos: np.ndarray, texts: np.ndarray, shuffled: Iterable[np.ndarray], num_halves: int, seed: int) -> Grid:
    """CKA with its interval by halves of the photos, and its null.

    Args:
        photos, texts: as for `cka`.
        shuffled: like `texts`, after texts were assigned to photos at random, one for each permutation.
        num_halves: see `half_sample_deviations`.
        seed: of the halves.
    """

    def of_half(chosen: np.ndarray) -> np.ndarray:
        return cka(*(np.stack([u_centered(_part(gram, chosen)) for gram in side]) for side in (photos, texts)))

    deviations = half_sample_deviations(photos.shape[1], of_half, num_halves, seed)
    return grid_of(cka(photos, texts), deviations, np.stack([cka(photos, others) for others in shuffled]))


def neighbours(similarities: np.ndarray, k: int) -> np.ndarray:
    """Which others are among the k nearest of each: float32 [n, n] of 0 and 1."""
    others = similarities.copy()
    np.fill_diagonal(others, -np.inf)
    nearest = np.argpartition(-others, k - 1, axis=1)[:, :k]
    found = np.zeros(others.shape, np.float32)
    np.put_along_axis(found, nearest, 1, axis=1)
    return found


def mutual_neighbours(photos: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Mean share of each one's nearest that are also near in the other space, float64 [photo layers, text layers].

        (1 / n) sum over i of |N_photo(i) and N_text(i)| / k

    It depends on n: chance is k / (n - 1), and real values also shrink with n. Compare only equal n.
    Source: Huh et al., The Platonic Representation Hypothesis (2024), appendix A.

    Args:
        photos: `neighbours` of each photo layer, [photo layers, n, n].
        texts: the same of text layers; or, of classes, who else is of the same class.
    """
    return np.asarray(_products(photos, texts) / photos[0].sum())


def mutual_neighbours_grid(
    photos: np.ndarray, texts: np.ndarray, k: int, orders: Sequence[np.ndarray], num_halves: int, seed: int
) -> Grid:
    """Shared neighbours with their interval by halves of the photos, and their null.

    In a half, k / 2 nearest are the same share of the photos as k among all. So few vary slightly more, which makes the
    interval too wide rather than too narrow (on simulated photos it covered 98 %, that of CKA 90 to 96 %).

    Args:
        photos: similarities within each photo layer, [photo layers, n, n].
        texts: the same of text layers; of classes bool, who is of the same class.
        k: number of neighbours, even.
        orders: permutations of the n photos.
        num_halves: see `half_sample_deviations`.
        seed: of the halves.
    """

    def near(side: np.ndarray, k: int) -> np.ndarray:
        return np.stack([_classmates(one) if one.dtype == bool else neighbours(one, k) for one in side])

    def of_half(chosen: np.ndarray) -> np.ndarray:
        halves = (np.stack([_part(one, chosen) for one in side]) for side in (photos, texts))
        return mutual_neighbours(*(near(side, k // 2) for side in halves))

    deviations = half_sample_deviations(photos.shape[1], of_half, num_halves, seed)
    ours, theirs = near(photos, k), near(texts, k)
    nulls = [mutual_neighbours(ours, np.stack([_part(one, order) for one in theirs])) for order in orders]
    return grid_of(mutual_neighbours(ours, theirs), deviations, np.stack(nulls))


def chance_of_neighbours(texts: np.ndarray, k: int) -> float:
    """The mean of `mutual_neighbours` where nothing is shared: k / (n - 1); for classes, the share of classmates.

    Args:
        texts: as for `mutual_neighbours_grid`, of one layer, [n, n].
        k: number of neighbours.
    """
    n = len(texts)
    return float(_classmates(texts).sum()) / n / (n - 1) if texts.dtype == bool else k / (n - 1)


def _classmates(same: np.ndarray) -> np.ndarray:
    others = same.astype(np.float32)
    np.fill_diagonal(others, 0)
    return others


def _part(matrix: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Rows and columns of some photos, in their order."""
    return np.asarray(matrix[chosen[:, None], chosen])


def _flat(side: np.ndarray) -> np.ndarray:
    return side.reshape(len(side), -1)


def _products(photos: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Sums of products of all pairs of matrices."""
    return np.asarray(_flat(photos) @ _flat(texts).T, np.float64)


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
    """The judged photos and their texts along the directions that agree best in the fitted part: [m, r] each."""
    ours, _, theirs = np.linalg.svd(photos.fitted.T @ texts.fitted, full_matrices=False)
    return photos.judged @ ours, texts.judged @ theirs.T


def mean_correlation(photos: np.ndarray, texts: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Mean over columns of the correlation of two sets of variates [m, r], with a weight for each row.

    Args:
        photos, texts: variates.
        counts: how often each row counts, [resamples, m]; None for once.

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
    return grid_of(value, deviation, nulls)
