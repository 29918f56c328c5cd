"""Rows of one array by number, from shards that are opened when needed.

Each shard is compared with its checksum before its first row is returned. A local uncompressed shard is memory-mapped.
Others are loaded whole and decompressed by background threads: sequential reads find the next shard loaded, and callers
that know which rows they need can request them ahead.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import IO

import numpy as np

from saffe_cache.core.features import CacheError
from saffe_cache.store.dtypes import from_storage
from saffe_cache.store.files import MappedFile
from saffe_cache.store.layout import ShardEntry, check_rows
from saffe_cache.store.manifest import ArrayFiles

_LONG_RUN_BYTES = 2**13
"""Runs of consecutive rows of this average size are copied one by one, which is faster than indexing all rows."""
_BLOCK_BYTES = 2**18
"""Bytes of a file that are read at once."""
_MAX_MAPPED = 8192
"""Mapped shards of one array. Linux grants a process 65,530 memory maps."""
_SPARE_BYTES, _MIN_SPARE = 2**28, 4
"""Loaded shards of one array that are kept although nobody holds them: this many bytes, but at least this many."""


class RowReader:
    """Rows of one array by number, for any thread. A random row of a local cache costs one memory-mapped read."""

    def __init__(self, files: ArrayFiles, entries: Sequence[ShardEntry]) -> None:
        """`entries`: the manifest's entries of the array's shards."""
        self._files, self.spec, self._num_rows = files, files.spec, sum(one.rows for one in entries)
        self._shards = OpenShards(files, entries)
        self.is_mapped = self._shards.are_mapped
        """Whether reading a row reads that row alone; otherwise its whole shard is loaded."""

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
        shards, within = np.divmod(rows, self.spec.shard_rows)
        if not self.is_mapped or not len(rows):
            self._shards.hold(np.unique(shards).tolist())
            return
        for start, stop in _runs((shards[1:] != shards[:-1]) | (rows[1:] != rows[:-1] + 1)).tolist():
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
        result = np.empty((len(rows), math.prod(spec.stored_shape)), spec.numpy_dtype)
        shards, within = np.divmod(rows, spec.shard_rows)
        changes = shards[1:] != shards[:-1]
        if (shards[1:] >= shards[:-1]).all():
            for start, stop in _runs(changes).tolist():
                # mode="clip" lets numpy write into `result` directly; all rows lie within the shard
                np.take(self._shards[int(shards[start])], within[start:stop], 0, result[start:stop], mode="clip")
            return result.reshape(len(rows), *spec.stored_shape)
        runs = _runs(changes | (rows[1:] != rows[:-1] + 1))
        if result.nbytes >= _LONG_RUN_BYTES * len(runs):
            self._copy_runs(runs, shards, within, result)
        else:
            for number in np.unique(shards).tolist():
                here = np.flatnonzero(shards == number)
                result[here] = self._shards[number][within[here]]
        return result.reshape(len(rows), *spec.stored_shape)

    def read_range(self, start: int, stop: int) -> np.ndarray:
        """Consecutive rows."""
        return self.read(np.arange(start, stop))

    def _check(self, rows: np.ndarray) -> None:
        beyond = rows[(rows < 0) | (rows >= len(self))]
        if len(beyond):
            raise CacheError(
                f"{self._files.storage.root}: {self._files.folder} has {len(self)} rows, row {beyond[0]} was "
                "requested. Run saffe extract again to complete it."
            )

    def _copy_runs(self, runs: np.ndarray, shards: np.ndarray, within: np.ndarray, result: np.ndarray) -> None:
        """Copy runs of consecutive rows, ordered by shard so that each shard is opened once."""
        runs = runs[np.argsort(shards[runs[:, 0]], kind="stable")]
        numbers, firsts = shards[runs[:, 0]].tolist(), within[runs[:, 0]].tolist()
        opened, shard = -1, result
        for (start, stop), number, first in zip(runs.tolist(), numbers, firsts, strict=True):
            if number != opened:
                opened, shard = number, self._shards[number]
            if stop - start == 1:
                result[start] = shard[first]  # faster than a slice of one row
            else:
                result[start:stop] = shard[first : first + stop - start]


def _runs(breaks: np.ndarray) -> np.ndarray:
    """int64 [n, 2]: starts and stops of runs among `len(breaks) + 1` places; a break starts a run at the next place."""
    starts = np.flatnonzero(np.append(True, breaks))
    return np.stack([starts, np.append(starts[1:], len(breaks) + 1)], axis=1)


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
        self._max_spare = max(_MIN_SPARE, _SPARE_BYTES // max(1, files.spec.shard_rows * files.spec.row_bytes))

    def __getitem__(self, index: int) -> np.ndarray:
        """Raises CacheError if the shard is missing, truncated or damaged."""
        return self._map(index)[0] if self.are_mapped else self._load(index).result()

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
                self._mapped[index] = self._open(index)
            return self._mapped[index]

    def _open(self, index: int) -> tuple[np.ndarray, MappedFile]:
        spec, entry, name = self._spec, self._entries[index], self._files.shard(index)
        path = self._storage.local_path(name)
        assert path is not None
        if not path.exists() or path.stat().st_size < spec.shard_file_bytes(entry.rows):
            raise CacheError(
                f"{self._storage.root}: {name} is missing or truncated. Run `saffe cache verify` to list all damage "
                "and `saffe cache repair` to repair it."
            )
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
        return self._files.read(index, entry).reshape(entry.rows, -1)


@cache
def _loaders() -> ThreadPoolExecutor:
    """Threads shared by the whole process. No task of theirs waits for another."""
    return ThreadPoolExecutor(max(4, os.cpu_count() or 1), "shard-loader")


def _blocks(file: IO[bytes], num_bytes: int) -> Iterator[np.ndarray]:
    """The first bytes of a file, read sequentially: mapped bytes would count as memory of this process."""
    for start in range(0, num_bytes, _BLOCK_BYTES):
        yield np.frombuffer(file.read(min(_BLOCK_BYTES, num_bytes - start)), np.uint8)
