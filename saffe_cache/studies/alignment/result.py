"""result.json of `saffe align`: how well two encoders agree, layer by layer, and which fusion that recommends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import ClassVar, Literal

from saffe_cache.core.controls import Control
from saffe_cache.core.features import Modality, medium_of_key, spoken_of
from saffe_cache.core.figures import HeatMap
from saffe_cache.core.results import Estimate, Measurement, Section
from saffe_cache.core.tables import Cell, Row, RowKind, Table, duration, interval_cell, percent
from saffe_cache.studies.alignment.cases import MethodAdvice
from saffe_cache.studies.harness import StudyResult

NAMES: Mapping[str, str] = {"cka": "CKA", "mutual_neighbours": "shared neighbours", "svcca": "SVCCA"} | {
    name: name.capitalize() for name in ("a_0", "a_lin", "a_new", "a_mlp", "a_tok")
}
"""Measures as reports show them."""

DEFINITIONS: Mapping[str, Mapping[str, str]] = {
    "captions": {
        "cka": "unbiased linear CKA: whether similar photos have similar captions. Null: captions assigned to photos "
        "at random",
        "mutual_neighbours": "mean share of a photo's nearest photos whose captions are also nearest to its caption. "
        "Null: photos permuted",
        "svcca": "mean correlation, on measured photos, of the directions that agree best in other photos. Null: "
        "photos permuted, and fitted again",
        "a_0": "share of captions that find their photo first by the plain cosine. Null: captions assigned at random",
        "a_lin": "share of captions that find their photo first after a ridge regression from photos to captions, "
        "fitted on other photos. Null: measured pairs permuted",
    },
    "classes": {
        "cka": "unbiased linear CKA: whether similar photos belong to classes with similar texts. Null: the classes' "
        "texts assigned to classes at random, which keeps what photos of one class share",
        "mutual_neighbours": "mean share of a photo's nearest photos that are of its class; it does not depend on the "
        "texts, so all text layers are equal. Null: photos permuted",
        "svcca": "mean correlation, on measured photos, of directions that separate classes in other photos: at most "
        "the number of classes less 1, and nearly independent of the texts. Null: photos permuted, and fitted again",
        "a_0": "share of photos whose nearest class text is their own by the plain cosine. Null: the classes' texts "
        "assigned to classes at random",
        "a_lin": "share of photos whose nearest class text is their own after a ridge regression from photos to class "
        "texts, fitted on other photos of these classes: it separates known classes, whatever their texts are. Null: "
        "measured photos permuted",
        "a_new": "share of photos of classes that the ridge regression has not seen whose nearest text among these "
        "classes is their own; mean over random halves of the classes, whose spread gives the interval. Null: their "
        "texts assigned to them at random",
    },
}
"""What each measure is, for items with captions and for items with classes."""

Cells = tuple[tuple[float | None, ...], ...]
"""For each photo layer, one value for each text layer; None where the measure is undefined."""


@dataclass(frozen=True, kw_only=True)
class LayerMeasure:
    """A measure of all pairs of layers; fractions. A cell of the study."""

    chance: float
    value: Cells
    low: Cells
    """Of the 95 % interval."""
    high: Cells
    null_mean: Cells
    """Mean over permutations of the pairs."""
    null_high: Cells
    """Their 95 % quantile."""
    median_rank: Cells | None = None
    """For retrieval: of the right result."""
    normalised: Cells | None = None
    """For shared neighbours: 0 at chance, 1 where all are shared."""


@dataclass(frozen=True, kw_only=True)
class MapScore(Estimate):
    """R@1 after one map."""

    null_mean: float
    null_high: float
    median_rank: float


@dataclass(frozen=True, kw_only=True)
class LayerMaps:
    """The maps between two layers."""

    gallery_layer: str
    text_layer: str
    chance: float
    scores: Mapping[str, MapScore]
    ridge_strength: float | None = None
    left_out_error: float | None = None
    """Squared error of left-out photos as a fraction of the targets' variance."""


@dataclass(frozen=True, kw_only=True)
class BestLayer:
    """Maps from the best photo layer, fitted on all photos that are not measured on. A cell of the study."""

    maps: tuple[LayerMaps, ...]
    evidence: Evidence
    control: Control
    """R@1 of a linear map that was fitted on permuted pairs."""


