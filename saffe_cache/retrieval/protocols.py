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
from functools import partial

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
ROUNDING = 1e-6
"""Inner products of unit vectors that differ by less are equal: float32 leaves about 1e-7."""


@dataclass(frozen=True)
class Score:
    """One metric of one system."""

    value: float
    chance: float
    """Expected where the gallery is in a random order. (Photo to caption, shuffled photos find less among the
    first k than that: captions of one photo are alike and come together.)"""
    interval: tuple[float, float] | None = None
    """95 % by bootstrap over photos."""


Scores = dict[str, Score]


Interval = Callable[[np.ndarray, np.ndarray], tuple[float, float]]
"""From the totals and the numbers of queries of all photos."""


def caption_scores(
    photos: np.ndarray, captions: np.ndarray, owners: np.ndarray, *, intervals: bool = True, seed: int = 0
) -> Scores:
    """Both directions of caption retrieval.

    Args:
        photos: [n, d]; the gallery.
        captions: [m, d]; the queries.
        owners: int [m], which photo each caption describes; each photo owns at least one.
        intervals: whether to compute them.
        seed: of the order of ties and of the bootstrap.
    """
    interval = partial(bootstrap_interval, seed=seed) if intervals else None
    indices = np.arange(len(photos))
    to_photo = _first_ranks(photos, captions, lambda photo, caption: photo == owners[caption], seed)
    to_caption = _first_ranks(captions, photos, lambda caption, photo: owners[caption] == photo, seed)
    one = np.ones(1, np.int64)
    per_photo = np.bincount(owners, minlength=len(photos))
    return {
        **_rank_scores("", to_photo, owners, len(photos), one, interval),
        **_rank_scores("image_to_text_", to_caption, indices, len(captions), per_photo, interval),
    }


def _first_ranks(
    gallery: np.ndarray, queries: np.ndarray, is_relevant: Callable[[np.ndarray, np.ndarray], np.ndarray], seed: int
) -> np.ndarray:
    """Rank of the first relevant gallery item of each query; `is_relevant` takes gallery items and queries."""
    index = build_index(gallery, tuple(map(str, range(len(gallery)))), seed)
    ranks, start = [], 0
    for found in index.rank(queries):
        ranks.append(first_relevant_rank(is_relevant(found, np.arange(start, start + len(found))[:, None])))
        start += len(found)
    return np.concatenate(ranks)


def _rank_scores(
    prefix: str,
    ranks: np.ndarray,
    units: np.ndarray,
    num_gallery: int,
    num_relevant: np.ndarray,
    interval: Interval | None,
) -> Scores:
    """R@k, MRR and median rank.

    Args:
        prefix: of the metrics' names.
        ranks: of each query's first relevant item.
        units: the photo of each query.
        num_gallery: size of the gallery.
        num_relevant: numbers of relevant items that queries have, each as often as it occurs.
        interval: None for none.
    """
    kinds, weights = np.unique(num_relevant, return_counts=True)
    first = np.average([chance_first_rank(num_gallery, int(kind)) for kind in kinds], axis=0, weights=weights)

    def score(values: np.ndarray, chance: float) -> Score:
        found = interval(np.bincount(units, weights=values), np.bincount(units)) if interval else None
        return Score(float(values.mean()), chance, found)

    scores = {f"{prefix}recall_at_{k}": score(recall_at_k(ranks, k), float(first[:k].sum())) for k in RECALL_KS}
    scores[f"{prefix}mrr"] = score(1 / ranks, float((first / np.arange(1, num_gallery + 1)).sum()))
    median = float(np.searchsorted(np.cumsum(first), 0.5 - 1e-9) + 1)  # despite rounding
    return scores | {f"{prefix}median_rank": Score(float(np.median(ranks)), median)}


def class_scores(
    photos: np.ndarray, classes: np.ndarray, labels: Ragged, *, intervals: bool = True, seed: int = 0
) -> Scores:
    """Class names search photos. Classes without a photo are no queries; top1 has them as wrong answers.

    Args:
        photos: [n, d]; the gallery.
        classes: [c, d]; the queries.
        labels: the classes of each photo.
        intervals: whether to compute them.
        seed: of the order of ties and of the bootstrap.

    Raises:
        ValueError: no photo has a class.
    """
    relevance = np.zeros((len(classes), len(photos)), bool)
    for photo, of_photo in enumerate(labels):
        relevance[of_photo, photo] = True
    present = relevance.any(axis=1)
    if not present.any():
        raise ValueError("class protocol: no photo has a class. Give photos with labels.")
    index = build_index(photos, tuple(map(str, range(len(photos)))), seed)
    order = np.concatenate(list(index.rank(classes[present])))
    ranked = np.take_along_axis(relevance[present], order, axis=1)
    num_relevant = ranked.sum(axis=1)
    depth = min(MAP_K, len(photos))
    at_depth = average_precision(ranked[:, :depth], np.minimum(num_relevant, depth))
    chance = float(np.mean([chance_average_precision(len(photos), int(r)) for r in num_relevant]))
    return {
        "map": Score(
            float(average_precision(ranked, num_relevant).mean()),
            chance,
            _map_interval(order, ranked, seed) if intervals else None,
        ),
        f"map_at_{MAP_K}": Score(float(at_depth.mean()), _chance_at_depth(len(photos), num_relevant, depth)),
        "top1": _top1(photos, classes, relevance, intervals, seed),
    }


def _top1(photos: np.ndarray, classes: np.ndarray, relevance: np.ndarray, intervals: bool, seed: int) -> Score:
    """How many photos have the class that is nearest to them. Chance is that of a class drawn at random."""
    hits = relevance[_nearest(photos, classes, seed), np.arange(len(photos))].astype(np.float64)
    interval = bootstrap_interval(hits, np.ones(len(hits)), seed=seed) if intervals else None
    return Score(float(hits.mean()), float(relevance.mean()), interval)


def _nearest(photos: np.ndarray, classes: np.ndarray, seed: int) -> np.ndarray:
    """The class nearest to each photo, int64 [n]; of several as near, any."""
    generator = np.random.default_rng(seed)
    scores = photos @ classes.T
    nearest: np.ndarray = scores.argmax(axis=1)
    is_best = scores >= scores.max(axis=1, keepdims=True) - ROUNDING
    for photo in np.flatnonzero(is_best.sum(axis=1) > 1):
        nearest[photo] = generator.choice(np.flatnonzero(is_best[photo]))
    return nearest


def _chance_at_depth(num_gallery: int, num_relevant: np.ndarray, depth: int) -> float:
    """Expected AP over the first ranks of a random order, divided by min(R, depth)."""
    ranks = np.arange(1, depth + 1)
    values = []
    for relevant in num_relevant:
        precision = (1 + (ranks - 1) * (relevant - 1) / max(num_gallery - 1, 1)) / ranks
        values.append((precision * relevant / num_gallery).sum() / min(relevant, depth))
    return float(np.mean(values))


def _map_interval(order: np.ndarray, ranked: np.ndarray, seed: int) -> tuple[float, float]:
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
