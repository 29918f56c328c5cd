"""Run each frozen encoder once and write what a fusion needs into the cache.

The data's way: sources -> item table (distinct inputs, by content hash) -> a job for each encoder (what the
cache lacks of it) -> encoding, which hands rows to the store's writer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np

from saffe_cache.encoders.encoder import EncoderRequest
from saffe_cache.extraction.encoding import run_job
from saffe_cache.extraction.loading import check_sources
from saffe_cache.extraction.planning import EncodeOptions, Job, plan_job, seconds_per_input
from saffe_cache.features import MODALITIES, CacheError, ItemTable, Modality
from saffe_cache.options import require, require_keys
from saffe_cache.runs import choose_device, provenance
from saffe_cache.sources import Columns, SourceItem, read_items
from saffe_cache.store.compression import CompressionName
from saffe_cache.store.manifest import RootManifest, layers_among, read_encoder, read_root, write_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import NewItem, TableBuilder, read_table, write_table
from saffe_cache.store.writer import EncoderWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Run frozen encoders once and write their hidden states, vectors and block weights to a cache.

    Running it again does nothing; with more layers, encoders, splits or items it adds what is new.
    """

    data: str
    """Dataset: a folder of splits with class folders, one with SPLIT/metadata.jsonl (file_name, captions or
    label), a folder saved by datasets.save_to_disk, or a dataset id of the Hugging Face hub."""
    cache: str
    """The cache to write: a folder name such as data.zarr, or a URL that fsspec opens."""
    encoder: Mapping[str, str]
    """Frozen encoder of a modality, as image=ID, text=ID or audio=ID: a hub id or a local folder. Repeat it."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Hidden states to keep, as image=11,12; hidden_states[i] is the input of layer i. Default: the last two."""
    image_size: int | None = None
    """Side of the pictures in pixels. Default: what the model's processor says."""
    max_length: int | None = None
    """Longest text in tokens. Default: what the model allows."""
    prompt: str = "{}"
    """Put around every text before its encoder, for models that want one, such as 'query: {}'."""
    class_prompt: tuple[str, ...] = ("a photo of a {}.",)
    """Sentence for a class name; repeat it for several, whose vectors are averaged."""
    splits: tuple[str, ...] = ()
    """Only this split; repeat it for several. Default: all."""
    max_items: Mapping[str, int] = field(default_factory=dict)
    """Most items of a split, as train=5000: a fixed random choice by the items' ids."""
    column: Mapping[str, str] = field(default_factory=dict)
    """Columns of a dataset, as image=NAME, audio=NAME, caption=NAME, label=NAME, id=NAME. Default: found by type
    and usual names."""
    revision: Mapping[str, str] = field(default_factory=dict)
    """Revision of a hub model, as image=COMMIT."""
    storage: Literal["float32", "float16", "bfloat16", "int8", "float8"] = "float16"
    """Type of hidden states on disk; int8 and float8 have a scale for each token. Vectors are always float32."""
    compression: CompressionName = "none"
    """Of hidden states on disk. zstd takes 5 to 25 % off, for slow networks and full disks; but such shards cannot be
    memory-mapped, and are decompressed into memory instead."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the forward pass. auto: float32 on a CPU, bfloat16 on a GPU."""
    attention: str | None = None
    """Attention implementation: sdpa, eager or flash_attention_2. Default: the model's."""
    pooled: bool = True
    """Also keep each encoder's own vector; without it the forward pass stops at the deepest layer kept."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda, cuda:1."""
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; one that does not fit into memory is halved. Default: 2048 on a CPU, which
    its caches hold, 32768 on a GPU."""
    batch_size: int | None = None
    """Photos or sounds in a batch. Default: as many as have --batch-tokens."""
    workers: int | None = None
    """How many read, decode and prepare photos and sounds at once. Default: one a processor core, at least 4."""
    decode_in: Literal["auto", "threads", "processes"] = "auto"
    """What the workers are. auto: threads on a CPU; forked processes beside a GPU, which threads would slow down."""
    shard_mb: int = 64
    """Size of a shard in MB: the unit of writing and resuming."""
    max_invalid: float = 0.01
    """Fraction of unreadable items, 0 to 1, over which the run stops."""
    plan: bool = False
    """Print items, bytes, files and an estimated time, and write nothing."""

    def __post_init__(self) -> None:
        for option, mapping in (("encoder", self.encoder), ("layers", self.layers), ("revision", self.revision)):
            require_keys(option, mapping, MODALITIES)
        require_keys("column", self.column, [one.name for one in fields(Columns)])
        require(bool(self.encoder), "encoder", "none", "at least one, such as image=facebook/dinov2-small")
        idle = [name for name in self.layers if name not in self.encoder]
        require(not idle, "layers", f"{idle}=…", "modalities that --encoder names")
        for prompt in (self.prompt, *self.class_prompt):
            require(prompt.count("{}") == 1, "prompt or --class-prompt", repr(prompt), "one {} where the text goes")
        for option in ("image_size", "max_length", "batch_size", "batch_tokens", "workers"):
            value = getattr(self, option)
            require(value is None or value > 0, option, value, "a number above 0")
        require(self.shard_mb >= 0, "shard_mb", self.shard_mb, "0 (the smallest) or more")
        require(0 <= self.max_invalid <= 1, "max_invalid", self.max_invalid, "a fraction from 0 to 1")
        require(min(self.max_items.values(), default=1) > 0, "max_items", dict(self.max_items), "numbers above 0")


def extract(config: ExtractConfig) -> str:
    """Extract, and return the cache's path.

    Raises:
        ValueError: the data, an encoder or a layer is not there or not supported.
        CacheError: the cache cannot take this, too many items are unreadable, or a number overflows.
        OSError: the disk is full or gone; the extraction can be resumed.
    """
    items = read_items(config.data, Columns(**config.column), config.splits, config.max_items)
    _check_unreadable(items, config)
    storage = Storage(config.cache)
    if config.plan:
        table, _ = _grow_table(storage, items, config)
        _print_plan(list(_plan_jobs(storage, table, config)), items, config)
        return f"nothing was written to {config.cache}"
    with storage.writer_lock():
        storage.remove_partial_files()
        table, changed = _grow_table(storage, items, config)
        media = {h: item.media[m] for item in items if not item.problem for m, h in item.hashes.items()}
        jobs = list(_plan_jobs(storage, table, config))
        for job in jobs:
            check_sources(job, media)
        _say_what_happens(jobs, table, items)
        _write_root(storage, table if changed else None, jobs)
        record = provenance(config)
        for job in jobs:
            run_job(storage, job, media, record)
    return config.cache


def _plan_jobs(storage: Storage, table: ItemTable, config: ExtractConfig) -> Iterator[Job]:
    options = _encode_options(config)
    for request in _requests(config):
        if request.modality not in table.inputs:
            raise ValueError(
                f"--encoder {request.modality}=…: the data has no {request.modality} inputs. Leave it out."
            )
        inputs = table.inputs[request.modality]
        is_wanted = np.ones(len(inputs), bool)
        if request.modality != "text":
            is_wanted = np.isin(np.arange(len(inputs)), table.rows[request.modality])
        yield plan_job(storage, request, inputs, is_wanted, options)


def _encode_options(config: ExtractConfig) -> EncodeOptions:
    """The config's, with what it leaves to the machine."""
    on_gpu = choose_device(config.device) != "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return EncodeOptions(
        storage=config.storage,
        compression=config.compression,
        pooled=config.pooled,
        batch_tokens=config.batch_tokens or (32768 if on_gpu else 2048),
        batch_size=config.batch_size,
        workers=config.workers or max(4, cores),
        decode_in=config.decode_in,
        shard_mb=config.shard_mb,
        max_invalid=config.max_invalid,
    )


