"""Write an encoder's arrays, shard by shard.

Rows come in order, in portions of any size. A full shard is written at once by other threads, while the next shard
fills. When that is full too, the first is durable and is recorded in the extraction's log. A killed process therefore
loses at most two shards of each array, and at most two are in memory. A tail shard that new rows extend is read back,
checked, and written again as a whole.

One writer writes all that an encoder lacks, or several write a part each, of whole shards.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from saffe_cache.core.atomic_io import make_folder
from saffe_cache.core.features import BlockWeights, LanguageModelWeights, Weights
from saffe_cache.store.arrays import ArrayFiles
from saffe_cache.store.layout import ArraySpec, ShardEntry, describe_shard, encoder_group
from saffe_cache.store.log import LogWriter, Record
from saffe_cache.store.manifest import ArrayManifest, EncoderManifest, log_folder, weights_type, write_encoder
from saffe_cache.store.storage import Storage, describe_group, mark_group, write_group

_HELPERS = 4
"""Threads that write shards, compute their entries, and make the next folders. No task waits for another."""


class _ArrayWriter:
    """One array: rows before `position` are on disk, being written, or in the open shard as the portions they came in.

    `committed` are the shards that became durable since they were taken from it.
    """

    def __init__(self, files: ArrayFiles, array: ArrayManifest, rows: range, helpers: Executor) -> None:
        """`rows`: those to write, from the start of a shard or the array's committed rows; the last shard is whole, or
        the array's tail."""
        self._files, self._shard_rows, self._helpers = files, files.spec.shard_rows, helpers
        self._array, self.committed = array, dict[int, ShardEntry]()
        self.position = self._written = rows.start
        self.stop = max(rows.start, rows.stop)
        self._open: list[np.ndarray] = []
        if self.position % self._shard_rows:
            index = self.position // self._shard_rows
            entry = array.entry(index)
            assert entry is not None
            self._open = [files.read(index, entry)]
        self._under_way: tuple[int, Future[None], Future[ShardEntry]] | None = None
        """Number of the shard that is being written, and its results."""
        self._next_folder = helpers.submit(self._make_folder, self.position // self._shard_rows)

    def append(self, first_row: int, rows: np.ndarray) -> bool:
        """Add rows in the stored type; those before the position and from the end on are skipped.

        Returns whether a shard became durable.
        """
        if self.position == self.stop:
            return False
        assert first_row <= self.position, f"rows {self.position}…{first_row} of {self._files.folder} are missing"
        fresh, settled = rows[self.position - first_row : self.stop - first_row], False
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
        self.committed[number] = entry.result()
        self._array.commit(number, entry.result())
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
        if path is not None and index * self._shard_rows < self.stop:
            make_folder(path.parent)


@dataclass(frozen=True)
class Portion:
    """Consecutive rows of several arrays."""

    rows: Mapping[str, tuple[int, np.ndarray]]
    """name -> (first row, rows in the stored type). They are not copied, so they must not be changed afterwards."""
    invalid: Mapping[int, str] = field(default_factory=dict)
    """Reason for each input of this portion that could not be encoded."""


class EncoderWriter:
    """Writes one encoder's group, or a part of it; other threads write its shards.

    Use it as a context manager and call `finish` (or, for a part, `finish_part`) at the end; leaving the context alone
    does not finish the extraction.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: EncoderManifest,
        targets: Mapping[str, tuple[ArraySpec, int]],
        *,
        part: Mapping[str, range] | None = None,
        name: str = "writer",
    ) -> None:
        """
        Args:
            targets: the spec and the final number of rows of each growing array.
            part: the rows of each array that this writer writes, if others write the rest: whole shards, the last of
                which may be the array's tail. `begin_log` has been called before, once for all.
            name: of this writer in the log; no other that runs has it.
        """
        self._storage, self.manifest = storage, manifest
        self.seconds = 0.0
        """Time spent in `put`."""
        if part is None:
            begin_log(storage, manifest, targets)
        self._log = LogWriter(storage, log_folder(manifest), name)
        self._new = Record()
        self._helpers = ThreadPoolExecutor(_HELPERS, "shard-helper")
        self._arrays: dict[str, _ArrayWriter] = {}
        for array_name, (spec, num_rows) in targets.items():
            array = manifest.arrays[array_name]
            rows = range(array.rows, num_rows) if part is None else part[array_name]
            files = ArrayFiles(storage, manifest.key, array_name, spec)
            self._arrays[array_name] = _ArrayWriter(files, array, rows, self._helpers)

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
        self._new.invalid.update(portion.invalid)
        if any(settled):
            self._record()
        self.seconds += time.perf_counter() - started

    def finish_part(self) -> None:
        """Write the remaining rows and record them.

        Raises OSError if a portion could not be written.
        """
        self._finish_rows()
        self._log.join()

    def _finish_rows(self) -> None:
        for name, array in self._arrays.items():
            assert array.position == array.stop, f"{name} ends at row {array.position} of {array.stop}"
        self._settle()
        for array in self._arrays.values():
            array.flush()
        for array in self._arrays.values():
            array.settle()
        self._record()

    def finish(self, num_inputs: int) -> None:
        """Write the remaining rows, and record in the manifest that `num_inputs` inputs are complete in every array.

        Raises OSError if a portion could not be written.
        """
        self._finish_rows()
        end_log(self._storage, self.manifest, num_inputs)

    def _settle(self) -> None:
        """Wait for all shards that are being written, and record them."""
        for array in self._arrays.values():
            array.settle()
        self._record()

    def _record(self) -> None:
        """Add what has become durable to the log."""
        for name, array in self._arrays.items():
            if array.committed:
                self._new.shards[name], array.committed = array.committed, {}
        if self._new:
            self._log.add(self._new)
            self._new = Record()


def begin_log(storage: Storage, manifest: EncoderManifest, targets: Mapping[str, tuple[ArraySpec, int]]) -> None:
    """Enter the arrays that will grow into the manifest, and begin a log, or go on with an interrupted one.

    Args:
        targets: the spec and the final number of rows of each growing array.
    """
    for group in ("encoders", f"{encoder_group(manifest.key)}/blocks"):
        mark_group(storage, group)
    for name, (spec, num_rows) in targets.items():
        array = manifest.arrays.setdefault(name, ArrayManifest(spec))
        ArrayFiles(storage, manifest.key, name, spec).write_metadata(max(num_rows, array.rows))
    if targets and not manifest.log:
        manifest.log = secrets.token_hex(8)
    write_encoder(storage, manifest)


def end_log(storage: Storage, manifest: EncoderManifest, num_inputs: int) -> None:
    """Commit that `num_inputs` inputs are complete in every array, with all that the log says, and remove the log."""
    manifest.finished_rows, manifest.log = num_inputs, ""
    write_encoder(storage, manifest)
    storage.remove_folder(f"{encoder_group(manifest.key)}/log")


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
