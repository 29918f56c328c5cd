"""Retrieval metrics over the ranks of relevant items. Pure numpy.

Ranks count from 1, ascending, with one row for each query. Where scores tie, `ranking` breaks ties by an order
that knows nothing of relevance. All values are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saffe_cache.core.features import Ragged


def average_precision_of_ranks(ranks: Ragged, depth: int | None = None) -> np.ndarray:
    """Average precision of each query, non-interpolated, as trec_eval's `map`; float64 [queries].

        AP = (1 / R) * sum over j of j / rank_j        with R ranks, of all relevant items

    With a depth k only ranks up to k count, and R becomes min(R, k), so that a perfect ranking has 1.
    (trec_eval's `map_cut` divides by R also then.)
    Source: Manning et al., Introduction to Information Retrieval, sec. 8.4.

    Args:
        ranks: of all relevant items of each query; the query itself is not ranked.
        depth: k; None for the whole ranking.

    Raises:
        ValueError: some query has R = 0; the caller drops and reports those.
    """
    _refuse_queries_without_relevant_items(ranks)
    sizes = np.diff(ranks.offsets)
    position = 1 + np.arange(len(ranks.values)) - np.repeat(ranks.offsets[:-1], sizes)
    precision = position / ranks.values
    if depth is not None:
        precision[ranks.values > depth] = 0
        sizes = np.minimum(sizes, depth)
    return np.asarray(np.add.reduceat(precision, ranks.offsets[:-1]) / sizes)


def first_ranks(ranks: Ragged) -> np.ndarray:
    """Rank of each query's first relevant item, int64 [queries].

    Raises:
        ValueError: some query has no relevant item.
    """
    _refuse_queries_without_relevant_items(ranks)
    return np.asarray(ranks.values[ranks.offsets[:-1]])


def _refuse_queries_without_relevant_items(ranks: Ragged) -> None:
    if (np.diff(ranks.offsets) < 1).any():
        raise ValueError("ranks: a query has no relevant item. Drop such queries and report their number.")


def recall_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
    """1.0 where a relevant item is among the first k, as cross-modal retrieval defines R@k."""
    return np.asarray(ranks <= k, np.float64)


def chance_average_precision(num_gallery: int, num_relevant: int, depth: int | None = None) -> float:
    """Expected average precision of a random order; with a depth k, over its first k and divided by min(R, k).

    At rank r an item is relevant with probability R/N, and then precision@r is on average
    (1 + (r - 1)(R - 1)/(N - 1)) / r. Summing over r up to k gives R/N (H_k + (R - 1)(k - H_k)/(N - 1)).
    """
    depth = num_gallery if depth is None else min(depth, num_gallery)
    harmonic = float((1 / np.arange(1, depth + 1)).sum())
    others = (num_relevant - 1) * (depth - harmonic) / (num_gallery - 1) if num_gallery > 1 else 0.0
    return (harmonic + others) * num_relevant / num_gallery / min(num_relevant, depth)


def chance_first_rank(num_gallery: int, num_relevant: int) -> np.ndarray:
    """Probability that the first relevant item of a random order has rank 1, 2, …, float64 [num_gallery]."""
    ranks = np.arange(num_gallery)
    stays_out = np.clip(1 - num_relevant / (num_gallery - ranks), 0, None)
    still_out = np.concatenate([[1.0], np.cumprod(stays_out)[:-1]])
    return still_out * (1 - stays_out)


def mean_chance_average_precision(num_gallery: int, num_relevant: np.ndarray, depth: int | None = None) -> float:
    """Mean of `chance_average_precision` over queries that have these numbers of relevant items, int [queries]."""
    kinds, counts = np.unique(num_relevant, return_counts=True)
    chances = [chance_average_precision(num_gallery, int(kind), depth) for kind in kinds]
    return float(np.average(chances, weights=counts))


def mean_chance_first_rank(num_gallery: int, num_relevant: np.ndarray) -> np.ndarray:
    """Mean of `chance_first_rank` over queries that have these numbers of relevant items, int [queries]."""
    kinds, counts = np.unique(num_relevant, return_counts=True)
    chance = np.zeros(num_gallery)
    for kind, share in zip(kinds, counts / counts.sum(), strict=True):
        chance += share * chance_first_rank(num_gallery, int(kind))
    return chance


def bootstrap_interval(
    totals: np.ndarray, counts: np.ndarray, *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of sum(totals) / sum(counts), resampling units (photos) with replacement.

    Captions of one photo are not independent; a photo's captions are drawn together.

    Args:
        totals: sum of the metric over each unit's queries, float [units].
        counts: number of queries of each unit, [units].
    """
    generator = np.random.default_rng(seed)
    values = np.empty(resamples)
    for i in range(resamples):
        drawn = generator.integers(len(totals), size=len(totals))
        values[i] = totals[drawn].sum() / counts[drawn].sum()
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def unit_totals(values: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the queries' values of each unit that has queries, for `bootstrap_interval`.

    Args:
        values: [queries].
        units: int [queries], the photo of each query.
    """
    _, rows = np.unique(units, return_inverse=True)
    return np.bincount(rows, weights=values), np.bincount(rows)


def paired_bootstrap(
    difference: np.ndarray, units: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """Mean of the differences of two systems on the same queries, and its 95 % percentile interval.

    An interval above 0 says that the first system is better on photos such as these. Both systems see the
    same resampled photos, so that what makes a query hard for both cancels; two separate intervals would
    be wider, and may overlap where one system is better.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, sec. 13.3 and 8.6 (clusters).

    Args:
        difference: value of the first system minus that of the second, [queries].
        units: int [queries], the photo of each query; a photo's queries are drawn together.
        seed: of the draws.
        resamples: number of draws.

    Returns:
        mean, low, high.

    Raises:
        ValueError: not one unit for each difference, or none at all.
    """
    if difference.shape != units.shape or not len(units):
        raise ValueError(f"paired bootstrap: {difference.shape} differences, {units.shape} units. Give one for each.")
    low, high = bootstrap_interval(*unit_totals(difference, units), seed=seed, resamples=resamples)
    return float(difference.mean()), low, high


def map_interval(order: np.ndarray, ranked: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of mAP over resampled photos.

    A photo that is drawn twice counts twice, also among those above another; but its copies do not stand
    above each other, which would raise every resample (by a third of the interval, with 50 photos a class).

    Args:
        order: [classes, n], the photo at each rank.
        ranked: bool [classes, n], whether it is relevant; at least one is in each row.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    num_photos = order.shape[1]
    relevant = np.flatnonzero(ranked)
    starts = np.searchsorted(relevant, np.arange(len(order)) * num_photos)
    sizes = np.diff([*starts, len(relevant)])
    values = []
    for _ in range(int(np.clip(2e8 / order.size, 200, 1000))):
        times = np.bincount(generator.integers(num_photos, size=num_photos), minlength=num_photos)
        copies = times[order]
        above = (np.cumsum(copies, axis=1) - copies).ravel()[relevant]
        copies = copies.ravel()[relevant]
        relevant_above = np.cumsum(copies) - copies
        relevant_above -= np.repeat(relevant_above[starts], sizes)
        precision = (1 + relevant_above) / (1 + above)
        counts = np.add.reduceat(copies, starts)
        values.append((np.add.reduceat(precision * copies, starts)[counts > 0] / counts[counts > 0]).mean())
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t distribution with 1 to 30 degrees of freedom."""


def seed_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds, and its 95 % interval by Student's t distribution: wide where there are two or three.

    Of one value the interval is that value; of more than 31 the quantile is that of 31, a little too wide.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    half = _STUDENT[min(len(values) - 1, len(_STUDENT)) - 1] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, mean - half, mean + half
