"""result.json of `saffe subsets`: every subset of the media of fused items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from saffe_cache.core.controls import Control
from saffe_cache.core.results import Estimate, Measurement, Section
from saffe_cache.core.tables import ABSENT, Cell, Row, RowKind, Table, percent
from saffe_cache.retrieval.metrics import metric_named, over_seeds
from saffe_cache.studies.harness import StudyResult


@dataclass(frozen=True, kw_only=True)
class SubsetsCell:
    """One fusion with one seed: the metric of each query. A cell of the study."""

    shown: Mapping[str, tuple[float, ...]]
    """Of the model of all media, by the subset that it is shown."""
    alone: Mapping[str, tuple[float, ...]]
    """Of the models that were trained on a smaller subset."""
    late: tuple[float, ...]
    """Of the weighted sum of the scores of the models of one medium each."""
    late_weights: tuple[float, ...]
    validation: Mapping[str, float]
    """By the subset that a model was trained on."""
    shuffled: Mapping[str, tuple[float, ...]]
    """Of the model of all media, where one is another item's."""
    permuted: tuple[float, ...] | None
    """Of a model that was trained on permuted texts; with the first seed."""
    chance: float


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A difference on the same queries."""

    name: str
    difference: Estimate
    """With its interval over items, of the mean over seeds."""
    by_seed: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FusionOfMedia:
    """One fusion, over all seeds; fields as of a cell."""

    shown: Mapping[str, Estimate]
    alone: Mapping[str, Estimate]
    late: Estimate
    late_weights: tuple[float, ...]
    shuffled: Mapping[str, Estimate]
    values: tuple[float, ...]
    """Of each query with all media, so that fusions can be compared in pairs."""
    gains: tuple[Gain, ...]


@dataclass(frozen=True, kw_only=True)
class SubsetsResult(StudyResult):
    """Fusions of several media; values are fractions."""

    verb: ClassVar[str] = "subsets"

    modalities: tuple[str, ...]
    encoders: tuple[str, ...]
    seeds: tuple[int, ...]
    metric: str
    chance: float
    items: Mapping[str, int]
    """By part: train, validation, test."""
    fusions: Mapping[str, FusionOfMedia]
    differences: Mapping[str, Estimate]
    """Of two fusions with all media, on the same queries."""
    controls: tuple[Control, ...]

    def measurements(self) -> Iterator[Measurement]:
        for name, of in self.fusions.items():
            for subset, score in of.shown.items():
                yield Measurement.of(subset, name, self.metric, score, self.chance)
            for subset, score in of.alone.items():
                yield Measurement.of(subset, f"{name}, of these alone", self.metric, score, self.chance)
            yield Measurement.of(next(iter(of.shown)), f"{name}, late fusion", self.metric, of.late, self.chance)
        for control in self.controls:
            yield Measurement("", f"control: {control.name}", self.metric, control.value, chance=control.level)

    def sections(self) -> list[Section]:
        items = ", ".join(f"{name} {count:,}" for name, count in self.items.items())
        return [
            Section(
                title=f"Every subset of {', '.join(self.modalities)}: {self.title}",
                lead=f"Split {self.split}, items with all media. {self.metric}, mean of {len(self.seeds)} seeds.",
                tables=[self._table(), self._gains()],
                facts=[("items", items), ("encoders", ", ".join(self.encoders))],
                definitions=[(self.metric, metric_named(self.metric).description), *_DEFINITIONS],
            )
        ]

    def _table(self) -> Table:
        """Every subset: what a model of all media finds when it is shown these, and a model of these alone."""
        subsets = list(next(iter(self.fusions.values())).shown)
        rows = []
        for name, of in self.fusions.items():
            rows.append(Row(Cell(name), tuple(of.shown[one].cell() for one in subsets), "fam"))
            alone = (of.alone[one].cell() if one in of.alone else Cell(ABSENT) for one in subsets)
            rows.append(Row(Cell(f"{name}, trained on these alone"), tuple(alone), "baseline"))
            late = (of.late.cell() if one == subsets[0] else Cell(ABSENT) for one in subsets)
            rows.append(Row(Cell(f"{name}, late fusion of single media"), tuple(late), "baseline"))
        for control in self.controls:
            cells = [Cell(percent(control.value)), *[Cell("")] * (len(subsets) - 1)]
            kind: RowKind = "failed" if control.passed is False else "control"
            rows.append(Row(Cell(f"control: {control.name}"), tuple(cells), kind))
        rows.append(Row(Cell("chance"), tuple(Cell(percent(self.chance)) for _ in subsets), "chance"))
        return Table(
            "Percent with 95 % intervals over items, by the media that are shown.", ("", *subsets), tuple(rows)
        )

    def _gains(self) -> Table:
        rows = []
        for name, of in self.fusions.items():
            for gain in of.gains:
                seeds = over_seeds(gain.by_seed).half_cell() if gain.by_seed else Cell(ABSENT)
                rows.append(Row(Cell(f"{name}: {gain.name}"), (Cell(gain.difference.points()), seeds)))
        rows += [
            Row(Cell(f"all media: {name}"), (Cell(of.points()), Cell(ABSENT))) for name, of in self.differences.items()
        ]
        caption = "Differences in points on the same items, with intervals over items, and over seeds (Student's t)."
        return Table(caption, ("", "difference", "over seeds"), tuple(rows))


_DEFINITIONS = [
    ("concat", "an MLP on the summaries of all media, with a learned null for a missing one"),
    ("sum", "the sum of one MLP's vector for each medium, trained together"),
    ("union", "learned queries attend to the tokens of all media together"),
    ("cross", "union, after the tokens of each medium have attended to those of the others"),
    ("late fusion", "weighted sum of the scores of one model for each medium; weights are chosen on validation"),
    (
        "controls",
        "one medium is another item's: no more than the model of the others; texts permuted in training: chance",
    ),
]
