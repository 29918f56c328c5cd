"""The item table on disk, and how it grows by new items.

A table is written as a whole, as a new generation `tables/N`. The root's attributes name the current one, so a reader
sees the old table or the new one. Inputs never change their rows, because encoders' arrays are indexed by them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from saffe_cache.core.features import MODALITIES, CacheError, Inputs, Item, ItemTable, Modality, Ragged
from saffe_cache.store.storage import Storage, describe_group, mark_group, read_group, write_group

_NUM_NAMED = 3


def text_hash(text: str) -> bytes:
    """SHA-256 of the text's UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """An item in the table, with rows and class numbers."""

    split: str
    problem: str
    files: dict[Modality, int]
    captions: tuple[int, ...]
    labels: tuple[int, ...]


class TableBuilder:
    """Adds items to a table: new inputs get the next free rows, known inputs keep theirs."""

    def __init__(
        self,
        table: ItemTable | None,
        class_prompts: Sequence[str],
        replaceable: Mapping[Modality, Collection[int]] | None = None,
        *,
        may_change: bool = False,
    ) -> None:
        """
        Args:
            replaceable: rows of inputs that no encoder has encoded; their items may change their content.
            may_change: all items may change their content; otherwise `build` raises an error.
        """
        self.changed: dict[str, str] = {}
        """Items whose content differs from the table's, by id, with what differs."""
        self._may_change = may_change
        self._class_prompts = tuple(class_prompts)
        self._replaceable = replaceable or {}
        self._entries: dict[str, _Entry] = {}
        self._row_of: dict[Modality, dict[bytes, int]] = {name: {} for name in MODALITIES}
        self._texts: list[str] = []
        self._class_texts: dict[str, tuple[int, ...]] = {}
        self._class_index_of: dict[str, int] = {}
        if table is not None:
            self._take(table)

    def add(self, item: Item) -> bool:
        """Add an item, and return whether the table changes.

        An existing item is left unchanged unless it was unusable or its content has changed.
        """
        entry = _Entry(split=item.split, problem=item.problem, files={}, captions=(), labels=())
        if not item.problem:
            entry = replace(
                entry,
                files={name: self._row(name, content_hash) for name, content_hash in item.hashes.items()},
                captions=tuple(self._text_row(text) for text in item.captions),
                labels=tuple(self._class_index(name) for name in item.labels),
            )
        known = self._entries.get(item.id)
        if known is not None and (item.problem or entry == known):
            return False
        if known is not None and not (known.problem or self._may_be_replaced(known)):
            self.changed[item.id] = _differences(entry, known)
        self._entries[item.id] = entry
        return True

    def _may_be_replaced(self, known: _Entry) -> bool:
        """Whether no encoder has encoded the item's file: it was broken, or was not reached."""
        return any(row in self._replaceable.get(name, ()) for name, row in known.files.items())

    def build(self) -> ItemTable:
        """The table with all added items.

        Raises:
            CacheError: the content of existing items has changed.
        """
        if self.changed and not self._may_change:
            named = ", ".join(f"{item_id!r} ({what})" for item_id, what in list(self.changed.items())[:_NUM_NAMED])
            more = f" and {len(self.changed) - _NUM_NAMED} more" if len(self.changed) > _NUM_NAMED else ""
            raise CacheError(
                f"{len(self.changed)} items have changed since they were extracted: {named}{more}. Use "
                "--changed reencode to encode them again, or extract the changed data into a new cache."
            )
        entries = list(self._entries.values())
        inputs = {
            name: Inputs(
                np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32),
                tuple(self._texts) if name == "text" else None,
            )
            for name, rows in self._row_of.items()
            if rows
        }
        return ItemTable(
            ids=tuple(self._entries),
            splits=tuple(entry.split for entry in entries),
            rows={name: np.array([entry.files.get(name, -1) for entry in entries], np.int64) for name in _FILE_KINDS},
            captions=Ragged.from_rows([entry.captions for entry in entries]),
            labels=Ragged.from_rows([entry.labels for entry in entries]),
            class_names=tuple(self._class_texts),
            class_texts=Ragged.from_rows(self._class_texts.values()),
            problems=tuple(entry.problem for entry in entries),
            inputs=inputs,
        )

    def _take(self, table: ItemTable) -> None:
        for name, inputs in table.inputs.items():
            self._row_of[name] = {row.tobytes(): index for index, row in enumerate(inputs.content_hash)}
            if inputs.texts is not None:
                self._texts = list(inputs.texts)
        texts_of = (tuple(row.tolist()) for row in table.class_texts)
        self._class_texts = dict(zip(table.class_names, texts_of, strict=True))
        for index, item_id in enumerate(table.ids):
            self._entries[item_id] = _Entry(
                split=table.splits[index],
                problem=table.problems[index],
                files={name: int(rows[index]) for name, rows in table.rows.items() if rows[index] >= 0},
                captions=tuple(table.captions[index].tolist()),
                labels=tuple(table.labels[index].tolist()),
            )
        self._class_index_of = {name: index for index, name in enumerate(table.class_names)}

    def _row(self, modality: Modality, content_hash: bytes) -> int:
        return self._row_of[modality].setdefault(content_hash, len(self._row_of[modality]))

    def _text_row(self, text: str) -> int:
        row = self._row("text", text_hash(text))
        if row == len(self._texts):
            self._texts.append(text)
        return row

    def _class_index(self, name: str) -> int:
        if name not in self._class_index_of:
            self._class_index_of[name] = len(self._class_index_of)
            self._class_texts[name] = tuple(self._text_row(text) for text in self._prompted(name))
        elif (cached := [self._texts[row] for row in self._class_texts[name]]) != self._prompted(name):
            raise CacheError(
                f"class {name!r}: the cache has {cached}, found {self._prompted(name)}. "
                "Use the cache's --class-prompt, or extract into a new cache."
            )
        return self._class_index_of[name]

    def _prompted(self, name: str) -> list[str]:
        return [prompt.replace("{}", name.replace("_", " ")) for prompt in self._class_prompts]


