"""Batches on their way to the encoder: read, decoded and prepared by workers, ahead of it.

Photos and sounds go straight from a worker into their rows of a batch, in a ring of a few batches that all workers
share. Workers are threads or processes. PIL decodes and resizes without the interpreter's lock, so threads do where an
encoder takes milliseconds a photo, and they start at once. But what is left of Python holds the lock for 0.1 to 0.2 ms
a photo, so that threads end at some 5,000 photos a second however many cores there are, and an encoder on a GPU would
wait for the lock as well: there they are processes.

Texts are few bytes: one thread pads them.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch

from saffe_cache.core.features import CacheError
from saffe_cache.extraction.planning import Job, blank_input
from saffe_cache.sources import Media, decode, is_file_fault

_TASK_INPUTS = 4
"""Photos or sounds that a worker takes at once: fewer hand-overs, and still several tasks a batch."""
_AHEAD = 2
"""Batches that are prepared ahead, at least."""
_IN_USE = 2
"""Batches that the encoder may be busy with: one is computed while another is launched."""

Task = TypeVar("Task")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the encoder is given at once. Its tensors hold until the batch after the next one is asked for."""

    block: range
    """The inputs that are stored together; the batch is all of it, or a part."""
    inputs: Sequence[int]
    """The input of each row."""
    tensors: Mapping[str, torch.Tensor]
    unreadable: Mapping[int, str] = field(default_factory=dict)
    """Inputs of the block that could not be read, with the reason."""
    ends_block: bool = True


@contextmanager
def load_batches(job: Job, media: Mapping[bytes, Media]) -> Iterator[Iterator[Batch]]:
    """What is left of a job, batch by batch; at the end the workers are gone, whatever happened.

    Raises:
        OSError: a file that could be read for its hash cannot be read any more.
        CacheError: a worker process died.
    """
    if job.offsets is not None:
        with _pool(ThreadPoolExecutor(1)) as pool:
            yield (future.result() for future in _ahead(_pad_texts(job, pool), _AHEAD))
        return
    ring = _Ring(job, media)
    with _deaths_explained(job), ExitStack() as stack:
        pool = stack.enter_context(_pool(_workers(job, ring)))
        pool.submit(int).result()  # processes are forked here, before any memory is pinned
        for memory in ring.memory.values():
            stack.enter_context(job.encoder.transfers.pinned(memory))
        yield (ring.finish(*task) for task in _ahead(ring.begin(pool), ring.ahead))


@contextmanager
def _deaths_explained(job: Job) -> Iterator[None]:
    """A dead worker shows where its work is waited for, or where it is given more."""
    try:
        yield
    except BrokenExecutor:
        raise CacheError(
            f"{job.manifest.key}: a process that decodes was killed, perhaps for its memory. The same command goes on "
            "from here; fewer --workers take less, and --decode-in threads takes none."
        ) from None


@contextmanager
def _pool(pool: Executor) -> Iterator[Executor]:
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ahead(tasks: Iterator[Task], count: int) -> Iterator[Task]:
    """The tasks, each once `count` more are under way; the first ones begin at once."""
    begun = deque(islice(tasks, count))

    def in_order() -> Iterator[Task]:
        for task in tasks:
            begun.append(task)
            yield begun.popleft()
        yield from begun

    return in_order()


