"""The item table on disk: parts that are written once, and how they make up one table.

A part is a group `tables/N-HASH` that holds the items, classes and inputs that one growth has added, and new versions
of items that it has changed. The root lists the current parts, so that a reader sees the old table or the new one.
Inputs never change their rows, because encoders' arrays are indexed by them.

Each array of a part is an Arrow IPC file. Those of the items and classes are read when a cache is opened, those of the
inputs, which are the most bytes, when they are first asked for; none is used before it was compared with its checksum.

Caches of format version 1 hold one part, of columns as plain arrays, which is what HDF5 files hold too. It becomes a
part of version 2 when the table grows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saffe_cache.core.features import MODALITIES, CacheError, Modality, short_hash
from saffe_cache.core.items import UNUSABLE, Inputs, ItemTable, QueryRows, Ragged
from saffe_cache.core.json_schema import whole_numbers
from saffe_cache.core.texts import Coded, Texts
from saffe_cache.store.root import RootManifest, existing_root
from saffe_cache.store.storage import (
    FORMAT_VERSION,
    PlainArray,
    Storage,
    check_encoding,
    describe_group,
    mark_group,
    read_attributes,
    read_group,
    write_group,
)

ENCODING_TYPE = "saffe-items"
FILE_KINDS: tuple[Modality, ...] = ("image", "audio", "video")
_OF_PARTS = 2
"""Version of a part of Arrow files."""
_TEXT_COLUMNS = ("ids", "splits", "problems", "class_names")
_RAGGED_COLUMNS = ("captions", "labels", "class_texts")
_QUERY_RAGGED = ("targets", "members")

_TEXT, _LIST, _HASH = pa.large_binary(), pa.large_list(pa.int64()), pa.binary(32)
_SCHEMAS: dict[str, dict[str, pa.DataType]] = {
    "items": {
        "number": pa.int64(),
        "id": _TEXT,
        "split": pa.dictionary(pa.int32(), _TEXT),
        "problem": _TEXT,
        **dict.fromkeys(FILE_KINDS, pa.int64()),
        "captions": _LIST,
        "labels": _LIST,
    },
    "classes": {"name": _TEXT, "texts": _LIST},
    "text": {"content_hash": _HASH, "text": _TEXT},
    **{kind: {"content_hash": _HASH} for kind in FILE_KINDS},
}
"""Columns of each array's file."""
_QUERY_COLUMNS = {"reference": pa.int64(), "targets": _LIST, "members": _LIST}
"""Further columns of items, all of them or none."""


@dataclass(frozen=True)
class Part:
    """What a growth adds to a table."""

    numbers: np.ndarray
    """int64, ascending: the number of each of its items in the whole table. Below its length, it replaces an item."""
    table: ItemTable
    """Its items, classes and inputs; captions and labels refer to those of the whole table."""

    @property
    def num_rows(self) -> int:
        """Its items, classes and inputs together."""
        return len(self.numbers) + len(self.table.class_names) + sum(map(len, self.table.inputs.values()))


class StoredInputs(Inputs):
    """Inputs that are read when they are first asked for."""

    def __init__(self, count: int, read: Callable[[], Inputs]) -> None:
        self._count = count
        self._read: Callable[[], Inputs] | None = read
        self._inputs: Inputs | None = None

    def _whole(self) -> Inputs:
        read = self._read  # before the inputs: another thread may finish in between
        if self._inputs is None:
            assert read is not None
            self._inputs = read()
            self._read = None  # with what it holds
        return self._inputs

    @property
    def content_hash(self) -> np.ndarray:
        return self._whole().content_hash

    @property
    def texts(self) -> Texts | None:
        return self._whole().texts

    def __len__(self) -> int:
        return self._count


class _JoinedInputs(Inputs):
    """Inputs after one another; each column is made when it is first asked for."""

    def __init__(self, parts: Sequence[Inputs]) -> None:
        self.parts: list[Inputs] = [
            one for part in parts for one in (part.parts if isinstance(part, _JoinedInputs) else [part])
        ]

    @cached_property
    def content_hash(self) -> np.ndarray:
        return np.concatenate([part.content_hash for part in self.parts])

    @cached_property
    def texts(self) -> Texts | None:
        found = [texts for part in self.parts if (texts := part.texts) is not None]
        return Texts.joined(found) if found else None

    def __len__(self) -> int:
        return sum(map(len, self.parts))


def join_inputs(parts: Sequence[Inputs]) -> Inputs:
    """Inputs after one another."""
    return parts[0] if len(parts) == 1 else _JoinedInputs(parts)


