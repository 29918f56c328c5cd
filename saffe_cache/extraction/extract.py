"""Run each frozen encoder once and write all that a fusion needs to the cache.

Data flow: source -> item table (distinct inputs, by content hash) -> a job for each encoder (the rows that the cache
lacks) -> encoding, which passes rows to the store's writer.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from saffe_cache.core.devices import is_fast_with_bfloat16
from saffe_cache.core.features import MODALITIES, CacheError, Modality
from saffe_cache.core.items import ItemTable
from saffe_cache.core.outputs import provenance
from saffe_cache.encoders.own import OwnEncoder
from saffe_cache.extraction.config import ExtractConfig, encode_options
from saffe_cache.extraction.encoding import run_job
from saffe_cache.extraction.loading import check_sources
from saffe_cache.extraction.planning import Job, encoder_request, plan_job, seconds_per_input
from saffe_cache.sources.items import Columns, Media, SourceItem
from saffe_cache.sources.objects import described, is_streamed
from saffe_cache.sources.registry import read_items
from saffe_cache.store.claims import held_cache
from saffe_cache.store.layout import layers_among
from saffe_cache.store.manifest import read_encoder
from saffe_cache.store.parts import Part, read_table, remove_unlisted, write_part
from saffe_cache.store.root import RootManifest, read_root, write_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import TableBuilder
from saffe_cache.store.work import WORK
from saffe_cache.store.writer import begin_log

logger = logging.getLogger(__name__)

_SHARED_TEXTS = 0.05
"""Fraction of a split's distinct texts that may share their vector without a warning."""


def extract(config: ExtractConfig | None = None, /, **options: Any) -> str:
    """Extract, and return the cache's path.

    Args:
        config: the options, unless they are given by name. Its `data` may also be a datasets.Dataset or DatasetDict, a
            pandas frame, a list of (image, captions), a torch Dataset, or a dict of these by split. An `encoder` may
            also be an OwnEncoder.

    Raises:
        ValueError: the data, an encoder or a layer is unavailable or unsupported.
        CacheError: the cache does not match the config, too many items are unreadable, or a number overflows.
        OSError: the disk is full or gone; the extraction can be resumed.
    """
    config = config or ExtractConfig(**options)
    if config.rank is not None:
        from saffe_cache.extraction.workers import run_rank  # it plans by what is here

        return run_rank(config)
    if config.workers_on is not None:
        from saffe_cache.extraction.on_ray import extract_on_ray

        return extract_on_ray(config)
    config, items, own = _read(config)
    storage = Storage(config.cache)
    if config.plan:
        return _plan(storage, config, items, own)
    with held_cache(storage):
        jobs, media = _begin(storage, config, items, own)
        del items  # their texts are in the table
        storage.remove_folder(WORK)  # of processes that are gone; their finished shards count
        record = provenance(config)
        for job in jobs:
            run_job(storage, job, media, record)
    return config.cache


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for reference cycles, of which there are none among items: it would go through all of them, and through
    the libraries, again and again while they become more, which took a quarter of the time of a plan."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def begin_extraction(storage: Storage, config: ExtractConfig) -> tuple[list[Job], Mapping[bytes, Media]]:
    """Read the data, commit the table and the encoders, and return what is left to encode, and the media by their hash.

    The caller holds the cache. Errors as of `extract`.
    """
    config, items, own = _read(config)
    return _begin(storage, config, items, own)


@_uncollected()
def _read(config: ExtractConfig) -> tuple[ExtractConfig, list[SourceItem], Mapping[str, OwnEncoder]]:
    """The config in words, the items of its data, and the encoders that are Python objects."""
    own = {modality: one for modality, one in config.encoder.items() if isinstance(one, OwnEncoder)}
    names = {modality: one.name or type(one.model).__name__ for modality, one in own.items()}
    config = replace(config, encoder={**config.encoder, **names})
    items = read_items(
        *(config.data, Columns(**config.column), config.splits, config.max_items),
        streaming=config.streaming,
        rehash=config.rehash,
    )
    config = replace(config, data=described(config.data), streaming=config.streaming or is_streamed(config.data))
    _check_unreadable(items, config)
    return config, items, own


