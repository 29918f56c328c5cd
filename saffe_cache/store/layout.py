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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import google_crc32c
import numpy as np

from saffe_cache.features import CacheError
from saffe_cache.store.dtypes import STORAGE_DTYPES, fill_value, from_storage, is_scaled, stored_shape, stored_type

_MISSING_CHUNK = 2**64 - 1
_CRC_BYTES = 2**22
_STATISTICS_NUMBERS = 2**18
"""Numbers whose moments are taken at once, in float64: what fits into a processor's cache."""


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
class Moments:
    """Of finite numbers; all 0 where there are none."""

    mean: float = 0.0
    m2: float = 0.0
    """Sum of squared differences from the mean."""
    count: int = 0
    max_magnitude: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ShardEntry(Moments):
    """What the manifest promises of a shard, and the moments of its finite numbers."""

    rows: int
    crc32c: int
    """Of the rows' bytes as stored."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def encode_shard(spec: ArraySpec, rows: np.ndarray) -> tuple[memoryview | bytes, ...]:
    """The file of one shard, in parts: the rows themselves are not copied.

    `rows` is [1…shard_rows, *stored_shape], contiguous, in the stored type.
    """
    assert 1 <= len(rows) <= spec.shard_rows
    assert rows.shape[1:] == spec.stored_shape
    assert rows.dtype == spec.numpy_dtype
    num_chunks = math.ceil(len(rows) / spec.chunk_rows)
    padding = np.full((num_chunks * spec.chunk_rows - len(rows), *spec.stored_shape), spec.fill_value, spec.numpy_dtype)
    return _bytes_of(rows), padding.tobytes(), _shard_index(spec, num_chunks)


def _bytes_of(rows: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return rows.reshape(-1).view(np.uint8).data.toreadonly()


def _crc32c(data: memoryview) -> int:
    """Of any buffer; the library takes bytes alone, so a few megabytes are copied at a time."""
    crc = 0
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


def describe_shard(spec: ArraySpec, rows: np.ndarray) -> ShardEntry:
    """The manifest's entry for stored rows: checksum, and statistics over finite numbers."""
    crc = _crc32c(_bytes_of(rows))
    if spec.dtype == "int64":
        return ShardEntry(rows=len(rows), crc32c=crc)
    tokens = rows.reshape(-1, math.prod(spec.stored_shape[-1:]))
    step = max(1, _STATISTICS_NUMBERS // tokens.shape[1])
    parts = [
        _moments(from_storage(tokens[start : start + step], spec.dtype).reshape(-1))
        for start in range(0, len(tokens), step)
    ]
    return ShardEntry(rows=len(rows), crc32c=crc, **asdict(_merge(parts)))


def _moments(numbers: np.ndarray) -> Moments:
    """Of the finite ones among some floating-point numbers. In float64: a float32's square may overflow."""
    values = numbers.astype(np.float64)
    is_finite = np.isfinite(values)
    if not is_finite.all():
        values = values[is_finite]
    if not len(values):
        return Moments()
    mean = float(values.mean())
    largest = float(max(values.max(), -values.min()))
    values -= mean
    return Moments(mean=mean, m2=float(values @ values), count=len(values), max_magnitude=largest)


@dataclass(frozen=True)
class Statistics:
    """Over all finite numbers of an array."""

    mean: float
    std: float
    max_magnitude: float


def combine_statistics(entries: Sequence[ShardEntry]) -> Statistics:
    """Over all shards of an array."""
    whole = _merge(entries)
    return Statistics(whole.mean, math.sqrt(whole.m2 / whole.count) if whole.count else 0.0, whole.max_magnitude)


def _merge(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together. Source: Chan, Golub, LeVeque 1979, eq. 2.1."""
    count, mean, m2, largest = 0, 0.0, 0.0, 0.0
    for part in parts:
        if part.count:
            total, delta = count + part.count, part.mean - mean
            mean += delta * part.count / total
            m2 += part.m2 + delta * delta * count * part.count / total
            count, largest = total, max(largest, part.max_magnitude)
    return Moments(mean=mean, m2=m2, count=count, max_magnitude=largest)


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
