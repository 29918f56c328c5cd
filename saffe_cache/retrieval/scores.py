"""Scores of rankings by unit vectors or by scores of pairs, with chance and intervals. Pure numpy.

All take `intervals`, whether to compute 95 % bootstrap intervals, and `seed`, of the order of ties and the bootstrap.
Galleries and photos are vectors [n, d] of unit length; of queries [m, d] only the directions count; `labels` are the
classes of each photo; `units` int [m] are the photos whose queries are drawn together in the bootstrap. ValueError is
raised where a vector or score is not finite, a gallery's vector is not of unit length, or a query, or all of them, have
nothing relevant. `saffe_cache.retrieval.metrics.METRICS` says which metrics each reports.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from saffe_cache.core.controls import interval_error
from saffe_cache.core.items import Ragged
from saffe_cache.retrieval.metrics import (
    RandomOrder,
    Ranking,
    bootstrap_intervals,
    map_interval,
    metrics_of,
    unit_totals,
)
from saffe_cache.retrieval.ranking import ROUNDING, InnerProducts, ScoreMatrix, members, relevant_ranks, top_k

_MOST_ORDERED = 2e7
"""Classes times photos up to which the interval of a class's mAP is computed: 0.7 GB, and a minute."""
_SCORES_AT_ONCE = 2**19
"""4 MB, where the classes of a photo are ranked."""


@dataclass(frozen=True)
class Score:
    """One metric of one system."""

    value: float
    chance: float
    """Expected where the gallery is in a random order. (Photo to caption, shuffled photos find less among the
    first k than that: captions of one photo are alike and come together.)"""
    interval: tuple[float, float] | None = None
    """95 % by bootstrap over photos."""
    values: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Where the metric is a mean: that of each query, float64, in the order of the queries that have something
    relevant, so that two systems can be compared in pairs."""
    units: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Of `values`, the photos that are drawn in a bootstrap of such a comparison; None where there are too few."""

    @property
    def error(self) -> float:
        """Standard error, from the interval."""
        assert self.interval is not None, "a standard error needs an interval"
        return interval_error(*self.interval)

    @property
    def of_queries(self) -> np.ndarray:
        """`values`, of a metric that is a mean over queries."""
        assert self.values is not None, "the metric is no mean over queries"
        return self.values


Scores = dict[str, Score]


class Biases(NamedTuple):
    """What a search correction subtracts from the scores of items; None for nothing."""

    gallery: np.ndarray | None = None
    """float32 [n], of the photos that texts search."""
    queries: np.ndarray | None = None
    """float32 [m], of the texts that photos search."""


NO_BIASES = Biases()


def caption_scores(
    photos: np.ndarray,
    captions: np.ndarray,
    owners: np.ndarray,
    biases: Biases = NO_BIASES,
    *,
    intervals: bool = True,
    seed: int = 0,
    most: int = 0,
    photos_search: bool = True,
) -> Scores:
    """Both directions of caption retrieval (M2); mAP = MRR, as one photo is relevant to a caption.

    `owners` int [m] says which photo each caption describes; each photo owns at least one. Of the captions, and of the
    photos, at most `most` search, drawn by the seed; 0 for all. `photos_search`: whether photos search at all.
    """

    def scores(
        gallery: np.ndarray, queries: np.ndarray, bias: np.ndarray | None, relevant: Ragged, units: np.ndarray
    ) -> Scores:
        chosen = drawn_queries(len(queries), most, seed)
        if len(chosen) < len(queries):
            queries, relevant, units = queries[chosen], relevant.take(chosen), units[chosen]
        ranks = relevant_ranks(InnerProducts(gallery, queries, bias), relevant, seed=seed)
        return _scores_of("captions", ranks, units, len(gallery), intervals, seed)

    photo_of = Ragged(np.arange(len(owners) + 1), owners)
    forwards = scores(photos, captions, biases.gallery, photo_of, owners)
    if not photos_search:
        return forwards
    backwards = scores(captions, photos, biases.queries, members(photo_of, len(photos)), np.arange(len(photos)))
    return forwards | {f"image_to_text_{name}": replace(score, units=None) for name, score in backwards.items()}


def drawn_queries(count: int, most: int, seed: int) -> np.ndarray:
    """Some of so many queries, ascending; 0 for all."""
    if not 0 < most < count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def text_scores(
    gallery: np.ndarray,
    queries: np.ndarray,
    relevant: Ragged,
    units: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    intervals: bool = True,
    seed: int = 0,
) -> Scores:
    """Texts search gallery items, of which several may be relevant to a text.

    `recall_at_k` is the share of texts with a relevant item among the first k, `mrr` and `median_rank` are
    those of the first relevant item, `map` counts all of them (M2 where each text has one). `bias`, of each gallery
    item, is subtracted from its scores.
    """
    ranks = relevant_ranks(InnerProducts(gallery, queries, bias), relevant, seed=seed)
    return rank_scores(ranks, units, gallery.shape[0], intervals=intervals, seed=seed)


