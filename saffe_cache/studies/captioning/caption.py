"""Captions by a frozen language model that photo tokens join at one of its layers (DeepInsert), from one cache.

Besides what every study writes (saffe_cache/studies/harness.py), the folder holds projector.safetensors, the trained
weights at the best epoch, and captions.jsonl, a greedy caption of each photo with those that people wrote. Cells are
the training, the measurements, the captions and their scores. `result.SYSTEMS` defines what each measured system sees,
`result.CAPTIONS` whose captions are scored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.controls import Control
from saffe_cache.core.features import CacheError
from saffe_cache.core.options import require
from saffe_cache.core.results import Estimate
from saffe_cache.core.tensors import read_tensors, write_tensors
from saffe_cache.fusion.base import counted_flops
from saffe_cache.inputs.pairs import Pairs, content_fingerprint, select_pairs, split_pairs
from saffe_cache.inputs.spec import SplitOptions
from saffe_cache.retrieval.metrics import bootstrap_interval
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.studies.captioning import captions
from saffe_cache.studies.captioning.captions import CaptionSource, Measured, first_captions
from saffe_cache.studies.captioning.cider import score_captions
from saffe_cache.studies.captioning.config import CaptionConfig
from saffe_cache.studies.captioning.inserting import InsertedModel, Projector, greedy_captions
from saffe_cache.studies.captioning.result import (
    CONTROL,
    CaptionCost,
    CaptionResult,
    CaptionScores,
    Example,
    Examples,
    Measurements,
    Training,
)
from saffe_cache.studies.harness import Study, run_study

_TOKENIZED_AT_ONCE = 1024
_NUM_EXAMPLES = 5
_NUM_CONSTANTS = 1000
"""Training captions at most among which the one is sought that fits all photos best."""


def caption(config: CaptionConfig) -> str:
    """Train, measure, and return the output folder.

    Raises:
        CacheError, ValueError: cache, layer and options do not go together; the folder holds another result.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    cache = open_cache(config.cache)
    photos, text = cache.encoder("image", config.encoder.get("image")), _language_model(cache, config)
    source = CaptionSource(cache, photos, text, config)
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

        def train() -> Training:
            fitted, training = captions.fit_projector(source, self.training, self.validation, config)
            write_tensors(weights, fitted.state_dict())
            return training

        training = study.cell(Training, "training", train)
        projector = captions.new_projector(source, self.training, config.seed)
        projector.load_state_dict(read_tensors(weights))
        projector.eval()

        def measurements() -> Measurements:
            return Measuring(source, projector, self.reported, config.seed).measure(self.training, config.others)

        measured = study.cell(Measurements, "measurements", measurements)
        examples = study.cell(Examples, "captions", partial(self._write_captions, projector, study.out))
        scores = study.cell(CaptionScores, "scores", partial(self._score_captions, projector, study.out))
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
            scores=scores,
            **study.common_fields(config, verdicts),
        )

    def _write_captions(self, projector: Projector, out: Path) -> Examples:
        """Write captions.jsonl, and return the first captions."""
        source, pairs, size = self.source, self.reported, self.config.batch_size
        generated: list[str] = []
        for start in range(0, len(pairs), size):
            with torch.inference_mode():
                projected = projector(source.photo_tokens(pairs.rows[start : start + size]))
            generated += self._greedy(projected)
        found = [
            Example(id=name, caption=caption, own=tuple(self._texts(own)))
            for name, caption, own in zip(pairs.ids, generated, pairs.texts, strict=True)
        ]
        write_whole(out / "captions.jsonl", "".join(f"{json.dumps(asdict(one))}\n" for one in found).encode())
        return Examples(examples=tuple(found[:_NUM_EXAMPLES]))

    def _score_captions(self, projector: Projector, out: Path) -> CaptionScores:
        """CIDEr-D of captions.jsonl, and of captions that know less of the photo, or more."""
        lines = (out / "captions.jsonl").read_text().splitlines()
        with torch.inference_mode():
            [plain] = self._greedy(projector(self.source.photo_tokens(self.reported.rows[:1]))[:, :0])
        constants = self._texts(first_captions(self.training)[:_NUM_CONSTANTS])
        return score_captions(
            [json.loads(line)["caption"] for line in lines],
            [self._texts(own) for own in self.reported.texts],
            other_photos(len(self.reported), np.random.default_rng(self.config.seed)),
            plain=plain,
            constants=constants,
        )

    def _greedy(self, projected: torch.Tensor) -> list[str]:
        source = self.source
        found = greedy_captions(source.model, projected, source.tokens.start, self.config.max_tokens)
        return [source.tokens.decode(tokens) for tokens in found]

    def _texts(self, rows: np.ndarray) -> list[str]:
        texts = self.source.cache.table.inputs["text"].texts
        assert texts is not None
        return [texts[row] for row in rows]


def _language_model(cache: Cache, config: CaptionConfig) -> EncoderCache:
    """CacheError if the cache holds none, or several to choose from; ValueError if it has no such layer."""
    wanted = config.encoder.get("text")
    models = [key for key, one in cache.encoders.items() if one.manifest.is_language_model]
    chosen = [key for key in models if wanted is None or wanted in key]
    if len(chosen) != 1:
        raise CacheError(
            f"{config.cache}: {len(chosen)} language models{f' named {wanted!r}' if wanted else ''}; it holds "
            f"{', '.join(models) or 'none'}. Add one with saffe extract --encoder text=gpt2, or any other with "
            "--language-model, or choose one with --encoder text=PART-OF-ITS-KEY."
        )
    text = cache.encoder("text", chosen[0])
    last = text.manifest.num_layers - 1
    require(config.layer <= last, "layer", config.layer, f"0 to {last}, the model's layers")
    return text


