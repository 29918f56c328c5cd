"""Doing a job: workers prepare batches ahead, the encoder runs, one thread converts, the writer's thread stores.

The thread that launches batches does nothing else, so that a GPU always has one batch at work and one waiting: it takes
a prepared batch, launches it, waits for the batch before, and hands that on as it came from the device. What it waits
for is counted, and so tells what the extraction was limited by.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from saffe_cache.core.features import CacheError
from saffe_cache.encoders.encoder import Launched
from saffe_cache.extraction.loading import Batch, load_batches
from saffe_cache.extraction.oom_retry import HalvingEncoder
from saffe_cache.extraction.planning import Job
from saffe_cache.extraction.rows import PortionMaker
from saffe_cache.sources import Media
from saffe_cache.store.dtypes import to_storage
from saffe_cache.store.layout import ArraySpec
from saffe_cache.store.manifest import language_model_group, write_encoder
from saffe_cache.store.storage import Storage
from saffe_cache.store.writer import EncoderWriter, Portion, write_blocks, write_language_model

logger = logging.getLogger(__name__)

_ADVICE = {
    "data": "Reading and decoding was the limit: more --workers, smaller files or a quicker disk would help.",
    "encoding": "The encoder was the limit, as it should be.",
    "writer": "Writing was the limit: a quicker disk or fewer --layers would help.",
}


@dataclass(kw_only=True)
class Seconds:
    """Where the time of an extraction went. The writer works beside the rest; its last shards are waited for."""

    waiting_for_data: float = 0.0
    encoding: float = 0.0
    waiting_for_writer: float = 0.0
    writing: float = 0.0
    total: float = 0.0

    @contextmanager
    def spent_on(self, name: str) -> Iterator[None]:
        """Add what the block takes to a field."""
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
    """Encode and store what is left of a job; `record` goes into the manifest's history with its times.

    Raises:
        CacheError: too many inputs are unreadable, a number overflows, or a single input does not fit into memory.
        OSError: the disk is full or gone; the job can be resumed.
    """
    if job.is_done:
        return
    seconds, started, encoder = Seconds(), time.perf_counter(), HalvingEncoder(job.encoder)
    entry: dict[str, Any] = {**record, "inputs": [job.start, job.num_inputs]}
    with load_batches(job, media) as batches, EncoderWriter(storage, job.manifest, job.missing) as writer:
        if job.offsets is not None and "offsets" in job.missing:
            writer.put(Portion({"offsets": (0, to_storage(job.offsets, "int64"))}))
        with _Storing(storage, job, writer) as storing:
            _encode(job, batches, encoder, storing, seconds)
        job.manifest.history.append(entry)
        with seconds.spent_on("waiting_for_writer"), seconds.spent_on("writing"):
            writer.finish(job.num_inputs)
    seconds.writing += writer.seconds
    seconds.total = time.perf_counter() - started
    entry |= {"seconds": seconds.to_json(), "limit": seconds.limit}
    if encoder.too_large:
        entry["halved"] = [list(shape) for shape in encoder.too_large]
    write_encoder(storage, job.manifest)
    _say_what_took_time(job, seconds)


def encode_portions(job: Job, media: Mapping[bytes, Media], specs: Mapping[str, ArraySpec]) -> Generator[Portion]:
    """The rows of some arrays, block after block, for nobody's writer.

    Raises:
        CacheError: a number overflows, or a single input does not fit into memory.
        OSError: a file that could be read for its hash cannot be read any more.
    """
    maker, encoder = PortionMaker(job, specs), HalvingEncoder(job.encoder)
    total = sum(map(len, job.blocks()))
    with (
        load_batches(job, media) as batches,
        tqdm(total=total, unit=f" {job.encoder.request.modality}s", desc=job.manifest.key) as progress,
    ):
        for batch in batches:
            portion = maker.take(batch, encoder.launch(batch.tensors) if batch.tensors else [])
            progress.update(len(batch.inputs) + len(batch.unreadable))
            if portion is not None:
                yield portion


def _encode(job: Job, batches: Iterator[Batch], encoder: HalvingEncoder, storing: _Storing, seconds: Seconds) -> None:
    """Launch batch after batch, one ahead of the one that is waited for."""
    unit = f" {job.encoder.request.modality}s"
    before: tuple[Batch, list[Launched]] | None = None
    with tqdm(total=job.num_inputs, initial=job.start, unit=unit, desc=job.manifest.key) as progress:
        while True:
            with seconds.spent_on("waiting_for_data"):
                batch = next(batches, None)
            with seconds.spent_on("encoding"):
                launched = encoder.launch(batch.tensors) if batch and batch.tensors else []
                for part in before[1] if before else ():
                    part.wait()
            if before:
                with seconds.spent_on("waiting_for_writer"):
                    storing.put(*before)
                progress.update(len(before[0].inputs) + len(before[0].unreadable))
            if batch is None:
                break
            before = batch, launched
        with seconds.spent_on("waiting_for_writer"):
            storing.finish()


class _Storing:
    """Stores the blocks, then converts what was encoded and hands it to the writer, in order, in a thread of its own.

    It may lag behind by as many bytes as the writer's open shards hold, so that the encoder goes on while they are
    written.
    """

    def __init__(self, storage: Storage, job: Job, writer: EncoderWriter) -> None:
        self._storage, self._job, self._writer = storage, job, writer
        self._specs = {name: spec for name, (spec, _) in job.missing.items() if name != "offsets"}
        self._most_bytes = job.options.shard_mb * 2**20 * len(self._specs)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="converting")
        self._tasks: deque[tuple[Future[Mapping[int, str]], int]] = deque()
        self._portions = PortionMaker(job, self._specs)
        self._invalid = {row: reason for row, reason in job.manifest.invalid.items() if job.is_wanted[row]}

    def __enter__(self) -> _Storing:
        self._tasks.append((self._pool.submit(self._store_blocks), 0))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def put(self, batch: Batch, parts: Sequence[Launched]) -> None:
        """Hand over a batch; waits while too much is ahead.

        Raises:
            CacheError: a number overflows, or too many inputs are unreadable.
            OSError: an earlier portion could not be written.
        """
        num_bytes = sum(part.num_bytes for part in parts)
        self._tasks.append((self._pool.submit(self._store, batch, parts), num_bytes))
        while self._tasks[0][0].done() or (len(self._tasks) > 2 and self._bytes_ahead() > self._most_bytes):
            self._take_oldest()
            if not self._tasks:
                break

    def finish(self) -> None:
        """Wait for all that was handed over; raises as `put` does."""
        while self._tasks:
            self._take_oldest()

    def _bytes_ahead(self) -> int:
        return sum(num_bytes for _, num_bytes in self._tasks)

    def _take_oldest(self) -> None:
        found = self._tasks.popleft()[0].result()
        self._invalid |= {row: reason for row, reason in found.items() if self._job.is_wanted[row]}
        allowed = self._job.options.max_invalid
        if len(self._invalid) > allowed * self._job.num_inputs:
            row, reason = max(self._invalid.items())
            raise CacheError(
                f"{self._job.manifest.key}: {len(self._invalid)} of {self._job.num_inputs} inputs are unreadable, more "
                f"than --max-invalid {allowed:g} allows; for instance row {row}: {reason}. Mend the data, or raise "
                "--max-invalid; what was encoded is kept."
            )

    def _store_blocks(self) -> Mapping[int, str]:
        key, encoder = self._job.manifest.key, self._job.encoder
        if encoder.language_model and not self._storage.exists(f"{language_model_group(key)}/zarr.json"):
            write_language_model(self._storage, key, encoder.language_model)
        write_blocks(self._storage, key, encoder.blocks)
        return {}

    def _store(self, batch: Batch, parts: Sequence[Launched]) -> Mapping[int, str]:
        """In the thread: convert a batch; at the end of its block write that. Returns what of the block is invalid."""
        portion = self._portions.take(batch, parts)
        if portion is None:
            return {}
        self._writer.put(portion)
        return portion.invalid


def _say_what_took_time(job: Job, seconds: Seconds) -> None:
    done = job.num_inputs - job.start
    logger.info(
        "%s: %d %ss in %.1f s, %.1f a second: %.1f s waiting for data, %.1f s encoding, %.1f s waiting for the writer, "
        "which wrote for %.1f s. %s %d inputs unreadable.",
        *(job.manifest.key, done, job.encoder.request.modality, seconds.total, done / seconds.total),
        *(seconds.waiting_for_data, seconds.encoding, seconds.waiting_for_writer, seconds.writing),
        *(_ADVICE[seconds.limit], len(job.manifest.invalid)),
    )