def media_of(items: Sequence[SourceItem]) -> dict[bytes, Media]:
    """The photos and sounds of the usable items by their hash."""
    return {h: item.media[m] for item in items if not item.problem for m, h in item.hashes.items()}


@_uncollected()
def _plan(storage: Storage, config: ExtractConfig, items: Sequence[SourceItem], own: Mapping[str, OwnEncoder]) -> str:
    table, _ = _grow_table(storage, items, config)
    _print_plan(list(_plan_jobs(storage, table, config, items, own, media_of(items))), items, config)
    return f"nothing was written to {config.cache}"


@_uncollected()
def _begin(
    storage: Storage, config: ExtractConfig, items: Sequence[SourceItem], own: Mapping[str, OwnEncoder]
) -> tuple[list[Job], Mapping[bytes, Media]]:
    media = media_of(items)
    table, part = _grow_table(storage, items, config)
    jobs = list(_plan_jobs(storage, table, config, items, own, media))
    for job in jobs:
        check_sources(job, media)
    _log_plan(jobs, table, items)
    _write_root(storage, part, jobs)
    return jobs, media


def _plan_jobs(
    storage: Storage,
    table: ItemTable,
    config: ExtractConfig,
    items: Sequence[SourceItem],
    own: Mapping[str, OwnEncoder],
    media: Mapping[bytes, Media],
) -> Iterator[Job]:
    options = encode_options(config)
    for modality in (name for name in MODALITIES if name in config.encoder):
        if modality not in table.inputs:
            columns = dict.fromkeys(name for item in items for name in item.columns)
            role = "caption" if modality == "text" else modality
            raise ValueError(
                f"--encoder {modality}=…: the data has no {modality} inputs; its columns are "
                f"{', '.join(columns) or 'none'}. Name one with --column {role}=NAME, or omit this encoder."
            )
        request = replace(encoder_request(config, modality), own=own.get(modality))
        job = plan_job(storage, request, table, options, media)
        is_new = not job.start and not job.is_done
        if is_new and config.dtype == "auto" and request.device == "cpu" and is_fast_with_bfloat16("cpu"):
            logger.info("%s: on this processor --dtype bfloat16 encodes two to three times as fast.", job.manifest.key)
        yield job


def _grow_table(storage: Storage, items: Sequence[SourceItem], config: ExtractConfig) -> tuple[ItemTable, Part | None]:
    """The cache's table with the items added, and what they add; None if nothing."""
    root = read_root(storage)
    old = read_table(storage, root) if root else None
    may_change = config.changed == "reencode"
    builder = TableBuilder(old, config.class_prompt, _unencoded(storage, root, old), may_change=may_change)
    is_grown = [builder.add(item) for item in items]
    table = builder.build()
    if builder.changed:
        item_id, what = next(iter(builder.changed.items()))
        logger.warning(
            "%d items have changed and are encoded again, for instance %s (%s). Runs that were trained on the old "
            "items do not match the cache: train them again.",
            *(len(builder.changed), item_id, what),
        )
    return table, builder.part() if any(is_grown) else None


def _unencoded(storage: Storage, root: RootManifest | None, table: ItemTable | None) -> dict[Modality, np.ndarray]:
    """bool [inputs]: which photos and sounds no encoder has encoded: broken ones, and those that an interrupted run did
    not reach."""
    found = {modality: np.ones(len(inputs), bool) for modality, inputs in table.inputs.items()} if table else {}
    for key in root.encoders if root else ():
        manifest = read_encoder(storage, key)
        if manifest.modality in found:
            is_left = found[manifest.modality]
            is_invalid = np.isin(np.arange(len(is_left)), np.fromiter(manifest.invalid, np.int64))
            is_left[: manifest.finished_rows] &= is_invalid[: manifest.finished_rows]
    return found


def _write_root(storage: Storage, part: Part | None, jobs: Sequence[Job]) -> None:
    """Commit what is new of the table, and register the encoders. Their manifests are written with their first rows."""
    was = read_root(storage)
    root = was or RootManifest((), ())
    tables = root.tables if part is None else write_part(storage, root, part)
    for job in jobs:
        if job.manifest.key not in root.encoders:
            begin_log(storage, job.manifest, {})
    keys = tuple(dict.fromkeys([*root.encoders, *(job.manifest.key for job in jobs)]))
    new = RootManifest(tables, keys, root.version if part is None else RootManifest.version)
    if new != root:
        write_root(storage, new, was)
    remove_unlisted(storage, new)


