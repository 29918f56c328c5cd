"""Datasets of the Hugging Face library: saved in a folder, in Parquet files, or on the hub. The only importer of it.

Its builders read Parquet and the hub. They copy the data into their cache on this machine's disk, which gives random
access. Streamed datasets are read in order instead: once for their hashes, and once for each encoder.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast
from weakref import WeakValueDictionary

from saffe_cache.core.features import Modality
from saffe_cache.sources.decoding import media_bytes
from saffe_cache.sources.files import TABLE_SUFFIXES, expand, is_helper, is_metadata, modality_of, split_of, walk
from saffe_cache.sources.hashing import hashed
from saffe_cache.sources.items import Columns, Format, NoMediaError, SourceItem, as_list, texts_of

_KEPT_BYTES = 2**29
"""Media of a stream that are kept for readers that are behind."""


def _is_saved_dataset(data: str) -> bool:
    folder = Path(data).expanduser()
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


def _is_snapshot(data: str) -> bool:
    """Whether a folder, perhaps with :CONFIG behind it, holds Parquet files and neither media nor archives."""
    folder = Path(_parts(data)[0]).expanduser()
    found = False
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_helper(name)]
        if any(modality_of(name) or name.endswith(".tar") for name in names):
            return False
        found = found or any(name.endswith(".parquet") and not is_metadata(name) for name in names)
    return found and not walk(folder).media  # which follows links


def _holds_media(data: str) -> bool:
    """Whether the data are Parquet files with a column of pictures or sounds, which footers show."""
    paths = expand(data) if data.endswith(".parquet") else []
    if not paths:
        return False
    import datasets
    import pyarrow.parquet

    try:
        features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(paths[0]))
    except Exception:  # of a damaged file, which reading names
        return False
    return any(map(_is_media, features.values()))


def _may_be_hub_id(data: str) -> bool:
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[^:@]+)?(@.+)?", data) is not None
    return is_id and not (Path(data).exists() or data.lower().endswith((*TABLE_SUFFIXES, ".tar")))


def _parts(data: str) -> tuple[str, str | None, str | None]:
    """The name, the config and the revision in NAME:CONFIG@REVISION."""
    match = None if os.path.exists(os.path.expanduser(data)) else re.fullmatch(r"(.+?)(?::([^:@]+))?(?:@(.+))?", data)
    return match.groups() if match else (data, None, None)  # type: ignore[return-value]


def saved_items(data: str, columns: Columns) -> Iterator[SourceItem]:
    """The items of a folder written by save_to_disk. A dataset without splits is "train" unless it names its split.

    Raises:
        ValueError: the columns are invalid.
    """
    import datasets

    yield from dataset_items(f"--data {data}", datasets.load_from_disk(str(Path(data).expanduser())), columns)


def parquet_items(data: str, columns: Columns, *, streaming: bool = False) -> Iterator[SourceItem]:
    """The items of Parquet files, whose names say their splits.

    Raises:
        ValueError: the files are damaged, or their columns are invalid.
    """
    files: dict[str, list[str]] = {}
    for path in expand(data):
        files.setdefault(split_of(f"{path.parent.name}/{path.name}"), []).append(str(path))
    what = "the Parquet files cannot be read"
    yield from dataset_items(f"--data {data}", _load(data, what, "parquet", streaming, data_files=files), columns)


def hub_items(data: str, columns: Columns, *, streaming: bool = False) -> Iterator[SourceItem]:
    """The items of a dataset id, or of a folder with a copy of such a dataset.

    Raises:
        ValueError: it is unavailable, has several configs, or its columns are invalid.
    """
    name, config, revision = _parts(data)
    what = "no such folder here, and the hub provided no dataset with this id"
    if os.path.isdir(os.path.expanduser(name)):
        name, what = os.path.expanduser(name), "its Parquet files cannot be read"
    options = {key: value for key, value in (("name", config), ("revision", revision)) if value}
    yield from dataset_items(f"--data {data}", _load(data, what, name, streaming, **options), columns)


SAVED_DATASET = Format(
    layout="a folder saved by datasets.save_to_disk", recognises=_is_saved_dataset, read_items=saved_items
)
SNAPSHOT = Format(
    layout="a folder with the Parquet files of a dataset of the hub",
    recognises=_is_snapshot,
    read_items=hub_items,
    stream_items=partial(hub_items, streaming=True),
)
PARQUET = Format(
    layout="Parquet files with pictures or sounds",
    recognises=_holds_media,
    read_items=parquet_items,
    stream_items=partial(parquet_items, streaming=True),
)
HUB_DATASET = Format(
    layout="a dataset id on the Hugging Face hub",
    recognises=_may_be_hub_id,
    read_items=hub_items,
    stream_items=partial(hub_items, streaming=True),
)


def _load(data: str, what: str, source: str, streaming: bool, **options: Any) -> Any:
    """
    Raises:
        ValueError: the library cannot load it, for which `what` is said.
    """
    import datasets

    options |= {"streaming": True} if streaming else {}
    try:
        return datasets.load_dataset(source, **options)
    except Exception as error:  # the library raises many kinds
        configs = re.search(r"available configs: \[(.+)\]|Available: \[(.+)\]", str(error))
        if configs:
            names = (configs[1] or configs[2]).replace("'", "")
            raise ValueError(
                f"--data {data}: found the configs {names}, expected one of them. Choose one, as in "
                f"--data {_parts(data)[0]}:{names.split(', ')[0]}."
            ) from None
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise ValueError(f"--data {data}: {what} ({reason}). Check the spelling, the files and the network.") from error


@dataclass(frozen=True)
class _Cell:
    """Media in a row of a dataset whose column is not decoded."""

    rows: Any
    """The dataset, or what else yields a row by its number."""
    column: str
    row: int

    def read(self) -> bytes:
        value = self.rows[self.row][self.column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise NoMediaError(f"row {self.row} has no {self.column}")
        return media_bytes(value)


@dataclass
class _Stream:
    """Media of a dataset that is read in order. Readers of earlier rows start it again."""

    rows: Any
    """An IterableDataset with the columns of media, not decoded."""
    cells: WeakValueDictionary[tuple[int, str], _Cell] = field(default_factory=WeakValueDictionary)
    """The media that may still be read: nobody refers to others."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ahead: Iterator[Mapping[str, Any]] = field(default_factory=lambda: iter(()))
    _next: int = -1
    _kept: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    _kept_bytes: int = 0

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        with self._lock:
            if row not in self._kept and not 0 <= self._next <= row:
                self._ahead, self._next = iter(self.rows.skip(row) if row else self.rows), row
            while row not in self._kept:
                self._keep(self._next, next(self._ahead))
                self._next += 1
            return self._kept[row]

    def _keep(self, row: int, values: Mapping[str, Any]) -> None:
        if not any((row, column) in self.cells for column in values):
            return
        self._kept[row] = values
        self._kept_bytes += _size(values)
        while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= _size(self._kept.pop(next(iter(self._kept))))


