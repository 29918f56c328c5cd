"""The item table on disk, and its growth by new items.

A table is written whole, as a new generation `tables/N`; the root's attributes name the current one, so
that a reader sees the old table or the new one. Rows of inputs never move: encoders' arrays are indexed
by them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saffe_cache.features import MODALITIES, CacheError, Inputs, ItemTable, Modality, Ragged
from saffe_cache.store.storage import Storage
from saffe_cache.store.zarr_files import read_group, write_group


@dataclass(frozen=True, kw_only=True)
class NewItem:
    """One item as a source hands it over; files are known by their content hash."""

    id: str
    split: str
    hashes: dict[Modality, bytes] = field(default_factory=dict)
    """SHA-256 of the item's photo or sound."""
    captions: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    problem: str = ""
    """Why the item cannot be used; empty for a usable one."""


def text_hash(text: str) -> bytes:
    """SHA-256 of the text's UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class TableBuilder:
    """Grows a table: distinct inputs get the next free row, known ones keep theirs."""

    def __init__(self, table: ItemTable | None, class_prompts: Sequence[str]) -> None:
        self._ids = list(table.ids) if table else []
        self._splits = list(table.splits) if table else []
        self._problems = list(table.problems) if table else []
        self._captions = list(table.captions) if table else []
        self._labels = list(table.labels) if table else []
        self._rows: dict[Modality, list[int]] = {
            name: list(table.rows[name]) if table else [] for name in ("image", "audio")
        }
        self._class_names = list(table.class_names) if table else []
        self._class_texts = list(table.class_texts) if table else []
        self._hashes: dict[Modality, list[bytes]] = {name: [] for name in MODALITIES}
        self._texts: list[str] = []
        for name, inputs in table.inputs.items() if table else ():
            self._hashes[name] = [row.tobytes() for row in inputs.content_hash]
            if inputs.texts is not None:
                self._texts = list(inputs.texts)
        self._row_of = {name: {h: row for row, h in enumerate(self._hashes[name])} for name in MODALITIES}
        self._position_of = {item_id: index for index, item_id in enumerate(self._ids)}
        self._class_prompts = tuple(class_prompts)

    def add(self, item: NewItem) -> bool:
        """Add an item; one that the table has already changes nothing, unless it was unusable. True if it did.

        Raises:
            CacheError: the table has the id with other content.
        """
        usable = not item.problem
        rows = {name: self._row(name, h) for name, h in item.hashes.items() if usable}
        captions = [self._text_row(text) for text in item.captions if usable]
        labels = [self._class_index(name) for name in item.labels if usable]
        index = self._position_of.setdefault(item.id, len(self._ids))
        if index == len(self._ids):
            self._ids.append(item.id)
            for column in (self._splits, self._problems, self._captions, self._labels, *self._rows.values()):
                column.append(None)  # type: ignore[arg-type]  # filled in below
        elif item.problem or not self._problems[index]:
            self._check_unchanged(index, item, rows, captions, labels)
            return False
        self._splits[index] = item.split
        self._problems[index] = item.problem
        self._captions[index] = np.array(captions, np.int64)
        self._labels[index] = np.array(labels, np.int64)
        for name, column in self._rows.items():
            column[index] = rows.get(name, -1)
        return True

    def build(self) -> ItemTable:
        inputs = {
            name: Inputs(
                np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32),
                tuple(self._texts) if name == "text" else None,
            )
            for name, hashes in self._hashes.items()
            if hashes
        }
        return ItemTable(
            ids=tuple(self._ids),
            splits=tuple(self._splits),
            rows={name: np.array(column, np.int64) for name, column in self._rows.items()},
            captions=Ragged.from_rows(self._captions),
            labels=Ragged.from_rows(self._labels),
            class_names=tuple(self._class_names),
            class_texts=Ragged.from_rows(self._class_texts),
            problems=tuple(self._problems),
            inputs=inputs,
        )

    def _row(self, modality: Modality, content_hash: bytes) -> int:
        row = self._row_of[modality].setdefault(content_hash, len(self._hashes[modality]))
        if row == len(self._hashes[modality]):
            self._hashes[modality].append(content_hash)
        return row

    def _text_row(self, text: str) -> int:
        row = self._row("text", text_hash(text))
        if row == len(self._texts):
            self._texts.append(text)
        return row

    def _class_index(self, name: str) -> int:
        if name not in self._class_names:
            self._class_names.append(name)
            texts = [self._text_row(prompt.format(name.replace("_", " "))) for prompt in self._class_prompts]
            self._class_texts.append(np.array(texts, np.int64))
        return self._class_names.index(name)

    def _check_unchanged(
        self, known: int, item: NewItem, rows: dict[Modality, int], captions: list[int], labels: list[int]
    ) -> None:
        same = (
            all(self._rows[name][known] == row for name, row in rows.items())
            and self._splits[known] == item.split
            and list(self._captions[known]) == captions
            and list(self._labels[known]) == labels
        )
        if not same and not item.problem:
            raise CacheError(
                f"item {item.id!r}: its file, captions, labels or split are not those in the cache. "
                "Extract changed data into a new cache."
            )


_TEXT_COLUMNS = ("ids", "splits", "problems", "class_names")
_RAGGED_COLUMNS = ("captions", "labels", "class_texts")


def write_table(storage: Storage, name: str, table: ItemTable) -> None:
    """Write a generation of the table as group `name`."""
    write_group(storage, name, table_to_arrays(table), {"encoding-type": "saffe-items", "encoding-version": 1})


def read_table(storage: Storage, name: str) -> ItemTable:
    """
    Raises:
        CacheError: a column is missing.
    """
    return table_from_arrays(read_group(storage, name), f"{storage.root}: {name}")


def table_to_arrays(table: ItemTable) -> dict[str, np.ndarray]:
    """The columns, by the names that they have on disk."""
    arrays: dict[str, np.ndarray] = {}
    for column in _TEXT_COLUMNS:
        _pack_texts(arrays, column, getattr(table, column))
    for column in _RAGGED_COLUMNS:
        ragged: Ragged = getattr(table, column)
        arrays[f"{column}/offsets"], arrays[f"{column}/values"] = ragged.offsets, ragged.values
    for modality, rows in table.rows.items():
        arrays[f"rows/{modality}"] = rows
    for modality, inputs in table.inputs.items():
        arrays[f"inputs/{modality}/content_hash"] = inputs.content_hash
        if inputs.texts is not None:
            _pack_texts(arrays, f"inputs/{modality}/texts", inputs.texts)
    return arrays


def table_from_arrays(arrays: Mapping[str, np.ndarray], where: str) -> ItemTable:
    """
    Raises:
        CacheError: a column is missing.
    """
    try:
        columns: dict[str, Any] = {column: _unpack_texts(arrays, column) for column in _TEXT_COLUMNS}
        for column in _RAGGED_COLUMNS:
            columns[column] = Ragged(arrays[f"{column}/offsets"], arrays[f"{column}/values"])
        rows: dict[Modality, np.ndarray] = {"image": arrays["rows/image"], "audio": arrays["rows/audio"]}
        inputs: dict[Modality, Inputs] = {}
        for modality in MODALITIES:
            if f"inputs/{modality}/content_hash" in arrays:
                texts = _unpack_texts(arrays, f"inputs/{modality}/texts") if modality == "text" else None
                inputs[modality] = Inputs(arrays[f"inputs/{modality}/content_hash"], texts)
    except KeyError as error:
        raise CacheError(f"{where} has no {error}. Restore it from a copy.") from None
    return ItemTable(rows=rows, inputs=inputs, **columns)


def _pack_texts(arrays: dict[str, np.ndarray], column: str, texts: Iterable[str]) -> None:
    """Texts as UTF-8 bytes and offsets: every Zarr reader has these types, not every one has strings."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    arrays[f"{column}/offsets"] = np.concatenate([[0], np.cumsum([len(part) for part in encoded])]).astype(np.int64)
    arrays[f"{column}/utf8"] = np.frombuffer(b"".join(encoded), np.uint8)


def _unpack_texts(arrays: Mapping[str, np.ndarray], column: str) -> tuple[str, ...]:
    offsets, data = arrays[f"{column}/offsets"], arrays[f"{column}/utf8"].tobytes()
    return tuple(
        data[start:end].decode("utf-8", "surrogatepass") for start, end in zip(offsets[:-1], offsets[1:], strict=True)
    )
