"""A run's folder: what was trained, on what, and the weights. safetensors and JSON; nothing is unpickled.

config.json           the stage's config, the resolved run (encoders' keys, layers, shape), versions
model.safetensors     the best weights by validation
permuted/             the control that was trained on permuted pairs: its weights and log
log.jsonl             one line a validation
result.json           the outcome; written last, so its presence means that the run is complete
state.safetensors     what a killed run resumes from
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
import zarr
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from saffe_cache import __version__
from saffe_cache.durable import write_whole
from saffe_cache.fields import made_of
from saffe_cache.fusion.base import Blocks, Fusion
from saffe_cache.fusion.family import FUSIONS
from saffe_cache.fusion.shape import FamShape
from saffe_cache.pairs import PairKind, Pairs, content_fingerprint, hold_out, keep_part, select_pairs
from saffe_cache.store.reader import Cache

GalleryText = Literal["null", "first_caption", "matched"]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that evaluation needs to know of a run."""

    gallery_key: str
    text_key: str
    gallery_layers: tuple[int, ...]
    text_layers: tuple[int, ...]
    """Empty where text does not enter the fusion."""
    pairs: PairKind
    train_split: str
    validation: str
    """The split that the best epoch was chosen on, or "heldout" for a part of the train split."""
    validation_fraction: float
    seed: int
    """Of the order of photos and of what is held out."""
    shape: FamShape
    gallery_text: GalleryText
    """What lies beside a photo in training."""
    trains_pairs: bool = False
    """Whether photos are fused with several texts in training."""
    pairs_alone: bool = False
    """Whether that is all that is trained, so that a gallery with null text means nothing."""
    sees_null: bool = True
    """Whether the null text lies beside photos in training."""
    train_fraction: float = 1.0
    """Part of the photos that are left to train on."""
    shuffled_shards: int | None = None
    """Photos of so many shards are shuffled together in a streamed training; None for all photos."""
    data: str = ""
    """Hash over the photos and texts that the run trains on and is validated on."""

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> RunSpec:
        """
        Raises:
            TypeError, ValueError: a field is missing, unknown or of another kind.
        """
        spec = made_of(RunSpec, content)
        if spec.shape.fusion not in FUSIONS:
            raise ValueError(f"fusion: {spec.shape.fusion!r:.60}, expected {' or '.join(FUSIONS)}")
        return spec


def build_fusion(spec: RunSpec, cache: Cache) -> Fusion:
    """A fusion with its starting weights, and the cached blocks of both encoders that it runs or begins as."""
    kind, count = FUSIONS[spec.shape.fusion], spec.shape.num_blocks
    gallery: Sequence[int] = ()
    text: Sequence[int] = ()
    if kind.blocks == "paired":
        gallery, text = spec.gallery_layers, spec.text_layers
    elif kind.blocks != "none":
        text = range(spec.text_layers[0], spec.text_layers[0] + count)
        if kind.blocks == "both":
            gallery = range(spec.gallery_layers[0], spec.gallery_layers[0] + count)
    photos, texts = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    blocks = Blocks([photos.block(layer) for layer in gallery], [texts.block(layer) for layer in text])
    return kind.make(spec.shape, blocks)


def load_run(run_dir: str | Path, cache: Cache) -> tuple[RunSpec, Fusion, dict[str, Any]]:
    """A finished run: its spec, its best model in evaluation mode, and its result.

    Raises:
        ValueError: the run is absent, unfinished or damaged, or was trained on another cache.
        CacheError: the cache lacks a layer that it was trained on.
    """
    folder = Path(run_dir)
    if not (folder / "result.json").exists():
        raise ValueError(
            f"--run {run_dir}: no finished run there (result.json is missing). Run saffe-train-fam --out {run_dir}."
        )
    try:
        spec = RunSpec.from_json(read_json(folder / "config.json")["run"])
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
    result = read_json(folder / "result.json")
    lacking = [name for name in _COSTS if type(result.get(name)) not in (int, float)]
    if lacking:
        raise ValueError(f"{folder / 'result.json'}: it lacks {lacking[0]}. Train again.")
    return spec, _load_model(folder / "model.safetensors", spec, cache), result


_COSTS = ("trainable_parameters", "seconds", "peak_memory_mb")
"""Of a run's result, for the report."""


def _check_widths(run_dir: str | Path, spec: RunSpec, cache: Cache) -> None:
    """
    Raises:
        ValueError: what the run fuses has another shape than what the cache holds.
        CacheError: the cache lacks one of the layers.
    """
    gallery, text, shape = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key], spec.shape
    photos = {gallery.array(f"hidden_states/{layer}").row_shape for layer in spec.gallery_layers}
    for layer in spec.text_layers:
        text.array(f"hidden_states/{layer}")
    found = (photos, len(spec.gallery_layers), text.manifest.hidden_size, text.array(text.manifest.vector).row_shape)
    expected = (
        {(shape.num_tokens, shape.hidden_size)},
        shape.num_layers,
        shape.text_hidden_size,
        (shape.text_size,),
    )
    num_text_layers = {"none": 0, "paired": shape.num_layers}.get(FUSIONS[shape.fusion].blocks, 1)
    if found != expected or len(spec.text_layers) != num_text_layers:
        raise ValueError(
            f"--run {run_dir}: it fuses photos' tokens {expected[0]} of {expected[1]} layers with texts' of width "
            f"{expected[2]} and vectors {expected[3]}; {cache.storage.root} holds {found[0]} of {found[1]}, {found[2]} "
            f"and {found[3]}. Give the cache that it was trained on, or train again."
        )