@dataclass(frozen=True, kw_only=True)
class AlignmentResult(StudyResult):
    """Measures of all pairs of layers, maps of the best ones, and the advice."""

    verb: ClassVar[str] = "align"

    pairs: str
    """What describes items: captions or classes."""
    encoders: Mapping[str, str]
    photos: Mapping[str, int]
    """Measured on, fitted on for all pairs, and fitted on for the best layer."""
    num_texts: int
    gallery_layers: tuple[str, ...]
    text_layers: tuple[str, ...]
    measures: Mapping[str, LayerMeasure]
    absent: Mapping[str, str]
    """Measures that are undefined, and why."""
    best_layer: BestLayer
    advice: tuple[Advice, ...]
    method: MethodAdvice | None = None
    """Where the advice for photos alone comes from cases in which all methods were trained."""

    def measurements(self) -> Iterator[Measurement]:
        layers = list(product(enumerate(self.gallery_layers), enumerate(self.text_layers)))
        for name, of in self.measures.items():
            for (row, layer), (column, text_layer) in layers:
                value, low, high, null, null_high = (
                    grid[row][column] for grid in (of.value, of.low, of.high, of.null_mean, of.null_high)
                )
                if value is not None and null is not None:
                    setting = _setting(layer, text_layer)
                    yield Measurement(setting, "layers", name, value, low, high, of.chance)
                    yield Measurement(setting, "control: permuted pairs", name, null, None, null_high, of.chance)
        for maps in self.best_layer.maps:
            setting = _setting(maps.gallery_layer, maps.text_layer)
            for name, score in maps.scores.items():
                yield Measurement.of(setting, name, "recall_at_1", score, maps.chance)
                yield Measurement(setting, name, "median_rank", score.median_rank)

    def sections(self) -> list[Section]:
        definitions = DEFINITIONS[self.pairs]
        grids = [self._grid(name, of) for name, of in self.measures.items()]
        found = [
            Section(
                title=f"Which fusion? {self.title}",
                lead="; ".join(f"{one.gallery}: {one.fusion.upper()}" for one in self.advice) + ".",
                tables=[self._map_table()],
                texts=[*(f"{one.gallery}: {one.fusion}, because {one.because}" for one in self.advice), self._standing],
                facts=[*self.encoders.items(), ("time", duration(self.total_seconds))],
            ),
            Section(
                title="Agreement of all pairs of layers",
                lead=f"Measured on {self.photos['judged']} photos of split {self.split}.",
                tables=[table for table, _ in grids],
                definitions=[(NAMES[name], definitions[name]) for name in self.measures],
                facts=[(f"no {NAMES[name]}", reason) for name, reason in self.absent.items()],
                figures=[heat_map for _, heat_map in grids],
            ),
        ]
        return [section.spoken_of(self._medium) for section in found]

    @property
    def _medium(self) -> Modality:
        return medium_of_key(self.encoders["gallery"])

    @property
    def _standing(self) -> str:
        """How far to trust the advice."""
        return STANDING if self.method is None else f"{STANDING} {OF_CASES}"

    def page_sections(self, folder: Path) -> list[Section]:
        """Heat maps show the tables of all pairs, which are folded."""
        advice, agreement = self.sections()
        return [advice, replace(agreement, tables=[replace(table, folded=True) for table in agreement.tables])]

    def _map_table(self) -> Table:
        rows = []
        for maps in self.best_layer.maps:
            for name, score in maps.scores.items():
                numbers = (percent(score.null_high), percent(maps.chance), f"{score.median_rank:g}")
                setting = spoken_of(_setting(maps.gallery_layer, maps.text_layer), self._medium)
                head = f"{NAMES[name]}, {setting}"
                rows.append(Row(Cell(head), (score.cell(), *map(Cell, numbers))))
        control = self.best_layer.control
        texts = (percent(control.value), "", percent(control.level), "")
        kind: RowKind = "failed" if control.passed is False else "control"
        rows.append(Row(Cell(f"control: {control.name}"), tuple(map(Cell, texts)), kind))
        caption = (
            f"R@1 in percent on {self.photos['judged']} photos with its 95 % bootstrap interval, of no map (A_0), a "
            f"linear map, an MLP and tokens; fitted on {self.photos['fitted_closer']} others. Null: 95 % quantile with "
            "the measured pairs permuted."
        )
        return Table(caption, ("", "R@1", "null", "chance", "median rank"), tuple(rows))

    def _grid(self, name: str, of: LayerMeasure) -> tuple[Table, HeatMap]:
        """Photo layers downwards, text layers across, and the highest null of each text layer."""
        columns = zip(*of.null_high, strict=True)
        nulls = tuple(max((one for one in column if one is not None), default=None) for column in columns)
        heads, values = (*self.gallery_layers, "null"), (*of.value, nulls)
        ends = zip(chain(*of.low), chain(*of.high), strict=True)
        widest = max(high - low for low, high in ends if low is not None and high is not None)
        caption = (
            f"{NAMES[name]} in percent. Chance is {percent(of.chance)}; half of a 95 % interval is at most "
            f"{percent(widest / 2)}. Null: the highest 95 % quantile with permuted pairs."
        )
        rows = [Row(Cell(head), tuple(map(interval_cell, row))) for head, row in zip(heads, values, strict=True)]
        heat_map = HeatMap(
            name=name.replace("_", "-"),
            caption=caption,
            row_label="photo layer",
            column_label="text layer",
            rows=heads,
            columns=self.text_layers,
            cells=[[None if value is None else 100 * value for value in row] for row in values],
        )
        return Table(caption, ("photo \\ text", *self.text_layers), tuple(rows)), heat_map


