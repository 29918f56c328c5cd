"""result.json of `saffe match`: does a text belong to a photo? Concatenation, cross-attention, and baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from saffe_cache.core import figures
from saffe_cache.core.figures import Figure, Fit, FitPlot, Panel, PlanePlot, SeriesPlot
from saffe_cache.core.results import Measurement, Section, series_of
from saffe_cache.core.tables import Cell, Row, Table, duration, flops, percent
from saffe_cache.studies.harness import StudyResult
from saffe_cache.studies.matching.config import BASELINES, FUSIONS
from saffe_cache.studies.matching.findings import (
    Findings,
    MadeAlignment,
    MatchCost,
    MatchSetting,
    Plane,
    degraded,
    of_first_ratio,
)

METRICS = {"accuracy": "accuracy", "f1": "F1", "precision": "precision", "recall": "recall", "auc": "AUC"}
"""Those that reports show."""
_DRAWN = ("concat", "cross", "cross_residual", "tokens", "ridge_products", "cosine")
"""Systems in figures, no more than there are colours; the tables have all."""
_EFFECTS = {
    "noise": "Noise on photos and texts destroys information",
    "rotation": "A rotation of the photos separates the two spaces and keeps all information",
}


@dataclass(frozen=True, kw_only=True)
class MatchResult(StudyResult, Findings):
    """Fusions and baselines at several sizes and degradations, with verdicts on the paper's claims."""

    verb: ClassVar[str] = "match"

    features: str
    """pre-aligned or non-aligned."""
    features_in_words: str
    made_alignment: MadeAlignment | None
    seeds: tuple[int, ...]
    cost: Mapping[str, MatchCost]
    planes: Mapping[str, Plane]
    skipped: tuple[str, ...]
    """What of the config was not measured, and why."""
    photos: Mapping[str, int]
    """In each part."""
    encoders: Mapping[str, str]
    layers_of_tokens: tuple[int, ...]

    def measurements(self) -> Iterator[Measurement]:
        for one in self.settings:
            chances = {"accuracy": one.chance, "auc": 0.5}
            for system, scores in one.systems.items():
                for metric, score in scores.items():
                    if metric != "shuffled_auc":
                        place = f"{one.setting}, {one.scale} pairs"
                        yield Measurement.of(place, system, metric, score, chances.get(metric))
        for control in self.controls:
            yield Measurement("", f"control: {control.name}", "auc", control.value, chance=control.level)

    def sections(self) -> list[Section]:
        main = max(of_first_ratio(self.settings), key=lambda one: one.scale)
        systems = {name for one in self.settings for name in one.systems}
        return [
            Section(
                title=f"Does a text belong to a photo? {self.title}",
                lead=f"Concatenation against cross-attention on {self.features_in_words}, split {self.split}.",
                facts=[
                    ("controls", self._control_counts()),
                    *(("not measured", one) for one in self.skipped),
                    ("time", f"{duration(self.total_seconds)} for all cells"),
                ],
                definitions=[(name, text) for name, text in {**BASELINES, **FUSIONS}.items() if name in systems],
                tables=[
                    *map(_setting_table, [main, *(one for one in self.settings if one != main)]),
                    self._cost_table(),
                    *_published_tables(),
                ],
                texts=[*(f"{one[0].upper()}{one[1:]}." for one in self.verdict), *PUBLISHED_NOTES],
                figures=self._figures(),
            )
        ]

    def page_sections(self, folder: Path) -> list[Section]:
        """All settings but the first are folded."""
        [section] = self.sections()
        last = len(self.settings)
        tables = [replace(table, folded=0 < place < last) for place, table in enumerate(section.tables)]
        return [replace(section, tables=tables)]

    def _control_counts(self) -> str:
        passed = [one.passed for one in self.controls]
        counts = f"{len(passed)}, of which {passed.count(False)} failed"
        return counts + (f" and {passed.count(None)} are undecided: more seeds, or classes" if None in passed else "")

    def _cost_table(self) -> Table:
        base = self.cost.get("concat")
        rows = []
        for name, cost in self.cost.items():
            ratio = f"{cost.seconds_per_1000_pairs / base.seconds_per_1000_pairs:.2f} of concat's" if base else ""
            cells = (
                Cell(f"{cost.parameters:,}"),
                Cell(flops(cost.flops_per_pair)),
                Cell(f"{1000 * cost.seconds_per_1000_pairs:.1f} ms", ratio),
                Cell(f"{cost.kept_bytes_per_pair / 1e3:.1f} KB"),
            )
            rows.append(Row(Cell(name), cells))
        header = ("", "parameters", "FLOPs per pair", "step of 1,000 pairs", "kept per pair")
        caption = "Cost of each fusion: two FLOPs for a multiplication and addition; memory kept for the gradient."
        return Table(caption, header, tuple(rows))

    def _figures(self) -> list[Figure]:
        """Accuracy by size, errors with fits, accuracy by degradation, pairs on a plane: whatever was measured."""
        found: list[Figure] = [self._size_plot()]
        if any(one.curves for one in self.crossovers):
            found.append(self._error_plot())
        levels = {kind: degraded(self.settings, kind) for kind in _EFFECTS}
        found += [_degradation_plot(of, kind) for kind, of in levels.items() if of]
        return found + ([_plane_plot(self.planes)] if self.planes else [])

    def _size_plot(self) -> SeriesPlot:
        settings = of_first_ratio(self.settings)
        caption = f"Accuracy at 1:{settings[0].negatives} by the number of training pairs"
        places = [f"{one.scale}" for one in settings]
        return _accuracy_plot("sizes", caption, settings, "training pairs", places, "chance")

    def _error_plot(self) -> FitPlot:
        settings = of_first_ratio(self.settings)
        curves = {system: curve for one in self.crossovers if one.curves for system, curve in one.curves.items()}
        scales = [one.scale for one in settings]
        sizes = np.geomspace(min(scales), max(scales), 60).tolist()
        errors = {
            system: [
                (one.scale, 100 * (1 - value))
                for one in settings
                if system in one.systems
                for value in one.systems[system]["accuracy"].values
            ]
            for system in curves
        }
        return FitPlot(
            name="errors",
            caption="Error of each seed, and its fit a N^-b + c.",
            described="Error by training pairs. " + "; ".join(one.sentence for one in self.crossovers),
            x_label="training pairs",
            y_label="error, percent",
            ticks=scales,
            fits=[Fit(name, errors[name], [(size, 100 * of(size)) for size in sizes]) for name, of in curves.items()],
        )


