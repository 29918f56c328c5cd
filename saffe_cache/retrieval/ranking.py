"""The ranks of relevant items, without storing whole rankings. Pure numpy.

Rankings are orders of integers, so that they are the same on every machine and for every block size. Items are ordered
by their score in multiples of `ROUNDING`; ties by their place in one random order of the gallery, which is drawn from
the seed and independent of relevance. (With a collapsed model all scores tie, and an order of the data would show a
pattern.)

Inner products are exact. Coordinates are rounded to multiples of 2^-26; a product of two unit vectors is
then a sum of multiples of 2^-52 that never exceeds 2, and float64 holds each of those without rounding, in
whatever order BLAS adds. So equal vectors have equal scores in every block. The rounding changes a score by about 1e-8,
a tenth of the error of float32 products.

Scores are read twice, in blocks: for the scores of the relevant items, then to count the items above each. A gallery
may therefore be a memory-mapped file that is larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from saffe_cache.core.features import Ragged

ROUNDING = 1e-6
"""Scores that round to the same multiple of it are equal: float32 leaves noise of about 1e-7."""

BLOCK = 4096
"""Gallery items at a time."""
_QUERIES = 128
"""Queries at a time: 4 MB of scores with a full block of items, and as much for each of their four forms."""
_SCALE = 2.0**26
_LAST = np.iinfo(np.int64).max


class InnerProducts:
    """The scores of vectors, computed exactly, block by block, on reading."""

    def __init__(self, gallery: np.ndarray, queries: np.ndarray) -> None:
        """The gallery [n, d], of unit length, may be memory-mapped; of the queries [m, d] only the directions count.

        Raises:
            ValueError: a query is not finite or of another width; on reading, a gallery vector that is not
                finite or not of unit length.
        """
        require_queries(queries, gallery.shape[1], "gallery")
        self.shape = (len(queries), gallery.shape[0])
        self._gallery, self._queries = gallery, queries
        self._items: slice | None = None
        self._columns = np.zeros((gallery.shape[1], 0))

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        """Float64 scores of some queries with some gallery items."""
        rows, items = block
        if items != self._items:
            vectors = np.asarray(self._gallery[items], np.float64)
            require_unit_length(vectors, "gallery", lambda row: f"row {(items.start or 0) + row}")
            self._items, self._columns = items, np.asarray(np.rint(vectors * _SCALE).T)
        queries = np.asarray(self._queries[rows], np.float64)
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        scores: np.ndarray = np.rint(queries / np.where(lengths > 0, lengths, 1) * _SCALE) @ self._columns
        scores *= _SCALE**-2
        return scores


ScoreMatrix = np.ndarray | InnerProducts
"""Scores of all pairs, [queries, items]; a block of them is read by two slices."""


def require_k(k: int, num_items: int) -> None:
    """Raise ValueError if more results are requested than there are items, or none."""
    if not 1 <= k <= num_items:
        raise ValueError(f"k={k} exceeds the gallery ({num_items} items). Use 1 to {num_items}.")


def require_queries(queries: np.ndarray, width: int, searched: str) -> None:
    """Raise ValueError if queries do not have the width of what they search, or are not finite."""
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(f"queries: shape {queries.shape}, the {searched} has vectors of width {width}. Give those.")
    finite = np.isfinite(queries).all(axis=1)
    if not finite.all():
        raise ValueError(f"queries: row {int(finite.argmin())} is not finite. Leave it out, or fix the model.")


def require_unit_length(vectors: np.ndarray, where: str, name: Callable[[int], str]) -> None:
    """Raise ValueError if a vector is not finite or not of unit length; `name` says which."""
    lengths = np.linalg.norm(vectors, axis=1)
    errors = np.nan_to_num(np.abs(lengths - 1), nan=np.inf)
    if (errors > 1e-3).any():
        worst = int(errors.argmax())
        length = f"{lengths[worst]:.4g}"
        raise ValueError(f"{where}: the vector of {name(worst)} has length {length}, expected 1. Normalise it.")


def relevant_ranks(
    scores: ScoreMatrix, relevant: Ragged, *, exclude: np.ndarray | None = None, seed: int = 0, block: int = BLOCK
) -> Ragged:
    """Ranks of each query's relevant items among all items.

    Args:
        scores: [queries, items], the higher the better, in any unit in which `ROUNDING` is nothing; read twice.
        relevant: items of each query, in any order; may be none. One that is named twice counts once.
        exclude: int [queries], an item of each query that is not ranked: the query itself.
        seed: of the order of ties.
        block: items at a time; the ranks do not depend on it.

    Returns:
        From 1, ascending, int64; as many for each query as it has distinct relevant items.

    Raises:
        ValueError: a score is not finite or too large for the rounding, or an item is named that cannot be.
    """
    num_items = scores.shape[1]
    relevant = _distinct(relevant, exclude, scores.shape)
    places = np.argsort(np.random.default_rng(seed).permutation(num_items))
    keys = _relevant_keys(scores, relevant, places, block)
    above = np.zeros(len(keys), np.int64)
    for rows, items in _tiles(scores.shape, block):
        of_block = _keys(scores[rows, items], places[items], num_items)
        if exclude is not None:
            inside = np.flatnonzero((exclude[rows] >= items.start) & (exclude[rows] < items.stop))
            of_block[inside, exclude[rows][inside] - items.start] = _LAST
        of_block.sort(axis=1)
        for query, of_query in enumerate(of_block, rows.start):
            own = slice(*relevant.offsets[query : query + 2])
            above[own] += np.searchsorted(of_query, keys[own])
    return Ragged(relevant.offsets, 1 + above)


def top_k(scores: ScoreMatrix, k: int, *, seed: int = 0, block: int = BLOCK) -> np.ndarray:
    """The first k items of each query, best first, int64 [queries, k], in the order in which `relevant_ranks` counts.

    Arguments are those of `relevant_ranks`, with the same seed.

    Raises:
        ValueError: k exceeds the number of items, or a score is not finite or too large for the rounding.
    """
    num_queries, num_items = scores.shape
    require_k(k, num_items)
    order = np.random.default_rng(seed).permutation(num_items)
    places = np.argsort(order)
    best = np.full((num_queries, k), _LAST)
    for rows, items in _tiles(scores.shape, block):
        both = np.concatenate([best[rows], _keys(scores[rows, items], places[items], num_items)], axis=1)
        both.partition(k - 1, axis=1)
        best[rows] = both[:, :k]
    best.sort(axis=1)
    return np.asarray(order[best % num_items])


def members(labels: Ragged, num_classes: int) -> Ragged:
    """The photos of each class, ascending, each once, from the classes of each photo; ValueError if one is none."""
    if len(labels.values) and not 0 <= labels.values.min() <= labels.values.max() < num_classes:
        raise ValueError(f"labels: {labels.values.min()} to {labels.values.max()}, expected 0 to {num_classes - 1}.")
    classes, photos = np.divmod(_distinct_values(labels.values * len(labels) + labels.owners), max(1, len(labels)))
    return Ragged(np.searchsorted(classes, np.arange(num_classes + 1)), photos)


def _tiles(shape: tuple[int, ...], block: int) -> Iterator[tuple[slice, slice]]:
    """Queries and items of each block; the items change last, so that each is read once."""
    num_queries, num_items = shape
    for item in range(0, num_items, block):
        for query in range(0, num_queries, _QUERIES):
            yield slice(query, min(query + _QUERIES, num_queries)), slice(item, min(item + block, num_items))


def _keys(scores: np.ndarray, places: np.ndarray, num_items: int) -> np.ndarray:
    """One integer for each score and place, all distinct: the smaller, the better."""
    scores = np.asarray(scores, np.float64)
    most = float(_LAST // 2 // num_items) * ROUNDING
    if scores.size and not np.maximum(scores.max(), -scores.min()) <= most:  # also false for NaN
        raise ValueError(f"scores: one is not finite or beyond {most:.3g}. Leave it out, or scale the scores.")
    keys = scores * (-1 / ROUNDING)
    integers = np.rint(keys, out=keys).astype(np.int64)
    integers *= num_items
    integers += places
    return integers


def _relevant_keys(scores: ScoreMatrix, relevant: Ragged, places: np.ndarray, block: int) -> np.ndarray:
    """The keys of each query's relevant items, ascending."""
    queries, keys = relevant.owners, np.empty(len(relevant.values), np.int64)
    for rows, items in _tiles(scores.shape, block):
        first, last = relevant.offsets[rows.start], relevant.offsets[rows.stop]
        named = relevant.values[first:last]
        pairs = first + np.flatnonzero((named >= items.start) & (named < items.stop))
        if len(pairs):
            of_pairs = scores[rows, items][queries[pairs] - rows.start, relevant.values[pairs] - items.start]
            keys[pairs] = _keys(of_pairs, places[relevant.values[pairs]], scores.shape[1])
    for first, last in zip(relevant.offsets[:-1], relevant.offsets[1:], strict=True):
        keys[first:last].sort()
    return keys


