"""The ranks of relevant items, without storing whole rankings. Pure numpy.

Rankings are orders of integers, so that they are the same on every machine and for every block size. Items are ordered
by their score in multiples of `ROUNDING`; ties by their place in one random order of the gallery, which is drawn from
the seed and independent of relevance. (With a collapsed model all scores tie, and an order of the data would show a
pattern.)

Inner products are exact. Coordinates are rounded to multiples of 2^-26; a product of two unit vectors is
then a sum of multiples of 2^-52 that never exceeds 2, and float64 holds each of those without rounding, in
whatever order BLAS adds. So equal vectors have equal scores in every block. The rounding changes a score by about 1e-8,
a tenth of the error of float32 products.

Items above a relevant one are counted block by block, so that a gallery may be a memory-mapped file that is larger
than memory. Where a query has few relevant items, float32 products count, at half the cost: they are within
`InnerProducts.error` of the exact scores, so that they decide about all items but those whose score is that close to
the relevant one's. Those few are scored again, exactly. The ranks are the same.

Processes that torchrun started divide the blocks. Their counts are added, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from saffe_cache.core.items import Ragged
from saffe_cache.core.ranks import from_all, own_part

ROUNDING = 1e-6
"""Scores that round to the same multiple of it are equal: float32 leaves noise of about 1e-7."""

BLOCK = 4096
"""Gallery items at a time."""
_QUERIES = 128
"""Queries at a time: 4 MB of scores with a full block of items, and as much for each of their four forms."""
_MOST_TARGETS = 8
"""Relevant items of a query up to which float32 products count: each costs two comparisons of every score."""
_CROWDED = 64
"""A block is scored exactly if one of this many of its items is too close to a relevant one."""
_SPARSE = 16
"""If at most one of this many scores reaches a bound, only those are compared with each one's bounds."""
_LONG = 8
"""Ranks divide a search for at most one of this many items; merging longer lists would cost as much."""
_LANES = 128
"""Words of eight truth values that are added at a time: byte by byte, which holds 255."""
_PAIRS_AT_ONCE = 4096
_SCALE = 2.0**26
_LAST = np.iinfo(np.int64).max