def _requests(config: ExtractConfig) -> Iterator[EncoderRequest]:
    device = choose_device(config.device)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    for modality in MODALITIES:
        if modality in config.encoder:
            yield EncoderRequest(
                modality=modality,
                model_id=config.encoder[modality],
                revision=config.revision.get(modality),
                layers=config.layers.get(modality),
                image_size=config.image_size if modality == "image" else None,
                max_length=config.max_length if modality == "text" else None,
                prompt=config.prompt if modality == "text" else "{}",
                dtype=dtype,
                attention=config.attention,
                pooled=config.pooled,
                device=device,
            )


def _grow_table(storage: Storage, items: Sequence[SourceItem], config: ExtractConfig) -> tuple[ItemTable, bool]:
    """The cache's table with the items added, and whether that changed it."""
    root = read_root(storage)
    old = read_table(storage, f"tables/{root.table}") if root else None
    builder = TableBuilder(old, config.class_prompt, _unencoded(storage, root, old))
    added = [
        builder.add(
            NewItem(
                id=item.id,
                split=item.split,
                hashes=dict(item.hashes),
                captions=item.captions,
                labels=item.labels,
                problem=item.problem,
            )
        )
        for item in items
    ]
    return builder.build(), any(added)


def _unencoded(storage: Storage, root: RootManifest | None, table: ItemTable | None) -> dict[Modality, set[int]]:
    """Photos and sounds that no encoder holds: broken ones, and those that an interrupted run did not reach."""
    found: dict[Modality, set[int]] = {}
    for modality, inputs in table.inputs.items() if table else ():
        found[modality] = set(range(len(inputs)))
        for key in root.encoders if root else ():
            manifest = read_encoder(storage, key)
            if manifest.modality == modality:
                found[modality] -= set(range(manifest.finished_rows)) - manifest.invalid.keys()
    return found