def _size(values: Mapping[str, Any]) -> int:
    return sum(len((value or {}).get("bytes") or b"") for value in values.values())


def dataset_items(where: str, loaded: Any, columns: Columns) -> Iterator[SourceItem]:
    """The items of a Dataset or DatasetDict, or of their streamed forms.

    Raises:
        ValueError: the columns are invalid.
    """
    if not isinstance(loaded, Mapping):
        loaded = {str(loaded.split or "train").partition("[")[0]: loaded}  # the split may be train[:100]
    loaded = {split: one if one.features else one._resolve_features() for split, one in loaded.items()}
    columns.require(list(dict.fromkeys(name for one in loaded.values() for name in one.features)), where)
    for split, dataset in loaded.items():
        media = _media_columns(dataset.features, str(split), columns)
        for column, feature in media.values():
            dataset = dataset.cast_column(column, feature(decode=False))
        rows = _stored_rows if hasattr(dataset, "__len__") else _streamed_rows
        yield from rows(dataset, str(split), {kind: column for kind, (column, _) in media.items()}, columns)


def _stored_rows(dataset: Any, split: str, media: Mapping[Modality, str], columns: Columns) -> Iterator[SourceItem]:
    cells = {modality: _Cell(dataset.select_columns([name]), name, 0) for modality, name in media.items()}
    names = _names_of(dataset.features, columns)
    entries: Iterable[Mapping[str, Any]] = dataset.select_columns(names) if names else ({} for _ in range(len(dataset)))
    for row, entry in enumerate(entries):
        yield _item(dataset, row, split, {kind: replace(cell, row=row) for kind, cell in cells.items()}, entry, columns)