class InnerProducts:
    """The scores of vectors, computed exactly, block by block, on reading."""

    def __init__(self, gallery: np.ndarray, queries: np.ndarray, bias: np.ndarray | None = None) -> None:
        """The gallery [n, d], of unit length, may be memory-mapped; of the queries [m, d] only the directions count.

        `bias` float32 [n], from -2 to 2, is subtracted from all scores of each item.

        Raises:
            ValueError: a query is not finite or of another width, or a bias is out of range; on reading, a gallery
                vector that is not finite or not of unit length.
        """
        require_queries(queries, gallery.shape[1], "gallery")
        require_biases(bias, gallery.shape[0])
        self.shape = (len(queries), gallery.shape[0])
        self._gallery, self._queries, self._bias = gallery, queries, bias
        self._items: slice | None = None
        self._vectors = np.zeros((0, gallery.shape[1]))
        self._columns: dict[type, np.ndarray] = {}
        self._is_one = False

    @property
    def error(self) -> float:
        """The most by which `approximate` differs from the exact scores.

        A product of d float32 numbers, added in any order, is within d u / (1 - d u) of the sum of their magnitudes,
        u = 2^-24, which unit vectors bound by 1 (here 1.001: see `require_unit_length`). Both factors are rounded to
        float32 before. Subtracting a bias of at most 2 rounds once more. Source: Higham, Accuracy and Stability of
        Numerical Algorithms, sec. 3.1.
        """
        of_bias = 0 if self._bias is None else 4
        return float(1.02 * (self._gallery.shape[1] + 4 + of_bias) * 2.0**-24 + 1e-9)

    def __getitem__(self, block: tuple[slice | np.ndarray, slice]) -> np.ndarray:
        """Float64 scores of some queries with some gallery items."""
        rows, items = block
        scores: np.ndarray = self._rounded_queries(rows) @ self._columns_of(items, np.float64)
        scores *= _SCALE**-2
        return scores if self._bias is None else scores - self._bias[items]

    def approximate(self, rows: np.ndarray, items: slice) -> np.ndarray:
        """The same, float32."""
        queries = (self._rounded_queries(rows) / _SCALE).astype(np.float32)
        scores = np.asarray(queries @ self._columns_of(items, np.float32))
        if self._bias is not None:
            scores -= self._bias[items]
        return scores

    def of_pairs(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Float64 scores of each query with one gallery item, both by position."""
        scores = np.empty(len(rows))
        for start in range(0, len(rows), _PAIRS_AT_ONCE):
            these = slice(start, start + _PAIRS_AT_ONCE)
            vectors = np.rint(np.asarray(self._gallery[items[these]], np.float64) * _SCALE)
            scores[these] = np.einsum("ij,ij->i", self._rounded_queries(rows[these]), vectors)
        scores *= _SCALE**-2
        return scores if self._bias is None else scores - self._bias[items]

    def is_one_item(self, items: slice) -> bool:
        """Whether all vectors of a block of the gallery are equal, and their biases."""
        self._load(items)
        return self._is_one

    def is_one_query(self, rows: np.ndarray) -> bool:
        """Whether all of some queries are equal."""
        return bool((self._queries[rows] == self._queries[rows[0]]).all())

    def _rounded_queries(self, rows: slice | np.ndarray) -> np.ndarray:
        """Directions of queries in multiples of 2^-26, float64 [rows, d]."""
        queries = np.asarray(self._queries[rows], np.float64)
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        return np.asarray(np.rint(queries / np.where(lengths > 0, lengths, 1) * _SCALE))

    def _columns_of(self, items: slice, kind: type) -> np.ndarray:
        """Rounded vectors of a block of the gallery, [d, items]: in multiples of 2^-26, or as float32."""
        self._load(items)
        if kind not in self._columns:
            rounded = np.rint(self._vectors * _SCALE)
            self._columns[kind] = (rounded if kind is np.float64 else (rounded / _SCALE).astype(kind)).T
        return self._columns[kind]

    def _load(self, items: slice) -> None:
        if items != self._items:
            self._items, self._columns = None, {}
            self._vectors = np.asarray(self._gallery[items], np.float64)
            require_unit_length(self._vectors, "gallery", lambda row: f"row {(items.start or 0) + row}")
            self._items, self._is_one = items, bool((self._vectors == self._vectors[:1]).all())
            if self._bias is not None:
                self._is_one &= bool((self._bias[items] == self._bias[items][:1]).all())


ScoreMatrix = np.ndarray | InnerProducts
"""Scores of all pairs, [queries, items]; a block of them is read by queries and a slice of items."""


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


def require_biases(bias: np.ndarray | None, num_items: int) -> None:
    """Raise ValueError if there is not one bias for each item, float32 and from -2 to 2."""
    if bias is None:
        return
    if bias.shape != (num_items,) or bias.dtype != np.float32:
        found = f"biases: {bias.dtype} of shape {bias.shape}"
        raise ValueError(f"{found}, expected float32 of shape ({num_items},). Give one for each item.")
    if not (np.abs(bias) <= 2).all():
        raise ValueError("biases: one is not finite or not from -2 to 2. Use a smaller strength of the correction.")


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
        scores: [queries, items], the higher the better, in any unit in which `ROUNDING` is nothing; read once.
        relevant: items of each query, in any order; may be none. One that is named twice counts once.
        exclude: int [queries], an item of each query that is not ranked: the query itself.
        seed: of the order of ties.
        block: items at a time; the ranks do not depend on it.

    Returns:
        From 1, ascending, int64; as many for each query as it has distinct relevant items.

    Raises:
        ValueError: a score is not finite or too large for the rounding, or an item is named that cannot be.
    """
    relevant = _distinct(relevant, exclude, scores.shape)
    count = _Count(scores, relevant, exclude, np.argsort(np.random.default_rng(seed).permutation(scores.shape[1])))
    order = np.argsort(relevant.lengths, kind="stable")  # those with few relevant items together
    for rows, items in _tiles(scores.shape, block):
        count.add(order[rows], items)
    return Ragged(relevant.offsets, 1 + np.sum(from_all(count.above), axis=0))


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
    is_divided = k * _LONG <= num_items
    for rows, items in _tiles(scores.shape, block, is_divided=is_divided):
        both = np.concatenate([best[rows], _keys(scores[rows, items], places[items], num_items)], axis=1)
        both.partition(k - 1, axis=1)
        best[rows] = both[:, :k]
    if is_divided:
        best = np.concatenate(from_all(best), axis=1)
    best.sort(axis=1)
    return np.asarray(order[best[:, :k] % num_items])


def members(labels: Ragged, num_classes: int) -> Ragged:
    """The photos of each class, ascending, each once, from the classes of each photo; ValueError if one is none."""
    if len(labels.values) and not 0 <= labels.values.min() <= labels.values.max() < num_classes:
        raise ValueError(f"labels: {labels.values.min()} to {labels.values.max()}, expected 0 to {num_classes - 1}.")
    classes, photos = np.divmod(_distinct_values(labels.values * len(labels) + labels.owners), max(1, len(labels)))
    return Ragged(np.searchsorted(classes, np.arange(num_classes + 1)), photos)


def _tiles(shape: tuple[int, ...], block: int, *, is_divided: bool = True) -> Iterator[tuple[slice, slice]]:
    """Queries and items of each block, divided among ranks; the items change last, so that each is read once."""
    num_queries, num_items = shape
    row_starts = range(0, num_queries, _QUERIES)
    numbers = range(-(-num_items // block) * len(row_starts))
    for number in own_part(numbers) if is_divided else numbers:
        item, query = number // len(row_starts) * block, number % len(row_starts) * _QUERIES
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


class _Count:
    """How many items are above each relevant one, tile by tile."""

    def __init__(self, scores: ScoreMatrix, relevant: Ragged, exclude: np.ndarray | None, places: np.ndarray) -> None:
        """`relevant` of each query are distinct; `places` int64 [items] break ties."""
        self._scores, self._offsets, self._exclude, self._places = scores, relevant.offsets, exclude, places
        queries, items = relevant.owners, relevant.values
        of_pairs = scores.of_pairs(queries, items) if isinstance(scores, InnerProducts) else scores[queries, items]
        keys = _keys(of_pairs, places[items], len(places))
        order = np.lexsort((keys, queries))
        self._keys, self._targets = keys[order], items[order]
        """Of the relevant items, best first."""
        self.above = np.zeros(len(keys), np.int64)
        self._mask, self._width = np.zeros((_QUERIES, 0), bool), 0

    def add(self, rows: np.ndarray, items: slice) -> None:
        """Count the items of a block for some queries."""
        scores, lengths = self._scores, self._offsets[rows + 1] - self._offsets[rows]
        if not isinstance(scores, InnerProducts):
            self._add_exactly(rows, items)
        elif scores.is_one_item(items):
            self._add_one_item(rows, items)
        elif self._exclude is None and scores.is_one_query(rows):
            self._add_one_query(rows, items)
        elif lengths.max() <= _MOST_TARGETS:
            self._add_quickly(scores, rows, lengths, items)
        else:
            self._add_exactly(rows, items)

    def _add_exactly(self, rows: np.ndarray, items: slice) -> None:
        of_block = _keys(self._scores[rows, items], self._places[items], len(self._places))
        if self._exclude is not None:
            inside, columns = self._excluded(rows, items)
            of_block[inside, columns] = _LAST
        of_block.sort(axis=1)
        for query, of_query in zip(rows, of_block, strict=True):
            own = slice(*self._offsets[query : query + 2])
            self.above[own] += np.searchsorted(of_query, self._keys[own])

    def _add_one_item(self, rows: np.ndarray, items: slice) -> None:
        """Where all items have one score, their places alone distinguish them."""
        pairs, owner = self._pairs(rows)
        first = np.full(len(rows), items.start)
        assert isinstance(self._scores, InnerProducts)
        levels = _keys(self._scores.of_pairs(rows, first), np.zeros(len(rows), np.int64), len(self._places))[owner]
        places = np.sort(self._places[items])
        self.above[pairs] += np.searchsorted(places, np.clip(self._keys[pairs] - levels, 0, len(self._places)))
        if self._exclude is not None:
            inside, columns = self._excluded(rows, items)
            keys = np.full(len(rows), _LAST)
            keys[inside] = self._places[items.start + columns]
            self.above[pairs] -= keys[owner] < self._keys[pairs] - levels

    def _add_one_query(self, rows: np.ndarray, items: slice) -> None:
        """Equal queries have one ranking."""
        pairs, _ = self._pairs(rows)
        of_block = _keys(self._scores[rows[:1], items], self._places[items], len(self._places))[0]
        self.above[pairs] += np.searchsorted(np.sort(of_block), self._keys[pairs])

    def _add_quickly(self, scores: InnerProducts, rows: np.ndarray, lengths: np.ndarray, items: slice) -> None:
        """By float32 products; what these leave open is scored exactly."""
        approximate = scores.approximate(rows, items)
        if self._exclude is not None:
            inside, columns = self._excluded(rows, items)
            approximate[inside, columns] = -np.inf
        slots = [self._slot(rows, lengths, slot, scores.error) for slot in range(lengths.max(initial=0))]
        numbers = self._numbers(approximate, slots)
        near = np.array([reached - above for above, reached in numbers])
        crowded = near.max(axis=0, initial=0) * _CROWDED > approximate.shape[1] + _CROWDED
        for slot, (above, _), close in zip(slots, numbers, near, strict=True):
            quick = slot.has & ~crowded
            self.above[slot.pairs[quick]] += above[quick]
            is_own = (self._targets[slot.pairs] >= items.start) & (self._targets[slot.pairs] < items.stop)
            open_rows = np.flatnonzero(quick & (close > is_own))
            self._add_near(scores, approximate, rows, open_rows, slot, items)
        if crowded.any():
            self._add_exactly(rows[crowded], items)

    def _add_near(
        self,
        scores: InnerProducts,
        approximate: np.ndarray,
        rows: np.ndarray,
        open_rows: np.ndarray,
        slot: _Slot,
        items: slice,
    ) -> None:
        """Score the items exactly that float32 products cannot distinguish from a relevant one."""
        of_rows = approximate[open_rows]
        found, columns = np.nonzero((of_rows >= slot.lower[open_rows]) & (of_rows <= slot.upper[open_rows]))
        of_pairs = scores.of_pairs(rows[open_rows[found]], items.start + columns)
        pairs, keys = slot.pairs[open_rows], _keys(of_pairs, self._places[items.start + columns], len(self._places))
        self.above[pairs] += np.bincount(found[keys < self._keys[pairs[found]]], minlength=len(open_rows))

    def _slot(self, rows: np.ndarray, lengths: np.ndarray, slot: int, error: float) -> _Slot:
        """The relevant items of that number, and the scores between which others may be equal to them."""
        has = slot < lengths
        pairs = np.where(has, self._offsets[rows] + slot, 0)
        levels = -(self._keys[pairs] // len(self._places))
        bounds = (
            np.nextafter(((levels + side) * ROUNDING + np.sign(side) * error).astype(np.float32), np.float32(way))
            for side, way in ((-0.5, -np.inf), (0.5, np.inf))
        )
        lower, upper = (np.where(has, bound, np.float32(np.inf))[:, None] for bound in bounds)
        return _Slot(pairs, has, lower, upper)

    def _numbers(self, scores: np.ndarray, slots: list[_Slot]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each slot, how many scores of a query are above its upper bound, and how many reach its lower one."""
        if not slots:
            return []
        count, width = scores.shape
        lowest = np.minimum.reduce([slot.lower for slot in slots])
        reached = self._number(np.greater_equal, scores, lowest)
        if reached.sum() * _SPARSE > scores.size:
            return [
                (self._number(np.greater, scores, slot.upper), self._number(np.greater_equal, scores, slot.lower))
                for slot in slots
            ]
        places = np.flatnonzero(self._mask[:count, :width])
        values, owner = scores.ravel()[places], np.repeat(np.arange(count), reached)
        return [
            (
                np.bincount(owner[values > slot.upper[owner, 0]], minlength=count),
                np.bincount(owner[values >= slot.lower[owner, 0]], minlength=count),
            )
            for slot in slots
        ]

    def _number(self, compare: np.ufunc, scores: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """In how many of its scores a query exceeds its bound, int64 [queries]."""
        count, width = scores.shape
        padded = -(-width // (8 * _LANES)) * 8 * _LANES
        if self._width != width:
            self._mask, self._width = np.zeros((_QUERIES, padded), bool), width
        compare(scores, bounds, out=self._mask[:count, :width])
        words = self._mask[:count].view(np.uint64).reshape(count, -1, _LANES).sum(axis=2)
        return np.asarray(words.view(np.uint8).reshape(count, -1).sum(axis=1, dtype=np.int64))

    def _pairs(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The relevant items of some queries, and the position of each one's query in `rows`."""
        lengths = self._offsets[rows + 1] - self._offsets[rows]
        owner = np.repeat(np.arange(len(rows)), lengths)
        before = np.cumsum(lengths) - lengths
        return np.arange(len(owner)) + (self._offsets[rows] - before)[owner], owner

    def _excluded(self, rows: np.ndarray, items: slice) -> tuple[np.ndarray, np.ndarray]:
        """Queries, by position, whose excluded item is in the block, and its position there."""
        assert self._exclude is not None
        excluded = self._exclude[rows]
        inside = np.flatnonzero((excluded >= items.start) & (excluded < items.stop))
        return inside, excluded[inside] - items.start


class _Slot(NamedTuple):
    """One relevant item of each of some queries."""

    pairs: np.ndarray
    """Its number; 0 of a query that has no more."""
    has: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    """float32 [queries, 1]: a float32 product above `upper` is surely above it, one below `lower` surely is not."""


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
