"""Episodes: drawn, fitted, measured. The rates are chosen on training photos, then every system and control runs.

An episode has a few classes, a few photos of each to learn from, others to test on, and a made-up name for each class.
Photos are known by their content: a file that occurs twice in a split is one photo, so an episode never learns from a
photo that it tests on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch

from saffe_cache.core.controls import STANDARD_ERRORS, Control, standard_error
from saffe_cache.core.devices import kept_memory
from saffe_cache.core.results import Estimate
from saffe_cache.fusion.fam import FusionAlignModule
from saffe_cache.fusion.options import FusionShape
from saffe_cache.studies.binding import fitting
from saffe_cache.studies.binding.config import BindConfig
from saffe_cache.studies.binding.fitting import Support, Weights
from saffe_cache.studies.binding.result import Chosen, Epochs, FewShot, Task

StartName = Literal["random", "ridge"]
STARTS: tuple[StartName, ...] = ("random", "ridge")
LEARNING_RATES: dict[StartName, tuple[float, ...]] = {"random": (1e-4, 3e-4, 1e-3), "ridge": (1e-5, 3e-5, 1e-4)}
RIDGE_STRENGTHS = (1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Multiples of the number of photos."""
CONTROL_EPISODES = 200
"""At most: a control is fitted again."""


@dataclass(frozen=True)
class Episodes:
    """Classes and names, int64 [episodes, ways], and photos, [episodes, ways, shots or queries].

    Photos and names are positions in what they were drawn from; none occurs twice in an episode.
    """

    classes: np.ndarray
    support: np.ndarray
    queries: np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.classes)

    def take(self, part: slice) -> Episodes:
        return Episodes(*(of[part] for of in vars(self).values()))

    def shuffled(self, seed: int) -> Episodes:
        """The photos of each support shuffled among its names: what a control learns from."""
        flat = self.support.reshape(len(self), -1)
        assigned = np.random.default_rng(seed).permuted(flat, axis=1)
        return replace(self, support=assigned.reshape(self.support.shape))


