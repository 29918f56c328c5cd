"""What photos and sounds contain: the hash and the kind of their content, remembered from one run to the next.

A file with the path, size, times and inode of an earlier run is not read again, nor is a member of such an archive.
What was read is remembered in the user's cache folder, in one file for each dataset: a stream of Arrow and its
checksum. Whoever writes it adds to what is there and replaces it as a whole, so several processes may; if it is damaged
or cannot be written, files are read again. As in git, a file that was changed less than two seconds before it was read
is not remembered: on a coarse clock, its next change could have the same time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from saffe_cache.core.atomic_io import whole_file
from saffe_cache.core.features import MODALITIES, Modality
from saffe_cache.sources.decoding import CONTENT_RULES, modality_of_content
from saffe_cache.sources.items import Media, MediaFile, NoMediaError, SourceItem, is_file_fault

logger = logging.getLogger(__name__)

_FLAWS = (
    "",
    "the file is empty",
    "a pointer of Git LFS, not the file. Run git lfs pull",
)
"""What may be wrong with content, by the number that is remembered."""
_LFS_POINTER = b"version https://git-lfs"
_COARSE_NS = 2 * 10**9
"""Coarsest times of files, in ns: those of FAT."""
_ITEMS_AT_ONCE = 4096
_READ_AT_ONCE, _STATES_AT_ONCE = 16, 512
"""Files per task of a thread."""
_SAVED_EVERY = 60.0
"""Seconds of reading that are lost at most if the process is killed."""
_NO_FILE = (-1, -1, -1, -1)
_SCHEMA = pa.schema(
    [
        pa.field("name", pa.large_binary(), nullable=False),  # below the dataset's folder, if it lies there
        *(pa.field(name, pa.int64(), nullable=False) for name in ("size", "mtime_ns", "ctime_ns", "inode")),
        pa.field("sha256", pa.binary(32), nullable=False),
        pa.field("kind", pa.int8(), nullable=False),  # in MODALITIES; -1 where the content does not show it
        pa.field("flaw", pa.int8(), nullable=False),
    ],
    metadata={"rules": CONTENT_RULES},
)

T = TypeVar("T")
State = tuple[int, int, int, int]
"""Size, times of the last changes of content and of the entry (ns), and inode of a file."""


class Content(NamedTuple):
    """What a file was found to contain."""

    sha256: bytes
    kind: Modality | None
    """By its first bytes; None where they do not show it."""
    flaw: str = ""
    """Why it is no photo or sound, whatever its name says; empty if nothing is known against it."""


Found = Content | OSError
"""Or why it cannot be read."""


def content_of(data: bytes) -> Content:
    flaw = 1 if not data else 2 if data.startswith(_LFS_POINTER) else 0
    return Content(hashlib.sha256(data).digest(), modality_of_content(data), _FLAWS[flaw])


def read_content(media: Media) -> Found:
    """
    Raises:
        OSError: the machine's fault, not the file's.
    """
    try:
        return content_of(media.read())
    except OSError as error:
        if not is_file_fault(error):
            raise
        return error


def hashed(item: SourceItem) -> SourceItem:
    """The item with the hashes of its media, which are read."""
    return item if item.hashes else _with_content(item, [read_content(media) for media in item.media.values()])


def hash_items(items: Sequence[SourceItem], data: str | None, where: str, *, rehash: bool = False) -> list[SourceItem]:
    """The items with the hashes of their media; only those are read that changed since they were remembered.

    Args:
        data: what the hashes are remembered under; None reads all, and remembers nothing.
        where: the data in one line.
        rehash: read all, and remember what is found instead.
    """
    memory = _Memory(data, items, is_ignored=rehash) if data is not None else None
    found: list[SourceItem] = []
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(items), unit=" items", desc=f"reading {where}", leave=False) as progress,
    ):
        try:
            for start in range(0, len(items), _ITEMS_AT_ONCE):
                part = items[start : start + _ITEMS_AT_ONCE]
                media = [one for item in part if not item.hashes for one in item.media.values()]
                contents = memory.read(media, pool) if memory else _in_parts(pool, read_content, media, _READ_AT_ONCE)
                for item in part:
                    found.append(item if item.hashes else _with_content(item, [next(contents) for _ in item.media]))
                    progress.update()
        finally:
            if memory:
                memory.save()
    return found


def _with_content(item: SourceItem, found: Sequence[Found]) -> SourceItem:
    """The item whose media have this content, which decides what they are; a picture in a column of videos stays there,
    as an animated one."""
    problem, hashes, media = item.problem, {}, dict[Modality, Media]()
    has_any = not all(isinstance(content, NoMediaError) for content in found)
    for (modality, one), content in zip(item.media.items(), found, strict=True):
        if has_any and isinstance(content, NoMediaError):
            continue
        if isinstance(content, OSError):
            problem = problem or f"unreadable {modality}: {content.strerror or content}"
            media[modality] = one
            continue
        other = content.kind
        is_animation = modality == "video" and other == "image"
        kind = other if other and other not in item.media and not is_animation else modality
        media[kind], hashes[kind] = one, content.sha256
        if content.flaw:
            problem = problem or f"unreadable {modality}: {content.flaw}"
    return replace(item, hashes=hashes, problem=problem, media=media)


class _Memory:
    """What is remembered of a dataset's files, and what was read since."""

    def __init__(self, data: str, items: Sequence[SourceItem], *, is_ignored: bool) -> None:
        folder = os.path.abspath(os.path.expanduser(data))
        self._path = _cache_folder() / "content" / f"{hashlib.sha256(_utf8(folder)).hexdigest()[:32]}.arrow"
        self._name_of = partial(_name_of, folder=folder + os.sep, beside=os.getcwd() + os.sep)
        self._new: list[tuple[bytes, State, Content]] = []
        self._saved = time.monotonic()
        known = _SCHEMA.empty_table() if is_ignored else _load(self._path)
        self._states = np.stack([known[name].to_numpy() for name in ("size", "mtime_ns", "ctime_ns", "inode")], axis=1)
        self._content = known.select(["sha256", "kind", "flaw"])
        media = (one for item in items if not item.hashes for one in item.media.values())
        self._rows = iter(self._rows_of(media, known["name"]))

    def _rows_of(self, media: Iterator[Media], known: pa.ChunkedArray) -> np.ndarray:
        """The row of what is remembered of each medium, -1 for none."""
        names = pa.array(map(self._name_of, media), pa.large_binary())
        return pc.index_in(names, value_set=known).fill_null(-1).to_numpy() if len(known) else np.full(len(names), -1)

    def read(self, media: Sequence[Media], pool: Executor) -> Iterator[Found]:
        """What the next media contain, in order."""
        rows = np.fromiter(self._rows, np.int64, len(media))
        asked = [one for one, row in zip(media, rows, strict=True) if row >= 0]
        states = np.array(list(_in_parts(pool, _state_of, asked, _STATES_AT_ONCE)), np.int64).reshape(-1, 4)
        at = np.flatnonzero(rows >= 0)
        rows[at[(states != self._states[rows[at]]).any(axis=1)]] = -1
        remembered = iter(self._content.take(rows[rows >= 0]).to_pylist())
        unknown = [one for one, row in zip(media, rows, strict=True) if row < 0]
        read = _in_parts(pool, _read_with_state, unknown, _READ_AT_ONCE)
        for one, row in zip(media, rows, strict=True):
            if row >= 0:
                known = next(remembered)
                yield Content(
                    known["sha256"], MODALITIES[known["kind"]] if known["kind"] >= 0 else None, _FLAWS[known["flaw"]]
                )
                continue
            content, state = next(read)
            name = self._name_of(one)
            if name is not None and state is not None and isinstance(content, Content):
                self._new.append((name, state, content))
            yield content
        if time.monotonic() - self._saved > _SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """Add what was read to what is remembered by now, unless the folder cannot be written."""
        if not self._new:
            return
        names, states, contents = zip(*self._new, strict=True)
        hashes = [one.sha256 for one in contents]
        kinds = [MODALITIES.index(one.kind) if one.kind else -1 for one in contents]
        flaws = [_FLAWS.index(one.flaw) for one in contents]
        columns = [names, *zip(*states, strict=True), hashes, kinds, flaws]
        new = pa.table([pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)], _SCHEMA)
        old = _load(self._path)  # another process may have added to it
        old = old.filter(pc.invert(pc.is_in(old["name"], value_set=new["name"])))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, _SCHEMA) as stream:
            stream.write_table(pa.concat_tables([old, new]).combine_chunks())
        data = sink.getvalue()
        try:
            with whole_file(self._path) as file:
                file.write(data)
                file.write(zlib.crc32(data).to_bytes(4, "little"))
        except OSError as error:
            logger.debug("%s cannot be written (%s): the files will be read again.", self._path, error)
        self._new, self._saved = [], time.monotonic()


