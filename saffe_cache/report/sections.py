"""Parts of a page: trainings, costs, sweeps and episodes."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from saffe_cache.core.tables import Table as SharedTable
from saffe_cache.evaluation.details import Details
from saffe_cache.report import plots, tables
from saffe_cache.report.ablations import Ablation, Series, Spread, spread
from saffe_cache.report.episodes import Episodes
from saffe_cache.report.galleries import Card
from saffe_cache.report.ledger import BASIS, Costs
from saffe_cache.report.plots import Bars, Curve, Plot
from saffe_cache.report.reading import LogLine, Run
from saffe_cache.report.tables import Sheet, Table
from saffe_cache.retrieval.metrics import metric_named


@dataclass(kw_only=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    lead: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Paragraphs below the first table."""
    table: Table | SharedTable | None = None
    words: list[tuple[str, str]] = field(default_factory=list)
    """Metrics and what they are."""
    plots: list[Plot] = field(default_factory=list)
    more: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    details: Details | None = None
    is_sound: bool = False


def run_section(run: Run, name: str, anchor: str, sheets: list[Sheet]) -> Section:
    result = run.result
    section = Section(
        anchor=anchor,
        title=f"Training of {name}",
        facts=[
            ("photos", f"{result.train_photos} to train, {result.validation_photos} to validate"),
            (
                "kept",
                f"epoch {result.best_epoch} of {max((line.epoch for line in run.log), default=0)}, at validation "
                f"{result.validation_score} {tables.percent(result.best_validation_score)}",
            ),
            ("steps", f"{result.steps} in {tables.duration(result.seconds)}"),
            ("parameters", f"{result.trainable_parameters:,}"),
            ("objective", ", ".join(f"{name}={weight}" for name, weight in _objective(run)) or "default"),
        ],
    )
    if run.log:
        logs = {"run": run.log, "control: permuted pairs": run.permuted_log}
        losses = [_curve(name, log, "loss", 1) for name, log in logs.items()]
        scores = [_curve(name, log, "validation_score", 100) for name, log in logs.items()]
        section.plots.append(
            plots.draw_training(
                f"{anchor}-training",
                [one for one in losses if one.xs],
                [one for one in scores if one.xs],
                result.best_epoch,
                f"{result.validation_score}, percent",
                "Training curves. Dotted: the epoch that is kept. The control was trained on permuted pairs.",
            )
        )
        rows = tuple(
            (which, line.epoch, line.loss, line.validation_score, line.seconds)
            for which, log in logs.items()
            for line in log
        )
        sheets.append(Sheet(f"{anchor}-training", ("which", "epoch", "loss", "validation_score", "seconds"), rows))
    return section


def _objective(run: Run) -> list[tuple[str, object]]:
    """Losses and their weights, where the config names some."""
    return list(dict(run.config.get("objective") or {}).items())


def _curve(name: str, log: Sequence[LogLine], column: str, factor: float) -> Curve:
    known = [(line.epoch, factor * getattr(line, column)) for line in log if getattr(line, column) is not None]
    return Curve(name, [epoch for epoch, _ in known], [value for _, value in known])


def costs_section(costs: Sequence[tuple[str, Costs]], sheets: list[Sheet]) -> Section:
    table, sheet = tables.ledger_table(costs)
    sheets.append(sheet)
    return Section(anchor="ledger", title="Cost ledger", lead=BASIS, table=table)


