"""Reading a cache: rows by number.

Local shards are memory-mapped. Behind a URL a shard is fetched whole, compared with its checksum and kept;
a cache that does not fit into memory is better copied to a local disk before a training.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.features import (
    BlockSpec,
    BlockWeights,
    CacheError,
    ItemTable,
    Modality,
    Tokens,
)
from saffe_cache.store.dtypes import from_storage
from saffe_cache.store.layout import Statistics, check_shard, combine_statistics
from saffe_cache.store.manifest import (
    ArrayManifest,
    EncoderManifest,
    RootManifest,
    encoder_group,
    read_encoder,
    read_root,
)
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import read_table
from saffe_cache.store.zarr_files import check_array_metadata, read_group, shard_name

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


class EncoderCache:
    """What the cache holds of one encoder. `manifest` describes it."""

    def __init__(self, storage: Storage, manifest: EncoderManifest) -> None:
        self._storage, self.manifest = storage, manifest
        self._readers: dict[str, RowReader] = {}

    @property
    def key(self) -> str:
        return self.manifest.key

    def array(self, name: str) -> RowReader:
        """
        Raises:
            CacheError: the encoder has no such array.
        """
        if name not in self.manifest.arrays:
            raise CacheError(
                f"{self._storage.root}: {self.key} has no {name}; it has {', '.join(sorted(self.manifest.arrays))}. "
                "Add it with saffe-extract."
            )
        if name not in self._readers:
            folder = f"{encoder_group(self.key)}/{name}"
            self._readers[name] = RowReader(self._storage, folder, self.manifest.arrays[name])
        return self._readers[name]

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The encoder's own vector of each input, float32 [n, d]: projected where the model projects."""
        return self.array(self.manifest.vector).read(rows).astype(np.float32)

    def tokens(self, rows: np.ndarray, layers: tuple[int, ...]) -> Tokens:
        """Hidden states of some inputs, at least one; texts are padded with zeros to the longest among them."""
        if not self.manifest.is_ragged:
            return Tokens(tuple(self.array(f"hidden_states/{layer}").read(rows) for layer in layers))
        flat, mask = self.token_rows(rows)
        assert mask is not None
        states = []
        for layer in layers:
            values = self.array(f"hidden_states/{layer}").read(flat)
            padded = np.zeros((*mask.shape, *values.shape[1:]), values.dtype)
            padded[mask] = values
            states.append(padded)
        return Tokens(tuple(states), mask)

    def token_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Where the tokens of some inputs stand in the arrays of hidden states.

        Rows of those arrays, int64: one an input and no mask, or one for each real token, and bool [inputs, longest]
        where these belong.
        """
        if not self.manifest.is_ragged:
            return rows, None
        lengths = (self.offsets[rows + 1] - self.offsets[rows]).astype(np.int64)
        mask = np.arange(lengths.max(initial=1)) < lengths[:, None]
        return np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows]), mask

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [inputs + 1]: where each text's tokens begin in the flat arrays."""
        array = self.array("offsets")
        return array.read_range(0, len(array))

    @property
    def block_layers(self) -> list[int]:
        """Cached layers whose consuming block is cached too: all but the output of the last layer."""
        return [layer for layer in self.manifest.layers if layer < self.manifest.num_layers]

    def block(self, layer: int) -> BlockWeights:
        """The block that consumes `hidden_states[layer]`.

        Raises:
            CacheError: the layer is the last one's output, which no block consumes, or the block is not cached or
                damaged.
        """
        if layer not in self.block_layers:
            raise CacheError(
                f"{self._storage.root}: {self.key} has no block {layer}; blocks are cached for {self.block_layers} "
                f"(hidden_states[{self.manifest.num_layers}] is the last layer's output, which no block consumes)."
            )
        name = f"{encoder_group(self.key)}/blocks/{layer}"
        attributes, tensors = read_group(self._storage, name, "saffe-block")
        return BlockWeights(block_spec(attributes, f"{self._storage.root}: {name}"), tensors)

    def statistics(self, name: str) -> Statistics:
        """Mean, standard deviation and largest magnitude over all finite numbers of an array."""
        return combine_statistics(self.manifest.arrays[name].shards)

    def usable(self, rows: np.ndarray) -> np.ndarray:
        """bool [n]: which inputs were encoded. Row -1 (no such input) is not."""
        broken = np.array(sorted(self.manifest.invalid), dtype=np.int64)
        return (rows >= 0) & (rows < self.manifest.finished_rows) & ~np.isin(rows, broken)


