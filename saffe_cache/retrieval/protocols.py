"""What is searched with what. Pure numpy, over unit vectors.

`caption` (M2): each caption searches the photo that it describes, and each photo its captions. One photo
is relevant to a caption, so mAP = MRR; the field reports R@k and the median rank.

`class` (M1): each class's text searches the photos of that class; true mean average precision over
classes, over the whole ranking and over its first k, and the top-1 accuracy that the SAFFE release calls
mAP (M5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from saffe_cache.features import Ragged
from saffe_cache.retrieval.index import build_index
from saffe_cache.retrieval.metrics import (
    average_precision,
    bootstrap_interval,
    chance_average_precision,
    chance_first_rank,
    first_relevant_rank,
    recall_at_k,
)

RECALL_KS = (1, 5, 10)
MAP_K = 100


@dataclass(frozen=True)
class Score:
    """One metric of one system."""

    value: float
    chance: float
    interval: tuple[float, float] | None = None
    """95 % by bootstrap over photos."""


Scores = dict[str, Score]


def caption_scores(photos: np.ndarray, captions: np.ndarray, owners: np.ndarray, *, intervals: bool = True) -> Scores:
    """Both directions of caption retrieval.

    Args:
        photos: [n, d]; the gallery.
        captions: [m, d]; the queries.
        owners: int [m], which photo each caption describes; each photo owns at least one.
    """
    scores: Scores = {}
    ranks = _first_ranks(photos, captions, lambda found, start: found == owners[start : start + len(found), None])
    one = np.ones(1, np.int64)
    scores |= _rank_scores("", ranks, owners, len(photos), len(photos), one, intervals)
    ranks = _first_ranks(
        captions, photos, lambda found, start: owners[found] == np.arange(start, start + len(found))[:, None]
    )
    relevant = np.bincount(owners, minlength=len(photos))
    photo_indices = np.arange(len(photos))
    return scores | _rank_scores("image_to_text_", ranks, photo_indices, len(photos), len(captions), relevant, intervals)


def _first_ranks(gallery: np.ndarray, queries: np.ndarray, is_relevant: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """Rank of the first relevant gallery item of each query."""
    index = build_index(gallery, tuple(map(str, range(len(gallery)))))
    ranks, start = [], 0
    for found in index.rank(queries):
        ranks.append(first_relevant_rank(is_relevant(found, start)))
        start += len(found)
    return np.concatenate(ranks)


def _rank_scores(
    prefix: str, ranks: np.ndarray, units: np.ndarray, num_units: int, num_gallery: int, relevant: np.ndarray, intervals: bool
) -> Scores:
    """R@k, MRR and median rank; `relevant` lists the numbers of relevant items that queries have."""
    kinds, weights = np.unique(relevant, return_counts=True)
    chances = [chance_first_rank(num_gallery, int(kind)) for kind in kinds]
    first = np.average(chances, axis=0, weights=weights)
    counts = np.bincount(units, minlength=num_units)

    def score(values: np.ndarray, chance: float) -> Score:
        totals = np.bincount(units, weights=values, minlength=num_units)
        interval = bootstrap_interval(totals, counts) if intervals else None
        return Score(float(values.mean()), chance, interval)

    scores = {f"{prefix}recall_at_{k}": score(recall_at_k(ranks, k), float(first[:k].sum())) for k in RECALL_KS}
    scores[f"{prefix}mrr"] = score(1 / ranks, float((first / np.arange(1, num_gallery + 1)).sum()))
    median = float(np.searchsorted(np.cumsum(first), 0.5) + 1)
    return scores | {f"{prefix}median_rank": Score(float(np.median(ranks)), median)}


def class_scores(photos: np.ndarray, classes: np.ndarray, labels: Ragged, *, intervals: bool = True) -> Scores:
    """Class names search photos. Classes without a photo are left out.

    Args:
        photos: [n, d]; the gallery.
        classes: [c, d]; the queries.
        labels: the classes of each photo.
    """
    relevance = np.zeros((len(classes), len(photos)), bool)
    for photo, of_photo in enumerate(labels):
        relevance[of_photo, photo] = True
    present = np.flatnonzero(relevance.any(axis=1))
    index = build_index(photos, tuple(map(str, range(len(photos)))))
    order = np.concatenate(list(index.rank(classes[present])))
    ranked = np.take_along_axis(relevance[present], order, axis=1)
    num_relevant = relevance[present].sum(axis=1)
    hits = relevance[(photos @ classes.T).argmax(axis=1), np.arange(len(photos))]
    depth = min(MAP_K, len(photos))
    chance = float(np.mean([chance_average_precision(len(photos), int(r)) for r in num_relevant]))
    prevalence = float(relevance.sum() / relevance.size)
    return {
        "map": Score(
            float(average_precision(ranked, num_relevant).mean()),
            chance,
            _map_interval(order, relevance[present]) if intervals else None,
        ),
        f"map_at_{depth}": Score(
            float(average_precision(ranked[:, :depth], np.minimum(num_relevant, depth)).mean()),
            _chance_at_depth(len(photos), num_relevant, depth),
        ),
        "top1": Score(
            float(hits.mean()), prevalence, bootstrap_interval(hits * 1.0, np.ones(len(hits))) if intervals else None
        ),
    }


def _chance_at_depth(num_gallery: int, num_relevant: np.ndarray, depth: int) -> float:
    """Expected AP over the first ranks of a random order, divided by min(R, depth)."""
    ranks = np.arange(1, depth + 1)
    values = []
    for relevant in num_relevant:
        precision = (1 + (ranks - 1) * (relevant - 1) / max(num_gallery - 1, 1)) / ranks
        values.append((precision * relevant / num_gallery).sum() / min(relevant, depth))
    return float(np.mean(values))


def _map_interval(order: np.ndarray, relevance: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of mAP over resampled photos. A photo that is drawn twice stands twice in the ranking."""
    generator = np.random.default_rng(seed)
    resamples = int(np.clip(2e8 / order.size, 200, 1000))
    num_photos = order.shape[1]
    values = []
    for _ in range(resamples):
        times = np.bincount(generator.integers(num_photos, size=num_photos), minlength=num_photos)
        ranked = np.stack([np.repeat(row[found], times[found]) for row, found in zip(relevance, order, strict=True)])
        relevant = ranked.sum(axis=1)
        values.append(average_precision(ranked[relevant > 0], relevant[relevant > 0]).mean())
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)

