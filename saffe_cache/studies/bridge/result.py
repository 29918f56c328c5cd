"""result.json of `saffe bridge`: each medium searches the other, through texts and directly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from saffe_cache.core.controls import Control
from saffe_cache.core.results import Estimate, Measurement, Section
from saffe_cache.core.tables import Cell, Row, Table, percent
from saffe_cache.retrieval.metrics import metric_named
from saffe_cache.studies.harness import StudyResult


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One medium searches another. A cell of the study."""

    queries: str
    """Modality of what searches."""
    gallery: str
    num_queries: int
    num_gallery: int
    num_pairs: int
    """Items with both media that the direct maps were fitted and chosen on; 0 where there are none."""
    systems: Mapping[str, Mapping[str, Estimate]]
    """By system, then by metric."""
    chance: Mapping[str, float]
    differences: Mapping[str, Estimate]
    """Of map, on the same queries."""
    controls: tuple[Control, ...]

    @property
    def name(self) -> str:
        return f"{self.queries} to {self.gallery}"

    @property
    def folder(self) -> str:
        """In the output folder, with what single queries find."""
        return f"{self.queries}-to-{self.gallery}"


@dataclass(frozen=True, kw_only=True)
class BridgeResult(StudyResult):
    """Both directions; values are fractions."""

    verb: ClassVar[str] = "bridge"

    runs: Mapping[str, str]
    """By modality."""
    encoders: Mapping[str, str]
    relevance: str
    num_texts: int
    """Texts that the bridge goes through."""
    directions: tuple[Direction, ...]

    def measurements(self) -> Iterator[Measurement]:
        for one in self.directions:
            for system, scores in one.systems.items():
                for metric, score in scores.items():
                    yield Measurement.of(one.name, system, metric, score, one.chance[metric])
            for control in one.controls:
                name = f"control: {control.name}"
                yield Measurement(one.name, name, control.metric, control.value, chance=control.level)

    def sections(self) -> list[Section]:
        metrics = [name for name in self.directions[0].chance if not metric_named(name).is_rank]
        of_what = {"class": "media of the query's class", "item": "the other medium of the query's item"}
        return [
            Section(
                title=f"Through texts from one medium to another: {self.title}",
                lead=f"Split {self.split}. Relevant: {of_what[self.relevance]}.",
                tables=[_table(one, metrics) for one in self.directions],
                texts=[
                    f"{one.name}: {name}, map: {value.points()} points"
                    for one in self.directions
                    for name, value in one.differences.items()
                ],
                facts=[
                    *((f"run of {modality}", run) for modality, run in self.runs.items()),
                    ("texts of the bridge", f"{self.num_texts:,}"),
                ],
                definitions=[*_DEFINITIONS, *((name, metric_named(name).description) for name in metrics)],
            )
        ]


_DEFINITIONS = [
    ("bridge, texts", "both inputs are compared by the texts that they fit; no pair of the two media is used"),
    ("bridge, ridges", "cosine in the text encoder's space, of what each run's ridge regression makes of the inputs"),
    ("direct ridge, direct MLP", "maps from one medium to the other, fitted on items that have both"),
    ("controls", "one of the runs was trained on permuted pairs; map must be at chance"),
]


def _table(one: Direction, metrics: list[str]) -> Table:
    rows = [
        Row(Cell(system), tuple(scores[name].cell() for name in metrics), "fam" if "bridge" in system else "baseline")
        for system, scores in one.systems.items()
    ]
    for control in one.controls:
        cells = tuple(Cell(percent(control.value) if name == control.metric else "") for name in metrics)
        rows.append(Row(Cell(f"control: {control.name}"), cells, "failed" if control.passed is False else "control"))
    rows.append(Row(Cell("chance"), tuple(Cell(percent(one.chance[name])) for name in metrics), "chance"))
    pairs = f" Direct maps: fitted on {one.num_pairs:,} pairs." if one.num_pairs else ""
    caption = (
        f"{one.name}: {one.num_queries:,} queries, gallery of {one.num_gallery:,}; percent, 95 % intervals over "
        f"queries.{pairs}"
    )
    return Table(caption, ("", *metrics), tuple(rows))
