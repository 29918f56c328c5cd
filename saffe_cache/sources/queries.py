"""Composed queries of a dataset: a reference photo, and a text that says what the photos sought have instead.

`queries.jsonl` beside photos has a line for each query, with names of files as `metadata.jsonl` has them. A query that
names photos that the data lack, or that cannot be read, is an item with a problem, as a photo that cannot be read is.
"""

from __future__ import annotations

import logging
import os
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saffe_cache.core.items import QueryOf
from saffe_cache.sources.files import table_rows
from saffe_cache.sources.items import MediaFile, SourceItem, as_list, texts_of

logger = logging.getLogger(__name__)

_FILE = "queries.jsonl"
_FIELDS = "reference, text or texts, and targets"


def is_list_of_queries(name: str) -> bool:
    """Whether a file of a dataset's folder lists queries."""
    return name.rpartition("/")[2].lower() == _FILE


def folder_queries(root: Path, names: Sequence[str], items: Sequence[SourceItem]) -> list[SourceItem]:
    """The queries that some files below a folder list.

    Args:
        names: of the files, relative to `root`.
        items: the photos that they may name.

    Raises:
        ValueError: a line is invalid, or two queries have the same id.
    """
    photos = _Photos(root, items) if names else None
    found = [item for name in names if photos for item in _queries_in(root, name, photos)]
    return sorted(found, key=lambda item: item.split)


class _Photos:
    """Finds items by the name of their file, or by their id."""

    def __init__(self, root: Path, items: Sequence[SourceItem]) -> None:
        self.split_of = {item.id: item.split for item in items}
        self._id_of: dict[str, str] = {}
        begin = f"{root}{os.sep}"
        for item in items:
            for one in item.media.values():
                if isinstance(one, MediaFile) and one.size is None:
                    self._id_of[one.path.removeprefix(begin).replace(os.sep, "/")] = item.id

    def find(self, folder: str, name: str) -> str:
        """The id of the item that a file in a folder calls so; the name itself if there is none."""
        plain = posixpath.normpath(folder + name.replace("\\", "/"))
        return self._id_of.get(plain) or next((one for one in (plain, name) if one in self.split_of), name)


def _queries_in(root: Path, name: str, photos: _Photos) -> Iterator[SourceItem]:
    folder = name[: name.rfind("/") + 1]
    place = folder.partition("/")
    splits, line_of = {*photos.split_of.values()}, dict[str, str]()
    for number, (where, entry) in enumerate(table_rows(root / name, _FIELDS), start=1):
        line = _Line.parsed(where, entry, number)
        reference = photos.find(folder, line.reference)
        split = place[0] if place[0] in splits else photos.split_of.get(reference, place[0] or "train")
        within = place[2] if split == place[0] else folder
        item_id = f"{split}/{within}queries/{line.name}"
        if item_id in line_of:
            raise ValueError(
                f"{where}: id {line.name!r} is that of {line_of[item_id]} too. Give each query its own id."
            )
        line_of[item_id] = where
        targets, members = (tuple(photos.find(folder, one) for one in names) for names in (line.targets, line.members))
        yield query_item(item_id, split, line.texts, QueryOf(reference, targets, members), line.labels, line.problem)


def query_item(
    item_id: str, split: str, texts: tuple[str, ...], query: QueryOf, labels: tuple[str, ...] = (), problem: str = ""
) -> SourceItem:
    """The item of a query; without targets or texts it has a problem."""
    problem = problem or ("" if texts else "empty text") or ("" if query.targets else "no targets")
    return SourceItem(
        id=item_id, split=split, media={}, captions=texts, labels=labels, problem=problem, query=query, columns=()
    )


