"""Figures as plain data: a result says what is drawn, and saffe_cache.report.plots draws it. No matplotlib here.

Values are in the unit that their label names, mostly percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What all figures have."""

    name: str
    """Unique within a result's sections: part of its file names, so letters, digits and hyphens."""
    caption: str
    described: str = ""
    """For readers who cannot see it. Default: its numbers in words."""


@dataclass(frozen=True)
class Dot:
    """One value with its interval."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    kind: Literal["fam", "baseline", "control"] = "baseline"


@dataclass(frozen=True, kw_only=True)
class DotPlot(Figure):
    """Systems and controls below each other with their intervals, and chance as a line."""

    label: str
    """Of the values."""
    dots: Sequence[Dot]
    chance: float


@dataclass(frozen=True)
class Curve:
    """A line through points."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class CurvePlot(Figure):
    """Lines in one frame, such as precision over recall."""

    x_label: str
    y_label: str
    curves: Sequence[Curve]
    y_limits: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingPlot(Figure):
    """Loss on the left, validation score on the right; the kept epoch is marked."""

    score_label: str
    losses: Sequence[Curve]
    scores: Sequence[Curve]
    best_epoch: int


@dataclass(frozen=True, kw_only=True)
class ClassPlot(Figure):
    """A value of each class, several systems side by side."""

    label: str
    """Of the values."""
    classes: Sequence[str]
    systems: Sequence[tuple[str, Sequence[float]]]
    """Name, and one value for each class."""


@dataclass(frozen=True, kw_only=True)
class HeatMap(Figure):
    """A grid of cells with their numbers; the higher the value, the deeper the colour."""

    row_label: str
    column_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[float | None]]
    """One list for each row; None leaves a cell empty."""
    texts: Sequence[Sequence[str]] | None = None
    """Written in the cells. Default: the values with one decimal."""
    notes: Sequence[Sequence[str]] | None = None
    """Smaller, below the texts."""
    limits: tuple[float, float] | None = None
    """Values with no colour and with the deepest. Default: the lowest and the highest cell."""


@dataclass(frozen=True)
class Series:
    """Means with half intervals at some of a panel's places."""

    name: str
    places: Sequence[int]
    """Indices into the panel's places."""
    means: Sequence[float]
    halves: Sequence[float] = ()
    """Half intervals, 0 where there is none; empty where no point has one."""
    baselines: Sequence[Series] = ()
    """Baselines of the same points, drawn hollow in the same hue."""


@dataclass(frozen=True)
class Panel:
    """Series over the same named places."""

    places: Sequence[str]
    series: Sequence[Series]
    published: Sequence[tuple[str, int, float]] = ()
    """Published numbers: name, index of the place, value."""
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class SeriesPlot(Figure):
    """Series with error bars over named places: a frame for each panel, two in a row, on one vertical axis.

    Series of one name look alike in all panels.
    """

    x_label: str
    y_label: str
    panels: Sequence[Panel]
    levels: Sequence[tuple[str, float]] = ()
    """Horizontal lines, such as chance: name and value."""
    joined: bool = False
    """Whether lines join a series' points."""


@dataclass(frozen=True)
class Fit:
    """Measured points of one system and the curve fitted to them."""

    name: str
    points: Sequence[tuple[float, float]]
    curve: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class FitPlot(Figure):
    """Points and fitted curves over a logarithmic axis."""

    x_label: str
    y_label: str
    ticks: Sequence[float]
    """Of the horizontal axis."""
    fits: Sequence[Fit]


@dataclass(frozen=True)
class Plane:
    """Pairs of points on a plane; the same place in both sequences makes a pair."""

    title: str
    photos: Sequence[Sequence[float]]
    texts: Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class PlanePlot(Figure):
    """Pairs on planes side by side, with a line between the partners of a pair."""

    planes: Sequence[Plane]
