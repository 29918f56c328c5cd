"""One extraction by many processes, on one machine or many, that share nothing but the cache.

Every process claims one range of the plan (`shared_plan.py`) after another, encodes it and records its shards. A
process that dies leaves its claim; another one takes that over and encodes only what has no record. No process is
needed by the others, and the result equals one process's byte for byte, because blocks are those of the whole
extraction.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from tqdm import tqdm

from saffe_cache.core.items import ItemTable
from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.extraction.config import ExtractConfig, encode_options
from saffe_cache.extraction.encoding import run_part
from saffe_cache.extraction.planning import Job, encoder_request, new_job, stored_offsets
from saffe_cache.extraction.ranges import blocks_for, missing_rows
from saffe_cache.extraction.shared_plan import (
    POLL_SECONDS,
    complete_all,
    is_current,
    num_absent,
    planned_table,
    refuse_objects,
    refuse_process,
    shared_plan,
)
from saffe_cache.sources.items import Columns, Media
from saffe_cache.sources.registry import list_items
from saffe_cache.store.claims import Claim, Claims, held_cache
from saffe_cache.store.manifest import read_encoder
from saffe_cache.store.storage import Storage
from saffe_cache.store.work import Piece, Plan, PlannedEncoder, read_plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Done:
    """A range that a worker has finished."""

    number: int
    key: str
    """Of its encoder."""
    num_inputs: int
    """Inputs of the range."""
    num_encoded: int
    """Inputs that this worker encoded, some of other ranges among them; 0 where others had stored all rows."""
    seconds: float


class _LostError(Exception):
    """Another process has taken the range over."""


def run_rank(config: ExtractConfig) -> str:
    """Work on an extraction as one of several processes until all of it is finished; returns the cache's path.

    Errors as of `extract`.
    """
    is_asked = False
    while not is_asked:
        with Worker(config, f"rank {config.rank} of {config.world_size}") as worker:
            worker.run_all()
            is_asked = not worker.found_plan
    return config.cache


class Worker:
    """One of the processes that extract together: it keeps the encoders that it has loaded.

    Use it as a context manager: it holds the cache, together with the other workers.
    """

    def __init__(
        self, config: ExtractConfig, owner: str, *, crew: str = "", plans: bool = True, shows_progress: bool = True
    ) -> None:
        """
        Args:
            owner: the worker's name for people.
            crew: a name that only workers of the same driver have; they take each other's ranges over at once.
            plans: whether it makes a plan if there is none; otherwise it finds nothing to do then.

        Raises:
            Errors as of `extract`.
        """
        refuse_objects(config)
        self._config, self._owner, self._crew, self._storage = config, owner, crew, Storage(config.cache)
        self.num_encoded = 0
        """Inputs that this worker has encoded so far."""
        self._stack = ExitStack()
        with ExitStack() as stack:
            stack.enter_context(held_cache(self._storage, shared=True, owner=owner))
            self._jobs: dict[str, Job] = {}
            self._media: Mapping[bytes, Media] | None = None
            self.plan = read_plan(self._storage)
            self.found_plan = self.plan is not None
            """Whether the plan was there before: it may be older than some of the data, or lack an encoder."""
            if plans:
                self.plan, self._jobs, self._media = shared_plan(self._storage, config, owner, config.world_size or 1)
            if self.plan is not None:
                self._begin(self.plan, stack, shows_progress)
            self._stack = stack.pop_all()

    def _begin(self, plan: Plan, stack: ExitStack, shows_progress: bool) -> None:
        self._table = planned_table(self._storage, plan, self._config, self._owner)
        self._pieces = plan.pieces
        self._claims = Claims(self._storage, plan.claims, self._owner, crew=self._crew)
        total = sum(one.num_inputs - one.start for one in plan.encoders)
        self._progress = stack.enter_context(
            tqdm(total=total, unit=" inputs", desc=self._owner, disable=not shows_progress)
        )
        self._show(len(plan.finished(self._storage)))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cache to the other workers."""
        self._stack.close()

    @property
    def num_ranges(self) -> int:
        """Ranges of the plan."""
        return len(self._pieces) if self.plan is not None else 0

    @property
    def range_inputs(self) -> list[int]:
        """Number of inputs to encode of each range of the plan."""
        pieces = self._pieces if self.plan is not None else []
        return [one.inputs.stop - max(one.inputs.start, one.encoder.start) for one in pieces]

    def finished(self) -> set[int]:
        """Numbers of the finished ranges: all of them if the plan is done and gone."""
        if self.plan is None or not is_current(self._storage, self.plan):
            return set(range(self.num_ranges))
        return {int(name) for name in self.plan.finished(self._storage)}

    def run_all(self) -> None:
        """Run ranges until all are finished, by this worker or others, and complete the manifests."""
        while not self.is_finished:
            if self.run_free() is None and not self.is_finished:
                time.sleep(POLL_SECONDS)
        if self.plan is not None:
            complete_all(self._storage, self.plan, self._config)

    @property
    def is_finished(self) -> bool:
        """Whether all ranges of the plan are finished."""
        finished = self.finished()
        if self.plan is not None:
            self._show(len(finished))
        return len(finished) == self.num_ranges

    def run_free(self) -> Done | None:
        """Run one range that no living process has; None if there is none. Errors as of `extract`."""
        if self.plan is None:
            return None
        finished, taken = self.plan.finished(self._storage), self._claims.generations()
        for number in self._order():
            piece = self._pieces[number]
            if piece.name in finished:
                continue
            claim = self._claims.take(piece.name, taken)
            done = self._run(self.plan, piece, claim) if claim else None
            if done is not None:
                return done
        return None

    def run(self, number: int) -> Done | None:
        """Run a range; None if a living process has it, or it is finished. Errors as of `extract`."""
        assert self.plan is not None
        piece = self._pieces[number]
        claim = self._claims.take(piece.name)
        return self._run(self.plan, piece, claim) if claim else None

    def _order(self) -> Sequence[int]:
        """Ranks begin their search at different places, so that they do not all try for the same range."""
        count, config = len(self._pieces), self._config
        first = count * (config.rank or 0) // (config.world_size or 1)
        return [*range(first, count), *range(first)]

    def _show(self, num_finished: int) -> None:
        self._progress.set_postfix_str(f"{num_finished} of {len(self._pieces)} ranges done by all")

    def _run(self, plan: Plan, piece: Piece, claim: Claim) -> Done | None:
        try:
            with claim.given_up_on_errors():
                if self._storage.exists(plan.mark(piece.name)):  # finished since it was looked for
                    claim.release()
                    return None
                done, result = self._encode(piece, claim)
                self._storage.create(plan.mark(piece.name), json.dumps({"owner": self._owner, **result}).encode())
        except _LostError:
            logger.warning("%s: another process has taken range %d over.", self._owner, piece.number)
            return None
        claim.release()
        return done

    def _encode(self, piece: Piece, claim: Claim) -> tuple[Done, dict[str, Any]]:
        started, job = time.perf_counter(), self._job(piece.encoder)
        job.manifest = read_encoder(self._storage, piece.encoder.key)
        part = {name: rows for name, rows in missing_rows(job, piece.inputs).items() if name in self._growing(piece)}
        job.chosen = blocks_for(job, piece.encoder.start, part)
        num_encoded, result = sum(map(len, job.chosen)), {}

        def advance(count: int) -> None:
            if claim.is_lost:
                raise _LostError
            self.num_encoded += count
            self._progress.update(count)

        if job.chosen:
            name = claim.name.rpartition("/")[2].replace(".", "-")
            result = run_part(self._storage, job, self._media_for(piece.encoder), part, name, advance)
        seconds = time.perf_counter() - started
        return (
            Done(
                number=piece.number,
                key=piece.encoder.key,
                num_inputs=len(piece.inputs),
                num_encoded=num_encoded,
                seconds=seconds,
            ),
            result,
        )

    def _growing(self, piece: Piece) -> Collection[str]:
        return [name for name, one in piece.encoder.arrays.items() if not one.is_complete and name != "offsets"]

    def _job(self, planned: PlannedEncoder) -> Job:
        """The job of one encoder, which is loaded when it is first needed."""
        if planned.key not in self._jobs:
            self._jobs[planned.key] = self._load(planned)
        return self._jobs[planned.key]

    def _load(self, planned: PlannedEncoder) -> Job:
        encoder = load_encoder(encoder_request(self._config, planned.modality))
        encoder.decode_as([planned.key])
        if encoder.fingerprint.key != planned.key:
            what = f"its encoder is {encoder.fingerprint.key}, the plan says {planned.key}"
            refuse_process(self._config, self._owner, what)
        manifest = read_encoder(self._storage, planned.key)
        job = new_job(encoder, manifest, encode_options(self._config), self._table)
        if "offsets" in planned.arrays:
            job.offsets = stored_offsets(self._storage, manifest)
        job.arrays = {name: (one.spec, one.rows) for name, one in planned.arrays.items()}
        job.start = planned.start
        if job.block_rows != planned.block_rows:
            what = f"it would encode {job.block_rows} inputs together, the plan says {planned.block_rows}"
            refuse_process(self._config, self._owner, what)
        job.select([name for name, one in planned.arrays.items() if not one.is_complete])
        return job

    def _media_for(self, planned: PlannedEncoder) -> Mapping[bytes, Media]:
        """The photos and sounds, which are listed when the first are needed, and not hashed."""
        if planned.modality == "text":
            return {}
        if self._media is None:
            self._media = _listed_media(self._config, self._table)
        absent = num_absent(planned.modality, planned.start, self._table, self._media)
        if absent > planned.num_absent:
            what = f"{absent} of its {planned.modality} inputs are not among --data, the plan says {planned.num_absent}"
            refuse_process(self._config, self._owner, what)
        return self._media


