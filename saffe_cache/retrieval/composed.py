"""Scores of composed queries: a photo and a text search photos, of which several may be relevant. Pure numpy.

As the benchmarks do: CIRR ranks all photos but the query's reference, FashionIQ and CIRCO rank the reference too, and
each query of FashionIQ searches the photos of its own category. CIRR's subsets are small galleries of single queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from saffe_cache.core.items import Ragged
from saffe_cache.retrieval.metrics import RandomOrder, Ranking, metrics_of
from saffe_cache.retrieval.ranking import ROUNDING, InnerProducts, ScoreMatrix, relevant_ranks
from saffe_cache.retrieval.scores import Score, Scores, with_intervals

ScorePart = Callable[[np.ndarray, np.ndarray], ScoreMatrix]
"""Scores of some queries with some photos, both by position."""


@dataclass(frozen=True)
class ComposedSearch:
    """What each query searches, and what it should find; photos are positions in the gallery."""

    references: np.ndarray
    """int64 [queries]"""
    relevant: Ragged
    """At least one photo each, and never the reference."""
    members: Ragged
    """Photos of each query's own small gallery; none where it has none."""
    groups: np.ndarray
    """int64 [queries]: the class whose photos it searches; -1 for all photos."""
    labels: Ragged
    """Classes of each photo of the gallery."""
    removes_reference: bool = True

    def __len__(self) -> int:
        return len(self.references)

    def searched(self) -> Iterator[_Searched]:
        """Queries that search the same photos, together."""
        num_photos = len(self.labels)
        for group in np.unique(self.groups):
            queries, photos = np.flatnonzero(self.groups == group), np.arange(num_photos)
            if group >= 0:
                photos = np.unique(self.labels.owners[self.labels.values == group])
            places = np.full(num_photos, -1)
            places[photos] = np.arange(len(photos))
            references = places[self.references[queries]]
            has_reference = (references >= 0) & self.removes_reference
            if has_reference.any():
                yield _Searched(queries[has_reference], photos, places, references[has_reference])
            if not has_reference.all():
                yield _Searched(queries[~has_reference], photos, places, None)

    def without_ranked(self, values: np.ndarray, queries: np.ndarray, floor: float = -10.0) -> np.ndarray:
        """Scores [chosen queries, photos], where what a query does not rank is below all that it does."""
        kept = np.full_like(values, floor)
        row_of = np.full(len(self), -1)
        row_of[queries] = np.arange(len(queries))
        for part in self.searched():
            rows = row_of[part.queries]
            chosen = rows[rows >= 0]
            kept[np.ix_(chosen, part.photos)] = values[np.ix_(chosen, part.photos)]
            if part.references is not None:
                kept[chosen, part.photos[part.references[rows >= 0]]] = floor
        return kept


class _Searched(NamedTuple):
    """Queries that search the same photos."""

    queries: np.ndarray
    photos: np.ndarray
    """Ascending."""
    places: np.ndarray
    """int64 [gallery]: the place of each photo among these, -1 of another."""
    references: np.ndarray | None
    """The place of each query's reference, which is not ranked; None where all photos are."""


def composed_scores(scores: ScorePart, of: ComposedSearch, *, intervals: bool = True, seed: int = 0) -> Scores:
    """map, map_at_k and recall_at_k of all queries; with groups also means over groups, with members those of subsets.

    `map_at_k` divides by min(relevant, k), as CIRCO does; `recall_at_k` is the share of queries with a relevant photo
    among the first k. `group_mean_recall` is the mean of recall_at_10 and recall_at_50, each the mean over groups
    (FashionIQ). `subset_recall_at_k` ranks the members of a query's subset without its reference (CIRR), over the
    queries that have relevant members. Intervals resample the reference photos.
    """
    parts = [
        (part.queries, _ranks(scores, of, part, seed), len(part.photos) - (part.references is not None))
        for part in of.searched()
    ]
    found = _joined("composed", parts, of.references, intervals, seed)
    if (of.groups >= 0).any():
        grouped = _joined("grouped", parts, of.references, False, seed)
        weights = _group_weights(of.groups)
        values = {name: score.of_queries * weights for name, score in grouped.items()}
        chances = _group_chances(parts, of.groups)
        means = {name: Score(float(own.mean()), chances[name], None, own) for name, own in values.items()}
        units = of.references if intervals else None
        found |= {f"group_mean_{name}": one for name, one in with_intervals(means, units, seed).items()}
    if len(of.members.values):
        found |= _subset_scores(scores, of, intervals, seed)
    return found


