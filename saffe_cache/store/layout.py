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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import google_crc32c
import numpy as np
import torch

from saffe_cache.features import CacheError
from saffe_cache.store.dtypes import STORAGE_DTYPES, fill_value, from_storage, is_scaled, stored_shape, stored_type

_MISSING_CHUNK = 2**64 - 1
_CRC_BYTES = 2**18
_BLOCK_NUMBERS = 2**15
"""Numbers whose moments are taken at once: they stay in a processor's cache, and torch takes no threads for them."""


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
    """The manifest's entry for stored rows: checksum, and statistics over finite numbers.

    It does not depend on how the rows are cut into portions.
    """
    crc, num_rows = _crc32c(portions), sum(map(len, portions))
    if spec.dtype == "int64":
        return ShardEntry(rows=num_rows, crc32c=crc)
    moments = _merge(_moments(from_storage(tokens, spec.dtype)) for tokens in _blocks(spec, portions))
    return ShardEntry(rows=num_rows, crc32c=crc, **asdict(moments))


def _blocks(spec: ArraySpec, portions: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Stored tokens, [tokens, last axis], equally many at a time, wherever one portion ends and the next begins."""
    width = math.prod(spec.stored_shape[-1:])
    room = size = max(1, _BLOCK_NUMBERS // width)
    waiting: list[np.ndarray] = []
    for rows in portions:
        tokens = rows.reshape(-1, width)
        while len(tokens):
            waiting.append(tokens[:room])
            tokens, room = tokens[room:], room - len(waiting[-1])
            if not room:
                yield np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
                waiting, room = [], size
    if waiting:
        yield np.concatenate(waiting)


def _moments(numbers: np.ndarray) -> Moments:
    """Of the finite ones among floating-point numbers [tokens, d]. In float64: a float32's square may overflow."""
    if numbers.dtype == np.float16:  # numpy takes eight times as long as torch, which warns of what is read-only
        numbers = torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy()).float().numpy()
    values = numbers.astype(np.float64)
    total = float(np.einsum("ij->", values))  # half the time of a sum, and silent on infinities
    if not math.isfinite(total):
        is_finite = np.isfinite(numbers)
        numbers, values = numbers[is_finite][None], values[is_finite][None]
        total = float(np.einsum("ij->", values))
    if not values.size:
        return Moments()
    mean = total / values.size
    squares = _sum_of_squares(values)
    m2 = squares - mean * total
    if m2 < squares / 1000:  # too many of its digits cancelled
        values -= mean
        m2 = _sum_of_squares(values)
    return Moments(mean=mean, m2=m2, count=values.size, max_magnitude=float(max(numbers.max(), -numbers.min())))


def _sum_of_squares(values: np.ndarray) -> float:
    """Token by token: for longer ones the linear algebra behind numpy would take every core, and gain nothing."""
    return float((values[:, None, :] @ values[:, :, None]).sum())


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
