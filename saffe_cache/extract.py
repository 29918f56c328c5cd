"""Run each frozen encoder once and write what a fusion needs into the cache.

The data's way: sources -> item table (distinct inputs, by content hash) -> for each encoder, blocks of
consecutive inputs: threads decode and prepare ahead, the encoder runs, a writer thread stores. Blocks are
cut at fixed row numbers and batched by a fixed rule, so that a resumed extraction repeats the very batches
of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from saffe_cache import __version__
from saffe_cache.encoders.encoder import Encoded, EncoderRequest, FrozenEncoder, load_encoder
from saffe_cache.features import MODALITIES, CacheError, ItemTable, Modality
from saffe_cache.sources import Columns, Media, SourceItem, decode, read_items
from saffe_cache.store.layout import ArraySpec, choose_rows, to_storage
from saffe_cache.store.manifest import EncoderManifest, RootManifest, layers_among, read_encoder, read_root, write_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import NewItem, TableBuilder, read_table, write_table
from saffe_cache.store.writer import EncoderWriter, Portion, write_blocks

logger = logging.getLogger(__name__)

TEXT_BLOCK_ROWS = 2048
"""Texts that are sorted by length together; padding is then a few percent of the tokens."""


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
    """Only these splits. Default: all."""
    max_items: Mapping[str, int] = field(default_factory=dict)
    """Most items of a split, as train=5000: a fixed random choice by the items' ids."""
    column: Mapping[str, str] = field(default_factory=dict)
    """Columns of a dataset, as image=NAME, audio=NAME, caption=NAME, label=NAME, id=NAME. Default: found by type
    and usual names."""
    revision: Mapping[str, str] = field(default_factory=dict)
    """Revision of a hub model, as image=COMMIT."""
    storage: Literal["float32", "float16", "bfloat16"] = "float16"
    """Type that hidden states are stored in; vectors are always float32."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the forward pass. auto: float32 on a CPU, bfloat16 on a GPU."""
    attention: str | None = None
    """Attention implementation: sdpa, eager or flash_attention_2. Default: the model's."""
    pooled: bool = True
    """Also keep each encoder's own vector; without it the forward pass stops at the deepest layer kept."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda, cuda:1."""
    batch_size: int = 32
    """Photos or sounds in a batch."""
    batch_tokens: int = 4096
    """Tokens in a batch of texts, padding included."""
    workers: int = 4
    """Threads that read, decode and prepare photos and sounds."""
    shard_mb: int = 64
    """Size of a shard in MB: the unit of writing and resuming."""
    max_invalid: float = 0.01
    """Fraction of unreadable items, 0 to 1, over which the run stops."""
    plan: bool = False
    """Print items, bytes, files and an estimated time, and write nothing."""

    def __post_init__(self) -> None:
        for name in (*self.encoder, *self.layers, *self.revision):
            if name not in MODALITIES:
                raise ValueError(f"{name}=…: no such modality; expected one of {', '.join(MODALITIES)}.")
        if not self.encoder:
            raise ValueError("--encoder: none given. Give at least one, such as image=facebook/dinov2-small.")
        unknown = set(self.column) - {"image", "audio", "caption", "label", "id"}
        if unknown:
            raise ValueError(f"--column {unknown.pop()}=…: expected image, audio, caption, label or id.")