def ablation_section(ablation: Ablation, anchor: str, sheets: list[Sheet]) -> Section:
    points, sheet = tables.points_table(ablation, anchor)
    sheets.append(sheet)
    section = Section(
        anchor=anchor,
        title=ablation.title,
        lead=ablation.question,
        facts=[
            ("dataset", ablation.dataset),
            ("reported on", f"{ablation.protocol} protocol, split {ablation.split}"),
            ("metric", f"{ablation.metric}: {metric_named(ablation.metric).description}"),
            *([("definition", ablation.definition)] if ablation.definition else []),
        ],
        folded=[points],
    )
    if ablation.y_label is None:
        section.plots.append(_series_plot(ablation, anchor))
    else:
        for number, series in enumerate(ablation.series, start=1):
            section.plots += _heat_maps(ablation, series, f"{anchor}-{number}")
    baselines, published = tables.baselines_table(ablation), tables.published_table(ablation)
    if baselines:
        (section.more if ablation.y_label is None else section.folded).append(baselines)
    section.more += [published] if published else []
    section.more.append(tables.sweep_ledger(ablation))
    return section


_DRAWN_BASELINES = ("ridge", "linear_probe", "late_fusion_ridge")
"""Of those of each point, beside the one that finds most; the table has all."""


def _series_plot(ablation: Ablation, name: str) -> Plot:
    """Series over the same places share a frame; where the places are names, as of fusions, all share one, unjoined."""
    are_names = not all(re.fullmatch(r"[\d.+]+", x) for x in ablation.xs)
    frames: dict[tuple[str, ...], list[Bars]] = {}
    levels = [(line.name, 100 * line.value) for line in ablation.lines if line.metric == ablation.metric]
    for one in ablation.series:
        places = list(ablation.xs) if are_names else [point.x for point in one.points]
        found = {point.x: spread(point.values[ablation.metric]) for point in one.points}
        bars = _bars(one.name, places, {x: (of.mean, of.half_interval or 0.0) for x, of in found.items()})
        beside = []
        best = _best_baseline(one, ablation.metric)
        for baseline in dict.fromkeys((*_DRAWN_BASELINES, *([best] if best else []))):
            values = {
                point.x: (statistics.mean(point.baselines[baseline][ablation.metric]), 0.0)
                for point in one.points
                if ablation.metric in point.baselines.get(baseline, {})
            }
            beside += [_bars(baseline.replace("_", " "), places, values)] if values else []
        frames.setdefault(tuple(places), []).append(replace(bars, beside=beside))
    published = [(one.name, one.x or "", 100 * one.value) for one in ablation.comparable()]
    panels = [
        plots.Panel(places, series, [(who, places.index(x), value) for who, x, value in published if x in places])
        for places, series in frames.items()
    ]
    return plots.draw_series(
        name,
        panels,
        [*levels, ("chance", 100 * statistics.mean(ablation.chance))],
        (ablation.x_label, f"{ablation.metric}, percent"),
        "Mean over seeds with its 95 % t-interval. Hollow, in the same hue: baselines on the same layers and photos. "
        "Across: chance and what no setting changes." + (" Stars: published, in the same metric." if published else ""),
        joined=len(ablation.xs) > 1 and not are_names,
    )


def _bars(name: str, places: Sequence[str], found: Mapping[str, tuple[float, float]]) -> Bars:
    """Of fractions by place: mean and half interval."""
    known = [(places.index(x), 100 * mean, 100 * half) for x, (mean, half) in found.items()]
    return Bars(name, [place for place, _, _ in known], [mean for _, mean, _ in known], [half for _, _, half in known])


_MOST_ACROSS = 6
"""Cells with intervals that a phone has room for beside each other."""


