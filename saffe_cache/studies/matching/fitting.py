"""A fusion's training: AdamW, rate 1e-3, decay 0.01, a cosine schedule over 10 epochs, as the paper does it.

By default the rest differs (arXiv 2606.01207, sec. 4.4):

| | here | the paper |
|---|---|---|
| batch | 128 pairs | 32; `--batch-size 32` |
| seeds | 0, 1, 2 | 42, 123, 456; `--seeds 42,123,456` |
| parts | three, by photo: to train on, to choose on, to report on | two, 80/20 at random: to train on, to report on |
| epoch | the best of these 10 by accuracy on photos to choose on | not stated; apparently the last |
| vectors | of length sqrt(d), see `features` | no scaling is stated; of unit length where noise is added (eq. 4) |
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from saffe_cache.retrieval.fitting import adamw, fit_epochs, update, warmed_cosine
from saffe_cache.studies.matching.config import MatchConfig
from saffe_cache.studies.matching.examples import Examples
from saffe_cache.studies.matching.features import Inputs
from saffe_cache.studies.matching.fusions import make_fusion

_JUDGED_AT_ONCE = 512


@dataclass(frozen=True)
class Fit:
    """A trained fusion."""

    model: nn.Module
    epoch: int
    """The best by validation, counted from 1."""
    validation: tuple[float, ...]
    """Accuracy after each epoch."""
    losses: tuple[float, ...]
    """Mean over each epoch."""
    num_parameters: int


def fit(
    name: str,
    inputs: Inputs,
    training: Examples,
    validation: Examples,
    config: MatchConfig,
    seed: int,
    device: str,
) -> Fit:
    """Train on pairs. The same seed gives the same weights on the same device."""
    generator, labels = np.random.default_rng([seed, 4]), torch.from_numpy(training.labels).to(device)
    total, steps = config.epochs * -(-len(training) // config.batch_size), count()
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(seed)
        model = make_fusion(name, *inputs.widths, config.query_modality).to(device)
        optimizer = adamw(model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True)

        def run_epoch(epoch: int) -> float:
            order, summed = generator.permutation(len(training)), torch.zeros((), device=device)
            for start in range(0, len(order), config.batch_size):
                these = order[start : start + config.batch_size]
                batch = inputs.batch(training.photos[these], training.texts[these])
                loss = functional.cross_entropy(model(*(part.to(device) for part in batch)), labels[these])
                update(optimizer, loss, warmed_cosine(next(steps), total))
                summed += loss.detach() * len(these)
            return float(summed) / len(order)

        def accuracy(epoch: int) -> float:
            called = scores_of(model, inputs, validation, device) > 0
            return float((called == validation.labels).mean())

        fitted = fit_epochs(model, config.epochs, run_epoch, accuracy, judges_start=False)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Fit(model, fitted.best_epoch, fitted.scores, fitted.losses, num_parameters)


@torch.inference_mode()
def scores_of(model: nn.Module, inputs: Inputs, examples: Examples, device: str) -> np.ndarray:
    """Log odds of a match, float64 [examples]; above 0 a pair counts as one."""
    model.eval()
    parts = []
    for start in range(0, len(examples), _JUDGED_AT_ONCE):
        these = slice(start, start + _JUDGED_AT_ONCE)
        batch = inputs.batch(examples.photos[these], examples.texts[these])
        logits = model(*(part.to(device) for part in batch)).double().cpu().numpy()
        parts.append(logits[:, 1] - logits[:, 0])
    return np.concatenate(parts)
