"""result.json of `saffe bind`: few-shot episodes, and full classification with every name replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from saffe_cache.core.controls import Control
from saffe_cache.core.figures import Panel, SeriesPlot
from saffe_cache.core.results import Estimate, Measurement, Section, series_of
from saffe_cache.core.tables import ABSENT, Cell, Row, RowKind, Table, duration, percent
from saffe_cache.retrieval.metrics import over_seeds
from saffe_cache.studies.harness import StudyResult


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What was chosen on training photos."""

    ridge_strength: float
    learning_rates: Mapping[str, float]
    """For each start of the FAM."""


@dataclass(frozen=True, kw_only=True)
class Epochs:
    """How long fits took to converge."""

    mean: float
    most: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all episodes of a setting have in common."""

    ways: int
    """Classes."""
    shots: int
    """Photos of each class to learn from, the support."""
    queries: int
    """Photos of each class to test on."""

    @property
    def name(self) -> str:
        return f"{self.ways}-way {self.shots}-shot"


@dataclass(frozen=True, kw_only=True)
class FewShot(Task):
    """Episodes of one kind. A cell of the study."""

    episodes: int
    chance: float
    systems: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    """Each FAM less class_means, in the same episodes."""
    controls: Mapping[str, Estimate]
    """Accuracies where nothing can be learned."""
    verdicts: tuple[Control, ...]
    """Whether these are at chance."""
    chosen: Chosen
    epochs_to_convergence: Mapping[str, Epochs]
    """For each start of the FAM."""


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """Scores of systems by metric, with true names and with made-up ones. A cell of the study."""

    systems: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class NamesReplaced:
    """A metric of a classification in which every class got a made-up name."""

    name: str
    classes: int
    metric: str
    systems: Mapping[str, tuple[float, ...]]
    """One value for each seed."""


@dataclass(frozen=True, kw_only=True)
class BindingResult(StudyResult):
    """How well made-up names are bound to photos; values are fractions."""

    verb: ClassVar[str] = "bind"

    dataset: str
    settings: tuple[FewShot, ...]
    names_replaced: tuple[NamesReplaced, ...]
    num_names: int
    example_names: tuple[str, ...]

    def measurements(self) -> Iterator[Measurement]:
        for one in self.settings:
            for prefix, scores in (("", one.systems), ("control: ", one.controls)):
                for system, score in scores.items():
                    yield Measurement.of(one.name, prefix + system, "accuracy", score, one.chance)
        for replaced in self.names_replaced:
            chance = replaced.systems["chance"][0]
            for system, values in replaced.systems.items():
                yield Measurement.of(replaced.name, system, replaced.metric, over_seeds(values), chance)

    def sections(self) -> list[Section]:
        by_ways = groupby(self.settings, lambda one: one.ways)
        return [
            Section(
                title=f"Names learned from a few photos: {self.title}",
                lead=f"Split {self.split}. The names are made up, such as {', '.join(self.example_names[:3])}.",
                facts=[("time", f"{duration(self.total_seconds)} for all cells")],
                definitions=_DEFINITIONS,
                tables=[
                    *(_few_shot_table(list(settings)) for _, settings in by_ways),
                    *_replaced_tables(self.names_replaced),
                    *_published_tables(self.settings),
                ],
                figures=[_figure(self.settings)],
            )
        ]


_DEFINITIONS = [
    ("accuracy", "share of photos whose nearest name by cosine is their own"),
    ("class_means", "nearest class mean by centred cosine; it needs no names"),
    ("ridge", "ridge regression from pooled photos to the names' vectors"),
    ("fam from random, from ridge", "a linear FAM fitted in each episode, from random weights or from the ridge"),
    (
        "controls",
        "photos shuffled among the names, or a FAM that sees the same photo every time; both must be at chance",
    ),
]


def _few_shot_table(settings: Sequence[FewShot]) -> Table:
    """Settings with one number of ways side by side."""
    first = settings[0]
    groups: tuple[tuple[str, RowKind, str], ...] = (
        ("systems", "plain", "{}"),
        ("differences", "plain", "{} less class_means"),
        ("controls", "control", "control: {}"),
    )
    rows = [
        Row(Cell(shown.format(name)), tuple(getattr(one, part)[name].half_cell() for one in settings), kind)
        for part, kind, shown in groups
        for name in getattr(first, part)
    ]
    rows.append(Row(Cell("chance"), tuple(Cell(percent(one.chance)) for one in settings), "chance"))
    for start in first.epochs_to_convergence:
        cells = (
            Cell(f"{one.epochs_to_convergence[start].mean:.1f}", f"at {one.chosen.learning_rates[start]:g}")
            for one in settings
        )
        rows.append(Row(Cell(f"epochs of fam from {start}, at learning rate"), tuple(cells)))
    strengths = (Cell(f"{one.chosen.ridge_strength:g}") for one in settings)
    rows.append(Row(Cell("strength of ridge"), tuple(strengths)))
    caption = (
        f"Accuracy in percent ± half of its 95 % interval over {first.episodes} episodes with {first.queries} queries "
        "for each class. Differences compare the same episodes."
    )
    return Table(caption, ("", *(one.name for one in settings)), tuple(rows))


def _replaced_tables(replaced: Sequence[NamesReplaced]) -> list[Table]:
    if not replaced:
        return []
    rows = []
    for system in replaced[0].systems:
        cells = tuple(over_seeds(one.systems[system]).half_cell() for one in replaced)
        rows.append(Row(Cell(system), cells, "chance" if system == "chance" else "plain"))
    caption = f"{replaced[0].name}: percent, mean over seeds ± half of its 95 % t-interval."
    return [Table(caption, ("", *(one.metric for one in replaced)), tuple(rows))]


def _figure(settings: Sequence[FewShot]) -> SeriesPlot:
    series = [series_of(system, [one.systems[system] for one in settings]) for system in settings[0].systems]
    chance = series_of("chance", [Estimate(value=one.chance) for one in settings])
    return SeriesPlot(
        name="episodes",
        caption="Accuracy with its 95 % interval over episodes.",
        x_label="episodes",
        y_label="accuracy, percent",
        panels=[Panel([one.name for one in settings], [*series, chance])],
    )


PUBLISHED: Mapping[tuple[str, str], Mapping[int, tuple[float | None, ...]]] = {
    ("FSL frozen, test-blind, 1 epoch", "NF-ResNet-50 and a transformer; the photo is withheld"): {
        2: (48.5, 46.7, 45.3),
        5: (18.6, 19.9, 19.8),
    },
    ("Meta-Learning, 1 epoch", "CLIP ViT-B/32 and GPT-2; generates the name"): {
        2: (58.7, None, 65.8),
        5: (25.1, None, 29.6),
    },
    (
        "SAFFE non-aligned, 1 epoch",
        "CLIP ViT-B/16 and SBERT; falls from 3 to 5 shots, and in 2-way with every further shot",
    ): {2: (80.0, 78.0, 77.0), 5: (30.4, 54.0, 46.4)},
    (
        "SAFFE non-aligned, 2 epochs",
        "CLIP ViT-B/16 and SBERT; falls from 3 to 5 shots in 5-way, from 1 to 3 in 2-way",
    ): {2: (95.0, 90.0, 96.0), 5: (30.0, 80.0, 74.8)},
}
"""Rows of Table 7 of the SAFFE paper, with a note: percent by ways, for 1, 3 and 5 shots."""


def _published_tables(settings: Sequence[FewShot]) -> list[Table]:
    """The published numbers of these settings, if there are any."""
    places = {1: 0, 3: 1, 5: 2}
    shown = [one for one in settings if one.ways in (2, 5) and one.shots in places]
    rows = []
    for (name, note), by_ways in PUBLISHED.items():
        values = (by_ways[one.ways][places[one.shots]] for one in shown)
        cells = (Cell(ABSENT if value is None else f"{value:.1f}") for value in values)
        rows.append(Row(Cell(name, note), tuple(cells)))
    caption = "Published in SAFFE's Table 7: percent on miniImageNet; the number of episodes is unknown."
    return [Table(caption, ("", *(one.name for one in shown)), tuple(rows))] if shown else []
