"""Protocols over scores of pairs, for models that look at both sides at once. Pure numpy.

Such a score is no inner product, so nothing can be indexed: it is computed for each photo with each class
(P2, N * C forward passes), or for the first k that an index found (P3). Both are re-ranking; neither is
comparable in cost with a search by vectors.
"""

from __future__ import annotations

import numpy as np

from saffe_cache.core.features import Ragged
from saffe_cache.retrieval.ranking import ROUNDING, members, queries_of, top_k
from saffe_cache.retrieval.scores import Scores, class_map_scores, label_scores, rank_scores


def candidate_scores(
    scores: np.ndarray, labels: Ragged, *, prior: np.ndarray | None = None, intervals: bool = True, seed: int = 0
) -> Scores:
    """Every class is a candidate for every photo (P2), by a score s(photo, class) of any kind.

    `top1` (M5) and `top5` are the shares of photos with one of their classes among the first 1 and 5 classes;
    `map` (M1, or M3 where photos have several classes) and `map_at_100` are over each class's ranking of the
    photos. `top5` is there where there are more than 5 classes.

    The names and definitions are those of `class_scores`, so that both fit one table. Differences of less than
    1e-6 count as ties, in which probabilities near 0 and 1 would drown: give a classifier's log-odds
    log p / (1 - p), which order photos and classes alike.

    Args:
        scores: [photos, classes], finite.
        labels: the classes of each photo.
        prior: [classes], b_c, the mean score of each class over training photos: how easily its text is
            rebuilt from any photo. It is subtracted for top1 and top5; it cannot change the order of the
            photos of one class, and with that map. None for none.
        intervals: whether to compute them; that of map is None where photos times classes exceed 2e7.
        seed: of the order of ties and of the bootstrap.

    Raises:
        ValueError: a score is not finite, the prior or the labels do not fit the scores, or no photo has a class.
    """
    num_photos, num_classes = scores.shape
    if len(labels) != num_photos:
        raise ValueError(f"candidates: scores of {num_photos} photos, labels of {len(labels)}. Give both for each.")
    prior = np.zeros(num_classes) if prior is None else prior
    if prior.shape != (num_classes,) or not np.isfinite(prior).all():
        raise ValueError(f"candidates: prior of shape {prior.shape}, expected {num_classes} finite numbers.")
    of_classes = class_map_scores(scores.T, labels, intervals, seed)
    return of_classes | label_scores("candidates", (scores - prior).T, labels, intervals, seed)


def reranked_scores(
    ranks: Ragged,
    relevant: Ragged,
    candidates: np.ndarray,
    scores: np.ndarray,
    units: np.ndarray,
    num_gallery: int,
    *,
    intervals: bool = True,
    seed: int = 0,
) -> Scores:
    """Retrieval after the first k items are put into the order of a second score (P3); metrics of `text_scores`.

    Where second scores tie, the first order stays; below k it stays anyhow. BLIP's second score is the
    matching logit plus the cosine of the first stage (Li et al., 2022): add them before.

    Args:
        ranks: of each query's relevant items at the first stage, from `relevant_ranks`.
        relevant: the gallery items that they are the ranks of; at least one for each query.
        candidates: int [queries, k], the first stage's first k items, from `top_k` with the same seed.
        scores: [queries, k], the second score of each candidate, finite.
        units: int [queries], the photo whose queries are drawn together in the bootstrap.
        num_gallery: number of items ranked at the first stage.
        intervals: whether to compute them.
        seed: of the bootstrap.

    Raises:
        ValueError: a score is not finite, candidates and ranks are not of one order, or a query has nothing relevant.
    """
    after = reranked(ranks, relevant, candidates, scores)
    return rank_scores(after, units, num_gallery, intervals=intervals, seed=seed)


def reranked(ranks: Ragged, relevant: Ragged, candidates: np.ndarray, scores: np.ndarray) -> Ragged:
    """Ranks after the first k are put into the order of a second score; what is below keeps its place.

    Where second scores tie, the first order stays.

    Args:
        ranks: of the relevant items in the first order, from `relevant_ranks`.
        relevant: the items that they are the ranks of.
        candidates: int [queries, k], the first k items of the same order, from `top_k` with the same seed.
        scores: [queries, k], the second score of each candidate.

    Returns:
        From 1, ascending, int64.

    Raises:
        ValueError: a score is not finite, or candidates and ranks are not of one order.
    """
    if scores.shape != candidates.shape or not np.isfinite(scores).all():
        raise ValueError(
            f"second scores: {scores.shape} for {candidates.shape} candidates. Give a finite one for each."
        )
    num_items = 1 + max(int(candidates.max()), int(relevant.values.max(initial=0)))
    queries = queries_of(ranks)
    is_relevant = np.isin(
        candidates + num_items * np.arange(len(candidates))[:, None],
        relevant.values + num_items * queries_of(relevant),
    )
    inside = np.flatnonzero(ranks.values <= candidates.shape[1])
    found = is_relevant[queries[inside], ranks.values[inside] - 1]
    if not found.all() or is_relevant.sum() != len(inside):
        raise ValueError("re-ranking: candidates and ranks are not of one order. Take both with the same seed.")
    order = _second_order(scores)
    moved = ranks.values.copy()
    moved[inside] = 1 + np.argsort(order, axis=1)[queries[inside], ranks.values[inside] - 1]
    return Ragged(ranks.offsets, moved[np.lexsort((moved, queries))])


def reordered(candidates: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The candidates [queries, k] in the order of their second scores, in which `reranked` counts."""
    return np.take_along_axis(candidates, _second_order(scores), axis=1)


def _second_order(scores: np.ndarray) -> np.ndarray:
    """Places in the first order, best first; where scores tie, the first order stays."""
    return np.argsort(-np.rint(scores / ROUNDING), axis=1, kind="stable")


def dealt_map(scores: np.ndarray, labels: Ragged, *, deals: int = 200, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of mAP when the class names are dealt at random to the rankings.

    The level of rankings that know nothing of which class is which. It lies above the chance of a random order where
    photos of one class lie together: a whole class then stands early or late in each ranking.

    Args:
        scores: [photos, classes].
        labels: the classes of each photo.
        deals: number of draws.
        seed: of the draws.
    """
    num_photos, num_classes = scores.shape
    of_classes = members(labels, num_classes)
    present = np.flatnonzero(np.diff(of_classes.offsets))
    sizes = np.diff(of_classes.offsets)[present]
    owners, starts = np.repeat(present, sizes), np.cumsum(sizes) - sizes
    counts = 1 + np.arange(len(owners)) - np.repeat(starts, sizes)
    ranks_of = np.empty(num_photos, np.int64)
    precision = np.empty((num_classes, len(present)))  # of each ranking, for each class that it may stand for
    for ranking in range(num_classes):
        ranks_of[top_k(scores[:, ranking][None], num_photos, seed=seed)[0]] = np.arange(1, num_photos + 1)
        ranks = ranks_of[of_classes.values]
        ranks = ranks[np.lexsort((ranks, owners))]
        precision[ranking] = np.add.reduceat(counts / ranks, starts) / sizes
    generator = np.random.default_rng(seed)
    columns = np.arange(len(present))
    drawn = [precision[generator.permutation(num_classes)[: len(present)], columns].mean() for _ in range(deals)]
    return float(np.mean(drawn)), float(np.std(drawn))
