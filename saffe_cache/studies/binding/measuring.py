"""One setting: its rates chosen on training photos, then every system and control over the reported episodes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from saffe_cache.fusion.shape import FamShape
from saffe_cache.studies.binding.baselines import LinearMaps, class_mean_accuracies, fit_ridges, name_accuracies
from saffe_cache.studies.binding.episodes import Episodes, Task, draw_episodes
from saffe_cache.studies.binding.fitting import (
    READ_AFTER,
    Support,
    Weights,
    episodes_at_once,
    fit,
    make_fams,
    photo_vectors,
)
from saffe_cache.training.memory import kept_memory

logger = logging.getLogger(__name__)

StartName = Literal["random", "ridge"]
STARTS: tuple[StartName, ...] = ("random", "ridge")
LEARNING_RATES: dict[StartName, tuple[float, ...]] = {"random": (1e-4, 3e-4, 1e-3), "ridge": (1e-5, 3e-5, 1e-4)}
RIDGE_STRENGTHS = (1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Multiples of the number of photos."""
CONTROL_EPISODES = 200
"""At most: a control is a fit of its own."""


@dataclass(frozen=True)
class Photos:
    """The photos of a split that have one class."""

    states: tuple[torch.Tensor, ...]
    """P times [photos, tokens, d], in memory as they are read from the cache."""
    features: np.ndarray
    """float32 [photos, in]: what the linear path of the head sees."""
    summaries: np.ndarray
    """float32 [photos, 2 P d]: first token and mean of the others of each layer, normed."""
    labels: np.ndarray
    """int64 [photos]"""

    def tokens(self, positions: np.ndarray, device: str) -> list[torch.Tensor]:
        """P times float32 [*positions.shape, tokens, d]."""
        index = torch.from_numpy(positions)
        return [state[index].to(device).float() for state in self.states]


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How episodes are drawn and fitted; the fields are described in BindConfig."""

    shape: FamShape
    num_episodes: int
    tuning_episodes: int
    max_epochs: int
    seed: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Chosen on training photos."""

    ridge_strength: float
    learning_rates: Mapping[StartName, float]


@kept_memory()
def measure(task: Task, reported: Photos, tuning: Photos, names: np.ndarray, options: MeasureOptions) -> dict[str, Any]:
    """A setting of the report.

    Args:
        task: ways, shots and queries.
        reported: of these the episodes are.
        tuning: other photos, for learning rates and the ridge's strength.
        names: unit vectors [names, d] to draw from.
        options: the rest.

    Raises:
        ValueError: classes, photos or names are too few for the task.
    """
    drawn = [
        draw_episodes(photos.labels, len(names), task, count, options.seed)
        for photos, count in ((reported, options.num_episodes), (tuning, options.tuning_episodes))
    ]
    chosen = choose(tuning, names, drawn[1], options)
    found, epochs = run_systems(reported, names, drawn[0], chosen, STARTS, options)
    controlled = drawn[0].take(slice(0, CONTROL_EPISODES)).shuffled(options.seed)
    shuffled, _ = run_systems(reported, names, controlled, chosen, ("random",), options)
    blind = {name: values for name, values in found.items() if name.endswith("blind")}
    controls = {f"{name}, photos shuffled": values for name, values in shuffled.items() if "blind" not in name} | blind
    chance = 1 / task.ways
    fams = {name: values for name, values in found.items() if name.startswith("fam") and name not in blind}
    return {
        **asdict(task),
        "episodes": options.num_episodes,
        "chance": chance,
        "systems": {name: summary(values) for name, values in found.items() if name not in blind},
        "differences": {name: summary(values - found["class_means"]) for name, values in fams.items()},
        "controls": {name: summary(values) for name, values in controls.items()},
        "failures": failures(task, chance, controls),
        "chosen": asdict(chosen),
        "epochs_to_convergence": {
            start: {"mean": float(counts.mean()), "most": int(counts.max())} for start, counts in epochs.items()
        },
    }


def summary(accuracies: np.ndarray) -> dict[str, float]:
    """Mean over episodes, and half the width of its normal 95 % interval: 1.96 standard errors."""
    return {"mean": float(accuracies.mean()), "half_interval": 1.96 * standard_error(accuracies)}


def standard_error(accuracies: np.ndarray) -> float:
    return float(accuracies.std(ddof=1) / math.sqrt(len(accuracies)))


def failures(task: Task, chance: float, controls: Mapping[str, np.ndarray]) -> list[str]:
    """Which controls are more than 3 standard errors from chance, in words."""
    found = []
    for name, values in controls.items():
        mean, limit = float(values.mean()), 3 * standard_error(values) + 1e-9
        if abs(mean - chance) > limit:
            found.append(
                f"{task}, {name}: {100 * mean:.1f} over {len(values)} episodes, expected {100 * chance:.1f} ± "
                f"{100 * limit:.1f}"
            )
    return found


def choose(tuning: Photos, names: np.ndarray, episodes: Episodes, options: MeasureOptions) -> Chosen:
    """The ridge's strength by its accuracy, the learning rate of each start by its mean over all three readings."""

    def ridge_accuracy(strength: float) -> float:
        maps, named = _ridges(tuning, names, episodes, strength, options)
        return float(_ridge_accuracies(tuning, episodes, maps, named, options).mean())

    strength = max(RIDGE_STRENGTHS, key=ridge_accuracy)

    def accuracy(start: StartName, rate: float) -> float:
        chosen = Chosen(ridge_strength=strength, learning_rates={start: rate})
        found, _ = run_systems(tuning, names, episodes, chosen, (start,), options)
        return float(np.mean([values.mean() for name, values in found.items() if name.startswith("fam")]))

    rates = {start: max(LEARNING_RATES[start], key=partial(accuracy, start)) for start in STARTS}
    return Chosen(ridge_strength=strength, learning_rates=rates)