def block_spec(attributes: Mapping[str, Any], where: str) -> BlockSpec:
    """
    Raises:
        CacheError: a field is missing, or there is one that this release does not know.
    """
    try:
        return BlockSpec(**attributes["spec"])
    except (KeyError, TypeError) as error:
        raise CacheError(f"{where}: its spec lacks or misstates {error}. Restore zarr.json from a copy.") from None


class Cache:
    """An open cache: its item table and its encoders."""

    def __init__(self, storage: Storage, root: RootManifest) -> None:
        self.storage = storage
        self.table: ItemTable = read_table(storage, f"tables/{root.table}")
        self.encoders: Mapping[str, EncoderCache] = {
            key: EncoderCache(storage, read_encoder(storage, key)) for key in root.encoders
        }

    def encoder(self, modality: Modality, name: str | None = None) -> EncoderCache:
        """The encoder of a modality; with several, the one whose key holds `name`.

        Raises:
            CacheError: there is none, there are several to choose from, or its extraction is unfinished.
        """
        of_modality = {key: one for key, one in self.encoders.items() if one.manifest.modality == modality}
        if not of_modality:
            raise CacheError(
                f"{self.storage.root}: it holds no {modality} encoder. Add one: saffe-extract --encoder {modality}=…"
            )
        named = [key for key in of_modality if name is None or name in key]
        chosen = [key for key in named if of_modality[key].manifest.finished_rows] or named
        if len(chosen) != 1:
            asked = f" named {name!r}" if name else ""
            raise CacheError(
                f"{self.storage.root}: {len(chosen)} {modality} encoders{asked}; it holds {', '.join(of_modality)}. "
                f"Choose one with --encoder {modality}=PART-OF-ITS-KEY."
            )
        encoder = self.encoders[chosen[0]]
        if not encoder.manifest.finished_rows:
            raise CacheError(
                f"{self.storage.root}: the extraction of {encoder.key} is unfinished. Run saffe-extract again."
            )
        return encoder


def open_cache(path: str | Path) -> Cache:
    """
    Raises:
        CacheError: there is no cache, or one of another format version.
    """
    storage = Storage(path)
    root = read_root(storage)
    if root is None:
        raise CacheError(f"{path}: there is no feature cache. Make one with saffe-extract.")
    try:
        return Cache(storage, root)
    except CacheError:
        newer = read_root(storage)
        if newer is None or newer == root:
            raise
        return Cache(storage, newer)  # a writer replaced the table meanwhile


def verify_cache(path: str | Path) -> tuple[int, list[str]]:
    """Read everything that counts and compare it with its checksum: number of shards read, and what is wrong.

    Raises:
        CacheError: there is no cache, or one of another format version.
    """
    storage = Storage(path)
    root = read_root(storage)
    if root is None:
        raise CacheError(f"{path}: there is no feature cache. Make one with saffe-extract.")
    checks: list[Callable[[], object]] = [partial(read_table, storage, f"tables/{root.table}")]
    problems: list[str] = []
    num_shards = 0
    for key in root.encoders:
        try:
            encoder = EncoderCache(storage, read_encoder(storage, key))
        except (CacheError, OSError) as error:
            problems.append(str(error))
            continue
        checks += [partial(encoder.block, layer) for layer in encoder.block_layers]
        for name, array in encoder.manifest.arrays.items():
            folder = f"{encoder_group(key)}/{name}"
            checks.append(partial(check_array_metadata, storage, folder, array.spec, array.rows))
            checks += [partial(_check_shard, storage, folder, array, index) for index in range(len(array.shards))]
            num_shards += len(array.shards)
    for check in checks:
        try:
            check()
        except (CacheError, OSError) as error:
            problems.append(str(error))
    return num_shards, problems


def _check_shard(storage: Storage, folder: str, array: ArrayManifest, index: int) -> None:
    name = f"{folder}/{shard_name(index, array.spec)}"
    check_shard(array.spec, array.shards[index], storage.read(name), f"{storage.root}: {name}")
