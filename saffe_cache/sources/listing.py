"""Which kind of dataset it is, and its items with the hashes of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from saffe_cache.sources.folders import folder_items
from saffe_cache.sources.hub import hub_items, saved_items
from saffe_cache.sources.items import Columns, SourceItem, blames_the_file


def read_items(
    data: str, columns: Columns, splits: tuple[str, ...], most: Mapping[str, int] | None = None
) -> list[SourceItem]:
    """The items of a dataset, with the hash of their content; unreadable ones carry a problem.

    `splits` narrows to some, empty takes all; `most` limits the items of a split. Only what is left is read.

    Raises:
        ValueError: nothing usable lies there, or a split has no items.
    """
    items = _all_items(data, columns)
    if not items:
        raise ValueError(
            f"--data {data}: no items. Expected folders SPLIT/CLASS/file or SPLIT/metadata.jsonl, "
            "a folder saved by datasets.save_to_disk, or a hub id."
        )
    there = dict.fromkeys(item.split for item in items)
    absent = [split for split in (*splits, *(most or ())) if split not in there]
    if absent:
        raise ValueError(f"--data {data}: no items in split {absent[0]}; its splits are {', '.join(there)}.")
    return _hashed(_limit([item for item in items if not splits or item.split in splits], most or {}), data)


def read_named_items(data: str, columns: Columns, ids: Collection[str]) -> list[SourceItem]:
    """Those items of a dataset that have these ids, as `read_items` gives them; no others are read.

    Raises:
        ValueError: nothing usable lies there.
    """
    return _hashed([item for item in _all_items(data, columns) if item.id in ids], data)


def _hashed(items: Sequence[SourceItem], data: str) -> list[SourceItem]:
    with ThreadPoolExecutor() as pool:
        hashed = pool.map(_hash_item, items)
        return list(tqdm(hashed, total=len(items), unit=" items", desc=f"reading {data}", leave=False))


def _limit(items: Sequence[SourceItem], most: Mapping[str, int]) -> list[SourceItem]:
    """At most so many items of a split: those whose hashed ids come first, in the dataset's order."""
    chosen = {item.id for item in items if item.split not in most}
    for split, count in most.items():
        ids = [item.id for item in items if item.split == split]
        chosen.update(sorted(ids, key=lambda name: hashlib.sha256(name.encode("utf-8", "replace")).digest())[:count])
    return [item for item in items if item.id in chosen]


def _all_items(data: str, columns: Columns) -> list[SourceItem]:
    folder = Path(data).expanduser()
    if not folder.is_dir():
        if folder.exists() or data.startswith((".", "/", "~")):
            raise ValueError(f"--data {data}: not a folder. Give a folder of splits or a dataset id of the hub.")
        return list(hub_items(data, columns))
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return list(saved_items(folder, columns))
    return list(folder_items(folder))


def _hash_item(item: SourceItem) -> SourceItem:
    """Read the item's files once, for their hashes."""
    problem, hashes = item.problem, {}
    for modality, media in item.media.items():
        try:
            data = media.read()
        except OSError as error:
            if not blames_the_file(error):
                raise
            problem = problem or f"unreadable {modality}: {error.strerror or error}"
            continue
        hashes[modality] = hashlib.sha256(data).digest()
        if not data:
            problem = problem or f"unreadable {modality}: the file is empty"
    return replace(item, problem=problem, hashes=hashes)
