"""The item table on disk, and how it grows by new items.

A table is written as a whole, as a new generation `tables/N`. The root's attributes name the current one, so a reader
sees the old table or the new one. Inputs never change their rows, because encoders' arrays are indexed by them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from saffe_cache.core.features import MODALITIES, CacheError, Inputs, Item, ItemTable, Modality, Ragged
from saffe_cache.store.storage import Storage, describe_group, mark_group, read_group, write_group

_NUM_NAMED = 3


def text_hash(text: str) -> bytes:
    """SHA-256 of the text's UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class _Entry(NamedTuple):
    """An item in the table, with rows and class numbers."""

    split: str
    problem: str
    files: dict[Modality, int]
    captions: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()


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
        self._class_texts: list[tuple[int, ...]] = []
        self._class_index_of: dict[str, int] = {}
        if table is not None:
            self._take(table)

    def add(self, item: Item) -> bool:
        """Add an item, and return whether the table changes.

        An existing item is left unchanged unless it was unusable or its content has changed.
        """
        entry, known = _Entry(item.split, item.problem, {}), self._entries.get(item.id)
        if not item.problem:
            files = {name: self._row(name, content_hash) for name, content_hash in item.hashes.items()}
            captions = tuple(self._text_row(text) for text in item.captions)
            entry = _Entry(item.split, "", files, captions, tuple(self._class_index(name) for name in item.labels))
        if known is not None:
            if item.problem or entry == known:
                return False
            was_encoded = all(row not in self._replaceable.get(name, ()) for name, row in known.files.items())
            if was_encoded and not known.problem:
                names = {"files": "file", "captions": "captions", "labels": "labels", "split": "split"}
                differing = [name for part, name in names.items() if getattr(entry, part) != getattr(known, part)]
                self.changed[item.id] = " and ".join(differing)
        self._entries[item.id] = entry
        return True

    def build(self) -> ItemTable:
        """The table with all added items. Raises CacheError if the content of existing items has changed."""
        if self.changed and not self._may_change:
            named = ", ".join(f"{item_id!r} ({what})" for item_id, what in list(self.changed.items())[:_NUM_NAMED])
            more = f" and {len(self.changed) - _NUM_NAMED} more" if len(self.changed) > _NUM_NAMED else ""
            raise CacheError(
                f"{len(self.changed)} items have changed since they were extracted: {named}{more}. Use "
                "--changed reencode to encode them again, or extract the changed data into a new cache."
            )
        entries = list(self._entries.values())
        hashes = {name: np.frombuffer(b"".join(rows), np.uint8) for name, rows in self._row_of.items() if rows}
        texts = {"text": tuple(self._texts)}
        inputs = {name: Inputs(flat.reshape(-1, 32), texts.get(name)) for name, flat in hashes.items()}
        return ItemTable(
            ids=tuple(self._entries),
            splits=tuple(entry.split for entry in entries),
            rows={name: np.array([entry.files.get(name, -1) for entry in entries], np.int64) for name in _FILE_KINDS},
            captions=Ragged.from_rows([entry.captions for entry in entries]),
            labels=Ragged.from_rows([entry.labels for entry in entries]),
            class_names=tuple(self._class_index_of),
            class_texts=Ragged.from_rows(self._class_texts),
            problems=tuple(entry.problem for entry in entries),
            inputs=inputs,
        )

    def _take(self, table: ItemTable) -> None:
        for name, inputs in table.inputs.items():
            self._row_of[name] = {row.tobytes(): index for index, row in enumerate(inputs.content_hash)}
            if inputs.texts is not None:
                self._texts = list(inputs.texts)
        self._class_texts = [tuple(row.tolist()) for row in table.class_texts]
        self._class_index_of = {name: index for index, name in enumerate(table.class_names)}
        for index, item_id in enumerate(table.ids):
            files = {name: int(rows[index]) for name, rows in table.rows.items() if rows[index] >= 0}
            captions, labels = tuple(table.captions[index].tolist()), tuple(table.labels[index].tolist())
            self._entries[item_id] = _Entry(table.splits[index], table.problems[index], files, captions, labels)

    def _row(self, modality: Modality, content_hash: bytes) -> int:
        return self._row_of[modality].setdefault(content_hash, len(self._row_of[modality]))

    def _text_row(self, text: str) -> int:
        row = self._row("text", text_hash(text))
        if row == len(self._texts):
            self._texts.append(text)
        return row

    def _class_index(self, name: str) -> int:
        index, texts = self._class_index_of.get(name), self._prompted(name)
        if index is None:
            index = self._class_index_of[name] = len(self._class_texts)
            self._class_texts.append(tuple(self._text_row(text) for text in texts))
        elif (cached := [self._texts[row] for row in self._class_texts[index]]) != texts:
            raise CacheError(
                f"class {name!r}: the cache has {cached}, found {texts}. "
                "Use the cache's --class-prompt, or extract into a new cache."
            )
        return index

    def _prompted(self, name: str) -> list[str]:
        return [prompt.replace("{}", name.replace("_", " ")) for prompt in self._class_prompts]


