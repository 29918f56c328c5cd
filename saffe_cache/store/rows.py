"""Rows of one array by number.

Local shards are memory-mapped. Behind a URL a shard is fetched whole, compared with its checksum and kept;
a cache that does not fit into memory is better copied to a local disk before a training.
"""

from __future__ import annotations

import math
import threading

import numpy as np

from saffe_cache.features import CacheError
from saffe_cache.store.dtypes import from_storage
from saffe_cache.store.layout import check_shard
from saffe_cache.store.manifest import ArrayManifest
from saffe_cache.store.storage import Storage
from saffe_cache.store.zarr_files import shard_name

_MAX_OPEN_SHARDS = 64
"""Of one array. A memory map holds a file open, of which a process may have 1024."""
_LONG_RUN_BYTES = 2**13
"""Consecutive rows of so many bytes are quicker copied on their own than looked up together with others."""


class RowReader:
    """Rows of one array by number, for any thread. Random rows of a local cache cost what a memory map costs."""

    def __init__(self, storage: Storage, folder: str, array: ArrayManifest) -> None:
        self._storage, self._folder, self._array = storage, folder, array
        self._open: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._array.rows

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self._array.spec.row_shape

    @property
    def dtype(self) -> str:
        """The storage type."""
        return self._array.spec.dtype

    @property
    def row_bytes(self) -> int:
        """Of one row as it is stored."""
        return self._array.spec.row_bytes

    def read(self, rows: np.ndarray) -> np.ndarray:
        """`rows` is int64 [n], in any order; returns [n, *row_shape], of bfloat16 and scaled types float32.

        Raises:
            CacheError: as `read_stored`.
        """
        return from_storage(self.read_stored(rows), self._array.spec.dtype)

    def read_stored(self, rows: np.ndarray) -> np.ndarray:
        """The same as it is stored: [n, *stored_shape].

        Raises:
            CacheError: a row is beyond the array, or a shard is missing or truncated.
        """
        spec = self._array.spec
        beyond = rows[(rows < 0) | (rows >= len(self))]
        if len(beyond):
            raise CacheError(
                f"{self._storage.root}: {self._folder} has {len(self)} rows, row {beyond[0]} was asked for. "
                "Run saffe-extract again to complete it."
            )
        if not len(rows):
            return np.empty((0, *spec.stored_shape), spec.numpy_dtype)
        result = np.empty((len(rows), math.prod(spec.stored_shape)), spec.numpy_dtype)
        shards, within = np.divmod(rows, spec.shard_rows)
        changes = shards[1:] != shards[:-1]
        if (shards[1:] >= shards[:-1]).all():
            for start, stop in _stretches(changes).tolist():
                # "clip" spares numpy a second copy; beyond the shard lies nothing
                np.take(self._shard(int(shards[start])), within[start:stop], 0, result[start:stop], mode="clip")
            return result.reshape(len(rows), *spec.stored_shape)
        runs = _stretches(changes | (rows[1:] != rows[:-1] + 1))
        if result.nbytes >= _LONG_RUN_BYTES * len(runs):
            self._copy_runs(runs, shards, within, result)
        else:
            for number in np.unique(shards).tolist():
                here = np.flatnonzero(shards == number)
                result[here] = self._shard(number)[within[here]]
        return result.reshape(len(rows), *spec.stored_shape)

    def _copy_runs(self, runs: np.ndarray, shards: np.ndarray, within: np.ndarray, result: np.ndarray) -> None:
        """Consecutive rows at a time, shard by shard: with random rows of large arrays all of them are needed."""
        runs = runs[np.argsort(shards[runs[:, 0]], kind="stable")]
        numbers, firsts = shards[runs[:, 0]].tolist(), within[runs[:, 0]].tolist()
        opened, shard = -1, result
        for (start, stop), number, first in zip(runs.tolist(), numbers, firsts, strict=True):
            if number != opened:
                opened, shard = number, self._shard(number)
            if stop - start == 1:
                result[start] = shard[first]  # takes less than a slice of one row
            else:
                result[start:stop] = shard[first : first + stop - start]

    def read_range(self, start: int, stop: int) -> np.ndarray:
        """Consecutive rows."""
        return self.read(np.arange(start, stop))

    def _shard(self, index: int) -> np.ndarray:
        """The rows of a shard, [rows, numbers of a row]; the one opened first is closed where too many are open."""
        with self._lock:
            if index not in self._open:
                while len(self._open) >= _MAX_OPEN_SHARDS:
                    del self._open[next(iter(self._open))]
                self._open[index] = self._open_shard(index)
            return self._open[index]

    def _open_shard(self, index: int) -> np.ndarray:
        spec, entry = self._array.spec, self._array.shards[index]
        name = f"{self._folder}/{shard_name(index, spec)}"
        shape = (entry.rows, math.prod(spec.stored_shape))
        path = self._storage.local_path(name)
        if path is None:
            data = self._storage.read(name)
            check_shard(spec, entry, data, f"{self._storage.root}: {name}")
            return np.frombuffer(data, spec.numpy_dtype, count=math.prod(shape)).reshape(shape)
        if not path.exists() or path.stat().st_size < spec.shard_file_bytes(entry.rows):
            raise CacheError(
                f"{self._storage.root}: {name} is missing or truncated. Run `saffe-cache verify` to see what else is, "
                "then restore it from a copy, or extract into a new cache."
            )
        return np.asarray(np.memmap(path, spec.numpy_dtype, mode="r", shape=shape))


def _stretches(breaks: np.ndarray) -> np.ndarray:
    """int64 [n, 2]: starts and stops of stretches of `len(breaks) + 1` places; a break begins one at the next place."""
    starts = np.flatnonzero(np.append(True, breaks))
    return np.stack([starts, np.append(starts[1:], len(breaks) + 1)], axis=1)