def _streamed_rows(dataset: Any, split: str, media: Mapping[Modality, str], columns: Columns) -> Iterator[SourceItem]:
    stream = _Stream(dataset.select_columns(list(media.values())))
    names = list(dict.fromkeys([*media.values(), *_names_of(dataset.features, columns)]))
    for row, entry in enumerate(dataset.select_columns(names)):
        loaded = {kind: _Cell({row: entry}, column, row) for kind, column in media.items()}
        item = hashed(_item(dataset, row, split, loaded, entry, columns))
        cells = {kind: replace(cast("_Cell", one), rows=stream) for kind, one in item.media.items()}
        stream.cells.update({(row, cell.column): cell for cell in cells.values()})
        yield replace(item, media=cells)


def _names_of(features: Any, columns: Columns) -> list[str]:
    """The columns of texts that items are made of."""
    roles: tuple[Literal["caption", "label", "id", "split"], ...] = ("caption", "label", "id")
    roles += ("split",) if columns.split else ()
    return list(dict.fromkeys(name for role in roles for name in columns.find(role, features)))


def _item(
    dataset: Any, row: int, split: str, media: Mapping[Modality, Any], entry: Mapping[str, Any], columns: Columns
) -> SourceItem:
    labels, problem = _labels_of(dataset.features, columns.find("label", dataset.features), entry)
    kept = (*columns.find("caption", entry), columns.id, columns.split)
    texts = {name: value for name, value in entry.items() if name in kept}
    item = columns.item(row, split, media, texts, tuple(dataset.features), problem)
    return replace(item, labels=labels)


def _is_media(kind: Any) -> bool:
    """Whether a column's type is that of pictures, sounds or files in them."""
    is_file = isinstance(kind, Mapping) and kind.keys() >= {"bytes", "path"}
    is_bytes = getattr(kind, "dtype", "").removeprefix("large_") == "binary"
    return is_file or is_bytes or _is_typed(kind)


def _is_typed(kind: Any) -> bool:
    import datasets

    return isinstance(kind, (datasets.Image, datasets.Audio, datasets.Video))


def _media_columns(features: Any, split: str, columns: Columns) -> dict[Modality, tuple[str, Any]]:
    """The columns of photos and sounds, found by their type and usual names, and the types. Texts in them are paths.

    Raises:
        ValueError: there is no such column, or it has another type.
    """
    import datasets

    media: dict[Modality, tuple[str, Any]] = {}
    typed: Mapping[Literal["image", "audio", "video"], Any] = {
        "image": datasets.Image,
        "audio": datasets.Audio,
        "video": datasets.Video,
    }
    of_files = {name: None for name, kind in features.items() if _is_media(kind) and not _is_typed(kind)}
    for modality, feature in typed.items():
        of_type = [name for name, kind in features.items() if isinstance(kind, feature)]
        found = [*of_type, *columns.find(modality, of_files)]
        name = next(iter(columns.find(modality, features) if getattr(columns, modality) else found), None)
        if name is None:
            continue
        kind = features[name]
        is_text = getattr(kind, "dtype", "").removeprefix("large_") == "string"
        if not (isinstance(kind, feature) or is_text or name in of_files):
            raise ValueError(f"split {split}: column {name} has {kind}, expected {modality}, bytes or paths.")
        media[modality] = (name, feature)
    if not media:
        raise ValueError(
            f"split {split}: no image, audio or video column found; the columns are {', '.join(features)}. "
            "Choose them with --column ROLE=NAME."
        )
    return media


def _labels_of(features: Any, names: Iterable[str], entry: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Class names, also where the dataset stores class numbers."""
    import datasets

    values: list[Any] = []
    for name in names:
        feature = getattr(features[name], "feature", features[name])  # of a list's elements
        found = as_list(entry[name])
        if isinstance(feature, datasets.ClassLabel):
            if any(number is None or number < 0 for number in found):  # -1 marks unlabelled items
                return (), "no label"
            found = [feature.int2str(number) for number in found]
        elif -1 in found:
            return (), "no label"
        values += found
    return texts_of(values)