def load_permuted(run_dir: str | Path, spec: RunSpec, cache: Cache) -> Fusion | None:
    """The run's control, trained on permuted pairs; None where it was trained without one."""
    path = Path(run_dir) / "permuted" / "model.safetensors"
    return _load_model(path, spec, cache) if path.exists() else None


def _load_model(path: Path, spec: RunSpec, cache: Cache) -> Fusion:
    try:
        model = build_fusion(spec, cache)
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not this run's weights ({error}). Train again.") from None
    return model.eval()


def training_pairs(spec: RunSpec, cache: Cache) -> tuple[Pairs, Pairs, int]:
    """The pairs that a run trains on, those that it is validated on, and the number of photos shared by splits.

    A photo that stands in another split too, by content, is not trained on.
    """
    gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    beside = spec.gallery_text == "first_caption"
    pairs = select_pairs(cache.table, gallery, text, spec.train_split, spec.pairs, first_beside=beside)
    rows = cache.table.rows[gallery.manifest.modality]
    elsewhere = rows[np.array(cache.table.splits) != spec.train_split]
    shared = np.isin(pairs.rows, elsewhere)
    if shared.all():
        raise ValueError(
            f"--train-split {spec.train_split}: all of its {len(pairs)} photos stand in other splits too. "
            "Keep a photo in one split."
        )
    pairs = pairs.take(np.flatnonzero(~shared))
    hashes = cache.table.inputs[gallery.manifest.modality].content_hash
    if spec.validation == "heldout":
        pairs, validation = hold_out(pairs, spec.validation_fraction, spec.seed, hashes)
    else:
        validation = select_pairs(cache.table, gallery, text, spec.validation, spec.pairs, first_beside=beside)
    return keep_part(pairs, spec.train_fraction, spec.seed, hashes), validation, int(shared.sum())


def data_fingerprint(cache: Cache, spec: RunSpec, *parts: Pairs) -> str:
    """Hash over the content of pairs that a run sees."""
    return content_fingerprint(cache.table, cache.encoders[spec.gallery_key].manifest.modality, *parts)


def same_training_pairs(spec: RunSpec, cache: Cache, run_dir: str | Path) -> tuple[Pairs, Pairs]:
    """The pairs that a run was trained on and validated on, from the cache that it was trained on.

    Raises:
        ValueError: the cache holds other data than the run has seen: it is another one, or has grown.
    """
    training, validation, _ = training_pairs(spec, cache)
    if data_fingerprint(cache, spec, training, validation) != spec.data:
        raise ValueError(
            f"--run {run_dir}: it was trained on other photos or texts than {cache.storage.root} holds now for "
            f"split {spec.train_split!r}: what it has seen is unknown. Give the cache of its training, or train again."
        )
    return training, validation


def choose_device(device: str) -> str:
    """ "auto" takes a GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: torch cannot use it ({str(error).splitlines()[0]}). Try auto.") from None
    return device


def num_cores() -> int:
    """Of the processor: those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def provenance(config: Any) -> dict[str, Any]:
    """The config as given and what it ran with."""
    return {
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "versions": {
            "saffe_cache": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "zarr": zarr.__version__,
        },
        "threads": torch.get_num_threads(),
    }


def is_begun(out: Path, new: Mapping[str, Any], kinds: Mapping[str, type], ignored: Collection[str] = ()) -> bool:
    """Whether a folder holds the beginning of a result already; two results are not mixed in one.

    Args:
        out: the folder.
        new: what its config.json is to hold.
        kinds: the parts of that which are compared, and of what dataclass each is. A field that the folder does not
            know yet has its default.
        ignored: fields that may differ.

    Raises:
        ValueError: it holds another one.
    """
    path = out / "config.json"
    if not path.exists():
        return False
    old, asked = read_json(path), json.loads(json.dumps(new))
    different = []
    for part, kind in kinds.items():
        before = _with_defaults(kind, old.get(part, {}))
        different += [
            f"{name}: {before.get(name)!r} there, {value!r} now"
            for name, value in asked[part].items()
            if name not in ignored and before.get(name) != value
        ]
    if different:
        raise ValueError(
            f"--out {out} holds another result ({'; '.join(different)}). Choose another --out, or delete it."
        )
    return True


def _with_defaults(kind: type, content: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return json.loads(json.dumps(asdict(made_of(kind, content))))  # type: ignore[no-any-return]
    except (TypeError, ValueError):  # of another version: what is there is compared as it is
        return content


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=True) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(contiguous, dict(metadata) if metadata else None))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """
    Raises:
        ValueError: not a safetensors file.
    """
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not readable as safetensors ({error}). Run the stage that writes it again."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}). Run the stage that writes it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object. Run the stage that writes it again.")
    return content
