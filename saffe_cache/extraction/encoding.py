"""Run a job: workers prepare batches ahead, the encoder runs, one thread converts rows, the writer's thread stores.

The thread that launches batches does nothing else, so that a GPU always has one batch running and one waiting: it takes
a prepared batch, launches it, waits for the previous batch, and passes that on as it came from the device. Its waiting
times are measured and show what limited the extraction.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from saffe_cache.core.features import CacheError, nouns
from saffe_cache.core.items import ItemTable
from saffe_cache.core.views import PLAIN
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.encoders.transfers import Encoded, HalvingEncoder, Launched
from saffe_cache.extraction.blocks import checked_blocks
from saffe_cache.extraction.config import EncodeOptions, ExtractConfig
from saffe_cache.extraction.loading import Batch, load_batches
from saffe_cache.extraction.planning import Job, find_offsets, new_job
from saffe_cache.sources.items import Media
from saffe_cache.store.dtypes import Stored, as_tensor, convert, to_storage
from saffe_cache.store.held import HeldEncoder
from saffe_cache.store.layout import ArraySpec, encoder_group, split_view
from saffe_cache.store.manifest import EncoderManifest, write_encoder
from saffe_cache.store.storage import Storage
from saffe_cache.store.writer import EncoderWriter, Portion, begin_log, write_blocks, write_weights

logger = logging.getLogger(__name__)

_ADVICE = {
    "data": "Reading and decoding limited the speed: use more --workers, smaller files or a faster disk.",
    "encoding": "The encoder limited the speed, as it should.",
    "writer": "Writing limited the speed: use a faster disk or fewer --layers.",
}


@dataclass(kw_only=True)
class Seconds:
    """How an extraction spent its time. The writer works in parallel; only its last shards are waited for."""

    waiting_for_data: float = 0.0
    encoding: float = 0.0
    waiting_for_writer: float = 0.0
    writing: float = 0.0
    total: float = 0.0

    @contextmanager
    def spent_on(self, name: str) -> Iterator[None]:
        """Add the time of the block to a field."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - started)

    @property
    def limit(self) -> str:
        """What took most of the time: "data", "encoding" or "writer"."""
        waits = {"data": self.waiting_for_data, "encoding": self.encoding, "writer": self.waiting_for_writer}
        return max(waits, key=waits.__getitem__)

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in vars(self).items()}


def run_job(storage: Storage, job: Job, media: Mapping[bytes, Media], record: Mapping[str, Any]) -> None:
    """Encode and store the rest of a job; `record` is added to the manifest's history with the times.

    Raises:
        CacheError: too many inputs are unreadable, a number overflows, or an input does not fit into memory.
        OSError: the disk is full or gone; the job can be resumed.
    """
    if job.is_done:
        return
    seconds, started, encoder = Seconds(), time.perf_counter(), HalvingEncoder(job.encoder)
    entry: dict[str, Any] = {**record, "inputs": [job.start, job.num_inputs]}
    with seconds.spent_on("encoding"):
        _store_weights(storage, job)
    if job.encoder.windows and "offsets" in job.missing:  # first: other files at a resumption must not move rows
        with EncoderWriter(storage, job.manifest, {"offsets": job.arrays["offsets"]}) as writer:
            writer.put(_offsets(job))
            writer.finish(job.manifest.finished_rows)
    with load_batches(job, media) as batches, EncoderWriter(storage, job.manifest, job.missing) as writer:
        if "offsets" in job.missing:
            writer.put(_offsets(job))
        names = [name for name in job.missing if name != "offsets"]
        unit = f" {nouns([job.encoder.request.modality])}"
        with (
            _Storing(job, writer, names) as storing,
            tqdm(total=job.num_inputs, initial=job.start, unit=unit, desc=job.manifest.key) as progress,
        ):
            _encode(batches, encoder, storing, seconds, progress.update)
        job.manifest.history.append(entry)
        with seconds.spent_on("waiting_for_writer"), seconds.spent_on("writing"):
            writer.finish(job.num_inputs)
    seconds.writing += writer.seconds
    seconds.total = time.perf_counter() - started
    entry |= {"seconds": seconds.to_json(), "limit": seconds.limit}
    if job.num_truncated:
        entry["truncated"] = job.num_truncated
    if encoder.too_large:
        entry["halved"] = [list(shape) for shape in encoder.too_large]
    write_encoder(storage, job.manifest)
    _log_times(job, seconds)


