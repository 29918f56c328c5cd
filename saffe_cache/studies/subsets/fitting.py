"""Train one fusion on some of the media, and its vectors of items with any of them missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from saffe_cache.core.features import Modality
from saffe_cache.core.ranks import Share
from saffe_cache.fusion.layers import identity_linear, parameter_groups
from saffe_cache.fusion.losses import Temperature, distinct_positives, info_nce
from saffe_cache.fusion.media import Concat, Cross, Media, Medium, Sum, Union, media_left, nce_alone
from saffe_cache.inputs.media import Groups
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.retrieval.fitting import adamw, batch_size, fit_epochs, update, warmed_cosine
from saffe_cache.studies.subsets.config import SubsetsConfig
from saffe_cache.studies.subsets.examples import Examples

BATCH_SIZE, AT_ONCE = 64, 256
WEIGHT_DECAY, WARMUP = 0.05, 0.1
KINDS: Mapping[str, type[Concat | Sum | Union]] = {"concat": Concat, "sum": Sum, "union": Union, "cross": Cross}
"""By their names in the options."""
_STEPS = 10
"""Steps of a late fusion's weights from 0 to 1."""


class Model(nn.Module):
    """A fusion and the map of the texts, which starts as the identity."""

    def __init__(self, name: str, media: Media, size: int) -> None:
        super().__init__()
        self.fusion: nn.Module = KINDS[name]({one: medium.tokens.shape[2] for one, medium in media.items()}, size)
        self.text_map = identity_linear(size)
        self.temperature = Temperature()


@dataclass(frozen=True)
class Fit:
    """A trained model of some media."""

    model: Model
    modalities: tuple[Modality, ...]

    @torch.inference_mode()
    def items(self, examples: Examples, subset: Sequence[Modality], shuffled: Modality | None = None) -> np.ndarray:
        """Unit vectors of items of which only a subset of the media is shown; one of them may be another item's."""
        device, found = next(self.model.parameters()).device, []
        order = np.random.default_rng(0).permutation(len(examples))
        self.model.eval()
        for start in range(0, len(examples), AT_ONCE):
            rows = torch.arange(start, min(start + AT_ONCE, len(examples)))
            media = {}
            for name in self.modalities:
                medium = examples.media[name].take(torch.from_numpy(order)[rows] if name == shuffled else rows)
                shown = _on(medium, device)
                media[name] = shown if name in subset else shown.without(torch.ones_like(shown.is_present))
            found.append(functional.normalize(self.model.fusion(media), dim=1).cpu().numpy())
        return np.concatenate(found)

    @torch.inference_mode()
    def texts(self, examples: Examples) -> np.ndarray:
        """Unit vectors of the texts."""
        device = self.model.text_map.weight.device
        return unit_rows(self.model.text_map(torch.from_numpy(examples.vectors).to(device)).cpu().numpy())


def fit(
    config: SubsetsConfig,
    name: str,
    modalities: tuple[Modality, ...],
    training: Examples,
    validation: Examples,
    seed: int,
    device: str,
    *,
    permuted: bool = False,
) -> Fit:
    """Train with InfoNCE between the items of a batch and their texts; the best epoch by validation counts.

    `permuted`: as a control, each item has the texts of another.
    """
    generator = np.random.default_rng(seed)
    training = training.take(np.flatnonzero(_has_any(training, modalities)))
    validation = validation.take(np.flatnonzero(_has_any(validation, modalities)))
    texts = training.texts.take(generator.permutation(len(training))) if permuted else training.texts
    media = {one: training.media[one] for one in modalities}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(name, media, training.vectors.shape[1]).to(device)
        found = Fit(model, modalities)
        optimizer = adamw(parameter_groups(model, config.learning_rate, WEIGHT_DECAY), config.learning_rate)
        size, steps = batch_size(BATCH_SIZE, len(training)), count()
        total, groups = config.epochs * (len(training) // size), Groups(training.texts, training.rows)

        def step(chosen: np.ndarray) -> float:
            distinct, _, positives = distinct_positives(texts.take(chosen))
            drawn = {one: groups.draw(one, chosen, generator) if config.regroup else chosen for one in media}
            shown = {one: _on(medium.take(torch.from_numpy(drawn[one])), device) for one, medium in media.items()}
            queries = model.text_map(torch.from_numpy(training.vectors[distinct]).to(device))
            dropped = _with_dropped(shown, config.modality_dropout)
            loss = _loss(model, shown, dropped, queries, torch.from_numpy(positives).to(device))
            update(
                optimizer, loss, warmed_cosine(next(steps), total, round(WARMUP * total)), list(model.parameters()), 5
            )
            return float(loss.detach())

        def run_epoch(_: int) -> float:
            order, starts = generator.permutation(len(training)), range(0, len(training) - size + 1, size)
            return float(np.mean([step(order[start : start + size]) for start in starts]))

        def judge(_: int) -> float:
            scores = validation.scores(found.items(validation, modalities), found.texts(validation))
            return scores[validation.main_metric].value

        fit_epochs(model, config.epochs, run_epoch, judge, judges_start=False)
    return found


def _loss(model: Model, shown: Media, dropped: Media, queries: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """InfoNCE of the items with some media dropped, and for `sum` the mean of that of each medium alone."""
    queries, temperature = functional.normalize(queries, dim=1), model.temperature()
    loss = info_nce(functional.normalize(model.fusion(dropped), dim=1), queries, positives, temperature)
    if not isinstance(model.fusion, Sum) or len(shown) == 1:
        return loss
    units = (functional.normalize(part, dim=1) for part in model.fusion.parts(shown))
    alone = zip(units, (one.is_present for one in shown.values()), strict=True)
    return loss + nce_alone(alone, queries, positives, temperature)


def _on(medium: Medium, device: str | torch.device) -> Medium:
    return Medium(medium.tokens.to(device), medium.mask.to(device))


def _has_any(examples: Examples, modalities: Sequence[Modality]) -> np.ndarray:
    return np.asarray(np.logical_or.reduce([examples.rows[name] >= 0 for name in modalities]))


def _with_dropped(media: Media, rate: float) -> Media:
    """With some media of some items missing; each item keeps one at least."""
    present = torch.stack([one.is_present for one in media.values()], dim=1)
    gone = ~media_left(present, rate, Share.of(len(present)))
    return {name: one.without(is_gone) for (name, one), is_gone in zip(media.items(), gone.T, strict=True)}


def late_weights(validation: Examples, alone: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, ...]:
    """Weights of each medium's scores that find most on validation items, in steps of a tenth.

    `alone` are the unit vectors of the items and of the texts of each medium's own model.
    """
    grid = (one for one in product(range(_STEPS + 1), repeat=len(alone)) if sum(one) == _STEPS)
    weights = [tuple(step / _STEPS for step in one) for one in grid]
    return max(weights, key=lambda one: validation.scores(*late(alone, one))[validation.main_metric].value)


def late(alone: Sequence[tuple[np.ndarray, np.ndarray]], weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of items and of texts whose inner product is proportional to the weighted sum of the media's."""
    roots = [weight**0.5 for weight in weights]
    items, texts = (
        unit_rows(np.concatenate([root * one[side] for root, one in zip(roots, alone, strict=True)], axis=1))
        for side in (0, 1)
    )
    return items, texts
