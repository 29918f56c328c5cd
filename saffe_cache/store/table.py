"""How an item table grows by new items.

Inputs never change their rows, because encoders' arrays are indexed by them. What the table has is looked up in its
columns, and what is added is made into columns from time to time, so that the memory holds no Python object for each
item of a large table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from saffe_cache.core.features import MODALITIES, CacheError, Modality
from saffe_cache.core.items import NO_QUERY, UNUSABLE, Inputs, Item, ItemTable, QueryRows, Ragged
from saffe_cache.core.texts import Coded, Texts, encoded
from saffe_cache.store.parts import FILE_KINDS, Part, join_inputs, merge, take_items

_NUM_NAMED = 3
_CHANGES = {
    "files": "file",
    "captions": "captions",
    "labels": "labels",
    "split": "split",
    "query": "reference, targets or members",
}
"""What of an item may have changed, as it is reported."""
_FEW = 16
"""Lookups in a column before it is sorted."""
_MOST_PENDING = 2**17
"""Items that are added before they are made into columns; an item of five captions takes about 2 kB until then."""


def text_hash(text: str) -> bytes:
    """SHA-256 of the text's UTF-8."""
    return hashlib.sha256(encoded(text)).digest()


class _Query(NamedTuple):
    """The query of an item, with numbers of items."""

    reference: int
    targets: tuple[int, ...]
    members: tuple[int, ...]


class _Entry(NamedTuple):
    """An item in the table, with rows and class numbers."""

    split: str
    problem: str
    files: dict[Modality, int]
    captions: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    query: _Query | None = None


class _Keys:
    """Where 64-bit keys stand in a column, which is sorted when that pays."""

    def __init__(self, keys: np.ndarray) -> None:
        self._keys, self._num_asked = keys, 0

    def places(self, key: int) -> list[int]:
        """All places of a key; several where different contents have equal keys."""
        one = np.int64(key)
        self._num_asked += 1
        if self._num_asked <= _FEW:
            return np.flatnonzero(self._keys == one).tolist()
        if self._num_asked == _FEW + 1:
            self._order = np.argsort(self._keys)
            self._sorted = self._keys[self._order]
        first = self._sorted.searchsorted(one)
        last = first
        while last < len(self._sorted) and self._sorted[last] == one:
            last += 1
        return self._order[first:last].tolist()  # type: ignore[no-any-return]


