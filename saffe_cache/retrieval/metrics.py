"""Retrieval metrics over ranked relevance. Pure numpy.

A ranking is a bool row, best rank first: is the gallery item at that rank relevant? Where scores tie, the
caller breaks ties by an order that knows nothing of relevance. All values are fractions in [0, 1].
"""

from __future__ import annotations

import numpy as np


def average_precision(is_relevant: np.ndarray, num_relevant: np.ndarray) -> np.ndarray:
    """Average precision of each ranked list, non-interpolated, as trec_eval's `map`.

        AP@k = (1 / R) * sum over ranks r <= k of precision@r * is_relevant[r]

    R also counts relevant items below rank k, so AP@k < 1 when R > k; the class protocol therefore gives
    min(R, k) for R where it cuts the ranking.
    Source: Manning et al., Introduction to Information Retrieval, sec. 8.4.

    Args:
        is_relevant: bool [queries, k]; the query itself is already removed.
        num_relevant: R of each query, int [queries].

    Raises:
        ValueError: some query has R = 0; the caller drops and reports those.
    """
    if (num_relevant < 1).any():
        raise ValueError("average precision: a query has no relevant item. Drop such queries and report their number.")
    precision = np.cumsum(is_relevant, axis=1) / np.arange(1, is_relevant.shape[1] + 1)
    return np.asarray((precision * is_relevant).sum(axis=1) / num_relevant)


def first_relevant_rank(is_relevant: np.ndarray) -> np.ndarray:
    """Rank of the first relevant item, from 1; one more than the list's length where it holds none."""
    found = is_relevant.any(axis=1)
    return np.asarray(np.where(found, is_relevant.argmax(axis=1) + 1, is_relevant.shape[1] + 1))


def recall_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
    """1.0 where a relevant item is among the first k, as cross-modal retrieval defines R@k."""
    return np.asarray(ranks <= k, np.float64)


def chance_average_precision(num_gallery: int, num_relevant: int) -> float:
    """Expected average precision of a random order.

    At rank r an item is relevant with probability R/N, and then precision@r is on average
    (1 + (r - 1)(R - 1)/(N - 1)) / r. Summing over r gives (H_N + (R - 1)(N - H_N)/(N - 1)) / N.
    """
    harmonic = float((1 / np.arange(1, num_gallery + 1)).sum())
    others = (num_relevant - 1) * (num_gallery - harmonic) / (num_gallery - 1) if num_gallery > 1 else 0.0
    return (harmonic + others) / num_gallery


def chance_first_rank(num_gallery: int, num_relevant: int) -> np.ndarray:
    """Probability that the first relevant item of a random order has rank 1, 2, …, float64 [num_gallery]."""
    ranks = np.arange(num_gallery)
    stays_out = np.clip(1 - num_relevant / (num_gallery - ranks), 0, None)
    still_out = np.concatenate([[1.0], np.cumprod(stays_out)[:-1]])
    return still_out * (1 - stays_out)


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