def _write_root(storage: Storage, table: ItemTable | None, jobs: Sequence[Job]) -> None:
    """Commit a new table, if any, and name the encoders. Their own manifests come with their first write."""
    root = read_root(storage) or RootManifest(0, ())
    generation = root.table
    if table is not None:
        generation += 1
        storage.remove_folder(f"tables/{generation}")
        write_table(storage, f"tables/{generation}", table)
    for job in jobs:
        if job.manifest.key not in root.encoders:
            EncoderWriter(storage, job.manifest, {})
    keys = tuple(dict.fromkeys([*root.encoders, *(job.manifest.key for job in jobs)]))
    if (generation, keys) != (root.table, root.encoders):
        write_root(storage, RootManifest(generation, keys))
    storage.remove_folder(f"tables/{generation - 1}")  # or what a kill left of it


def _check_unreadable(items: Sequence[SourceItem], config: ExtractConfig) -> None:
    broken = [item for item in items if item.problem]
    if len(broken) > config.max_invalid * len(items):
        raise CacheError(
            f"--data {config.data}: {len(broken)} of {len(items)} items are unreadable, more than --max-invalid "
            f"{config.max_invalid:g} allows; for instance {broken[0].id}: {broken[0].problem}. Mend the data, or raise "
            "--max-invalid."
        )


def _say_what_happens(jobs: Sequence[Job], table: ItemTable, items: Sequence[SourceItem]) -> None:
    unusable = sum(bool(item.problem) for item in items)
    logger.info("%d items, of which %d unreadable; the table holds %d.", len(items), unusable, len(table))
    for job in jobs:
        layers = ",".join(map(str, layers_among(job.arrays)))
        left = job.num_inputs - job.start
        what = "nothing to do" if job.is_done else f"{left} to encode, {job.num_bytes / 1e6:.1f} MB when done"
        logger.info("%s: layers %s, %d inputs, %s.", job.manifest.key, layers, job.num_inputs, what)


def _print_plan(jobs: Sequence[Job], items: Sequence[SourceItem], config: ExtractConfig) -> None:
    """Tell what an extraction would do; the time is that of one batch, times the batches."""
    print(f"{len(items)} items in {config.data}, {sum(bool(item.problem) for item in items)} unreadable")
    total = 0.0
    for job in jobs:
        left = job.num_inputs - job.start
        seconds = left * seconds_per_input(job) if left else 0.0
        total += seconds
        print(f"{job.manifest.key}: {left} of {job.num_inputs} distinct inputs to encode, about {seconds:.0f} s")
        for name, (spec, rows) in sorted(job.arrays.items()):
            shape = " x ".join(map(str, (rows, *spec.row_shape)))
            print(f"  {name}: {shape} {spec.described}, {rows * spec.row_bytes / 1e6:.1f} MB")
        print(f"  {job.num_bytes / 1e6:.1f} MB in about {job.num_files} files")
    print(f"in all {sum(job.num_bytes for job in jobs) / 1e6:.1f} MB and about {total:.0f} s on this machine")
