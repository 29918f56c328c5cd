"""Prepare batches for the encoder: workers read, decode and preprocess ahead of it.

Workers write photos directly to their rows of a batch, in a ring buffer of a few batches that all workers share, and
return the windows of a sound, whose number differs. Workers are threads or processes. PIL decodes and resizes without
the interpreter's lock, so threads suffice for encoders that take milliseconds per photo, and they start at once. The
remaining Python code holds the lock for 0.1 to 0.2 ms per photo, which limits threads to about 5,000 photos per second
on any number of cores and would also delay an encoder on a GPU; processes are used there.

Texts are small, so one thread tokenizes and pads them.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from typing import Any, TypeVar

import numpy as np
import torch

from saffe_cache.core.features import CacheError
from saffe_cache.core.views import PLAIN, seen_as
from saffe_cache.encoders.running import REAL_TOKENS
from saffe_cache.extraction.planning import Job, blank_input, window_budget
from saffe_cache.sources.decoding import LOW_GREY, decode, has_edge
from saffe_cache.sources.items import Media, is_file_fault

logger = logging.getLogger(__name__)

_TASK_INPUTS = 4
"""Photos per task: few enough for several tasks per batch."""
_AHEAD = 2
"""Fewest batches that are prepared ahead."""
_SOUND_BLOCKS_AHEAD = 1
"""Blocks of sounds that are prepared ahead; they may be long."""
_IN_USE = 2
"""Batches in use by the encoder: one is computed while another is launched."""

Task = TypeVar("Task")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch for the encoder. Its tensors are valid until the second batch after it is requested."""

    block: range
    """The inputs that are stored together; the batch is a part of them or all."""
    inputs: Sequence[int]
    """Input of each row; of a sound, each window is a row."""
    tensors: Mapping[str, torch.Tensor]
    unreadable: Mapping[int, str] = field(default_factory=dict)
    """Reason for each input of the block that could not be read."""
    ends_block: bool = True
    starts: np.ndarray | None = None
    """For windows of sounds, int64 [rows]: where a window begins among the rows of its sound."""
    weights: np.ndarray | None = None
    """For windows of sounds, int64 [rows]: what each window's vector counts for."""
    view: str = PLAIN
    """The view of its photos."""
    is_repeated: bool = False
    """Whether an earlier batch had the same photos, in another view."""

    @property
    def num_finished(self) -> int:
        """Inputs that it finishes, or that could not be read; a sound counts with its first window, a photo with its
        first view."""
        if self.is_repeated:
            return 0
        windows = len(self.inputs) if self.starts is None else int((self.starts == 0).sum())
        return windows + len(self.unreadable)


@contextmanager
def load_batches(job: Job, media: Mapping[bytes, Media]) -> Iterator[Iterator[Batch]]:
    """The remaining batches of a job; the workers end with the context, also after errors.

    Raises:
        OSError: a file that was read for its hash cannot be read again.
        CacheError: a worker process died.
    """
    if job.is_of_texts:
        with _pool(ThreadPoolExecutor(1)) as pool:
            yield (future.result() for future in _ahead(_pad_texts(job, pool), _AHEAD))
        return
    if job.encoder.windows:
        sounds = _Sounds(job, media)
        with _worker_deaths_explained(job), _pool(_workers(job, sounds)) as pool:
            yield (batch for task in _ahead(sounds.begin(pool), _SOUND_BLOCKS_AHEAD) for batch in sounds.finish(*task))
        return
    ring = _Ring(job, media)
    with _worker_deaths_explained(job), ExitStack() as stack:
        pool = stack.enter_context(_pool(_workers(job, ring)))
        pool.submit(int).result()  # processes are forked here, before any memory is pinned
        for memory in ring.memory.values():
            stack.enter_context(job.encoder.transfers.pinned(memory))
        yield (batch for task in _ahead(ring.begin(pool), ring.ahead) for batch in ring.finish(*task))
        ring.warn()


@contextmanager
def _worker_deaths_explained(job: Job) -> Iterator[None]:
    """Explain the death of a worker process, which shows when its results are awaited or new tasks are submitted."""
    try:
        yield
    except BrokenExecutor:
        raise CacheError(
            f"{job.manifest.key}: a decoding process was killed, perhaps for lack of memory. Run the same command "
            "again to resume, with fewer --workers or with --decode-in threads to save memory."
        ) from None


@contextmanager
def _pool(pool: Executor) -> Iterator[Executor]:
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ahead(tasks: Iterator[Task], count: int) -> Iterator[Task]:
    """The tasks in order, with `count` more already started; the first ones start at once."""
    started = deque(islice(tasks, count))

    def in_order() -> Iterator[Task]:
        for task in tasks:
            started.append(task)
            yield started.popleft()
        yield from started

    return in_order()