def rank_scores(ranks: Ragged, units: np.ndarray, num_gallery: int, *, intervals: bool = True, seed: int = 0) -> Scores:
    """As `text_scores`, from the ranks of all relevant items of each query among `num_gallery`, from 1, ascending."""
    return _scores_of("texts", ranks, units, num_gallery, intervals, seed)


def class_scores(
    photos: np.ndarray,
    classes: np.ndarray,
    labels: Ragged,
    biases: Biases = NO_BIASES,
    *,
    intervals: bool = True,
    seed: int = 0,
) -> Scores:
    """Class names search photos (M1). Classes without a photo are no queries; top1 has them as wrong answers.

    `top1` (M5) is what the SAFFE release calls mAP. `map`, the mean over classes, is also M3, the multi-label
    classification metric, where it is not interpolated. Its interval resamples the gallery, for which it needs each
    whole ranking: it is None where photos times classes exceed 2e7.
    """
    scores = InnerProducts(photos, classes, biases.gallery)
    of_labels = _label_scores("labels", scores, labels, intervals, seed, biases.queries)
    return _class_map_scores(scores, labels, intervals, seed) | of_labels


def candidate_scores(
    scores: np.ndarray, labels: Ragged, *, prior: np.ndarray | None = None, intervals: bool = True, seed: int = 0
) -> Scores:
    """Every class is a candidate for every photo, by a score s(photo, class) of models that look at both at once (P2).

    Metrics have the names and definitions of `class_scores`, so that both fit one table. Differences of less than
    1e-6 count as ties, in which probabilities near 0 and 1 would drown: give a classifier's log-odds
    log p / (1 - p), which order photos and classes alike.

    `scores` are [photos, classes]. `prior` [classes] is the mean score of each class over training photos: how easily
    its text is rebuilt from any photo. It is subtracted for top1 and top5; it cannot change the order of the photos of
    one class.
    """
    num_photos, num_classes = scores.shape
    if len(labels) != num_photos:
        raise ValueError(f"candidates: scores of {num_photos} items, labels of {len(labels)}. Give both for each.")
    prior = np.zeros(num_classes) if prior is None else prior
    if prior.shape != (num_classes,) or not np.isfinite(prior).all():
        raise ValueError(f"candidates: prior of shape {prior.shape}, expected {num_classes} finite numbers.")
    of_classes = _class_map_scores(scores.T, labels, intervals, seed)
    return of_classes | _label_scores("candidates", (scores - prior).T, labels, intervals, seed)


def image_scores(photos: np.ndarray, labels: Ragged, *, intervals: bool = True, seed: int = 0) -> Scores:
    """Photos search the other photos that share a class with them (M4); the photo itself is not ranked.

    `recall_at_1` is the accuracy of the nearest neighbour. A photo that shares its classes with no other is no
    query, but remains in the gallery; `len(values)` of a score is the number of queries. Intervals resample
    the queries and take the gallery as given. Memory grows with the relevant pairs, by about 50 bytes
    each: 1.2 GB for 5,000 photos that all share a class, 0.2 GB with 10 classes.
    """
    relevant = others_of_classes(labels)
    searching = np.flatnonzero(relevant.lengths)
    if not len(searching):
        raise ValueError("image protocol: no two items share a class. Give items with labels.")
    rows = Ragged(np.unique(relevant.offsets), relevant.values)  # without the empty ones
    ranks = relevant_ranks(InnerProducts(photos, photos[searching]), rows, exclude=searching, seed=seed)
    return _scores_of("images", ranks, searching, len(photos) - 1, intervals, seed)


def _scores_of(
    ranking: Ranking,
    ranks: Ragged,
    units: np.ndarray,
    num_gallery: int,
    intervals: bool,
    seed: int,
    num_relevant: np.ndarray | None = None,
) -> Scores:
    """The metrics of a ranking; intervals resample the units of its queries.

    `num_relevant`: relevant items of each query, where `ranks` holds the first one alone.
    """
    order, found = RandomOrder(num_gallery, ranks.lengths if num_relevant is None else num_relevant), {}
    for name, metric in metrics_of(ranking, num_gallery).items():
        values, chance = metric.values(ranks), metric.chance(order)
        if metric.is_rank:
            found[name] = Score(float(np.median(values)), chance)
        else:
            found[name] = Score(float(values.mean()), chance, None, values)
    return with_intervals(found, units if intervals else None, seed)


