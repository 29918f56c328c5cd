"""Write an encoder's arrays, shard by shard.

Rows come in order, in portions of any size. A full shard is written at once by other threads, while the next shard
fills. When that is full too, the first is durable and is recorded in the manifest. A killed process therefore loses at
most two shards of each array, and at most two are in memory. A tail shard that new rows extend is read back, checked,
and written again as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from saffe_cache.core.atomic_io import make_folder
from saffe_cache.core.features import BlockWeights, LanguageModelWeights, Weights
from saffe_cache.store.layout import ArraySpec, ShardEntry, describe_shard
from saffe_cache.store.manifest import (
    ArrayFiles,
    ArrayManifest,
    EncoderManifest,
    encoder_group,
    weights_type,
    write_encoder,
)
from saffe_cache.store.storage import Storage, describe_group, mark_group, write_group

_HELPERS = 4
"""Threads that write shards, compute their entries, and make the next folders. No task waits for another."""


class _ArrayWriter:
    """One array: `position` rows are on disk, being written, or in the open shard as the portions they came in."""

    def __init__(self, files: ArrayFiles, array: ArrayManifest, target_rows: int, helpers: Executor) -> None:
        self._files, self._shard_rows, self._helpers = files, files.spec.shard_rows, helpers
        self._entries = array.shards
        self.position = self._written = array.rows
        self.target_rows = max(target_rows, array.rows)
        self._open: list[np.ndarray] = []
        if self.position % self._shard_rows:
            self._open = [files.read(len(array.shards) - 1, array.shards[-1])]
        self._under_way: tuple[int, Future[None], Future[ShardEntry]] | None = None
        """Number of the shard that is being written, and its results."""
        self._next_folder = helpers.submit(self._make_folder, self.position // self._shard_rows)
        files.write_metadata(self.target_rows)

    def append(self, first_row: int, rows: np.ndarray) -> bool:
        """Add rows in the stored type; rows that are present are skipped. Returns whether a shard became durable."""
        assert first_row <= self.position, f"rows {self.position}…{first_row} of {self._files.folder} are missing"
        fresh, settled = rows[self.position - first_row :], False
        while len(fresh):
            taken = fresh[: self._shard_rows - self.position % self._shard_rows]
            self._open.append(taken)
            fresh = fresh[len(taken) :]
            self.position += len(taken)
            if self.position % self._shard_rows == 0:
                settled |= self.settle()
                self._begin()
        return settled

    def flush(self) -> None:
        """Start writing the open shard, if it has rows that are not on disk; all others must be settled."""
        if self.position > self._written:
            self._begin()

    def settle(self) -> bool:
        """Wait until the shard that is being written is durable; False if there is none."""
        if self._under_way is None:
            return False
        number, written, entry = self._under_way
        written.result()
        self._entries[number:] = [entry.result()]
        self._under_way = None
        return True

    def _begin(self) -> None:
        index = (self.position - 1) // self._shard_rows
        self._next_folder.result()
        written = self._helpers.submit(self._files.write, index, *self._open)
        entry = self._helpers.submit(describe_shard, self._files.spec, *self._open)
        self._under_way = index, written, entry
        self._next_folder = self._helpers.submit(self._make_folder, index + 1)
        self._written = self.position
        if self.position % self._shard_rows == 0:
            self._open = []

    def _make_folder(self, index: int) -> None:
        """Make a shard's folder in advance, if the shard will exist: fsync of a folder is as slow as that of a file."""
        path = self._files.storage.local_path(self._files.shard(index))
        if path is not None and index * self._shard_rows < self.target_rows:
            make_folder(path.parent)


@dataclass(frozen=True)
class Portion:
    """Consecutive rows of several arrays."""

    rows: Mapping[str, tuple[int, np.ndarray]]
    """name -> (first row, rows in the stored type). They are not copied, so they must not be changed afterwards."""
    invalid: Mapping[int, str] = field(default_factory=dict)
    """Reason for each input of this portion that could not be encoded."""


class EncoderWriter:
    """Writes one encoder's group; other threads write its shards.

    Use it as a context manager and call `finish` at the end; leaving the context alone does not finish the extraction.
    """

    def __init__(
        self, storage: Storage, manifest: EncoderManifest, targets: Mapping[str, tuple[ArraySpec, int]]
    ) -> None:
        """`targets`: the spec and the final number of rows of each growing array."""
        self._storage, self.manifest = storage, manifest
        self.seconds = 0.0
        """Time spent in `put`."""
        for group in ("encoders", f"{encoder_group(manifest.key)}/blocks"):
            mark_group(storage, group)
        self._helpers = ThreadPoolExecutor(_HELPERS, "shard-helper")
        self._arrays: dict[str, _ArrayWriter] = {}
        for name, (spec, target_rows) in targets.items():
            array = manifest.arrays.setdefault(name, ArrayManifest(spec))
            files = ArrayFiles(storage, manifest.key, name, spec)
            self._arrays[name] = _ArrayWriter(files, array, target_rows, self._helpers)
        write_encoder(storage, manifest)

    def __enter__(self) -> EncoderWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with self._helpers:
            self._settle()  # also after a failure, so that all durable shards count

    def put(self, portion: Portion) -> None:
        """Add a portion; waits for earlier shards if their writing takes longer than the next ones need to fill.

        Raises OSError if an earlier portion could not be written, for instance because the disk is full.
        """
        started = time.perf_counter()
        settled = [self._arrays[name].append(first_row, rows) for name, (first_row, rows) in portion.rows.items()]
        self.manifest.invalid.update(portion.invalid)
        if any(settled):
            write_encoder(self._storage, self.manifest)
        self.seconds += time.perf_counter() - started

    def finish(self, num_inputs: int) -> None:
        """Write the remaining rows, and record that `num_inputs` inputs are complete in every array.

        Raises OSError if a portion could not be written.
        """
        for name, array in self._arrays.items():
            assert array.position == array.target_rows, f"{name} ends at row {array.position} of {array.target_rows}"
        self._settle()
        for array in self._arrays.values():
            array.flush()
        for array in self._arrays.values():
            array.settle()
        self.manifest.finished_rows = num_inputs
        write_encoder(self._storage, self.manifest)

    def _settle(self) -> None:
        """Wait for all shards that are being written, and record them."""
        settled = [array.settle() for array in self._arrays.values()]
        if any(settled):
            write_encoder(self._storage, self.manifest)


def write_blocks(storage: Storage, key: str, blocks: Mapping[int, BlockWeights]) -> None:
    """Store the blocks that consume the cached layers, as float32; existing blocks are left unchanged."""
    for index, block in blocks.items():
        if not storage.exists(f"{encoder_group(key)}/blocks/{index}/zarr.json"):
            write_weights(storage, key, f"blocks/{index}", block)


def write_weights(storage: Storage, key: str, name: str, weights: Weights) -> None:
    """Store a block (`blocks/I`) or the other parts of a language model (`language_model`) as float32.

    Existing ones are replaced.
    """
    if isinstance(weights, BlockWeights):
        mark_group(storage, f"{encoder_group(key)}/blocks")
    tensors = {tensor: np.asarray(values, np.float32) for tensor, values in sorted(weights.tensors.items())}
    if isinstance(weights, LanguageModelWeights):
        tensors["tokenizer"] = np.frombuffer(weights.tokenizer.encode(), np.uint8)
    attributes = describe_group(weights_type(name), tensors, {"spec": vars(weights.spec)})
    write_group(storage, f"{encoder_group(key)}/{name}", attributes, tensors)
