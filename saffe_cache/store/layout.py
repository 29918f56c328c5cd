"""How one growing array is stored: its spec, the bytes of its shards, and the manifest's entry of each shard.

FORMAT.md describes the files: standard Zarr shards, whose rows numpy can memory-map unless they are compressed.
zarr-python writes the same bytes at a fifth of the speed; a test compares the two.

Hidden states are close to noise: float16 shrinks by a tenth, bfloat16 by a quarter, after bits of equal significance
are grouped (bitshuffle; no gain for one-byte types). Compression therefore suits slow networks and full disks.

The manifest's checksum covers the *rows that it counts*, not the file: a tail shard that was extended by new rows still
contains the old ones, and matches the old manifest until the new one is committed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import google_crc32c
import numpy as np
from numcodecs.blosc import BITSHUFFLE, NOSHUFFLE, Blosc

from saffe_cache.core.atomic_io import Buffer
from saffe_cache.core.features import REPAIR_ADVICE, CacheError, Compression, StorageType
from saffe_cache.core.json_schema import made_of
from saffe_cache.store.checksums import bytes_of, crc32c
from saffe_cache.store.dtypes import SCALE_BYTES, Moments, is_scaled, sampled_moments, stored_type

STORAGE_DTYPES, COMPRESSIONS = get_args(StorageType), get_args(Compression)
COMPRESSION_LEVEL = 1
"""Higher levels take twice the time and save one percent."""
_SIZES = struct.Struct("<4xIII")
"""In Blosc's header: decompressed bytes, bytes of a block, compressed bytes."""
_MISSING_CHUNK = 2**64 - 1
_MAX_CHUNK_BYTES = 2**31 - 17
"""Most bytes that Blosc accepts at once."""


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array that grows along axis 0."""

    row_shape: tuple[int, ...]
    """Shape of one row, in numbers."""
    dtype: Literal[StorageType, "int64"]
    """int64, or a storage type of dtypes.py."""
    chunk_rows: int = 1
    shard_rows: int = 1
    """A multiple of `chunk_rows`."""
    dimension_names: tuple[str, ...]
    compression: Compression = "none"
    """Compression of each chunk. Only uncompressed shards can be memory-mapped."""

    def __post_init__(self) -> None:
        if any(length < 1 for length in self.row_shape):
            raise ValueError(f"row_shape {self.row_shape}: expected lengths of 1 or more")
        if is_scaled(self.dtype) and not self.row_shape:
            raise ValueError(f"row_shape (): expected at least one axis, as {self.dtype} has a scale for each token")
        if not 1 <= self.chunk_rows <= self.shard_rows or self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows {self.shard_rows}: expected a multiple of chunk_rows {self.chunk_rows}")
        if (size := self.chunk_bytes) > _MAX_CHUNK_BYTES:
            raise ValueError(f"chunk_rows {self.chunk_rows}: a chunk has {size} bytes, expected below 2 GiB")
        if len(self.dimension_names) != 1 + len(self.row_shape):
            raise ValueError(f"dimension_names {self.dimension_names}: expected one for each axis")

    @property
    def numpy_dtype(self) -> np.dtype:
        """Little-endian type of the stored values."""
        return stored_type(self.dtype)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one stored row: a token of a scaled type is followed by its scale."""
        shape = self.row_shape
        return (*shape[:-1], shape[-1] + SCALE_BYTES) if is_scaled(self.dtype) else shape

    @property
    def described(self) -> str:
        """Type and compression, for people."""
        return self.dtype if self.compression == "none" else f"{self.dtype} with {self.compression}"

    @property
    def row_bytes(self) -> int:
        """Stored size of one row before compression."""
        return math.prod(self.stored_shape) * self.numpy_dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * self.row_bytes

    @property
    def fill_value(self) -> int | float:
        """Stored value of rows that were not written: NaN, or -1 for integers."""
        return {"bfloat16": 0x7FC0, "int8": 0xFF, "float8": 0xFF, "int64": -1}.get(self.dtype, math.nan)

    def shard_file_bytes(self, num_rows: int) -> int:
        """Size of the file of an uncompressed shard with `num_rows` rows."""
        return math.ceil(num_rows / self.chunk_rows) * self.chunk_bytes + self.index_bytes

    @property
    def index_bytes(self) -> int:
        """Size of the chunk index that ends a shard."""
        return 16 * (self.shard_rows // self.chunk_rows) + 4


def choose_rows(row_bytes: int, shard_bytes: int) -> tuple[int, int]:
    """Rows per chunk (about 1 MiB, at most 64) and rows per shard (about `shard_bytes`)."""
    chunk_rows = int(min(64, max(1, 2**20 // max(1, row_bytes))))
    return chunk_rows, chunk_rows * max(1, shard_bytes // (row_bytes * chunk_rows))


@dataclass(frozen=True, kw_only=True)
class ShardEntry(Moments):
    """The manifest's entry of a shard: its rows, their checksum, and the moments of a sample of its finite numbers."""

    rows: int
    crc32c: int
    """Checksum of the rows' stored bytes."""

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> ShardEntry:
        """Raises TypeError or ValueError if a field is missing, unknown or has another type."""
        entry = made_of(ShardEntry, content)
        for name in ("rows", "crc32c", "m2", "count", "max_magnitude"):
            if getattr(entry, name) < 0:
                raise ValueError(f"{name}: {getattr(entry, name)}, expected 0 or more")
        return entry


def encode_shard(spec: ArraySpec, *portions: np.ndarray) -> tuple[memoryview | bytes, ...]:
    """The file of one shard, in parts; uncompressed rows are not copied.

    The portions are consecutive: together [1…shard_rows, *stored_shape], contiguous, in the stored type.
    """
    num_rows = sum(map(len, portions))
    assert 1 <= num_rows <= spec.shard_rows
    assert all(rows.shape[1:] == spec.stored_shape and rows.dtype == spec.numpy_dtype for rows in portions)
    num_chunks = math.ceil(num_rows / spec.chunk_rows)
    padding = np.full((num_chunks * spec.chunk_rows - num_rows, *spec.stored_shape), spec.fill_value, spec.numpy_dtype)
    if spec.compression == "none":
        return *map(bytes_of, portions), padding.tobytes(), _shard_index(spec, [spec.chunk_bytes] * num_chunks)
    chunks = [compress(chunk) for chunk in np.split(np.concatenate([*portions, padding]), num_chunks)]
    return *chunks, _shard_index(spec, [len(chunk) for chunk in chunks])


def _shard_index(spec: ArraySpec, lengths: Sequence[int]) -> bytes:
    """The index of a shard whose first chunks are present and have these lengths in bytes."""
    index = np.full((spec.shard_rows // spec.chunk_rows, 2), _MISSING_CHUNK, "<u8")
    index[: len(lengths), 0] = np.cumsum([0, *lengths[:-1]])
    index[: len(lengths), 1] = lengths
    table = index.tobytes()
    return table + struct.pack("<I", google_crc32c.value(table))


def describe_shard(spec: ArraySpec, *portions: np.ndarray) -> ShardEntry:
    """The manifest's entry for stored rows; it does not depend on how they are cut into portions."""
    moments = Moments() if spec.dtype == "int64" else sampled_moments(portions, spec.dtype)
    return ShardEntry(rows=sum(map(len, portions)), crc32c=crc32c(portions), **asdict(moments))


def decode_shard(spec: ArraySpec, entry: ShardEntry, data: Buffer, where: str) -> np.ndarray:
    """The rows of a shard's file that the manifest counts, [rows, *stored_shape], compared with their checksum.

    Raises CacheError if the file is truncated or damaged, or its chunk index, which other readers need. A longer file
    is accepted: a crash between the growth of a tail shard and the commit leaves one behind.
    """
    num_chunks = math.ceil(entry.rows / spec.chunk_rows)
    least = spec.shard_file_bytes(entry.rows)
    if spec.compression == "none" and len(data) < least:
        raise CacheError(f"{where}: {len(data)} bytes, the manifest implies {least}: it is truncated. {REPAIR_ADVICE}")
    lengths = _chunk_lengths(spec, data)
    if lengths is None or len(lengths) < num_chunks:
        raise CacheError(f"{where}: its chunk index is damaged. {REPAIR_ADVICE}")
    if spec.compression == "none":
        rows = _plain_rows(spec, entry, data)
    else:
        rows = _decompressed(spec, data, lengths[:num_chunks], where)[: entry.rows]
    check_rows(entry, [rows], where)
    return rows


def check_rows(entry: ShardEntry, portions: Iterable[np.ndarray | bytes], where: str) -> None:
    """Compare a shard's rows, in any portions, with their checksum. Raises CacheError if a byte differs."""
    if crc32c(portions) != entry.crc32c:
        raise CacheError(f"{where}: its rows differ from the manifest's checksum. {REPAIR_ADVICE}")


def rows_without_index(spec: ArraySpec, entry: ShardEntry, data: bytes) -> np.ndarray | None:
    """The rows of a shard's file if only its index is damaged, else None. Compressed rows need their index."""
    if spec.compression != "none" or len(data) < entry.rows * spec.row_bytes:
        return None
    rows = _plain_rows(spec, entry, data)
    return rows if crc32c([rows]) == entry.crc32c else None


def _plain_rows(spec: ArraySpec, entry: ShardEntry, data: Buffer) -> np.ndarray:
    stored = np.frombuffer(data, spec.numpy_dtype, count=entry.rows * math.prod(spec.stored_shape))
    return stored.reshape(entry.rows, *spec.stored_shape)


def _chunk_lengths(spec: ArraySpec, data: Buffer) -> list[int] | None:
    """Lengths of the chunks in a shard's index; None if it is not an index that we write."""
    index = data[-spec.index_bytes :]
    if len(index) < spec.index_bytes:
        return None
    found = np.frombuffer(index[:-4], "<u8").reshape(-1, 2)
    lengths = [int(length) for length in found[:, 1] if length != _MISSING_CHUNK]
    is_ours = sum(lengths) == len(data) - len(index) and index == _shard_index(spec, lengths)
    return lengths if is_ours and (spec.compression != "none" or set(lengths) <= {spec.chunk_bytes}) else None


def _decompressed(spec: ArraySpec, data: Buffer, lengths: Sequence[int], where: str) -> np.ndarray:
    """The rows of the first chunks, padding included."""
    try:
        rows = np.empty((len(lengths) * spec.chunk_rows, *spec.stored_shape), spec.numpy_dtype)
    except (MemoryError, ValueError):
        size = len(lengths) * spec.chunk_bytes
        raise CacheError(f"{where}: not enough memory for its {size} decompressed bytes. {REPAIR_ADVICE}") from None
    start, data = 0, memoryview(data)  # slices of bytes would be copies
    for number, (length, chunk) in enumerate(zip(lengths, np.split(rows, len(lengths)), strict=True)):
        try:
            decompress(data[start : start + length], chunk)
        except ValueError as error:
            raise CacheError(f"{where}: its chunk {number} cannot be decompressed ({error}). {REPAIR_ADVICE}") from None
        start += length
    return rows


def compress(chunk: np.ndarray) -> bytes:
    """The bytes of a contiguous array, compressed; the same on every machine."""
    shuffle = NOSHUFFLE if chunk.dtype.itemsize == 1 else BITSHUFFLE
    return bytes(Blosc("zstd", clevel=COMPRESSION_LEVEL, shuffle=shuffle).encode(chunk.reshape(-1)))


def decompress(data: Buffer, into: np.ndarray) -> None:
    """Decompress into an array. Raises ValueError if the data are damaged, or have another size."""
    decompressed, _, compressed = _SIZES.unpack_from(data) if len(data) >= _SIZES.size else (0, 0, 0)
    if (decompressed, compressed) != (into.nbytes, len(data)):
        raise ValueError(
            f"{len(data)} bytes whose header says {compressed}, and {decompressed} decompressed, expected {into.nbytes}"
        )
    try:
        Blosc().decode(data, out=into.reshape(-1).view(np.uint8))
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def shard_name(index: int, spec: ArraySpec) -> str:
    """Zarr's default chunk key."""
    return "/".join(["c", str(index), *["0"] * len(spec.stored_shape)])


LAYER_PREFIX = "hidden_states/"


def layers_among(names: Iterable[str]) -> list[int]:
    """The layer indices i of the arrays named `hidden_states/i`, ascending; those of views are not counted."""
    return sorted(int(name.removeprefix(LAYER_PREFIX)) for name in names if name.startswith(LAYER_PREFIX))


VIEW_PREFIX = "views/"


def array_of_view(view: str, name: str) -> str:
    """Name of the array that holds of a view what another one holds of the plain photos."""
    return f"{VIEW_PREFIX}{view}/{name}" if view else name


def split_view(name: str) -> tuple[str, str]:
    """The view that an array is of, empty for the plain photo, and the name of the same array of plain photos."""
    if not name.startswith(VIEW_PREFIX):
        return "", name
    view, _, own = name.removeprefix(VIEW_PREFIX).partition("/")
    return view, own


def encoder_group(key: str) -> str:
    """Name of an encoder's group."""
    return f"encoders/{key}"
