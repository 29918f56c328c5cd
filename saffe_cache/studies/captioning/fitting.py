"""Training the projector, the only part that learns; the best epoch has the lowest loss on captions held out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from saffe_cache.inputs.pairs import Pairs
from saffe_cache.studies.captioning.captions import CaptionSource, caption_losses, first_captions, num_said, project
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
    steps = config.epochs * -(-len(training) // config.batch_size)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_at, steps=steps))
    log = [{"epoch": 0.0, "validation": validation_loss(source, model, projector, validation)}]
    best, best_state, times = log[0]["validation"], _copied(projector), []
    for epoch in range(1, config.epochs + 1):
        total, count = 0.0, 0
        for photos, texts in _batches(training, np.diff(source.text.offsets), config, epoch):
            started = time.perf_counter()
            captions = source.captions(texts)
            losses = caption_losses(model, captions, project(source, projector, photos))
            said = int(num_said(captions).sum())
            optimizer.zero_grad()
            (losses.sum() / said).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(projector.parameters(), _LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            total, count = total + float(losses.detach().sum()), count + said
            times.append(time.perf_counter() - started)
        found = validation_loss(source, model, projector, validation)
        log.append({"epoch": float(epoch), "training": total / count, "validation": found})
        if found < best:
            best, best_state = found, _copied(projector)
    projector.load_state_dict(best_state)
    best_epoch = min(range(len(log)), key=lambda epoch: log[epoch]["validation"])
    return Fit(projector.eval(), log, best_epoch, float(np.median(times)))


def rate_at(step: int, steps: int) -> float:
    """Fraction of the highest learning rate: it rises over a tenth of the steps, then falls as a cosine."""
    rising = max(1, steps // 10)
    return min((step + 1) / rising, 0.5 + 0.5 * math.cos(math.pi * max(0, step - rising) / max(1, steps - rising)))


def new_projector(source: CaptionSource, model: InsertedModel, training: Pairs, seed: int) -> Projector:
    """With weights from a seed, and tokens of the size of the layer's hidden states."""
    rows = first_captions(training)[:_MEASURED_CAPTIONS]
    captions = source.captions(rows)
    size = typical_size(captions.states, captions.is_said)
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
        count += int(num_said(captions).sum())
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


def _copied(projector: Projector) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in projector.state_dict().items()}