def merge(parts: Sequence[Part]) -> Part:
    """Parts as one. Of an item that several have, the last one counts."""
    if len(parts) == 1:
        return parts[0]
    tables = [part.table for part in parts]
    numbers = np.concatenate([part.numbers for part in parts])
    inputs = {
        name: join_inputs([table.inputs[name] for table in tables if name in table.inputs])
        for name in MODALITIES
        if any(name in table.inputs for table in tables)
    }
    merged = ItemTable(
        ids=Texts.joined([table.ids for table in tables]),
        splits=Coded.joined([table.splits for table in tables]),
        problems=Texts.joined([table.problems for table in tables]),
        rows={name: np.concatenate([table.rows[name] for table in tables]) for name in FILE_KINDS},
        captions=Ragged.joined([table.captions for table in tables]),
        labels=Ragged.joined([table.labels for table in tables]),
        class_names=tuple(name for table in tables for name in table.class_names),
        class_texts=Ragged.joined([table.class_texts for table in tables]),
        inputs=inputs,
        queries=QueryRows.joined([table.query_rows for table in tables]) if any(of.queries for of in tables) else None,
    )
    if (np.diff(numbers) > 0).all():
        return Part(numbers, merged)
    numbers, last = np.unique(numbers[::-1], return_index=True)
    return Part(numbers, take_items(merged, len(merged) - 1 - last))


def take_items(table: ItemTable, chosen: np.ndarray) -> ItemTable:
    """The table with the chosen items only; classes and inputs stay."""
    return replace(
        table,
        ids=table.ids.take(chosen),
        splits=table.splits.take(chosen),
        problems=table.problems.take(chosen),
        rows={name: rows[chosen] for name, rows in table.rows.items()},
        captions=table.captions.take(chosen),
        labels=table.labels.take(chosen),
        queries=table.queries and table.queries.take(chosen),
    )


def read_table(storage: Storage, root: RootManifest) -> ItemTable:
    """The table that the root lists. Raises CacheError if a part of it is missing or damaged."""
    parts: list[Part] = []
    for name in root.tables:
        found = sum(len(part.numbers) for part in parts)
        starts = {kind: sum(len(part.table.inputs.get(kind, ())) for part in parts) for kind in MODALITIES}
        parts.append(_read_part(storage, name, starts))
        numbers = parts[-1].numbers
        is_new = numbers >= found
        if not np.array_equal(numbers[is_new], np.arange(found, found + is_new.sum())) or (np.diff(numbers) < 1).any():
            raise CacheError(
                f"{_where(storage, name)}: the numbers of its items do not continue those before it. {_ADVICE}"
            )
    merged = merge(parts).table
    try:
        _check_table(merged)
    except ValueError as error:
        raise CacheError(f"{_where(storage, root.tables[-1])}: {error}. {_ADVICE}") from None
    return merged


_ADVICE = "Restore it from a copy, or extract into a new cache."


def _where(storage: Storage, name: str) -> str:
    return f"{storage.root}: tables/{name}"


def check_whole(storage: Storage, root: RootManifest) -> None:
    """Read all of a table, and compare more of it than opening does.

    Raises CacheError if a part is missing or damaged, or an id stands there twice.
    """
    table = read_table(storage, root)
    for inputs in table.inputs.values():
        assert len(inputs.content_hash) == len(inputs)
    try:
        _check_distinct(table)
    except ValueError as error:
        raise CacheError(f"{_where(storage, root.tables[-1])}: {error}. {_ADVICE}") from None