@dataclass(frozen=True)
class _Unchanged:
    """Media whose content is still that of the plan."""

    media: Media
    content_hash: bytes
    item_id: str

    def read(self) -> bytes:
        data = self.media.read()
        if sha256(data).digest() != self.content_hash:
            raise OSError(
                f"{self.item_id}: its file has changed since the plan was made. Bring the old file back, or run saffe "
                "extract without --rank and with --changed reencode."
            )
        return data


def _listed_media(config: ExtractConfig, table: ItemTable) -> dict[bytes, Media]:
    """The media of the table's items by the hashes that the table holds; the files are not read."""
    index_of = {name: index for index, name in enumerate(table.ids)}
    found: dict[bytes, Media] = {}
    for item in list_items(config.data, Columns(**config.column), config.splits, config.max_items):
        index = index_of.get(item.id)
        if index is None:
            continue
        rows = {name: int(column[index]) for name, column in table.rows.items() if column[index] >= 0}
        for modality, media in item.media.items():
            # the content of a file decides what it is: a moving picture in a column of photos is a video
            place = modality if modality in rows else next(iter(rows.keys() - item.media.keys()), None)
            if place is not None:
                content_hash = table.inputs[place].content_hash[rows[place]].tobytes()
                found[content_hash] = _Unchanged(media, content_hash, item.id)
    return found