def draw_episodes(labels: np.ndarray, num_names: int, task: Task, num_episodes: int, seed: int) -> Episodes:
    """Draw classes, photos with `labels` int64 [photos], and names out of `num_names`, all without replacement.

    Raises:
        ValueError: too few classes have photos enough, or there are too few names.
    """
    needed = task.shots + task.queries
    found, counts = np.unique(labels, return_counts=True)
    able = found[counts >= needed]
    if len(able) < task.ways:
        raise ValueError(
            f"{task.name}: {task.ways} classes with {needed} photos each ({task.shots} to learn from, {task.queries} "
            f"to test on) are needed; {len(able)} of {len(found)} classes have them, the largest has "
            f"{counts.max(initial=0)}. Use fewer --ways, --shots or --queries."
        )
    if num_names < task.ways:
        raise ValueError(
            f"{task.name}: {task.ways} names are needed, the pool has {num_names}. Use a larger --num-names."
        )
    members = {int(label): np.flatnonzero(labels == label) for label in able}
    generator = np.random.default_rng((seed, task.ways, task.shots))
    classes = np.stack([generator.choice(able, task.ways, replace=False) for _ in range(num_episodes)])
    photos = np.array(
        [[generator.choice(members[label], needed, replace=False) for label in of_one] for of_one in classes.tolist()]
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
        return [state[torch.from_numpy(positions)].to(device).float() for state in self.states]


@dataclass(frozen=True)
class Episodic:
    """What the episodes of all settings share."""

    config: BindConfig
    shape: FusionShape
    names: np.ndarray
    """Unit vectors [names, d] to draw from."""
    device: str

    @kept_memory()
    def measure(self, task: Task, reported: Photos, tuning: Photos) -> FewShot:
        """Measure one setting in episodes of `reported`; those of `tuning` choose rates and the ridge's strength.

        Raises:
            ValueError: classes, photos or names are too few for the task.
        """
        seed, num_names = self.config.seed, len(self.names)
        episodes = draw_episodes(reported.labels, num_names, task, self.config.episodes, seed)
        chosen = self.choose(tuning, draw_episodes(tuning.labels, num_names, task, self.config.tuning_episodes, seed))
        found, epochs = self.run(reported, episodes, chosen, STARTS)
        shuffled, _ = self.run(reported, episodes.take(slice(CONTROL_EPISODES)).shuffled(seed), chosen, ("random",))
        systems = {name: values for name, values in found.items() if not name.endswith("blind")}
        controls = {f"{name}, photos shuffled": of for name, of in shuffled.items() if not name.endswith("blind")}
        controls |= {name: values for name, values in found.items() if name.endswith("blind")}
        fams = {name: values for name, values in systems.items() if name.startswith("fam")}
        taken: dict[str, Epochs] = {
            start: Epochs(mean=float(of.mean()), most=int(of.max())) for start, of in epochs.items()
        }
        return FewShot(
            **asdict(task),
            episodes=self.config.episodes,
            chance=1 / task.ways,
            systems={name: summary(values) for name, values in systems.items()},
            differences={name: summary(values - found["class_means"]) for name, values in fams.items()},
            controls={name: summary(values) for name, values in controls.items()},
            verdicts=tuple(judge_controls(task, controls)),
            chosen=chosen,
            epochs_to_convergence=taken,
        )

    def choose(self, tuning: Photos, episodes: Episodes) -> Chosen:
        """The ridge's strength by its accuracy, the learning rate of each start by its mean over all three readings."""
        whole = _Batch(self, tuning, episodes)
        strength = max(RIDGE_STRENGTHS, key=lambda strength: whole.ridge(strength)[1].mean())

        def accuracy(start: StartName, rate: float) -> float:
            chosen = Chosen(ridge_strength=strength, learning_rates={start: rate})
            found, _ = self.run(tuning, episodes, chosen, (start,))
            return float(np.mean([values.mean() for name, values in found.items() if name.startswith("fam")]))

        rates: dict[str, float] = {start: max(LEARNING_RATES[start], key=partial(accuracy, start)) for start in STARTS}
        return Chosen(ridge_strength=strength, learning_rates=rates)

    def run(
        self, photos: Photos, episodes: Episodes, chosen: Chosen, starts: Sequence[StartName]
    ) -> tuple[dict[str, np.ndarray], dict[StartName, np.ndarray]]:
        """The accuracy of each system in each episode, and the epochs that each fit took to converge."""
        num_photos = episodes.support[0].size + episodes.queries[0].size
        at_once = fitting.episodes_at_once(self.shape, num_photos, self.device)
        accuracies: defaultdict[str, np.ndarray] = defaultdict(partial(np.empty, len(episodes)))
        epochs: defaultdict[StartName, np.ndarray] = defaultdict(partial(np.empty, len(episodes), np.int64))
        for first in range(0, len(episodes), at_once):
            part = slice(first, first + at_once)
            batch = _Batch(self, photos, episodes.take(part), first)
            accuracies["class_means"][part] = batch.class_means()
            maps, accuracies["ridge"][part] = batch.ridge(chosen.ridge_strength)
            for start in starts:
                found, epochs[start][part] = batch.fam(start, chosen.learning_rates[start], maps)
                for name, values in found.items():
                    accuracies[name][part] = values
        return dict(accuracies), dict(epochs)


def summary(accuracies: np.ndarray) -> Estimate:
    """The mean over episodes with its normal interval."""
    mean, half = float(accuracies.mean()), 1.96 * standard_error(accuracies)
    return Estimate(value=mean, low=mean - half, high=mean + half)


def judge_controls(task: Task, controls: Mapping[str, np.ndarray]) -> list[Control]:
    """Each must be within three standard errors of chance."""
    tolerances = {name: STANDARD_ERRORS * standard_error(values) + 1e-9 for name, values in controls.items()}
    return [
        Control.within(f"{task.name}, {name}", "accuracy", float(values.mean()), 1 / task.ways, tolerances[name])
        for name, values in controls.items()
    ]


class _Batch:
    """Episodes that are fitted together."""

    def __init__(self, episodic: Episodic, photos: Photos, episodes: Episodes, first: int = 0) -> None:
        """`first`: number of the first of them, for the seeds of their heads."""
        self._episodic, self._photos, self._episodes = episodic, photos, episodes
        self._first = first
        self._names = torch.from_numpy(episodic.names[episodes.names]).to(episodic.device)

    @cached_property
    def _support(self) -> Support:
        return Support(self._photos.tokens(self._episodes.support, self._episodic.device), self._names)

    @cached_property
    def _queries(self) -> list[torch.Tensor]:
        tokens = self._photos.tokens(self._episodes.queries, self._episodic.device)
        return [state.flatten(1, 2) for state in tokens]

    @cached_property
    def _fams(self) -> tuple[FusionAlignModule, Weights]:
        first = self._episodic.config.seed * 1_000_003 + self._first
        return fitting.make_fams(self._episodic.shape, range(first, first + len(self._episodes)), self._episodic.device)

    def class_means(self) -> np.ndarray:
        """Accuracies of the nearest class mean."""
        summaries = self._photos.summaries
        return fitting.class_mean_accuracies(summaries[self._episodes.support], summaries[self._episodes.queries])

    def ridge(self, strength: float) -> tuple[tuple[torch.Tensor, torch.Tensor], np.ndarray]:
        """The ridge regression of each episode, and its accuracies."""
        support, queries = (
            torch.from_numpy(self._photos.features[of]).to(self._episodic.device)
            for of in (self._episodes.support, self._episodes.queries)
        )
        weight, bias = fitting.fit_ridges(support, self._names, strength)
        vectors = queries.flatten(1, 2) @ weight.transpose(1, 2) + bias
        return (weight, bias), fitting.name_accuracies(vectors, self._names)

    def fam(
        self, start: StartName, rate: float, ridge: tuple[torch.Tensor, ...]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Accuracies by reading, and epochs to convergence, [episodes]."""
        skeleton, weights = self._fams[0], {name: value.clone() for name, value in self._fams[1].items()}
        if start == "ridge":
            weights["head.linear.weight"].copy_(ridge[0])
            weights["head.linear.bias"].copy_(ridge[1][:, 0])
        num_episodes, num_queries = self._queries[0].shape[:2]
        found: defaultdict[str, np.ndarray] = defaultdict(lambda: np.full(num_episodes, np.nan))
        epochs = np.zeros(num_episodes, np.int64)
        for reading in fitting.fit(skeleton, weights, self._support, rate, self._episodic.config.max_epochs):
            who, after, names = reading.episodes.numpy(), reading.after, self._names[reading.episodes]
            queries = [state[reading.episodes] for state in self._queries]
            vectors = fitting.photo_vectors(skeleton, reading.weights, queries)
            name = f"{after} epoch{'s' * (after > 1)}" if after else "converged"
            found[f"fam from {start}, {name}"][who] = fitting.name_accuracies(vectors, names)
            if not after:
                same = fitting.photo_vectors(skeleton, reading.weights, [state[:, :1] for state in queries])
                blind = fitting.name_accuracies(same.expand(-1, num_queries, -1), names)
                found[f"fam from {start}, blind"][who] = blind  # it sees the same photo for every query
                epochs[who] = reading.epoch
        return dict(found), epochs
