"""What an evaluation finds: result.json, the report for people, and what a page shows of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from saffe_cache.core.controls import Control
from saffe_cache.core.features import NOUNS
from saffe_cache.core.figures import Dot, DotPlot
from saffe_cache.core.outputs import CONFIG, read_json
from saffe_cache.core.results import Estimate, Measurement, Result, Section
from saffe_cache.core.tables import ABSENT, Cell, Row, RowKind, Table, drawn, duration, flops, percent
from saffe_cache.evaluation.details import FAM, NAME, check_means, label, read_details, show_classes
from saffe_cache.inputs.media import named_layers
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.retrieval.correction import SearchCorrection
from saffe_cache.retrieval.metrics import metric_named
from saffe_cache.retrieval.scores import Scores


@dataclass(frozen=True, kw_only=True)
class Number(Estimate):
    """One metric of one system: a fraction, or a rank where the metric is one, with its interval over photos."""

    chance: float


Numbers = Mapping[str, Number]
"""By metric."""


def numbers_of(scores: Scores) -> Numbers:
    found = {}
    for name, score in scores.items():
        low, high = score.interval or (None, None)
        found[name] = Number(value=score.value, low=low, high=high, chance=score.chance)
    return found


@dataclass(frozen=True)
class Difference:
    """The FAM minus a baseline, by paired bootstrap over photos."""

    mean: float
    low: float
    high: float

    def points(self) -> str:
        """In signed percentage points, in a sentence."""
        return Estimate(value=self.mean, low=self.low, high=self.high).points()


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run, or the fitting of a baseline, and its evaluation cost."""

    trainable_parameters: int | None
    """None of a baseline."""
    fusing_flops: int | None
    """FLOPs of fusing one photo of the gallery; None of a baseline."""
    training_seconds: float
    training_peak_memory_mb: int
    evaluation_seconds: float
    evaluation_peak_memory_mb: int


