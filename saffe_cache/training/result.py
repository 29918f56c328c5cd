"""The result of a training, and its log."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from saffe_cache.core.features import Modality, nouns
from saffe_cache.core.figures import Curve, TrainingPlot
from saffe_cache.core.json_schema import made_of
from saffe_cache.core.outputs import CONFIG, read_json
from saffe_cache.core.results import Measurement, Result, Section
from saffe_cache.core.tables import drawn, duration, percent

LOG, PERMUTED = "log.jsonl", "permuted"
"""The log's file, and the folder of the control that is trained on permuted pairs."""


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """One validation."""

    epoch: int
    loss: float | None
    """Mean over the epoch's steps; None before the first."""
    validation_score: float | None
    seconds: float
    """Seconds of training so far."""


@dataclass(frozen=True, kw_only=True)
class TrainResult(Result):
    """A finished training."""

    verb: ClassVar[str] = "train"

    medium: Modality = "image"
    """Of the gallery; "media" where several are fused. Releases that did not write it had trained on any."""
    best_epoch: int
    best_validation_score: float
    validation_score: str
    """The metric that chose the epoch."""
    trainable_parameters: int
    train_photos: int
    validation_photos: int
    validation_photos_drawn_from: int = 0
    """Photos that those were drawn from; 0 where they are all that there are."""
    unusable_items: int
    photos_shared_with_other_splits: int
    """Photos of the training split that other splits contain too; they are left out."""
    steps: int
    photos_seen: int
    """In training and validation; a photo counts each time."""
    texts_seen: int
    residency: str
    """Where the hidden states were kept: device, memory, mapped or streamed."""
    seconds: float
    control_seconds: float
    """Seconds of the control's training on permuted pairs; 0 without a control."""
    peak_memory_mb: int

    def measurements(self) -> Iterator[Measurement]:
        yield Measurement("", "fam", f"validation {self.validation_score}", self.best_validation_score)

    def sections(self) -> list[Section]:
        validated = drawn(self.validation_photos, self.validation_photos_drawn_from)
        kept = f"epoch {self.best_epoch}, validation {self.validation_score} {percent(self.best_validation_score)} %"
        return [
            Section(
                title="Training",
                facts=[
                    (nouns([self.medium]), f"{self.train_photos:,} to train on, {validated} to validate on"),
                    ("kept", kept),
                    ("steps", f"{self.steps:,} in {duration(self.seconds)}, {self.peak_memory_mb:,} MB at most"),
                    ("trainable parameters", f"{self.trainable_parameters:,}"),
                ],
            )
        ]

    def page_sections(self, folder: Path) -> list[Section]:
        """The section for a page: also the objective and the training curves."""
        [section] = self.sections()
        content = read_json(folder / CONFIG)
        losses = dict(content["config"].get("objective") or {})
        weights = ", ".join(f"{name}={weight}" for name, weight in losses.items())
        usual = "default" if content["run"].get("objective", True) else "none: the fusion is fitted in closed form"
        section.facts.append(("objective", weights or usual))
        logs = {"run": read_log(folder / LOG), "control: permuted pairs": read_log(folder / PERMUTED / LOG)}
        if logs["run"]:
            plot = TrainingPlot(
                name="training",
                caption="Training curves. Dotted: the epoch that is kept. The control was trained on permuted pairs.",
                score_label=f"validation {self.validation_score}, percent",
                losses=_curves(logs, "loss", 1),
                scores=_curves(logs, "validation_score", 100),
                best_epoch=self.best_epoch,
            )
            section.figures.append(plot)
        return [section]


def read_log(path: Path) -> list[LogLine]:
    """The lines of a log; none if there is no file. A half-written last line of an interrupted run is skipped.

    Raises:
        ValueError: a line is damaged.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found += [made_of(LogLine, json.loads(line), ignores_unknown=True)] if line.endswith("}") else []
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: damaged ({error}). Train again.") from None
    return found


def _curves(logs: Mapping[str, Sequence[LogLine]], column: str, factor: float) -> list[Curve]:
    """A column over the epochs, for each log that has it."""
    values = {name: {line.epoch: getattr(line, column) for line in log} for name, log in logs.items()}
    known = {name: {epoch: factor * one for epoch, one in of.items() if one is not None} for name, of in values.items()}
    return [Curve(name, list(of), list(of.values())) for name, of in known.items() if of]
