"""Figures of a sweep: series over one axis, or heat maps over two."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from saffe_cache.core.figures import HeatMap, Panel, Series, SeriesPlot
from saffe_cache.core.results import series_of
from saffe_cache.core.tables import percent
from saffe_cache.retrieval.metrics import over_seeds

if TYPE_CHECKING:
    from saffe_cache.studies.sweep.result import SweepPoint, SweepResult, SweepSeries

_DRAWN_BASELINES = ("ridge", "linear_probe", "late_fusion_ridge")
"""The baselines of each point that are drawn, with the one that finds most; the table has all."""
_MOST_ACROSS = 6
"""Cells with intervals that a phone has room for side by side."""


def series_plot(result: SweepResult) -> SeriesPlot:
    """Series over the same places share a frame; where the places are names, as of fusions, all share one, unjoined."""
    all_places = list(dict.fromkeys(point.x for _, point in result.points))
    are_names = not all(re.fullmatch(r"[\d.+]+", x) for x in all_places)
    frames: dict[tuple[str, ...], list[Series]] = {}
    for one in result.series:
        places = all_places if are_names else [point.x for point in one.points]
        frames.setdefault(tuple(places), []).append(_series(one, places, result.metric))
    published = [one for one in result.published if one.metric == result.metric and one.x in all_places]
    panels = [
        Panel(
            places,
            series,
            [(one.name, places.index(one.x), 100 * one.value) for one in published if one.x and one.x in places],
        )
        for places, series in frames.items()
    ]
    caption = (
        "Mean over seeds with its 95 % t-interval. Hollow, in the same hue: baselines on the same layers and photos. "
        "Horizontal lines: chance, and systems that no setting changes."
    )
    return SeriesPlot(
        name="series",
        caption=caption + (" Stars: published, in the same metric." if published else ""),
        x_label=result.x_label,
        y_label=f"{result.metric}, percent",
        panels=panels,
        levels=[
            *((one.name, 100 * one.value) for one in result.levels),
            ("chance", 100 * statistics.mean(result.chance)),
        ],
        joined=len(all_places) > 1 and not are_names,
    )


def _series(of: SweepSeries, places: Sequence[str], metric: str) -> Series:
    """A series with its baselines."""
    best = _best_baseline(of, metric)
    baselines = []
    for name in dict.fromkeys((*_DRAWN_BASELINES, *([best] if best else []))):
        values = {
            point.x: point.baselines[name][metric] for point in of.points if metric in point.baselines.get(name, {})
        }
        if values:
            baselines.append(replace(_means(name.replace("_", " "), places, values), halves=()))
    own = _means(of.name, places, {point.x: point.values[metric] for point in of.points})
    return replace(own, baselines=baselines)


def _means(name: str, places: Sequence[str], values: Mapping[str, Sequence[float]]) -> Series:
    """Of fractions by place: means and half intervals in percent."""
    return series_of(name, [over_seeds(values[x]) if x in values else None for x in places])


def heat_maps(result: SweepResult) -> list[HeatMap]:
    """A map of each series, and one of the baseline that finds most in the same cells, in the same colours."""
    return [plot for number, of in enumerate(result.series, start=1) for plot in _heat_maps(result, of, number)]


def _heat_maps(result: SweepResult, series: SweepSeries, number: int) -> list[HeatMap]:
    metric = result.metric
    baseline = _best_baseline(series, metric)
    own = [point.values[metric] for point in series.points]
    found = [point.baselines[baseline][metric] for point in series.points] if baseline else []
    means = [100 * statistics.mean(values) for values in (*own, *found)]
    grid = _Grid.of(series.points, (result.x_label, result.y_label or ""), (min(means), max(means)))
    chance = ", ".join(map(percent, result.chance))
    how = f"{metric} in percent, mean over seeds; smaller, half of its 95 % t-interval"
    maps = [grid.draw(f"map-{number}", own, f"{series.name}: {how}. Chance: {chance}.")]
    if baseline:
        higher = sum(statistics.mean(mine) > statistics.mean(other) for mine, other in zip(own, found, strict=True))
        caption = (
            f"Baseline {baseline.replace('_', ' ')}, the best one, in the same cells and colours: {how}. {series.name} "
            f"has the higher mean in {higher} of {len(own)}."
        )
        maps.append(grid.draw(f"map-{number}-baseline", found, caption))
    return maps


@dataclass(frozen=True)
class _Grid:
    """The places of a series' points; the longer axis runs downwards where it has no room across."""

    columns: list[str]
    rows: list[str]
    labels: tuple[str, str]
    """Of the horizontal and of the vertical axis."""
    places: list[tuple[str, str]]
    """Of each point: column, row."""
    limits: tuple[float, float]
    """Values of no and of the deepest colour."""

    @staticmethod
    def of(points: Sequence[SweepPoint], labels: tuple[str, str], limits: tuple[float, float]) -> _Grid:
        places = [(point.x, point.y or "") for point in points]
        columns, rows = (list(dict.fromkeys(one)) for one in zip(*places, strict=True))
        if len(columns) > max(_MOST_ACROSS, len(rows)):
            return _Grid(rows, columns, labels[::-1], [place[::-1] for place in places], limits)
        return _Grid(columns, rows, labels, places, limits)

    def draw(self, name: str, values: Sequence[Sequence[float]], caption: str) -> HeatMap:
        """`values`: fractions of each point, one for each seed."""
        cells: list[list[float | None]] = [[None] * len(self.columns) for _ in self.rows]
        notes = [[""] * len(self.columns) for _ in self.rows]
        for (column, row), of in zip(self.places, values, strict=True):
            place = self.rows.index(row), self.columns.index(column)
            score = over_seeds(of)
            cells[place[0]][place[1]] = 100 * score.value
            notes[place[0]][place[1]] = score.half_cell().note
        return HeatMap(
            name=name,
            caption=caption,
            row_label=self.labels[1],
            column_label=self.labels[0],
            rows=self.rows,
            columns=self.columns,
            cells=cells,
            notes=notes,
            limits=self.limits,
        )


def _best_baseline(series: SweepSeries, metric: str) -> str | None:
    """The one with the highest mean over the cells, of those that all cells have."""
    means = {
        name: statistics.mean(statistics.mean(point.baselines[name][metric]) for point in series.points)
        for name in series.points[0].baselines
        if all(metric in point.baselines.get(name, {}) for point in series.points)
    }
    return max(means, key=lambda name: means[name], default=None)
