"""One extraction by many processes, on one machine or many, that share nothing but the cache.

The first process to claim the planning reads and hashes the data, commits the item table, stores all that is known
before encoding, and writes the plan: ranges of inputs (`ranges.py`). Every process then claims one range after another,
encodes it and records its shards. A process that dies leaves its claim; another one takes that over and encodes only
what has no record. Whoever finds all ranges finished completes the manifests. No process is needed by the others, and
the result equals one process's byte for byte, because blocks are those of the whole extraction.

Python objects as data or encoders, and streams, cannot be shared and are refused.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any, NoReturn

from tqdm import tqdm

from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import CacheError
from saffe_cache.core.items import ItemTable
from saffe_cache.core.options import require
from saffe_cache.core.outputs import provenance
from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.extraction.config import ExtractConfig, encode_options
from saffe_cache.extraction.encoding import Seconds, begin_parts, check_invalid, run_part
from saffe_cache.extraction.extract import begin_extraction
from saffe_cache.extraction.planning import Job, encoder_request, new_job, stored_offsets, wanted_inputs
from saffe_cache.extraction.ranges import blocks_for, cut_ranges, missing_rows
from saffe_cache.sources.items import Columns, Media
from saffe_cache.sources.registry import list_items
from saffe_cache.store.claims import Claim, Claims, held_cache
from saffe_cache.store.manifest import read_encoder
from saffe_cache.store.parts import read_table
from saffe_cache.store.root import read_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.work import (
    PLAN,
    PLANNING,
    WORK,
    Piece,
    Plan,
    PlannedArray,
    PlannedEncoder,
    create_plan,
    read_plan,
    root_hash,
)
from saffe_cache.store.writer import end_log

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_NOTHING = "nothing is left to do"
_FREE_OPTIONS = frozenset(
    {
        *("cache", "data", "encoder", "revision", "device", "device_map", "max_memory", "workers", "decode_in"),
        *("max_invalid", "changed", "rehash", "plan", "rank", "world_size"),
        *("workers_on", "ray_address", "gpus_per_worker"),
    }
)
"""Options that may differ between processes. Encoders are compared by what they are, devices by their type."""


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


def plan_work(config: ExtractConfig, owner: str = "planner", num_workers: int = 1) -> Plan | None:
    """Plan an extraction by several processes, or find the plan that another one made; None if nothing is left to do.

    Errors as of `extract`.

    Args:
        num_workers: about how many workers there will be. What they write does not depend on it.
    """
    refuse_objects(config)
    storage = Storage(config.cache)
    with held_cache(storage, shared=True, owner=owner):
        return _shared_plan(storage, config, owner, num_workers)[0]


def finish_work(config: ExtractConfig, owner: str = "planner") -> None:
    """Complete the manifests after all ranges are finished, and remove the plan. Repeating it changes nothing.

    Raises:
        CacheError: some range is not finished, or too many inputs are unreadable.
    """
    storage = Storage(config.cache)
    with held_cache(storage, shared=True, owner=owner):
        plan = read_plan(storage)
        if plan is not None:
            _finish(storage, plan, config)


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
                self.plan, self._jobs, self._media = _shared_plan(self._storage, config, owner, config.world_size or 1)
            if self.plan is not None:
                self._begin(self.plan, stack, shows_progress)
            self._stack = stack.pop_all()

    def _begin(self, plan: Plan, stack: ExitStack, shows_progress: bool) -> None:
        _check_options(plan, self._config, self._owner)
        root = read_root(self._storage)
        if root is None or root_hash(self._storage) != plan.root:
            _refuse(self._config, self._owner, "the item table or the encoders have changed since the plan was made")
        self._table = read_table(self._storage, root)
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
        if self.plan is None or not _is_current(self._storage, self.plan):
            return set(range(self.num_ranges))
        return {int(name) for name in self.plan.finished(self._storage)}

    def run_all(self) -> None:
        """Run ranges until all are finished, by this worker or others, and complete the manifests."""
        while not self.is_finished:
            if self.run_free() is None and not self.is_finished:
                time.sleep(_POLL_SECONDS)
        if self.plan is not None:
            _finish(self._storage, self.plan, self._config)

    @property
    def is_finished(self) -> bool:
        """Whether all ranges of the plan are finished."""
        if self.plan is None:
            return True
        if not _is_current(self._storage, self.plan):
            return True
        finished = self.plan.finished(self._storage)
        self._show(len(finished))
        return len(finished) == len(self._pieces)

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
            _refuse(self._config, self._owner, what)
        manifest = read_encoder(self._storage, planned.key)
        job = new_job(encoder, manifest, encode_options(self._config), self._table)
        if "offsets" in planned.arrays:
            job.offsets = stored_offsets(self._storage, manifest)
        job.arrays = {name: (one.spec, one.rows) for name, one in planned.arrays.items()}
        job.start = planned.start
        if job.block_rows != planned.block_rows:
            what = f"it would encode {job.block_rows} inputs together, the plan says {planned.block_rows}"
            _refuse(self._config, self._owner, what)
        job.select([name for name, one in planned.arrays.items() if not one.is_complete])
        return job

    def _media_for(self, planned: PlannedEncoder) -> Mapping[bytes, Media]:
        """The photos and sounds, which are listed when the first are needed, and not hashed."""
        if planned.modality == "text":
            return {}
        if self._media is None:
            self._media = _listed_media(self._config, self._table)
        absent = _num_absent(planned.modality, planned.start, self._table, self._media)
        if absent > planned.num_absent:
            what = f"{absent} of its {planned.modality} inputs are not among --data, the plan says {planned.num_absent}"
            _refuse(self._config, self._owner, what)
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


def _num_absent(modality: Any, start: int, table: ItemTable, media: Mapping[bytes, Media]) -> int:
    """Wanted inputs from `start` on that are not among the data."""
    if modality == "text":
        return 0
    hashes, wanted = table.inputs[modality].content_hash, wanted_inputs(table, modality)
    return sum(hashes[row].tobytes() not in media for row in range(start, len(hashes)) if wanted[row])


def _shared_plan(
    storage: Storage, config: ExtractConfig, owner: str, num_workers: int
) -> tuple[Plan | None, dict[str, Job], Mapping[bytes, Media] | None]:
    """The plan, and what the process that made it knows already: its jobs and media."""
    claims, seen = Claims(storage, PLANNING, owner), set[str]()
    while True:
        plan = read_plan(storage)
        if plan is not None:
            return plan, {}, None
        generation = claims.generations().get("plan")
        holder = claims.look("plan", generation)[0] if generation is not None else None
        claim = None if holder and holder.token in seen and holder.failed else claims.take("plan")
        if claim and generation is not None:
            holder = claims.look("plan", generation)[0]  # it may have given up just now
        if holder and holder.token in seen and holder.failed:
            if claim:
                claim.give_up(holder.failed)
            if holder.failed == _NOTHING:
                return None, {}, None
            raise CacheError(f"{holder} could not plan the extraction: {holder.failed}")
        if claim is not None:
            return _plan_once(storage, config, claim, num_workers)
        if holder and holder.token not in seen:
            logger.info("%s: waiting for the plan of %s.", owner, holder)
            seen.add(holder.token)
        time.sleep(_POLL_SECONDS)


def _plan_once(
    storage: Storage, config: ExtractConfig, claim: Claim, num_workers: int
) -> tuple[Plan | None, dict[str, Job], Mapping[bytes, Media] | None]:
    """Plan under a claim; others wait for the plan, or for the claim's end."""
    with claim.given_up_on_errors():
        plan, jobs, media = read_plan(storage), dict[str, Job](), None
        if plan is None:
            jobs, media = _begin_jobs(storage, config)
        if jobs:
            create_plan(storage, _plan_of(storage, config, jobs, media or {}, num_workers))
            plan = read_plan(storage)
    if plan is None:
        claim.give_up(_NOTHING)
        time.sleep(2 * _POLL_SECONDS)  # for those who wait
    claim.remove()
    if plan is None:
        _remove_if_empty(storage)
    return plan, jobs, media


