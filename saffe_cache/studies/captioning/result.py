"""result.json of `saffe caption`: what a frozen language model makes of photos that join it at one layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from saffe_cache.core.controls import Control
from saffe_cache.core.figures import Curve, TrainingPlot
from saffe_cache.core.results import Estimate, Measurement, Section
from saffe_cache.core.tables import ABSENT, Cell, Row, RowKind, Table, flops, percent, plain_row
from saffe_cache.studies.harness import StudyResult

SYSTEMS = {
    "photo": "the caption's own photo",
    "photos_shuffled": "another photo: a control, which shows how much of the gain does not come from the photo",
    "no_photo": "no photo; the text's positions still begin after the photo's places",
    "plain_model": "no photo, positions from 0: the language model as it came",
    "unigram": "neither photo nor text: the frequency of each token in the training captions, plus one",
}
"""What each sees when it predicts a caption."""
CONTROL = "photos_shuffled"
CAPTIONS = {
    "photo": "the model's greedy caption of the photo",
    CONTROL: "the model's caption of another photo: a control",
    "plain_model": "what the language model says without any photo, the same for all",
    "constant": "one caption of the training photos for all: the one of up to 1,000 that fits the reported photos best",
    "people_shuffled": "a person's caption of another photo: chance",
    "people": "people's captions, each scored against the photo's others",
}
"""Whose captions CIDEr-D is measured of."""


@dataclass(frozen=True, kw_only=True)
class EpochLosses:
    """Nats per token; epoch 0 is the start, before any training."""

    epoch: int
    validation: float
    training: float | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the projector was trained. A cell of the study."""

    best_epoch: int
    seconds_per_step: float
    """Median, reading included."""
    training_photos: int
    validation_photos: int
    log: tuple[EpochLosses, ...]


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """How well captions are predicted and found. A cell of the study."""

    losses: Mapping[str, Estimate]
    """Nats per token."""
    differences: Mapping[str, Estimate]
    """The loss with the photo less that of each other system, in nats per token."""
    own_caption: Mapping[str, Estimate]
    """How often a photo's own caption is the likeliest, by the loss per token or by what the photo takes off it."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A photo's greedy caption, and those that people wrote."""

    id: str
    caption: str
    own: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The first of captions.jsonl. A cell of the study."""

    examples: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """CIDEr-D of `CAPTIONS`, from 0 to 10: see captioning/cider.py. A cell of the study."""

    cider: Mapping[str, Estimate]
    """Without `people` if a photo has only one caption."""
    differences: Mapping[str, Estimate]
    """CIDEr-D of the captions with the photo less that of each other system."""
    said: Mapping[str, str]
    """The caption of each system that says the same of all photos."""


@dataclass(frozen=True, kw_only=True)
class CaptionCost:
    """FLOPs of texts of `flops_tokens` tokens."""

    trainable_parameters: int
    training_step_flops: int
    """From cached states, forward and back to the projector, for `flops_batch` captions."""
    whole_pass_flops: int
    """A forward pass that begins with the text's tokens, as for a caption that is not in the cache."""
    flops_batch: int
    flops_tokens: int