class _Columns:
    """A table's columns with what finds items and inputs in them. What is not asked for is not made."""

    def __init__(self, table: ItemTable) -> None:
        self.table = table
        self._ids: _Keys | None = None
        self._num_asked = self._next = 0
        self._rows: dict[Modality, _Keys] = {}

    def number(self, item_id: str) -> int:
        """The number of an item; -1 if there is none of this id."""
        data, ids = encoded(item_id), self.table.ids
        if self._next < len(ids) and ids.bytes_at(self._next) == data:  # items often come in the table's order
            self._next += 1
            return self._next - 1
        self._num_asked += 1
        if self._num_asked <= _FEW:
            found = next(iter(ids.places(item_id).tolist()), -1)
            self._next = found + 1 if found >= 0 else self._next
            return found
        if self._ids is None:
            whole = ids.utf8.data
            hashes = (hash(bytes(whole[start:end])) for start, end in pairwise(ids.offsets.tolist()))
            self._ids = _Keys(np.fromiter(hashes, np.int64, len(ids)))
        found = next((place for place in self._ids.places(hash(data)) if ids.bytes_at(place) == data), -1)
        self._next = found + 1 if found >= 0 else self._next
        return found

    def row(self, modality: Modality, content_hash: bytes) -> int:
        """The row of an input; -1 if there is none of this content."""
        if modality not in self.table.inputs:
            return -1
        hashes = self.table.inputs[modality].content_hash
        if modality not in self._rows:
            self._rows[modality] = _Keys(np.ascontiguousarray(hashes[:, :8]).view(np.int64).reshape(-1))
        places = self._rows[modality].places(int.from_bytes(content_hash[:8], "little", signed=True))
        return next((place for place in places if hashes[place].tobytes() == content_hash), -1)

    def entry(self, number: int) -> _Entry:
        """An item."""
        table = self.table
        files = {name: rows.item(number) for name, rows in table.rows.items() if rows.item(number) >= 0}
        captions, labels = tuple(table.captions[number].tolist()), tuple(table.labels[number].tolist())
        query = None
        if table.queries is not None and (reference := table.queries.references.item(number)) != NO_QUERY:
            targets, members = (tuple(of[number].tolist()) for of in (table.queries.targets, table.queries.members))
            query = _Query(reference, targets, members)
        return _Entry(table.splits[number], table.problems[number], files, captions, labels, query)

    def holds(self, number: int, item: Item, query: _Query | None) -> bool:
        """Whether an item of the table has this content."""
        table, entry = self.table, self.entry(number)
        if (entry.split, entry.problem, entry.files.keys()) != (item.split, item.problem, item.hashes.keys()):
            return False
        if entry.query != query:
            return False
        if (len(entry.captions), len(entry.labels)) != (len(item.captions), len(item.labels)):
            return False
        hashes = {name: table.inputs[name].content_hash[row].tobytes() for name, row in entry.files.items()}
        texts = table.inputs["text"].texts if entry.captions else None
        return (
            hashes == item.hashes
            and all(
                texts is not None and texts.bytes_at(row) == encoded(text)
                for row, text in zip(entry.captions, item.captions, strict=True)
            )
            and all(table.class_names[at] == name for at, name in zip(entry.labels, item.labels, strict=True))
        )


def _query_rows(queries: Sequence[_Query | None]) -> QueryRows | None:
    if not any(queries):
        return None
    return QueryRows(
        np.array([NO_QUERY if query is None else query.reference for query in queries], np.int64),
        Ragged.from_rows([() if query is None else query.targets for query in queries]),
        Ragged.from_rows([() if query is None else query.members for query in queries]),
    )


def _empty_table() -> ItemTable:
    rows = {name: np.zeros(0, np.int64) for name in FILE_KINDS}
    texts, ragged = Texts.of(()), Ragged.from_rows(())
    return ItemTable(
        ids=texts,
        splits=Coded.of(()),
        problems=texts,
        rows=rows,
        captions=ragged,
        labels=ragged,
        class_names=(),
        class_texts=ragged,
    )