class _Decoder:
    """Decodes the photos or sounds of a job, in a worker."""

    def __init__(self, job: Job, media: Mapping[bytes, Media]) -> None:
        self._job, self._media = job, media

    def use(self, row: int, take: Callable[[dict[str, Any]], None]) -> str:
        """Pass on what an input is decoded to, by view; returns why it cannot be read or is not taken, else nothing."""
        media = self._media.get(self._job.inputs.content_hash[row].tobytes())
        if media is None:
            return "not among --data"
        data = media.read()  # it was read for its hash before, so a failure ends the run
        try:
            take(self._decoded(data))
        except (ImportError, MemoryError):
            raise  # the machine's fault
        except Exception as error:  # decoders and processors raise many kinds for inputs that they do not expect
            if not is_file_fault(error):
                raise
            return f"{type(error).__name__}: {error}"
        return ""

    def _decoded(self, data: bytes) -> dict[str, Any]:
        """By view. Photos are decoded once, unless they are reduced and crops need more of their pixels.

        The plain view is then not made from the larger picture: a JPEG's smaller sizes come from its coefficients, and
        resizing a larger one gives other pixels than those that the encoder's key stands for.
        """
        encoder, request = self._job.encoder, self._job.encoder.request
        pictures: dict[int | None, Any] = {}
        for edge in dict.fromkeys(map(encoder.decoded_edge, self._job.views)):  # of crops last, which is larger
            known = next((one for one in pictures.values() if has_edge(one, edge)), None)
            pictures[edge] = known or decode(
                *(request.modality, data, encoder.sampling_rate, request.grey_bits, encoder.num_frames, edge)
            )
        return {view: pictures[encoder.decoded_edge(view)] for view in self._job.views}


@dataclass(frozen=True)
class _Window:
    """A window of a sound, prepared for the encoder."""

    start: int
    """Its first row among those of its sound."""
    real_tokens: int
    weight: int
    num_states: int
    """Tokens that the model makes of it."""
    tensors: dict[str, np.ndarray]
    """Each [1, …]."""

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return sorted((name, values.shape) for name, values in self.tensors.items())


class _Sounds:
    """Batches of windows of sounds; those of one batch are equally long."""

    def __init__(self, job: Job, media: Mapping[bytes, Media]) -> None:
        self._job, self._decoder = job, _Decoder(job, media)

    def begin(self, pool: Executor) -> Iterator[tuple[range, list[Future[Any]]]]:
        """Submit the blocks to the workers; yields the block and its tasks."""
        load = _load_in_fork if isinstance(pool, ProcessPoolExecutor) else self.load
        for block in self._job.blocks():
            yield block, [pool.submit(load, row) for row in block]

    def load(self, row: int) -> list[_Window] | str:
        """In a worker: the windows of a sound, or the reason why it cannot be read."""
        found: list[_Window] = []

        def take(decoded: Mapping[str, np.ndarray]) -> None:
            found.extend(self._windows(row, decoded[PLAIN]))

        return self._decoder.use(row, take) or found

    def _windows(self, row: int, sound: np.ndarray) -> Iterator[_Window]:
        encoder, offsets = self._job.encoder, self._job.offsets
        windows = encoder.windows
        assert windows is not None
        assert offsets is not None
        cut, start = windows.cut(len(sound)), 0
        made = sum(windows.rows(len(window)) for window in cut)
        planned = int(offsets[row + 1] - offsets[row])
        if made != planned:
            raise ValueError(
                f"the sound has {len(sound)} samples, which make {made} rows of hidden states; by its header, "
                f"it has {planned}"
            )
        for window in cut:
            prepared = encoder.prepare(sound[window.start : window.stop])
            yield _Window(
                *(
                    start,
                    windows.real_tokens(len(window)),
                    windows.weight(len(window)),
                    windows.num_states(len(window)),
                ),
                {name: value.numpy() for name, value in prepared.items()},
            )
            start += windows.rows(len(window))

    def finish(self, block: range, tasks: Sequence[Future[Any]]) -> Iterator[Batch]:
        """The batches of a block, once all its sounds are prepared."""
        loaded = {row: task.result() for row, task in zip(block, tasks, strict=True)}
        unreadable = {row: one for row, one in loaded.items() if isinstance(one, str)}
        windows = [(row, one) for row, found in loaded.items() if row not in unreadable for one in found]
        windows.sort(key=lambda pair: (pair[1].num_states, pair[1].shapes))
        batches = list(self._split(windows)) or [[]]
        for number, batch in enumerate(batches, start=1):
            yield Batch(
                block=block,
                inputs=[row for row, _ in batch],
                tensors=_stacked([one for _, one in batch]),
                unreadable=unreadable if number == 1 else {},
                ends_block=number == len(batches),
                starts=np.array([one.start for _, one in batch], np.int64),
                weights=np.array([one.weight for _, one in batch], np.int64),
            )

    def _split(self, windows: Sequence[tuple[int, _Window]]) -> Iterator[list[tuple[int, _Window]]]:
        """Split windows, sorted by shape, into batches of one shape that stay within the budget."""
        for _, group in groupby(windows, key=lambda pair: pair[1].shapes):
            alike = list(group)
            most = window_budget(self._job.options, alike[-1][1].num_states)
            yield from (alike[start : start + most] for start in range(0, len(alike), most))


