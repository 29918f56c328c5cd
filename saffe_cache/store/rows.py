"""Rows of one array by number, from shards that are opened when needed.

Each shard is compared with its checksum before its first row is returned. A local uncompressed shard is memory-mapped.
Others are loaded whole and decompressed by background threads: sequential reads find the next shard loaded, and callers
that know which rows they need can request them ahead. From an object store, a few rows of an uncompressed shard are
read in pieces (pieces.py), and shards that were loaded whole may be kept on the local disk.
"""

from __future__ import annotations

import logging
import math
import mmap
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib.stride_tricks import as_strided

from saffe_cache.core.devices import num_cores
from saffe_cache.core.features import CacheError
from saffe_cache.store.arrays import ArrayFiles
from saffe_cache.store.dtypes import from_storage
from saffe_cache.store.files import MappedFile
from saffe_cache.store.layout import ShardEntry, check_rows, decode_shard
from saffe_cache.store.pieces import Pieces, between, local_copies, missing_shard

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 2**18
"""Bytes of a file that are read at once."""
_MAX_MAPPED = 8192
"""Mapped shards of one array. Linux grants a process 65,530 memory maps."""
_FEW = 8
"""Less than this part of a shard is read in pieces."""
_SPARE_BYTES, _MIN_SPARE = 2**28, 4
"""Loaded shards of one array that are kept although nobody holds them: this many bytes, but at least this many."""


