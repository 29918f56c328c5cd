"""Composed queries, a photo and a text that search photos, over the pairs of a split, which are their gallery."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from saffe_cache.core.items import ItemTable, Ragged
from saffe_cache.core.texts import Texts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Composed:
    """Queries, one row for each; photos are positions in the pairs that they belong to."""

    ids: Texts
    references: np.ndarray
    """int64 [queries]: the photo that each query changes."""
    texts: Ragged
    """Text rows of each query, at least one: the first one searches, training draws any."""
    targets: Ragged
    """Photos that each query should find, at least one, and never its reference."""
    members: Ragged
    """Photos of the query's own small gallery; none where it has none."""
    groups: np.ndarray
    """int64 [queries]: the class whose photos alone the query searches; -1 for all photos."""

    def __len__(self) -> int:
        return len(self.references)

    @property
    def first_texts(self) -> np.ndarray:
        """int64 [queries]: the text row that searches."""
        return np.asarray(self.texts.values[self.texts.offsets[:-1]])

    def take(self, chosen: np.ndarray) -> Composed:
        """Some of the queries, in the given order."""
        return Composed(
            self.ids.take(chosen),
            self.references[chosen],
            self.texts.take(chosen),
            self.targets.take(chosen),
            self.members.take(chosen),
            self.groups[chosen],
        )

    def over(self, places: np.ndarray) -> Composed:
        """The queries that remain where photos move: int64, the new position of each, -1 for one that is left out.

        A query needs its reference and one target.
        """
        moved = replace(
            self,
            references=places[self.references],
            targets=_moved(self.targets, places),
            members=_moved(self.members, places),
        )
        return moved.take(np.flatnonzero((moved.references >= 0) & (moved.targets.lengths > 0)))

    def permuted(self, generator: np.random.Generator) -> Composed:
        """The queries with each other's targets, of the same group, to train a control on.

        Those that would search their own reference alone are left out.
        """
        order = np.arange(len(self))
        for group in np.unique(self.groups):
            members = np.flatnonzero(self.groups == group)
            order[members] = members[generator.permutation(len(members))]
        targets = self.targets.take(order)
        targets = _distinct(targets, targets.values != self.references[targets.owners])
        return replace(self, targets=targets).take(np.flatnonzero(targets.lengths))

    def first_photos(self, order: np.ndarray) -> np.ndarray:
        """Photos in an order in which few of them hold many whole queries: each query's reference and first target.

        `order`, of the photos, orders the queries by their references; photos of no query follow, in this order.
        """
        rank = np.argsort(order)
        queries = np.argsort(rank[self.references], kind="stable")
        targets = self.targets.values[self.targets.offsets[:-1]]
        photos = np.concatenate([np.stack([self.references, targets], axis=1)[queries].ravel(), order])
        _, first = np.unique(photos, return_index=True)
        return np.asarray(photos[np.sort(first)])


class ComposedDraw(NamedTuple):
    """A batch of queries: its photos, and which of them each query is about and searches for."""

    photos: np.ndarray
    """int64: positions in the pairs, ascending, each once: the references, one target of each query, and others."""
    text_rows: np.ndarray
    """int64: the distinct texts."""
    texts: np.ndarray
    """int64 [queries]: the text of each, by its place among these."""
    references: np.ndarray
    """int64 [queries]: the photo of each, by its place in the batch."""
    positives: np.ndarray
    """bool [photos, queries]"""


def draw_composed(
    of: Composed, chosen: np.ndarray, generator: np.random.Generator, least: int = 0, num_photos: int = 0
) -> ComposedDraw:
    """One text and one target of each chosen query; another target that is among the photos is a positive too.

    Where these are fewer than `least` photos, random ones of all `num_photos` join them.
    """
    queries = of.take(chosen)
    targets, rows = (
        each.values[each.offsets[:-1] + (generator.random(len(chosen)) * each.lengths).astype(np.int64)]
        for each in (queries.targets, queries.texts)
    )
    photos = np.unique(np.concatenate([queries.references, targets]))
    if len(photos) < min(least, num_photos):
        others = np.setdiff1d(np.arange(num_photos), photos, assume_unique=True)
        more = generator.choice(others, min(least, num_photos) - len(photos), replace=False)
        photos = np.union1d(photos, more)
    text_rows, texts = np.unique(rows, return_inverse=True)
    positives = np.zeros((len(photos), len(chosen)), bool)
    places = np.searchsorted(photos, queries.targets.values).clip(max=len(photos) - 1)
    is_here = photos[places] == queries.targets.values
    positives[places[is_here], queries.targets.owners[is_here]] = True
    return ComposedDraw(photos, text_rows, texts, np.searchsorted(photos, queries.references), positives)


