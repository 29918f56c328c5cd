"""Captions by a frozen language model that photo tokens join at one of its layers (DeepInsert), all from one cache.

config.json             the config, a hash over photos and texts
projector.safetensors   the trained weights, at the best epoch
training.json           losses of all epochs, steps' time; with it, nothing is trained again
captions.jsonl          a greedy caption of each photo, beside its own ones
caption.json, .txt      the result; written last, so its presence means that all is done
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saffe_cache.core.atomic_io import hold_folder, remove_partial_files, write_whole
from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import CacheError
from saffe_cache.core.options import require, require_keys, require_seed
from saffe_cache.core.outputs import is_begun, provenance, read_json, write_json
from saffe_cache.core.tensors import read_tensors, write_tensors
from saffe_cache.inputs.pairs import Pairs, content_fingerprint
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.studies.captioning.captions import CaptionSource, first_captions, project, split_photos
from saffe_cache.studies.captioning.fitting import Fit, FitOptions, fit_projector, new_projector
from saffe_cache.studies.captioning.generating import greedy_captions
from saffe_cache.studies.captioning.inserting import InsertedModel, Projector
from saffe_cache.studies.captioning.measuring import Measuring, chance_alarms, count_flops
from saffe_cache.studies.captioning.table import format_captions

logger = logging.getLogger(__name__)

_NOT_COMPARED = ("cache", "out", "device", "title")
"""Fields of the config in which two commands for one folder may differ."""
_NUM_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Train a projector that lets photos join a frozen causal language model at a layer, and report on its captions.

    The same command does nothing for a finished result, and begins a killed one again. Exits with status 3 where a
    control is not where it must be.
    """

    cache: str
    """A cache of captioned photos with a language model, as saffe-extract wrote it with --position-offset."""
    out: str
    """Folder of the result."""
    layer: int
    """The first layer of the language model that sees the photo; 0 puts the photo in front of the text."""
    grid: int = 4
    """Photo tokens: the class token (of a CNN the mean of all places), and the patches averaged over GRID x GRID
    fields."""
    image_layer: int | None = None
    """Hidden states of the photo. Default: the last in the cache."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder, as text=PART-OF-KEY, where the cache has several of a modality."""
    train_split: str = "train"
    """Split to train on; photos that stand in --split too are left out."""
    split: str = "dev"
    """Split to report on."""
    held_out: float = 0.1
    """Part of the training photos on which the best epoch is chosen."""
    report_photos: int = 1000
    """Photos of --split at most to report on: a random choice, the same for every --seed."""
    others: int = 9
    """Other photos' captions among which a photo's own is to be found."""
    epochs: int = 10
    """An epoch sees each photo once, with one of its captions."""
    batch_size: int = 64
    """Photos in a step."""
    learning_rate: float = 5e-3
    """The highest; it rises over the first tenth of the steps, and falls."""
    weight_decay: float = 0.01
    """Of AdamW."""
    max_tokens: int = 30
    """Of a greedy caption."""
    title: str | None = None
    """What the result is called. Default: the cache's name."""
    seed: int = 0
    """Of what is held out, starting weights and order."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda."""

    def __post_init__(self) -> None:
        for option in ("grid", "report_photos", "others", "epochs", "batch_size", "max_tokens"):
            require(getattr(self, option) > 0, option, getattr(self, option), "a number above 0")
        require(self.layer >= 0, "layer", self.layer, "0 or more")
        require(0 < self.held_out < 1, "held_out", self.held_out, "a fraction between 0 and 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(self.split != self.train_split, "split", self.split, "another than --train-split")
        require_keys("encoder", self.encoder, ("image", "text"))
        require_seed("seed", self.seed)


def caption(config: CaptionConfig) -> str:
    """Train, measure, and return the output folder.

    Raises:
        CacheError, ValueError: cache, layer and options do not go together; the folder holds another result.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    cache = open_cache(config.cache)
    photos, text = cache.encoder("image", config.encoder.get("image")), _language_model(cache, config)
    source = CaptionSource(
        *(cache, photos, text),
        image_layer=photos.layers[-1] if config.image_layer is None else config.image_layer,
        layer=config.layer,
        grid=config.grid,
        device=choose_device(config.device),
    )
    training, validation, reported = split_photos(
        *(cache, photos, text),
        train_split=config.train_split,
        split=config.split,
        held_out=config.held_out,
        seed=config.seed,
    )
    drawn = np.random.default_rng(0).permutation(len(reported))[: config.report_photos]
    reported = reported.take(np.sort(drawn))
    require(config.others < len(reported), "others", config.others, f"fewer than {len(reported)}, the photos reported")
    out = Path(config.out)
    with hold_folder(out):
        remove_partial_files(out)
        data = content_fingerprint(cache.table, "image", training, validation, reported)
        run = {"image": source.photos.key, "text": source.text.key, "image_layer": source.image_layer, "data": data}
        told = {"stage": "caption", "run": run, **provenance(config)}
        if not is_begun(out, told, {"run": dict, "config": CaptionConfig}, _NOT_COMPARED):
            write_json(out / "config.json", told)
        if (out / "caption.json").exists():
            logger.info("%s is finished already, nothing to do.", out)
            return str(out)
        blocks = [text.block(number) for number in range(text.manifest.num_layers)]
        model = InsertedModel(source.weights, blocks, config.layer).to(source.device)
        room = model.num_positions - source.num_photo_tokens - len(source.tokens.start)
        require(config.max_tokens <= room, "max_tokens", config.max_tokens, f"at most {room}: the model's positions")
        projector, trained = _trained(config, source, model, training, validation)
        result = _measured(config, source, model, projector, training, reported, trained)
        table = format_captions(result)
        write_whole(out / "caption.txt", f"{table}\n".encode())
        write_json(out / "caption.json", result)
    return str(out)


def read_table(out: str) -> str:
    """The result for people."""
    return (Path(out) / "caption.txt").read_text()


def exit_status(out: str) -> int:
    """0, or 3 where a control is not where it must be."""
    return 3 if read_json(Path(out) / "caption.json")["failures"] else 0


def _language_model(cache: Cache, config: CaptionConfig) -> EncoderCache:
    """
    Raises:
        CacheError: the cache holds none, or several to choose from; the layer is none of its.
    """
    asked = config.encoder.get("text")
    models = [key for key, one in cache.encoders.items() if one.manifest.is_language_model]
    chosen = [key for key in models if asked is None or asked in key]
    if len(chosen) != 1:
        raise CacheError(
            f"{config.cache}: {len(chosen)} language models{f' named {asked!r}' if asked else ''}; it holds "
            f"{', '.join(models) or 'none'}. Add one with saffe-extract --encoder text=gpt2, or choose one with "
            "--encoder text=PART-OF-ITS-KEY."
        )
    text = cache.encoder("text", chosen[0])
    require(
        config.layer < text.manifest.num_layers,
        *("layer", config.layer, f"0 to {text.manifest.num_layers - 1}, the model's layers"),
    )
    return text


def _trained(
    config: CaptionConfig, source: CaptionSource, model: InsertedModel, training: Pairs, validation: Pairs
) -> tuple[Projector, dict[str, Any]]:
    """The projector of the folder where it is trained already, and what is told of its training."""
    out = Path(config.out)
    if (out / "training.json").exists():
        projector = new_projector(source, model, training, config.seed)
        projector.load_state_dict(read_tensors(out / "projector.safetensors"))
        return projector.eval(), read_json(out / "training.json")
    options = FitOptions(
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        seed=config.seed,
    )
    fit = fit_projector(source, model, training, validation, options)
    write_tensors(out / "projector.safetensors", fit.projector.state_dict())
    told = _told(fit, training, validation)
    write_json(out / "training.json", told)
    return fit.projector, told


def _told(fit: Fit, training: Pairs, validation: Pairs) -> dict[str, Any]:
    return {
        "best_epoch": fit.best_epoch,
        "seconds_per_step": fit.seconds_per_step,
        "training_photos": len(training),
        "validation_photos": len(validation),
        "log": fit.log,
    }


def _measured(
    config: CaptionConfig,
    source: CaptionSource,
    model: InsertedModel,
    projector: Projector,
    training: Pairs,
    reported: Pairs,
    trained: Mapping[str, Any],
) -> dict[str, Any]:
    measuring = Measuring(source, model, projector, reported, config.seed)
    own = measuring.own_captions(config.others)
    said = _greedy(config, source, model, projector, reported)
    lengths = np.diff(source.text.offsets)[first_captions(training)]
    flops = count_flops(
        model,
        projector,
        batch=config.batch_size,
        tokens=int(np.median(lengths)) - 1,
        photo_tokens=source.num_photo_tokens,
    )
    return {
        "title": config.title or Path(config.cache).stem,
        "split": config.split,
        "failures": chance_alarms(own, config.others, len(reported)),
        "layer": config.layer,
        "num_layers": len(model.blocks),
        "photo_tokens": source.num_photo_tokens,
        "photos": len(reported),
        "captions": len(reported.texts.values),
        **measuring.losses(training),
        "own_caption": own,
        "chance": 1 / (config.others + 1),
        "cost": {
            "trainable_parameters": sum(parameter.numel() for parameter in projector.parameters()),
            "seconds_per_step": trained["seconds_per_step"],
            **flops,
        },
        "examples": said[:_NUM_EXAMPLES],
        "epochs": config.epochs,
        **{name: trained[name] for name in ("best_epoch", "training_photos", "validation_photos", "log")},
        **provenance(config),
    }


def _greedy(
    config: CaptionConfig, source: CaptionSource, model: InsertedModel, projector: Projector, pairs: Pairs
) -> list[dict[str, Any]]:
    """Write captions.jsonl, and return what it holds."""
    texts = source.cache.table.inputs["text"].texts
    assert texts is not None
    found: list[dict[str, Any]] = []
    for start in range(0, len(pairs), config.batch_size):
        numbers = range(start, min(start + config.batch_size, len(pairs)))
        with torch.inference_mode():
            projected = project(source, projector, pairs.rows[numbers.start : numbers.stop])
        said = greedy_captions(model, projected, source.tokens.start, config.max_tokens)
        found += [
            {
                "id": pairs.ids[number],
                "caption": source.tokens.decode(ids),
                "own": [texts[row] for row in pairs.texts[number]],
            }
            for number, ids in zip(numbers, said, strict=True)
        ]
    lines = "".join(f"{json.dumps(one)}\n" for one in found)
    write_whole(Path(config.out) / "captions.jsonl", lines.encode())
    return found