def _setting(gallery_layer: str, text_layer: str) -> str:
    photo, text = ("vector" if name == "own" else f"layer {name}" for name in (gallery_layer, text_layer))
    return f"photo {photo}, text {text}"


Fusion = Literal["no FAM", "linear", "concat"]
Gallery = Literal["photos alone", "photos with paired text"]

ENOUGH_WITHOUT_MAP = 0.5
STANDING = (
    "The advice rests on trained fusions with one pair of encoders on two data sets (pipelines/LOG.md). Decoders are "
    "never recommended, since none gained half a point over linear or concat. Captions and class names were tested; "
    "for texts about parts of a photo, where sums and concatenations fail, these measures say nothing. Intervals cover "
    "the choice of measured photos, but not the MLP's seed or the photos that maps are fitted on."
)

OF_CASES = (
    "Which method is advised for photos alone rests on the cases that it names: a method, or a threshold on what is "
    "known before training, if it is better than any one method on data sets and encoders that it was not fitted to."
)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """R@1 on the measured photos, as fractions; None where it is undefined."""

    a_0: float | None
    """By cosine of the encoders' own vectors."""
    without_map: Estimate | None
    """A_0 less half of A_lin."""
    a_lin: float
    a_mlp: float
    mlp_gain: Estimate
    """A_mlp less A_lin."""
    null: float
    """The greater of both 95 % quantiles with permuted pairs."""
    a_tok: float
    token_gain: Estimate
    """A_tok less A_lin of the same hidden states."""

    def measures(self, photos: int) -> dict[str, float]:
        """What a rule may depend on: known before training, with the number of photos to train on."""
        gains = {"mlp_gain": self.mlp_gain.value, "token_gain": self.token_gain.value}
        return {"photos": float(photos), "a_lin": self.a_lin, **gains}


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One fusion for one kind of gallery."""

    gallery: Gallery
    fusion: str
    because: str


def advise(evidence: Evidence, *, has_paired_texts: bool) -> list[Advice]:
    """Which fusion the measures recommend, by the rule that trained fusions support (pipelines/alignment.py).

    "no FAM" where maps find nothing, or, for photos alone, where the encoders' own vectors find more than half of what
    a linear map finds, beyond noise: a guess, since no aligned encoders have been tested. Otherwise `linear`, or
    `concat` with paired text. A decoder is never recommended: what an MLP or tokens find, `linear` finds too, which
    pools tokens and has an MLP, and starts as the ridge regression.

    Photos may be paired with captions of their own; a class paired with its photo would be the answer itself.
    """
    is_nothing_found = max(evidence.a_lin, evidence.a_mlp) <= evidence.null
    is_aligned = evidence.without_map is not None and evidence.without_map.sign > 0
    alone: Fusion = "no FAM" if is_nothing_found or is_aligned else "linear"
    nothing = ": neither map finds more than the 95 % quantile of permuted pairs" if is_nothing_found else ""
    own = "cannot be compared" if evidence.a_0 is None else f"find {percent(evidence.a_0)}"
    because = (
        f"the encoders' own vectors {own}, a linear map {percent(evidence.a_lin)}, an MLP {percent(evidence.a_mlp)} "
        f"({evidence.mlp_gain.points()}); permuted pairs up to {percent(evidence.null)}{nothing}"
    )
    found = [Advice(gallery="photos alone", fusion=alone, because=because)]
    if has_paired_texts:
        because = (
            f"no costlier fusion gained more than concat; tokens find {percent(evidence.a_tok)} "
            f"({evidence.token_gain.points()} over their means){nothing}"
        )
        paired: Fusion = "no FAM" if is_nothing_found else "concat"
        found.append(Advice(gallery="photos with paired text", fusion=paired, because=because))
    return found