_Part = tuple[np.ndarray, Ragged, int]
"""Queries, the ranks of their relevant photos, and the number of photos that are ranked."""


def _ranks(scores: ScorePart, of: ComposedSearch, part: _Searched, seed: int) -> Ragged:
    relevant = of.relevant.take(part.queries)
    mapped = Ragged(relevant.offsets, part.places[relevant.values])
    return relevant_ranks(scores(part.queries, part.photos), mapped, exclude=part.references, seed=seed)


def _joined(ranking: Ranking, parts: list[_Part], units: np.ndarray, intervals: bool, seed: int) -> Scores:
    """The metrics of all parts together: values in the order of the queries, and the mean of their chances."""
    found, num_queries = {}, sum(len(queries) for queries, *_ in parts)
    for name, metric in metrics_of(ranking).items():
        values, chance = np.zeros(num_queries), 0.0
        for queries, ranks, num_photos in parts:
            values[queries] = metric.values(ranks)
            chance += len(queries) / num_queries * metric.chance(RandomOrder(num_photos, ranks.lengths))
        found[name] = Score(float(values.mean()), chance, None, values)
    return with_intervals(found, units if intervals else None, seed)


def _group_weights(groups: np.ndarray) -> np.ndarray:
    """Weights of queries whose mean of weighted values is the mean over groups."""
    _, places, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return np.asarray(len(groups) / len(counts) / counts[places])


def _group_chances(parts: list[_Part], groups: np.ndarray) -> dict[str, float]:
    weights = _group_weights(groups) / len(groups)
    return {
        name: sum(
            float(weights[queries].sum()) * metric.chance(RandomOrder(num_photos, ranks.lengths))
            for queries, ranks, num_photos in parts
        )
        for name, metric in metrics_of("grouped").items()
    }


def _subset_scores(scores: ScorePart, of: ComposedSearch, intervals: bool, seed: int) -> Scores:
    is_other = of.members.values != of.references[of.members.owners]
    owners, photos = of.members.owners[is_other], of.members.values[is_other]
    num_photos = len(of.labels)
    is_relevant = np.isin(owners * num_photos + photos, of.relevant.owners * num_photos + of.relevant.values)
    whole = scores(np.arange(len(of)), np.arange(num_photos))
    values = whole.of_pairs(owners, photos) if isinstance(whole, InnerProducts) else np.asarray(whole)[owners, photos]
    ties = np.random.default_rng(seed).permutation(num_photos)[photos]
    order = np.lexsort((ties, -np.rint(values / ROUNDING), owners))
    sizes = np.bincount(owners, minlength=len(of))
    ranks = np.empty(len(owners), np.int64)
    ranks[order] = 1 + np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    counts = np.bincount(owners[is_relevant], minlength=len(of))
    queries = np.flatnonzero(counts)
    if not len(queries):
        return {}
    chosen = order[is_relevant[order]]
    rows = Ragged(np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]), ranks[chosen]).take(queries)
    place = np.full(len(of), -1)
    place[queries] = np.arange(len(queries))
    parts = [
        (place[these], rows.take(place[these]), int(size))
        for size in np.unique(sizes[queries])
        for these in [queries[sizes[queries] == size]]
    ]
    found = _joined("subset", parts, of.references[queries], intervals, seed)
    return {f"subset_{name}": replace(score, units=None) for name, score in found.items()}
