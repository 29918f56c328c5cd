"""Retrieval metrics over the ranks of relevant items, and the registry of all metrics. Pure numpy.

Ranks count from 1, ascending, with one row for each query. Where scores tie, `ranking` breaks ties by an order
that knows nothing of relevance. Values are fractions in [0, 1], except for ranks.

A new metric is a function of ranks and one entry of `METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from saffe_cache.core.items import Ragged
from saffe_cache.core.results import Estimate


def average_precision_of_ranks(ranks: Ragged, depth: int | None = None) -> np.ndarray:
    """Average precision of each query, non-interpolated, as trec_eval's `map`; float64 [queries].

        AP = (1 / R) * sum over j of j / rank_j        with R ranks, of all relevant items

    With a depth k only ranks up to k count, and R becomes min(R, k), so that a perfect ranking has 1.
    (trec_eval's `map_cut` divides by R also then.) The query itself is not ranked.
    Source: Manning et al., Introduction to Information Retrieval, sec. 8.4.

    Raises:
        ValueError: some query has R = 0; the caller drops and reports those.
    """
    sizes = _numbers_of_relevant(ranks)
    position = 1 + np.arange(len(ranks.values)) - np.repeat(ranks.offsets[:-1], sizes)
    precision = position / ranks.values
    if depth is not None:
        precision[ranks.values > depth] = 0
        sizes = np.minimum(sizes, depth)
    return np.asarray(np.add.reduceat(precision, ranks.offsets[:-1]) / sizes)


def first_ranks(ranks: Ragged) -> np.ndarray:
    """Rank of each query's first relevant item, int64 [queries]; every query needs one."""
    _numbers_of_relevant(ranks)
    return np.asarray(ranks.values[ranks.offsets[:-1]])


def _numbers_of_relevant(ranks: Ragged) -> np.ndarray:
    sizes = ranks.lengths
    if (sizes < 1).any():
        raise ValueError("ranks: a query has no relevant item. Drop such queries and report their number.")
    return sizes


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


class RandomOrder:
    """The values to expect where the gallery is in a random order: the mean over queries."""

    def __init__(self, num_gallery: int, num_relevant: np.ndarray) -> None:
        """`num_relevant`: relevant items of each query, int [queries]."""
        self.num_gallery = num_gallery
        self._kinds, self._counts = np.unique(num_relevant, return_counts=True)

    def average_precision(self, depth: int | None = None) -> float:
        """Mean of `chance_average_precision`."""
        chances = [chance_average_precision(self.num_gallery, int(kind), depth) for kind in self._kinds]
        return float(np.average(chances, weights=self._counts))

    @cached_property
    def first_rank(self) -> np.ndarray:
        """Mean of `chance_first_rank`."""
        chances = (chance_first_rank(self.num_gallery, int(kind)) for kind in self._kinds)
        shares = self._counts / self._counts.sum()
        return np.asarray(sum(share * chance for share, chance in zip(shares, chances, strict=True)))

    def recall(self, k: int) -> float:
        return float(self.first_rank[:k].sum())

    @property
    def reciprocal_rank(self) -> float:
        return float((self.first_rank / np.arange(1, self.num_gallery + 1)).sum())

    @property
    def median_rank(self) -> float:
        return float(np.searchsorted(np.cumsum(self.first_rank), 0.5 - 1e-9) + 1)  # despite rounding


Ranking = Literal["captions", "texts", "classes", "images", "labels", "candidates", "composed", "grouped", "subset"]
"""Which rankings a metric is computed of: the photos for each caption (and the captions for each photo), for each text
that describes photos, for each class, for each photo; the classes for each photo, by vectors or as candidates; and the
photos for each photo and text, as a mean over groups of these, and within their subsets."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric over ranks of relevant items, and what a reader must know of it."""

    description: str
    rankings: tuple[Ranking, ...]
    values: Callable[[Ragged], np.ndarray]
    """One value for each query."""
    chance: Callable[[RandomOrder], float]
    is_rank: bool = False
    """Whether it is a rank, whose median over queries is reported, and no percentage, whose mean is."""
    higher_is_better: bool = True
    least_items: int = 1
    """The metric is left out where fewer items are ranked."""

    def show(self, value: float, digits: int = 1) -> str:
        """For people: a rank as it is, a fraction as a percentage."""
        return f"{value:.0f}" if self.is_rank else f"{100 * value:.{digits}f}"


def _recall(k: int, description: str, *rankings: Ranking, least_items: int = 1) -> Metric:
    return Metric(
        description=description,
        rankings=rankings,
        values=lambda ranks: recall_at_k(first_ranks(ranks), k),
        chance=lambda order: order.recall(k),
        least_items=least_items,
    )


def _map_at(k: int, *rankings: Ranking) -> Metric:
    return Metric(
        description=f"mean average precision over the first {k}, divided by min(relevant, {k})",
        rankings=rankings,
        values=lambda ranks: average_precision_of_ranks(ranks, k),
        chance=lambda order: order.average_precision(k),
    )


METRICS: dict[str, Metric] = {
    "map": Metric(
        description="mean average precision over the whole ranking, not interpolated",
        rankings=("texts", "classes", "images", "composed"),
        values=average_precision_of_ranks,
        chance=lambda order: order.average_precision(),
    ),
    "map_at_5": _map_at(5, "composed"),
    "map_at_10": _map_at(10, "composed"),
    "map_at_25": _map_at(25, "composed"),
    "map_at_50": _map_at(50, "composed"),
    "map_at_100": _map_at(100, "classes", "images"),
    "recall_at_1": _recall(
        1, "share of queries whose first result is relevant", "captions", "texts", "images", "composed", "subset"
    ),
    "recall_at_2": _recall(2, "share of queries with a relevant result among the first 2", "subset"),
    "recall_at_3": _recall(3, "share of queries with a relevant result among the first 3", "subset"),
    "recall_at_5": _recall(
        5, "share of queries with a relevant result among the first 5", "captions", "texts", "composed"
    ),
    "recall_at_10": _recall(
        10, "share of queries with a relevant result among the first 10", "captions", "texts", "composed", "grouped"
    ),
    "recall_at_50": _recall(50, "share of queries with a relevant result among the first 50", "composed", "grouped"),
    "recall": Metric(
        description="mean of recall_at_10 and recall_at_50",
        rankings=("grouped",),
        values=lambda ranks: (recall_at_k(first_ranks(ranks), 10) + recall_at_k(first_ranks(ranks), 50)) / 2,
        chance=lambda order: (order.recall(10) + order.recall(50)) / 2,
    ),
    "mrr": Metric(
        description="mean of 1 / rank of the first relevant result",
        rankings=("captions", "texts"),
        values=lambda ranks: 1 / first_ranks(ranks),
        chance=lambda order: order.reciprocal_rank,
    ),
    "median_rank": Metric(
        description="median rank of the first relevant result: a rank, not a percentage; lower is better",
        rankings=("captions", "texts"),
        values=first_ranks,
        chance=lambda order: order.median_rank,
        is_rank=True,
        higher_is_better=False,
    ),
    "top1": _recall(1, "share of photos whose nearest class is one of theirs", "labels", "candidates"),
    "top5": _recall(5, "share of photos with one of their classes among the nearest 5", "candidates", least_items=6),
}
"""Every metric by name, in the order in which reports list them."""

_VARIANTS = {
    "image_to_text_{}": "photos search texts: {}",
    "{}_prior_removed": "{}, after subtracting each class's mean score over training photos",
    "{}_matching": "{}, by the matching head's logits",
    "group_mean_{}": "mean over the groups of queries of: {}",
    "subset_{}": "among the other members of the query's subset: {}",
}
"""Names of metrics of the same kind under other conditions, and their descriptions."""


def metrics_of(ranking: Ranking, num_items: float = np.inf) -> dict[str, Metric]:
    """The metrics of a ranking, of `num_items` items."""
    return {name: one for name, one in METRICS.items() if ranking in one.rankings and num_items >= one.least_items}


def metric_named(name: str) -> Metric:
    """A metric, or a variant of one such as `top1_matching`; ValueError where none is registered."""
    if name in METRICS:
        return METRICS[name]
    for variant, description in _VARIANTS.items():
        before, after = variant.split("{}")
        base = METRICS.get(name.removeprefix(before).removesuffix(after))
        if base and name == variant.format(name.removeprefix(before).removesuffix(after)):
            return replace(base, description=description.format(base.description))
    raise ValueError(f"metric {name!r:.60} is not registered, expected one of {', '.join(METRICS)}.")


def bootstrap_interval(
    totals: np.ndarray, counts: np.ndarray, *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of sum(totals) / sum(counts), resampling units (photos) with replacement.

    Captions of one photo are not independent; a photo's captions are drawn together. Totals and counts are the sum of
    the metric over each unit's queries and their number, [units] each; see `unit_totals`.
    """
    return bootstrap_intervals([totals], counts, seed=seed, resamples=resamples)[0]


def bootstrap_intervals(
    totals: Sequence[np.ndarray], counts: np.ndarray, *, seed: int = 0, resamples: int = 1000
) -> list[tuple[float, float]]:
    """As `bootstrap_interval`, of several metrics over the same units; each is the same as if it were alone."""
    return [middle(values) for values in bootstrap_resamples(totals, counts, seed=seed, resamples=resamples)]


def bootstrap_resamples(
    totals: Sequence[np.ndarray], counts: np.ndarray, *, seed: int = 0, resamples: int = 1000
) -> np.ndarray:
    """The value of each metric in each resample, float64 [metrics, resamples]; arguments as of `bootstrap_intervals`.

    Equal seeds draw equal units, so the difference of two systems' rows is that of a paired bootstrap.
    """
    generator, values = np.random.default_rng(seed), np.empty((len(totals), resamples))
    for resample in range(resamples):
        drawn = generator.integers(len(counts), size=len(counts))
        number = counts[drawn].sum()
        values[:, resample] = [of_metric[drawn].sum() / number for of_metric in totals]
    return values


def middle(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The interval that holds the middle 95 %."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def unit_totals(values: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the queries' values of each unit, for `bootstrap_interval`; `units` int [queries]."""
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

    `difference` is the first system's value minus the second's, `units` the photo of each query, [queries] each; a
    photo's queries are drawn together.
    """
    if difference.shape != units.shape or not len(units):
        raise ValueError(f"paired bootstrap: {difference.shape} differences, {units.shape} units. Give one for each.")
    low, high = bootstrap_interval(*unit_totals(difference, units), seed=seed, resamples=resamples)
    return float(difference.mean()), low, high


def map_interval(order: np.ndarray, ranked: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of mAP over resampled photos; arguments as of `map_resamples`."""
    return middle(map_resamples(order, ranked, seed=seed))


def map_resamples(order: np.ndarray, ranked: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """mAP in each of 200 to 1,000 resamples of the photos, float64; equal seeds draw equal photos.

    A photo that is drawn twice counts twice, also among those above another; but its copies do not stand
    above each other, which would raise every resample (by a third of the interval, with 50 photos a class).

    `order` [classes, n] is the photo at each rank, `ranked` whether it is relevant: at least one in each row.
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
    return np.array(values)


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


def over_seeds(values: Sequence[float]) -> Estimate:
    """As `seed_interval`; a single seed has no interval."""
    mean, low, high = seed_interval(values)
    return Estimate(value=mean, low=low, high=high) if len(values) > 1 else Estimate(value=mean)
