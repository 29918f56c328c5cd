"""Plan the job of one encoder: which rows its arrays, existing or new, still lack.

Inputs are encoded in blocks that begin at fixed row numbers and are batched by a fixed rule, so that a resumed
extraction repeats the same batches as an uninterrupted one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from saffe_cache.core.devices import choose_device, choose_dtype
from saffe_cache.core.features import CacheError, Modality, StorageType, Weights
from saffe_cache.core.items import Inputs, ItemTable
from saffe_cache.core.views import PLAIN, place_of
from saffe_cache.encoders.encoder import FrozenEncoder, load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.encoders.transfers import Converter
from saffe_cache.encoders.windows import CutKinds
from saffe_cache.extraction.config import EncodeOptions, ExtractConfig
from saffe_cache.sources.decoding import count_samples
from saffe_cache.sources.items import Media
from saffe_cache.store.arrays import ArrayFiles
from saffe_cache.store.dtypes import convert
from saffe_cache.store.layout import ArraySpec, array_of_view, choose_rows, layers_among, split_view
from saffe_cache.store.manifest import EncoderManifest, read_encoder
from saffe_cache.store.root import read_root
from saffe_cache.store.rows import RowReader
from saffe_cache.store.storage import Storage

logger = logging.getLogger(__name__)

DEFAULT_STORAGE: StorageType = "float8"
"""The smallest type without loss in retrieval; unlike int8, it preserves small channels next to a very large one."""
TEXT_BLOCK_ROWS = 1024
"""Texts that are sorted by length together; padding is then a few percent of the tokens."""
SOUND_BLOCK_ROWS = 16
"""Sounds whose windows are sorted by length together, and held in memory at once: few, since a sound may be long."""
_TOKENIZED_AT_ONCE = 8192
_PLANNED_TEXTS = 20_000
"""Texts whose lengths stand for those of all in a plan that is only printed."""
_MEASURED_TEXTS = 1000
"""Texts among which one of median length is found."""
_VECTOR_SHARDS = 1024
"""Most shards of the vectors of a new encoder, so that millions of texts do not become thousands of files."""
_SOUND_SHARD_ROWS = 64
"""Vectors of sounds per shard: few, since an interrupted extraction resumes at the last whole shard."""


_SOUND_ROWS = {False: "audio_token", True: "audio_window"}
"""What a row of the hidden states of sounds is, by whether windows are stored whole."""


@dataclass(kw_only=True)
class Job:
    """The remaining work for one encoder."""

    encoder: FrozenEncoder
    manifest: EncoderManifest
    options: EncodeOptions
    inputs: Inputs
    is_wanted: np.ndarray
    """bool [inputs]: whether an item refers to it. A broken photo that was replaced is no longer wanted."""
    name_of: Callable[[int], str]
    """The item of an input, for messages."""
    offsets: np.ndarray | None = None
    """int64 [inputs + 1]: where each text's or sound's rows begin in the arrays of hidden states; None for photos."""
    token_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64: a hash of the token ids of each new text, from the first on that no extraction has finished."""
    num_sampled: int = 0
    """Texts whose lengths stand for those of all, in a plan that is only printed; 0 where all are known."""
    num_truncated: int = 0
    """Texts that are longer than the encoder's `max_length`."""
    arrays: dict[str, tuple[ArraySpec, int]] = field(default_factory=dict)
    """All arrays of the group, with their final numbers of rows."""
    start: int = 0
    """First input to encode; `num_inputs` if none remains."""
    chosen: Sequence[range] | None = None
    """The blocks to encode; None for all that remain."""
    views: Sequence[str] = (PLAIN,)
    """The views of each photo to encode."""

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def is_of_texts(self) -> bool:
        return self.encoder.request.modality == "text"

    @property
    def missing(self) -> dict[str, tuple[ArraySpec, int]]:
        """The arrays that lack rows."""
        return {name: array for name, array in self.arrays.items() if self.rows_of(name) < array[1]}

    @property
    def is_done(self) -> bool:
        return not self.missing and self.manifest.finished_rows == self.num_inputs

    @property
    def num_bytes(self) -> int:
        """Final size of the encoder's group in bytes: shards, padded to whole chunks, and weights."""
        total = sum(tensor.nbytes for weights in self.weights.values() for tensor in weights.tensors.values())
        for spec, rows in self.arrays.values():
            full, rest = divmod(rows, spec.shard_rows)
            total += full * spec.shard_file_bytes(spec.shard_rows) + (spec.shard_file_bytes(rest) if rest else 0)
        return total

    @property
    def num_files(self) -> int:
        """Final number of files of the encoder's group, with one metadata file per array."""
        weights = sum(2 * len(weights.tensors) + 1 for weights in self.weights.values())
        tokenizer = 2 if self.encoder.language_model else 0
        return weights + tokenizer + sum(1 + -(-rows // spec.shard_rows) for spec, rows in self.arrays.values())

    @property
    def weights(self) -> dict[str, Weights]:
        """The weights that are stored, by the names of their groups."""
        model = self.encoder.language_model
        blocks = {f"blocks/{layer}": block for layer, block in self.encoder.blocks.items()}
        return blocks | ({"language_model": model} if model else {})

    @property
    def block_rows(self) -> int:
        """Inputs of a block, which are encoded and written together."""
        states = [spec for name, (spec, _) in self.arrays.items() if layers_among([name])]
        return block_rows(self.options, states, self.encoder.num_tokens)

    @property
    def cut_kinds(self) -> CutKinds:
        """Which kinds of sounds there are that a block does not see as the model's layer does."""
        windows = self.encoder.windows
        if not windows or self.offsets is None:
            return CutKinds()
        rows, whole = np.unique(np.diff(self.offsets)), windows.rows(windows.size)
        has_several = bool((rows > whole).any())
        if windows.is_stored_whole:
            return CutKinds(has_several=has_several)
        rows = rows[rows > 1]  # one row is of a sound that cannot be read
        if windows.is_fixed:
            return CutKinds(has_partial=bool((rows % whole > 0).any()), has_several=has_several)
        num_tokens = int(rows[0]) if len(rows) == 1 and not has_several else 0
        return CutKinds(has_several=has_several, has_lengths=len(rows) > 1, num_tokens=num_tokens)

    def rows_of(self, name: str) -> int:
        """Committed rows of an array."""
        return self.manifest.arrays[name].rows if name in self.manifest.arrays else 0

    def is_flat(self, name: str) -> bool:
        """Whether a row of the array is a token or a window of a sound, not an input."""
        return self.offsets is not None and name.startswith("hidden_states/")

    def first_row(self, name: str, number: int) -> int:
        """First row of input `number` in an array."""
        return int(self.offsets[number]) if self.offsets is not None and self.is_flat(name) else number

    def input_of(self, name: str, row: int) -> int:
        """The input that a row of an array belongs to."""
        if self.offsets is None or not self.is_flat(name):
            return row
        return int(np.searchsorted(self.offsets, row, side="right")) - 1

    def blocks(self) -> Iterable[range]:
        """The blocks to encode, in order."""
        return cut_blocks(self.start, self.num_inputs, self.block_rows) if self.chosen is None else self.chosen

    def select(self, names: Collection[str]) -> None:
        """Let the encoder compute only these arrays, and convert hidden states on its device.

        Raises:
            ValueError: one is of a view that this release does not know.
        """
        arrays = {split_view(name)[1]: self.arrays[name] for name in names}
        self.views = sorted({split_view(name)[0] for name in names if name != "offsets"}, key=place_of) or [PLAIN]
        vectors = any(name in self.encoder.vector_widths for name in arrays)
        self.encoder.select(layers_among(arrays), vectors=vectors, converters=converters_of(arrays))


def block_rows(options: EncodeOptions, states: Sequence[ArraySpec], num_tokens: int | None) -> int:
    """Inputs of a block.

    Args:
        states: the encoder's arrays of hidden states, at least one.
        num_tokens: of an input before a selection of tokens; None where all are kept.
    """
    kind = states[0].dimension_names[0]
    if kind == "text_token":
        return TEXT_BLOCK_ROWS
    if kind in _SOUND_ROWS.values():
        return SOUND_BLOCK_ROWS
    return options.batch_size or max(
        1, options.batch_tokens // (num_tokens or max(spec.row_shape[0] for spec in states))
    )


def cut_blocks(start: int, stop: int, rows: int) -> Iterator[range]:
    """Blocks of `rows` inputs; all but the first begin at multiples of it."""
    while start < stop:
        end = min((start // rows + 1) * rows, stop)
        yield range(start, end)
        start = end


def begin_blocks(first: int, finished: int, rows: int) -> int:
    """Where the blocks of an extraction begin if its first input to encode is `first`: at the start of its block.

    Finished inputs do not share a block with new ones, unless they are encoded again.
    """
    begin = first // rows * rows
    return max(begin, finished) if finished <= first else begin


def encoder_request(config: ExtractConfig, modality: Modality) -> EncoderRequest:
    """The request for a config's encoder of a modality."""
    device = choose_device(config.device)
    return EncoderRequest(
        modality=modality,
        model_id=config.encoder[modality],
        revision=config.revision.get(modality),
        layers=config.layers.get(modality),
        image_size=config.image_size if modality == "image" else None,
        decoding=config.decoding if modality == "image" else "full",
        grey_bits=config.grey_bits if modality == "image" else None,
        max_length=config.max_length if modality == "text" else None,
        prompt=config.prompt if modality == "text" else None,
        prompt_name=config.prompt_name if modality == "text" else None,
        language_model=config.language_model and modality == "text",
        position_offset=config.position_offset if modality == "text" else 0,
        dtype=choose_dtype(config.dtype, device),
        attention=config.attention,
        pooled=config.pooled,
        tokens=config.tokens.get(modality, "all"),
        audio_seconds=config.audio_seconds,
        video_frames=config.video_frames if modality == "video" else None,
        device=device,
        device_map=config.device_map,
        max_memory=config.max_memory,
    )


def plan_job(
    storage: Storage, request: EncoderRequest, table: ItemTable, options: EncodeOptions, media: Mapping[bytes, Media]
) -> Job:
    """Load the encoder and determine what the cache lacks.

    Raises:
        ValueError: the encoder is unavailable.
        CacheError: the cache stores its arrays in another type, or its offsets are damaged.
        OSError: a file that was read for its hash cannot be read again.
    """
    encoder, root = load_encoder(request), read_root(storage)
    encoder.decode_as(root.encoders if root else ())
    job = new_job(encoder, _manifest(storage, encoder), options, table)
    find_offsets(job, stored_offsets(storage, job.manifest), media)
    job.arrays = _arrays(job)
    job.start = _first_input(job)
    if job.missing:
        job.select(job.missing)
    return job


def new_job(encoder: FrozenEncoder, manifest: EncoderManifest, options: EncodeOptions, table: ItemTable) -> Job:
    """A job for the inputs of a table, without arrays and offsets."""
    modality = manifest.modality
    inputs, is_wanted = table.inputs[modality], wanted_inputs(table, modality)
    name_of = partial(table.name_of, modality)
    return Job(encoder=encoder, manifest=manifest, options=options, inputs=inputs, is_wanted=is_wanted, name_of=name_of)


def wanted_inputs(table: ItemTable, modality: Modality) -> np.ndarray:
    """bool [inputs]: whether an item refers to an input."""
    count = len(table.inputs[modality])
    if modality not in table.rows:
        return np.ones(count, bool)  # texts are always available
    return np.isin(np.arange(count), table.rows[modality])


def stored_offsets(storage: Storage, manifest: EncoderManifest) -> np.ndarray:
    """The committed offsets of an encoder, int64 [inputs + 1], which never change; 0 for none.

    Raises:
        CacheError: they are damaged.
    """
    array = manifest.arrays.get("offsets")
    if array is None or not array.rows:
        return np.zeros(1, np.int64)
    return RowReader(ArrayFiles(storage, manifest.key, "offsets", array.spec), array.shards).read_range(0, array.rows)


def find_offsets(job: Job, known: np.ndarray, media: Mapping[bytes, Media]) -> None:
    """Determine where the rows of each text or sound begin; `known` are the offsets of the first ones.

    Raises:
        OSError: a file that was read for its hash cannot be read again.
    """
    if job.encoder.windows:
        job.offsets = _sound_offsets(job, known, media)
    elif job.is_of_texts:
        job.offsets = _text_offsets(job, known)


def _text_offsets(job: Job, known: np.ndarray) -> np.ndarray:
    """Tokenizes the texts that no extraction has finished (for a plan, some); sets also what the job says of them."""
    encoder, texts, first = job.encoder, job.inputs.texts or (), min(len(known) - 1, job.manifest.finished_rows)
    kept = encoder.selection.count if encoder.selection else int
    step = max(1, (len(texts) - first) // _PLANNED_TEXTS) if job.options.plan else 1
    counts, hashes = (np.empty(len(range(first, len(texts), step)), np.int64) for _ in range(2))
    earlier = [entry.get("truncated", 0) for entry in job.manifest.extractions] if first else []
    job.num_truncated = max(earlier, default=0)
    with tqdm(total=len(counts), unit=" texts", desc="tokenizing", leave=False, delay=1) as progress:
        for start in range(0, len(counts), _TOKENIZED_AT_ONCE):
            part = texts[first + start * step : first + (start + _TOKENIZED_AT_ONCE) * step : step]
            token_ids = encoder.tokenize(part)
            job.num_truncated += encoder.count_truncated(part, token_ids)
            counts[start : start + len(part)] = [kept(len(ids)) for ids in token_ids]
            hashes[start : start + len(part)] = [hash(tuple(ids)) for ids in token_ids]
            progress.update(len(part))
    if step > 1:
        job.num_sampled, counts = len(counts), np.repeat(counts, step)[: len(texts) - first]
    else:
        job.token_hashes = hashes
    return np.concatenate([known[: first + 1], known[first] + np.cumsum(counts)])


def _sound_offsets(job: Job, known: np.ndarray, media: Mapping[bytes, Media]) -> np.ndarray:
    """Takes the lengths of sounds from their headers.

    A sound that cannot be read or is too short has one row, which stays NaN.
    """
    windows, rate = job.encoder.windows, job.encoder.sampling_rate
    assert windows is not None

    def count(number: int) -> int:
        content_hash = job.inputs.content_hash[number].tobytes()
        if content_hash not in media:
            return 1
        data = media[content_hash].read()
        try:
            return sum(windows.rows(len(window)) for window in windows.cut(count_samples(data, rate)))
        except ValueError:
            return 1  # encoding says why

    with ThreadPoolExecutor(job.options.workers) as pool:
        counts = list(pool.map(count, range(len(known) - 1, job.num_inputs)))
    return np.concatenate([known, known[-1] + np.cumsum(counts, dtype=np.int64)])


def converters_of(arrays: Mapping[str, tuple[ArraySpec, int]]) -> dict[int, Converter]:
    """Converters to the storage types of the layers among some arrays; none for float32, which saves no copying."""
    types = {layer: arrays[f"hidden_states/{layer}"][0].dtype for layer in layers_among(arrays)}
    return {layer: partial(convert, dtype=dtype) for layer, dtype in types.items() if dtype != "float32"}


def seconds_per_input(job: Job) -> float:
    """Measured on one batch of blank inputs (for each view of a photo), of texts of median length, or of whole windows
    of sounds."""
    per_input = float(len(job.views))
    if not job.is_of_texts:
        blank, count = blank_input(job.encoder), job.block_rows
        windows = job.encoder.windows
        if windows:
            assert job.offsets is not None
            count = window_budget(job.options, windows.num_states(len(blank)))
            per_input = int(job.offsets[-1]) / job.num_inputs / windows.rows(len(blank))
        one = job.encoder.prepare(blank)
        batch = {name: torch.cat([value] * count) for name, value in one.items()}
    else:
        texts = job.inputs.texts or ()
        places = np.linspace(0, len(texts) - 1, min(len(texts), _MEASURED_TEXTS)).astype(np.int64)
        median = sorted(job.encoder.tokenize([texts[place] for place in places]), key=len)[len(places) // 2]
        count = max(1, min(64, job.options.batch_tokens // len(median)))
        batch = job.encoder.pad([median] * count)
    job.encoder.encode(batch)
    started = time.perf_counter()
    job.encoder.encode(batch)
    return (time.perf_counter() - started) / count * per_input


def window_budget(options: EncodeOptions, num_tokens: int) -> int:
    """Windows of sounds in a batch."""
    return options.batch_size or max(1, options.batch_tokens // num_tokens)


def _manifest(storage: Storage, encoder: FrozenEncoder) -> EncoderManifest:
    """The encoder's manifest, or a new one; warns if the same model is cached under another key."""
    root = read_root(storage)
    if root and encoder.fingerprint.key in root.encoders:
        return read_encoder(storage, encoder.fingerprint.key)
    for key in root.encoders if root else ():
        other = read_encoder(storage, key)
        if other.fingerprint.fields["model_id"] == encoder.fingerprint.fields["model_id"]:
            differences = "; ".join(encoder.fingerprint.differences(other.fingerprint))
            logger.warning("%s is the same model with other settings (%s); a second group is added.", key, differences)
    return EncoderManifest(
        fingerprint=encoder.fingerprint,
        modality=encoder.request.modality,
        num_layers=encoder.num_layers,
        hidden_size=encoder.hidden_size,
        vector="projected" if "projected" in encoder.vector_widths else "pooled",
        has_feature_maps=encoder.anatomy.has_feature_maps,
        class_tokens=int(encoder.selection.has_cls) if encoder.selection else encoder.anatomy.class_tokens,
        is_language_model=encoder.language_model is not None,
    )


def _arrays(job: Job) -> dict[str, tuple[ArraySpec, int]]:
    """All requested and existing arrays of the encoder's group, with their final numbers of rows."""
    wanted = _state_specs(job)
    if job.options.pooled:
        fixed = {"text": TEXT_BLOCK_ROWS, "audio": _SOUND_SHARD_ROWS}
        rows = fixed.get(job.encoder.request.modality, next(iter(wanted.values())).shard_rows)
        few = 1 << max(0, -(-job.num_inputs // (_VECTOR_SHARDS * rows)) - 1).bit_length()
        for name, width in job.encoder.vector_widths.items():
            names = (job.encoder.request.modality, f"{name}_dimension")
            wanted[name] = ArraySpec(
                row_shape=(width,), dtype="float32", dimension_names=names, chunk_rows=rows, shard_rows=few * rows
            )
    if job.offsets is not None:
        wanted["offsets"] = ArraySpec(
            row_shape=(),
            dtype="int64",
            dimension_names=(f"{job.encoder.request.modality}_offset",),
            chunk_rows=2**17,
            shard_rows=2**17,
        )
    requested = list(wanted) if job.encoder.request.modality == "image" else []
    for name, array in job.manifest.arrays.items():
        if name in wanted and array.spec.dtype != wanted[name].dtype:
            raise CacheError(
                f"{job.manifest.key}: {name} is stored as {array.spec.dtype}, requested: {wanted[name].dtype}. "
                f"Use --storage {array.spec.dtype}, or another --cache."
            )
        wanted[name] = array.spec
    for view in job.options.view_names:
        for name in requested:
            wanted.setdefault(array_of_view(view, name), wanted[name])
    return {
        name: (spec, job.first_row(name, job.num_inputs) + (1 if name == "offsets" else 0))
        for name, spec in wanted.items()
    }


def _state_specs(job: Job) -> dict[str, ArraySpec]:
    """How hidden states are stored: rows of [tokens, d] per photo, rows of [d] per token of a text or of a sound.

    Sounds whose tokens are no steps in time have a row of [tokens, d] per window. All layers have shards with the same
    number of rows, which the largest layer determines.
    """
    shapes: dict[int, tuple[int, ...]] = {layer: (job.encoder.anatomy.widths[layer],) for layer in job.encoder.layers}
    windows, modality = job.encoder.windows, job.encoder.request.modality
    row = _SOUND_ROWS[windows.is_stored_whole] if windows else f"{modality}_token" if modality == "text" else modality
    names: tuple[str, ...] = (row, "hidden")
    if not (job.is_of_texts or (windows and not windows.is_stored_whole)):
        blank = job.encoder.encode(job.encoder.prepare(blank_input(job.encoder)))
        shapes = {layer: states.shape[1:] for layer, states in blank.states.items()}
        names = (row, "token", "hidden")
    stored = [array.spec.dtype for name, array in job.manifest.arrays.items() if name.startswith("hidden_states/")]
    dtype = job.options.storage or (stored[0] if stored else DEFAULT_STORAGE)
    ones = {
        f"hidden_states/{layer}": ArraySpec(
            row_shape=shape, dtype=dtype, dimension_names=names, compression=job.options.compression
        )
        for layer, shape in shapes.items()
    }
    chunk_rows, shard_rows = choose_rows(max(one.row_bytes for one in ones.values()), job.options.shard_mb * 2**20)
    return {name: replace(one, chunk_rows=chunk_rows, shard_rows=shard_rows) for name, one in ones.items()}


def blank_input(encoder: FrozenEncoder) -> Any:
    """A blank picture, clip or window of a sound, to determine the number of tokens."""
    if encoder.windows:
        return np.zeros(encoder.windows.size, np.float32)
    frames = (encoder.num_frames,) if encoder.num_frames else ()
    return np.zeros((*frames, 64, 64, 3), np.uint8)


def _first_input(job: Job) -> int:
    """The first input that an array lacks, moved back to the start of its batch."""
    lacking = job.missing.keys() - {"offsets"}  # offsets are known before encoding
    first = min((job.input_of(name, job.rows_of(name)) for name in lacking), default=job.num_inputs)
    return begin_blocks(first, job.manifest.finished_rows, job.block_rows)