def with_intervals(found: Scores, units: np.ndarray | None, seed: int) -> Scores:
    """The same, with intervals of means over queries by resampling their `units`; None for no intervals."""
    means = {name: score.of_queries for name, score in found.items() if score.values is not None}
    if units is None or not means:
        return found
    totals, counts = zip(*(unit_totals(values, units) for values in means.values()), strict=True)
    of_metrics = bootstrap_intervals(totals, counts[0], seed=seed)
    return found | {
        name: replace(found[name], interval=one, units=units) for name, one in zip(means, of_metrics, strict=True)
    }


def _class_map_scores(scores: ScoreMatrix, labels: Ragged, intervals: bool, seed: int) -> Scores:
    """The metrics of each class's ranking of the photos, by scores [classes, photos]; of `map` with its interval."""
    num_classes, num_photos = scores.shape
    of_classes = members(labels, num_classes)
    present = of_classes.lengths > 0
    if not present.any():
        raise ValueError("class protocol: no item has a class. Give items with labels.")
    ranks = relevant_ranks(scores, of_classes, seed=seed)
    ranks = Ragged(np.unique(ranks.offsets), ranks.values)  # without the empty rows
    found = _scores_of("classes", ranks, np.flatnonzero(present), num_photos, False, seed)
    if intervals and num_classes * num_photos <= _MOST_ORDERED:
        found["map"] = replace(found["map"], interval=map_interval(*class_orders(scores, labels, seed), seed=seed))
    return found


def class_orders(scores: ScoreMatrix, labels: Ragged, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The photo at each rank of each class that has photos, and whether it is relevant, [classes, photos] each.

    `scores` are [classes, photos].
    """
    num_classes, num_photos = scores.shape
    of_classes = members(labels, num_classes)
    present = of_classes.lengths > 0
    order = top_k(scores, num_photos, seed=seed)[present]
    is_relevant = np.zeros((num_classes, num_photos), bool)
    is_relevant[of_classes.owners, of_classes.values] = True
    return order, np.take_along_axis(is_relevant[present], order, axis=1)


def others_of_classes(labels: Ragged) -> Ragged:
    """The other photos that share a class with each photo."""
    of_classes, rows = members(labels, int(labels.values.max(initial=-1)) + 1), []
    for photo, classes in enumerate(labels):
        is_other = np.zeros(len(labels), bool)
        is_other[of_classes.take(classes).values] = True
        is_other[photo] = False
        rows.append(np.flatnonzero(is_other))
    return Ragged.from_rows(rows)


def _label_scores(
    ranking: Ranking,
    scores: ScoreMatrix,
    labels: Ragged,
    intervals: bool,
    seed: int,
    bias: np.ndarray | None = None,
) -> Scores:
    """The metrics of each photo's ranking of the classes, by scores [classes, photos] minus the bias of each class.

    The rank is that of the first of a photo's own classes; one more than there are classes for a photo without.
    """
    num_classes, num_photos = scores.shape
    num_own = np.array([len(np.unique(of_photo)) for of_photo in labels])
    first = np.empty(num_photos, np.int64)
    for start, below in _class_orders(scores, seed, bias):
        own = np.array([of[labels[photo]].min(initial=np.inf) for photo, of in enumerate(below, start)])
        first[start : start + len(below)] = 1 + (below < own[:, None]).sum(axis=1)
    ranks, photos = Ragged(np.arange(num_photos + 1), first), np.arange(num_photos)
    return _scores_of(ranking, ranks, photos, num_classes, intervals, seed, num_relevant=num_own)


def nearest_classes(scores: ScoreMatrix, seed: int, bias: np.ndarray | None = None) -> np.ndarray:
    """The class that scores [classes, photos] highest with each photo, int64 [photos]: whose right answers top1 counts.

    `seed`, of the breaking of ties, and `bias`, of the classes, are those of the scores.
    """
    return np.concatenate([below.argmin(axis=1) for _, below in _class_orders(scores, seed, bias)])


def _class_orders(scores: ScoreMatrix, seed: int, bias: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
    """Block by block, the first photo, and numbers [photos, classes] of which the smaller is the better.

    Ties are broken for each photo separately: where all scores tie, photos differ in their nearest class.
    """
    generator = np.random.default_rng(seed)
    num_classes, num_photos = scores.shape
    block = max(1, _SCORES_AT_ONCE // num_classes)
    for start in range(0, num_photos, block):
        photos = slice(start, min(start + block, num_photos))
        of_photos = np.asarray(scores[slice(0, num_classes), photos], np.float64).T
        if bias is not None:
            of_photos = of_photos - bias
        below = np.floor((of_photos.max(axis=1, keepdims=True) - of_photos) / ROUNDING) * num_classes
        below += generator.permuted(np.tile(np.arange(num_classes), (len(of_photos), 1)), axis=1)
        yield start, below