def _begin_jobs(storage: Storage, config: ExtractConfig) -> tuple[dict[str, Job], Mapping[bytes, Media]]:
    """The unfinished jobs by their keys, with all stored that is known before encoding."""
    jobs, media = begin_extraction(storage, config)
    left = {job.manifest.key: job for job in jobs if not job.is_done}
    for job in left.values():
        begin_parts(storage, job)
        job.select([name for name, one in _planned_arrays(job).items() if not one.is_complete])
    return left, media


def _plan_of(
    storage: Storage, config: ExtractConfig, jobs: Mapping[str, Job], media: Mapping[bytes, Media], num_workers: int
) -> Plan:
    root = read_root(storage)
    assert root is not None
    table = read_table(storage, root)
    planned = [
        PlannedEncoder(
            key=key,
            modality=job.manifest.modality,
            start=job.start,
            num_inputs=job.num_inputs,
            block_rows=job.block_rows,
            num_truncated=job.num_truncated,
            num_absent=_num_absent(job.manifest.modality, job.start, table, media),
            arrays=_planned_arrays(job),
            edges=cut_ranges(job, num_workers),
        )
        for key, job in jobs.items()
    ]
    return Plan(
        name=secrets.token_hex(4),
        root=root_hash(storage),
        options=_deciding_options(config),
        record=provenance(replace(config, rank=None, world_size=None)),
        encoders=tuple(planned),
    )


def _planned_arrays(job: Job) -> dict[str, PlannedArray]:
    missing = job.missing
    return {
        name: PlannedArray(spec=spec, rows=rows, is_complete=name not in missing)
        for name, (spec, rows) in job.arrays.items()
    }


