"""Write an encoder's arrays, shard by shard.

Rows come in order, in portions of any size. A full shard is written at once, while its checksum and statistics are
computed and the next shard fills. When the next shard is full too, the first is durable and is recorded
in the manifest. A killed process therefore loses at most two shards of each array, and at most two are in memory. A
tail shard that new rows extend is read back, checked, and written again as a whole.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from saffe_cache.core.atomic_io import make_folder
from saffe_cache.core.features import BlockWeights, LanguageModelWeights
from saffe_cache.store.layout import ArraySpec, ShardEntry, decode_shard, describe_shard, encode_shard, shard_name
from saffe_cache.store.manifest import (
    LANGUAGE_MODEL,
    ArrayManifest,
    EncoderManifest,
    array_metadata,
    encoder_group,
    language_model_group,
    layers_among,
    write_encoder,
)
from saffe_cache.store.storage import Storage, describe_group, mark_group, write_group

_HELPERS = 4
"""Threads that write shards, compute their entries, and make the next folders. No task waits for another."""


class _Writing(NamedTuple):
    """A shard that is being written."""

    number: int
    written: Future[None]
    entry: Future[ShardEntry]


class _ArrayWriter:
    """One array: `position` rows are on disk, being written, or in the open shard as the portions they came in."""

    def __init__(
        self, storage: Storage, folder: str, array: ArrayManifest, target_rows: int, helpers: Executor
    ) -> None:
        self._storage, self._folder, self._spec, self._helpers = storage, folder, array.spec, helpers
        self.entries = list(array.shards)
        self.position = array.rows
        self.target_rows = max(target_rows, array.rows)
        self._written = self.position
        self._open = [self._read_tail(array)] if self.position % self._spec.shard_rows else []
        self._under_way: _Writing | None = None
        self._next_folder = helpers.submit(self._make_folder, self.position // self._spec.shard_rows)
        storage.write(f"{folder}/zarr.json", array_metadata(array.spec, self.target_rows))

    def append(self, first_row: int, rows: np.ndarray) -> bool:
        """Add rows in the stored type; rows that are present are skipped. Returns whether a shard became durable."""
        assert first_row <= self.position, f"rows {self.position}…{first_row} of {self._folder} are missing"
        fresh, settled = rows[self.position - first_row :], False
        while len(fresh):
            filled = self.position % self._spec.shard_rows
            taken = min(self._spec.shard_rows - filled, len(fresh))
            self._open.append(fresh[:taken])
            fresh = fresh[taken:]
            self.position += taken
            if filled + taken == self._spec.shard_rows:
                settled |= self.settle()
                self._begin()
        return settled

    def flush(self) -> None:
        """Start writing the open shard, if it has rows that are not on disk."""
        if self.position > self._written:
            self.settle()
            self._begin()

    def settle(self) -> bool:
        """Wait until the shard that is being written is durable; False if there is none."""
        if self._under_way is None:
            return False
        number, written, entry = self._under_way
        written.result()
        self.entries[number:] = [entry.result()]
        self._under_way = None
        return True

    def _begin(self) -> None:
        index = (self.position - 1) // self._spec.shard_rows
        self._next_folder.result()
        written = self._helpers.submit(self._store, index, self._open)
        self._under_way = _Writing(index, written, self._helpers.submit(describe_shard, self._spec, *self._open))
        self._next_folder = self._helpers.submit(self._make_folder, index + 1)
        self._written = self.position
        if self.position % self._spec.shard_rows == 0:
            self._open = []

    def _store(self, index: int, portions: Sequence[np.ndarray]) -> None:
        self._storage.write(self._name(index), *encode_shard(self._spec, *portions))

    def _make_folder(self, index: int) -> None:
        """Make a shard's folder in advance, if the shard will exist: fsync of a folder is as slow as that of a file."""
        path = self._storage.local_path(self._name(index))
        if path is not None and index * self._spec.shard_rows < self.target_rows:
            make_folder(path.parent)

    def _name(self, index: int) -> str:
        return f"{self._folder}/{shard_name(index, self._spec)}"

    def _read_tail(self, array: ArrayManifest) -> np.ndarray:
        entry = array.shards[-1]
        name = self._name(len(array.shards) - 1)
        return decode_shard(array.spec, entry, self._storage.read(name), f"{self._storage.root}: {name}")


@dataclass(frozen=True)
class Portion:
    """Consecutive rows of several arrays."""

    rows: Mapping[str, tuple[int, np.ndarray]]
    """name -> (first row, rows in the stored type). They are not copied, so they must not be changed afterwards."""
    invalid: Mapping[int, str] = field(default_factory=dict)
    """Reason for each input of this portion that could not be encoded."""