class TableBuilder:
    """Adds items to a table: new inputs get the next free rows, known inputs keep theirs."""

    def __init__(
        self,
        table: ItemTable | None,
        class_prompts: Sequence[str],
        replaceable: Mapping[Modality, np.ndarray] | None = None,
        *,
        may_change: bool = False,
    ) -> None:
        """
        Args:
            replaceable: bool [inputs]: inputs that no encoder has encoded; their items may change their content.
            may_change: all items may change their content; otherwise `build` raises an error.
        """
        self.changed: dict[str, str] = {}
        """Items whose content differs from the table's, by id, with what differs."""
        self._may_change = may_change
        self._class_prompts = tuple(class_prompts)
        self._replaceable = replaceable or {}
        old = table or _empty_table()
        self._num_old, self._num_old_classes = len(old), len(old.class_names)
        self._touched: set[int] = set()
        """Numbers of items of the old table that have changed."""
        self._added: dict[Modality, list[Inputs]] = {}
        self._class_texts = [tuple(row.tolist()) for row in old.class_texts]
        self._class_index_of = {name: index for index, name in enumerate(old.class_names)}
        self._prompted: set[str] = set()
        """Classes whose texts are those of the prompts."""
        self._columns = _Columns(old)
        self._start_pending()

    def _start_pending(self) -> None:
        self._entries: dict[int, tuple[str, _Entry]] = {}
        """Added and changed items since the columns were made, by number."""
        self._number_of: dict[str, int] = {}
        self._row_of: dict[Modality, dict[bytes, int]] = {name: {} for name in MODALITIES}
        self._texts: list[str] = []
        table = self._columns.table
        self._num_inputs = {name: len(table.inputs.get(name, ())) for name in MODALITIES}

    def add(self, item: Item) -> bool:
        """Add an item, and return whether the table changes.

        An existing item is left unchanged unless it was unusable or its content has changed. A query follows its
        reference photo; targets and members that the table lacks are left out of it.

        Raises:
            ValueError: the table lacks a query's reference photo.
        """
        number, query = self._number(item.id), self._query(item)
        known = None
        if number >= 0:
            is_held = number not in self._entries
            if item.problem or (is_held and self._columns.holds(number, item, query)):
                for name in () if item.problem else item.labels:
                    self._class_index(name)
                return False
            known = self._columns.entry(number) if is_held else self._entries[number][1]
        entry = _Entry(item.split, item.problem, {}, query=query)
        if not item.problem:
            files = {name: self._row(name, content_hash) for name, content_hash in item.hashes.items()}
            captions = tuple(self._text_row(text) for text in item.captions)
            labels = tuple(self._class_index(name) for name in item.labels)
            entry = _Entry(item.split, "", files, captions, labels, query)
        if known is not None:
            if entry == known:
                return False
            self._note_change(item.id, known, entry)
        self._put(number, item.id, entry)
        return True

    def _number(self, item_id: str) -> int:
        """The number of an item; -1 if there is none of this id."""
        return self._number_of[item_id] if item_id in self._number_of else self._columns.number(item_id)

    def _query(self, item: Item) -> _Query | None:
        if item.query is None:
            return None
        if item.problem:
            return _Query(UNUSABLE, (), ())
        reference = self._number(item.query.reference)
        if reference < 0:
            raise ValueError(
                f"{item.id}: its reference {item.query.reference!r} is not in the table. Add that item before it."
            )
        targets, members = (
            tuple(number for name in names if (number := self._number(name)) >= 0)
            for names in (item.query.targets, item.query.members)
        )
        return _Query(reference, targets, members)

    def _note_change(self, item_id: str, known: _Entry, entry: _Entry) -> None:
        """Note what has changed of what an item had. Its first captions, classes or medium of a kind are no change."""
        was_encoded = not any(
            name in self._replaceable and row < len(self._replaceable[name]) and self._replaceable[name][row]
            for name, row in known.files.items()
        )
        if was_encoded and not known.problem:
            kept = entry._replace(
                files={name: row for name, row in entry.files.items() if name in known.files},
                captions=entry.captions if known.captions else (),
                labels=entry.labels if known.labels else (),
                query=known.query if self._has_grown(known.query, entry.query) else entry.query,
            )
            differing = [name for part, name in _CHANGES.items() if getattr(kept, part) != getattr(known, part)]
            if differing:
                self.changed[item_id] = " and ".join(differing)

    def _has_grown(self, known: _Query | None, query: _Query | None) -> bool:
        """Whether a query differs only by targets and members that the table did not have before."""
        if known is None or query is None:
            return False
        targets, members = (
            tuple(number for number in numbers if number < self._num_old) for numbers in (query.targets, query.members)
        )
        return known == _Query(query.reference, targets, members)

    def _put(self, number: int, item_id: str, entry: _Entry) -> None:
        if number < 0:
            number = len(self._columns.table) + len(self._number_of)
            self._number_of[item_id] = number
        elif number < self._num_old:
            self._touched.add(number)
        self._entries[number] = item_id, entry
        if len(self._entries) >= _MOST_PENDING:
            self._make_columns()

    def build(self) -> ItemTable:
        """The table with all added items. Raises CacheError if the content of existing items has changed."""
        if self.changed and not self._may_change:
            named = ", ".join(f"{item_id!r} ({what})" for item_id, what in list(self.changed.items())[:_NUM_NAMED])
            more = f" and {len(self.changed) - _NUM_NAMED} more" if len(self.changed) > _NUM_NAMED else ""
            raise CacheError(
                f"{len(self.changed)} items have changed since they were extracted: {named}{more}. Use "
                "--changed reencode to encode them again, or extract the changed data into a new cache."
            )
        self._make_columns()
        return self._columns.table

    def part(self) -> Part | None:
        """What the added items add to the table; None if nothing."""
        table = self.build()
        numbers = np.concatenate([np.array(sorted(self._touched), np.int64), np.arange(self._num_old, len(table))])
        if not len(numbers) and not self._added:
            return None
        added = replace(
            take_items(table, numbers),
            class_names=table.class_names[self._num_old_classes :],
            class_texts=table.class_texts.take(np.arange(self._num_old_classes, len(table.class_names))),
            inputs={name: join_inputs(parts) for name, parts in self._added.items()},
        )
        return Part(numbers, added)

    def _make_columns(self) -> None:
        """Make what was added since the last time into columns."""
        order = sorted(self._entries)
        ids, entries = [self._entries[number][0] for number in order], [self._entries[number][1] for number in order]
        new: dict[Modality, Inputs] = {}
        for name, rows in self._row_of.items():
            if rows:
                hashes = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 32)
                new[name] = Inputs(hashes, Texts.of(self._texts) if name == "text" else None)
                self._added.setdefault(name, []).append(new[name])
        if not entries and not new:
            return
        num_classes = len(self._columns.table.class_names)
        pending = ItemTable(
            ids=Texts.of(ids),
            splits=Coded.of(entry.split for entry in entries),
            problems=Texts.of(entry.problem for entry in entries),
            rows={name: np.array([entry.files.get(name, -1) for entry in entries], np.int64) for name in FILE_KINDS},
            captions=Ragged.from_rows([entry.captions for entry in entries]),
            labels=Ragged.from_rows([entry.labels for entry in entries]),
            class_names=tuple(self._class_index_of)[num_classes:],
            class_texts=Ragged.from_rows(self._class_texts[num_classes:]),
            inputs=new,
            queries=_query_rows([entry.query for entry in entries]),
        )
        table = self._columns.table
        self._columns = _Columns(
            merge([Part(np.arange(len(table)), table), Part(np.array(order, np.int64), pending)]).table
        )
        self._start_pending()

    def _row(self, modality: Modality, content_hash: bytes) -> int:
        rows = self._row_of[modality]
        if content_hash in rows:
            return rows[content_hash]
        row = self._columns.row(modality, content_hash)
        if row < 0:
            row = rows[content_hash] = self._num_inputs[modality] + len(rows)
        return row

    def _text_row(self, text: str) -> int:
        row = self._row("text", text_hash(text))
        if row == self._num_inputs["text"] + len(self._texts):
            self._texts.append(text)
        return row

    def _text(self, row: int) -> str:
        pending = row - self._num_inputs["text"]
        if pending >= 0:
            return self._texts[pending]
        texts = self._columns.table.inputs["text"].texts
        assert texts is not None
        return texts[row]

    def _class_index(self, name: str) -> int:
        if name in self._prompted:
            return self._class_index_of[name]
        index = self._class_index_of.get(name)
        texts = [prompt.replace("{}", name.replace("_", " ")) for prompt in self._class_prompts]
        if index is None:
            index = self._class_index_of[name] = len(self._class_texts)
            self._class_texts.append(tuple(self._text_row(text) for text in texts))
        elif (cached := [self._text(row) for row in self._class_texts[index]]) != texts:
            raise CacheError(
                f"class {name!r}: the cache has {cached}, found {texts}. "
                "Use the cache's --class-prompt, or extract into a new cache."
            )
        self._prompted.add(name)
        return index