@dataclass(frozen=True)
class _Grid:
    """A series as a heat map; the longer axis runs downwards where it has more places than fit beside each other."""

    across: list[str]
    down: list[str]
    labels: tuple[str, str]
    """Of the horizontal and of the vertical axis."""
    places: list[tuple[str, str]]
    """Of each point: across, down."""

    @staticmethod
    def of(series: Series, labels: tuple[str, str]) -> _Grid:
        """`labels`: of x and of y."""
        places = [(point.x, point.y or "") for point in series.points]
        across, down = (list(dict.fromkeys(one)) for one in zip(*places, strict=True))
        if len(across) > max(_MOST_ACROSS, len(down)):
            return _Grid(down, across, labels[::-1], [place[::-1] for place in places])
        return _Grid(across, down, labels, places)

    def draw(
        self, name: str, spreads: Sequence[Spread], limits: tuple[float, float], captions: tuple[str, str]
    ) -> Plot:
        """Mean and half interval of each point; `limits` of the colours, in percent; caption, and what it is of."""
        cells = np.full((len(self.down), len(self.across)), np.nan)
        texts, notes = ([[""] * len(self.across) for _ in self.down] for _ in range(2))
        told = []
        for (x, y), (mean, half) in zip(self.places, spreads, strict=True):
            row, column = self.down.index(y), self.across.index(x)
            cells[row, column], texts[row][column] = 100 * mean, tables.percent(mean)
            notes[row][column] = "" if half is None else f"± {tables.percent(half)}"
            told.append(f"{x}, {y}: {texts[row][column]} {notes[row][column]}".rstrip())
        caption, what = captions
        described = f"{what} by {self.labels[0]} and {self.labels[1]}: {'; '.join(told)}"
        axes_names = self.down, self.across
        return plots.draw_grid(
            name, cells, texts, axes_names, self.labels, caption, described, notes=notes, limits=limits
        )


def _heat_maps(ablation: Ablation, series: Series, name: str) -> list[Plot]:
    """The series, and the baseline that finds most in the same cells, in the same colours."""
    metric = ablation.metric
    grid = _Grid.of(series, (ablation.x_label, ablation.y_label or ""))
    own, found = [spread(point.values[metric]) for point in series.points], []
    baseline = _best_baseline(series, metric)
    if baseline:
        found = [spread(point.baselines[baseline][metric]) for point in series.points]
    means = [100 * one.mean for one in (*own, *found)]
    limits = min(means), max(means)
    chance = ", ".join(map(tables.percent, ablation.chance))
    how = f"{metric} in percent, mean over seeds; smaller, half of its 95 % t-interval"
    drawn = [grid.draw(name, own, limits, (f"{series.name}: {how}. Chance: {chance}.", f"{series.name}: {metric}"))]
    if baseline:
        who = f"Baseline {baseline.replace('_', ' ')}"
        higher = sum(mine.mean > other.mean for mine, other in zip(own, found, strict=True))
        caption = (
            f"{who}, the best one, in the same cells and colours: {how}. {series.name} has the higher mean in {higher} "
            f"of {len(own)}."
        )
        drawn.append(grid.draw(f"{name}-baseline", found, limits, (caption, f"{who}: {metric}")))
    return drawn


def _best_baseline(series: Series, metric: str) -> str | None:
    """The one that finds most on the mean of the cells, of those that all cells have."""
    means = {
        name: statistics.mean(spread(point.baselines[name][metric]).mean for point in series.points)
        for name in series.points[0].baselines
        if all(metric in point.baselines.get(name, {}) for point in series.points)
    }
    return max(means, key=lambda name: means[name], default=None)


def episodes_section(episodes: Episodes, anchor: str, sheets: list[Sheet]) -> Section:
    made, new = tables.episodes_tables(episodes, anchor)
    sheets += new
    section = Section(anchor=anchor, title=episodes.title, table=made[0])
    section.more += made[1:]
    if episodes.settings:
        names = [setting.name for setting in episodes.settings]

        series = [
            _bars(
                system,
                names,
                {
                    setting.name: (setting.systems[system].mean, setting.systems[system].half_interval)
                    for setting in episodes.settings
                    if system in setting.systems
                },
            )
            for system in episodes.systems
        ]
        chance = _bars("chance", names, {setting.name: (setting.chance, 0.0) for setting in episodes.settings})
        section.plots.append(
            plots.draw_series(
                anchor,
                [plots.Panel(names, [*series, chance])],
                [],
                ("episodes", "accuracy, percent"),
                "Accuracy with its 95 % interval over episodes.",
                joined=False,
            )
        )
    return section
