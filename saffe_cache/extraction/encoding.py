"""Doing a job: threads decode and prepare ahead, the encoder runs, a writer thread stores."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from saffe_cache.encoders.encoder import Encoded
from saffe_cache.extraction.planning import Job
from saffe_cache.features import CacheError
from saffe_cache.sources import Media, decode
from saffe_cache.store.dtypes import to_storage
from saffe_cache.store.storage import Storage
from saffe_cache.store.writer import EncoderWriter, Portion, write_blocks

logger = logging.getLogger(__name__)


def run_job(storage: Storage, job: Job, media: Mapping[bytes, Media], record: Mapping[str, Any]) -> None:
    """Encode and store what is left of a job; `record` goes into the manifest's history with its times.

    Raises:
        CacheError: too many inputs are unreadable, or a number overflows.
        OSError: the disk is full or gone; the job can be resumed.
    """
    if job.is_done:
        return
    write_blocks(storage, job.manifest.key, job.encoder.blocks)
    started, encoding = time.perf_counter(), 0.0
    invalid = {row: reason for row, reason in job.manifest.invalid.items() if job.is_wanted[row]}
    modality = job.encoder.request.modality
    with EncoderWriter(storage, job.manifest, job.missing) as writer:
        if job.offsets is not None and "offsets" in job.missing:
            writer.put(Portion({"offsets": (0, to_storage(job.offsets, "int64"))}))
        progress = tqdm(total=job.num_inputs, initial=job.start, unit=f" {modality}s", desc=job.manifest.key)
        for block, portion, seconds in _encode_texts(job) if job.offsets is not None else _encode_media(job, media):
            writer.put(portion)
            encoding += seconds
            progress.update(len(block))
            invalid |= {row: reason for row, reason in portion.invalid.items() if job.is_wanted[row]}
            _check_invalid(job, invalid)
        progress.close()
        total = time.perf_counter() - started
        spent = {"total": round(total, 2), "encoding": round(encoding, 2), "writing": round(writer.seconds, 2)}
        job.manifest.history.append({**record, "inputs": [job.start, job.num_inputs], "seconds": spent})
        writer.finish(job.num_inputs)
    logger.info(
        "%s: %.0f s, of which encoding %.0f s, writing (beside it) %.0f s; %d inputs unreadable.",
        *(job.manifest.key, total, encoding, writer.seconds, len(job.manifest.invalid)),
    )


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


Encoding = Iterator[tuple[range, Portion, float]]
"""Inputs, their rows, and the seconds that the encoder took."""


def _encode_media(job: Job, media: Mapping[bytes, Media]) -> Encoding:
    """Photos or sounds: threads stay two batches ahead of the encoder."""
    encoder, modality = job.encoder, job.encoder.request.modality
    hashes = [row.tobytes() for row in job.inputs.content_hash]

    def load(row: int) -> dict[str, torch.Tensor] | str:
        if hashes[row] not in media:
            return "not among --data"
        data = media[hashes[row]].read()  # it could be read for its hash: a failure now ends the run
        try:
            return encoder.prepare(decode(modality, data, encoder.sampling_rate))
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(job.options.workers) as pool:
        ahead: deque[tuple[range, list[Future[Any]]]] = deque()
        for block in job.blocks():
            ahead.append((block, [pool.submit(load, row) for row in block]))
            if len(ahead) > 2:
                yield _encode_loaded(job, *ahead.popleft())
        while ahead:
            yield _encode_loaded(job, *ahead.popleft())


def _encode_loaded(job: Job, block: range, loading: Sequence[Future[Any]]) -> tuple[range, Portion, float]:
    """One batch of photos or sounds; those that could not be read become rows of NaN."""
    loaded = dict(zip(block, (future.result() for future in loading), strict=True))
    started = time.perf_counter()
    rows = _Rows(job, block)
    rows.invalid.update({row: value for row, value in loaded.items() if isinstance(value, str)})
    good = [row for row in block if row not in rows.invalid]
    if good:
        batch = {name: torch.cat([loaded[row][name] for row in good]) for name in loaded[good[0]]}
        rows.put(good, job.encoder.encode(batch))
    return block, rows.to_portion(), time.perf_counter() - started


def _encode_texts(job: Job) -> Encoding:
    """Texts: sorted by length within a block, in batches whose padded size is about `batch_tokens`."""
    for block in job.blocks():
        started = time.perf_counter()
        rows = _Rows(job, block)
        order = sorted(block, key=lambda row: len(job.token_ids[row]))
        for batch in _token_batches(order, job.token_ids, job.options.batch_tokens):
            rows.put(batch, job.encoder.encode(job.encoder.pad([job.token_ids[row] for row in batch])))
        yield block, rows.to_portion(), time.perf_counter() - started


def _token_batches(order: Sequence[int], token_ids: list[list[int]], budget: int) -> Iterator[list[int]]:
    """Rows, already sorted by length, in batches whose padded size stays within the budget."""
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * len(token_ids[row]) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class _Rows:
    """The rows of one block in every array that lacks them, as they come from the encoder."""

    def __init__(self, job: Job, block: range) -> None:
        self._job, self._block = job, block
        self._first = {name: job.first_row(name, block.start) for name in job.missing if name != "offsets"}
        self._values = {
            name: np.full((job.first_row(name, block.stop) - first, *job.arrays[name][0].row_shape), np.nan, np.float32)
            for name, first in self._first.items()
        }
        self.invalid: dict[int, str] = {}

    def put(self, inputs: Sequence[int], encoded: Encoded) -> None:
        """Place a batch: one row of `encoded` for each input."""
        found = {f"hidden_states/{i}": states for i, states in encoded.states.items()} | dict(encoded.vectors)
        for name, first in self._first.items():
            for number, value, length in zip(inputs, found[name], encoded.lengths, strict=True):
                at = self._job.first_row(name, number) - first
                if self._job.is_flat(name):
                    self._values[name][at : at + length] = value[:length]
                else:
                    self._values[name][at] = value

    def to_portion(self) -> Portion:
        """The rows in their storage types; inputs with non-finite numbers are noted as invalid.

        Raises:
            CacheError: a finite number does not fit into the storage type.
        """
        return Portion({name: (self._first[name], self._stored(name)) for name in self._values}, self.invalid)

    def _stored(self, name: str) -> np.ndarray:
        values = self._values[name].reshape(len(self._values[name]), -1)
        for row in np.flatnonzero(~np.isfinite(values).all(axis=1)):
            self.invalid.setdefault(self._input_of(name, int(row)), f"{name} is not finite")
        try:
            return to_storage(self._values[name], self._job.arrays[name][0].dtype)
        except OverflowError as error:
            largest = np.nanmax(np.abs(values), axis=1, initial=0.0)
            raise CacheError(
                f"{self._job.manifest.key}: {name} of input {self._input_of(name, int(largest.argmax()))}: {error}. "
                "Extract into a new cache with --storage bfloat16 or float32."
            ) from None

    def _input_of(self, name: str, row: int) -> int:
        """The input that a row of this block belongs to."""
        if not self._job.is_flat(name):
            return self._block.start + row
        assert self._job.offsets is not None
        return int(np.searchsorted(self._job.offsets, self._first[name] + row, side="right")) - 1


def _check_invalid(job: Job, invalid: Mapping[int, str]) -> None:
    allowed = job.options.max_invalid
    if len(invalid) > allowed * job.num_inputs:
        row, reason = max(invalid.items())
        raise CacheError(
            f"{job.manifest.key}: {len(invalid)} of {job.num_inputs} inputs are unreadable, more than --max-invalid "
            f"{allowed:g} allows; for instance row {row}: {reason}. Mend the data, or raise --max-invalid; what was "
            "encoded is kept."
        )