@dataclass(kw_only=True)
class _Job:
    """What is left to do for one encoder."""

    encoder: FrozenEncoder
    manifest: EncoderManifest
    arrays: dict[str, tuple[ArraySpec, int]]
    """All arrays of the group, and their rows when done."""
    num_inputs: int
    token_ids: list[list[int]] = field(default_factory=list)
    """Of all texts; empty for photos and sounds."""
    offsets: np.ndarray | None = None
    """int64 [texts + 1]: where each text's tokens begin; None for photos and sounds."""
    start: int = 0
    """First input to encode; `num_inputs` where nothing is left."""

    @property
    def missing(self) -> dict[str, tuple[ArraySpec, int]]:
        """The arrays that lack rows."""
        return {name: array for name, array in self.arrays.items() if self.rows_of(name) < array[1]}

    def rows_of(self, name: str) -> int:
        """Committed rows of an array."""
        return self.manifest.arrays[name].rows if name in self.manifest.arrays else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays when done."""
        return sum(spec.row_bytes * rows for spec, rows in self.arrays.values())

    @property
    def num_files(self) -> int:
        return sum(2 + rows // spec.shard_rows for spec, rows in self.arrays.values())


def extract(config: ExtractConfig) -> str:
    """Extract, and return the cache's path.

    Raises:
        ValueError: the data, an encoder or a layer is not there or not supported.
        CacheError: the cache cannot take this, too many items are unreadable, or a number overflows.
        OSError: the disk is full or gone; the extraction can be resumed.
    """
    columns = Columns(**config.column)
    items = _limit(read_items(config.data, columns, config.splits), config.max_items)
    _check_invalid(sum(bool(item.problem) for item in items), len(items), _first_problem(items), config)
    storage = Storage(config.cache)
    if config.plan:
        table, _ = _grow_table(storage, items, config)
        _print_plan([_plan(storage, table, request, config) for request in _requests(config)], table, items, config)
        return config.cache
    with storage.writer_lock():
        storage.remove_partial_files()
        table, changed = _grow_table(storage, items, config)
        jobs = [_plan(storage, table, request, config) for request in _requests(config)]
        _say_what_happens(jobs, table, items)
        _write_root(storage, table if changed else None, jobs)
        media = {h: item.media[m] for item in items if not item.problem for m, h in item.hashes.items()}
        for job in jobs:
            _run(storage, job, table, media, config)
    return config.cache


def _requests(config: ExtractConfig) -> Iterator[EncoderRequest]:
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
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


def _limit(items: list[SourceItem], most: Mapping[str, int]) -> list[SourceItem]:
    """At most so many items of a split: those whose hashed ids come first, in the dataset's order."""
    chosen = {item.id for item in items if item.split not in most}
    for split, count in most.items():
        ids = [item.id for item in items if item.split == split]
        chosen.update(sorted(ids, key=lambda name: hashlib.sha256(name.encode("utf-8", "replace")).digest())[:count])
    return [item for item in items if item.id in chosen]


def _grow_table(storage: Storage, items: Sequence[SourceItem], config: ExtractConfig) -> tuple[ItemTable, bool]:
    """The cache's table with the items added, and whether that changed it."""
    root = read_root(storage)
    old = read_table(storage, f"tables/{root.table}") if root else None
    builder = TableBuilder(old, config.class_prompt)
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


def _write_root(storage: Storage, table: ItemTable | None, jobs: Sequence[_Job]) -> None:
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
    if table is not None:
        storage.remove_folder(f"tables/{generation - 1}")


def _plan(storage: Storage, table: ItemTable, request: EncoderRequest, config: ExtractConfig) -> _Job:
    """Load the encoder and find out what the cache lacks of it."""
    inputs = table.inputs.get(request.modality)
    if inputs is None:
        raise ValueError(f"--encoder {request.modality}=…: the data has no {request.modality} inputs. Leave it out.")
    encoder = load_encoder(request)
    manifest = _manifest(storage, encoder)
    token_ids: list[list[int]] = []
    offsets = None
    if request.modality == "text":
        token_ids = encoder.tokenize(inputs.texts or ())
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in token_ids])]).astype(np.int64)
    job = _Job(
        encoder=encoder,
        manifest=manifest,
        arrays=_arrays(encoder, manifest, len(inputs), offsets, config),
        num_inputs=len(inputs),
        token_ids=token_ids,
        offsets=offsets,
    )
    job.start = _first_input(job, config)
    if job.missing:
        vectors = any(name in encoder.vector_widths for name in job.missing)
        encoder.select(layers_among(job.missing), vectors=vectors)
    return job