@dataclass(frozen=True)
class _Line:
    """A line of a file of queries."""

    name: str
    """The last part of its id."""
    reference: str
    texts: tuple[str, ...]
    targets: tuple[str, ...]
    members: tuple[str, ...]
    labels: tuple[str, ...]
    problem: str

    @staticmethod
    def parsed(where: str, entry: Mapping[str, Any], number: int) -> _Line:
        """
        Raises:
            ValueError: it lacks a field, or names photos by something else than text.
        """
        texts = entry.get("texts", entry.get("text"))
        lacking = [name for name in ("reference", "targets") if name not in entry]
        if lacking or not {"text", "texts"} & entry.keys():
            raise ValueError(
                f"{where}: expected a JSON object with {_FIELDS}; its fields are {', '.join(entry) or 'none'}. Correct "
                "the line."
            )
        found, problem = texts_of(texts)
        problem = problem and "empty text"
        if any(isinstance(value, (int, float)) for value in as_list(texts)):
            found, problem = (), "a number as text"
        [reference] = _names(where, "reference", entry, only_one=True)
        group = texts_of(entry.get("group"))[0][:1]
        targets, members = (_names(where, name, entry) for name in ("targets", "members"))
        name = str(number) if entry.get("id") is None else str(entry["id"])
        return _Line(name, reference, found, targets, members, group, problem)


def _names(where: str, field: str, entry: Mapping[str, Any], *, only_one: bool = False) -> tuple[str, ...]:
    """The distinct names of photos in a field."""
    found = as_list(entry.get(field))
    if not all(isinstance(one, str) and one for one in found) or (only_one and len(found) != 1):
        expected = "the name of a photo" if only_one else "a list of names of photos"
        raise ValueError(f"{where}: {field} is {entry.get(field)!r:.80}, expected {expected}. Correct the line.")
    return tuple(dict.fromkeys(found))


def checked_queries(items: Sequence[SourceItem]) -> list[SourceItem]:
    """The items of a dataset, where queries that name items of it that do not exist, or of another split, have a
    problem. Single targets and members that do not exist are left out, counted and logged."""
    split_of = {item.id: item.split for item in items if item.query is None}
    absent: list[str] = []
    checked = [item if item.query is None else _checked(item, item.query, split_of, absent) for item in items]
    if absent:
        logger.warning(
            "%d targets and members of queries are left out: no photo of their split has the name; for instance %s.",
            *(len(absent), ", ".join(absent[:3])),
        )
    return checked


def _checked(item: SourceItem, query: QueryOf, split_of: Mapping[str, str], absent: list[str]) -> SourceItem:
    split = split_of.get(query.reference)
    targets, members = (
        tuple(name for name in names if split_of.get(name) == item.split) for names in (query.targets, query.members)
    )
    problem = item.problem
    if not problem and split is None:
        problem = f"its reference {query.reference!r} is not among the items. Add the photo, or remove the query"
    elif not problem and split != item.split:
        problem = f"its reference {query.reference!r} is in split {split}, expected {item.split}. Move one of them"
    elif not problem and not targets:
        problem = f"none of its targets is among the items of split {item.split}; for instance {query.targets[0]!r}"
    elif not problem and query.reference in targets:
        problem = f"its reference {query.reference!r} is one of its targets. Leave it out of them"
    if not problem:
        absent += [name for name in (*query.targets, *query.members) if name not in (*targets, *members)]
        return replace(item, query=QueryOf(query.reference, targets, members))
    return replace(item, problem=problem)


def usable_queries(items: Sequence[SourceItem]) -> list[SourceItem]:
    """The items, where queries whose reference or all of whose targets cannot be used have a problem."""
    problem_of = {item.id: item.problem for item in items if item.query is None}
    return [item if item.query is None or item.problem else _usable(item, item.query, problem_of) for item in items]


def _usable(item: SourceItem, query: QueryOf, problem_of: Mapping[str, str]) -> SourceItem:
    reference = problem_of.get(query.reference, "")
    targets = [problem_of[name] for name in query.targets if name in problem_of]
    if reference:
        return replace(item, problem=f"its reference {query.reference} cannot be used: {reference}")
    if targets and all(targets):
        return replace(item, problem=f"none of its {len(targets)} targets can be used: {targets[0]}")
    return item


def is_within(query: QueryOf | None, ids: Collection[str]) -> bool:
    """Whether the reference and at least one target of a query are among some items."""
    return query is not None and query.reference in ids and any(name in ids for name in query.targets)
