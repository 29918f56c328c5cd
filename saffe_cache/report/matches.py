"""match.json: does a text belong to a photo? Concatenation, cross-attention and what needs neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saffe_cache.core.json_schema import known_part, made_of
from saffe_cache.core.outputs import read_json

METRICS = ("accuracy", "f1", "precision", "recall", "auc")


@dataclass(frozen=True, kw_only=True)
class OverSeeds:
    """A mean with its 95 % t-interval, which several seeds have."""

    values: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        if self.low is None or self.high is None or len(self.values) < 2:
            return None
        return (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class MatchSetting:
    """One kind of pairs, at one number of them."""

    setting: str
    kind: str
    """clean, noise or rotation."""
    level: float
    negatives: int
    scale: int
    chance: float
    majority: float
    alignment: Mapping[str, float]
    systems: Mapping[str, Mapping[str, OverSeeds]]

    @property
    def num_seeds(self) -> int:
        return max(len(score.values) for scores in self.systems.values() for score in scores.values())


@dataclass(frozen=True, kw_only=True)
class MatchControl:
    """Where nothing can be found."""

    name: str
    auc: float
    limit: float | None
    passed: bool | None
    """None where it is not judged, nor has a limit."""


@dataclass(frozen=True, kw_only=True)
class MatchCost:
    """Of one fusion."""

    parameters: int
    flops_per_pair: int
    seconds_per_1000_pairs: float
    kept_bytes_per_pair: float


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """Error = a N^-b + c, N in thousands of pairs."""

    a: float
    b: float
    c: float


@dataclass(frozen=True, kw_only=True)
class Risks:
    """Of two fusions."""

    words: str
    names: tuple[str, ...]
    curves: Mapping[str, PowerLaw] | None = None
    """None where the sizes were too few."""
    crossover: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Pairs on a plane."""

    photos: tuple[tuple[float, ...], ...]
    texts: tuple[tuple[float, ...], ...]
    own_is_nearest: float


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What match.json says; all values are fractions."""

    title: str
    dataset: str
    split: str
    features: str
    settings: tuple[MatchSetting, ...]
    controls: tuple[MatchControl, ...]
    failures: tuple[str, ...]
    verdict: tuple[str, ...]
    cost: Mapping[str, MatchCost]
    crossovers: tuple[Risks, ...]
    planes: Mapping[str, Plane]
    meanings: Mapping[str, str]
    """What each system is."""
    features_in_words: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def of_sizes(self) -> list[MatchSetting]:
        """Features as they are, at the ratio that was measured at several sizes."""
        clean = [one for one in self.settings if one.kind == "clean"]
        return [one for one in clean if one.negatives == clean[0].negatives]

    def degraded(self, kind: str) -> list[MatchSetting]:
        """From clean features to the worst of a kind, at one size; empty where that was not measured."""
        of_kind = [one for one in self.settings if one.kind == kind]
        return [one for one in self.of_sizes if of_kind and one.scale == of_kind[0].scale] + of_kind


def matches_of(content: Mapping[str, Any], where: Path | str) -> Matches:
    """From JSON.

    Raises:
        ValueError: a field is missing or of another kind.
    """
    try:
        return made_of(Matches, known_part(Matches, content))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}. Run saffe match again.") from None


def read_matches(path: Path) -> Matches:
    """
    Raises:
        ValueError: a field is missing or of another kind.
    """
    return matches_of(read_json(path), path)