def begin_parts(storage: Storage, job: Job) -> None:
    """Store all that is known before encoding, and begin the log to which the writers of parts add.

    Raises:
        OSError: the disk is full or gone; this can be repeated.
    """
    _store_weights(storage, job)
    begin_log(storage, job.manifest, job.missing)
    if "offsets" in job.missing:
        spec, num_rows = job.arrays["offsets"]
        part = {"offsets": range(job.rows_of("offsets"), num_rows)}
        with EncoderWriter(storage, job.manifest, {"offsets": (spec, num_rows)}, part=part, name="planner") as writer:
            writer.put(_offsets(job))
            writer.finish_part()


def run_part(
    storage: Storage,
    job: Job,
    media: Mapping[bytes, Media],
    part: Mapping[str, range],
    name: str,
    advance: Callable[[int], object],
) -> dict[str, Any]:
    """Encode the chosen blocks of a job, and store some rows of its arrays.

    Args:
        part: the rows of each array, which the blocks hold.
        name: of this part in the log.
        advance: called with a number of inputs that are encoded.

    Returns:
        Times for the manifest's history, and the shapes of batches that were halved, if any.

    Raises:
        CacheError, OSError: as of `run_job`.
    """
    seconds, started, encoder = Seconds(), time.perf_counter(), HalvingEncoder(job.encoder)
    targets = {one: job.arrays[one] for one in part}
    with (
        load_batches(job, media) as batches,
        EncoderWriter(storage, job.manifest, targets, part=part, name=name) as writer,
    ):
        with _Storing(job, writer, targets) as storing:
            _encode(batches, encoder, storing, seconds, advance)
        with seconds.spent_on("waiting_for_writer"), seconds.spent_on("writing"):
            writer.finish_part()
    seconds.writing += writer.seconds
    seconds.total = time.perf_counter() - started
    return {"seconds": seconds.to_json(), "halved": [list(shape) for shape in encoder.too_large]}


def _offsets(job: Job) -> Portion:
    assert job.offsets is not None
    return Portion({"offsets": (0, to_storage(job.offsets, "int64"))})


def encode_portions(
    job: Job, media: Mapping[bytes, Media], specs: Mapping[str, ArraySpec], *, shows_progress: bool = True
) -> Generator[Portion]:
    """Yield encoded rows of some arrays, block by block, without writing them.

    Raises:
        CacheError: a number overflows, or an input does not fit into memory.
        OSError: a file that was read for its hash cannot be read again.
    """
    builder, encoder = PortionBuilder(job, specs), HalvingEncoder(job.encoder)
    total = sum(map(len, job.blocks()))
    with (
        load_batches(job, media) as batches,
        tqdm(
            total=total,
            unit=f" {nouns([job.encoder.request.modality])}",
            desc=job.manifest.key,
            disable=not shows_progress,
        ) as progress,
    ):
        for batch in batches:
            portion = builder.add(batch, encoder.launch(batch.tensors) if batch.tensors else [])
            progress.update(batch.num_finished)
            if portion is not None:
                yield portion


def encode_in_memory(
    encoder: FrozenEncoder,
    manifest: EncoderManifest,
    options: EncodeOptions,
    table: ItemTable,
    media: Mapping[bytes, Media],
    names: Collection[str],
    *,
    usual_tokens: int = 0,
) -> HeldEncoder:
    """Encode the inputs of a table as an extraction would, and keep the rows in memory.

    Args:
        manifest: of the same encoder, without rows; its arrays say how numbers are stored.
        names: the arrays that are needed.
        usual_tokens: as of `HeldEncoder`.

    Raises:
        CacheError: a number overflows, or an input does not fit into memory.
        OSError: a file that was read for its hash cannot be read again.
    """
    manifest = replace(manifest, invalid={}, history=[])
    job = new_job(encoder, manifest, options, table)
    find_offsets(job, np.zeros(1, np.int64), media)
    job.arrays = {name: (array.spec, job.first_row(name, job.num_inputs)) for name, array in manifest.arrays.items()}
    job.select([name for name in names if name != "offsets"])
    specs = {name: manifest.arrays[name].spec for name in names if name != "offsets"}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in specs}
    for portion in encode_portions(job, media, specs, shows_progress=False):
        manifest.invalid.update(portion.invalid)
        for name, (_, stored) in portion.rows.items():
            parts[name].append(stored)
    manifest.finished_rows = job.num_inputs
    held = {name: np.concatenate(stored) for name, stored in parts.items()}
    if job.offsets is not None and "offsets" in manifest.arrays:
        held["offsets"] = to_storage(job.offsets, "int64")
    return HeldEncoder(manifest, held, usual_tokens=usual_tokens)


