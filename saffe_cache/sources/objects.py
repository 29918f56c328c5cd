"""Datasets that are Python objects: of the datasets library, of pandas, of torch, and lists."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from saffe_cache.core.features import Modality
from saffe_cache.sources.decoding import media_bytes
from saffe_cache.sources.files import modality_of
from saffe_cache.sources.folders import FILE_FIELDS, other_media
from saffe_cache.sources.huggingface import dataset_items
from saffe_cache.sources.items import Columns, Format, SourceItem


def object_items(data: Any, columns: Columns) -> Iterator[SourceItem]:
    """The items of an object, or of several by split. One without splits is "train" unless a column names them.

    Raises:
        ValueError: it is no dataset, or lacks the columns.
    """
    if isinstance(data, Mapping) and (names := columns.find("image", data)):
        raise ValueError(f"data: found a dict with a column {names[0]}, expected splits. Use pandas.DataFrame(data).")
    if any(map(_is_of_datasets, _by_split(data).values())):
        yield from dataset_items(described(data), data, columns)
    else:
        for split, one in _by_split(data).items():
            yield from _row_items(one, split, columns)


OBJECTS = Format(
    layout="a datasets.Dataset, a pandas frame, a list of (image, captions), a torch Dataset, or a dict of splits",
    recognises=lambda data: not isinstance(data, (str, os.PathLike)),
    read_items=object_items,
)


def described(data: Any) -> str:
    """The data in one line, as `--data` says it or by its type."""
    if isinstance(data, (str, os.PathLike)):
        return os.fspath(data)
    if isinstance(data, Mapping):
        return ", ".join(f"{split}: {described(one)}" for split, one in data.items())
    kind = type(data).__name__
    return f"{kind} of {len(data)} rows in memory" if hasattr(data, "__len__") else f"{kind} in memory"


def is_streamed(data: Any) -> bool:
    """Whether an object is read in order, and so by one process."""
    return any(_is_of_datasets(one) and not hasattr(one, "__len__") for one in _by_split(data).values())


def _by_split(data: Any) -> Mapping[Any, Any]:
    return data if isinstance(data, Mapping) else {None: data}


@dataclass(frozen=True)
class _Value:
    """Media in a row of an object."""

    rows: Any
    row: int
    column: str

    def read(self) -> bytes:
        return media_bytes(_entry(self.rows, self.row)[self.column])


def _row_items(rows: Any, split: str | None, columns: Columns) -> Iterator[SourceItem]:
    if hasattr(rows, "to_dict") and hasattr(rows, "notna"):  # a frame of pandas
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ValueError(f"data: found {described(rows)}, expected {OBJECTS.layout}. Pass one of these.")
    where = described(rows)
    fields: dict[str, None] = {}
    for row in range(len(rows)):
        entry = _entry(rows, row)
        if not fields.keys() >= entry.keys():
            fields |= dict.fromkeys(entry)
        media = _media(entry, columns, where)
        if row == 0:
            replace(columns, image=None, audio=None, video=None).require(entry, f"data: {where}")
            _require_same(rows, media)
        chosen = columns.find("split", entry) if split is None or columns.split else ()
        name = split or "train"
        if chosen and entry[chosen[0]]:
            name = str(entry[chosen[0]])
        found = {modality: _Value(rows, row, column) for modality, column in media.items()}
        yield columns.item(row, name, found, entry, tuple(fields))
    columns.require(fields, f"data: {where}")  # a row may lack a medium, and so its column


def _entry(rows: Any, row: int) -> Mapping[str, Any]:
    """A row by column. Of a pair, the first is the media, and the second a class number, a caption or several."""
    value = rows[row]
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, (tuple, list)):
        return {"image": value}
    if len(value) != 2:
        raise ValueError(f"data: row {row} has {len(value)} values, expected (image, captions). Use dicts.")
    image, second = value
    if isinstance(second, str) or not hasattr(second, "__index__"):
        return {"image": image, "caption": second}
    names = getattr(rows, "classes", None)
    return {"image": image, "label": names[int(second)] if names else int(second)}


def _media(entry: Mapping[str, Any], columns: Columns, where: str) -> dict[Modality, str]:
    found: dict[Modality, str] = {}
    for modality in ("image", "audio", "video"):
        for column in columns.find(modality, entry):
            found[modality] = column
    is_named = columns.image or columns.audio or columns.video
    paths = [] if is_named else [name for name in FILE_FIELDS if name in entry]
    if not found and paths:
        found[modality_of(str(entry[paths[0]])) or "image"] = paths[0]
        found |= {kind: name for name, one in other_media(entry, found).items() if (kind := modality_of(one))}
    if not found:
        raise ValueError(
            f"data: {where}: no column with photos or sounds; the columns are {', '.join(entry) or 'none'}. Name one "
            'with column={"image": NAME}.'
        )
    return {modality: column for modality, column in found.items() if not _is_empty(entry[column])} or found


def _is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell)


def _require_same(rows: Any, media: Mapping[Modality, str]) -> None:
    """
    Raises:
        ValueError: two readings of the first row differ, as with random transforms.
    """
    for column in media.values():
        try:
            first, second = (_Value(rows, 0, column).read() for _ in range(2))
        except OSError:  # its item says so
            continue
        if first != second:
            raise ValueError("data: row 0 differs each time it is read. Remove random transforms from the dataset.")


def _is_of_datasets(data: Any) -> bool:
    return hasattr(data, "cast_column")
