"""Folders of splits: class folders, files with texts beside them, or files that a table of metadata lists.

A table lists the files of its own folder and of those below, as in Hugging Face's imagefolder. `queries.jsonl` beside
it lists composed queries. Such tables often come
with a downloaded dataset, so file names in them must stay below their folder. Whatever is left out is counted and
logged, once for each reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from saffe_cache.core.features import Modality
from saffe_cache.sources.files import (
    SIDECARS,
    TABLE_SUFFIXES,
    Names,
    Tree,
    expand,
    is_metadata,
    modality_of,
    split_of,
    suffix_of,
    table_rows,
    walk,
)
from saffe_cache.sources.items import SPLIT_NAMES, Columns, Format, Media, MediaFile, SourceItem
from saffe_cache.sources.queries import folder_queries, is_list_of_queries
from saffe_cache.sources.samples import Sample, fields_of, sample_items, tar_samples

logger = logging.getLogger(__name__)

FILE_FIELDS = (
    *("file_name", "filename", "file", "filepath", "file_path", "path", "image", "image_path", "image_name"),
    *("img", "img_path", "audio", "audio_path", "video", "video_path"),
)
"""Usual names of a column with a file's name."""
_OTHER_MEDIA: Mapping[Modality, tuple[str, ...]] = {
    "image": ("image", "image_path", "image_name", "img", "img_path"),
    "audio": ("audio", "audio_path"),
    "video": ("video", "video_path"),
}
"""Usual names of columns with files that a row may have besides its first one."""


def _is_folder(data: str) -> bool:
    return Path(data).expanduser().is_dir()


def folder_items(data: str, columns: Columns, *, every: bool = False) -> Iterator[SourceItem]:
    """The items of all splits, in the order of their names.

    Args:
        every: whether photos and sounds that belong to no split are items too, of split "" and named by their paths.

    Raises:
        ValueError: a table of metadata, an archive or the columns are invalid.
    """
    root = Path(data).expanduser()
    tree = walk(root)
    queries = list(filter(is_list_of_queries, tree.others))
    tree.others = [name for name in tree.others if name not in queries]
    names, on_disk = [name for name in tree.others if is_metadata(name)], {*tree.media, *tree.others}
    tables = [_read_table(root, name, columns, on_disk) for name in names]
    folders = {table.folder for table in tables}
    listed = {name for table in tables for name in table.files}
    unlisted = [name for name in tree.media if _is_below(name, folders) and name not in listed]
    beside = _Beside(root, tree, folders)
    samples = [*beside.samples(), *beside.tar_samples()]
    where, fields = f"--data {data}", fields_of(samples)
    columns.require(list(dict.fromkeys([*(name for table in tables for name in table.columns), *fields])), where)
    found = [item for table in tables for item in table.items(columns)]
    found += sample_items(samples, columns, where, fields)
    if every:
        others = [name for name in (*unlisted, *beside.skipped) if name in tree.media]
        found += [SourceItem(id=one, split="", media={tree.media[one]: MediaFile(str(root / one))}) for one in others]
        unlisted, beside.skipped = [], [name for name in beside.skipped if name not in tree.media]
    for reason, left_out in (
        ("hidden files and helper folders are skipped", tree.helpers),
        ("links are skipped: they lead back to a folder above them", tree.loops),
        ("files are skipped: no photo or sound in a class folder", beside.skipped),
        ("files are skipped: no photo or sound has their name", beside.alone),
        ("tables are skipped: name one as --data, or metadata.csv, to read it", beside.tables),
        ("photos or sounds are left out: the metadata does not list them", unlisted),
    ):
        if left_out:
            logger.warning("%s: %d %s; for instance %s.", root, len(left_out), reason, ", ".join(sorted(left_out)[:3]))
    yield from sorted(found, key=lambda item: item.split)
    yield from folder_queries(root, queries, found)