def _cache_folder() -> Path:
    """As the XDG Base Directory Specification says, on every system; a user without a home has nothing remembered."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    folder = chosen if os.path.isabs(chosen) else os.path.expanduser("~/.cache")
    return Path(folder if os.path.isabs(folder) else os.devnull) / "saffe_cache"


def _load(path: Path) -> pa.Table:
    """What a file remembers; nothing if there is none, or if it is damaged or by other rules."""
    try:
        data = path.read_bytes()
        if zlib.crc32(memoryview(data)[:-4]).to_bytes(4, "little") != data[-4:]:
            raise pa.ArrowInvalid("its checksum is wrong")
        table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
        if not table.schema.equals(_SCHEMA, check_metadata=True):
            raise pa.ArrowInvalid("another release wrote it")
        return table
    except FileNotFoundError:
        pass
    except (OSError, pa.ArrowException) as error:
        logger.debug("%s is not used (%s): files are read again.", path, error)
    return _SCHEMA.empty_table()


def _name_of(media: Media, *, folder: str, beside: str) -> bytes | None:
    """What a medium is remembered by: its path, from the dataset's folder on if it lies there, and its place in it.

    None for media that are in no file of their own nor in an archive.
    """
    if not isinstance(media, MediaFile):
        return None
    path = media.path if os.path.isabs(media.path) else beside + media.path
    name = _utf8(path.removeprefix(folder))
    return name if media.size is None else name + b"\0%d+%d" % (media.start, media.size)


def _utf8(path: str) -> bytes:
    return path.encode("utf-8", "surrogatepass")


def _state_of(media: Media) -> State:
    if not isinstance(media, MediaFile):
        return _NO_FILE
    try:
        status = os.stat(media.path)
    except (OSError, ValueError):
        return _NO_FILE
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & (2**63 - 1)


def _read_with_state(media: Media) -> tuple[Found, State | None]:
    """The content of a file and its state; None for the latter if its next change might not show in it."""
    now, before = time.time_ns(), _state_of(media)
    content, state = read_content(media), _state_of(media)
    is_clear = state == before != _NO_FILE and state[1] < now - _COARSE_NS
    return content, state if is_clear else None


def _in_parts(pool: Executor, function: Callable[[Media], T], media: Sequence[Media], size: int) -> Iterator[T]:
    """A function's results for media, in order, where each task of a thread is a part of so many."""
    parts = [media[start : start + size] for start in range(0, len(media), size)]
    return chain.from_iterable(pool.map(lambda part: [function(one) for one in part], parts))