class EncoderWriter:
    """Writes one encoder's group in a thread of its own.

    Use it as a context manager and call `finish` at the end; leaving the context alone does not finish the extraction.
    """

    def __init__(
        self, storage: Storage, manifest: EncoderManifest, targets: Mapping[str, tuple[ArraySpec, int]]
    ) -> None:
        """`targets`: the spec and the final number of rows of each growing array."""
        self._storage, self.manifest = storage, manifest
        self.seconds = 0.0
        """Time spent writing."""
        group = encoder_group(manifest.key)
        mark_group(storage, "encoders")
        if layers_among(targets):
            mark_group(storage, f"{group}/hidden_states")
        self._helpers = ThreadPoolExecutor(_HELPERS, "shard-helper")
        self._arrays: dict[str, _ArrayWriter] = {}
        for name, (spec, target_rows) in targets.items():
            array = manifest.arrays.setdefault(name, ArrayManifest(spec))
            self._arrays[name] = _ArrayWriter(storage, f"{group}/{name}", array, target_rows, self._helpers)
        write_encoder(storage, manifest)
        self._portions: queue.Queue[Portion | None] = queue.Queue(maxsize=1)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)

    def __enter__(self) -> EncoderWriter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._helpers.shutdown()

    def put(self, portion: Portion) -> None:
        """Queue a portion; blocks while another one is queued.

        Raises:
            OSError: an earlier portion could not be written, for instance because the disk is full.
        """
        self._raise_failure()
        self._portions.put(portion)

    def finish(self, num_inputs: int) -> None:
        """Write the remaining rows, and record that `num_inputs` inputs are complete in every array."""
        self._stop()
        self._raise_failure()
        for name, array in self._arrays.items():
            assert array.position == array.target_rows, f"{name} ends at row {array.position} of {array.target_rows}"
            array.flush()
        for array in self._arrays.values():
            array.settle()
        self.manifest.finished_rows = num_inputs
        self._commit()

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._portions.put(None)
            self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (portion := self._portions.get()) is not None:
            if self._failure is None:
                self._try(partial(self._write, portion))
        self._try(self._settle)  # also after a failure, so that all durable shards count

    def _try(self, step: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            step()
        except BaseException as error:
            self._failure = self._failure or error
        self.seconds += time.perf_counter() - started

    def _write(self, portion: Portion) -> None:
        settled = [self._arrays[name].append(first_row, rows) for name, (first_row, rows) in portion.rows.items()]
        self.manifest.invalid.update(portion.invalid)
        if any(settled):
            self._commit()

    def _settle(self) -> None:
        """Wait for all shards that are being written, and record them."""
        settled = [array.settle() for array in self._arrays.values()]
        if any(settled):
            self._commit()

    def _commit(self) -> None:
        for name, array in self._arrays.items():
            self.manifest.arrays[name].shards = list(array.entries)
        write_encoder(self._storage, self.manifest)


def write_blocks(storage: Storage, key: str, blocks: Mapping[int, BlockWeights]) -> None:
    """Store the blocks that consume the cached layers, as float32; existing blocks are left unchanged."""
    mark_group(storage, f"{encoder_group(key)}/blocks")
    for index, block in blocks.items():
        if not storage.exists(f"{_block_group(key, index)}/zarr.json"):
            write_block(storage, key, index, block)


def write_block(storage: Storage, key: str, index: int, block: BlockWeights) -> None:
    """Store a block as float32, replacing an existing one."""
    mark_group(storage, f"{encoder_group(key)}/blocks")
    tensors = {tensor: np.asarray(values, np.float32) for tensor, values in sorted(block.tensors.items())}
    attributes = describe_group("saffe-block", tensors, {"spec": vars(block.spec)})
    write_group(storage, _block_group(key, index), attributes, tensors)


def write_language_model(storage: Storage, key: str, weights: LanguageModelWeights) -> None:
    """Store the parts of a language model that are not blocks, replacing existing ones."""
    tensors = {name: np.asarray(values, np.float32) for name, values in sorted(weights.tensors.items())}
    tensors["tokenizer"] = np.frombuffer(weights.tokenizer.encode(), np.uint8)
    attributes = describe_group(LANGUAGE_MODEL, tensors, {"spec": vars(weights.spec)})
    write_group(storage, language_model_group(key), attributes, tensors)


def _block_group(key: str, index: int) -> str:
    return f"{encoder_group(key)}/blocks/{index}"


def write_array_metadata(storage: Storage, key: str, name: str, array: ArrayManifest) -> None:
    """Rewrite an array's `zarr.json` for its committed rows."""
    if layers_among([name]):
        mark_group(storage, f"{encoder_group(key)}/hidden_states")
    storage.write(f"{encoder_group(key)}/{name}/zarr.json", array_metadata(array.spec, array.rows))


def write_shard(storage: Storage, key: str, name: str, index: int, spec: ArraySpec, rows: np.ndarray) -> None:
    """Replace a shard; the manifest is not changed."""
    storage.write(f"{encoder_group(key)}/{name}/{shard_name(index, spec)}", *encode_shard(spec, rows))
