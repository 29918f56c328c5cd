"""Episodes: a few classes, a few photos of each to learn from, others to be asked about, and a made-up name for each.

Photos are known by their content: a file that stands twice in a split is one photo, so that none is learned from and
asked about in one episode.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all episodes of a setting have in common."""

    ways: int
    """n: classes."""
    shots: int
    """k: photos of each to learn from, the support."""
    queries: int
    """Photos of each to be asked about."""

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
        """The photos of each support dealt anew among its names: what a control learns from."""
        flat = self.support.reshape(len(self), -1)
        dealt = np.random.default_rng(seed).permuted(flat, axis=1)
        return replace(self, support=dealt.reshape(self.support.shape))


def draw_episodes(labels: np.ndarray, num_names: int, task: Task, num_episodes: int, seed: int) -> Episodes:
    """Classes, photos and names, all without replacement within an episode, and anew for each.

    Args:
        labels: int64 [photos], the class of each.
        num_names: how many there are to draw from.
        task: what an episode has.
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
            f"{task}: {task.ways} classes with {needed} photos each ({task.shots} to learn from, {task.queries} to ask "
            f"about) are needed; {len(able)} of {len(found)} classes have them, the largest has "
            f"{counts.max(initial=0)}. Ask for fewer --ways, --shots or --queries."
        )
    if num_names < task.ways:
        raise ValueError(f"{task}: {task.ways} names are needed, the pool has {num_names}. Give more --num-names.")
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