def _setting_table(setting: MatchSetting) -> Table:
    rows = []
    for name, scores in setting.systems.items():
        shuffled = Cell(percent(scores["shuffled_auc"].value))
        rows.append(Row(Cell(name), (*(scores[metric].half_cell() for metric in METRICS), shuffled)))
    for name, value, auc in (("chance", setting.chance, "50.0"), ("majority class", setting.majority, "")):
        empty = [Cell("")] * (len(METRICS) - 2)
        rows.append(Row(Cell(name), (Cell(percent(value)), *empty, Cell(auc), Cell(auc)), "chance"))
    cosines = ", ".join(f"{name.replace('_', ' ')} {value:z.2f}" for name, value in setting.alignment.items())
    half = "± half of the 95 % t-interval over seeds" if setting.num_seeds > 1 else "one seed"
    caption = (
        f"{setting.setting}, {setting.scale} training pairs; {setting.pairs['validation']} to choose on, "
        f"{setting.pairs['test']} to report on. Percent, {half}; the control has the photos shuffled."
    )
    caption += f" Mean cosines: {cosines}." if cosines else ""
    return Table(caption, ("", *METRICS.values(), "control AUC"), tuple(rows))


def _accuracy_plot(
    name: str, caption: str, settings: Sequence[MatchSetting], x_label: str, places: Sequence[str], chance: str
) -> SeriesPlot:
    """Accuracies, at a place for each setting, of the drawn systems that the last setting or several have.

    `chance` names the line: chance, or the majority class.
    """
    seeds = "with its 95 % t-interval over seeds" if settings[0].num_seeds > 1 else "one seed"
    found = {name: [one.systems.get(name, {}).get("accuracy") for one in settings] for name in _DRAWN}
    series = [series_of(name, of) for name, of in found.items() if of[-1] or len(of) - of.count(None) > 1]
    return SeriesPlot(
        name=name,
        caption=f"{caption}, {seeds}.",
        x_label=x_label,
        y_label="accuracy, percent",
        panels=[Panel(places, series)],
        levels=[(chance, 100 * (settings[0].chance if chance == "chance" else settings[0].majority))],
        joined=True,
    )


def _degradation_plot(levels: Sequence[MatchSetting], kind: str) -> SeriesPlot:
    cosines = [one.alignment.get("photos_with_clean") for one in levels]
    notes = ["" if cosine is None else f"\n({cosine:.2f})" for cosine in cosines]
    places = [f"{one.level:g}{note}" for one, note in zip(levels, notes, strict=True)]
    caption = f"{_EFFECTS[kind]}: accuracy at {levels[0].scale} pairs"
    label = f"{kind} (mean cosine with the clean photos)"
    return _accuracy_plot(kind, caption, levels, label, places, "majority class")


def _plane_plot(planes: Mapping[str, Plane]) -> PlanePlot:
    titles = {"own": "as they are", "ridge": "photos mapped by ridge"}
    drawn = [
        figures.Plane(f"{titles[name]}: {percent(of.own_is_nearest)} % nearest", of.photos, of.texts)
        for name, of in planes.items()
    ]
    return PlanePlot(
        name="planes",
        caption="t-SNE of matching pairs, with a line between partners. Above: the share of photos whose nearest text "
        "on the plane is their own.",
        described="Matching pairs on a plane: " + "; ".join(one.title for one in drawn),
        planes=drawn,
    )


PUBLISHED: Mapping[int, tuple[str, tuple[float, ...], Mapping[str, tuple[float, ...]]]] = {
    1: (
        "training pairs, balanced",
        (2048, 4096, 8192, 16384),
        {"concat": (77.9, 85.2, 89.2, 93.3), "cross": (73.5, 80.0, 84.4, 89.2)},
    ),
    2: (
        "noise, at 16,384 pairs",
        (0.0, 0.05, 0.1, 0.2, 0.3, 0.5),
        {"concat": (94.7, 91.1, 86.2, 83.3, 83.3, 83.3), "cross": (93.3, 89.2, 83.3, 83.3, 83.3, 83.3)},
    ),
}
"""Tables of arXiv 2606.01207: what varies, its values, and accuracies in percent."""
PUBLISHED_NOTES = (
    "The published numbers are of another CLIP, and of pairs split 80/20 at random: the same photo and caption occur "
    "on both sides.",
    "The published Table 2 ends at 83.3 in a task described as balanced: that is the majority class at 1:5.",
    "The published fusion of eq. 2 and 3 cannot see the text, and would be at chance: the 757K parameters must belong "
    "to another one.",
)


def _published_tables() -> list[Table]:
    return [
        Table(
            f"Published accuracy by {what}, percent (arXiv 2606.01207, Table {number}; CLIP ViT-B/32, Flickr8k).",
            ("", *(f"{value:g}" for value in values)),
            tuple(Row(Cell(name), tuple(Cell(f"{one:.1f}") for one in of)) for name, of in systems.items()),
        )
        for number, (what, values, systems) in PUBLISHED.items()
    ]
