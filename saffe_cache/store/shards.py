"""The shards of one array, open for reading.

Each is compared with its checksum before the first of its rows is handed out.

A local uncompressed shard is memory-mapped. One that is compressed, or lies behind a URL, is fetched whole,
decompressed and kept in memory, by threads of this module: who reads shard after shard finds the next one ready, and
who knows what is needed soon holds it.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import IO, NamedTuple

import numpy as np

from saffe_cache.core.features import CacheError
from saffe_cache.store.layout import check_rows, decode_shard
from saffe_cache.store.manifest import ArrayManifest
from saffe_cache.store.storage import Storage
from saffe_cache.store.zarr_files import shard_name

_BLOCK_BYTES = 2**18
"""Of a file, read at once."""
_MAX_MAPPED = 64
"""Of one array. A memory map holds a file open, of which a process may have 1024."""
_SPARE_BYTES, _LEAST_SPARE = 2**28, 4
"""Loaded shards of one array that are kept although nobody holds them: so many bytes, but at least so many shards."""


class _Mapped(NamedTuple):
    """A shard's file."""

    rows: np.ndarray
    memory: mmap.mmap


class OpenShards:
    """Shards by number, for any thread: [rows, numbers of a row]."""

    def __init__(self, storage: Storage, folder: str, array: ArrayManifest) -> None:
        self._storage, self._folder, self._array = storage, folder, array
        self._mapped: dict[int, _Mapped] = {}
        self._checked: set[int] = set()
        self._loaded: OrderedDict[int, Future[np.ndarray]] = OrderedDict()
        self._held: set[int] = set()
        self._lock = threading.Lock()
        self._max_spare = max(_LEAST_SPARE, _SPARE_BYTES // max(1, array.spec.shard_rows * array.spec.row_bytes))

    @property
    def are_mapped(self) -> bool:
        return self._array.spec.compression == "none" and self._storage.local_path("zarr.json") is not None

    def __getitem__(self, index: int) -> np.ndarray:
        """
        Raises:
            CacheError: the shard is missing or truncated, or a byte differs.
        """
        return self._map(index).rows if self.are_mapped else self._load(index).result()

    def hold(self, indices: Iterable[int]) -> None:
        """Load these, which cannot be mapped, ahead and keep them until the next call; let go of all others."""
        with self._lock:
            self._held = set(indices)
            for index in self._loaded.keys() - self._held:
                del self._loaded[index]
            for index in sorted(self._held):
                self._start(index)

    def will_need(self, index: int, first: int, stop: int) -> None:
        """Rows of a mapped shard that are read next: the system fetches what it does not have, and nobody waits."""
        memory, row_bytes = self._map(index).memory, self._array.spec.row_bytes
        start = first * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_WILLNEED"):  # not on Windows
            memory.madvise(mmap.MADV_WILLNEED, start, stop * row_bytes - start)

    def _map(self, index: int) -> _Mapped:
        """The one opened first is closed where too many are open; one that is opened again is not checked again."""
        with self._lock:
            if index not in self._mapped:
                while len(self._mapped) >= _MAX_MAPPED:
                    del self._mapped[next(iter(self._mapped))]
                self._mapped[index] = self._open(index)
            return self._mapped[index]

    def _open(self, index: int) -> _Mapped:
        spec, entry, name = self._array.spec, self._array.shards[index], self._name(index)
        path = self._storage.local_path(name)
        assert path is not None
        if not path.exists() or path.stat().st_size < spec.shard_file_bytes(entry.rows):
            raise CacheError(
                f"{self._storage.root}: {name} is missing or truncated. Run `saffe-cache verify` to see what else is, "
                "and `saffe-cache repair` to mend it."
            )
        with path.open("rb") as file:
            if index not in self._checked:
                check_rows(entry, _blocks(file, entry.rows * spec.row_bytes), f"{self._storage.root}: {name}")
                self._checked.add(index)
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        rows = np.frombuffer(memory, spec.numpy_dtype, entry.rows * math.prod(spec.stored_shape))
        return _Mapped(rows.reshape(entry.rows, -1), memory)

    def _load(self, index: int) -> Future[np.ndarray]:
        """And the next one, where this one follows another and nobody said what is needed."""
        with self._lock:
            if not self._held and index - 1 in self._loaded and index + 1 < len(self._array.shards):
                self._start(index + 1)
            future = self._start(index)
            self._loaded.move_to_end(index)
            spare = [one for one in self._loaded if one not in self._held]
            for one in spare[: -self._max_spare]:
                del self._loaded[one]
            return future

    def _start(self, index: int) -> Future[np.ndarray]:
        """Load a shard unless that is done or under way; one that failed has another try."""
        future = self._loaded.get(index)
        if future is None or (future.done() and future.exception() is not None):
            future = self._loaded[index] = _loaders().submit(self._fetch, index)
        return future

    def _fetch(self, index: int) -> np.ndarray:
        entry, name = self._array.shards[index], self._name(index)
        rows = decode_shard(self._array.spec, entry, self._storage.read(name), f"{self._storage.root}: {name}")
        return rows.reshape(entry.rows, -1)

    def _name(self, index: int) -> str:
        return f"{self._folder}/{shard_name(index, self._array.spec)}"


@cache
def _loaders() -> ThreadPoolExecutor:
    """Of the whole process. None of their work waits for other work of theirs."""
    return ThreadPoolExecutor(max(4, os.cpu_count() or 1), "shard-loader")


def _blocks(file: IO[bytes], num_bytes: int) -> Iterator[np.ndarray]:
    """The first bytes of a file, read in a row; mapped, they would count as memory of this process."""
    for start in range(0, num_bytes, _BLOCK_BYTES):
        yield np.frombuffer(file.read(min(_BLOCK_BYTES, num_bytes - start)), np.uint8)
