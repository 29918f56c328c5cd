"""Figures of the sections that are not yet made by the results themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saffe_cache.core import figures
from saffe_cache.core.figures import Curve, Dot, Figure
from saffe_cache.core.figures import Series as Bars

__all__ = ["Bars", "Curve", "Dot", "Plot"]
Plot = Figure


@dataclass(frozen=True)
class Panel:
    places: Sequence[str]
    series: Sequence[Bars]
    published: Sequence[tuple[str, int, float]] = ()


def _name(name: str) -> str:
    return name.removeprefix("old").removeprefix("-") or "figure"


def draw_dots(name: str, dots: Sequence[Dot], level: tuple[str, float], metric: str) -> Figure:
    caption = (
        f"{metric} of all systems with 95 % intervals. Diamond: the FAM. Discs: baselines. Hollow squares: "
        f"controls, which must lie at their level. Dotted: chance."
    )
    return figures.DotPlot(name=_name(name), caption=caption, label=f"{metric}, percent", dots=dots, chance=level[1])


def draw_curves(
    name: str, curves: Sequence[Curve], labels: tuple[str, str], caption: str, limits: tuple[float, float] | None = None
) -> Figure:
    return figures.CurvePlot(
        name=_name(name), caption=caption, x_label=labels[0], y_label=labels[1], curves=curves, y_limits=limits
    )


def draw_per_class(
    name: str, names: Sequence[str], systems: Sequence[tuple[str, Sequence[float]]], caption: str
) -> Figure:
    return figures.ClassPlot(
        name=_name(name), caption=caption, label="average precision, percent", classes=names, systems=systems
    )


def draw_grid(
    name: str,
    cells: np.ndarray,
    texts: Sequence[Sequence[str]],
    axes_names: tuple[Sequence[str], Sequence[str]],
    labels: tuple[str, str],
    caption: str,
    described: str,
    *,
    notes: Sequence[Sequence[str]] | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    return figures.HeatMap(
        name=_name(name),
        caption=caption,
        described=described,
        row_label=labels[1],
        column_label=labels[0],
        rows=axes_names[0],
        columns=axes_names[1],
        cells=[[None if np.isnan(value) else float(value) for value in row] for row in cells],
        texts=texts,
        notes=notes,
        limits=limits,
    )


def draw_series(
    name: str,
    panels: Sequence[Panel],
    levels: Sequence[tuple[str, float]],
    labels: tuple[str, str],
    caption: str,
    *,
    joined: bool,
) -> Figure:
    return figures.SeriesPlot(
        name=_name(name),
        caption=caption,
        x_label=labels[0],
        y_label=labels[1],
        panels=[figures.Panel(one.places, one.series, one.published) for one in panels],
        levels=levels,
        joined=joined,
    )