def composed_queries(
    table: ItemTable, split: str, places: np.ndarray, labels: Ragged, usable: Callable[[np.ndarray], np.ndarray]
) -> tuple[Composed, int]:
    """The queries of a split that can be used, and how many others there are.

    Args:
        places: int64 [items]: the position of each item's photo in the pairs, -1 where it has none.
        labels: classes of each photo in the pairs.
        usable: which texts of some rows are.
    """
    items = table.queries_in(split)
    texts = table.captions.take(items)
    are_usable = np.ones(len(items), bool)
    are_usable[texts.owners[~usable(texts.values)]] = False
    are_usable &= texts.lengths > 0
    of_queries = table.labels.take(items)
    groups = np.full(len(items), -1, np.int64)
    has_group = of_queries.lengths > 0
    groups[has_group] = of_queries.values[of_queries.offsets[:-1][has_group]]
    queries = Composed(
        table.ids.take(items),
        table.references[items],
        texts,
        _found(table.targets.take(items), places, table.references[items], groups, labels),
        table.members.take(items),
        groups,
    )
    # references and members are still items, targets photos of the pairs
    queries = replace(queries, references=places[queries.references], members=_moved(queries.members, places))
    lacking = {
        "without a readable text": ~are_usable,
        "without a readable reference photo": queries.references < 0,
        "whose group no photo has": (groups >= 0) & ~np.isin(groups, labels.values),
        "that no other photo answers": queries.targets.lengths == 0,
    }
    _tell_others(lacking, queries.ids, split)
    are_usable = ~np.any([*lacking.values()], axis=0)
    num_others = int(np.count_nonzero(table.splits.are(split) & table.are_queries) - np.count_nonzero(are_usable))
    return queries.take(np.flatnonzero(are_usable)), num_others


def _tell_others(lacking: Mapping[str, np.ndarray], ids: Texts, split: str) -> None:
    """Warn of queries that are left out, each by its first reason."""
    told, parts = np.zeros(len(ids), bool), []
    for reason, are in lacking.items():
        if len(found := np.flatnonzero(are & ~told)):
            parts.append(f"{len(found)} {reason} (the first is {ids[int(found[0])]})")
            told |= are
    if parts:
        logger.warning("split %s: left out of %d composed queries: %s.", split, len(ids), "; ".join(parts))


def _found(targets: Ragged, places: np.ndarray, references: np.ndarray, groups: np.ndarray, labels: Ragged) -> Ragged:
    """The photos that queries can find: in the pairs, in the query's group, and not the reference's own."""
    photos, owners = places[targets.values], targets.owners
    is_found = (photos >= 0) & (photos != places[references][owners])
    num_classes = int(max(groups.max(initial=-1), labels.values.max(initial=-1))) + 1
    keys = np.unique(labels.owners * num_classes + labels.values)
    of_group = groups[owners]
    is_found &= (of_group < 0) | np.isin(photos * num_classes + of_group, keys)
    return _distinct(Ragged(targets.offsets, photos), is_found)


def _moved(photos: Ragged, places: np.ndarray) -> Ragged:
    moved = Ragged(photos.offsets, places[photos.values])
    return _distinct(moved, moved.values >= 0)


def _distinct(rows: Ragged, is_kept: np.ndarray) -> Ragged:
    """The values that are kept, each once in its row, in their order."""
    owners, values = rows.owners[is_kept], rows.values[is_kept]
    _, first = np.unique(owners * (values.max(initial=0) + 1) + values, return_index=True)
    first.sort()
    lengths = np.bincount(owners[first], minlength=len(rows))
    return Ragged(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]), values[first])