def _manifest(storage: Storage, encoder: FrozenEncoder) -> EncoderManifest:
    root = read_root(storage)
    if root and encoder.fingerprint.key in root.encoders:
        return read_encoder(storage, encoder.fingerprint.key)
    modality: Modality = encoder.request.modality
    for key in root.encoders if root else ():
        other = read_encoder(storage, key)
        if other.fingerprint.fields["model_id"] == encoder.fingerprint.fields["model_id"]:
            differences = "; ".join(encoder.fingerprint.differences(other.fingerprint))
            logger.warning("%s is cached already, but made otherwise (%s): a second group.", key, differences)
    return EncoderManifest(
        fingerprint=encoder.fingerprint,
        modality=modality,
        num_layers=encoder.num_layers,
        hidden_size=encoder.hidden_size,
        vector="projected" if encoder.family.projection else "pooled",
    )


def _arrays(
    encoder: FrozenEncoder, manifest: EncoderManifest, num_inputs: int, offsets: np.ndarray | None, config: ExtractConfig
) -> dict[str, tuple[ArraySpec, int]]:
    """All arrays of the encoder's group, those asked for and those there already, and their rows when done."""
    if offsets is None:
        tokens = encoder.encode(encoder.prepare(_blank(encoder))).states[encoder.layers[0]].shape[1]
        state_shape: tuple[int, ...] = (tokens, encoder.hidden_size)
        names: tuple[str, ...] = (encoder.request.modality, "token", "hidden")
        state_rows = num_inputs
    else:
        state_shape, names, state_rows = (encoder.hidden_size,), ("text_token", "hidden"), int(offsets[-1])
    states = _spec(state_shape, config.storage, names, config)
    vector_rows = states.shard_rows if offsets is None else TEXT_BLOCK_ROWS
    wanted = {f"hidden_states/{i}": (states, state_rows) for i in encoder.layers}
    for name, width in encoder.vector_widths.items() if config.pooled else ():
        spec = ArraySpec(
            row_shape=(width,),
            dtype="float32",
            chunk_rows=vector_rows,
            shard_rows=vector_rows,
            dimension_names=(encoder.request.modality, f"{name}_dimension"),
        )
        wanted[name] = (spec, num_inputs)
    if offsets is not None:
        spec = ArraySpec(row_shape=(), dtype="int64", chunk_rows=2**17, shard_rows=2**17, dimension_names=("text_offset",))
        wanted["offsets"] = (spec, num_inputs + 1)
    for name, array in manifest.arrays.items():
        if name in wanted and array.spec.dtype != wanted[name][0].dtype:
            raise CacheError(
                f"{manifest.key}: {name} is stored as {array.spec.dtype}, asked for {wanted[name][0].dtype}. "
                f"Use --storage {array.spec.dtype}, or another --cache."
            )
        wanted[name] = (array.spec, wanted.get(name, (None, _rows_of(name, num_inputs, state_rows)))[1])
    return wanted


def _rows_of(name: str, num_inputs: int, state_rows: int) -> int:
    return state_rows if name.startswith("hidden_states/") else num_inputs


def _spec(shape: tuple[int, ...], dtype: str, names: tuple[str, ...], config: ExtractConfig) -> ArraySpec:
    one = ArraySpec(row_shape=shape, dtype=dtype, chunk_rows=1, shard_rows=1, dimension_names=names)
    chunk_rows, shard_rows = choose_rows(one.row_bytes, config.shard_mb * 2**20)
    return ArraySpec(row_shape=shape, dtype=dtype, chunk_rows=chunk_rows, shard_rows=shard_rows, dimension_names=names)


def _blank(encoder: FrozenEncoder) -> Any:
    """A picture or sound of nothing, to learn the number of tokens."""
    if encoder.request.modality == "audio":
        return np.zeros(encoder.sampling_rate or 16_000, np.float32)
    return np.zeros((64, 64, 3), np.uint8)