def _deciding_options(config: ExtractConfig) -> dict[str, Any]:
    """The options that decide what is written, as JSON has them."""
    options = encode_options(config)
    names = [one.name for one in dataclasses.fields(ExtractConfig) if one.name not in _FREE_OPTIONS]
    found = {name: getattr(options, name) for name in names}
    found["device"] = choose_device(config.device).partition(":")[0]
    return dict(json.loads(json.dumps(found)))


def _check_options(plan: Plan, config: ExtractConfig, owner: str) -> None:
    """
    Raises:
        CacheError: this process would write something else than the plan says.
    """
    for name, value in _deciding_options(config).items():
        if plan.options.get(name) != value:
            option = name.replace("_", "-")
            _refuse(config, owner, f"--{option} is {value!r}, the plan says {plan.options.get(name)!r}")


def _refuse(config: ExtractConfig, owner: str, what: str) -> NoReturn:
    raise CacheError(
        f"{config.cache}: {owner}: {what}. Start all processes with the same data and options, or end them all and run "
        "saffe extract without --rank, which makes no plan."
    )


def refuse_objects(config: ExtractConfig) -> None:
    """
    Raises:
        ValueError: the data or an encoder cannot be opened by several processes.
    """
    expected = "a place that all processes can open: a folder, a file or a dataset of the hub"
    require(isinstance(config.data, (str, os.PathLike)), "data", f"a {type(config.data).__name__}", expected)
    for modality, one in config.encoder.items():
        require(isinstance(one, str), "encoder", f"{modality}={type(one).__name__}", "hub ids or folders")


def _finish(storage: Storage, plan: Plan, config: ExtractConfig) -> None:
    """Complete the manifests, and remove the plan. Others may do the same at the same time."""
    for planned in plan.encoders:
        _complete(storage, plan, planned, config)
    if _is_current(storage, plan):
        storage.remove_folder(PLANNING)  # of planners that died; nobody plans while there is a plan
        storage.remove(PLAN)
    storage.remove_folder(plan.folder)
    _remove_if_empty(storage)


def _remove_if_empty(storage: Storage) -> None:
    """Remove the folder of the work if nobody plans or works."""
    if not storage.list(WORK):
        storage.remove_folder(WORK)


def _is_current(storage: Storage, plan: Plan) -> bool:
    current = read_plan(storage)
    return current is not None and current.name == plan.name


def _complete(storage: Storage, plan: Plan, planned: PlannedEncoder, config: ExtractConfig) -> None:
    """Move everything that the log of an encoder says into its manifest, once; of two that do so one wins."""
    results = _results(storage, plan, planned)
    manifest = read_encoder(storage, planned.key)
    if not _is_current(storage, plan) or (manifest.finished_rows == planned.num_inputs and not manifest.log):
        return  # after the manifest was read, so that what is written here replaces none of a later plan
    lacking = [name for name, one in planned.arrays.items() if manifest.arrays[name].rows < one.rows]
    if lacking:
        raise CacheError(
            f"{storage.root}: {planned.key}: {lacking[0]} lacks rows though all ranges are finished. Run saffe extract "
            "without --rank to encode them."
        )
    root = read_root(storage)
    assert root is not None
    table = read_table(storage, root)
    wanted = wanted_inputs(table, planned.modality)
    invalid = {row: reason for row, reason in manifest.invalid.items() if wanted[row]}
    check_invalid(manifest, invalid, planned.num_inputs, config, partial(table.name_of, planned.modality))
    manifest.history.append(_history_entry(plan, planned, results))
    try:
        end_log(storage, manifest, planned.num_inputs)
    except CacheError:
        if read_encoder(storage, planned.key).finished_rows != planned.num_inputs:
            raise


def _results(storage: Storage, plan: Plan, planned: PlannedEncoder) -> list[dict[str, Any]]:
    """What the workers reported of an encoder's ranges; those that another process has removed are left out."""
    names = [plan.mark(piece.name) for piece in plan.pieces if piece.encoder.key == planned.key]

    def read(name: str) -> dict[str, Any]:
        try:
            return storage.read_json(name)
        except CacheError:
            return {}

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(read, names))


def _history_entry(plan: Plan, planned: PlannedEncoder, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As one process writes it; the times are sums over all workers."""
    spent = Seconds()
    for one in results:
        for name, value in one.get("seconds", {}).items():
            setattr(spent, name, getattr(spent, name) + value)
    entry = {**plan.record, "inputs": [planned.start, planned.num_inputs]}
    entry |= {"seconds": spent.to_json(), "limit": spent.limit}
    if planned.num_truncated:
        entry["truncated"] = planned.num_truncated
    halved = sorted({tuple(shape) for one in results for shape in one.get("halved", [])})
    if halved:
        entry["halved"] = [list(shape) for shape in halved]
    return entry