@dataclass(frozen=True, kw_only=True)
class CaptionResult(StudyResult):
    """What photos are worth to a frozen language model, for one layer at which they join it."""

    verb: ClassVar[str] = "caption"

    layer: int
    num_layers: int
    photo_tokens: int
    photos: int
    captions: int
    epochs: int
    chance: float
    """Of finding a photo's own caption."""
    measured: Measurements
    verdicts: tuple[Control, ...]
    cost: CaptionCost
    training: Training
    examples: tuple[Example, ...]
    scores: CaptionScores | None = None
    """None in results of earlier versions."""

    def measurements(self) -> Iterator[Measurement]:
        for system, loss in self.measured.losses.items():
            yield Measurement.of("", system, "loss", loss)
        for name, found in self.measured.own_caption.items():
            system, _, by = name.partition(", ")
            yield Measurement.of("", system, f"own caption {by}", found, self.chance)
        if self.scores is not None:
            chance = self.scores.cider["people_shuffled"].value
            for system, score in self.scores.cider.items():
                yield Measurement.of("", system, "CIDEr-D", score, chance)

    def sections(self) -> list[Section]:
        cost, training = self.cost, self.training
        return [
            Section(
                title=f"A frozen language model that sees photos: {self.title}",
                lead=f"{self.photo_tokens} photo tokens join layer {self.layer} of {self.num_layers} (0: in front of "
                f"the text). Reported on {self.photos} photos of split {self.split} with {self.captions} captions.",
                facts=[
                    ("trained on", f"{training.training_photos} photos; {training.validation_photos} held out"),
                    ("best epoch", f"{training.best_epoch} of {self.epochs}"),
                    ("trained parameters", f"{cost.trainable_parameters:,}"),
                    (
                        "training step",
                        f"{1000 * training.seconds_per_step:.0f} ms, {flops(cost.training_step_flops)}FLOP for "
                        f"{cost.flops_batch} captions of {cost.flops_tokens} tokens",
                    ),
                    ("whole pass", f"{flops(cost.whole_pass_flops)}FLOP for as many"),
                ],
                definitions=[(name, f"sees {text}") for name, text in SYSTEMS.items()],
                tables=[self._loss_table(), self._own_caption_table(), *self._score_tables(), self._example_table()],
                figures=[self._training_plot()],
            )
        ]

    @classmethod
    def compare(cls, results: Mapping[str, Self]) -> list[Section]:
        """Several layers in one table."""
        if len(results) < 2:
            return []
        systems = [name for name in SYSTEMS if name != "unigram"]
        rows = []
        for name, one in sorted(results.items(), key=lambda item: item[1].layer):
            losses = (_loss_cell(one.measured.losses[system]) for system in systems)
            found, step = one.measured.own_caption["photo, by gain"], one.cost.training_step_flops
            score = _loss_cell(one.scores.cider["photo"]) if one.scores else Cell(ABSENT)
            cells = (*losses, found.cell(), score, Cell(f"{flops(step)}FLOP"))
            rows.append(Row(Cell(f"layer {one.layer} of {one.num_layers}", name), cells))
        header = ("photos join at", *systems, "own caption, percent", "CIDEr-D", "training step")
        caption = (
            "Loss in nats per token, how often a photo's own caption is found by gain, and CIDEr-D of the model's "
            "captions; 95 % intervals."
        )
        table = Table(caption, header, tuple(rows))
        return [Section(title="Layers at which photos join a language model", tables=[table])]

    def _loss_table(self) -> Table:
        rows = []
        for name, of in self.measured.losses.items():
            difference = self.measured.differences.get(name)
            less = _loss_cell(difference) if difference else Cell("")
            rows.append(Row(Cell(name), (_loss_cell(of), Cell(f"{math.exp(of.value):.1f}"), less), _kind(name)))
        caption = "Loss of people's captions in nats per token, with 95 % intervals over photos; lower is better."
        return Table(caption, ("", "loss", "perplexity", "photo less this"), tuple(rows))

    def _own_caption_table(self) -> Table:
        found = self.measured.own_caption.items()
        rows = [Row(Cell(name), (share.cell(),), _kind(name)) for name, share in found]
        caption = (
            f"Photos whose own caption is the likeliest of {round(1 / self.chance)}, in percent with 95 % intervals. "
            "By loss: by nats per token. By gain: by what the photo takes off the caption's loss, which is fairer, "
            "since short and common captions are likely with any photo."
        )
        chance = Row(Cell("chance"), (Cell(percent(self.chance)),), "chance")
        return Table(caption, ("", "own caption found"), (*rows, chance))

    def _score_tables(self) -> list[Table]:
        if self.scores is None:
            return []
        rows = []
        for name, score in self.scores.cider.items():
            less = self.scores.differences.get(name)
            said = self.scores.said.get(name)
            text = CAPTIONS[name] if said is None else f"{CAPTIONS[name]}: {said!r}"
            kind = "chance" if name == "people_shuffled" else _kind(name)
            rows.append(Row(Cell(name, text), (_loss_cell(score), _loss_cell(less) if less else Cell("")), kind))
        caption = (
            "CIDEr-D of captions against people's, from 0 to 10, with 95 % intervals over photos; higher is better. "
            "Values depend on how many photos are reported, so compare systems on the same photos alone."
        )
        return [Table(caption, ("", "CIDEr-D", "photo less this"), tuple(rows))]

    def _example_table(self) -> Table:
        rows = (plain_row(one.id, one.caption, "".join(one.own[:1])) for one in self.examples)
        return Table("Greedy captions.", ("photo", "the model's", "a person's"), tuple(rows))

    def _training_plot(self) -> TrainingPlot:
        epochs, scores = zip(*((one.epoch, one.validation) for one in self.training.log), strict=True)
        losses = {one.epoch: one.training for one in self.training.log if one.training is not None}
        return TrainingPlot(
            name="training",
            caption="Nats per token. Dotted: the epoch that is kept.",
            score_label="validation loss",
            losses=[Curve("projector", list(losses), list(losses.values()))],
            scores=[Curve("projector", epochs, scores)],
            best_epoch=self.training.best_epoch,
        )


def _kind(name: str) -> RowKind:
    return "control" if name.startswith(CONTROL) else "plain"


def _loss_cell(loss: Estimate) -> Cell:
    return Cell(f"{loss.value:.3f}", f"[{loss.low:.3f}, {loss.high:.3f}]")