def _stacked(windows: Sequence[_Window]) -> dict[str, torch.Tensor]:
    """One batch of windows of one shape, and the number of real tokens of each."""
    if not windows:
        return {}
    names = windows[0].tensors
    tensors = {name: torch.from_numpy(np.concatenate([one.tensors[name] for one in windows])) for name in names}
    return {**tensors, REAL_TOKENS: torch.tensor([one.real_tokens for one in windows])}


class _Ring:
    """A ring buffer of blocks of photos in all their views in shared memory, filled by workers."""

    def __init__(self, job: Job, media: Mapping[bytes, Media]) -> None:
        self._job, self._decoder = job, _Decoder(job, media)
        self.ahead = max(_AHEAD, math.ceil(2 * job.options.workers * _TASK_INPUTS / job.block_rows))
        self._batches = self.ahead + _IN_USE
        shape = (self._batches, len(job.views), max(map(len, job.blocks()), default=0))
        blank = job.encoder.prepare(blank_input(job.encoder))
        self.memory = {name: _shared(value, shape, job.encoder.dtype) for name, value in blank.items()}
        self.is_low = _shared(torch.zeros(1, dtype=torch.uint8), (job.num_inputs,), torch.uint8)
        """Whether a picture's 16-bit grey is low without a word about it."""

    def begin(self, pool: Executor) -> Iterator[tuple[range, int, list[Future[dict[int, str]]]]]:
        """Submit the blocks to the workers; yields the block, its place in the ring, and the tasks."""
        load = _load_in_fork if isinstance(pool, ProcessPoolExecutor) else self.load
        for number, block in enumerate(self._job.blocks()):
            place = number % self._batches
            parts = [block[start : start + _TASK_INPUTS] for start in range(0, len(block), _TASK_INPUTS)]
            yield block, place, [pool.submit(load, place, block.start, part) for part in parts]

    def load(self, place: int, first: int, inputs: range) -> dict[int, str]:
        """In a worker: fill the rows of some inputs. Returns the reason for each that cannot be read."""
        reasons = {}
        for row in inputs:
            out = {name: values[place, :, row - first] for name, values in self.memory.items()}
            reasons[row] = self._decoder.use(row, partial(self._take, row, out))
        return {row: reason for row, reason in reasons.items() if reason}

    def _take(self, row: int, out: Mapping[str, torch.Tensor], decoded: Mapping[str, Any]) -> None:
        """Prepare all views of a decoded photo, or a clip."""
        content_hash = self._job.inputs.content_hash[row].tobytes()
        for number, view in enumerate(self._job.views):
            raw, of_view = decoded[view], {name: values[number] for name, values in out.items()}
            self.is_low[row] = int("low_grey" in getattr(raw, "info", {}))
            self._job.encoder.prepare_into(seen_as(raw, view, content_hash), of_view)

    def warn(self) -> None:
        """Tell of pictures that are nearly black because few of their bits are used."""
        rows = self.is_low.nonzero().flatten().tolist()
        if rows:
            logger.warning(
                "%s: %d grey pictures with 16 bits have no value above %d, and their files do not say how many bits "
                "are used, so they are nearly black; the first is %s. Say it with --grey-bits, such as 12.",
                *(self._job.manifest.key, len(rows), LOW_GREY, self._job.name_of(rows[0])),
            )

    def finish(self, block: range, place: int, tasks: Sequence[Future[dict[int, str]]]) -> Iterator[Batch]:
        """Wait for a block, and drop its unreadable inputs; a batch for each view."""
        unreadable: dict[int, str] = {}
        for task in tasks:
            unreadable |= task.result()
        good = [row for row in block if row not in unreadable]
        rows = [row - block.start for row in good] if unreadable else slice(len(block))
        for number, view in enumerate(self._job.views):
            tensors = {name: values[place, number][rows] for name, values in self.memory.items()} if good else {}
            yield Batch(
                block=block,
                inputs=good,
                tensors=tensors,
                unreadable={} if number else unreadable,
                ends_block=number == len(self._job.views) - 1,
                view=view,
                is_repeated=number > 0,
            )