def _read_part(storage: Storage, name: str, starts: Mapping[Modality, int]) -> Part:
    """A part whose inputs follow `starts` earlier ones."""
    where, group = _where(storage, name), f"tables/{name}"
    attributes = read_attributes(storage, group)
    check_encoding(attributes, ENCODING_TYPE, where, (FORMAT_VERSION, _OF_PARTS))
    if attributes["encoding-version"] == FORMAT_VERSION:
        table = table_from_arrays(read_group(storage, group, ENCODING_TYPE)[1], where)
        return Part(np.arange(len(table)), table)
    try:
        rows = {str(kind): whole_numbers({"rows": [count]}, "rows")[0] for kind, count in attributes["rows"].items()}
        files = {kind: PlainArray(storage, group, kind, attributes) for kind in _SCHEMAS if kind in rows}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheError(f"{where}: zarr.json lacks or misstates {error}. Restore it from a copy.") from None

    def columns(kind: str) -> dict[str, Any]:
        return _columns(files[kind].read(), kind, rows[kind], f"{where}/{kind}") if kind in files else _no_columns(kind)

    def read(kind: Modality) -> Inputs:
        try:
            return Inputs(*columns(kind).values())
        except CacheError:
            root = existing_root(storage)
            if name in root.tables:
                raise
            inputs = read_table(storage, root).inputs[kind]  # a writer has merged the part with others
            own = slice(starts[kind], starts[kind] + rows[kind])
            return Inputs(inputs.content_hash[own], None if inputs.texts is None else inputs.texts[own])

    items, classes = columns("items"), columns("classes")
    inputs = {kind: StoredInputs(rows[kind], partial(read, kind)) for kind in MODALITIES if kind in files}
    query_columns = [items[name] for name in _QUERY_COLUMNS if name in items]
    table = ItemTable(
        ids=items["id"],
        splits=items["split"],
        problems=items["problem"],
        rows={kind: items[kind] for kind in FILE_KINDS},
        captions=items["captions"],
        labels=items["labels"],
        class_names=tuple(classes["name"]),
        class_texts=classes["texts"],
        inputs=inputs,
        queries=QueryRows(*query_columns) if query_columns else None,
    )
    return Part(items["number"], table)


def write_part(storage: Storage, root: RootManifest, part: Part) -> tuple[str, ...]:
    """Write a part, and return the parts that the root shall list.

    Small parts at the end are merged with it, so that there are only a few of them, and a table of version 1 becomes
    part of it.
    """
    names, merged = list(root.tables), [part]
    while names:
        rows = read_attributes(storage, f"tables/{names[-1]}").get("rows", {})
        if root.version == _OF_PARTS and sum(rows.values()) > 2 * sum(one.num_rows for one in merged):
            break
        merged.insert(0, _read_part(storage, names[-1], dict.fromkeys(MODALITIES, 0)))
        names.pop()
    number = 1 + max((int(name.partition("-")[0]) for name in root.tables), default=0)
    mark_group(storage, "tables")
    part = merge(merged)
    arrays, rows = _to_files(part)
    attributes = describe_group(ENCODING_TYPE, arrays, {"encoding-version": _OF_PARTS, "rows": rows})
    name = f"{number}-{short_hash(attributes)[:8]}"
    write_group(storage, f"tables/{name}", attributes, arrays)
    return (*names, name)


def write_table(storage: Storage, table: ItemTable) -> tuple[str, ...]:
    """Write a new cache's table as one part, and return what its root shall list."""
    return write_part(storage, RootManifest((), ()), Part(np.arange(len(table)), table))


def remove_unlisted(storage: Storage, root: RootManifest) -> None:
    """Remove the parts that the root no longer lists, and those of a writer that crashed."""
    found = dict.fromkeys(name.split("/")[1] for name in storage.list("tables") if name.count("/") > 1)
    for name in found:
        if name not in root.tables:
            storage.remove_folder(f"tables/{name}")


# ---- Arrow files ----


