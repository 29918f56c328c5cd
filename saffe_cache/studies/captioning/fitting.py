"""Training the projector, the only part that learns; the best epoch has the lowest loss on captions held out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from saffe_cache.inputs.pairs import Pairs
from saffe_cache.retrieval.fitting import adamw, fit_epochs, update, warmed_cosine
from saffe_cache.studies.captioning.captions import CaptionSource, caption_losses, first_captions, num_targets, project
from saffe_cache.studies.captioning.config import CaptionConfig
from saffe_cache.studies.captioning.inserting import InsertedModel, Projector, typical_size

_MEASURED_CAPTIONS = 256
"""From which the size of hidden states is measured."""
_LARGEST_GRADIENT = 1.0
_SORTED_BATCHES = 16
"""Batches whose texts are sorted by length together."""


@dataclass(frozen=True)
class Fit:
    """A trained projector, at its best epoch."""

    projector: Projector
    log: list[dict[str, float]]
    """For each epoch: losses per token in nats; epoch 0 is the start."""
    best_epoch: int
    seconds_per_step: float
    """Median, reading included."""


def fit_projector(
    source: CaptionSource, model: InsertedModel, training: Pairs, validation: Pairs, config: CaptionConfig
) -> Fit:
    """An epoch sees each photo once, with one of its captions drawn at random."""
    projector = new_projector(source, model, training, config.seed)
    total, steps = config.epochs * -(-len(training) // config.batch_size), count()
    optimizer = adamw(projector.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    lengths, times = np.diff(source.text.offsets), []

    def run_epoch(epoch: int) -> float:
        summed, num_tokens = 0.0, 0
        for photos, texts in _batches(training, lengths, config, epoch):
            started = time.perf_counter()
            captions = source.captions(texts)
            losses = caption_losses(model, captions, project(source, projector, photos))
            count = int(num_targets(captions).sum())
            rate = warmed_cosine(next(steps), total, max(1, total // 10))
            update(optimizer, losses.sum() / count, rate, tuple(projector.parameters()), _LARGEST_GRADIENT)
            summed, num_tokens = summed + float(losses.detach().sum()), num_tokens + count
            times.append(time.perf_counter() - started)
        return summed / num_tokens

    fitted = fit_epochs(
        projector, config.epochs, run_epoch, lambda _: -validation_loss(source, model, projector, validation)
    )
    log = [{"epoch": 0.0, "validation": -fitted.scores[0]}]
    for epoch, (loss, score) in enumerate(zip(fitted.losses, fitted.scores[1:], strict=True), start=1):
        log.append({"epoch": float(epoch), "training": loss, "validation": -score})
    return Fit(projector, log, fitted.best_epoch, float(np.median(times)))


def new_projector(source: CaptionSource, model: InsertedModel, training: Pairs, seed: int) -> Projector:
    """With weights from a seed, and tokens of the size of the layer's hidden states."""
    rows = first_captions(training)[:_MEASURED_CAPTIONS]
    captions = source.captions(rows)
    size = typical_size(captions.states, captions.is_target)
    torch.manual_seed(seed)
    return Projector(source.photo_size, model.hidden_size, size).to(source.device)


@torch.inference_mode()
def validation_loss(source: CaptionSource, model: InsertedModel, projector: Projector, pairs: Pairs) -> float:
    """Loss of the photos' first captions, in nats per token."""
    total, count, texts = 0.0, 0, first_captions(pairs)
    for start in range(0, len(pairs), 64):
        captions = source.captions(texts[start : start + 64])
        photos = project(source, projector, pairs.rows[start : start + 64])
        total += float(caption_losses(model, captions, photos).sum())
        count += int(num_targets(captions).sum())
    return total / count


def _batches(
    pairs: Pairs, lengths: np.ndarray, config: CaptionConfig, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of photos and of one caption of each, in an order by seed and epoch. `lengths`: tokens of each text."""
    generator = np.random.default_rng((config.seed, epoch))
    offsets = pairs.texts.offsets
    drawn = offsets[:-1] + generator.integers(np.diff(offsets))
    texts = pairs.texts.values[drawn]
    for chosen in shuffled_batches(lengths[texts], config.batch_size, generator):
        yield pairs.rows[chosen], texts[chosen]


def shuffled_batches(lengths: np.ndarray, batch_size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Indices of all texts in batches of similar length, since padding would otherwise be half of the work.

    Texts are shuffled, those of a few batches are sorted by length, and the batches are shuffled.
    """
    order, together = generator.permutation(len(lengths)), _SORTED_BATCHES * batch_size
    batches = []
    for start in range(0, len(order), together):
        some = order[start : start + together]
        some = some[np.argsort(lengths[some], kind="stable")]
        batches += [some[first : first + batch_size] for first in range(0, len(some), batch_size)]
    return [batches[number] for number in generator.permutation(len(batches))]
