"""Items by id, and the distinct photos, texts, sounds and videos that they are paired with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from saffe_cache.core.features import Modality
from saffe_cache.core.texts import Coded, Texts, take_values


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

    def __len__(self) -> int:
        return len(self.content_hash)


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

    def __len__(self) -> int:
        return len(self.ids)

    def name_of(self, modality: Modality, row: int) -> str:
        """The first item that has an input, for messages; its row where no item has it."""
        owners = np.flatnonzero(self.rows[modality] == row) if modality in self.rows else np.zeros(0, np.int64)
        return self.ids[int(owners[0])] if len(owners) else f"row {row}"

    def in_split(self, split: str) -> np.ndarray:
        """Indices of the items of a split, in order; ValueError if there are none."""
        found = np.flatnonzero(self.splits.are(split))
        if not len(found):
            raise ValueError(
                f"split {split!r} has no items; the cache has {', '.join(self.splits.counts())}. Choose one."
            )
        return found