def _encode(
    batches: Iterator[Batch],
    encoder: HalvingEncoder,
    storing: _Storing,
    seconds: Seconds,
    advance: Callable[[int], object],
) -> None:
    """Launch one batch after another, each before waiting for the previous one."""
    previous: tuple[Batch, list[Launched]] | None = None
    while True:
        with seconds.spent_on("waiting_for_data"):
            batch = next(batches, None)
        with seconds.spent_on("encoding"):
            launched = encoder.launch(batch.tensors) if batch and batch.tensors else []
            for part in previous[1] if previous else ():
                part.wait()
        if previous:
            with seconds.spent_on("waiting_for_writer"):
                storing.put(*previous)
            advance(previous[0].num_finished)
        if batch is None:
            break
        previous = batch, launched
    with seconds.spent_on("waiting_for_writer"):
        storing.finish()


def _store_weights(storage: Storage, job: Job) -> None:
    """Store the blocks that the cache lacks, and what else a language model has.

    Blocks are checked by running the encoder, so before any batch is launched.
    """
    key, encoder, known = job.manifest.key, job.encoder, job.manifest.unusable_blocks
    group = encoder_group(key)
    if encoder.language_model and not storage.exists(f"{group}/language_model/zarr.json"):
        write_weights(storage, key, "language_model", encoder.language_model)
    cut = job.cut_kinds
    unchecked = [
        layer
        for layer in encoder.block_layers
        if layer not in known and (any(cut) or not storage.exists(f"{group}/blocks/{layer}/zarr.json"))
    ]
    blocks, unusable = checked_blocks(encoder, unchecked, cut)
    write_blocks(storage, key, blocks)
    known |= unusable


class _Storing:
    """Converts encoded batches and passes them to the writer, in order, in its own thread.

    It may lag behind by as many bytes as the writer's open shards hold, so that the encoder continues while they are
    written.
    """

    def __init__(self, job: Job, writer: EncoderWriter, names: Iterable[str]) -> None:
        """`names`: the arrays that need rows."""
        self._job, self._writer = job, writer
        self._specs = {name: job.arrays[name][0] for name in names}
        self._max_bytes = job.options.shard_mb * 2**20 * len(self._specs)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="converting")
        self._tasks: deque[tuple[Future[Mapping[int, str]], int]] = deque()
        self._portions = PortionBuilder(job, self._specs)
        self._invalid = {row: reason for row, reason in job.manifest.invalid.items() if job.is_wanted[row]}

    def __enter__(self) -> _Storing:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def put(self, batch: Batch, parts: Sequence[Launched]) -> None:
        """Queue a batch; blocks while too much is queued.

        Raises:
            CacheError: a number overflows, or too many inputs are unreadable.
            OSError: an earlier portion could not be written.
        """
        num_bytes = sum(part.num_bytes for part in parts)
        self._tasks.append((self._pool.submit(self._store, batch, parts), num_bytes))
        while self._tasks[0][0].done() or (len(self._tasks) > 2 and self._queued_bytes() > self._max_bytes):
            self._take_oldest()
            if not self._tasks:
                break

    def finish(self) -> None:
        """Wait for all queued batches; raises as `put` does."""
        while self._tasks:
            self._take_oldest()

    def _queued_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self._tasks)

    def _take_oldest(self) -> None:
        found = self._tasks.popleft()[0].result()
        self._invalid |= {row: reason for row, reason in found.items() if self._job.is_wanted[row]}
        check_invalid(self._job.manifest, self._invalid, self._job.num_inputs, self._job.options, self._job.name_of)

    def _store(self, batch: Batch, parts: Sequence[Launched]) -> Mapping[int, str]:
        """In the thread: convert a batch, and write its block at the end. Returns the block's invalid inputs."""
        portion = self._portions.add(batch, parts)
        if portion is None:
            return {}
        self._writer.put(portion)
        return portion.invalid


