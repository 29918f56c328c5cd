"""Episodes: drawn, fitted, measured. The rates are chosen on training photos, then every system and control runs.

An episode has a few classes, a few photos of each to learn from, others to test on, and a made-up name for each class.
Photos are known by their content: a file that occurs twice in a split is one photo, so an episode never learns from a
photo that it tests on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch

from saffe_cache.core.controls import STANDARD_ERRORS, Control, standard_error
from saffe_cache.core.devices import kept_memory
from saffe_cache.core.results import Estimate
from saffe_cache.fusion.options import FusionShape
from saffe_cache.studies.binding.config import BindConfig
from saffe_cache.studies.binding.fitting import (
    READ_AFTER,
    LinearMaps,
    Support,
    Weights,
    class_mean_accuracies,
    episodes_at_once,
    fit,
    fit_ridges,
    make_fams,
    name_accuracies,
    photo_vectors,
)
from saffe_cache.studies.binding.result import Chosen, Epochs, FewShot

StartName = Literal["random", "ridge"]
STARTS: tuple[StartName, ...] = ("random", "ridge")
LEARNING_RATES: dict[StartName, tuple[float, ...]] = {"random": (1e-4, 3e-4, 1e-3), "ridge": (1e-5, 3e-5, 1e-4)}
RIDGE_STRENGTHS = (1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Multiples of the number of photos."""
CONTROL_EPISODES = 200
"""At most: a control is fitted again."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all episodes of a setting have in common."""

    ways: int
    """Classes."""
    shots: int
    """Photos of each to learn from, the support."""
    queries: int
    """Photos of each to test on."""

    def __str__(self) -> str:
        return f"{self.ways}-way {self.shots}-shot"


@dataclass(frozen=True)
class Episodes:
    """Photos and names by their positions in what they were drawn from."""

    classes: np.ndarray
    """int64 [episodes, ways]"""
    support: np.ndarray
    """int64 [episodes, ways, shots]"""
    queries: np.ndarray
    """int64 [episodes, ways, queries]"""
    names: np.ndarray
    """int64 [episodes, ways]: no name twice in an episode."""

    def __len__(self) -> int:
        return len(self.classes)

    def take(self, part: slice) -> Episodes:
        return Episodes(self.classes[part], self.support[part], self.queries[part], self.names[part])

    def shuffled(self, seed: int) -> Episodes:
        """The photos of each support shuffled among its names: what a control learns from."""
        flat = self.support.reshape(len(self), -1)
        assigned = np.random.default_rng(seed).permuted(flat, axis=1)
        return replace(self, support=assigned.reshape(self.support.shape))


def draw_episodes(labels: np.ndarray, num_names: int, task: Task, num_episodes: int, seed: int) -> Episodes:
    """Classes, photos and names, all without replacement within an episode.

    Args:
        labels: int64 [photos], the class of each.
        num_names: how many there are to draw from.
        task: ways, shots and queries.
        num_episodes: how many to draw.
        seed: of the draws.

    Raises:
        ValueError: too few classes have photos enough, or there are too few names.
    """
    needed = task.shots + task.queries
    found, counts = np.unique(labels, return_counts=True)
    able = found[counts >= needed]
    if len(able) < task.ways:
        raise ValueError(
            f"{task}: {task.ways} classes with {needed} photos each ({task.shots} to learn from, {task.queries} to "
            f"test on) are needed; {len(able)} of {len(found)} classes have them, the largest has "
            f"{counts.max(initial=0)}. Use fewer --ways, --shots or --queries."
        )
    if num_names < task.ways:
        raise ValueError(f"{task}: {task.ways} names are needed, the pool has {num_names}. Use a larger --num-names.")
    members = {int(label): np.flatnonzero(labels == label) for label in able}
    generator = np.random.default_rng((seed, task.ways, task.shots))
    classes = np.stack([generator.choice(able, task.ways, replace=False) for _ in range(num_episodes)])
    photos = np.stack(
        [
            np.stack([generator.choice(members[int(label)], needed, replace=False) for label in of_one])
            for of_one in classes
        ]
    )
    names = np.stack([generator.choice(num_names, task.ways, replace=False) for _ in range(num_episodes)])
    return Episodes(classes, photos[:, :, : task.shots], photos[:, :, task.shots :], names)


