"""The folder of a run: options, data and weights. safetensors and JSON; nothing is unpickled.

config.json           the config, the resolved run (encoders' keys, layers, shape), versions
model.safetensors     the best weights by validation
permuted/             the control that was trained on permuted pairs: its weights and log
log.jsonl             one line for each validation
result.json           the result; written last, so its presence means that the run is complete
state.safetensors     the checkpoint that an interrupted run resumes from
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from saffe_cache.core.json_schema import made_of
from saffe_cache.core.outputs import CONFIG, RESULT, read_json
from saffe_cache.fusion.base import Blocks, Fusion
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.store.reader import Cache
from saffe_cache.training.result import PERMUTED, TrainResult


def build_fusion(spec: RunSpec, cache: Cache) -> Fusion:
    """A fusion with its starting weights and the cached encoder blocks that it runs or is initialised from."""
    entry, count = spec.shape.entry, spec.shape.num_blocks
    gallery: Sequence[int] = ()
    text: Sequence[int] = ()
    if entry.blocks == "paired":
        gallery, text = spec.gallery_layers, spec.text_layers
    elif entry.blocks != "none":
        text = range(spec.text_layers[0], spec.text_layers[0] + count)
        if entry.blocks == "both":
            gallery = range(spec.gallery_layers[0], spec.gallery_layers[0] + count)
    photos, texts = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    blocks = Blocks([photos.block(layer) for layer in gallery], [texts.block(layer) for layer in text])
    fusion: Fusion = entry.make(spec.shape, blocks)
    return fusion


def load_run(run_dir: str | Path, cache: Cache) -> tuple[RunSpec, Fusion, TrainResult]:
    """A finished run: its spec, its best model in evaluation mode, and its result.

    Raises:
        ValueError: the run is missing, unfinished or damaged, or was trained on another cache.
        CacheError: the cache lacks a layer that it was trained on.
    """
    folder = Path(run_dir)
    if not (folder / RESULT).exists():
        raise ValueError(
            f"--run {run_dir}: no finished run there (result.json is missing). Run saffe train --out {run_dir}."
        )
    try:
        spec = made_of(RunSpec, read_json(folder / CONFIG)["run"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--run {run_dir}: config.json is damaged or of another version ({error}). Train again."
        ) from None
    missing = [key for key in (spec.gallery_key, spec.text_key) if key not in cache.encoders]
    if missing:
        raise ValueError(
            f"--run {run_dir}: it was trained on {missing[0]}, which {cache.storage.root} does not hold "
            f"({', '.join(cache.encoders) or 'no encoder'}). Give the cache that it was trained on."
        )
    _check_widths(run_dir, spec, cache)
    result = TrainResult.load(folder)
    return spec, _load_model(folder / "model.safetensors", spec, cache), result


def _check_widths(run_dir: str | Path, spec: RunSpec, cache: Cache) -> None:
    """
    Raises:
        ValueError: the run fuses other shapes than the cache holds.
        CacheError: the cache lacks one of the layers.
    """
    gallery, text, shape = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key], spec.shape
    widths = {layer: gallery.array(f"hidden_states/{layer}").spec.row_shape[-1] for layer in spec.gallery_layers}
    any_length = gallery.manifest.is_ragged and shape.head != "flatten"
    photos = {(shape.num_tokens if any_length else gallery.num_tokens(i), width) for i, width in widths.items()}
    for layer in spec.text_layers:
        text.array(f"hidden_states/{layer}")
    vector = text.array(text.manifest.vector).spec.row_shape
    found = (photos, len(spec.gallery_layers), text.manifest.hidden_size, vector)
    tokens = {(shape.num_tokens, shape.hidden_size)}
    expected = tokens, shape.num_layers, shape.text_hidden_size, (shape.text_size,)
    num_text_layers = {"none": 0, "paired": shape.num_layers}.get(shape.entry.blocks, 1)
    if found != expected or len(spec.text_layers) != num_text_layers:
        raise ValueError(
            f"--run {run_dir}: it fuses photos' tokens {expected[0]} of {expected[1]} layers with texts' of width "
            f"{expected[2]} and vectors {expected[3]}; {cache.storage.root} holds {found[0]} of {found[1]}, {found[2]} "
            f"and {found[3]}. Give the cache that it was trained on, or train again."
        )


def load_permuted(run_dir: str | Path, spec: RunSpec, cache: Cache) -> Fusion | None:
    """The run's control, trained on permuted pairs; None if it has none."""
    path = Path(run_dir) / PERMUTED / "model.safetensors"
    return _load_model(path, spec, cache) if path.exists() else None


def _load_model(path: Path, spec: RunSpec, cache: Cache) -> Fusion:
    try:
        model = build_fusion(spec, cache)
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not this run's weights ({error}). Train again.") from None
    return model.eval()