def check_invalid(
    manifest: EncoderManifest,
    invalid: Mapping[int, str],
    num_inputs: int,
    options: ExtractConfig,
    name_of: Callable[[int], str],
) -> None:
    """
    Raises:
        CacheError: more inputs are unreadable than --max-invalid allows.
    """
    if len(invalid) > options.max_invalid * num_inputs:
        row, reason = max(invalid.items())
        raise CacheError(
            f"{manifest.key}: {len(invalid)} of {num_inputs} inputs are unreadable, more than --max-invalid "
            f"{options.max_invalid:g} allows; for instance {name_of(row)}: {reason}. Correct the data, or raise "
            "--max-invalid; all encoded inputs are kept."
        )


def _log_times(job: Job, seconds: Seconds) -> None:
    done = job.num_inputs - job.start
    named = "; ".join(f"{job.name_of(row)}: {reason}" for row, reason in list(job.manifest.invalid.items())[:3])
    logger.info(
        "%s: %d %s in %.1f s, %.1f per second: %.1f s waiting for data, %.1f s encoding, %.1f s waiting for the "
        "writer, which wrote for %.1f s. %s %d inputs are unreadable%s",
        *(job.manifest.key, done, nouns([job.encoder.request.modality]), seconds.total, done / seconds.total),
        *(seconds.waiting_for_data, seconds.encoding, seconds.waiting_for_writer, seconds.writing),
        *(_ADVICE[seconds.limit], len(job.manifest.invalid), f": {named}." if named else "."),
    )


class PortionBuilder:
    """Turns the batches of a job, in order, into one portion per block."""

    def __init__(self, job: Job, specs: Mapping[str, ArraySpec]) -> None:
        """`specs`: the arrays that need rows."""
        self._job, self._specs = job, specs
        self._rows: BlockRows | None = None

    def add(self, batch: Batch, parts: Sequence[Launched]) -> Portion | None:
        """Add a batch; returns the portion if the batch ends its block.

        Raises:
            CacheError: a finite number exceeds the range of the storage type.
        """
        if self._rows is None:
            self._rows = BlockRows(self._job, batch.block, self._specs)
        self._rows.invalid.update(batch.unreadable)
        done = 0
        for part in parts:
            encoded = part.encoded()
            these = slice(done, done + len(encoded.lengths))
            if batch.starts is None or batch.weights is None:
                self._rows.put(batch.inputs[these], encoded, view=batch.view)
            else:
                self._rows.put(batch.inputs[these], encoded, batch.starts[these], batch.weights[these])
            done = these.stop
        if not batch.ends_block:
            return None
        portion, self._rows = self._rows.to_portion(), None
        return portion


