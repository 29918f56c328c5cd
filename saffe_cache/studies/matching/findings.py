"""What a comparison of fusions finds: scores of cells and over seeds, verdicts, costs. Parts of its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saffe_cache.core.controls import Control
from saffe_cache.core.results import Estimate
from saffe_cache.retrieval.metrics import over_seeds


@dataclass(frozen=True, kw_only=True)
class OverSeeds(Estimate):
    """The mean of a score over seeds."""

    values: tuple[float, ...]
    """One for each seed."""

    @classmethod
    def of(cls, values: Sequence[float]) -> OverSeeds:
        return cls(values=tuple(values), **vars(over_seeds(values)))


@dataclass(frozen=True, kw_only=True)
class SystemScores:
    """One system with one seed."""

    test: Mapping[str, float]
    """By metric, on the pairs of the report."""
    shuffled: Mapping[str, float]
    """The same with the photos shuffled: a control."""
    chosen: float | None = None
    """A baseline's strength, chosen on validation."""
    best_epoch: int | None = None
    validation_accuracy: tuple[float, ...] = ()
    """Of a fusion, after each epoch."""
    losses: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MatchCell:
    """What is measured together, for one seed. A cell of the study."""

    pairs: Mapping[str, int]
    """In each part: train, validation and test."""
    majority: float
    """Share of the more frequent label."""
    systems: Mapping[str, SystemScores]
    alignment: Mapping[str, float]
    """Mean cosines of the features; empty unless baselines are measured."""


@dataclass(frozen=True, kw_only=True)
class MatchSetting:
    """One kind of pairs at one number of them, over seeds."""

    setting: str
    kind: str
    """clean, noise or rotation."""
    level: float
    negatives: int
    scale: int
    pairs: Mapping[str, int]
    chance: float
    """Accuracy of guesses in the labels' proportions."""
    majority: float
    alignment: Mapping[str, float]
    systems: Mapping[str, Mapping[str, OverSeeds]]

    @property
    def num_seeds(self) -> int:
        return max(len(score.values) for scores in self.systems.values() for score in scores.values())


def of_first_ratio(settings: Sequence[MatchSetting]) -> list[MatchSetting]:
    """Clean features at the ratio that was measured at all sizes."""
    clean = [one for one in settings if one.kind == "clean"]
    return [one for one in clean if one.negatives == clean[0].negatives]


def degraded(settings: Sequence[MatchSetting], kind: str) -> list[MatchSetting]:
    """From clean features to the most degraded of a kind, at one size; empty where that was not measured."""
    of_kind = [one for one in settings if one.kind == kind]
    return [one for one in of_first_ratio(settings) if of_kind and one.scale == of_kind[0].scale] + of_kind


@dataclass(frozen=True, kw_only=True)
class MadeAlignment:
    """What a ridge regression that made features pre-aligned did to the report's pairs. A cell of the study."""

    photos: int
    """That it was fitted on."""
    matches: int
    others: int
    strength: float
    auc_before: float | None
    """AUC of the cosine without the map; None where widths differ."""
    auc: float
    auc_permuted: tuple[float, ...]
    """After maps fitted on permuted pairs."""


@dataclass(frozen=True, kw_only=True)
class Lead:
    """Concatenation's lead over another fusion at one size, against the paper's rule."""

    contender: str
    size: int
    lead: Estimate
    holds: bool | None
    """None where it is undecided."""


@dataclass(frozen=True, kw_only=True)
class Trend:
    """How concatenation's lead changes as features are degraded."""

    kind: str
    contender: str
    scale: int
    changes: Mapping[str, Estimate]
    """By level, less the lead on clean features."""
    grown: tuple[str, ...]
    fallen: tuple[str, ...]
    sentence: str


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """Error = a N^-b + c, N in thousands of pairs."""

    a: float
    b: float
    c: float

    def __call__(self, size: float) -> float:
        """The error at `size` pairs."""
        return float(self.a * np.power(size / 1000, -self.b) + self.c)


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """Where the errors of two fusions meet."""

    names: tuple[str, ...]
    sentence: str
    curves: Mapping[str, PowerLaw] | None = None
    """None where there are too few sizes."""
    sizes: tuple[int, ...] = ()
    crossover: float | None = None
    """Training pairs; None where the curves do not meet within the measured sizes."""
    low: float | None = None
    """Of 95 % of the crossovers of resampled seeds."""
    high: float | None = None
    share: float | None = None
    """Share of the resamples that have a crossover."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What follows from all cells."""

    settings: tuple[MatchSetting, ...]
    controls: tuple[Control, ...]
    rule: tuple[Lead, ...]
    degradation: tuple[Trend, ...]
    crossovers: tuple[Crossover, ...]
    verdict: tuple[str, ...]
    """Sentences on all of these."""


@dataclass(frozen=True, kw_only=True)
class MatchCost:
    """Cost of one fusion. A cell of the study."""

    parameters: int
    flops_per_pair: int
    seconds_per_1000_pairs: float
    """Of a training step."""
    kept_bytes_per_pair: float
    """Memory kept for the gradient."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Matching pairs on a plane, by t-SNE. A cell of the study."""

    photos: tuple[tuple[float, ...], ...]
    texts: tuple[tuple[float, ...], ...]
    own_is_nearest: float
    """Share of photos whose nearest text on the plane is their own."""