def table_items(data: str, columns: Columns) -> Iterator[SourceItem]:
    """The items that tables list, where `--data` names the tables themselves. Several rows of a file are joined.

    Raises:
        ValueError: a table or the columns are invalid.
    """
    paths = expand(data)
    for folder in dict.fromkeys(path.parent for path in paths):
        for path in sorted(folder.iterdir()):
            if is_list_of_queries(path.name):
                logger.warning("%s is not read: name the folder as --data to have its queries.", path)
    tables = [_read_table(path.parent, path.name, columns, is_data=True) for path in paths]
    columns.require(list(dict.fromkeys(name for table in tables for name in table.columns)), f"--data {data}")
    outside = [name for table in tables for name in table.files if os.path.isabs(name) or ".." in name.split("/")]
    if outside:
        logger.warning("--data %s: %d files are outside its folder; for instance %s.", data, len(outside), outside[0])
    found = [item for table in tables for item in table.items(columns)]
    yield from sorted(found, key=lambda item: item.split)


FOLDERS = Format(
    layout="folders SPLIT/CLASS/file or SPLIT/metadata.jsonl (file_name, captions or label), or photos with texts "
    "beside them",
    recognises=_is_folder,
    read_items=folder_items,
    read_every=partial(folder_items, every=True),
)
TABLES = Format(
    layout="a table (.csv, .tsv, .json, .jsonl, .parquet) of file names with captions or labels",
    recognises=lambda data: data.lower().endswith(TABLE_SUFFIXES) and bool(expand(data)),
    read_items=table_items,
)


