"""Train the FAM alone, straight from the cache."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from saffe_cache.checkpoints import resume
from saffe_cache.features import MODALITIES, CacheError, Modality
from saffe_cache.fitting import FitOptions, TrainingData, fit, start
from saffe_cache.fusion.fam import FamShape, FusionAlignModule, FusionName, HeadName
from saffe_cache.options import require, require_keys
from saffe_cache.pairs import VALIDATION_SPLITS, PairKind, gallery_modality, pair_kind
from saffe_cache.runs import RunSpec, choose_device, data_fingerprint, provenance, read_json, training_pairs, write_json
from saffe_cache.store.reader import Cache, EncoderCache, open_cache

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a FusionAlign Module from a cache.

    The same command resumes a killed run where it was, and does nothing for a finished one.
    """

    cache: str
    """The cache, as saffe-extract wrote it."""
    out: str
    """Folder of the run."""
    fusion: FusionName = "linear"
    """linear: pool the cached states. decoder: send them through the encoder's next block first, with a gated
    cross-attention; in this release it is trained with null text alone."""
    head: HeadName = "attention"
    """How tokens become a vector. attention: pooled by learned queries. mean: their mean. flatten: all tokens into one
    linear map, as in the paper, for reproduction."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers to train on, as image=11,12 (and text=5 for the decoder). Default: all that the fusion can use."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder, as image=PART-OF-KEY, where the cache has several of a modality."""
    pairs: Literal["auto", "captions", "classes"] = "auto"
    """What describes an item: its captions, or its classes' names. auto: captions where there are any."""
    train_split: str = "train"
    """Split to train on."""
    validation: str = "auto"
    """Where the best epoch is chosen: a split's name, or heldout for a part of the train split by photo.
    auto: dev, val, valid or validation where there is one, else heldout."""
    validation_fraction: float = 0.1
    """Part of the train split that heldout takes, 0 to 1."""
    epochs: int = 20
    """Passes over the photos."""
    batch_size: int = 512
    """Photos in a batch, each with all its texts; smaller where there are fewer than 8 such batches."""
    learning_rate: float = 2e-3
    """Peak of AdamW's learning rate."""
    weight_decay: float = 0.05
    """AdamW's, on matrices."""
    warmup: float = 0.1
    """Part of the steps with a rising learning rate; a cosine to 2 % follows."""
    dropout: float = 0.5
    """In the head and the query map, 0 to 1."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    patience: int = 8
    """Stop after so many epochs without a better validation score."""
    seed: int = 0
    """Seed of the starting weights, the order of photos, dropout and what is held out."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda."""
    checkpoint_seconds: float = 60.0
    """Time between states that a killed run resumes from."""
    tensorboard: bool = True
    """Also log to TensorBoard, where it is installed."""

    def __post_init__(self) -> None:
        require_keys("layers", self.layers, MODALITIES)
        require_keys("encoder", self.encoder, MODALITIES)
        require(self.fusion == "decoder" or "text" not in self.layers, "layers", "text=…", "no text: linear takes none")
        for name, layers in self.layers.items():
            require(len(set(layers)) == len(layers), "layers", f"{name}={layers}", "each layer once")
        require(self.validation != self.train_split, "validation", self.validation, "another split, or heldout")
        for option in ("epochs", "batch_size", "learning_rate", "clip", "patience"):
            require(getattr(self, option) > 0, option, getattr(self, option), "a number above 0")
        for option in ("validation_fraction", "warmup", "dropout"):
            require(0 <= getattr(self, option) < 1, option, getattr(self, option), "a fraction from 0 to below 1")
        for option in ("weight_decay", "seed", "checkpoint_seconds"):
            require(getattr(self, option) >= 0, option, getattr(self, option), "0 or more")


