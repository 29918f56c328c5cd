"""Captions by a frozen language model that photo tokens join at one of its layers (DeepInsert), from one cache.

Besides what every study writes (saffe_cache/studies/harness.py), the folder holds projector.safetensors, the trained
weights at the best epoch, and captions.jsonl, a greedy caption of each photo with those that people wrote. Cells are
the training, the measurements and the captions.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.controls import failed
from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import CacheError
from saffe_cache.core.options import require
from saffe_cache.core.tensors import read_tensors, write_tensors
from saffe_cache.inputs.pairs import Pairs, content_fingerprint, select_pairs, split_pairs
from saffe_cache.inputs.spec import SplitOptions
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.studies.captioning.captions import (
    CaptionSource,
    first_captions,
    fit_projector,
    new_projector,
    project,
)
from saffe_cache.studies.captioning.config import CaptionConfig
from saffe_cache.studies.captioning.inserting import InsertedModel, Projector, greedy_captions
from saffe_cache.studies.captioning.measuring import Measuring, count_cost, judge_controls
from saffe_cache.studies.captioning.result import CaptionResult, Example, Examples, Measurements, Training
from saffe_cache.studies.harness import Study, run_study

_NUM_EXAMPLES = 5


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
    room = source.num_positions - source.num_photo_tokens - len(source.tokens.start)
    require(config.max_tokens <= room, "max_tokens", config.max_tokens, f"at most {room}: the model's positions")
    reported = select_pairs(cache.table, photos, text, config.split, "captions")
    splits = SplitOptions(train_split=config.train_split, validation="heldout", validation_fraction=config.held_out)
    training, validation, _ = split_pairs(cache, (photos, text), "captions", splits, config.seed, reported=reported)
    drawn = np.random.default_rng(0).permutation(len(reported))[: config.report_photos]
    reported = reported.take(np.sort(drawn))
    require(config.others < len(reported), "others", config.others, f"fewer than {len(reported)}, the photos reported")
    data = content_fingerprint(cache.table, "image", training, validation, reported)
    resolved = {"image": photos.key, "text": text.key, "image_layer": source.image_layer, "data": data}
    parts = _Parts(training, validation, reported)
    return run_study("caption", config, resolved, partial(_measure, config, source, parts))


class _Parts(NamedTuple):
    """Photos with their captions; no photo is in two parts."""

    training: Pairs
    validation: Pairs
    reported: Pairs


def _language_model(cache: Cache, config: CaptionConfig) -> EncoderCache:
    """
    Raises:
        CacheError: the cache holds none, or several to choose from.
        ValueError: it has no such layer.
    """
    wanted = config.encoder.get("text")
    models = [key for key, one in cache.encoders.items() if one.manifest.is_language_model]
    chosen = [key for key in models if wanted is None or wanted in key]
    if len(chosen) != 1:
        raise CacheError(
            f"{config.cache}: {len(chosen)} language models{f' named {wanted!r}' if wanted else ''}; it holds "
            f"{', '.join(models) or 'none'}. Add one with saffe extract --encoder text=gpt2, or choose one with "
            "--encoder text=PART-OF-ITS-KEY."
        )
    text = cache.encoder("text", chosen[0])
    require(
        config.layer < text.manifest.num_layers,
        *("layer", config.layer, f"0 to {text.manifest.num_layers - 1}, the model's layers"),
    )
    return text


def _measure(config: CaptionConfig, source: CaptionSource, parts: _Parts, study: Study) -> CaptionResult:
    blocks = [source.text.block(number) for number in range(source.text.manifest.num_layers)]
    model = InsertedModel(source.weights, blocks, config.layer).to(source.device)
    weights = study.out / "projector.safetensors"
    training = study.cell(Training, "training", partial(_train, config, source, model, parts, weights))
    projector = new_projector(source, model, parts.training, config.seed)
    projector.load_state_dict(read_tensors(weights))
    projector.eval()

    def measurements() -> Measurements:
        measuring = Measuring(source, model, projector, parts.reported, config.seed)
        return measuring.measure(parts.training, config.others)

    measured = study.cell(Measurements, "measurements", measurements)
    examples = study.cell(
        Examples, "captions", partial(_write_captions, config, source, model, projector, parts.reported)
    )
    verdicts = judge_controls(measured.own_caption, config.others, len(parts.reported))
    lengths = np.diff(source.text.offsets)[first_captions(parts.training)]
    return CaptionResult(
        title=config.title or Path(config.cache).stem,
        split=config.split,
        failures=tuple(failed(verdicts)),
        layer=config.layer,
        num_layers=len(blocks),
        photo_tokens=source.num_photo_tokens,
        photos=len(parts.reported),
        captions=len(parts.reported.texts.values),
        epochs=config.epochs,
        chance=1 / (config.others + 1),
        measured=measured,
        verdicts=tuple(verdicts),
        cost=count_cost(
            model,
            projector,
            batch=config.batch_size,
            tokens=int(np.median(lengths)) - 1,
            photo_tokens=source.num_photo_tokens,
        ),
        training=training,
        examples=examples.examples,
        seconds=study.seconds,
    )


def _train(config: CaptionConfig, source: CaptionSource, model: InsertedModel, parts: _Parts, path: Path) -> Training:
    """Train a projector, and write it to `path`."""
    projector, training = fit_projector(source, model, parts.training, parts.validation, config)
    write_tensors(path, projector.state_dict())
    return training


def _write_captions(
    config: CaptionConfig, source: CaptionSource, model: InsertedModel, projector: Projector, pairs: Pairs
) -> Examples:
    """Write captions.jsonl, and return the first captions."""
    texts = source.cache.table.inputs["text"].texts
    assert texts is not None
    found: list[Example] = []
    for start in range(0, len(pairs), config.batch_size):
        numbers = range(start, min(start + config.batch_size, len(pairs)))
        with torch.inference_mode():
            projected = project(source, projector, pairs.rows[numbers.start : numbers.stop])
        generated = greedy_captions(model, projected, source.tokens.start, config.max_tokens)
        found += [
            Example(
                id=pairs.ids[number],
                caption=source.tokens.decode(ids),
                own=tuple(texts[row] for row in pairs.texts[number]),
            )
            for number, ids in zip(numbers, generated, strict=True)
        ]
    lines = "".join(f"{json.dumps(asdict(one))}\n" for one in found)
    write_whole(Path(config.out) / "captions.jsonl", lines.encode())
    return Examples(examples=tuple(found[:_NUM_EXAMPLES]))