class BlockRows:
    """The rows of one block of inputs, from batches in any order; inputs without a batch become rows of NaN."""

    def __init__(self, job: Job, block: range, specs: Mapping[str, ArraySpec]) -> None:
        """`specs`: the arrays that need rows."""
        self._job, self._block, self._specs = job, block, specs
        self._first = {name: job.first_row(name, block.start) for name in specs}
        self._stored: dict[str, np.ndarray] = {}
        self._missing = set(block)
        self._sums: dict[str, np.ndarray] = {}
        """float64 [inputs of the block, d]: of the vectors of each sound's windows, by their weights."""
        self._weights = np.zeros(len(block))
        self.invalid: dict[int, str] = {}

    def put(
        self,
        inputs: Sequence[int],
        encoded: Encoded,
        starts: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        view: str = PLAIN,
    ) -> None:
        """Add a batch: one row of `encoded` per input. Inputs with non-finite numbers become invalid.

        Args:
            inputs: the input of each row; of a sound, for each of its windows.
            encoded: the batch.
            starts: for windows of sounds, where each begins among the rows of its sound.
            weights: for windows of sounds, what the vector of each counts for.
            view: the view that it has of its photos.

        Raises:
            CacheError: a finite number exceeds the range of the storage type.
        """
        owners, lengths = np.asarray(inputs), encoded.lengths
        for name in (one for one in self._specs if split_view(one)[0] == view):
            if self._job.is_flat(name):
                within = _counted(lengths) + (0 if starts is None else np.repeat(starts, lengths))
                self._put(name, self._rows(name, encoded), np.repeat(owners, lengths), within)
            elif weights is None:
                self._put(name, self._rows(name, encoded), owners)
            else:
                self._add(name, encoded.vectors[name], owners, weights)
        if weights is not None:
            np.add.at(self._weights, owners - self._block.start, weights)
        self._missing -= set(inputs)

    def _add(self, name: str, vectors: np.ndarray, owners: np.ndarray, weights: np.ndarray) -> None:
        """Add the vectors of windows to those of their sounds."""
        sums = self._sums.setdefault(name, np.zeros((len(self._block), vectors.shape[1])))
        np.add.at(sums, owners - self._block.start, vectors * weights[:, None].astype(np.float64))

    def _rows(self, name: str, encoded: Encoded) -> Stored:
        """A batch's rows of one array without padding, converted here unless the device has done so."""
        converted = {f"hidden_states/{i}": Stored(*parts) for i, parts in encoded.converted.items()}
        own = split_view(name)[1]
        stored = converted.get(own)
        states = {f"hidden_states/{i}": states for i, states in encoded.states.items()}
        values = stored.rows if stored else as_tensor((states | dict(encoded.vectors))[own])
        if not self._job.is_flat(name):
            return stored or convert(values, self._specs[name].dtype)
        if len(self._specs[name].row_shape) > 1:  # a row is a whole window
            return stored or convert(values, self._specs[name].dtype)
        is_real = torch.arange(values.shape[1]) < torch.from_numpy(encoded.lengths)[:, None]
        return stored.select(is_real) if stored else convert(values[is_real], self._specs[name].dtype)

    def to_portion(self) -> Portion:
        """All rows of the block."""
        for name, sums in self._sums.items():
            owners = np.array([row for row in self._block if row not in self._missing])
            means = (sums[owners - self._block.start] / self._weights[owners - self._block.start, None]).astype("f4")
            self._put(name, convert(as_tensor(means), self._specs[name].dtype), owners)
        if self._missing:
            missing = np.array(sorted(self._missing))
            for name, spec in self._specs.items():
                blank = to_storage(np.full((1, *spec.row_shape), np.nan, np.float32), spec.dtype)
                for first, after in zip(*(self._places(name, missing + more) for more in (0, 1)), strict=True):
                    self._room(name)[first:after] = blank
        return Portion({name: (self._first[name], self._stored[name]) for name in self._specs}, self.invalid)

    def _put(self, name: str, rows: Stored, owners: np.ndarray, within: np.ndarray | int = 0) -> None:
        """Place rows of one array: `owners` are their inputs, `within` their positions among the rows of that input."""
        is_finite = rows.is_finite.reshape(len(owners), -1).all(dim=1).numpy()
        for owner in np.unique(owners[~is_finite]):
            self.invalid.setdefault(int(owner), f"{name} is not finite")
        stored = self._checked(name, rows, owners)
        if not self._job.is_flat(name) and np.array_equal(owners, self._block):
            # the whole block in order; copied only if it is a view, which would keep a larger array alive
            self._stored[name] = np.ascontiguousarray(stored)
        else:
            self._room(name)[self._places(name, owners, within)] = stored

    def _checked(self, name: str, rows: Stored, owners: np.ndarray) -> np.ndarray:
        try:
            return rows.to_numpy(self._specs[name].dtype)
        except OverflowError as error:
            worst = int(rows.lost.reshape(len(owners), -1).amax(dim=1).argmax())
            raise CacheError(
                f"{self._job.manifest.key}: {name} of input {owners[worst]}: {error}. "
                "Extract into a new cache with --storage bfloat16 or float32."
            ) from None

    def _room(self, name: str) -> np.ndarray:
        if name not in self._stored:
            spec = self._specs[name]
            self._stored[name] = np.empty((self._num_rows(name), *spec.stored_shape), spec.numpy_dtype)
        return self._stored[name]

    def _num_rows(self, name: str) -> int:
        return self._job.first_row(name, self._block.stop) - self._first[name]

    def _places(self, name: str, owners: np.ndarray, within: np.ndarray | int = 0) -> np.ndarray:
        """Positions of the inputs' rows among the block's rows of an array."""
        firsts = owners
        if self._job.is_flat(name):
            assert self._job.offsets is not None
            firsts = self._job.offsets[owners]
        return np.asarray(firsts - self._first[name] + within)


def _counted(lengths: np.ndarray) -> np.ndarray:
    """0 … n - 1 for each length n, concatenated."""
    counted: np.ndarray = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return counted
