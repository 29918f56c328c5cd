"""The folder of a run: options, data and weights. safetensors and JSON; nothing is unpickled.

config.json           the config, the resolved run (encoders' keys, layers, shape), versions
model.safetensors     the best weights by validation
permuted/             the control that was trained on permuted pairs: its weights and log
log.jsonl             one line for each validation
loggers.json          where other loggers are, such as TensorBoard, whose files are in tensorboard/
encoders.json         what the encoders are and how they were run, without the cache
blocks.safetensors    blocks of the encoders that the fusion runs or was initialised from, if any
ridge.safetensors     the ridge regression on the same photos and layers, the baseline that search is compared with
result.json           the result; written last, so its presence means that the run is complete
state.safetensors     the checkpoint that an interrupted run resumes from
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from safetensors.torch import load_file

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.features import BlockWeights, Modality
from saffe_cache.core.json_schema import made_of
from saffe_cache.core.outputs import CONFIG, RESULT, read_json, write_json
from saffe_cache.fusion.base import Blocks, Fusion
from saffe_cache.inputs.media import media_shapes, seen_by
from saffe_cache.inputs.pairs import require_encoders
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.retrieval.baselines import LinearMap
from saffe_cache.store.held import HeldCache, HeldEncoder, without_rows
from saffe_cache.store.joined import join_media
from saffe_cache.store.manifest import EncoderManifest, weights_type
from saffe_cache.store.reader import Cache, EncoderCache, weights_from
from saffe_cache.store.table import TableBuilder
from saffe_cache.training.result import PERMUTED, TrainResult

MODEL, ENCODERS, BLOCKS, RIDGE = "model.safetensors", "encoders.json", "blocks.safetensors", "ridge.safetensors"
STATE = "state.safetensors"


def build_fusion(spec: RunSpec, cache: Cache) -> Fusion:
    """A fusion with its starting weights and the cached encoder blocks that it runs or is initialised from."""
    photos, texts = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    gallery, text = _block_layers(spec)
    blocks = Blocks([photos.block(layer) for layer in gallery], [texts.block(layer) for layer in text])
    fusion: Fusion = spec.shape.entry.make(spec.shape, blocks)
    return fusion


def _block_layers(spec: RunSpec) -> tuple[Sequence[int], Sequence[int]]:
    """The layers whose blocks a fusion uses, of the gallery's encoder and of the text's."""
    entry, count = spec.shape.entry, spec.shape.num_blocks
    if entry.blocks == "none":
        return (), ()
    if entry.blocks == "paired":
        return spec.gallery_layers, spec.text_layers
    text = range(spec.text_layers[0], spec.text_layers[0] + count)
    return range(spec.gallery_layers[0], spec.gallery_layers[0] + count) if entry.blocks == "both" else (), text


def open_run(run_dir: str | Path, cache: Cache) -> tuple[RunSpec, Fusion, TrainResult]:
    """A finished run: its spec, its best model in evaluation mode, and its result.

    `cache`: of a run that fuses several media, with these joined (`run_cache`).

    Raises:
        ValueError: the run is missing, unfinished or damaged, or was trained on another cache.
        CacheError: the cache lacks a layer that it was trained on.
    """
    spec, result = _read_run(Path(run_dir))
    require_encoders(spec, cache, run_dir)
    _check_widths(run_dir, spec, cache)
    return spec, _load_model(Path(run_dir) / MODEL, spec, cache), result


def run_cache(run_dir: str | Path, cache: Cache) -> Cache:
    """The cache as a run sees it: with the media joined that it fuses.

    Raises:
        ValueError: the run is missing, unfinished or damaged.
        CacheError: the extraction of a medium is unfinished.
    """
    return seen_by(cache, _read_run(Path(run_dir))[0])


def _read_run(folder: Path) -> tuple[RunSpec, TrainResult]:
    """The spec and the result of a finished run."""
    if not (folder / RESULT).exists():
        raise ValueError(
            f"--run {folder}: no finished run there (result.json is missing). Run saffe train --out {folder}."
        )
    result = TrainResult.load(folder)
    try:
        content = read_json(folder / CONFIG)["run"]
        spec = made_of(RunSpec, content)
        if "validation_photos" not in content and result.validation_photos > spec.validation_photos:
            spec = replace(spec, validation_photos=0)  # an earlier release, which validated on all
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--run {folder}: config.json is damaged or of another version ({error}). Train again."
        ) from None
    return spec, result


def _check_widths(run_dir: str | Path, spec: RunSpec, cache: Cache) -> None:
    """
    Raises:
        ValueError: the run fuses other shapes than the cache holds.
        CacheError: the cache lacks one of the layers.
    """
    gallery, text, shape = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key], spec.shape
    photos: set[Any] = set(media_shapes(gallery, spec.gallery_layers))
    if not photos:
        widths = {layer: gallery.array(f"hidden_states/{layer}").spec.row_shape[-1] for layer in spec.gallery_layers}
        any_length = gallery.manifest.is_ragged and shape.head != "flatten"
        photos = {(shape.num_tokens if any_length else gallery.num_tokens(i), width) for i, width in widths.items()}
    for layer in spec.token_layers:
        text.array(f"hidden_states/{layer}")
    vector = text.array(text.manifest.vector).spec.row_shape
    found = (photos, len(spec.gallery_layers), text.manifest.hidden_size, vector)
    tokens: set[Any] = set(shape.media) or {(shape.num_tokens, shape.hidden_size)}
    expected = tokens, shape.num_layers, shape.text_hidden_size, (shape.text_size,)
    num_text_layers = {"none": 0, "paired": shape.num_layers}.get(shape.entry.blocks, 1)
    if found != expected or len(spec.text_layers) != num_text_layers:
        raise ValueError(
            f"--run {run_dir}: it fuses items' tokens {expected[0]} of {expected[1]} layers with texts' of width "
            f"{expected[2]} and vectors {expected[3]}; {cache.storage.root} holds {found[0]} of {found[1]}, {found[2]} "
            f"and {found[3]}. Give the cache that it was trained on, or train again."
        )


def keep_encoders(run_dir: Path, spec: RunSpec, cache: Cache) -> None:
    """Write what a run needs of its encoders without the cache: manifests without rows, how they were run, blocks."""
    described: dict[str, Any] = {}
    tensors: dict[str, np.ndarray] = {}
    of_gallery, of_text = _block_layers(spec)
    own = dict.fromkeys(spec.media.values() or [spec.gallery_key], of_gallery) | {spec.text_key: of_text}
    for key, layers in own.items():
        encoder, modality = cache.encoders[key], cache.encoders[key].manifest.modality
        past, blocks = encoder.manifest.extractions, {layer: encoder.block(layer) for layer in layers}
        described[key] = {
            "manifest": without_rows(encoder.manifest).to_json(),
            "extraction": _of_encoder([one["config"] for one in past], modality) if past else None,
            "blocks": {
                str(layer): {"encoding-type": weights_type("blocks/"), "spec": vars(block.spec)}
                for layer, block in blocks.items()
            },
        }
        for layer, block in blocks.items():
            tensors |= {
                f"{modality}/{layer}/{name}": np.ascontiguousarray(value, np.float32)
                for name, value in block.tensors.items()
            }
    if tensors:
        write_whole(run_dir / BLOCKS, save(tensors))
    write_json(run_dir / ENCODERS, described)


def keep_ridge(run_dir: Path, ridge: LinearMap) -> None:
    weight = np.ascontiguousarray(ridge.weight)  # safetensors ignores strides
    write_whole(run_dir / RIDGE, save({"weight": weight, "bias": ridge.bias, "strength": np.array(ridge.strength)}))


def kept_ridge(run_dir: Path) -> LinearMap | None:
    """The ridge regression of the run's training pairs; None if the run is older than this file.

    Raises:
        ValueError: the file is damaged.
    """
    path = run_dir / RIDGE
    if not path.exists():
        return None
    try:
        tensors = load(path.read_bytes())
        return LinearMap(tensors["weight"], tensors["bias"], float(tensors["strength"]))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: damaged ({error}). Train again.") from None


_OF_DATA = (
    "cache",
    "plan",
    "column",
    "splits",
    "max_items",
    "streaming",
    "device",
    "workers",
    "decode_in",
    "max_invalid",
    "changed",
)
"""Options of an extraction that say where inputs and encoders were, and not how an encoder was run."""


_ONLY_OF: Mapping[str, Modality] = {"views": "image", "prompt_name": "text"}
"""Options that an extraction without an encoder of this modality refuses."""


def _of_encoder(configs: Sequence[Mapping[str, Any]], modality: Modality) -> dict[str, Any]:
    """The options of the last extraction that tell how the encoder of a modality was run, and the names of all data."""
    kept = {name: value for name, value in configs[-1].items() if name not in _OF_DATA}
    data = dict.fromkeys(name_of_place(str(config["data"])) for config in configs)
    for name in ("encoder", "layers", "tokens", "revision"):
        kept[name] = {one: value for one, value in kept.get(name, {}).items() if one == modality}
    return {**kept, "data": ", ".join(data), "cache": ""}


def name_of_place(place: str) -> str:
    """A hub id, or the last part of a path: what may be told of where something was."""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.:@-]+", place) and place[0] not in ".~" and not Path(place).exists()
    return place if is_hub_id else Path(place).name


def kept_encoders(run_dir: str | Path) -> tuple[Cache, dict[str, Mapping[str, Any] | None]]:
    """A run's own encoders as a cache without rows, with the media joined that it fuses; and the options of each one's
    extraction, None where unknown.

    Raises:
        ValueError: the run has none, or they are damaged.
        CacheError: a manifest or a block is damaged.
    """
    folder = Path(run_dir)
    if not (folder / ENCODERS).exists():
        raise ValueError(
            f"--run {run_dir}: found no {ENCODERS}, expected a run that saffe train has finished. Give its folder, or "
            "train it again if an earlier release did."
        )
    described = read_json(folder / ENCODERS)
    encoders: dict[str, EncoderCache] = {}
    try:
        run = read_json(folder / CONFIG)["run"]
        usual = int(run["shape"]["num_tokens"])
        tensors = load((folder / BLOCKS).read_bytes()) if (folder / BLOCKS).exists() else {}
        for key, one in described.items():
            where = f"{folder / ENCODERS}: {key}"
            manifest = EncoderManifest.from_json(one["manifest"], where)
            blocks = {
                int(layer): _kept_block(attributes, f"{manifest.modality}/{layer}/", tensors, where)
                for layer, attributes in one["blocks"].items()
            }
            encoders[key] = HeldEncoder(manifest, blocks=blocks, usual_tokens=usual, where=str(folder))
        cache: Cache = HeldCache(TableBuilder(None, ()).build(), encoders, str(folder))
        if media := run.get("media"):
            cache = join_media(cache, media)
        past = {key: _own_options(one["extraction"], encoders[key].manifest.modality) for key, one in described.items()}
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"--run {run_dir}: {ENCODERS} or {BLOCKS} is damaged ({error}). Train again.") from None
    return cache, past


def _own_options(extraction: Mapping[str, Any] | None, modality: Modality) -> Mapping[str, Any] | None:
    """The options of an extraction without those that are for encoders of another modality."""
    if extraction is None:
        return None
    return {name: value for name, value in extraction.items() if _ONLY_OF.get(name, modality) == modality}


def _kept_block(
    attributes: Mapping[str, Any], prefix: str, tensors: Mapping[str, np.ndarray], where: str
) -> BlockWeights:
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    block = weights_from(attributes, own, where)
    assert isinstance(block, BlockWeights)
    return block


def weights_hash(run_dir: str | Path) -> str:
    """Hash of a run's best weights: equal hashes, equal models."""
    return hashlib.sha256((Path(run_dir) / MODEL).read_bytes()).hexdigest()[:16]


def load_permuted(run_dir: str | Path, spec: RunSpec, cache: Cache) -> Fusion | None:
    """The run's control, trained on permuted pairs; None if it has none."""
    path = Path(run_dir) / PERMUTED / MODEL
    return _load_model(path, spec, cache) if path.exists() else None


def _load_model(path: Path, spec: RunSpec, cache: Cache) -> Fusion:
    try:
        model = build_fusion(spec, cache)
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError, KeyError) as error:
        raise ValueError(f"{path}: not this run's weights ({error!r:.300}). Train again.") from None
    return model.eval()