def run_systems(
    photos: Photos,
    names: np.ndarray,
    episodes: Episodes,
    chosen: Chosen,
    starts: Sequence[StartName],
    options: MeasureOptions,
) -> tuple[dict[str, np.ndarray], dict[StartName, np.ndarray]]:
    """The accuracy of each system in each episode, and how many epochs each fit took to its convergence."""
    ways, per_name = episodes.support.shape[1], episodes.support.shape[2] + episodes.queries.shape[2]
    at_once = episodes_at_once(options.shape, ways * per_name, options.device)
    accuracies: dict[str, list[np.ndarray]] = {}
    epochs: dict[StartName, list[np.ndarray]] = {}
    for first in range(0, len(episodes), at_once):
        batch = _Batch(photos, names, episodes.take(slice(first, first + at_once)), first, chosen, options)
        found = batch.baselines()
        for start in starts:
            read, taken = batch.fam(start)
            found |= read
            epochs.setdefault(start, []).append(taken)
        for name, values in found.items():
            accuracies.setdefault(name, []).append(values)
    return (
        {name: np.concatenate(parts) for name, parts in accuracies.items()},
        {start: np.concatenate(parts) for start, parts in epochs.items()},
    )


class _Batch:
    """Episodes that are fitted at once."""

    def __init__(
        self,
        photos: Photos,
        names: np.ndarray,
        episodes: Episodes,
        first: int,
        chosen: Chosen,
        options: MeasureOptions,
    ) -> None:
        """`first`: number of the first of them, for the seeds of their heads."""
        self._photos, self._episodes, self._chosen, self._options = photos, episodes, chosen, options
        self._maps, self._names = _ridges(photos, names, episodes, chosen.ridge_strength, options)
        self._support = Support(photos.tokens(episodes.support, options.device), self._names)
        self._asked = [state.flatten(1, 2) for state in photos.tokens(episodes.queries, options.device)]
        seeds = [options.seed * 1_000_003 + first + number for number in range(len(episodes))]
        self._skeleton, self._start = make_fams(options.shape, seeds, options.device)

    def baselines(self) -> dict[str, np.ndarray]:
        photos, episodes = self._photos, self._episodes
        means = class_mean_accuracies(photos.summaries[episodes.support], photos.summaries[episodes.queries])
        ridge = _ridge_accuracies(photos, episodes, self._maps, self._names, self._options)
        return {"class_means": means, "ridge": ridge}

    def fam(self, start: StartName) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Accuracies by reading, and epochs to convergence, [episodes]."""
        options, rate = self._options, self._chosen.learning_rates[start]
        weights = {name: value.clone() for name, value in self._start.items()}
        if start == "ridge":
            with torch.no_grad():
                weights["head.linear.weight"].copy_(self._maps.weight)
                weights["head.linear.bias"].copy_(self._maps.bias)
        found = {f"fam from {start}, {after} epoch{'s' * (after > 1)}": self._nothing() for after in READ_AFTER}
        converged, blind = self._nothing(), self._nothing()
        epochs = np.zeros(len(self._episodes), np.int64)
        for reading in fit(self._skeleton, weights, self._support, rate, options.max_epochs):
            who = reading.episodes.numpy()
            if reading.after is None:
                converged[who], epochs[who] = self._accuracies(reading.weights, who), reading.epoch
                blind[who] = self._accuracies(reading.weights, who, is_blind=True)
            else:
                name = f"fam from {start}, {reading.after} epoch{'s' * (reading.after > 1)}"
                found[name] = self._accuracies(reading.weights, who)
        return found | {f"fam from {start}, converged": converged, f"fam from {start}, blind": blind}, epochs

    def _nothing(self) -> np.ndarray:
        return np.full(len(self._episodes), np.nan)

    @torch.no_grad()
    def _accuracies(self, weights: Weights, who: np.ndarray, *, is_blind: bool = False) -> np.ndarray:
        """Of some of the episodes; a blind FAM is asked about one photo again and again."""
        index = torch.from_numpy(who)
        whole = len(who) == len(self._episodes)
        asked = [state if whole else state[index] for state in self._asked]
        names = self._names[index.to(self._names.device)]
        if not is_blind:
            return name_accuracies(photo_vectors(self._skeleton, weights, asked), names)
        constant = photo_vectors(
            self._skeleton, weights, [state[:1, :1].expand(len(who), -1, -1, -1) for state in asked]
        )
        return name_accuracies(constant.expand(-1, asked[0].shape[1], -1), names)


def _ridges(
    photos: Photos, names: np.ndarray, episodes: Episodes, strength: float, options: MeasureOptions
) -> tuple[LinearMaps, torch.Tensor]:
    """The ridge regression of each episode, and the unit vectors of its names."""
    named = torch.from_numpy(names[episodes.names]).to(options.device)
    features = torch.from_numpy(photos.features[episodes.support]).to(options.device)
    return fit_ridges(features, named, strength), named


def _ridge_accuracies(
    photos: Photos, episodes: Episodes, maps: LinearMaps, names: torch.Tensor, options: MeasureOptions
) -> np.ndarray:
    asked = torch.from_numpy(photos.features[episodes.queries]).to(options.device)
    return name_accuracies(torch.nn.functional.normalize(maps(asked.flatten(1, 2)), dim=-1), names)