def _differences(entry: _Entry, known: _Entry) -> str:
    names = {"files": "file", "captions": "captions", "labels": "labels", "split": "split"}
    return " and ".join(names[name] for name in names if getattr(entry, name) != getattr(known, name))


ENCODING_TYPE = "saffe-items"
_FILE_KINDS: tuple[Modality, ...] = ("image", "audio")
_TEXT_COLUMNS = ("ids", "splits", "problems", "class_names")
_RAGGED_COLUMNS = ("captions", "labels", "class_texts")


def write_table(storage: Storage, name: str, table: ItemTable) -> None:
    """Write a generation of the table to group `name`."""
    mark_group(storage, "tables")
    arrays = table_to_arrays(table)
    write_group(storage, name, describe_group(ENCODING_TYPE, arrays, {}), arrays)


def read_table(storage: Storage, name: str) -> ItemTable:
    """
    Raises:
        CacheError: a column is missing or damaged.
    """
    _, arrays = read_group(storage, name, ENCODING_TYPE)
    return table_from_arrays(arrays, f"{storage.root}: {name}")


def table_to_arrays(table: ItemTable) -> dict[str, np.ndarray]:
    """The columns by their names on disk."""
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
        CacheError: a column is missing, has another type, or contradicts the others.
    """
    try:
        columns: dict[str, Any] = {column: _unpack_texts(arrays, column) for column in _TEXT_COLUMNS}
        for column in _RAGGED_COLUMNS:
            columns[column] = _ragged(arrays, column)
        rows = {name: arrays[f"rows/{name}"] for name in _FILE_KINDS}
        inputs: dict[Modality, Inputs] = {}
        for modality in MODALITIES:
            if f"inputs/{modality}/content_hash" in arrays:
                texts = _unpack_texts(arrays, f"inputs/{modality}/texts") if modality == "text" else None
                inputs[modality] = Inputs(arrays[f"inputs/{modality}/content_hash"], texts)
        table = ItemTable(rows=rows, inputs=inputs, **columns)
        _check_table(table)
    except KeyError as error:
        raise CacheError(f"{where} has no {error}. Restore it from a copy.") from None
    except ValueError as error:
        raise CacheError(f"{where}: {error}. Restore it from a copy, or extract into a new cache.") from None
    return table


def _check_table(table: ItemTable) -> None:
    """
    Raises:
        ValueError: columns differ in length, an entry is duplicated, or a row does not exist.
    """
    num_items, num_texts = len(table.ids), len(table.inputs["text"]) if "text" in table.inputs else 0
    lengths = [len(column) for column in (table.splits, table.problems, table.captions, table.labels)]
    num_classes = len(table.class_names)
    if lengths != [num_items] * 4 or len(table.class_texts) != num_classes:
        raise ValueError(
            f"its columns have {[num_items, *lengths]} items and {len(table.class_texts)} class texts, expected "
            f"equal numbers and {num_classes}"
        )
    for name, texts in (("ids", table.ids), ("class_names", table.class_names)):
        if len(set(texts)) < len(texts):
            raise ValueError(f"{name} has a duplicate entry")
    for modality, rows in table.rows.items():
        num_inputs = len(table.inputs[modality]) if modality in table.inputs else 0
        if rows.shape != (num_items,) or rows.dtype != np.int64:
            raise ValueError(f"rows/{modality} is {rows.shape} {rows.dtype}, expected ({num_items},) int64")
        _check_range(f"rows/{modality}", rows, -1, num_inputs)
    _check_range("captions", table.captions.values, 0, num_texts)
    _check_range("class_texts", table.class_texts.values, 0, num_texts)
    _check_range("labels", table.labels.values, 0, num_classes)
    for modality, inputs in table.inputs.items():
        hashes = inputs.content_hash
        if hashes.dtype != np.uint8 or hashes.ndim != 2 or hashes.shape[1] != 32:
            raise ValueError(f"inputs/{modality}/content_hash is {hashes.shape} {hashes.dtype}, expected (n, 32) uint8")
        if inputs.texts is not None and len(inputs.texts) != len(hashes):
            raise ValueError(f"inputs/{modality} has {len(hashes)} hashes of {len(inputs.texts)} texts")


def _check_range(column: str, numbers: np.ndarray, least: int, end: int) -> None:
    if len(numbers) and not least <= numbers.min() <= numbers.max() < end:
        raise ValueError(f"{column} has {numbers.min()} to {numbers.max()}, expected {least} to {end - 1}")


def _ragged(arrays: Mapping[str, np.ndarray], column: str) -> Ragged:
    offsets, values = arrays[f"{column}/offsets"], arrays[f"{column}/values"]
    _check_offsets(column, offsets, len(values) if values.ndim == 1 and values.dtype == np.int64 else -1)
    return Ragged(offsets, values)


def _check_offsets(column: str, offsets: np.ndarray, num_values: int) -> None:
    """Check that offsets ascend from 0 to the number of values (-1 if the values have another type)."""
    ascends = offsets.ndim == 1 and offsets.dtype == np.int64 and len(offsets) and (np.diff(offsets) >= 0).all()
    if not ascends or offsets[0] != 0 or offsets[-1] != num_values:
        raise ValueError(f"{column}/offsets do not ascend from 0 to the length of their values")


def _pack_texts(arrays: dict[str, np.ndarray], column: str, texts: Iterable[str]) -> None:
    """Store texts as UTF-8 bytes and offsets, which every Zarr reader supports, unlike strings."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    arrays[f"{column}/offsets"] = np.concatenate([[0], np.cumsum([len(part) for part in encoded])]).astype(np.int64)
    arrays[f"{column}/utf8"] = np.frombuffer(b"".join(encoded), np.uint8)


def _unpack_texts(arrays: Mapping[str, np.ndarray], column: str) -> tuple[str, ...]:
    offsets, data = arrays[f"{column}/offsets"], arrays[f"{column}/utf8"].tobytes()
    _check_offsets(column, offsets, len(data))
    return tuple(data[start:end].decode("utf-8", "surrogatepass") for start, end in pairwise(offsets))
