"""Files of a dataset by name: in a folder and below, in tar archives, and those that a pattern names; rows of tables.

Symbolic links in a user's folder are followed. What systems and tools leave behind is set apart, to be counted.
Members of tar archives are read in place: nothing is unpacked or copied.
"""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
import logging
import os
import re
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from saffe_cache.core.features import Modality
from saffe_cache.sources.decoding import modality_of_content
from saffe_cache.sources.items import SPLIT_NAMES, MediaFile

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"}
    | {".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"}
)
AUDIO_SUFFIXES = frozenset(
    {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".caf", ".w64", ".rf64", ".au", ".m4a"}
)
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".3gp", ".webm", ".mkv", ".avi", ".mpg", ".mpeg"})
TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet", ".json")
_METADATA = frozenset(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
SIDECARS = frozenset({".txt", ".caption", ".json", ".cls"})
"""Suffixes of files with the texts of a photo or sound that lies beside them."""
_HELPERS = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini"}
)
"""Names in lower case of what systems and tools leave in folders, besides names that begin with a dot."""
_BLOCK = 512
"""Bytes of a header in a tar archive."""


def is_helper(name: str) -> bool:
    """Whether the last part of a path is hidden, or left behind by a system or a tool."""
    last = name.rpartition("/")[2]
    return last.startswith(".") or last.lower() in _HELPERS


def is_metadata(name: str) -> bool:
    """Whether a file is a table of metadata, metadata.jsonl for instance."""
    return name.rpartition("/")[2].lower() in _METADATA


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # quicker than Path


def modality_of(name: str, folder: Path | None = None) -> Modality | None:
    """What a file holds: by its suffix, or else by its content, if its folder is given."""
    suffix = suffix_of(name)
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in AUDIO_SUFFIXES:
        return "audio"
    if suffix in VIDEO_SUFFIXES:
        return "video"
    if folder is None or suffix in SIDECARS:
        return None
    try:
        with (folder / name).open("rb") as file:
            return modality_of_content(file.read(16))
    except (OSError, ValueError):
        return None


def split_of(name: str) -> str:
    """The split that a path names: a folder with a usual name, else such a word in the file's name; else train."""
    *folders, last = name.split("/")
    words = [*folders, *re.split(r"[-_. ]", last)]
    return next((word for word in words if word in SPLIT_NAMES), "train")


@dataclass
class Tree:
    """The names of what lies in a folder and below, relative to it, in order."""

    media: dict[str, Modality] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    helpers: list[str] = field(default_factory=list)
    """Hidden files and folders, and those of systems and tools. Nothing below them is read."""
    loops: list[str] = field(default_factory=list)
    """Links to a folder that contains them."""


def walk(root: Path) -> Tree:
    tree = Tree()
    with tqdm(unit=" files", desc=f"listing {root}", leave=False, delay=1) as progress:
        _walk(root, root, "", (), tree, progress)
    return tree


