"""What a comparison of fusions finds: scores of cells and over seeds, verdicts, costs. Parts of its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saffe_cache.retrieval.metrics import seed_interval


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean with its 95 % t-interval over seeds, which takes several."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def over(cls, values: Sequence[float]) -> Difference:
        """Over one value for each seed."""
        mean, low, high = seed_interval(values)
        return cls(mean=mean, low=low, high=high) if len(values) > 1 else cls(mean=mean, low=None, high=None)

    @classmethod
    def paired(cls, first: Sequence[float], second: Sequence[float]) -> Difference:
        """First less second, by seed."""
        return cls.over([a - b for a, b in zip(first, second, strict=True)])

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes 0; 0 if it does not, or there is none."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def points(self) -> str:
        """In percentage points, with the interval."""
        mean = f"{100 * self.mean:+.1f}"
        if self.low is None or self.high is None:
            return f"{mean} (one seed)"
        return f"{mean} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True, kw_only=True)
class OverSeeds:
    """A score of each seed, with the mean and its interval."""

    values: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> OverSeeds:
        return cls(values=tuple(values), **vars(Difference.over(values)))

    @property
    def half(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


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

    setting: str
    kind: str
    """clean, noise or rotation."""
    level: float
    negatives: int
    scale: int
    permuted: bool
    """Trained on permuted labels: a control."""
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
    lead: Difference
    holds: bool | None
    """None where it is undecided."""


@dataclass(frozen=True, kw_only=True)
class Trend:
    """How concatenation's lead changes as features are degraded."""

    kind: str
    contender: str
    scale: int
    changes: Mapping[str, Difference]
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
class MatchCost:
    """Cost of one fusion."""

    parameters: int
    flops_per_pair: int
    seconds_per_1000_pairs: float
    """Of a training step."""
    kept_bytes_per_pair: float
    """Memory kept for the gradient."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Matching pairs on a plane, by t-SNE."""

    photos: tuple[tuple[float, ...], ...]
    texts: tuple[tuple[float, ...], ...]
    own_is_nearest: float
    """Share of photos whose nearest text on the plane is their own."""


@dataclass(frozen=True, kw_only=True)
class Planes:
    """By how photos were placed: as they are, or mapped by a ridge regression. A cell of the study."""

    planes: Mapping[str, Plane]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of each fusion. A cell of the study."""

    costs: Mapping[str, MatchCost]