class _Ring:
    """Batches of photos or sounds in shared memory, filled by workers one after the other, and over again."""

    def __init__(self, job: Job, media: Mapping[bytes, Media]) -> None:
        self._job, self._media = job, media
        self._hashes = [row.tobytes() for row in job.inputs.content_hash]
        self.ahead = max(_AHEAD, math.ceil(2 * job.options.workers * _TASK_INPUTS / job.block_rows))
        self._batches = self.ahead + _IN_USE
        shape = (self._batches, max(map(len, job.blocks()), default=0))
        blank = job.encoder.prepare(blank_input(job.encoder))
        self.memory = {name: _shared(value, shape, job.encoder.dtype) for name, value in blank.items()}

    def begin(self, pool: Executor) -> Iterator[tuple[range, int, list[Future[dict[int, str]]]]]:
        """Hand the blocks to the workers: the block, its place in the ring, and the tasks."""
        load = _load_in_fork if isinstance(pool, ProcessPoolExecutor) else self.load
        for number, block in enumerate(self._job.blocks()):
            place = number % self._batches
            parts = [block[start : start + _TASK_INPUTS] for start in range(0, len(block), _TASK_INPUTS)]
            yield block, place, [pool.submit(load, place, block.start, part) for part in parts]

    def load(self, place: int, first: int, inputs: range) -> dict[int, str]:
        """In a worker: fill the rows of some inputs; those that cannot be read, with the reason."""
        encoder, unreadable = self._job.encoder, {}
        for row in inputs:
            if self._hashes[row] not in self._media:
                unreadable[row] = "not among --data"
                continue
            data = self._media[self._hashes[row]].read()  # it could be read for its hash: a failure now ends the run
            try:
                raw = decode(encoder.request.modality, data, encoder.sampling_rate)
                encoder.prepare_into(raw, {name: values[place, row - first] for name, values in self.memory.items()})
            except (OSError, ValueError) as error:
                if not is_file_fault(error):
                    raise
                unreadable[row] = f"{type(error).__name__}: {error}"
        return unreadable

    def finish(self, block: range, place: int, tasks: Sequence[Future[dict[int, str]]]) -> Batch:
        """Wait for a batch, and leave out of it what could not be read."""
        unreadable: dict[int, str] = {}
        for task in tasks:
            unreadable |= task.result()
        good = [row for row in block if row not in unreadable]
        rows = [row - block.start for row in good] if unreadable else slice(len(block))
        tensors = {name: values[place][rows] for name, values in self.memory.items()} if good else {}
        return Batch(block=block, inputs=good, tensors=tensors, unreadable=unreadable)


def _shared(example: torch.Tensor, batches: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for batches of inputs like the example [1, …], which forked processes share."""
    kind = dtype if example.is_floating_point() else example.dtype
    shape = (*batches, *example.shape[1:])
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * kind.itemsize), dtype=kind).view(shape)


def _workers(job: Job, ring: _Ring) -> Executor:
    if not decodes_in_processes(job):
        return ThreadPoolExecutor(job.options.workers)
    return ProcessPoolExecutor(
        job.options.workers, multiprocessing.get_context("fork"), initializer=_begin_fork, initargs=(ring,)
    )


def decodes_in_processes(job: Job) -> bool:
    """As asked; by itself beside a GPU, where processes can be forked."""
    chosen = job.options.decode_in
    return chosen == "processes" or (
        chosen == "auto" and sys.platform == "linux" and job.encoder.request.device.startswith("cuda")
    )


_ring_of_fork: _Ring | None = None


def _begin_fork(ring: _Ring) -> None:
    """A worker process: it ends with its parent, however that ends, leaves Ctrl-C to it, and is ended by SIGTERM."""
    global _ring_of_fork
    _ring_of_fork = ring
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    torch.set_num_threads(1)  # the parent's threads did not come along


def _load_in_fork(place: int, first: int, inputs: range) -> dict[int, str]:
    assert _ring_of_fork is not None
    return _ring_of_fork.load(place, first, inputs)


def _pad_texts(job: Job, pool: Executor) -> Iterator[Future[Batch]]:
    """Texts: sorted by length within a block, in batches whose padded size is about `batch_tokens`."""

    def pad(block: range, inputs: list[int], ends_block: bool) -> Batch:
        tensors = job.encoder.pad([job.token_ids[row] for row in inputs])
        return Batch(block=block, inputs=inputs, tensors=tensors, ends_block=ends_block)

    for block in job.blocks():
        order = sorted(block, key=lambda row: len(job.token_ids[row]))
        batches = list(token_batches(order, job.token_ids, job.options.batch_tokens))
        for number, inputs in enumerate(batches, start=1):
            yield pool.submit(pad, block, inputs, number == len(batches))


def token_batches(order: Sequence[int], token_ids: Sequence[Sequence[Any]], budget: int) -> Iterator[list[int]]:
    """Rows, already sorted by length, in batches whose padded size stays within the budget."""
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * len(token_ids[row]) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def check_sources(job: Job, media: Mapping[bytes, Media]) -> None:
    """
    Raises:
        CacheError: more photos or sounds than --max-invalid allows are in the cache, but not among `media`.
    """
    hashes = [row.tobytes() for row in job.inputs.content_hash]
    wanted = [row for row in range(job.start, job.num_inputs) if job.is_wanted[row]]
    absent = [row for row in wanted if hashes[row] not in media]
    if job.offsets is None and len(absent) > job.options.max_invalid * job.num_inputs:
        raise CacheError(
            f"{job.manifest.key}: {len(absent)} of its {job.encoder.request.modality} inputs are not in --data, "
            f"the first is row {absent[0]}. Give the data that they came from, or raise --max-invalid to go without."
        )
