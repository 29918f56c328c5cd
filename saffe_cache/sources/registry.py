"""The dataset formats, and the items of a dataset in any of them.

To add a format, write a module beside this one that defines a `Format`, and add it to `FORMATS`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from tqdm import tqdm

from saffe_cache.sources.folders import FOLDERS
from saffe_cache.sources.huggingface import HUB_DATASET, SAVED_DATASET
from saffe_cache.sources.items import SPLIT_NAMES, Columns, Format, SourceItem, is_file_fault

logger = logging.getLogger(__name__)

FORMATS: tuple[Format, ...] = (SAVED_DATASET, FOLDERS, HUB_DATASET)
"""The first one that recognises the data reads it, so special formats come before general ones."""


def read_items(
    data: str, columns: Columns, splits: tuple[str, ...], max_items: Mapping[str, int] | None = None
) -> list[SourceItem]:
    """The items of a dataset with the hashes of their content; unreadable ones have a problem.

    Args:
        splits: only these; empty for all.
        max_items: most items of a split. Only the chosen items' media are read.

    Raises:
        ValueError: there is no usable dataset, or a split has no items.
    """
    found, items = _find_format(data), _all_items(data, columns)
    if not items:
        raise ValueError(f"--data {data}: found no items, expected {found.layout}.")
    existing = dict.fromkeys(item.split for item in items)
    absent = [split for split in (*splits, *(max_items or ())) if split not in existing]
    if absent:
        raise ValueError(f"--data {data}: no items in split {absent[0]}; its splits are {', '.join(existing)}.")
    _report_odd_splits(items, splits, data)
    return _hashed(_limit([item for item in items if not splits or item.split in splits], max_items or {}), data)


def read_named_items(data: str, columns: Columns, ids: Collection[str]) -> list[SourceItem]:
    """The items of a dataset with these ids, as `read_items` returns them; other items' media are not read.

    Raises:
        ValueError: there is no usable dataset.
    """
    return _hashed([item for item in _all_items(data, columns) if item.id in ids], data)


def _find_format(data: str) -> Format:
    for one in FORMATS:
        if one.recognises(data):
            return one
    layouts = "; or ".join(one.layout for one in FORMATS)
    raise ValueError(f"--data {data}: found no dataset, expected {layouts}.")


def _all_items(data: str, columns: Columns) -> list[SourceItem]:
    items: dict[str, SourceItem] = {}
    for item in _find_format(data).read_items(data, columns):
        if item.id in items:
            raise ValueError(
                f"--data {data}: two items have the id {item.id}. Choose another column with --column id=NAME."
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
            logger.warning("split %s: %s. Every ranking of its photos would be perfect.", split, what)


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:5]) + (", …" if len(names) > 5 else "")


def _limit(items: Sequence[SourceItem], max_items: Mapping[str, int]) -> list[SourceItem]:
    """The items of each limited split whose hashed ids come first, in the dataset's order."""
    chosen = {item.id for item in items if item.split not in max_items}
    for split, count in max_items.items():
        ids = [item.id for item in items if item.split == split]
        chosen.update(sorted(ids, key=lambda name: hashlib.sha256(name.encode("utf-8", "replace")).digest())[:count])
    return [item for item in items if item.id in chosen]


def _hashed(items: Sequence[SourceItem], data: str) -> list[SourceItem]:
    with ThreadPoolExecutor() as pool:
        hashed = pool.map(_hash_item, items)
        return list(tqdm(hashed, total=len(items), unit=" items", desc=f"reading {data}", leave=False))


def _hash_item(item: SourceItem) -> SourceItem:
    """Read the item's media once, for their hashes."""
    problem, hashes = item.problem, {}
    for modality, media in item.media.items():
        try:
            data = media.read()
        except OSError as error:
            if not is_file_fault(error):
                raise
            problem = problem or f"unreadable {modality}: {error.strerror or error}"
            continue
        hashes[modality] = hashlib.sha256(data).digest()
        if not data:
            problem = problem or f"unreadable {modality}: the file is empty"
    return replace(item, problem=problem, hashes=hashes)