class _Beside:
    """Photos and sounds that no table lists, with the files beside them."""

    def __init__(self, root: Path, tree: Tree, tables: Collection[str]) -> None:
        self._root, self._kinds = root, tree.media
        self._media = [name for name in tree.media if not _is_below(name, tables)]
        self._tars = [name for name in tree.others if name.endswith(".tar")]
        others = [name for name in tree.others if not (_is_below(name, tables) or name.endswith(".tar"))]
        self._texts: dict[str, list[str]] = {}
        for name in others:
            if suffix_of(name) in SIDECARS:
                self._texts.setdefault(_stem(name), []).append(name)
        stems = {_stem(name) for name in self._media} if self._texts else ()
        self._folders = {_folder(stem) for stem in self._texts if stem in stems}
        """The folders in which a photo or sound has a text beside it, with a slash."""
        self._splits_with_classes = {name.split("/")[0] for name in self._media if name.count("/") >= 2}
        self._is_flat = not (self._tars or tables or any("/" in name for name in self._media))
        self._places = {folder: self._place(folder) for folder in map(_folder, self._media)}
        taken = [name for name in self._media if self._places[_folder(name)]]
        of_taken = {text for name in taken for text in self._beside(name)} | self._read_shards(others, taken)
        left = [name for name in others if name not in of_taken]
        self.alone = [n for n in left if suffix_of(n) in SIDECARS and _folder(n) in self._folders]
        """Texts without a photo or sound."""
        self.tables = [name for name in left if "/" not in name and suffix_of(name) in (".csv", ".tsv", ".jsonl")]
        """Tables that do not say that they are metadata."""
        rest = {*self._media, *(name for name in left if "/" in name)} - {*taken, *self.alone}
        self.skipped = sorted(rest)

    def samples(self) -> Iterator[Sample]:
        for name in self._media:
            place = self._places[_folder(name)]
            if place is None:
                continue
            split, label = place
            field = suffix_of(name)[1:]
            files = {field: MediaFile(os.path.join(self._root, name))}
            files |= {suffix_of(text)[1:]: MediaFile(os.path.join(self._root, text)) for text in self._beside(name)}
            known = {"label": label} if label else {}
            yield Sample(name.removeprefix(f"{split}/"), split, files, known, {field: self._kinds[name]})

    def tar_samples(self) -> Iterator[Sample]:
        for name in self._tars:
            yield from tar_samples(self._root / name, name)

    def _beside(self, name: str) -> Sequence[str]:
        return self._texts.get(_stem(name), ()) if self._texts else ()

    def _place(self, folder: str) -> tuple[str, str | None] | None:
        """The split and the class of a folder's files; None if neither its name nor texts beside the files say them."""
        has_texts = folder in self._folders
        folders = [one for one in folder.split("/")[:-1] if not (has_texts and _is_shard(one))]
        if not folders:
            return ("train", None) if has_texts or self._is_flat else None
        if len(folders) > 1:
            return folders[0], folders[1]
        is_split = folders[0] in SPLIT_NAMES and folders[0] not in self._splits_with_classes
        return (folders[0], None) if has_texts or is_split else None

    def _read_shards(self, others: Sequence[str], taken: Sequence[str]) -> set[str]:
        """The files of img2dataset beside its folders and archives; warns of downloads that failed."""
        shards = {name.rpartition("/")[0] for name in taken} | {name.removesuffix(".tar") for name in self._tars}
        files = {name for name in others if name.removesuffix(".parquet").removesuffix("_stats.json") in shards}
        failed = total = 0
        for name in files:
            if name.endswith("_stats.json"):
                for _, stats in table_rows(self._root / name, "count and successes"):
                    total += stats.get("count", 0)
                    failed += stats.get("count", 0) - stats.get("successes", 0)
        if failed:
            logger.warning("%s: %d of %d downloads had failed, as img2dataset reports.", self._root, failed, total)
        return files


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
    """What precedes a file name in an item's id: its split, unless file names begin with it."""
    is_data: bool
    """Whether `--data` names the table itself. Its rows may then name splits, and the same file again."""

    @property
    def files(self) -> Iterator[str]:
        """The files that it lists, relative to `root`."""
        return (self.folder + name for row in self.rows for name in row.files)

    def items(self, columns: Columns) -> Iterator[SourceItem]:
        """
        Raises:
            ValueError: a file is listed twice.
        """
        found: dict[str, SourceItem] = {}
        folder = self.root / self.folder
        for row in self.rows:
            split, _, name = f"{self.prefix}{row.name}".partition("/")
            chosen = columns.find("split", row.entry) if self.is_data or columns.split else ()
            if chosen and row.entry[chosen[0]]:
                split, name = str(row.entry[chosen[0]]), row.name.removeprefix(f"{row.entry[chosen[0]]}/")
            files, problem = dict[Modality, Media](), row.problem
            for one in row.files:
                if kind := modality_of(one, folder):
                    files[kind] = MediaFile(os.path.join(folder, one))
                else:
                    problem = problem or f"unknown kind of file {Path(one).suffix!r}"
            item = columns.item(name.lstrip("/"), split, files, row.entry, self.columns, problem)
            known = found.get(item.id)
            is_joined = self.is_data and columns.id is None
            if known is not None and not (is_joined and (known.labels, known.media) == (item.labels, item.media)):
                raise ValueError(f"{row.where}: {item.id} is listed twice. Give each file one line.")
            if known is not None:
                captions = tuple(dict.fromkeys([*known.captions, *item.captions]))
                item = replace(known, captions=captions, problem=known.problem or item.problem)
            found[item.id] = item
        if len(found) < len(self.rows):
            logger.info("%d rows describe %d files: their captions are joined.", len(self.rows), len(found))
        yield from found.values()


class _Row(NamedTuple):
    where: str
    entry: Mapping[str, Any]
    name: str
    """The first file as it is listed, for ids, which are the same on every disk."""
    files: tuple[str, ...]
    """Its files, relative to the table's folder."""
    problem: str = ""


