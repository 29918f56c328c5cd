"""result.json of `saffe ablate`, one for each recipe: every cell over its seeds, with baselines, controls and costs."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from saffe_cache.core.features import NOUNS, Modality, nouns, spoken_of
from saffe_cache.core.figures import HeatMap, Panel, Series, SeriesPlot
from saffe_cache.core.results import Estimate, Measurement, Result, Section, series_of
from saffe_cache.core.tables import ABSENT, Cell, Row, Table, duration, flops, interval_cell, percent, plain_row, size
from saffe_cache.retrieval.metrics import over_seeds

Values = Mapping[str, Mapping[str, tuple[float, ...]]]
"""Of each system and metric: one value for each seed."""
_MOST_ROWS = 12
"""Of a table that a page shows unfolded."""
_DRAWN_BASELINES = ("ridge", "linear_probe", "late_fusion_ridge")
"""The baselines of each point that are drawn, with the one that finds most; the table has all."""
_MOST_ACROSS = 6
"""Cells with intervals that a phone has room for side by side."""


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One cell of the grid. Values are fractions; lists have one entry for each seed."""

    x: str
    y: str | None
    settings: Mapping[str, Any]
    """Options of the training, and `storage`."""
    seeds: tuple[int, ...]
    reports: tuple[str, ...]
    """Folders of the evaluations, seen from the folder of this result."""
    values: Mapping[str, tuple[float, ...]]
    """The FAM's, by metric."""
    chance: Mapping[str, float]
    baselines: Values
    controls: Values
    best_epoch: tuple[int, ...]
    failures: tuple[str, ...]
    """Failed controls, each with its seed."""
    trainable_parameters: int
    fusing_flops: int
    """For one photo of the gallery."""
    training_seconds: tuple[float, ...]
    training_peak_memory_mb: tuple[int, ...]
    evaluation_seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        lists = {"reports": self.reports, "best_epoch": self.best_epoch, **self.values}
        for name, values in lists.items():
            if len(values) != len(self.seeds) or not values:
                raise ValueError(f"x {self.x!r}: {name} has {len(values)} entries for {len(self.seeds)} seeds")

    @property
    def systems(self) -> dict[str, Mapping[str, tuple[float, ...]]]:
        """The FAM, baselines and controls, as measurements name them."""
        controls = {f"control: {name}": of for name, of in self.controls.items()}
        return {"fam": self.values, **self.baselines, **controls}


@dataclass(frozen=True, kw_only=True)
class SweepSeries:
    """Points that a line joins."""

    name: str
    points: tuple[SweepPoint, ...]

    def best_baseline(self, metric: str) -> str | None:
        """The one with the highest mean over the points, of those that all points have."""
        means = {
            name: statistics.mean(statistics.mean(point.baselines[name][metric]) for point in self.points)
            for name in self.points[0].baselines
            if all(metric in point.baselines.get(name, {}) for point in self.points)
        }
        return max(means, key=lambda name: means[name], default=None)