ENCODING_TYPE = "saffe-items"
_FILE_KINDS: tuple[Modality, ...] = ("image", "audio", "video")
_TEXT_COLUMNS = ("ids", "splits", "problems", "class_names")
_RAGGED_COLUMNS = ("captions", "labels", "class_texts")


def write_table(storage: Storage, name: str, table: ItemTable) -> None:
    """Write a generation of the table to group `name`."""
    mark_group(storage, "tables")
    arrays = table_to_arrays(table)
    write_group(storage, name, describe_group(ENCODING_TYPE, arrays, {}), arrays)


def read_table(storage: Storage, name: str) -> ItemTable:
    """Read a generation of the table. Raises CacheError if a column is missing or damaged."""
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
        if modality != "video" or modality in table.inputs:  # releases before videos do not know the column
            arrays[f"rows/{modality}"] = rows
    for modality, inputs in table.inputs.items():
        arrays[f"inputs/{modality}/content_hash"] = inputs.content_hash
        if inputs.texts is not None:
            _pack_texts(arrays, f"inputs/{modality}/texts", inputs.texts)
    return arrays


def table_from_arrays(arrays: Mapping[str, np.ndarray], where: str) -> ItemTable:
    """The table of columns. Raises CacheError if one is missing, has another type, or contradicts the others."""
    try:
        columns: dict[str, Any] = {column: _unpack_texts(arrays, column) for column in _TEXT_COLUMNS}
        for column in _RAGGED_COLUMNS:
            columns[column] = _ragged(arrays, column)
        without = {"rows/video": np.full(len(columns["ids"]), -1, np.int64)}
        rows = {name: (without | dict(arrays))[f"rows/{name}"] for name in _FILE_KINDS}
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
    """Raises ValueError if columns differ in length, an entry is duplicated, or a row does not exist."""
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
    for name, end in (("captions", num_texts), ("class_texts", num_texts), ("labels", num_classes)):
        _check_range(name, getattr(table, name).values, 0, end)
    for modality, inputs in table.inputs.items():
        hashes = inputs.content_hash
        if hashes.dtype != np.uint8 or hashes.shape[1:] != (32,):
            raise ValueError(f"inputs/{modality}/content_hash is {hashes.shape} {hashes.dtype}, expected (n, 32) uint8")
        if inputs.texts is not None and len(inputs.texts) != len(hashes):
            raise ValueError(f"inputs/{modality} has {len(hashes)} hashes of {len(inputs.texts)} texts")


def _check_range(column: str, numbers: np.ndarray, least: int, end: int) -> None:
    if len(numbers) and not least <= numbers.min() <= numbers.max() < end:
        raise ValueError(f"{column} has {numbers.min()} to {numbers.max()}, expected {least} to {end - 1}")


def _ragged(arrays: Mapping[str, np.ndarray], column: str) -> Ragged:
    values = arrays[f"{column}/values"]
    is_list = values.ndim == 1 and values.dtype == np.int64
    return Ragged(_offsets(arrays, column, len(values) if is_list else -1), values)


def _offsets(arrays: Mapping[str, np.ndarray], column: str, num_values: int) -> np.ndarray:
    """A column's offsets, which ascend from 0 to the number of its values (-1 if these have another type)."""
    offsets = arrays[f"{column}/offsets"]
    ascends = offsets.ndim == 1 and offsets.dtype == np.int64 and len(offsets) and (np.diff(offsets) >= 0).all()
    if not ascends or offsets[0] != 0 or offsets[-1] != num_values:
        raise ValueError(f"{column}/offsets do not ascend from 0 to the length of their values")
    return offsets


def _pack_texts(arrays: dict[str, np.ndarray], column: str, texts: Iterable[str]) -> None:
    """Store texts as UTF-8 bytes and offsets, which every Zarr reader supports, unlike strings."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    arrays[f"{column}/offsets"] = np.concatenate([[0], np.cumsum([len(part) for part in encoded])]).astype(np.int64)
    arrays[f"{column}/utf8"] = np.frombuffer(b"".join(encoded), np.uint8)


def _unpack_texts(arrays: Mapping[str, np.ndarray], column: str) -> tuple[str, ...]:
    data = arrays[f"{column}/utf8"].tobytes()
    offsets = _offsets(arrays, column, len(data))
    return tuple(data[start:end].decode("utf-8", "surrogatepass") for start, end in pairwise(offsets))
