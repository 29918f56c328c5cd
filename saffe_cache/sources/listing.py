"""Which kind of dataset it is, and its items with the hashes of their content."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from saffe_cache.sources.folders import folder_items
from saffe_cache.sources.hub import hub_items, saved_items
from saffe_cache.sources.items import Columns, SourceItem


def read_items(data: str, columns: Columns, splits: tuple[str, ...]) -> list[SourceItem]:
    """All items of a dataset, with the hash of their content; unreadable ones carry a problem.

    `splits` narrows to some; empty takes all.

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
    absent = [split for split in splits if split not in there]
    if absent:
        raise ValueError(f"--data {data}: no items in split {absent[0]}; its splits are {', '.join(there)}.")
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_hash_item, (item for item in items if not splits or item.split in splits)))


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
            problem = problem or f"unreadable {modality}: {error.strerror or error}"
            continue
        hashes[modality] = hashlib.sha256(data).digest()
        if not data:
            problem = problem or f"unreadable {modality}: the file is empty"
    return replace(item, problem=problem, hashes=hashes)
