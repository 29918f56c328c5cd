"""Measures that compare who is like whom: CKA without its bias, and shared nearest neighbours.

Both are the same under rotations of either space, so they need no map between the two, and say nothing of whether a
cosine between them means anything. A Gram matrix is made once for each layer; n photos take 4 n² bytes of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from saffe_cache.studies.alignment.scores import Grid, grid_of, half_sample_deviations


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

    It may be a little below 0. (The usual, biased one says 0.43 of 1,024 independent Gaussians of width 768.)
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
        shuffled: as `texts`, after texts were dealt to photos at random, one for each permutation.
        num_halves: see `half_sample_deviations`.
        seed: of the halves.
    """

    def of_half(chosen: np.ndarray) -> np.ndarray:
        return cka(*(np.stack([u_centered(_part(gram, chosen)) for gram in side]) for side in (photos, texts)))

    deviations = half_sample_deviations(photos.shape[1], of_half, num_halves, seed)
    return grid_of(cka(photos, texts), deviations, np.stack([cka(photos, others) for others in shuffled]))


def neighbours(similarities: np.ndarray, k: int) -> np.ndarray:
    """Who is among the k nearest of each, itself not counted: float32 [n, n] of 0 and 1."""
    others = similarities.copy()
    np.fill_diagonal(others, -np.inf)
    nearest = np.argpartition(-others, k - 1, axis=1)[:, :k]
    found = np.zeros(others.shape, np.float32)
    np.put_along_axis(found, nearest, 1, axis=1)
    return found


def mutual_neighbours(photos: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Mean share of each one's nearest that are near in the other space too, float64 [photo layers, text layers].

        (1 / n) sum over i of |N_photo(i) and N_text(i)| / k

    It depends on n: chance is k / (n - 1), and real values shrink with n as well. Compare equal n alone.
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

    In a half, k / 2 nearest are the same share of the photos as k among all. So few vary a little more: the interval is
    wide rather than narrow (on simulated photos it covered 98 %, that of CKA 90 to 96 %).

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
    """What `mutual_neighbours` is on average where nothing is shared: k / (n - 1); of classes, the share of classmates.

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