@dataclass(frozen=True)
class Photos:
    """The photos of a split that have one class."""

    states: tuple[torch.Tensor, ...]
    """P times [photos, tokens, d], in the type in which the cache stores them."""
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


@dataclass(frozen=True)
class Episodic:
    """What the episodes of all settings share."""

    config: BindConfig
    shape: FusionShape
    names: np.ndarray
    """Unit vectors [names, d] to draw from."""
    device: str


@kept_memory()
def measure(task: Task, reported: Photos, tuning: Photos, episodic: Episodic) -> FewShot:
    """Measure one setting.

    Args:
        task: ways, shots and queries.
        reported: the photos of the episodes.
        tuning: other photos, to choose learning rates and the ridge's strength with.
        episodic: what all settings share.

    Raises:
        ValueError: classes, photos or names are too few for the task.
    """
    config = episodic.config
    drawn = [
        draw_episodes(photos.labels, len(episodic.names), task, count, config.seed)
        for photos, count in ((reported, config.episodes), (tuning, config.tuning_episodes))
    ]
    chosen = choose(tuning, drawn[1], episodic)
    found, epochs = run_systems(reported, drawn[0], chosen, STARTS, episodic)
    controlled = drawn[0].take(slice(0, CONTROL_EPISODES)).shuffled(config.seed)
    shuffled, _ = run_systems(reported, controlled, chosen, ("random",), episodic)
    blind = {name: values for name, values in found.items() if name.endswith("blind")}
    controls = {f"{name}, photos shuffled": values for name, values in shuffled.items() if "blind" not in name} | blind
    chance = 1 / task.ways
    fams = {name: values for name, values in found.items() if name.startswith("fam") and name not in blind}
    return FewShot(
        **asdict(task),
        episodes=config.episodes,
        chance=chance,
        systems={name: summary(values) for name, values in found.items() if name not in blind},
        differences={name: summary(values - found["class_means"]) for name, values in fams.items()},
        controls={name: summary(values) for name, values in controls.items()},
        verdicts=tuple(judge_controls(task, chance, controls)),
        chosen=chosen,
        epochs_to_convergence={
            start: Epochs(mean=float(counts.mean()), most=int(counts.max())) for start, counts in epochs.items()
        },
    )


def summary(accuracies: np.ndarray) -> Estimate:
    """The mean over episodes with its normal interval."""
    mean, half = float(accuracies.mean()), 1.96 * standard_error(accuracies)
    return Estimate(value=mean, low=mean - half, high=mean + half)


def judge_controls(task: Task, chance: float, controls: Mapping[str, np.ndarray]) -> list[Control]:
    """Each must be within three standard errors of chance."""
    return [
        Control.within(
            f"{task}, {name}",
            "accuracy",
            float(values.mean()),
            chance,
            STANDARD_ERRORS * standard_error(values) + 1e-9,
        )
        for name, values in controls.items()
    ]


def choose(tuning: Photos, episodes: Episodes, episodic: Episodic) -> Chosen:
    """The ridge's strength by its accuracy, the learning rate of each start by its mean over all three readings."""

    def ridge_accuracy(strength: float) -> float:
        maps, named = _ridges(tuning, episodes, strength, episodic)
        return float(_ridge_accuracies(tuning, episodes, maps, named, episodic.device).mean())

    strength = max(RIDGE_STRENGTHS, key=ridge_accuracy)

    def accuracy(start: StartName, rate: float) -> float:
        chosen = Chosen(ridge_strength=strength, learning_rates={start: rate})
        found, _ = run_systems(tuning, episodes, chosen, (start,), episodic)
        return float(np.mean([values.mean() for name, values in found.items() if name.startswith("fam")]))

    rates: dict[str, float] = {start: max(LEARNING_RATES[start], key=partial(accuracy, start)) for start in STARTS}
    return Chosen(ridge_strength=strength, learning_rates=rates)