def _walk(
    root: Path, folder: Path, prefix: str, above: tuple[tuple[int, int], ...], tree: Tree, progress: tqdm[Any]
) -> None:
    """Add what lies in a folder; `prefix` is its name with a slash, `above` identifies the folders that contain it."""
    status = folder.stat()
    above = (*above, (status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    progress.update(len(found))
    for entry in found:
        name = prefix + entry.name
        if is_helper(name):
            tree.helpers.append(name)
        elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # False for a broken link
            target = os.stat(entry.path)
            if (target.st_dev, target.st_ino) in above:
                tree.loops.append(name)
            else:
                _walk(root, folder / entry.name, f"{name}/", above, tree, progress)
        elif modality := modality_of(name, root):
            tree.media[name] = modality
        else:
            tree.others.append(name)


def tar_members(path: Path) -> tuple[dict[str, MediaFile], list[str]]:
    """The files in a tar archive by name, in order, and the names of its links and helpers, which are left out.

    Raises:
        ValueError: the archive is compressed or damaged, or two files have the same name.
    """
    members: dict[str, MediaFile] = {}
    others: list[str] = []
    place = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                place = archive.offset
                name = member.name.removeprefix("./")
                if member.isdir():
                    continue
                if not member.isreg() or any(is_helper(part) for part in name.split("/")):
                    others.append(name)
                elif name in members:
                    raise ValueError(f"{path}: two files are named {name}. Leave one out.")
                else:
                    members[name] = MediaFile(str(path), member.offset_data, member.size)
        with path.open("rb") as file:  # tarfile takes a damaged header for the end
            file.seek(place)
            end = file.read(_BLOCK)
            if any(end) or place > path.stat().st_size:
                raise tarfile.ReadError("no header of a file here")
            if not end:
                logger.warning("%s ends after %d files without a mark: it may be incomplete.", path, len(members))
    except tarfile.TarError as error:
        raise ValueError(
            f"{path}: no readable tar archive at byte {place}, after {len(members)} files ({error}). Decompress it if "
            "it is compressed, or fetch it again."
        ) from None
    return members, others


def expand(pattern: str) -> list[Path]:
    """The files that a pattern names, in order: {000..099} is a range, {a,b} a choice, and * matches within a name.

    Raises:
        ValueError: some of them do not exist.
    """
    if os.path.lexists(os.path.expanduser(pattern)):
        return [Path(pattern).expanduser()]
    names = list(_without_braces(os.path.expanduser(pattern)))
    found = [path for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    absent = [name for name in found if not os.path.exists(name)]
    if absent and len(absent) < len(found):
        raise ValueError(
            f"--data {pattern}: {len(absent)} of {len(found)} files do not exist; for instance {absent[0]}. Fetch "
            "them, or narrow the range."
        )
    return [] if absent else list(dict.fromkeys(map(Path, found)))


def _without_braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    parts = match[1].split(",")
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = bounds.groups()
        parts = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    for part in parts:
        yield from _without_braces(pattern[: match.start()] + part + pattern[match.end() :])


class Names:
    """Finds listed files whose names differ from the disk's in Unicode form, backslashes or case."""

    def __init__(self) -> None:
        self._in_folder: dict[Path, dict[str, list[str]]] = {}

    def resolve(self, folder: Path, name: str) -> tuple[str, str]:
        """The name on the disk, and a problem if several files fit; the name itself if none does."""
        if os.path.lexists(os.path.join(folder, name)):
            return name, ""
        place, found = folder, list[str]()
        for part in name.replace("\\", "/").split("/"):
            fits = self._names(place).get(_plain(part), [])
            if len(fits) != 1:
                problem = f"{len(fits)} files fit the name {name!r}: {', '.join(fits)}" if fits else ""
                return name, problem
            found.append(fits[0])
            place = place / fits[0]
        return "/".join(found), ""

    def _names(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._in_folder:
            names: dict[str, list[str]] = {}
            for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                names.setdefault(_plain(name), []).append(name)
            self._in_folder[folder] = names
        return self._in_folder[folder]


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def table_rows(path: Path, expected: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a table, each with its place for messages. An empty cell of a CSV or TSV file is None.

    Args:
        path: the file; its suffix is one of `TABLE_SUFFIXES`.
        expected: the fields of a row, for messages.

    Raises:
        ValueError: the table is invalid.
    """
    rows = {".jsonl": _json_lines, ".json": _json_rows, ".parquet": _parquet_rows}.get(path.suffix.lower(), _csv_rows)
    for where, row in tqdm(rows(path), unit=" rows", desc=f"reading {path}", leave=False, delay=1):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object with {expected}, found {row!r}. Correct the line.")
        yield where, row


def decoded(data: bytes) -> str:
    """The text of a file in UTF-8 or UTF-16; bytes that are no UTF-8 become surrogates."""
    return data.decode(*_encoding(data[:2]))


def _encoding(begin: bytes) -> tuple[str, str]:
    """The encoding of a text by its first two bytes, and what to do with bytes that do not fit."""
    if begin in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16", "replace"
    if b"\0" in begin:  # the first character is ASCII in all tables
        return "utf-16-be" if begin[:1] == b"\0" else "utf-16-le", "replace"
    return "utf-8-sig", "surrogateescape"


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        encoding, errors = _encoding(file.read(2))
    with path.open(encoding=encoding, errors=errors) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _parsed(decoded(path.read_bytes()))
    if isinstance(rows, json.JSONDecodeError) and rows.msg == "Extra data":
        yield from _json_lines(path)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield f"{path}: row {number}", row


def _parsed(text: str) -> Any:
    """A JSON value, or the error of one that is invalid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return error


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a CSV or TSV file; its first line shows whether commas, tabs, semicolons or bars separate its cells."""
    csv.field_size_limit(2**31 - 1)
    text = decoded(path.read_bytes())
    first = text.partition("\n")[0]
    separator = max("\t,;|" if path.suffix.lower() == ".tsv" else ",\t;|", key=first.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"expected {len(reader.fieldnames or ())} cells as in its first line")
            yield f"{path}:{reader.line_num}", {name: value or None for name, value in row.items()}
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}. Correct the line.") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: no readable Parquet file ({error}). Write it again.") from None
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows))