def _to_files(part: Part) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The Arrow file and the number of rows of each array of a part that has any."""
    table = part.table
    splits = pa.DictionaryArray.from_arrays(pa.array(table.splits.codes), _from_texts(Texts.of(table.splits.names)))
    schemas = _SCHEMAS | ({} if table.queries is None else {"items": _SCHEMAS["items"] | _QUERY_COLUMNS})
    columns: dict[str, list[pa.Array]] = {
        "items": [
            pa.array(part.numbers),
            _from_texts(table.ids),
            splits,
            _from_texts(table.problems),
            *(pa.array(table.rows[kind]) for kind in FILE_KINDS),
            _from_ragged(table.captions),
            _from_ragged(table.labels),
            *_from_queries(table.queries),
        ],
        "classes": [_from_texts(Texts.of(table.class_names)), _from_ragged(table.class_texts)],
    }
    for modality, inputs in table.inputs.items():
        hashes = pa.Array.from_buffers(_HASH, len(inputs), [None, _buffer(inputs.content_hash)])
        columns[modality] = [hashes] if inputs.texts is None else [hashes, _from_texts(inputs.texts)]
    arrays: dict[str, np.ndarray] = {}
    rows: dict[str, int] = {}
    for kind, of_kind in columns.items():
        if len(of_kind[0]):
            batch = pa.record_batch(of_kind, names=list(schemas[kind]))
            sink = pa.BufferOutputStream()
            with pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            arrays[kind], rows[kind] = np.frombuffer(sink.getvalue(), np.uint8), len(batch)
    return arrays, rows


def _buffer(values: np.ndarray) -> pa.Buffer:
    return pa.py_buffer(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def _from_texts(texts: Texts) -> pa.Array:
    return pa.Array.from_buffers(_TEXT, len(texts), [None, _buffer(texts.offsets), _buffer(texts.utf8)])


def _from_queries(queries: QueryRows | None) -> list[pa.Array]:
    if queries is None:
        return []
    return [pa.array(queries.references), _from_ragged(queries.targets), _from_ragged(queries.members)]


def _from_ragged(ragged: Ragged) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(ragged.offsets), pa.array(ragged.values))


def _columns(data: np.ndarray, kind: str, num_rows: int, where: str) -> dict[str, Any]:
    """The columns of an Arrow file. Raises CacheError if it has others, or a text is not UTF-8."""
    try:
        with pa.ipc.open_file(pa.BufferReader(pa.py_buffer(data))) as file:
            found = file.read_all()
        found.validate(full=True)
        has_queries = kind == "items" and not _QUERY_COLUMNS.keys().isdisjoint(found.schema.names)
        schema = pa.schema(_SCHEMAS[kind] | (_QUERY_COLUMNS if has_queries else {}))
        columns = [found.column(name) for name in schema.names]
        types = pa.schema(zip(schema.names, (column.type for column in columns), strict=True))
        if types != schema or found.num_rows != num_rows or any(column.null_count for column in columns):
            raise ValueError(f"found {found.num_rows} rows of {types}, expected {num_rows} of {schema} without nulls")
        arrays = [column.chunk(0) if column.num_chunks == 1 else column.combine_chunks() for column in columns]
        return {name: _from_arrow(array) for name, array in zip(schema.names, arrays, strict=True)}
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CacheError(f"{where}: {reason}. {_ADVICE}") from None


def _no_columns(kind: str) -> dict[str, Any]:
    return {name: _from_arrow(pa.array([], of_type)) for name, of_type in _SCHEMAS[kind].items()}


def _from_arrow(array: pa.Array) -> Any:
    """A column, without copying it where that is possible."""
    kind = array.type
    if kind == _HASH:
        return np.frombuffer(array.buffers()[1] or b"", np.uint8).reshape(-1, 32)[array.offset :][: len(array)]
    if kind == _TEXT:
        return _texts(array)
    if kind == _LIST:
        offsets = array.offsets.to_numpy() if len(array) else np.zeros(1, np.int64)
        values = array.values.to_numpy()[offsets[0] : offsets[-1]]
        return Ragged(offsets - offsets[0] if offsets[0] else offsets, values)
    if pa.types.is_dictionary(kind):
        names = tuple(_texts(array.dictionary))
        if len(set(names)) < len(names):
            raise ValueError("split has a duplicate name")
        return Coded(array.indices.to_numpy(), names)
    return array.to_numpy()


def _texts(array: pa.Array) -> Texts:
    _, offsets, utf8 = array.buffers()
    starts = np.frombuffer(offsets or b"", np.int64)[array.offset :][: len(array) + 1]
    starts = starts if len(starts) else np.zeros(1, np.int64)
    data = np.frombuffer(utf8 or b"", np.uint8)[starts[0] : starts[-1]]
    texts = Texts(starts - starts[0] if starts[0] else starts, data)
    texts.check_decodes()
    return texts


# ---- plain columns: format version 1, and HDF5 files ----


def table_to_arrays(table: ItemTable) -> dict[str, np.ndarray]:
    """The columns by their names in version 1."""
    arrays: dict[str, np.ndarray] = {}
    for column in _TEXT_COLUMNS:
        _pack_texts(arrays, column, Texts.of(getattr(table, column)))
    for column in _RAGGED_COLUMNS:
        ragged: Ragged = getattr(table, column)
        arrays[f"{column}/offsets"], arrays[f"{column}/values"] = ragged.offsets, ragged.values
    for modality, rows in table.rows.items():
        if modality != "video" or modality in table.inputs:  # releases before videos do not know the column
            arrays[f"rows/{modality}"] = rows
    if table.queries is not None:
        arrays["queries/references"] = table.queries.references
        for column in _QUERY_RAGGED:
            ragged = getattr(table.queries, column)
            arrays[f"queries/{column}/offsets"], arrays[f"queries/{column}/values"] = ragged.offsets, ragged.values
    for modality, inputs in table.inputs.items():
        arrays[f"inputs/{modality}/content_hash"] = inputs.content_hash
        if inputs.texts is not None:
            _pack_texts(arrays, f"inputs/{modality}/texts", inputs.texts)
    return arrays


def table_from_arrays(arrays: Mapping[str, np.ndarray], where: str) -> ItemTable:
    """The table of columns. Raises CacheError if one is missing, has another type, or contradicts the others."""
    try:
        columns: dict[str, Any] = {column: _unpack_texts(arrays, column) for column in _TEXT_COLUMNS}
        columns |= {"splits": Coded.of(iter(columns["splits"])), "class_names": tuple(columns["class_names"])}
        for column in _RAGGED_COLUMNS:
            columns[column] = _ragged(arrays, column)
        without = {"rows/video": np.full(len(columns["ids"]), -1, np.int64)}
        rows = {name: (without | dict(arrays))[f"rows/{name}"] for name in FILE_KINDS}
        inputs: dict[Modality, Inputs] = {}
        for modality in MODALITIES:
            if f"inputs/{modality}/content_hash" in arrays:
                texts = _unpack_texts(arrays, f"inputs/{modality}/texts") if modality == "text" else None
                inputs[modality] = Inputs(arrays[f"inputs/{modality}/content_hash"], texts)
                _check_hashes(modality, inputs[modality])
        queries = None
        if "queries/references" in arrays:
            ragged = (_ragged(arrays, f"queries/{column}") for column in _QUERY_RAGGED)
            queries = QueryRows(arrays["queries/references"], *ragged)
        table = ItemTable(rows=rows, inputs=inputs, queries=queries, **columns)
        _check_table(table)
        _check_distinct(table)
    except KeyError as error:
        raise CacheError(f"{where} has no {error}. Restore it from a copy.") from None
    except ValueError as error:
        raise CacheError(f"{where}: {error}. {_ADVICE}") from None
    return table


def _check_hashes(modality: Modality, inputs: Inputs) -> None:
    hashes = inputs.content_hash
    if hashes.dtype != np.uint8 or hashes.shape[1:] != (32,):
        raise ValueError(f"inputs/{modality}/content_hash is {hashes.shape} {hashes.dtype}, expected (n, 32) uint8")
    if inputs.texts is not None and len(inputs.texts) != len(hashes):
        raise ValueError(f"inputs/{modality} has {len(hashes)} hashes of {len(inputs.texts)} texts")


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
    if len(set(table.class_names)) < num_classes:
        raise ValueError("class_names has a duplicate entry")
    for modality, rows in table.rows.items():
        num_inputs = len(table.inputs[modality]) if modality in table.inputs else 0
        if rows.shape != (num_items,) or rows.dtype != np.int64:
            raise ValueError(f"rows/{modality} is {rows.shape} {rows.dtype}, expected ({num_items},) int64")
        _check_range(f"rows/{modality}", rows, -1, num_inputs)
    for name, end in (("captions", num_texts), ("class_texts", num_texts), ("labels", num_classes)):
        _check_range(name, getattr(table, name).values, 0, end)
    if table.queries is not None:
        _check_queries(table.queries, num_items)


def _check_queries(queries: QueryRows, num_items: int) -> None:
    """Raises ValueError if columns of queries have another length, or an item that they name does not exist."""
    references = queries.references
    if references.shape != (num_items,) or references.dtype != np.int64:
        raise ValueError(f"reference is {references.shape} {references.dtype}, expected ({num_items},) int64")
    _check_range("reference", references, UNUSABLE, num_items)
    for name, ragged in (("targets", queries.targets), ("members", queries.members)):
        if len(ragged) != num_items:
            raise ValueError(f"{name} has {len(ragged)} items, expected {num_items}")
        _check_range(name, ragged.values, 0, num_items)


def _check_distinct(table: ItemTable) -> None:
    """Raises ValueError if an id stands there twice. It takes half of the time of opening a large cache."""
    if pc.count_distinct(_from_texts(table.ids)).as_py() < len(table):
        raise ValueError("ids has a duplicate entry")


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


def _pack_texts(arrays: dict[str, np.ndarray], column: str, texts: Texts) -> None:
    """Store texts as UTF-8 bytes and offsets, which every Zarr reader supports, unlike strings."""
    arrays[f"{column}/offsets"], arrays[f"{column}/utf8"] = texts.offsets, texts.utf8


def _unpack_texts(arrays: Mapping[str, np.ndarray], column: str) -> Texts:
    utf8 = arrays[f"{column}/utf8"]
    is_bytes = utf8.ndim == 1 and utf8.dtype == np.uint8
    texts = Texts(_offsets(arrays, column, len(utf8) if is_bytes else -1), utf8)
    texts.check_decodes()
    return texts