@dataclass(frozen=True, kw_only=True)
class Index:
    """The index that was written."""

    kind: str
    bytes_per_vector: int
    parameters: Mapping[str, int]
    """What decides how much an approximate index finds, and how fast."""
    recall: Mapping[str, float]
    """Of an approximate index: which part of the exact first k, by k, it finds for the split's own queries."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(Result):
    """A run, or a baseline without one, under one protocol on one split."""

    verb: ClassVar[str] = "evaluate"

    system: str = FAM
    """What was evaluated: "fam" of a run, else the baseline."""
    protocol: str
    definition: str
    """Of the protocol, in words."""
    main_metric: str
    split: str
    data: str
    """Hash over the photos and texts that were measured on."""
    num_photos: int
    num_queries: int
    num_unusable_items: int
    validation_photos: int = 0
    """That chose the epoch, or tuned the baselines; 0 in a result of an earlier release."""
    validation_photos_drawn_from: int = 0
    """Photos that those were drawn from; 0 where they are all that there are."""
    systems: Mapping[str, Numbers]
    """The evaluated one, and each baseline that was fitted with it."""
    search_correction: SearchCorrection | None = None
    """Of all systems that make vectors; None where scores are not corrected."""
    bank_texts: int = 0
    """Training texts in its bank."""
    bank_photos: int = 0
    """Training photos in its bank, where photos search texts."""
    uncorrected: Numbers = field(default_factory=dict)
    """Of the evaluated system without the correction; empty where there is none."""
    descriptions: Mapping[str, str]
    """What each baseline is."""
    absent: Mapping[str, str]
    """Why baselines or controls are absent."""
    differences: Mapping[str, Mapping[str, Difference]]
    """The FAM minus the best baseline of each metric: baseline, metric."""
    controls: Mapping[str, Control]
    control_scores: Mapping[str, Numbers]
    """All metrics of each control."""
    media: Mapping[str, Numbers] = field(default_factory=dict)
    """Of a run of several media: by the media that are shown, and with one of another item."""
    media_items: int = 0
    """Items that have all media, which `media` is measured on."""
    sensitivity: Mapping[str, float]
    """How far the fused vector moves with another photo ("to_image") or another paired text ("to_text"), 0 to 2."""
    duplicates: Mapping[str, int]
    """Photos and texts that training saw too, by content."""
    index: Index | None
    """None of a baseline that scores classes without making vectors."""
    cost: Cost
    run: RunSpec
    """What was trained. Of a baseline, the encoders, layers, pairs and splits that it saw; it has no fusion and no
    objective, whatever the fields say."""

    def __post_init__(self) -> None:
        if self.main_metric not in self.systems.get(self.system, {}):
            raise ValueError(f"systems: {self.main_metric} of {self.system} is missing")

    def main(self, system: str | None = None) -> Number:
        """The main metric of a system; by default, of the evaluated one."""
        return self.systems[system or self.system][self.main_metric]

    def ranked_baselines(self) -> list[str]:
        """The baselines that have the main metric, best first."""
        names = [name for name, of in self.systems.items() if name != self.system and self.main_metric in of]
        sign = -1 if metric_named(self.main_metric).higher_is_better else 1
        return sorted(names, key=lambda name: sign * self.main(name).value)

    def measurements(self) -> Iterator[Measurement]:
        controls = {f"control: {name}": of for name, of in self.control_scores.items()}
        media = {f"media: {name}": of for name, of in self.media.items()}
        for system, numbers in {**self.systems, **controls, **media}.items():
            for metric, of in numbers.items():
                yield Measurement.of("", system, metric, of, of.chance)

    def sections(self) -> list[Section]:
        """Results, and what they rest on."""
        cost = self.cost
        learning = "training" if self.system == FAM else "fitting"
        trained = f"{duration(cost.training_seconds)} of {learning} at {cost.training_peak_memory_mb:,} MB"
        evaluated = f"{duration(cost.evaluation_seconds)} of evaluation at {cost.evaluation_peak_memory_mb:,} MB"
        counts = f"{self.num_photos} photos, {self.num_queries} queries"
        of_system = "" if self.system == FAM else f"{self.system}, "
        of_fusion = []
        if cost.trainable_parameters is not None and cost.fusing_flops is not None:
            of_fusion = [
                ("trainable parameters", f"{cost.trainable_parameters:,}"),
                ("FLOPs of fusing one photo", flops(cost.fusing_flops)),
            ]
        found = Section(
            title=f"{of_system}{self.protocol} protocol, split {self.split}: {counts}",
            lead=f"{self.definition[:1].upper()}{self.definition[1:]}.",
            tables=[self._table(), *([self._media_table()] if self.media else [])],
            texts=self._texts(),
            facts=[
                *of_fusion,
                *self._correction(),
                ("cost", f"{trained}, {evaluated}"),
                ("unusable items", str(self.num_unusable_items)),
            ],
            definitions=[
                *((name, metric_named(name).description) for name in self._metrics()),
                *((name, self.descriptions[name]) for name in self.systems if name in self.descriptions),
            ],
        )
        return [found.spoken_of(self.run.medium)]

    def page_sections(self, folder: Path) -> list[Section]:
        """With what was run, the systems drawn, and the details of single queries where they are stored."""
        [section] = self.sections()
        section.facts += self._origin(read_json(folder / CONFIG))
        section.figures.append(self._dots())
        if (folder / NAME).exists():
            details = read_details(folder)
            check_means(folder, details, {name: of[self.main_metric].value for name, of in self.systems.items()})
            show_classes(section, details, [self.system, *self.ranked_baselines()])
        return [section.spoken_of(self.run.medium)]

    def notes(self) -> list[str]:
        """Where a baseline finds more than the FAM."""
        if self.system != FAM:
            return []
        own, metric = self.main().value, metric_named(self.main_metric)
        for best in self.ranked_baselines()[:1]:
            value = self.main(best).value
            if (value > own) if metric.higher_is_better else (value < own):
                numbers = f"{self.main_metric} {metric.show(value)} against {metric.show(own)}"
                return [f"the baseline {best} is better than the FAM: {numbers}."]
        return []

    def _metrics(self) -> list[str]:
        """The main one first."""
        return [self.main_metric, *(name for name in self.systems[self.system] if name != self.main_metric)]

    def _table(self) -> Table:
        """Chance and controls first, then what is evaluated, then the baselines, best first."""
        names, main = self._metrics(), self.systems[self.system]
        chances = tuple(Cell(metric_named(name).show(main[name].chance)) for name in names)
        rows = [Row(Cell("chance", "a random order"), chances, "chance")]

        def add(numbers: Numbers, name: str, note: str, kind: RowKind) -> None:
            rows.append(Row(Cell(name, note), tuple(_cell(metric, numbers.get(metric)) for metric in names), kind))

        for name, control in self.controls.items():
            note = f"{'holds' if control.passed else 'FAILED'}: {control.sentence.partition(': ')[2]}"
            add(self.control_scores[name], f"control: {name}", note, "control" if control.passed else "failed")
        add(main, label(self.system), "this run" if self.system == FAM else "this baseline", "fam")
        if self.uncorrected:
            add(self.uncorrected, f"{label(self.system)}, uncorrected", "without search correction", "plain")
        for name in dict.fromkeys([*self.ranked_baselines(), *self.systems]):
            if name != self.system:
                add(self.systems[name], name, "baseline", "baseline")
        return Table("Percent, with 95 % bootstrap intervals over photos.", ("", *names), tuple(rows))

    def _media_table(self) -> Table:
        """What the run finds when only some media of the items are shown."""
        names = self._metrics()
        rows = [
            Row(Cell(shown), tuple(_cell(name, numbers.get(name)) for name in names), "plain")
            for shown, numbers in self.media.items()
        ]
        caption = f"The {self.media_items:,} items that have all media, by the media that are shown."
        return Table(caption, ("", *names), tuple(rows))

    def _correction(self) -> list[tuple[str, str]]:
        """What was subtracted from scores, if anything."""
        if self.search_correction is None:
            return []
        noun = NOUNS[self.run.medium]
        photos = f" and {self.bank_photos:,} training {noun}s" if self.bank_photos else ""
        bank = f"bank of {self.bank_texts:,} training texts{photos}"
        return [("search correction", f"{self.search_correction}; {bank}")]

    def _texts(self) -> list[str]:
        """What does not fit a table: differences, sensitivity, duplicates, the index, absent systems."""
        found = []
        for name, of in self.differences.items():
            parts = ", ".join(f"{metric} {one.points()}" for metric, one in of.items())
            found.append(f"FAM minus {name}, the best baseline, by paired bootstrap over photos: {parts}.")
        moved: dict[str, str] = {f"to_{medium}": noun for medium, noun in NOUNS.items()}
        moves = ", ".join(f"{moved[part]} {value:.2f}" for part, value in self.sensitivity.items())
        shared = ", ".join(f"{count} {name}" for name, count in self.duplicates.items())
        if moves:
            found.append(f"How far the fused vector moves with another input, 0 to 2: {moves}.")
        found.append(f"Shared with training: {shared}.")
        if self.index is not None and self.index.recall:
            shares = " and ".join(f"{percent(share)} % of the first {k}" for k, share in self.index.recall.items())
            kind = self.index.kind
            found.append(f"Index {kind} finds {shares} that a flat index finds; the numbers above are exact.")
        return [*found, *(f"{name} is absent: {why}." for name, why in self.absent.items())]

    def _origin(self, config: Mapping[str, Any]) -> list[tuple[str, str]]:
        spec, given = self.run, config.get("config", {})
        of_text = f", layers {', '.join(map(str, spec.text_layers))}" if spec.text_layers else ""
        fusion = f"{spec.shape.fusion}, head {spec.shape.head}, paired text in training: {spec.gallery_text}"
        of_run = self.system == FAM
        photos = drawn(self.validation_photos, self.validation_photos_drawn_from)
        noun = NOUNS[spec.medium]
        of_photos = f", {photos} {noun}s" if self.validation_photos_drawn_from else ""
        chosen = "the epoch was chosen" if of_run else "tuned"
        averages = given.get("index_views", "plain") == "mean"
        searched = "mean of all" if averages else "plain one"
        views = f"trained on {1 + len(spec.views)} of each {noun}, searched the {searched}"
        return [
            ("cache", str(given.get("cache", ""))),
            ("gallery encoder", f"{spec.gallery_key}, layers {named_layers(spec)}"),
            ("text encoder", f"{spec.text_key}{of_text}"),
            *([("fusion", fusion)] if of_run else [("baseline", self.descriptions[self.system])]),
            ("trained on", f"split {spec.train_split}; {chosen} on {spec.validation}{of_photos}; seed {spec.seed}"),
            *([("views", views)] if spec.views or averages else []),
            ("reported on", f"split {self.split}, seed {given.get('seed', '')}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items())),
        ]

    def _dots(self) -> DotPlot:
        """The main metric of every system."""
        main = self.main_metric
        shown = [name for name, control in self.controls.items() if control.metric == main]
        dots = [_dot(label(self.system), self.main(), "fam")]
        dots += [_dot(system, self.main(system), "baseline") for system in self.ranked_baselines()]
        dots += [_dot(name, self.control_scores[name][main], "control") for name in shown]
        named = label(self.system, "the FAM")
        return DotPlot(
            name="systems",
            caption=f"{main} of {named}, baselines and controls, with 95 % intervals. Across: chance.",
            label=f"{main}, percent",
            dots=dots,
            chance=100 * self.main().chance,
        )


def _cell(name: str, number: Number | None) -> Cell:
    if number is None:
        return Cell(ABSENT)
    metric = metric_named(name)
    return Cell(metric.show(number.value)) if metric.is_rank else number.cell()


def _dot(label: str, number: Number, kind: Any) -> Dot:
    low, high = (None if bound is None else 100 * bound for bound in (number.low, number.high))
    return Dot(label, 100 * number.value, low, high, kind)