def run_systems(
    photos: Photos,
    episodes: Episodes,
    chosen: Chosen,
    starts: Sequence[StartName],
    episodic: Episodic,
) -> tuple[dict[str, np.ndarray], dict[StartName, np.ndarray]]:
    """The accuracy of each system in each episode, and the epochs that each fit took to converge."""
    ways, per_name = episodes.support.shape[1], episodes.support.shape[2] + episodes.queries.shape[2]
    at_once = episodes_at_once(episodic.shape, ways * per_name, episodic.device)
    accuracies: dict[str, list[np.ndarray]] = {}
    epochs: dict[StartName, list[np.ndarray]] = {}
    for first in range(0, len(episodes), at_once):
        batch = _Batch(photos, episodes.take(slice(first, first + at_once)), first, chosen, episodic)
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
    """Episodes that are fitted together."""

    def __init__(self, photos: Photos, episodes: Episodes, first: int, chosen: Chosen, episodic: Episodic) -> None:
        """`first`: number of the first of them, for the seeds of their heads."""
        device = episodic.device
        self._photos, self._episodes, self._chosen, self._episodic = photos, episodes, chosen, episodic
        self._maps, self._names = _ridges(photos, episodes, chosen.ridge_strength, episodic)
        self._support = Support(photos.tokens(episodes.support, device), self._names)
        self._queries = [state.flatten(1, 2) for state in photos.tokens(episodes.queries, device)]
        seeds = [episodic.config.seed * 1_000_003 + first + number for number in range(len(episodes))]
        self._skeleton, self._start = make_fams(episodic.shape, seeds, device)

    def baselines(self) -> dict[str, np.ndarray]:
        photos, episodes = self._photos, self._episodes
        means = class_mean_accuracies(photos.summaries[episodes.support], photos.summaries[episodes.queries])
        ridge = _ridge_accuracies(photos, episodes, self._maps, self._names, self._episodic.device)
        return {"class_means": means, "ridge": ridge}

    def fam(self, start: StartName) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Accuracies by reading, and epochs to convergence, [episodes]."""
        rate = self._chosen.learning_rates[start]
        weights = {name: value.clone() for name, value in self._start.items()}
        if start == "ridge":
            with torch.no_grad():
                weights["head.linear.weight"].copy_(self._maps.weight)
                weights["head.linear.bias"].copy_(self._maps.bias)
        found = {f"fam from {start}, {after} epoch{'s' * (after > 1)}": self._nothing() for after in READ_AFTER}
        converged, blind = self._nothing(), self._nothing()
        epochs = np.zeros(len(self._episodes), np.int64)
        for reading in fit(self._skeleton, weights, self._support, rate, self._episodic.config.max_epochs):
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
        """In some of the episodes; a blind FAM sees the same photo for every query."""
        index = torch.from_numpy(who)
        whole = len(who) == len(self._episodes)
        queries = [state if whole else state[index] for state in self._queries]
        names = self._names[index.to(self._names.device)]
        if not is_blind:
            return name_accuracies(photo_vectors(self._skeleton, weights, queries), names)
        constant = photo_vectors(
            self._skeleton, weights, [state[:1, :1].expand(len(who), -1, -1, -1) for state in queries]
        )
        return name_accuracies(constant.expand(-1, queries[0].shape[1], -1), names)


def _ridges(photos: Photos, episodes: Episodes, strength: float, episodic: Episodic) -> tuple[LinearMaps, torch.Tensor]:
    """The ridge regression of each episode, and the unit vectors of its names."""
    named = torch.from_numpy(episodic.names[episodes.names]).to(episodic.device)
    features = torch.from_numpy(photos.features[episodes.support]).to(episodic.device)
    return fit_ridges(features, named, strength), named


def _ridge_accuracies(
    photos: Photos, episodes: Episodes, maps: LinearMaps, names: torch.Tensor, device: str
) -> np.ndarray:
    queries = torch.from_numpy(photos.features[episodes.queries]).to(device)
    return name_accuracies(torch.nn.functional.normalize(maps(queries.flatten(1, 2)), dim=-1), names)
