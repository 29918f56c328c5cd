"""Items by id, and the distinct photos, texts, sounds and videos that they are paired with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from saffe_cache.core.features import Modality
from saffe_cache.core.texts import Coded, Texts, take_values

NO_QUERY, UNUSABLE = -1, -2
"""References of items that are not queries, and of queries that cannot be used."""


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row i is `values[offsets[i]:offsets[i + 1]]`."""

    offsets: np.ndarray
    values: np.ndarray

    @staticmethod
    def from_rows(rows: Iterable[Sequence[int] | np.ndarray]) -> Ragged:
        """Int64 rows, in order."""
        listed = [np.zeros(0, np.int64), *(np.asarray(row, dtype=np.int64) for row in rows)]
        return Ragged(np.cumsum([len(row) for row in listed], dtype=np.int64), np.concatenate(listed))

    @property
    def lengths(self) -> np.ndarray:
        """Values of each row."""
        return np.asarray(np.diff(self.offsets))

    @property
    def owners(self) -> np.ndarray:
        """The row of each value."""
        return np.asarray(np.repeat(np.arange(len(self)), self.lengths))

    @staticmethod
    def joined(parts: Sequence[Ragged]) -> Ragged:
        """The rows of some after one another; a single one is not copied."""
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0, *(len(part.values) for part in parts)])
        offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
        values = [part.values for part in parts]
        return Ragged(
            np.concatenate([np.zeros(1, np.int64), *offsets]), np.concatenate([np.zeros(0, np.int64), *values])
        )

    def take(self, chosen: np.ndarray) -> Ragged:
        """The chosen rows, in the given order."""
        return Ragged(*take_values(self.offsets, self.values, np.asarray(chosen, np.int64)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))


@dataclass(frozen=True)
class Inputs:
    """The distinct inputs of one modality; an encoder's row i is the encoding of input i."""

    content_hash: np.ndarray
    """uint8 [n, 32]: SHA-256 of the file's bytes, or of the text's UTF-8."""
    texts: Texts | None = None
    """The texts themselves; None for photos and sounds."""
    of_media: np.ndarray | None = None
    """int64 [n, media]: where several media are joined, the input of each medium, -1 where it is missing."""

    def __len__(self) -> int:
        return len(self.content_hash)

    def shared(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """bool [rows]: which inputs are among `others`, or have a medium in common with one of them.

        A row of -1 in `others` is no input.
        """
        if self.of_media is None:
            return np.isin(rows, others)
        pairs = zip(self.of_media[rows].T, self.of_media[others[others >= 0]].T, strict=True)
        return np.asarray(np.logical_or.reduce([(own >= 0) & np.isin(own, theirs) for own, theirs in pairs]))


@dataclass(frozen=True, slots=True)
class QueryOf:
    """What makes an item a composed query: its texts change the reference photo, and the targets are what it finds."""

    reference: str
    """Id of the item with the photo."""
    targets: tuple[str, ...]
    """Ids of the items that it should find; empty where they are not known."""
    members: tuple[str, ...] = ()
    """Ids of the items of its own small gallery, such as the subsets of CIRR; empty for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One item of a dataset; its photos and sounds are identified by their content hashes."""

    id: str
    """Unique in the dataset, and the same wherever the dataset lies."""
    split: str
    hashes: Mapping[Modality, bytes] = field(default_factory=dict)
    """SHA-256 of each photo or sound."""
    captions: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    problem: str = ""
    """Why the item cannot be used; empty if it can."""
    query: QueryOf | None = None
    """For a composed query, whose captions are its texts (the first one searches) and which has no photo of its own."""


@dataclass(frozen=True)
class QueryRows:
    """Columns of the items that are composed queries; other items have empty rows."""

    references: np.ndarray
    """int64 [items]: number of the item with the reference photo; NO_QUERY for an ordinary item, UNUSABLE for a query
    with a problem."""
    targets: Ragged
    """Numbers of the items that a query should find."""
    members: Ragged
    """Numbers of the items of its own small gallery."""

    @staticmethod
    def none(count: int) -> QueryRows:
        """Those of ordinary items."""
        empty = Ragged(np.zeros(count + 1, np.int64), np.zeros(0, np.int64))
        return QueryRows(np.full(count, NO_QUERY, np.int64), empty, empty)

    @staticmethod
    def joined(parts: Sequence[QueryRows]) -> QueryRows:
        """Those of some items after one another."""
        return QueryRows(
            np.concatenate([part.references for part in parts]),
            Ragged.joined([part.targets for part in parts]),
            Ragged.joined([part.members for part in parts]),
        )

    def take(self, chosen: np.ndarray) -> QueryRows:
        """Those of the chosen items."""
        return QueryRows(self.references[chosen], self.targets.take(chosen), self.members.take(chosen))


@dataclass(frozen=True, kw_only=True)
class ItemTable:
    """Items by id, and the rows of the distinct inputs that they are paired with."""

    ids: Texts
    splits: Coded
    """The split of each item."""
    rows: Mapping[Modality, np.ndarray]
    """int64 [items] for "image", "audio" and "video": the input of each item, -1 where it has none."""
    captions: Ragged
    """Text rows of each item's captions."""
    labels: Ragged
    """Class indices of each item."""
    class_names: tuple[str, ...]
    class_texts: Ragged
    """Text rows of each class: its name in each class prompt."""
    problems: Texts
    """Why an item cannot be used; empty for a usable one."""
    inputs: Mapping[Modality, Inputs] = field(default_factory=dict)
    queries: QueryRows | None = None
    """None where no item is a composed query."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def query_rows(self) -> QueryRows:
        """Columns of composed queries, also where there are none."""
        return self.queries or QueryRows.none(len(self))

    @property
    def references(self) -> np.ndarray:
        """int64 [items]: number of the item with a query's reference photo; -1 for an ordinary item, -2 for a query
        with a problem."""
        return self.query_rows.references

    @property
    def targets(self) -> Ragged:
        """Numbers of the items that each query should find; empty for an ordinary item."""
        return self.query_rows.targets

    @property
    def members(self) -> Ragged:
        """Numbers of the items of each query's own small gallery; empty for other items."""
        return self.query_rows.members

    def name_of(self, modality: Modality, row: int) -> str:
        """The first item that has an input, for messages; its row where no item has it."""
        owners = np.flatnonzero(self.rows[modality] == row) if modality in self.rows else np.zeros(0, np.int64)
        return self.ids[int(owners[0])] if len(owners) else f"row {row}"

    def in_split(self, split: str) -> np.ndarray:
        """Indices of the ordinary items of a split, in order, without its queries; ValueError if there are none."""
        found = np.flatnonzero(self.splits.are(split) & ~self.are_queries)
        if not len(found):
            raise ValueError(
                f"split {split!r} has no items; the cache has {', '.join(self.splits.counts())}. Choose one."
            )
        return found

    def queries_in(self, split: str) -> np.ndarray:
        """Indices of the composed queries of a split without a problem, in order; there may be none."""
        return np.flatnonzero(self.splits.are(split) & (self.references >= 0))

    @property
    def are_queries(self) -> np.ndarray:
        """bool [items]: which are composed queries, also those with a problem."""
        return np.asarray(self.references != NO_QUERY)