def _check_unreadable(items: Sequence[SourceItem], config: ExtractConfig) -> None:
    broken = [item for item in items if item.problem]
    if len(broken) > config.max_invalid * len(items):
        labelled = {item.split for item in items if item.problem != "no label"}
        bare = ", ".join(sorted({item.split for item in items} - labelled))
        hint = " ".join(f"--splits {split}" for split in sorted(labelled))
        raise CacheError(
            f"--data {config.data}: {len(broken)} of {len(items)} items are unreadable, more than --max-invalid "
            f"{config.max_invalid:g} allows; for instance {broken[0].id}: {broken[0].problem}. Correct the data, or "
            "raise --max-invalid."
            + (f" No item of split {bare} has a label: leave it out with {hint}." if bare and hint else "")
        )


def _log_plan(jobs: Sequence[Job], table: ItemTable, items: Sequence[SourceItem]) -> None:
    unusable = sum(bool(item.problem) for item in items)
    logger.info("%d items, %d of them unreadable; the table has %d.", len(items), unusable, len(table))
    for job in jobs:
        layers = ",".join(map(str, layers_among(job.arrays)))
        left = job.num_inputs - job.start
        what = "nothing to do" if job.is_done else f"{left} to encode, {job.num_bytes / 1e6:.1f} MB when done"
        logger.info("%s: layers %s, %d inputs, %s.", job.manifest.key, layers, job.num_inputs, what)
        if len(job.token_hashes) and not job.is_done:
            _warn_of_texts(job, table)


def _warn_of_texts(job: Job, table: ItemTable) -> None:
    """Warn of truncated texts, and of splits in which many new texts have the same tokens, and so the same vector."""
    key, first = job.manifest.key, job.num_inputs - len(job.token_hashes)
    if job.num_truncated:
        logger.warning(
            "%s: %d of %d texts are longer than %s tokens and are truncated. Use shorter texts, or a larger "
            "--max-length if the model allows it.",
            *(key, job.num_truncated, job.num_inputs, job.encoder.max_length),
        )
    for split in table.splits.counts():
        items = np.flatnonzero(table.splits.are(split))
        of_classes = table.class_texts.take(np.unique(table.labels.take(items).values))
        rows = np.union1d(table.captions.take(items).values, of_classes.values)
        _, counts = np.unique(job.token_hashes[rows[rows >= first] - first], return_counts=True)
        shared, total = counts[counts > 1].sum(), counts.sum()
        if shared > _SHARED_TEXTS * total:
            logger.warning(
                "%s, split %s: %d of %d distinct texts have the same tokens as another one, and so the same vector. "
                "Check that the tokenizer fits the language of the texts, and --max-length.",
                *(key, split, shared, total),
            )


def _print_plan(jobs: Sequence[Job], items: Sequence[SourceItem], config: ExtractConfig) -> None:
    """Print what an extraction would do; the time is extrapolated from one batch."""
    print(f"{len(items)} items in {config.data}, {sum(bool(item.problem) for item in items)} unreadable")
    total = 0.0
    for job in jobs:
        left = job.num_inputs - job.start
        seconds = left * seconds_per_input(job) if left else 0.0
        total += seconds
        print(f"{job.manifest.key}: {left} of {job.num_inputs} distinct inputs to encode, about {seconds:.0f} s")
        if job.num_sampled:
            print(f"  lengths of texts: estimated from {job.num_sampled} of them")
        for name, (spec, rows) in sorted(job.arrays.items()):
            shape = " x ".join(map(str, (rows, *spec.row_shape)))
            print(f"  {name}: {shape} {spec.described}, {rows * spec.row_bytes / 1e6:.1f} MB")
        print(f"  {job.num_bytes / 1e6:.1f} MB in about {job.num_files} files")
    print(f"total: {sum(job.num_bytes for job in jobs) / 1e6:.1f} MB and about {total:.0f} s on this machine")
