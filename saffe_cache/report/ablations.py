"""ablation.json: what a sweep over settings found, one point a setting, several seeds a point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saffe_cache.core.json_schema import known_part, made_of
from saffe_cache.core.outputs import read_json
from saffe_cache.retrieval.metrics import seed_interval


class Spread(NamedTuple):
    """Over seeds."""

    mean: float
    half_interval: float | None
    """Of the 95 % t-interval of the mean; None with one seed."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting. Lists have one entry for each seed; all values are fractions."""

    x: str
    y: str | None
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    reports: tuple[str, ...]
    """Evaluation folders, from that of the ablation."""
    values: Mapping[str, tuple[float, ...]]
    chance: Mapping[str, float]
    baselines: Mapping[str, Mapping[str, tuple[float, ...]]]
    best_epoch: tuple[int, ...]
    failures: tuple[str, ...]
    trainable_parameters: int
    training_seconds: tuple[float, ...]
    evaluation_seconds: tuple[float, ...]
    fusing_flops: int | None = None
    """Of fusing one photo of the gallery; None where an earlier release did not count them."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points that are joined by a line."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A level that no setting changes."""

    name: str
    metric: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Published:
    """A number of others."""

    name: str
    x: str | None
    value: float
    metric: str
    """What it truly is."""
    note: str


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What the sweep cost, and what re-encoding at every step would have; None where the cache does not tell."""

    extraction_seconds: float
    training_seconds: float
    evaluation_seconds: float
    wall_seconds: float
    cache_bytes: int
    num_runs: int
    photos_seen: int
    texts_seen: int
    re_encoding_seconds: float | None
    photo_seconds: float | None
    text_seconds: float | None
    basis: str
    """How the seconds of re-encoding were come by."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A sweep."""

    title: str
    question: str
    metric: str
    protocol: str
    split: str
    dataset: str
    x_label: str
    y_label: str | None
    series: tuple[Series, ...]
    lines: tuple[Line, ...]
    published: tuple[Published, ...]
    ledger: Ledger
    definition: str = ""
    """Of the metrics, as the evaluations tell it."""

    @property
    def xs(self) -> list[str]:
        """Along the axis, in the order in which they are told."""
        return list(dict.fromkeys(point.x for series in self.series for point in series.points))

    @property
    def chance(self) -> list[float]:
        """Of the metric: one value, or several where settings change it."""
        points = [point for series in self.series for point in series.points]
        return list(dict.fromkeys(point.chance[self.metric] for point in points))

    def comparable(self) -> list[Published]:
        """Published numbers of the same metric, at a place of the axis."""
        return [one for one in self.published if one.metric == self.metric and one.x in self.xs]


def spread(values: Sequence[float]) -> Spread:
    """Mean, and half its 95 % t-interval."""
    mean, low, _ = seed_interval(values)
    return Spread(mean, mean - low if len(values) > 1 else None)


def read_ablation(path: Path) -> Ablation:
    """
    Raises:
        ValueError: a field is missing or of another kind, or lists do not fit each other.
    """
    content = read_json(path)
    try:
        ablation = made_of(Ablation, known_part(Ablation, content))
        _check(ablation)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}. Run the sweep that writes it again.") from None
    return ablation


def _check(ablation: Ablation) -> None:
    """
    Raises:
        ValueError: a point lacks the metric, or has another number of values than seeds.
    """
    if not any(series.points for series in ablation.series):
        raise ValueError("series: no points, expected at least one")
    for series in ablation.series:
        for point in series.points:
            where = f"series {series.name!r}, x {point.x!r}"
            if ablation.metric not in point.values or ablation.metric not in point.chance:
                raise ValueError(f"{where}: values or chance lack {ablation.metric}")
            if (point.y is None) != (ablation.y_label is None):
                raise ValueError(f"{where}: y is {point.y!r}, y_label {ablation.y_label!r}: both or neither")
            lists = {"reports": point.reports, "best_epoch": point.best_epoch}
            lists |= {"training_seconds": point.training_seconds, "evaluation_seconds": point.evaluation_seconds}
            lists |= {f"values: {name}": values for name, values in point.values.items()}
            for name, values in lists.items():
                if len(values) != len(point.seeds) or not values:
                    raise ValueError(f"{where}: {name} has {len(values)} entries for {len(point.seeds)} seeds")
            for name, metrics in point.baselines.items():
                for metric, values in metrics.items():
                    if not values:
                        raise ValueError(f"{where}: baselines: {name}: {metric} is empty")