class RowReader:
    """Rows of one array by number, for any thread. A random row of a local cache costs one memory-mapped read."""

    def __init__(self, files: ArrayFiles, entries: Sequence[ShardEntry]) -> None:
        """`entries`: the manifest's entries of the array's shards."""
        self._files, self.spec, self._num_rows = files, files.spec, sum(one.rows for one in entries)
        self._shards = OpenShards(files, entries)
        self.is_mapped = self._shards.are_mapped
        """Whether shards are files on the local disk that rows are read from as they are."""
        in_pieces = files.spec.compression == "none" and files.storage.objects is not None
        self._pieces = Pieces(files, entries) if in_pieces else None
        self._next = 0
        """The row after those that were read last: who goes on there reads all."""
        self._ahead: tuple[np.ndarray, Future[np.ndarray]] | None = None
        """Rows that were requested in pieces ahead, ascending."""

    def __len__(self) -> int:
        return self._num_rows

    def hold(self, rows: np.ndarray) -> None:
        """Prefetch rows that will be read next.

        Their shards are loaded and kept until the next call; all others are released. For mapped shards, the operating
        system is asked to read the rows in advance.

        Raises:
            CacheError: a row is beyond the array; a mapped shard is missing, truncated or damaged.
        """
        self._check(rows)
        rows = np.unique(rows)
        if self._pieces is not None:
            few = self._few_of_their_shard(rows, is_read=False)
            scattered, rows, pieces = rows[few], rows[~few], self._pieces
            self._ahead = (scattered, _loaders().submit(pieces.read, scattered)) if len(scattered) else None
        shards, within = np.divmod(rows, self.spec.shard_rows)
        if not self.is_mapped or not len(rows):
            self._shards.hold(np.unique(shards).tolist())
            return
        for start, stop in between((shards[1:] != shards[:-1]) | (rows[1:] != rows[:-1] + 1)).tolist():
            self._shards.will_need(int(shards[start]), int(within[start]), int(within[stop - 1]) + 1)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Rows as numbers: `rows` is int64 [n] in any order; returns [n, *row_shape], float32 for bfloat16 and scaled
        types.

        Raises:
            CacheError: as `read_stored`.
        """
        return from_storage(self.read_stored(rows), self.spec.dtype)

    def read_stored(self, rows: np.ndarray) -> np.ndarray:
        """Rows as they are stored: [n, *stored_shape].

        Raises:
            CacheError: a row is beyond the array, or a shard is missing, truncated or damaged.
        """
        spec = self.spec
        self._check(rows)
        if not len(rows):
            return np.empty((0, *spec.stored_shape), spec.numpy_dtype)
        few = np.zeros(len(rows), bool) if self._goes_on(rows) else self._few_of_their_shard(rows, is_read=True)
        if not few.any():
            return self._of_whole_shards(rows).reshape(len(rows), *spec.stored_shape)
        result = np.empty((len(rows), math.prod(spec.stored_shape)), spec.numpy_dtype)
        result[few] = self._in_pieces(rows[few])
        if not few.all():
            result[~few] = self._of_whole_shards(rows[~few])
        return result.reshape(len(rows), *spec.stored_shape)

    def _of_whole_shards(self, rows: np.ndarray) -> np.ndarray:
        """Rows from shards that are open, [n, numbers of a row]."""
        spec = self.spec
        shards, within = np.divmod(rows, spec.shard_rows)
        is_sorted = bool((shards[1:] >= shards[:-1]).all())
        if self.is_mapped and not is_sorted:
            return self._gathered(shards, within)
        result = np.empty((len(rows), math.prod(spec.stored_shape)), spec.numpy_dtype)
        if is_sorted:
            for start, stop in between(shards[1:] != shards[:-1]).tolist():
                # mode="clip" lets numpy write into `result` directly; all rows lie within the shard
                np.take(self._shards[int(shards[start])], within[start:stop], 0, result[start:stop], mode="clip")
            return result
        for number in np.unique(shards).tolist():
            here = np.flatnonzero(shards == number)
            result[here] = self._shards[number][within[here]]
        return result

    def _gathered(self, shards: np.ndarray, within: np.ndarray) -> np.ndarray:
        """Rows of mapped shards in any order, copied once, by one call for all shards.

        The memory from the lowest shard on is indexed as if a row began at every multiple of `step` bytes. Shards begin
        at pages; what lies between them is not touched.
        """
        opened = {number: self._shards[number] for number in set(shards.tolist())}
        step = math.gcd(self.spec.row_bytes, mmap.PAGESIZE)
        addresses = {number: shard.ctypes.data for number, shard in opened.items()}
        lowest = min(addresses, key=addresses.__getitem__)
        starts = np.zeros(max(opened) + 1, np.int64)
        starts[[*opened]] = [(address - addresses[lowest]) // step for address in addresses.values()]
        places = starts[shards] + within * (self.spec.row_bytes // step)
        one_each = opened[lowest].view(np.dtype((np.void, self.spec.row_bytes)))[:, 0]
        found: np.ndarray = as_strided(one_each, (int(places.max()) + 1,), (step,), writeable=False)[places]
        return found.view(self.spec.numpy_dtype).reshape(len(places), -1)

    def read_range(self, start: int, stop: int) -> np.ndarray:
        """Consecutive rows."""
        return self.read(np.arange(start, stop))

    def _goes_on(self, rows: np.ndarray) -> bool:
        """Whether these rows follow, one after the other, those that were read last, or are never read in pieces."""
        if self._pieces is None:
            return True
        follows = rows[0] == self._next and bool((np.diff(rows) == 1).all())
        self._next = int(rows[-1]) + 1
        return follows

    def _few_of_their_shard(self, rows: np.ndarray, *, is_read: bool) -> np.ndarray:
        """bool [n]: whether a row's shard is not loaded, and has too few of these rows to be loaded whole."""
        numbers, places, counts = np.unique(rows // self.spec.shard_rows, return_inverse=True, return_counts=True)
        few = [
            count * _FEW < self.spec.shard_rows and not self._shards.is_at_hand(number, count * is_read)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
        ]
        return np.array(few, bool)[places]

    def _in_pieces(self, rows: np.ndarray) -> np.ndarray:
        assert self._pieces is not None
        if self._ahead is None:
            return self._pieces.read(rows)
        ahead, future = self._ahead
        places = np.minimum(np.searchsorted(ahead, rows), len(ahead) - 1)
        known = ahead[places] == rows
        if known.all():
            return future.result()[places]
        result = np.empty((len(rows), math.prod(self.spec.stored_shape)), self.spec.numpy_dtype)
        result[known], result[~known] = future.result()[places[known]], self._pieces.read(rows[~known])
        return result

    def _check(self, rows: np.ndarray) -> None:
        beyond = rows[(rows < 0) | (rows >= len(self))]
        if len(beyond):
            raise CacheError(
                f"{self._files.storage.root}: {self._files.folder} has {len(self)} rows, row {beyond[0]} was "
                "requested. Run saffe extract again to complete it."
            )


class OpenShards:
    """Shards by number, for any thread: [rows, numbers of a row]."""

    def __init__(self, files: ArrayFiles, entries: Sequence[ShardEntry]) -> None:
        self._files, self._storage, self._spec, self._entries = files, files.storage, files.spec, entries
        self.are_mapped = files.spec.compression == "none" and files.storage.local_path("zarr.json") is not None
        self._mapped: dict[int, tuple[np.ndarray, MappedFile]] = {}
        self._checked: set[int] = set()
        self._loaded: OrderedDict[int, Future[np.ndarray]] = OrderedDict()
        self._held: set[int] = set()
        self._lock = threading.Lock()
        self._copies = local_copies(files)
        self._read_rows: Counter[int] = Counter()
        """Rows that were read of each shard in pieces."""
        self._max_spare = max(_MIN_SPARE, _SPARE_BYTES // max(1, files.spec.shard_rows * files.spec.row_bytes))

    def __getitem__(self, index: int) -> np.ndarray:
        """Raises CacheError if the shard is missing, truncated or damaged."""
        return self._map(index)[0] if self.are_mapped else self._load(index).result()

    def is_at_hand(self, index: int, rows: int) -> bool:
        """Whether a shard needs no request, or should be loaded whole as so many of its rows are read.

        With copies on the local disk, a shard is loaded whole once half its rows were read in pieces.
        """
        if index in self._loaded:
            return True
        if self._copies is None:
            return False
        self._read_rows[index] += rows
        half = 2 * self._read_rows[index] >= self._entries[index].rows
        return half or self._copies.find(self._files, index, self._entries[index]) is not None

    def hold(self, indices: Iterable[int]) -> None:
        """Load shards that cannot be mapped, keep them until the next call, and release all others."""
        with self._lock:
            self._held = set(indices)
            for index in self._loaded.keys() - self._held:
                del self._loaded[index]
            for index in sorted(self._held):
                self._start(index)

    def will_need(self, index: int, first: int, stop: int) -> None:
        """Ask the operating system to read rows of a mapped shard in advance, without waiting for them."""
        self._map(index)[1].will_need(first * self._spec.row_bytes, stop * self._spec.row_bytes)

    def _map(self, index: int) -> tuple[np.ndarray, MappedFile]:
        """Open a shard; above the limit, the one opened first is closed. A reopened shard is not checked again."""
        with self._lock:
            if index not in self._mapped:
                while len(self._mapped) >= _MAX_MAPPED:
                    del self._mapped[next(iter(self._mapped))]
                self._mapped[index] = self._open(index, self._storage.local_path(self._files.shard(index)))
            return self._mapped[index]

    def _open(self, index: int, path: Path | None) -> tuple[np.ndarray, MappedFile]:
        spec, entry, name = self._spec, self._entries[index], self._files.shard(index)
        assert path is not None
        if not path.exists() or path.stat().st_size < spec.shard_file_bytes(entry.rows):
            raise missing_shard(self._files, index)
        if index not in self._checked:
            with path.open("rb") as file:
                check_rows(entry, _blocks(file, entry.rows * spec.row_bytes), f"{self._storage.root}: {name}")
            self._checked.add(index)
        mapped = MappedFile(path)
        rows = mapped.bytes[: entry.rows * spec.row_bytes].view(spec.numpy_dtype)
        return rows.reshape(entry.rows, -1), mapped

    def _load(self, index: int) -> Future[np.ndarray]:
        """Load a shard. During sequential reads without `hold`, also prefetch the next one."""
        with self._lock:
            if not self._held and index - 1 in self._loaded and index + 1 < len(self._entries):
                self._start(index + 1)
            future = self._start(index)
            self._loaded.move_to_end(index)
            spare = [one for one in self._loaded if one not in self._held]
            for one in spare[: -self._max_spare]:
                del self._loaded[one]
            return future

    def _start(self, index: int) -> Future[np.ndarray]:
        """Start loading a shard unless it is loaded or loading; a failed load is tried again."""
        future = self._loaded.get(index)
        if future is None or (future.done() and future.exception() is not None):
            future = self._loaded[index] = _loaders().submit(self._fetch, index)
        return future

    def _fetch(self, index: int) -> np.ndarray:
        entry = self._entries[index]
        if self._copies is None:
            return self._files.read(index, entry).reshape(entry.rows, -1)
        path = self._copies.find(self._files, index, entry)
        if path is not None:
            try:
                return self._read_copy(index, path)
            except (CacheError, OSError) as error:  # another process may just have removed it
                logger.info("%s is loaded again (%s).", path, error)
                path.unlink(missing_ok=True)
        return self._copies.load(self._files, index, entry).reshape(entry.rows, -1)

    def _read_copy(self, index: int, path: Path) -> np.ndarray:
        if self._spec.compression == "none":
            return self._open(index, path)[0]
        entry = self._entries[index]
        return decode_shard(self._spec, entry, path.read_bytes(), str(path)).reshape(entry.rows, -1)


@cache
def _loaders() -> ThreadPoolExecutor:
    """Threads shared by the whole process. No task of theirs waits for another."""
    return ThreadPoolExecutor(max(4, num_cores()), "shard-loader")


def _blocks(file: IO[bytes], num_bytes: int) -> Iterator[bytes]:
    """The first bytes of a file, read sequentially: mapped bytes would count as memory of this process."""
    for start in range(0, num_bytes, _BLOCK_BYTES):
        yield file.read(min(_BLOCK_BYTES, num_bytes - start))