def _shared(example: torch.Tensor, batches: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory for batches, of this shape, of inputs like the example [1, …], shared with forked processes."""
    kind = dtype if example.is_floating_point() else example.dtype
    shape = (*batches, *example.shape[1:])
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * kind.itemsize), dtype=kind).view(shape)


def _workers(job: Job, loader: _Ring | _Sounds) -> Executor:
    if not decodes_in_processes(job):
        return ThreadPoolExecutor(job.options.workers)
    if not hasattr(os, "fork"):
        raise ValueError(
            "--decode-in: found processes, expected threads: this system cannot fork. Use auto or threads."
        )
    return ProcessPoolExecutor(
        job.options.workers, multiprocessing.get_context("fork"), initializer=_begin_fork, initargs=(loader,)
    )


def decodes_in_processes(job: Job) -> bool:
    """Whether workers are processes: if requested, or by default for a GPU on Linux, where processes can be forked."""
    chosen = job.options.decode_in
    return chosen == "processes" or (
        chosen == "auto" and sys.platform == "linux" and job.encoder.request.device.startswith("cuda")
    )


_loader_of_fork: _Ring | _Sounds | None = None


def _begin_fork(loader: _Ring | _Sounds) -> None:
    """Set up a worker process: it ends with its parent, ignores Ctrl-C, and can be ended by SIGTERM."""
    global _loader_of_fork
    _loader_of_fork = loader
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    torch.set_num_threads(1)  # the parent's threads were not forked


def _load_in_fork(*task: Any) -> Any:
    assert _loader_of_fork is not None
    return _loader_of_fork.load(*task)


def _pad_texts(job: Job, pool: Executor) -> Iterator[Future[Batch]]:
    """Batches of texts, sorted by length within a block, with a padded size of about `batch_tokens`."""
    equal = job.encoder.padding == "equal_length"

    def tokenize(block: range) -> list[list[int]]:
        return _tokens_of(job, block)

    def pad(block: range, inputs: list[int], token_ids: list[list[int]], ends_block: bool) -> Batch:
        return Batch(block=block, inputs=inputs, tensors=job.encoder.pad(token_ids), ends_block=ends_block)

    for block, task in _ahead(((block, pool.submit(tokenize, block)) for block in job.blocks()), 1):
        token_ids = task.result()
        order = sorted(range(len(block)), key=lambda place: len(token_ids[place]))
        batches = list(token_batches(order, token_ids, job.options.batch_tokens, equal_length=equal))
        for number, places in enumerate(batches, start=1):
            inputs, ids = [block[place] for place in places], [token_ids[place] for place in places]
            yield pool.submit(pad, block, inputs, ids, number == len(batches))


def _tokens_of(job: Job, block: range) -> list[list[int]]:
    """The token ids of a block's texts.

    Raises:
        CacheError: they are not as many as the offsets say.
    """
    assert job.inputs.texts is not None
    assert job.offsets is not None
    token_ids = job.encoder.tokenize(job.inputs.texts[block.start : block.stop])
    kept = job.encoder.selection.count if job.encoder.selection else int
    expected = np.diff(job.offsets[block.start : block.stop + 1])
    differing = np.flatnonzero(expected != [kept(len(ids)) for ids in token_ids])
    if len(differing):
        place = int(differing[0])
        raise CacheError(
            f"{job.manifest.key}: text {block[place]} has {len(token_ids[place])} tokens, expected {expected[place]} "
            "as in the cache. Install the library versions in the manifest's history, or extract into a new cache."
        )
    return token_ids


def token_batches(
    order: Sequence[int], token_ids: Sequence[Sequence[Any]], budget: int, *, equal_length: bool = False
) -> Iterator[list[int]]:
    """Split rows, sorted by length, into batches whose padded size stays within the budget, of one length if asked."""
    batch: list[int] = []
    for row in order:
        length = len(token_ids[row])
        if batch and ((len(batch) + 1) * length > budget or (equal_length and len(token_ids[batch[0]]) != length)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def check_sources(job: Job, media: Mapping[bytes, Media]) -> None:
    """
    Raises:
        CacheError: more of the cache's photos or sounds than --max-invalid allows are missing in `media`.
    """
    if job.is_of_texts:
        return
    wanted = job.start + np.flatnonzero(job.is_wanted[job.start :])
    absent = [row for row in wanted.tolist() if job.inputs.content_hash[row].tobytes() not in media]
    if len(absent) > job.options.max_invalid * job.num_inputs:
        raise CacheError(
            f"{job.manifest.key}: {len(absent)} of its {job.encoder.request.modality} inputs are not in --data, "
            f"the first is {job.name_of(absent[0])}. Use the data that they came from, or raise "
            "--max-invalid to skip them."
        )
