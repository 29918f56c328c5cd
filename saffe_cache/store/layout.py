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
from dataclasses import asdict, dataclass
from typing import Any

import google_crc32c
import numpy as np

from saffe_cache.features import CacheError

STORAGE_DTYPES = ("float32", "float16", "bfloat16")
_MISSING_CHUNK = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array that grows along axis 0."""

    row_shape: tuple[int, ...]
    dtype: str
    """float32, float16, bfloat16 (kept as the upper 16 bits of a float32, in uint16) or int64."""
    chunk_rows: int
    shard_rows: int
    """A multiple of `chunk_rows`."""
    dimension_names: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.shard_rows % self.chunk_rows == 0, "a shard is whole chunks"
        assert len(self.dimension_names) == 1 + len(self.row_shape)

    @property
    def numpy_dtype(self) -> np.dtype:
        """The type of the stored numbers, little-endian."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.numpy_dtype.itemsize

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    @property
    def fill_value(self) -> Any:
        """What rows hold that were not written: NaN, in uint16 for bfloat16; -1 for integers."""
        return {"bfloat16": 0x7FC0, "int64": -1}.get(self.dtype, float("nan"))

    def shard_file_bytes(self, num_rows: int) -> int:
        """Size of a shard's file that holds `num_rows` rows."""
        chunks = math.ceil(num_rows / self.chunk_rows)
        return chunks * self.chunk_rows * self.row_bytes + self.index_bytes

    @property
    def index_bytes(self) -> int:
        """Size of the chunk index that ends a shard."""
        return 16 * self.chunks_per_shard + 4


def choose_rows(row_bytes: int, shard_bytes: int) -> tuple[int, int]:
    """Rows per chunk (about 1 MiB, at most 64) and rows per shard (about `shard_bytes`)."""
    chunk_rows = int(min(64, max(1, 2**20 // max(1, row_bytes))))
    return chunk_rows, chunk_rows * max(1, shard_bytes // (row_bytes * chunk_rows))


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the manifest promises of a shard."""

    rows: int
    crc32c: int
    """Of the rows' bytes as stored."""
    mean: float = 0.0
    m2: float = 0.0
    """Sum of squared differences from the mean, over the finite numbers."""
    count: int = 0
    """Finite numbers."""
    max_magnitude: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def to_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """Cast float32 numbers to a storage type; bfloat16 rounds to nearest even, as torch does.

    Raises:
        OverflowError: a finite number becomes infinite in the storage type.
    """
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype("<u2")).astype("<u2")
    if dtype == "float16" and np.issubdtype(values.dtype, np.floating):
        limit = float(np.finfo(np.float16).max)
        largest = np.nanmax(np.abs(values), initial=0.0)
        if largest > limit and np.isfinite(largest):
            raise OverflowError(f"magnitude {largest:.6g} exceeds float16's {limit:.6g}")
    return np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))


def from_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers of stored rows: bfloat16 becomes float32, all else stays as it is."""
    if dtype == "bfloat16":
        return (values.astype("<u4") << 16).view("<f4")
    return values


def encode_shard(spec: ArraySpec, rows: np.ndarray) -> bytes:
    """The file of one shard. `rows` is [1…shard_rows, *row_shape] in the stored type."""
    assert 1 <= len(rows) <= spec.shard_rows and rows.shape[1:] == spec.row_shape
    assert rows.dtype == spec.numpy_dtype
    num_chunks = math.ceil(len(rows) / spec.chunk_rows)
    padding = np.full((num_chunks * spec.chunk_rows - len(rows), *spec.row_shape), spec.fill_value, spec.numpy_dtype)
    return b"".join([rows.tobytes(), padding.tobytes(), _shard_index(spec, spec.shard_file_bytes(len(rows)))])


def _shard_index(spec: ArraySpec, file_bytes: int) -> bytes:
    """The index that ends a shard's file of this size: every chunk whole, one after the other."""
    chunk_bytes = spec.chunk_rows * spec.row_bytes
    num_chunks = (file_bytes - spec.index_bytes) // chunk_bytes
    index = np.full((spec.chunks_per_shard, 2), _MISSING_CHUNK, "<u8")
    index[:num_chunks, 0] = np.arange(num_chunks, dtype=np.uint64) * np.uint64(chunk_bytes)
    index[:num_chunks, 1] = chunk_bytes
    table = index.tobytes()
    return table + struct.pack("<I", google_crc32c.value(table))


def describe_shard(spec: ArraySpec, rows: np.ndarray) -> ShardEntry:
    """The manifest's entry for stored rows: checksum, and statistics over finite numbers."""
    crc = google_crc32c.value(rows.tobytes())
    if spec.dtype == "int64":
        return ShardEntry(rows=len(rows), crc32c=crc)
    values = from_storage(rows, spec.dtype).astype(np.float32).reshape(-1)
    if not np.isfinite(values.sum(dtype=np.float64)):
        values = values[np.isfinite(values)]
    if not len(values):
        return ShardEntry(rows=len(rows), crc32c=crc)
    mean = float(values.mean(dtype=np.float64))
    m2 = float(np.square(values - np.float32(mean)).sum(dtype=np.float64))
    largest = float(np.abs(values).max())
    return ShardEntry(rows=len(rows), crc32c=crc, mean=mean, m2=m2, count=len(values), max_magnitude=largest)


@dataclass(frozen=True)
class Statistics:
    """Over all finite numbers of an array."""

    mean: float
    std: float
    max_magnitude: float


def combine_statistics(entries: list[ShardEntry]) -> Statistics:
    """Merge per-shard moments. Source: Chan, Golub, LeVeque 1979, eq. 2.1."""
    count, mean, m2 = 0, 0.0, 0.0
    for entry in entries:
        if entry.count:
            total, delta = count + entry.count, entry.mean - mean
            mean += delta * entry.count / total
            m2 += entry.m2 + delta**2 * count * entry.count / total
            count = total
    largest = max((entry.max_magnitude for entry in entries), default=0.0)
    return Statistics(mean, math.sqrt(m2 / count) if count else 0.0, largest)


def check_shard(spec: ArraySpec, entry: ShardEntry, data: bytes, where: str) -> None:
    """Compare a shard's file with the manifest: the rows it counts, and the index that leads readers to them.

    A longer file passes: a crash between the growth of a tail shard and the commit leaves one behind.

    Raises:
        CacheError: the file is shorter than promised, or a byte differs.
    """
    if len(data) < spec.shard_file_bytes(entry.rows):
        raise CacheError(
            f"{where}: {len(data)} bytes, the manifest implies {spec.shard_file_bytes(entry.rows)}. "
            "The file is truncated; delete it and extract again."
        )
    if google_crc32c.value(data[: entry.rows * spec.row_bytes]) != entry.crc32c:
        raise CacheError(f"{where}: its rows differ from the manifest's checksum. Delete it and extract again.")
    if not data.endswith(_shard_index(spec, len(data))):
        raise CacheError(f"{where}: its chunk index is damaged. Delete it and extract again.")
