"""The plan of one extraction by many processes: what they must agree on, who makes it, and its end.

The first process to claim the planning reads and hashes the data, commits the item table, stores all that is known
before encoding, and writes the plan: ranges of inputs (`ranges.py`). The others wait for it, and are refused if they
would write something else. Whoever finds all ranges finished completes the manifests and removes the plan; several may
do so at once.

Python objects as data or encoders, and streams, cannot be shared and are refused.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, NoReturn

from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import CacheError, Modality
from saffe_cache.core.items import ItemTable
from saffe_cache.core.options import require
from saffe_cache.core.outputs import provenance
from saffe_cache.extraction.config import ExtractConfig, encode_options
from saffe_cache.extraction.encoding import Seconds, begin_parts, check_invalid
from saffe_cache.extraction.extract import begin_extraction
from saffe_cache.extraction.planning import Job, wanted_inputs
from saffe_cache.extraction.ranges import cut_ranges
from saffe_cache.sources.items import Media
from saffe_cache.store.claims import Claim, Claims, held_cache
from saffe_cache.store.manifest import read_encoder
from saffe_cache.store.parts import read_table
from saffe_cache.store.root import existing_root, read_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.work import (
    PLAN,
    PLANNING,
    WORK,
    Plan,
    PlannedArray,
    PlannedEncoder,
    create_plan,
    read_plan,
    root_hash,
)
from saffe_cache.store.writer import end_log

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
_NOTHING = "nothing is left to do"
_FREE_OPTIONS = frozenset(
    {
        *("cache", "data", "encoder", "revision", "device", "device_map", "max_memory", "workers", "decode_in"),
        *("max_invalid", "changed", "rehash", "plan", "rank", "world_size"),
        *("workers_on", "ray_address", "gpus_per_worker"),
    }
)
"""Options that may differ between processes. Encoders are compared by what they are, devices by their type."""


def plan_work(config: ExtractConfig, owner: str = "planner", num_workers: int = 1) -> Plan | None:
    """Plan an extraction by several processes, or find the plan that another one made; None if nothing is left to do.

    Errors as of `extract`.

    Args:
        num_workers: about how many workers there will be. What they write does not depend on it.
    """
    refuse_objects(config)
    storage = Storage(config.cache)
    with held_cache(storage, shared=True, owner=owner):
        return shared_plan(storage, config, owner, num_workers).plan


def finish_work(config: ExtractConfig, owner: str = "planner") -> None:
    """Complete the manifests after all ranges are finished, and remove the plan. Repeating it changes nothing.

    Raises:
        CacheError: some range is not finished, or too many inputs are unreadable.
    """
    storage = Storage(config.cache)
    with held_cache(storage, shared=True, owner=owner):
        plan = read_plan(storage)
        if plan is not None:
            complete_all(storage, plan, config)


def refuse_objects(config: ExtractConfig) -> None:
    """
    Raises:
        ValueError: the data or an encoder cannot be opened by several processes.
    """
    expected = "a place that all processes can open: a folder, a file or a dataset of the hub"
    require(isinstance(config.data, (str, os.PathLike)), "data", f"a {type(config.data).__name__}", expected)
    for modality, one in config.encoder.items():
        require(isinstance(one, str), "encoder", f"{modality}={type(one).__name__}", "hub ids or folders")


def _deciding_options(config: ExtractConfig) -> dict[str, Any]:
    """The options that decide what is written, as JSON has them."""
    options = encode_options(config)
    names = [one.name for one in dataclasses.fields(ExtractConfig) if one.name not in _FREE_OPTIONS]
    found = {name: getattr(options, name) for name in names}
    found["device"] = choose_device(config.device).partition(":")[0]
    return dict(json.loads(json.dumps(found)))


def planned_table(storage: Storage, plan: Plan, config: ExtractConfig, owner: str) -> ItemTable:
    """The item table that the plan is about.

    Raises:
        CacheError: it has changed, or this process would write something else than the plan says.
    """
    for name, value in _deciding_options(config).items():
        if plan.options.get(name) != value:
            option = name.replace("_", "-")
            refuse_process(config, owner, f"--{option} is {value!r}, the plan says {plan.options.get(name)!r}")
    root = read_root(storage)
    if root is None or root_hash(storage) != plan.root:
        refuse_process(config, owner, "the item table or the encoders have changed since the plan was made")
    return read_table(storage, root)


def refuse_process(config: ExtractConfig, owner: str, what: str) -> NoReturn:
    raise CacheError(
        f"{config.cache}: {owner}: {what}. Start all processes with the same data and options, or end them all and run "
        "saffe extract without --rank, which makes no plan."
    )


def num_absent(modality: Modality, start: int, table: ItemTable, media: Mapping[bytes, Media]) -> int:
    """Wanted inputs from `start` on that are not among the data."""
    if modality == "text":
        return 0
    hashes, wanted = table.inputs[modality].content_hash, wanted_inputs(table, modality)
    return sum(hashes[row].tobytes() not in media for row in range(start, len(hashes)) if wanted[row])


class Prepared(NamedTuple):
    """The plan, None if nothing is left to do, and what the process that made it knows already."""

    plan: Plan | None
    jobs: dict[str, Job]
    media: Mapping[bytes, Media] | None


def shared_plan(storage: Storage, config: ExtractConfig, owner: str, num_workers: int) -> Prepared:
    """Find the plan, or make it if no other process does; the caller holds the cache. Errors as of `extract`."""
    claims, seen = Claims(storage, PLANNING, owner), set[str]()
    while True:
        plan = read_plan(storage)
        if plan is not None:
            return Prepared(plan, {}, None)
        generation = claims.generations().get("plan")
        holder = claims.look("plan", generation)[0] if generation is not None else None
        claim = None if holder and holder.token in seen and holder.failed else claims.take("plan")
        if claim and generation is not None:
            holder = claims.look("plan", generation)[0]  # it may have given up just now
        if holder and holder.token in seen and holder.failed:
            if claim:
                claim.give_up(holder.failed)
            if holder.failed == _NOTHING:
                return Prepared(None, {}, None)
            raise CacheError(f"{holder} could not plan the extraction: {holder.failed}")
        if claim is not None:
            return _plan_once(storage, config, claim, num_workers)
        if holder and holder.token not in seen:
            logger.info("%s: waiting for the plan of %s.", owner, holder)
            seen.add(holder.token)
        time.sleep(POLL_SECONDS)


def _plan_once(storage: Storage, config: ExtractConfig, claim: Claim, num_workers: int) -> Prepared:
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
        time.sleep(2 * POLL_SECONDS)  # for those who wait
    claim.remove()
    if plan is None:
        _remove_if_empty(storage)
    return Prepared(plan, jobs, media)


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
    table = read_table(storage, existing_root(storage))
    planned = [
        PlannedEncoder(
            key=key,
            modality=job.manifest.modality,
            start=job.start,
            num_inputs=job.num_inputs,
            block_rows=job.block_rows,
            num_truncated=job.num_truncated,
            num_absent=num_absent(job.manifest.modality, job.start, table, media),
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


def complete_all(storage: Storage, plan: Plan, config: ExtractConfig) -> None:
    """Complete the manifests, and remove the plan. Others may do the same at the same time."""
    for planned in plan.encoders:
        _complete(storage, plan, planned, config)
    if is_current(storage, plan):
        storage.remove_folder(PLANNING)  # of planners that died; nobody plans while there is a plan
        storage.remove(PLAN)
    storage.remove_folder(plan.folder)
    _remove_if_empty(storage)


def _remove_if_empty(storage: Storage) -> None:
    """Remove the folder of the work if nobody plans or works."""
    if not storage.list(WORK):
        storage.remove_folder(WORK)


def is_current(storage: Storage, plan: Plan) -> bool:
    current = read_plan(storage)
    return current is not None and current.name == plan.name


def _complete(storage: Storage, plan: Plan, planned: PlannedEncoder, config: ExtractConfig) -> None:
    """Move everything that the log of an encoder says into its manifest, once; of two that do so one wins."""
    results = _results(storage, plan, planned)
    manifest = read_encoder(storage, planned.key)
    if not is_current(storage, plan) or (manifest.finished_rows == planned.num_inputs and not manifest.log):
        return  # after the manifest was read, so that what is written here replaces none of a later plan
    lacking = [name for name, one in planned.arrays.items() if manifest.arrays[name].rows < one.rows]
    if lacking:
        raise CacheError(
            f"{storage.root}: {planned.key}: {lacking[0]} lacks rows though all ranges are finished. Run saffe extract "
            "without --rank to encode them."
        )
    table = read_table(storage, existing_root(storage))
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
