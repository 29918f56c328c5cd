"""Rows of shards behind a URL without the rest of their shards, and whole shards kept on the local disk.

A piece of a shard cannot be compared with the shard's checksum. What is checked instead: the object has the size that
the manifest implies, each answer has the length that was requested, and all pieces of a shard are of one version of the
object, by its etag. An object that was replaced in the meantime is loaded whole and compared with its checksum.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saffe_cache.core.atomic_io import Buffer
from saffe_cache.core.features import CacheError
from saffe_cache.store.layout import ShardEntry, decode_shard
from saffe_cache.store.objects import ReplacedError, number_from_environment

if TYPE_CHECKING:
    from saffe_cache.store.arrays import ArrayFiles

logger = logging.getLogger(__name__)

_GAP_BYTES = 2**17
"""Rows that are this near are read in one request, together with what lies between them."""
_PIECE_BYTES = 2**23
"""Most bytes of a request; more are several requests side by side."""
_REQUESTS = 32
"""Requests side by side, since each mostly waits."""
_DEFAULT_GB = 50.0


class Pieces:
    """Rows of one array's uncompressed shards in an object store, for any thread."""

    def __init__(self, files: ArrayFiles, entries: Sequence[ShardEntry]) -> None:
        assert files.storage.objects is not None
        self._objects = files.storage.objects
        self._files, self._entries = files, entries
        self._etags: dict[int, str | None] = {}

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Rows as they are stored, [n, numbers of a row]; `rows` is int64 [n] in any order.

        Raises:
            CacheError: a shard is missing or truncated, or was replaced by another one.
        """
        spec = self._files.spec
        wanted, places = np.unique(rows, return_inverse=True)
        shards, within = np.divmod(wanted, spec.shard_rows)
        most = max(1, _PIECE_BYTES // spec.row_bytes)
        breaks = (shards[1:] != shards[:-1]) | (wanted[1:] - wanted[:-1] > 1 + _GAP_BYTES // spec.row_bytes)
        breaks |= within[1:] // most != within[:-1] // most
        runs = between(breaks).tolist()
        spans = [(int(shards[start]), int(within[start]), int(within[stop - 1]) + 1) for start, stop in runs]
        found = [
            piece[within[start:stop] - first]
            for piece, (start, stop), (_, first, _) in zip(
                _requests().map(lambda span: self._request(*span), spans), runs, spans, strict=True
            )
        ]
        return np.concatenate(found)[places]

    def _request(self, index: int, first: int, stop: int) -> np.ndarray:
        """Consecutive rows of one shard."""
        spec, entry, name = self._files.spec, self._entries[index], self._files.shard(index)
        start, end = first * spec.row_bytes, stop * spec.row_bytes
        etag = self._etags.get(index)
        try:
            data, size, version = self._objects.read_version(name, start, end, etag)
            if self._etags.setdefault(index, version) != version:
                raise ReplacedError(name)
        except FileNotFoundError:
            data, size = b"", 0
        except ReplacedError:
            rows = self._files.read(index, entry).reshape(entry.rows, -1)
            self._etags.pop(index, None)
            return rows[first:stop]
        if size < spec.shard_file_bytes(entry.rows) or len(data) != end - start:
            raise missing_shard(self._files, index)
        return np.frombuffer(data, spec.numpy_dtype).reshape(stop - first, -1)


def missing_shard(files: ArrayFiles, index: int) -> CacheError:
    return CacheError(
        f"{files.storage.root}: {files.shard(index)} is missing or truncated. Run `saffe cache verify` to list all "
        "damage and `saffe cache repair` to repair it."
    )


def between(breaks: np.ndarray) -> np.ndarray:
    """int64 [n, 2]: starts and stops of runs among `len(breaks) + 1` places; a break starts a run at the next place."""
    starts = np.flatnonzero(np.append(True, breaks))
    return np.stack([starts, np.append(starts[1:], len(breaks) + 1)], axis=1)


@cache
def _requests() -> ThreadPoolExecutor:
    """Threads shared by the whole process. No task of theirs waits for another."""
    return ThreadPoolExecutor(_REQUESTS, "shard-piece")


class LocalCopies:
    """Files of shards on the local disk, by the shard's place and checksum, up to a number of bytes.

    Several processes may share the folder. A copy is compared with its checksum before it is used.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes

    def find(self, files: ArrayFiles, index: int, entry: ShardEntry) -> Path | None:
        """The copy of a shard; it counts as used now."""
        path = self._path(files, index, entry)
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    def load(self, files: ArrayFiles, index: int, entry: ShardEntry) -> np.ndarray:
        """The rows of a shard from its URL, checked; a copy is kept if there is room."""
        name = files.shard(index)
        data = files.storage.read_buffer(name)
        rows = decode_shard(files.spec, entry, data, f"{files.storage.root}: {name}")
        try:
            self._keep(self._path(files, index, entry), data)
        except OSError as error:
            logger.warning("%s: no copy of a shard could be kept (%s).", self._folder, error)
        return rows

    def _keep(self, path: Path, data: Buffer) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        try:
            self._make_room(len(data))
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Remove what was not used for longest, as far as needed. Another process may remove the same."""
        kept = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                kept.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in kept) + num_bytes - self._most_bytes
        for _, size, path in sorted(kept):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _path(self, files: ArrayFiles, index: int, entry: ShardEntry) -> Path:
        what = f"{files.storage.root}\n{files.shard(index)}\n{entry.rows}\n{entry.crc32c}"
        return self._folder / f"{sha256(what.encode()).hexdigest()}.shard"


def local_copies(files: ArrayFiles) -> LocalCopies | None:
    """What the environment asks for: SAFFE_CACHE_DIR, and SAFFE_CACHE_DIR_GB; None for caches on the local disk."""
    folder = os.environ.get("SAFFE_CACHE_DIR")
    if not folder or files.storage.local_path("zarr.json") is not None:
        return None
    return LocalCopies(Path(folder).expanduser(), int(1e9 * number_from_environment("SAFFE_CACHE_DIR_GB", _DEFAULT_GB)))