def train(config: TrainConfig) -> str:
    """Train, and return the run's folder.

    Raises:
        CacheError: the cache lacks what the fusion needs.
        ValueError: the options do not fit the cache, or the folder holds another run.
    """
    out = Path(config.out)
    cache = open_cache(config.cache)
    spec = resolve_run(config, cache)
    train_pairs, validation_pairs, num_shared = training_pairs(spec, cache)
    spec = replace(spec, data=data_fingerprint(cache, spec, train_pairs, validation_pairs))
    _check_folder(out, config, spec)
    if (out / "result.json").exists():
        logger.info("%s is finished already, nothing to do.", out)
        return config.out
    options = FitOptions(
        **{one.name: getattr(config, one.name) for one in fields(FitOptions) if one.name != "device"},
        device=choose_device(config.device),
    )
    logger.info(
        "%s fusion, %s head, on %s: %s of %s%s, described by %s (%s).",
        *(spec.shape.fusion, spec.shape.head, options.device, _names(spec.gallery_layers), spec.gallery_key),
        *(f" and {_names(spec.text_layers)} of the text" if spec.text_layers else "", spec.pairs, spec.text_key),
    )
    logger.info(
        "%d items to train on, %d to validate on (%s); left out %d unusable ones and %d that are in other splits too.",
        *(len(train_pairs), len(validation_pairs), spec.validation, train_pairs.num_unusable, num_shared),
    )
    data = TrainingData(spec, cache, train_pairs, validation_pairs, options)
    state = start(options, spec, cache, data)
    write_json(out / "config.json", {"stage": "train", "run": asdict(spec), **provenance(config)})
    resume(out, state)
    fit(options, state, data, out)
    write_json(
        out / "result.json",
        {
            "best_epoch": state.best_epoch,
            "best_validation_score": state.best_score,
            "validation_score": "mrr" if spec.pairs == "captions" else "map",
            "trainable_parameters": _num_trainable(state.model),
            "train_photos": len(train_pairs),
            "validation_photos": len(validation_pairs),
            "unusable_items": train_pairs.num_unusable,
            "photos_shared_with_other_splits": num_shared,
            "steps": state.step,
            "seconds": round(state.seconds, 1),
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        },
    )
    (out / "state.safetensors").unlink(missing_ok=True)
    logger.info(
        "best validation %s %.2f %% after epoch %d of %d; %.2f M trainable parameters.",
        "MRR" if spec.pairs == "captions" else "mAP",
        100 * state.best_score,
        *(state.best_epoch, config.epochs, _num_trainable(state.model) / 1e6),
    )
    return config.out


def resolve_run(config: TrainConfig, cache: Cache) -> RunSpec:
    """Fill in what the config leaves to the cache: encoders, layers, kind of pairs, validation.

    Raises:
        CacheError, ValueError: the cache lacks what is asked for.
    """
    modality = gallery_modality(cache)
    gallery = cache.encoder(modality, config.encoder.get(modality))
    text = cache.encoder("text", config.encoder.get("text"))
    layers = _choose_layers(config, gallery, modality)
    text_layers: tuple[int, ...] = ()
    if config.fusion == "decoder":
        text_layers = _choose_layers(config, text, "text")[-len(layers) :]
        layers = layers[-len(text_layers) :]
    validation = config.validation
    if validation == "auto":
        present = set(cache.table.splits)
        validation = next((name for name in VALIDATION_SPLITS if name in present), "heldout")
    kind: PairKind = pair_kind(cache.table) if config.pairs == "auto" else config.pairs
    widths = gallery.array(f"hidden_states/{layers[0]}").row_shape
    return RunSpec(
        gallery_key=gallery.key,
        text_key=text.key,
        gallery_layers=layers,
        text_layers=text_layers,
        pairs=kind,
        train_split=config.train_split,
        validation=validation,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        shape=FamShape(
            fusion=config.fusion,
            head=config.head,
            num_layers=len(layers),
            hidden_size=widths[-1],
            num_tokens=widths[0],
            text_size=text.array(text.manifest.vector).row_shape[0],
            dropout=config.dropout,
        ),
    )


def _choose_layers(config: TrainConfig, encoder: EncoderCache, modality: Modality) -> tuple[int, ...]:
    usable = encoder.block_layers if config.fusion == "decoder" else encoder.manifest.layers
    chosen = config.layers.get(modality, tuple(usable))
    wrong = [layer for layer in chosen if layer not in usable]
    if wrong or not chosen:
        why = "" if encoder.manifest.layers == usable else " (a decoder needs the block behind a layer)"
        raise CacheError(
            f"{encoder.key}: --fusion {config.fusion} can use layers {usable}{why}, asked for {list(chosen)}. "
            f"Add layers with saffe-extract --layers {modality}=…."
        )
    return tuple(chosen)


def _check_folder(out: Path, config: TrainConfig, spec: RunSpec) -> None:
    """Refuse to mix two runs in one folder."""
    if not (out / "config.json").exists():
        return
    old = read_json(out / "config.json")
    new = json.loads(json.dumps({"run": asdict(spec), "config": asdict(config)}))
    ignored = {"device", "checkpoint_seconds", "tensorboard", "cache", "out"}
    different = [
        f"{name}: {old.get(part, {}).get(name)!r} there, {value!r} now"
        for part in ("run", "config")
        for name, value in new[part].items()
        if name not in ignored and old.get(part, {}).get(name) != value
    ]
    if different:
        raise ValueError(f"--out {out} holds another run ({'; '.join(different)}). Choose another --out, or delete it.")


def _names(layers: tuple[int, ...]) -> str:
    return "hidden_states " + ", ".join(map(str, layers))


def _num_trainable(model: FusionAlignModule) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