def _read_table(
    root: Path, name: str, columns: Columns, on_disk: Collection[str] = (), *, is_data: bool = False
) -> _Table:
    """
    Args:
        on_disk: names of files that are known to be below `root`; others are looked for.
    """
    folder = name[: name.rfind("/") + 1]
    place = root / folder
    rows, names = [], Names()
    for where, entry in table_rows(root / name, columns.image or columns.audio or columns.video or "file_name"):
        listed, files, problems = [], [], []
        for column, one in _files_of(where, entry, columns).items():
            found = one
            if f"{folder}{one}" not in on_disk:  # as the disk names them, and so in no need of a check
                _check_place(where, column, one, None if is_data else place)
                found, problem = names.resolve(place, one)
                problems.append(problem)
                one = _posix(one if found == one else one.replace("\\", "/"))
                found = _posix(found)
            listed.append(one)
            files.append(found)
        rows.append(_Row(where, entry, listed[0], tuple(files), " ".join(filter(None, problems))))
    if not rows:
        raise ValueError(f"{root / name}: the table has no rows, expected one for each file. Fill it or remove it.")
    has_splits = all("/" in row.name and row.name.split("/")[0] in SPLIT_NAMES for row in rows)
    table = _Table(
        root=root,
        folder=folder,
        rows=rows,
        columns=tuple(dict.fromkeys(column for row in rows for column in row.entry)),
        prefix=folder or ("" if has_splits else f"{split_of(name)}/"),
        is_data=is_data,
    )
    classes = {tuple(f"{table.prefix}{row.name}".split("/")[1:-1]) for row in rows}
    if len(classes) > 1 and not columns.find("label", table.columns):
        logger.warning(
            "%s lists files in %d folders, whose names are not taken as classes. Add a field label to have classes.",
            *(root / name, len(classes)),
        )
    return table


def _files_of(where: str, entry: Mapping[str, Any], columns: Columns) -> dict[str, str]:
    """The files of a row by column: in the chosen columns, or in a usual one and those of other media.

    Columns such as image_file_name are usual too. A row may lack some of the chosen columns, as an item may lack a
    medium. Empty cells are left out, unless all are empty.

    Raises:
        ValueError: the row has none of the columns.
    """
    usual = [name for name in entry if name.endswith("_file_name")] if "file_name" not in entry else ["file_name"]
    usual = usual or [name for name in FILE_FIELDS if name in entry][:1]
    fields = [name for name in (columns.image, columns.audio, columns.video) if name] or usual or ["file_name"]
    files = {column: str(entry[column] or "") for column in fields if column in entry}
    if not files:
        raise ValueError(
            f"{where}: expected a JSON object with {' or '.join(fields)}, found the fields "
            f"{', '.join(map(str, entry)) or 'none'}. Correct the line, or name the field with --column image=NAME."
        )
    if fields == usual:
        files |= other_media(entry, {modality_of(name) for name in files.values()})
    return {column: name for column, name in files.items() if name} or files


def other_media(entry: Mapping[str, Any], known: Collection[Modality | None]) -> dict[str, str]:
    """Files of a row in usual columns of other media than the known ones, by column; their suffixes must say so too."""
    found: dict[str, str] = {}
    for modality, names in _OTHER_MEDIA.items():
        fits = (name for name in names if name in entry and modality_of(str(entry[name] or "")) == modality)
        if modality not in known and (name := next(fits, None)):
            found[name] = str(entry[name])
    return found


def _posix(name: str) -> str:
    """A path in its plain form."""
    is_plain = os.sep == "/" and name and not ("//" in name or "./" in name or name[-1] in "/.")
    return name if is_plain else Path(name).as_posix()


def _check_place(where: str, column: str, name: str, folder: Path | None) -> None:
    """
    Args:
        folder: where the file must lie; None for anywhere.

    Raises:
        ValueError: it does not, or it is no file.
    """
    parts = name.replace("\\", "/").split("/")
    if "\0" in name or (folder and (os.path.isabs(name) or (not parts[0] and name) or ".." in parts)):
        raise ValueError(
            f"{where}: {column} {name!r} is outside its folder. Move the file, or a link to it, into "
            f"{folder or 'the folder of the table'}."
        )
    if "://" in name:
        raise ValueError(
            f"{where}: {column} is the URL {name!r:.80}, expected a file. Download the files first, for instance "
            "with img2dataset, whose output folder can be the --data."
        )


def _is_below(name: str, folders: Collection[str]) -> bool:
    """Whether one of the folders, each with a slash, contains the file."""
    folder = _folder(name)
    while folders and folder not in folders and folder:
        folder = folder[: folder.rfind("/", 0, -1) + 1]
    return folder in folders


def _folder(name: str) -> str:
    return name[: name.rfind("/") + 1]


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _is_shard(folder: str) -> bool:
    """Whether a folder is named as those of img2dataset: 00000, 00001 and so on."""
    return folder.isdigit() and len(folder) >= 5
