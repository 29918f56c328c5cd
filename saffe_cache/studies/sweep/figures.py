"""Figures of a sweep: series over one axis, or heat maps over two."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from saffe_cache.core.figures import HeatMap, Panel, Series, SeriesPlot
from saffe_cache.core.results import Estimate, series_of
from saffe_cache.core.tables import percent
from saffe_cache.retrieval.metrics import over_seeds

if TYPE_CHECKING:
    from saffe_cache.studies.sweep.result import SweepResult, SweepSeries

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
    caption = (
        "Mean over seeds with its 95 % t-interval. Hollow, in the same hue: baselines on the same layers and photos. "
        "Horizontal lines: chance, and systems that no setting changes."
    )
    levels = {one.name: one.value for one in result.levels} | {"chance": statistics.mean(result.chance)}
    return SeriesPlot(
        name="series",
        caption=caption + (" Stars: published, in the same metric." if published else ""),
        x_label=result.x_label,
        y_label=f"{result.metric}, percent",
        panels=[
            Panel(
                places,
                series,
                [(one.name, places.index(one.x), 100 * one.value) for one in published if one.x and one.x in places],
            )
            for places, series in frames.items()
        ],
        levels=[(name, 100 * value) for name, value in levels.items()],
        joined=len(all_places) > 1 and not are_names,
    )


def _series(of: SweepSeries, places: Sequence[str], metric: str) -> Series:
    """A series with its baselines."""

    def means(name: str, values: Mapping[str, Sequence[float]]) -> Series:
        return series_of(name, [over_seeds(values[x]) if x in values else None for x in places])

    best = _best_baseline(of, metric)
    baselines = []
    for name in dict.fromkeys((*_DRAWN_BASELINES, *([best] if best else []))):
        found = {point.x: point.baselines.get(name, {}).get(metric) for point in of.points}
        values = {x: one for x, one in found.items() if one is not None}
        if values:
            baselines.append(replace(means(name.replace("_", " "), values), halves=()))
    return replace(means(of.name, {point.x: point.values[metric] for point in of.points}), baselines=baselines)


def heat_maps(result: SweepResult) -> list[HeatMap]:
    """A map of each series, and one of the baseline that finds most in the same cells, in the same colours."""
    return [plot for number, of in enumerate(result.series, start=1) for plot in _heat_maps(result, of, number)]


def _heat_maps(result: SweepResult, series: SweepSeries, number: int) -> list[HeatMap]:
    """The longer axis runs downwards where it has no room across."""
    places, labels = [(point.x, point.y or "") for point in series.points], (result.x_label, result.y_label or "")
    columns, rows = (list(dict.fromkeys(axis)) for axis in zip(*places, strict=True))
    if len(columns) > max(_MOST_ACROSS, len(rows)):
        columns, rows, labels, places = rows, columns, labels[::-1], [place[::-1] for place in places]
    metric, baseline = result.metric, _best_baseline(series, result.metric)
    own = [over_seeds(point.values[metric]) for point in series.points]
    others = [over_seeds(point.baselines[baseline][metric]) for point in series.points] if baseline else []
    means = [100 * one.value for one in (*own, *others)]

    def draw(name: str, scores: Sequence[Estimate], caption: str) -> HeatMap:
        at = dict(zip(places, scores, strict=True))
        grid = [[at.get((column, row)) for column in columns] for row in rows]
        return HeatMap(
            name=name,
            caption=caption,
            row_label=labels[1],
            column_label=labels[0],
            rows=rows,
            columns=columns,
            cells=[[None if one is None else 100 * one.value for one in line] for line in grid],
            notes=[["" if one is None else one.half_cell().note for one in line] for line in grid],
            limits=(min(means), max(means)),
        )

    how = f"{metric} in percent, mean over seeds; smaller, half of its 95 % t-interval"
    chance = ", ".join(map(percent, result.chance))
    maps = [draw(f"map-{number}", own, f"{series.name}: {how}. Chance: {chance}.")]
    if baseline:
        higher = sum(mine.value > other.value for mine, other in zip(own, others, strict=True))
        caption = (
            f"Baseline {baseline.replace('_', ' ')}, the best one, in the same cells and colours: {how}. {series.name} "
            f"has the higher mean in {higher} of {len(own)}."
        )
        maps.append(draw(f"map-{number}-baseline", others, caption))
    return maps


def _best_baseline(series: SweepSeries, metric: str) -> str | None:
    """The one with the highest mean over the cells, of those that all cells have."""
    means = {
        name: statistics.mean(statistics.mean(point.baselines[name][metric]) for point in series.points)
        for name in series.points[0].baselines
        if all(metric in point.baselines.get(name, {}) for point in series.points)
    }
    return max(means, key=lambda name: means[name], default=None)
