"""Folders of splits: class folders, or files that a table of metadata lists.

A table lists the files of its own folder and of those below, as in Hugging Face's imagefolder. Such tables often come
with a downloaded dataset, so file names in them must stay below their folder. Symbolic links in a user's folder are
followed. Whatever is left out is counted and logged, once for each reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saffe_cache.core.features import Modality
from saffe_cache.sources.items import SPLIT_NAMES, Columns, Format, MediaFile, SourceItem
from saffe_cache.sources.tables import TABLE_SUFFIXES, table_rows

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3"})
_TABLES = frozenset(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
_HELPERS = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini"}
)
"""Names in lower case of what systems and tools leave in folders, besides names that begin with a dot."""


def _is_folder(data: str) -> bool:
    return Path(data).expanduser().is_dir()


def folder_items(data: str, columns: Columns) -> Iterator[SourceItem]:
    """The items of all splits, in the order of their names.

    Raises:
        ValueError: a table of metadata or the columns are invalid.
    """
    root = Path(data).expanduser()
    tree = _Tree()
    _walk(root, "", (), tree)
    tables = [_read_table(root, name, columns) for name in tree.tables]
    columns.require(list(dict.fromkeys(name for table in tables for name in table.columns)), f"--data {data}")
    items = [item for table in tables for item in table.items(columns)]
    seen: set[str] = set()
    for item, where in items:
        if item.id in seen:
            raise ValueError(f"{where}: {item.id} is listed twice. Give each file one line.")
        seen.add(item.id)
    listed = {name for table in tables for name in table.files}
    folders = {table.folder for table in tables}
    below_tables = [name for name in tree.media if _is_below(name, folders)]
    in_classes = [name for name in tree.media if name.count("/") >= 2 and not _is_below(name, folders)]
    skipped = {*tree.media, *(name for name in tree.others if "/" in name)} - {*below_tables, *in_classes}
    for reason, names in (
        ("hidden files and helper folders are skipped", tree.helpers),
        ("links are skipped: they lead back to a folder above them", tree.loops),
        ("files are skipped: no photo or sound in a class folder", [n for n in skipped if not _is_below(n, folders)]),
        (
            "photos or sounds are left out: the metadata does not list them",
            [n for n in below_tables if n not in listed],
        ),
    ):
        if names:
            logger.warning("%s: %d %s; for instance %s.", root, len(names), reason, ", ".join(sorted(names)[:3]))
    found = [item for item, _ in items] + [_class_folder_item(root, name) for name in in_classes]
    yield from sorted(found, key=lambda item: item.split)


FOLDERS = Format(
    layout="folders SPLIT/CLASS/file or SPLIT/metadata.jsonl (file_name, captions or label)",
    recognises=_is_folder,
    read_items=folder_items,
)


@dataclass
class _Tree:
    """The names of what lies in a folder and below, relative to it, in order."""

    media: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    helpers: list[str] = field(default_factory=list)
    """Hidden files and folders, and those of systems and tools. Nothing below them is read."""
    loops: list[str] = field(default_factory=list)
    """Links to a folder that contains them."""


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...], tree: _Tree) -> None:
    """Add what lies in a folder; `prefix` is its name with a slash, `above` identifies the folders that contain it."""
    status = folder.stat()
    above = (*above, (status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        name = prefix + entry.name
        if entry.name.startswith(".") or entry.name.lower() in _HELPERS:
            tree.helpers.append(name)
        elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # False for a broken link
            target = os.stat(entry.path)
            if (target.st_dev, target.st_ino) in above:
                tree.loops.append(name)
            else:
                _walk(folder / entry.name, f"{name}/", above, tree)
        elif entry.name in _TABLES:
            tree.tables.append(name)
        else:
            (tree.media if _modality_of(name) else tree.others).append(name)


def _class_folder_item(root: Path, name: str) -> SourceItem:
    split, label = name.split("/")[:2]
    modality = _modality_of(name)
    assert modality
    return SourceItem(id=name, split=split, media={modality: MediaFile(root / name)}, labels=(label,))


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A table of metadata, and where the files that it lists are."""

    root: Path
    """The folder of the dataset."""
    folder: str
    """The table's folder, relative to `root`, with a slash; empty for `root`."""
    rows: Sequence[_Row]
    columns: tuple[str, ...]
    """All fields of its rows."""
    prefix: str
    """What precedes a file name in an item's id."""

    @property
    def files(self) -> Iterator[str]:
        """The files that it lists, relative to `root`."""
        return (self.folder + name for row in self.rows for name in row.files)

    def items(self, columns: Columns) -> Iterator[tuple[SourceItem, str]]:
        """Its items, each with its place for messages."""
        for row in self.rows:
            split = f"{self.prefix}{row.files[0]}".split("/")[0]
            media = {_modality_of(name): MediaFile(self.root / self.folder / name) for name in row.files}
            unknown = [Path(name).suffix for name in row.files if not _modality_of(name)]
            captions, caption_problem = columns.texts("caption", row.entry)
            labels, label_problem = columns.texts("label", row.entry)
            item = SourceItem(
                id=f"{split}/{row.entry[columns.id]}" if columns.id else f"{self.prefix}{row.files[0]}",
                split=split,
                media={modality: file for modality, file in media.items() if modality},
                captions=captions,
                labels=labels,
                problem=caption_problem or label_problem or (f"unknown kind of file {unknown[0]!r}" if unknown else ""),
                columns=self.columns,
            )
            yield item, row.where


