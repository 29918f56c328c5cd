"""Captions by a frozen language model that photo tokens join at one of its layers (DeepInsert), from one cache.

Besides what every study writes (saffe_cache/studies/harness.py), the folder holds projector.safetensors, the trained
weights at the best epoch, and captions.jsonl, a greedy caption of each photo with those that people wrote. Cells are
the training, the measurements and the captions.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import CacheError
from saffe_cache.core.options import require
from saffe_cache.core.tensors import read_tensors, write_tensors
from saffe_cache.inputs.pairs import Pairs, content_fingerprint, select_pairs, split_pairs
from saffe_cache.inputs.spec import SplitOptions
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.studies.captioning.captions import CaptionSource, first_captions, fit_projector, new_projector
from saffe_cache.studies.captioning.config import CaptionConfig
from saffe_cache.studies.captioning.inserting import Projector, greedy_captions
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
    captioning = _Captioning(config, source, training, validation, reported)
    return run_study("caption", config, resolved, captioning.measure)


@dataclass(frozen=True)
class _Captioning:
    """All that one command measures; no photo is in two of the parts."""

    config: CaptionConfig
    source: CaptionSource
    training: Pairs
    validation: Pairs
    reported: Pairs

    def measure(self, study: Study) -> CaptionResult:
        config, source, num_photos = self.config, self.source, len(self.reported)
        weights = study.out / "projector.safetensors"
        training = study.cell(Training, "training", partial(self._train, weights))
        projector = new_projector(source, self.training, config.seed)
        projector.load_state_dict(read_tensors(weights))
        projector.eval()

        def measurements() -> Measurements:
            return Measuring(source, projector, self.reported, config.seed).measure(self.training, config.others)

        measured = study.cell(Measurements, "measurements", measurements)
        examples = study.cell(Examples, "captions", partial(self._write_captions, projector, study.out))
        verdicts = judge_controls(measured.own_caption, config.others, num_photos)
        length = int(np.median(np.diff(source.text.offsets)[first_captions(self.training)])) - 1
        return CaptionResult(
            layer=config.layer,
            num_layers=source.text.manifest.num_layers,
            photo_tokens=source.num_photo_tokens,
            photos=num_photos,
            captions=len(self.reported.texts.values),
            epochs=config.epochs,
            chance=1 / (config.others + 1),
            measured=measured,
            verdicts=tuple(verdicts),
            cost=count_cost(source.model, projector, config.batch_size, length, source.num_photo_tokens),
            training=training,
            examples=examples.examples,
            **study.common_fields(config, verdicts),
        )

    def _train(self, path: Path) -> Training:
        """Train a projector, and write it to `path`."""
        projector, training = fit_projector(self.source, self.training, self.validation, self.config)
        write_tensors(path, projector.state_dict())
        return training

    def _write_captions(self, projector: Projector, out: Path) -> Examples:
        """Write captions.jsonl, and return the first captions."""
        source, pairs, size = self.source, self.reported, self.config.batch_size
        texts = source.cache.table.inputs["text"].texts
        assert texts is not None
        captions: list[str] = []
        for start in range(0, len(pairs), size):
            with torch.inference_mode():
                projected = projector(source.photo_tokens(pairs.rows[start : start + size]))
            generated = greedy_captions(source.model, projected, source.tokens.start, self.config.max_tokens)
            captions += map(source.tokens.decode, generated)
        found = [
            Example(id=name, caption=caption, own=tuple(texts[row] for row in own))
            for name, caption, own in zip(pairs.ids, captions, pairs.texts, strict=True)
        ]
        write_whole(out / "captions.jsonl", "".join(f"{json.dumps(asdict(one))}\n" for one in found).encode())
        return Examples(examples=tuple(found[:_NUM_EXAMPLES]))


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
