"""Bytes of one shard, and the manifest's word on it. Pure: no file is touched here.

A shard of an uncompressed array is the plain bytes of its rows, padded to whole chunks, followed by
the index of Zarr's `sharding_indexed` codec: an (offset, length) pair of little-endian uint64 for each
chunk, and a CRC-32C of the pairs. So a standard reader reads it, and numpy can memory-map the rows at
offset 0. zarr-python writes the same bytes at a fifth of the speed; a test compares the two.

The checksum that the manifest keeps covers the *rows that it counts*, not the file: a tail shard that
grew by new rows still carries the old ones, and so satisfies the old manifest until the new one is
committed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import google_crc32c
import numpy as np

from saffe_cache.features import CacheError
from saffe_cache.store.dtypes import STORAGE_DTYPES, fill_value, is_scaled, stored_shape, stored_type
from saffe_cache.store.moments import Moments, sampled_moments

_MISSING_CHUNK = 2**64 - 1
_CRC_BYTES = 2**18


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array that grows along axis 0."""

    row_shape: tuple[int, ...]
    """Of the numbers of one row."""
    dtype: str
    """int64, or a storage type of dtypes.py."""
    chunk_rows: int
    shard_rows: int
    """A multiple of `chunk_rows`."""
    dimension_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in (*STORAGE_DTYPES, "int64"):
            raise ValueError(f"dtype {self.dtype!r}: expected int64 or one of {', '.join(STORAGE_DTYPES)}")
        if is_scaled(self.dtype) and not self.row_shape:
            raise ValueError(f"row_shape (): expected at least one axis, as {self.dtype} has a scale for each token")
        if not 1 <= self.chunk_rows <= self.shard_rows or self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows {self.shard_rows}: expected a multiple of chunk_rows {self.chunk_rows}")
        if len(self.dimension_names) != 1 + len(self.row_shape):
            raise ValueError(f"dimension_names {self.dimension_names}: expected one for each axis")

    @property
    def numpy_dtype(self) -> np.dtype:
        """The type of what is stored, little-endian."""
        return stored_type(self.dtype)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of what is stored for one row: longer than `row_shape` where scales lie between the numbers."""
        return stored_shape(self.row_shape, self.dtype)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.stored_shape) * self.numpy_dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    @property
    def fill_value(self) -> Any:
        """What rows hold that were not written."""
        return fill_value(self.dtype)

    def shard_file_bytes(self, num_rows: int) -> int:
        """Size of a shard's file that holds `num_rows` rows."""
        return math.ceil(num_rows / self.chunk_rows) * self.chunk_bytes + self.index_bytes

    @property
    def index_bytes(self) -> int:
        """Size of the chunk index that ends a shard."""
        return 16 * self.chunks_per_shard + 4


def choose_rows(row_bytes: int, shard_bytes: int) -> tuple[int, int]:
    """Rows per chunk (about 1 MiB, at most 64) and rows per shard (about `shard_bytes`)."""
    chunk_rows = int(min(64, max(1, 2**20 // max(1, row_bytes))))
    return chunk_rows, chunk_rows * max(1, shard_bytes // (row_bytes * chunk_rows))


@dataclass(frozen=True, kw_only=True)
class ShardEntry(Moments):
    """What the manifest promises of a shard, and the moments of a sample of its finite numbers."""

    rows: int
    crc32c: int
    """Of the rows' bytes as stored."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def encode_shard(spec: ArraySpec, *portions: np.ndarray) -> tuple[memoryview | bytes, ...]:
    """The file of one shard, in parts: the rows themselves are not copied.

    The portions follow one another: together [1…shard_rows, *stored_shape], contiguous, in the stored type.
    """
    num_rows = sum(map(len, portions))
    assert 1 <= num_rows <= spec.shard_rows
    assert all(rows.shape[1:] == spec.stored_shape and rows.dtype == spec.numpy_dtype for rows in portions)
    num_chunks = math.ceil(num_rows / spec.chunk_rows)
    padding = np.full((num_chunks * spec.chunk_rows - num_rows, *spec.stored_shape), spec.fill_value, spec.numpy_dtype)
    return *map(_bytes_of, portions), padding.tobytes(), _shard_index(spec, num_chunks)


def _bytes_of(rows: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return rows.reshape(-1).view(np.uint8).data.toreadonly()


def _crc32c(portions: Iterable[np.ndarray]) -> int:
    """Of contiguous arrays, one behind the other; the library takes bytes alone, so a little is copied at a time."""
    crc = 0
    for data in map(_bytes_of, portions):
        for start in range(0, len(data), _CRC_BYTES):
            crc = google_crc32c.extend(crc, bytes(data[start : start + _CRC_BYTES]))
    return crc


def _shard_index(spec: ArraySpec, num_chunks: int) -> bytes:
    """The index of a shard whose first `num_chunks` chunks are there, whole, one after the other."""
    index = np.full((spec.chunks_per_shard, 2), _MISSING_CHUNK, "<u8")
    index[:num_chunks, 0] = np.arange(num_chunks, dtype=np.uint64) * np.uint64(spec.chunk_bytes)
    index[:num_chunks, 1] = spec.chunk_bytes
    table = index.tobytes()
    return table + struct.pack("<I", google_crc32c.value(table))


def describe_shard(spec: ArraySpec, *portions: np.ndarray) -> ShardEntry:
    """The manifest's entry for stored rows: checksum, and statistics over a sample of their finite numbers.

    It does not depend on how the rows are cut into portions.
    """
    crc, num_rows = _crc32c(portions), sum(map(len, portions))
    if spec.dtype == "int64":
        return ShardEntry(rows=num_rows, crc32c=crc)
    moments = sampled_moments(portions, spec.dtype, spec.shard_rows * math.prod(spec.row_shape))
    return ShardEntry(rows=num_rows, crc32c=crc, **asdict(moments))


def check_shard(spec: ArraySpec, entry: ShardEntry, data: bytes, where: str) -> None:
    """Compare a shard's file with the manifest: the rows it counts, and the index that leads readers to them.

    A longer file passes: a crash between the growth of a tail shard and the commit leaves one behind.

    Raises:
        CacheError: the file is shorter than promised, or a byte differs.
    """
    advice = "Restore it from a copy, or extract into a new cache."
    if len(data) < spec.shard_file_bytes(entry.rows):
        raise CacheError(
            f"{where}: {len(data)} bytes, the manifest implies {spec.shard_file_bytes(entry.rows)}: it is truncated. "
            f"{advice}"
        )
    if google_crc32c.value(data[: entry.rows * spec.row_bytes]) != entry.crc32c:
        raise CacheError(f"{where}: its rows differ from the manifest's checksum. {advice}")
    num_chunks = (len(data) - spec.index_bytes) // spec.chunk_bytes
    if num_chunks > spec.chunks_per_shard or data[num_chunks * spec.chunk_bytes :] != _shard_index(spec, num_chunks):
        raise CacheError(f"{where}: its chunk index is damaged. {advice}")
