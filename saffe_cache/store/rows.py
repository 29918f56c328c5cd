"""Rows of one array by number."""

from __future__ import annotations

import math

import numpy as np

from saffe_cache.core.features import CacheError
from saffe_cache.store.dtypes import from_storage
from saffe_cache.store.manifest import ArrayManifest
from saffe_cache.store.shards import OpenShards
from saffe_cache.store.storage import Storage

_LONG_RUN_BYTES = 2**13
"""Consecutive rows of so many bytes are quicker copied on their own than looked up together with others."""


class RowReader:
    """Rows of one array by number, for any thread. Random rows of a local cache cost what a memory map costs."""

    def __init__(self, storage: Storage, folder: str, array: ArrayManifest) -> None:
        self._where, self._array = f"{storage.root}: {folder}", array
        self._shards = OpenShards(storage, folder, array)

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

    @property
    def shard_rows(self) -> int:
        """Of a full shard."""
        return self._array.spec.shard_rows

    @property
    def is_mapped(self) -> bool:
        """Whether a row costs no more than itself; else its whole shard is loaded."""
        return self._shards.are_mapped

    def hold(self, rows: np.ndarray) -> None:
        """Have these rows, which are read next, ready ahead.

        Their shards are loaded and kept until the next call, and all others let go of; of mapped ones the system
        fetches the rows themselves.

        Raises:
            CacheError: a row is beyond the array; a mapped shard is missing, truncated or damaged.
        """
        self._check(rows)
        rows = np.unique(rows)
        shards, within = np.divmod(rows, self.shard_rows)
        if not self.is_mapped or not len(rows):
            self._shards.hold(np.unique(shards).tolist())
            return
        for start, stop in _stretches((shards[1:] != shards[:-1]) | (rows[1:] != rows[:-1] + 1)).tolist():
            self._shards.will_need(int(shards[start]), int(within[start]), int(within[stop - 1]) + 1)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """`rows` is int64 [n], in any order; returns [n, *row_shape], of bfloat16 and scaled types float32.

        Raises:
            CacheError: as `read_stored`.
        """
        return from_storage(self.read_stored(rows), self._array.spec.dtype)

    def read_stored(self, rows: np.ndarray) -> np.ndarray:
        """The same as it is stored: [n, *stored_shape].

        Raises:
            CacheError: a row is beyond the array, or a shard is missing, truncated or damaged.
        """
        spec = self._array.spec
        self._check(rows)
        if not len(rows):
            return np.empty((0, *spec.stored_shape), spec.numpy_dtype)
        result = np.empty((len(rows), math.prod(spec.stored_shape)), spec.numpy_dtype)
        shards, within = np.divmod(rows, spec.shard_rows)
        changes = shards[1:] != shards[:-1]
        if (shards[1:] >= shards[:-1]).all():
            for start, stop in _stretches(changes).tolist():
                # "clip" spares numpy a second copy; beyond the shard lies nothing
                np.take(self._shards[int(shards[start])], within[start:stop], 0, result[start:stop], mode="clip")
            return result.reshape(len(rows), *spec.stored_shape)
        runs = _stretches(changes | (rows[1:] != rows[:-1] + 1))
        if result.nbytes >= _LONG_RUN_BYTES * len(runs):
            self._copy_runs(runs, shards, within, result)
        else:
            for number in np.unique(shards).tolist():
                here = np.flatnonzero(shards == number)
                result[here] = self._shards[number][within[here]]
        return result.reshape(len(rows), *spec.stored_shape)

    def _check(self, rows: np.ndarray) -> None:
        beyond = rows[(rows < 0) | (rows >= len(self))]
        if len(beyond):
            raise CacheError(
                f"{self._where} has {len(self)} rows, row {beyond[0]} was asked for. "
                "Run saffe-extract again to complete it."
            )

    def _copy_runs(self, runs: np.ndarray, shards: np.ndarray, within: np.ndarray, result: np.ndarray) -> None:
        """Consecutive rows at a time, shard by shard: with random rows of large arrays all of them are needed."""
        runs = runs[np.argsort(shards[runs[:, 0]], kind="stable")]
        numbers, firsts = shards[runs[:, 0]].tolist(), within[runs[:, 0]].tolist()
        opened, shard = -1, result
        for (start, stop), number, first in zip(runs.tolist(), numbers, firsts, strict=True):
            if number != opened:
                opened, shard = number, self._shards[number]
            if stop - start == 1:
                result[start] = shard[first]  # takes less than a slice of one row
            else:
                result[start:stop] = shard[first : first + stop - start]

    def read_range(self, start: int, stop: int) -> np.ndarray:
        """Consecutive rows."""
        return self.read(np.arange(start, stop))


def _stretches(breaks: np.ndarray) -> np.ndarray:
    """int64 [n, 2]: starts and stops of stretches of `len(breaks) + 1` places; a break begins one at the next place."""
    starts = np.flatnonzero(np.append(True, breaks))
    return np.stack([starts, np.append(starts[1:], len(breaks) + 1)], axis=1)