class Measuring:
    """The photos that are reported on, and a projector."""

    def __init__(self, source: CaptionSource, projector: Projector, pairs: Pairs, seed: int) -> None:
        self.source, self.projector, self.pairs = source, projector, pairs
        self._generator = np.random.default_rng(seed)
        self.other = other_photos(len(pairs), self._generator)

    def measure(self, training: Pairs, num_others: int) -> Measurements:
        """The captions of all photos, and how often own captions are found among `num_others` more."""
        texts, owners = self.pairs.texts.values, self.pairs.owners
        found = {
            "photo": self.losses(texts, self.pairs.rows[owners]),
            CONTROL: self.losses(texts, self.pairs.rows[self.other[owners]]),
            "no_photo": self.losses(texts),
            "plain_model": self.losses(texts, plain=True),
            "unigram": self._unigram(texts, training),
        }
        seen, counts = found["photo"].losses, found["photo"].counts
        return Measurements(
            losses={name: _ratio(one.losses, one.counts, owners) for name, one in found.items()},
            differences={
                name: _ratio(seen - one.losses, counts, owners) for name, one in found.items() if name != "photo"
            },
            own_caption=self.own_captions(num_others),
        )

    def losses(self, texts: np.ndarray, photos: np.ndarray | None = None, *, plain: bool = False) -> Measured:
        """Of text rows, each with the photo row at the same index, or without any."""
        return captions.measure_losses(self.source, texts, self.projector, photos, plain=plain)

    def own_captions(self, num_others: int) -> dict[str, Estimate]:
        """How often a photo's own first caption is likelier than those of `num_others` other photos.

        By loss: by nats per token. By gain: by what the photo takes off the caption's loss.
        """
        num, texts = len(self.pairs), first_captions(self.pairs)
        shifts = np.stack([self._generator.choice(num - 1, num_others, replace=False) + 1 for _ in range(num)])
        candidates = np.hstack([np.arange(num)[:, None], (np.arange(num)[:, None] + shifts) % num])
        alone = self.losses(texts).losses[candidates]
        report: dict[str, Estimate] = {}
        for system, photos in (("photo", np.arange(num)), (CONTROL, self.other)):
            seen = np.repeat(self.pairs.rows[photos], candidates.shape[1])
            losses, counts = (one.reshape(candidates.shape) for one in self.losses(texts[candidates.ravel()], seen))
            for by, scores in (("loss", losses / counts), ("gain", losses - alone)):
                is_own = (scores[:, :1] < scores[:, 1:]).all(axis=1)
                report[f"{system}, by {by}"] = _ratio(is_own, np.ones(num), np.arange(num))
        return report

    def _unigram(self, texts: np.ndarray, training: Pairs) -> Measured:
        vocabulary = self.source.model.vocabulary
        trained = np.concatenate(list(self._caption_tokens(training.texts.values)))
        frequencies = 1 + np.bincount(trained, minlength=vocabulary)
        nats = -np.log(frequencies / frequencies.sum())
        found = [(nats[ids].sum(), len(ids)) for ids in self._caption_tokens(texts)]
        return Measured(*(np.array(column) for column in zip(*found, strict=True)))

    def _caption_tokens(self, texts: np.ndarray) -> Iterator[np.ndarray]:
        """The tokens of each caption that count."""
        begin = len(self.source.tokens.start)
        for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
            ids, mask = self.source.token_ids(texts[start : start + _TOKENIZED_AT_ONCE])
            for row, real in zip(ids.cpu().numpy(), mask.sum(dim=1).tolist(), strict=True):
                yield row[begin:real]


def _ratio(values: np.ndarray, counts: np.ndarray, photos: np.ndarray) -> Estimate:
    """Sum over sum, with a bootstrap interval over the photos that the values belong to."""
    totals, weights = (np.bincount(photos, weights=one.astype(np.float64)) for one in (values, counts))
    low, high = bootstrap_interval(totals, weights)
    return Estimate(value=float(totals.sum() / weights.sum()), low=low, high=high)


def other_photos(num: int, generator: np.random.Generator) -> np.ndarray:
    """For each photo another one: a cycle through all, so that no photo gets itself; int64 [num]."""
    order, other = generator.permutation(num), np.empty(num, np.int64)
    other[order] = np.roll(order, 1)
    return other


def judge_controls(own: Mapping[str, Estimate], num_others: int, num_photos: int) -> list[Control]:
    """With another photo, a photo's own caption must not be found more often than chance allows."""
    chance = 1 / (num_others + 1)
    error = math.sqrt(chance * (1 - chance) / num_photos)
    return [
        Control.at_most(name, "own caption found", found.value, chance, error)
        for name, found in own.items()
        if name.startswith(CONTROL)
    ]


def count_cost(model: InsertedModel, projector: Projector, batch: int, tokens: int, photo_tokens: int) -> CaptionCost:
    """Parameters of the projector, and FLOPs of texts of `tokens` tokens."""
    device = projector.linear.weight.device
    photos = torch.zeros(batch, photo_tokens, projector.linear.in_features, device=device)
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=device)
    with torch.no_grad():
        states = model.text_states(ids, photo_tokens)
    with counted_flops() as training:
        model.logits(model(states, projector(photos))).sum().backward()  # type: ignore[no-untyped-call]
    projector.zero_grad()
    with torch.no_grad(), counted_flops() as whole:
        model.logits(model(model.text_states(ids, photo_tokens), projector(photos)))
    return CaptionCost(
        trainable_parameters=sum(parameter.numel() for parameter in projector.parameters()),
        training_step_flops=int(training.get_total_flops()),
        whole_pass_flops=int(whole.get_total_flops()),
        flops_batch=batch,
        flops_tokens=tokens,
    )