def _first_input(job: _Job, config: ExtractConfig) -> int:
    """The first input that some array lacks, moved back to where its batch begins."""
    counts = [job.num_inputs]
    for name in job.missing:
        rows = job.rows_of(name)
        if name == "offsets":  # known before anything is encoded
            continue
        if job.offsets is not None and name.startswith("hidden_states/"):
            rows = int(np.searchsorted(job.offsets, rows, side="right")) - 1
        counts.append(rows)
    first, finished = min(counts), job.manifest.finished_rows
    begin_of_batch = first // _block_rows(job, config) * _block_rows(job, config)
    return max(begin_of_batch, finished) if finished <= first else begin_of_batch


def _block_rows(job: _Job, config: ExtractConfig) -> int:
    return TEXT_BLOCK_ROWS if job.offsets is not None else config.batch_size


def _blocks(job: _Job, config: ExtractConfig) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks that are left; all but the first begin at multiples of the block's rows."""
    rows = _block_rows(job, config)
    start = job.start
    while start < job.num_inputs:
        stop = min((start // rows + 1) * rows, job.num_inputs)
        yield start, stop
        start = stop


def _run(
    storage: Storage, job: _Job, table: ItemTable, media: Mapping[bytes, Media], config: ExtractConfig
) -> None:
    """Encode and store what is left of one job."""
    if not job.missing and job.manifest.finished_rows == job.num_inputs:
        return
    write_blocks(storage, job.manifest.key, job.encoder.blocks)
    encoding = 0.0
    started = time.perf_counter()
    with EncoderWriter(storage, job.manifest, job.missing) as writer:
        if job.offsets is not None and "offsets" in job.missing:
            writer.put(Portion({"offsets": (0, to_storage(job.offsets, "int64"))}))
        progress = tqdm(total=job.num_inputs, initial=job.start, unit=f" {job.encoder.request.modality}s", desc=job.manifest.key)
        blocks = _encode_texts(job, config) if job.offsets is not None else _encode_media(job, table, media, config)
        for (first, last), portion, seconds in blocks:
            writer.put(portion)
            encoding += seconds
            progress.update(last - first)
            _check_invalid(len(job.manifest.invalid), job.num_inputs, _last_reason(job.manifest), config)
        progress.close()
        seconds = {"total": time.perf_counter() - started, "encoding": encoding}
        job.manifest.history.append(
            {
                "config": json.loads(json.dumps(asdict(config), default=str)),
                "inputs": [job.start, job.num_inputs],
                "seconds": {name: round(value, 2) for name, value in seconds.items()},
                "saffe_cache": __version__,
            }
        )
        writer.finish(job.num_inputs)
    logger.info(
        "%s: %.0f s, of which encoding %.0f s, writing (beside it) %.0f s; %d inputs unreadable.",
        job.manifest.key,
        seconds["total"],
        encoding,
        writer.seconds,
        len(job.manifest.invalid),
    )


Encoding = Iterator[tuple[tuple[int, int], Portion, float]]
"""((first, last input), their rows, seconds in the encoder)."""


def _encode_media(
    job: _Job, table: ItemTable, media: Mapping[bytes, Media], config: ExtractConfig
) -> Encoding:
    """Photos or sounds: threads stay two batches ahead of the encoder."""
    encoder = job.encoder
    hashes = table.inputs[encoder.request.modality].content_hash

    def load(row: int) -> dict[str, torch.Tensor] | str:
        try:
            raw = decode(encoder.request.modality, media[hashes[row].tobytes()].read(), encoder.sampling_rate)
            return encoder.prepare(raw)
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    absent = [row for row in range(job.start, job.num_inputs) if hashes[row].tobytes() not in media]
    if absent:
        raise CacheError(
            f"{job.manifest.key}: {len(absent)} of the cache's {encoder.request.modality} inputs are not in --data "
            f"{config.data}, the first is row {absent[0]}. Give the data that they came from."
        )
    with ThreadPoolExecutor(config.workers) as pool:
        ahead: deque[tuple[tuple[int, int], list[Future[Any]]]] = deque()
        for block in _blocks(job, config):
            ahead.append((block, [pool.submit(load, row) for row in range(*block)]))
            if len(ahead) > 2:
                yield _encode_block(job, *ahead.popleft())
        while ahead:
            yield _encode_block(job, *ahead.popleft())


def _encode_block(
    job: _Job, block: tuple[int, int], loading: list[Future[Any]]
) -> tuple[tuple[int, int], Portion, float]:
    loaded = [future.result() for future in loading]
    invalid = {block[0] + i: value for i, value in enumerate(loaded) if isinstance(value, str)}
    good = [i for i, value in enumerate(loaded) if not isinstance(value, str)]
    started = time.perf_counter()
    encoded = None
    if good:
        inputs = {name: torch.cat([loaded[i][name] for i in good]) for name in loaded[good[0]]}
        encoded = job.encoder.encode(inputs)
    seconds = time.perf_counter() - started
    rows: dict[str, tuple[int, np.ndarray]] = {}
    for name, values in _named(encoded, job).items():
        spec = job.arrays[name][0]
        whole = np.full((len(loaded), *spec.row_shape), np.nan, np.float32)
        whole[good] = values
        rows[name] = (block[0], _store(job, name, whole, np.arange(*block), invalid))
    return block, Portion(rows, invalid), seconds


def _encode_texts(job: _Job, config: ExtractConfig) -> Encoding:
    """Texts: sorted by length within a block, in batches of about `batch_tokens`."""
    assert job.offsets is not None
    for start, stop in _blocks(job, config):
        started = time.perf_counter()
        order = sorted(range(start, stop), key=lambda row: len(job.token_ids[row]))
        flat: dict[str, np.ndarray] = {}
        for batch in _token_batches(order, job.token_ids, config.batch_tokens):
            encoded = job.encoder.encode(job.encoder.pad([job.token_ids[row] for row in batch]))
            for name, values in _named(encoded, job).items():
                spec = job.arrays[name][0]
                is_state = name.startswith("hidden_states/")
                size = int(job.offsets[stop] - job.offsets[start]) if is_state else stop - start
                whole = flat.setdefault(name, np.full((size, *spec.row_shape), np.nan, np.float32))
                for row, value, length in zip(batch, values, encoded.lengths, strict=True):
                    at = job.offsets[row] - job.offsets[start] if is_state else row - start
                    whole[at : at + (length if is_state else 1)] = value[:length] if is_state else value
        invalid: dict[int, str] = {}
        rows = {}
        for name, values in flat.items():
            is_state = name.startswith("hidden_states/")
            inputs = np.repeat(np.arange(start, stop), np.diff(job.offsets[start : stop + 1])) if is_state else np.arange(start, stop)
            first = int(job.offsets[start]) if is_state else start
            rows[name] = (first, _store(job, name, values, inputs, invalid))
        yield (start, stop), Portion(rows, invalid), time.perf_counter() - started


def _token_batches(order: list[int], token_ids: list[list[int]], budget: int) -> Iterator[list[int]]:
    """Rows, already sorted by length, in batches whose padded size stays within the budget."""
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * len(token_ids[row]) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _named(encoded: Encoded | None, job: _Job) -> dict[str, Any]:
    """Values by array name; NaN where nothing of the block could be encoded."""
    if encoded is None:
        return {name: np.nan for name in job.missing if name != "offsets"}
    named: dict[str, Any] = {f"hidden_states/{i}": states for i, states in encoded.states.items()}
    return named | dict(encoded.vectors)


def _store(job: _Job, name: str, values: np.ndarray, inputs: np.ndarray, invalid: dict[int, str]) -> np.ndarray:
    """Cast to the storage type; `inputs` is the input that each row belongs to. Notes non-finite ones.

    Raises:
        CacheError: a finite number does not fit into the storage type.
    """
    spec = job.arrays[name][0]
    finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    for row in np.unique(inputs[~finite]):
        invalid.setdefault(int(row), f"{name} is not finite")
    try:
        return to_storage(values, spec.dtype)
    except OverflowError as error:
        largest = np.nanmax(np.abs(values.reshape(len(values), -1)), axis=1)
        raise CacheError(
            f"{job.manifest.key}: {name} of input {int(inputs[np.nanargmax(largest)])}: {error}. "
            "Extract into a new cache with --storage bfloat16 or float32."
        ) from None


def _check_invalid(count: int, total: int, example: str, config: ExtractConfig) -> None:
    if count > config.max_invalid * total:
        raise CacheError(
            f"--data {config.data}: {count} of {total} are unreadable, more than --max-invalid {config.max_invalid:g} "
            f"allows; for instance {example}. Mend the data, or raise --max-invalid; what was encoded is kept."
        )


def _first_problem(items: Sequence[SourceItem]) -> str:
    return next((f"{item.id}: {item.problem}" for item in items if item.problem), "")


def _last_reason(manifest: EncoderManifest) -> str:
    return f"row {max(manifest.invalid)}: {manifest.invalid[max(manifest.invalid)]}" if manifest.invalid else ""


def _say_what_happens(jobs: Sequence[_Job], table: ItemTable, items: Sequence[SourceItem]) -> None:
    unusable = sum(bool(item.problem) for item in items)
    logger.info("%d items, of which %d unreadable; the table holds %d.", len(items), unusable, len(table))
    for job in jobs:
        layers = ",".join(str(i) for i in layers_among(job.arrays))
        left = job.num_inputs - job.start
        if left:
            logger.info("%s: layers %s, %d of %d inputs to encode, %.1f MB when done.", job.manifest.key, layers, left, job.num_inputs, job.num_bytes / 1e6)
        else:
            logger.info("%s: layers %s, all %d inputs are there, nothing to do.", job.manifest.key, layers, job.num_inputs)


def _print_plan(
    jobs: Sequence[_Job], table: ItemTable, items: Sequence[SourceItem], config: ExtractConfig
) -> None:
    """Tell what an extraction would do; the time is that of one batch of blanks, times the batches."""
    print(f"{len(items)} items in {config.data}, {sum(bool(item.problem) for item in items)} unreadable")
    total = 0.0
    for job in jobs:
        left = job.num_inputs - job.start
        seconds = left * _seconds_per_input(job, config)
        total += seconds
        print(f"{job.manifest.key}: {left} of {job.num_inputs} distinct inputs to encode, about {seconds:.0f} s")
        for name, (spec, rows) in sorted(job.arrays.items()):
            print(f"  {name}: {rows} rows of {spec.row_shape or 1} {spec.dtype}, {rows * spec.row_bytes / 1e6:.1f} MB")
        print(f"  {job.num_bytes / 1e6:.1f} MB in about {job.num_files} files")
    print(f"in all {sum(job.num_bytes for job in jobs) / 1e6:.1f} MB and about {total:.0f} s on this machine")


def _seconds_per_input(job: _Job, config: ExtractConfig) -> float:
    if job.offsets is None:
        one = job.encoder.prepare(_blank(job.encoder))
        batch = {name: torch.cat([value] * config.batch_size) for name, value in one.items()}
        count = config.batch_size
    else:
        middle = job.token_ids[len(job.token_ids) // 2]
        count = max(1, min(64, config.batch_tokens // len(middle)))
        batch = job.encoder.pad([middle] * count)
    job.encoder.encode(batch)
    started = time.perf_counter()
    job.encoder.encode(batch)
    return (time.perf_counter() - started) / count
