"""The dataset formats, and the items of a dataset in any of them.

To add a format, write a module beside this one that defines a `Format`, and add it to `FORMATS`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from saffe_cache.sources.audio_captions import AUDIOCAPS, CLOTHO
from saffe_cache.sources.composed_sets import COMPOSED_SETS
from saffe_cache.sources.folders import FOLDERS, TABLES
from saffe_cache.sources.hashing import hash_items
from saffe_cache.sources.huggingface import HUB_DATASET, PARQUET, SAVED_DATASET, SNAPSHOT
from saffe_cache.sources.items import SPLIT_NAMES, Columns, Format, SourceItem
from saffe_cache.sources.objects import OBJECTS, described
from saffe_cache.sources.queries import checked_queries, is_within, usable_queries
from saffe_cache.sources.samples import TARS

logger = logging.getLogger(__name__)

FORMATS: tuple[Format, ...] = (
    *(OBJECTS, SAVED_DATASET, COMPOSED_SETS, AUDIOCAPS, CLOTHO, SNAPSHOT, FOLDERS, TARS, PARQUET, TABLES),
    HUB_DATASET,
)
"""The first one that recognises the data reads it, so special formats come before general ones."""


def read_items(
    data: Any,
    columns: Columns,
    splits: tuple[str, ...],
    max_items: Mapping[str, int] | None = None,
    *,
    streaming: bool = False,
    every: bool = False,
    rehash: bool = False,
) -> list[SourceItem]:
    """The items that `list_items` finds, with the hashes of their content; unreadable ones have a problem.

    Args:
        rehash: read also the files that have not changed since an earlier run.

    Raises:
        ValueError: there is no usable dataset, or a split has no items.
    """
    items = list_items(data, columns, splits, max_items, streaming=streaming, every=every)
    place = os.fspath(data) if isinstance(data, (str, os.PathLike)) else None
    return usable_queries(hash_items(items, place, described(data), rehash=rehash))


def list_items(
    data: Any,
    columns: Columns,
    splits: tuple[str, ...],
    max_items: Mapping[str, int] | None = None,
    *,
    streaming: bool = False,
    every: bool = False,
) -> list[SourceItem]:
    """The items of a dataset as they are found, without hashes: their media are not read.

    Args:
        splits: only these; empty for all.
        max_items: most items of a split.
        streaming: make no copy of the data on this machine's disk.
        every: take also a folder's photos and sounds that belong to no split.

    Raises:
        ValueError: there is no usable dataset, or a split has no items.
    """
    data = os.fspath(data) if isinstance(data, os.PathLike) else data
    found, items = _find_format(data), checked_queries(_all_items(data, columns, streaming, every))
    data = described(data)
    if not items:
        raise ValueError(f"--data {data}: found no items, expected {found.layout}.")
    existing = dict.fromkeys(item.split for item in items)
    absent = [split for split in (*splits, *(max_items or ())) if split not in existing]
    if absent:
        raise ValueError(f"--data {data}: no items in split {absent[0]}; its splits are {', '.join(existing)}.")
    _report_odd_splits([item for item in items if item.query is None], splits, data)
    chosen = [item for item in items if not splits or item.split in splits]
    _report_lacking([item for item in chosen if item.query is None])
    return _limit(chosen, max_items or {})


def read_named_items(data: str, columns: Columns, ids: Collection[str], *, streaming: bool = False) -> list[SourceItem]:
    """The items of a dataset with these ids, as `read_items` returns them; their media are read, and no others.

    Raises:
        ValueError: there is no usable dataset.
    """
    return hash_items([item for item in _all_items(data, columns, streaming) if item.id in ids], None, data)


def _find_format(data: Any) -> Format:
    for one in FORMATS:
        if one.recognises(data):
            return one
    layouts = "; or ".join(one.layout for one in FORMATS if one is not OBJECTS)
    raise ValueError(f"--data {data}: found no dataset, expected {layouts}.")


def _all_items(data: Any, columns: Columns, streaming: bool, every: bool = False) -> list[SourceItem]:
    items: dict[str, SourceItem] = {}
    found = _find_format(data)
    read = (streaming and found.stream_items) or (every and found.read_every) or found.read_items
    for item in read(data, columns):
        if item.id in items:
            raise ValueError(
                f"--data {described(data)}: two items have the id {item.id}. Choose another column with "
                "--column id=NAME."
            )
        items[item.id] = item
    return list(items.values())


def _report_odd_splits(items: Sequence[SourceItem], splits: Collection[str], data: str) -> None:
    """Warn of splits whose classes do not fit those of the train split, or are splits themselves."""
    classes: dict[str, dict[str, None]] = {}
    for item in items:
        classes.setdefault(item.split, {}).update(dict.fromkeys(item.labels))
    train = classes.get("train", {})
    for split, names in classes.items():
        if not names or (splits and split not in splits):
            continue
        if names.keys() <= SPLIT_NAMES:
            what = f"its classes {_some(names)} are usual names of splits. Perhaps --data should be {data}/{split}."
            logger.warning("split %s: %s", split, what)
        unseen = [name for name in names if name not in train]
        if unseen and train:
            what = f"{len(unseen)} of its {len(names)} classes are not in split train"
            logger.warning("split %s: %s: %s. Check its folders unless this is meant.", split, what, _some(unseen))
        if len(names) == 1 < len(train):
            what = f"its only class is {_some(names)}, and split train has {len(train)}"
            logger.warning("split %s: %s. Every ranking of its items would be perfect.", split, what)


def _report_lacking(items: Sequence[SourceItem]) -> None:
    """Warn of items without the captions or classes that others of their split have."""
    of_split: dict[str, list[SourceItem]] = {}
    for item in items:
        if not item.problem:
            of_split.setdefault(item.split, []).append(item)
    for split, found in of_split.items():
        for what, lacking in (
            ("no captions", [item.id for item in found if not item.captions]),
            ("no classes", [item.id for item in found if not item.labels]),
        ):
            if 0 < len(lacking) < len(found):
                what = f"{len(lacking)} of its {len(found)} items have {what}"
                logger.warning("split %s: %s; for instance %s.", split, what, _some(lacking))


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:5]) + (", …" if len(names) > 5 else "")


def _limit(items: Sequence[SourceItem], max_items: Mapping[str, int]) -> list[SourceItem]:
    """The items of each limited split whose hashed ids come first, in the dataset's order, and the queries on them."""
    if not max_items:
        return list(items)
    chosen = {item.id for item in items if item.split not in max_items}
    for split, count in max_items.items():
        ids = [item.id for item in items if item.split == split and item.query is None]
        chosen.update(sorted(ids, key=lambda name: hashlib.sha256(name.encode("utf-8", "replace")).digest())[:count])
    return [item for item in items if item.id in chosen or (item.split in max_items and is_within(item.query, chosen))]