@dataclass(frozen=True, kw_only=True)
class Level:
    """A system whose value no setting changes."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Published:
    """A number from a paper."""

    name: str
    value: float
    """A fraction."""
    metric: str
    """What it truly is."""
    note: str
    x: str | None = None
    """Its place on the x axis."""


@dataclass(frozen=True, kw_only=True)
class SweepCost:
    """What the sweep cost, each run counted once, and what encoders in the loop would have cost; None where unknown.

    Runs and reports record their seconds, whichever commands made them; loading and starting are not included.
    """

    num_runs: int
    workers: int
    """Processes that ran side by side."""
    extraction_seconds: float
    training_seconds: float
    control_seconds: float
    evaluation_seconds: float
    cache_bytes: int
    photos_seen: int
    texts_seen: int
    re_encoding_seconds: float | None
    photo_seconds: float | None
    """To encode one photo."""
    text_seconds: float | None
    basis: str
    """Where the rates of encoding are from."""

    @property
    def wall_seconds(self) -> float:
        """About."""
        return (self.training_seconds + self.control_seconds + self.evaluation_seconds) / self.workers


@dataclass(frozen=True, kw_only=True)
class SweepResult(Result):
    """What came of a recipe."""

    verb: ClassVar[str] = "ablate"

    title: str
    question: str
    dataset: str
    medium: Modality = "image"
    """Of the galleries; "media" where several are fused, or compared."""
    protocol: str
    definition: str
    split: str
    metric: str
    """That is plotted."""
    x_label: str
    y_label: str | None
    """None where there is one axis."""
    series: tuple[SweepSeries, ...]
    levels: tuple[Level, ...]
    """Of the plotted metric."""
    published: tuple[Published, ...]
    cost: SweepCost

    @property
    def points(self) -> list[tuple[str, SweepPoint]]:
        """By name: series and place."""
        return [(", ".join(filter(None, (of.name, one.x, one.y))), one) for of in self.series for one in of.points]

    @property
    def chance(self) -> list[float]:
        """Of the plotted metric: one value, or several where settings change it."""
        return list(dict.fromkeys(point.chance[self.metric] for _, point in self.points))

    def measurements(self) -> Iterator[Measurement]:
        for name, point in self.points:
            for system, scores in point.systems.items():
                for metric, values in scores.items():
                    yield Measurement.of(name, system, metric, over_seeds(values), point.chance.get(metric))

    def sections(self) -> list[Section]:
        return [
            Section(
                title=self.title,
                lead=self.question,
                facts=[
                    ("dataset", self.dataset),
                    ("reported on", f"{self.protocol} protocol, split {self.split}"),
                    ("definition", self.definition),
                ],
                tables=[self._main_table(), *self._published_table(), self._cost_table(), self._metrics_table()],
                texts=[f"{one.name}, which no setting changes: {percent(one.value)}." for one in self.levels],
                figures=[series_plot(self)] if self.y_label is None else [*heat_maps(self)],
            )
        ]

    @property
    def _place(self) -> str:
        return ", ".join(filter(None, ("series", self.x_label, self.y_label)))

    def _main_table(self) -> Table:
        """The plotted metric of all systems, and costs."""
        metric, points = self.metric, self.points
        names = dict.fromkeys(name for _, point in points for name, of in point.systems.items() if metric in of)
        others = sorted((name for name in names if name != "fam"), key=lambda name: name.startswith("control: "))
        rows = []
        for place, point in points:
            cells = [
                _score_cell(metric, point.values[metric]),
                *(_mean_cell(metric, point.systems.get(name, {}).get(metric)) for name in others),
                _mean_cell(metric, (point.chance[metric],)),
                Cell(" ".join(map(str, point.best_epoch))),
                Cell(f"{point.trainable_parameters / 1e6:.2f} M"),
                Cell(flops(point.fusing_flops)),
                Cell(f"{sum(point.training_seconds) / len(point.seeds):.0f}"),
                Cell(f"{max(point.training_peak_memory_mb)}"),
            ]
            rows.append(Row(Cell(place), tuple(cells), "failed" if point.failures else "plain"))
        costs = ("best epoch", "parameters", spoken_of("FLOPs a photo", self.medium), "training s", "MB")
        caption = (
            f"{metric} in percent: the FAM's mean over seeds with its 95 % t-interval; means of baselines, on the "
            f"same layers and {nouns([self.medium])}, and of controls."
        )
        header = (self._place, metric, *others, "chance", *costs)
        return Table(caption, header, tuple(rows), folded=len(rows) > _MOST_ROWS)

    def _metrics_table(self) -> Table:
        """All metrics of the FAM."""
        metrics = list(dict.fromkeys(metric for _, point in self.points for metric in point.values))
        rows = [
            Row(Cell(name), tuple(_score_cell(one, of.values.get(one)) for one in metrics)) for name, of in self.points
        ]
        caption = "All metrics of the FAM in percent, mean over seeds with its 95 % t-interval."
        return Table(caption, (self._place, *metrics), tuple(rows), folded=True)

    def _published_table(self) -> list[Table]:
        rows = [
            plain_row(one.name, one.x or ABSENT, percent(one.value), one.metric, one.note) for one in self.published
        ]
        caption = "Published numbers and their true metric. The plot shows those of its own metric."
        return [Table(caption, ("", self.x_label, "percent", "metric", "note"), tuple(rows))] if rows else []

    def _cost_table(self) -> Table:
        of, noun = self.cost, NOUNS[self.medium]
        rows = {
            "runs": f"{of.num_runs}, {of.workers} at a time",
            "extraction, once": duration(of.extraction_seconds),
            "training, all runs": duration(of.training_seconds),
            "training the controls, all runs": duration(of.control_seconds),
            "evaluation, all runs": duration(of.evaluation_seconds),
            "wall-clock time, about": duration(of.wall_seconds),
            "cache": size(of.cache_bytes),
            f"{noun}s and texts seen in training": f"{of.photos_seen:,} and {of.texts_seen:,}",
            "re-encoding them at every step would have cost": duration(of.re_encoding_seconds),
            f"encoding one {noun}, one text": f"{duration(of.photo_seconds)}, {duration(of.text_seconds)}",
        }
        return Table(f"Cost. Rates of encoding: {of.basis}.", ("", ""), tuple(plain_row(*row) for row in rows.items()))


def _score_cell(metric: str, values: Sequence[float] | None) -> Cell:
    """Mean and interval; shares lie between 0 and 100."""
    score = over_seeds(values) if values else None
    if score is None or score.low is None or score.high is None or metric.endswith("median_rank"):
        return _mean_cell(metric, values)
    return interval_cell(score.value, max(0, score.low), min(1, score.high))


def _mean_cell(metric: str, values: Sequence[float] | None) -> Cell:
    if values is None:
        return Cell(ABSENT)
    mean = sum(values) / len(values)
    return Cell(f"{mean:.0f}" if metric.endswith("median_rank") else percent(mean))


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
        "Mean over seeds with its 95 % t-interval. Hollow, in the same hue: baselines on the same layers and "
        f"{nouns([result.medium])}. Horizontal lines: chance, and systems that no setting changes."
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

    best = of.best_baseline(metric)
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
    metric, baseline = result.metric, series.best_baseline(result.metric)
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