@dataclass(frozen=True)
class _Row:
    where: str
    entry: Mapping[str, Any]
    files: tuple[str, ...]
    """Its files, relative to the table's folder."""


def _read_table(root: Path, name: str, columns: Columns) -> _Table:
    folder = name[: name.rfind("/") + 1]
    rows = [
        _Row(where, entry, tuple(_files_of(where, entry, columns, root / folder)))
        for where, entry in table_rows(root / name, columns.image or columns.audio or "file_name")
    ]
    has_splits = all("/" in row.files[0] and row.files[0].split("/")[0] in SPLIT_NAMES for row in rows)
    table = _Table(
        root=root,
        folder=folder,
        rows=rows,
        columns=tuple(dict.fromkeys(column for row in rows for column in row.entry)),
        prefix=folder or ("" if has_splits else "train/"),
    )
    classes = {tuple(f"{table.prefix}{row.files[0]}".split("/")[1:-1]) for row in rows}
    if len(classes) > 1 and not columns.find("label", table.columns):
        logger.warning(
            "%s lists files in %d folders, whose names are not taken as classes. Add a field label to have classes.",
            *(root / name, len(classes)),
        )
    return table


def _files_of(where: str, entry: Mapping[str, Any], columns: Columns, folder: Path) -> Iterator[str]:
    """The files of a row: in the chosen columns, in file_name, or in columns such as image_file_name."""
    usual = ["file_name"] if "file_name" in entry else [name for name in entry if name.endswith("_file_name")]
    fields = [name for name in (columns.image, columns.audio) if name] or usual or ["file_name"]
    try:
        names = {column: str(entry[column]) for column in fields}
        _ = entry[columns.id] if columns.id else None
    except KeyError as error:
        raise ValueError(
            f"{where}: expected a JSON object with {', '.join(fields)}, found {error!r}; its fields are "
            f"{', '.join(map(str, entry)) or 'none'}. Correct the line."
        ) from None
    for column, name in names.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise ValueError(
                f"{where}: {column} {name!r} is outside its folder. Move the file, or a link to it, into {folder}."
            )
        yield Path(name).as_posix()


def _is_below(name: str, folders: Collection[str]) -> bool:
    """Whether one of the folders, each with a slash, contains the file."""
    return any(name[:end] in folders for end in (0, *(at + 1 for at, one in enumerate(name) if one == "/")))


def _modality_of(name: str) -> Modality | None:
    suffix = Path(name).suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else None