def _distinct(relevant: Ragged, exclude: np.ndarray | None, shape: tuple[int, ...]) -> Ragged:
    """Each query's relevant items, once; refuses what the gallery does not have."""
    num_queries, num_items = shape
    if len(relevant) != num_queries or (exclude is not None and exclude.shape != (num_queries,)):
        raise ValueError(f"relevant items: {len(relevant)} rows for {num_queries} queries. Give one for each query.")
    outside = (relevant.values < 0) | (relevant.values >= num_items)
    if outside.any():
        item = int(relevant.values[outside.argmax()])
        raise ValueError(f"relevant items: item {item}, the gallery has {num_items} items. Give positions in it.")
    queries, items = np.divmod(_distinct_values(relevant.owners * num_items + relevant.values), num_items)
    if exclude is not None and (exclude[queries] == items).any():
        raise ValueError("relevant items: a query's excluded item is among them. Leave it out of both.")
    return Ragged(np.searchsorted(queries, np.arange(num_queries + 1)), items)


def _distinct_values(numbers: np.ndarray) -> np.ndarray:
    """Ascending; of numbers from 0. (np.unique hashes, which takes ten times as long for millions of pairs.)"""
    ordered = np.sort(numbers)
    return ordered[np.diff(ordered, prepend=-1) > 0]
