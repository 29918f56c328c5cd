"""What a report is made of: finished runs and their evaluations, read from their folders into plain dataclasses.

Strict: a folder that is no run, no evaluation, no ablation, no episodes, no matching, no alignment and no captions is
refused, and so is a file that lacks a field, or whose details do not agree with its numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from saffe_cache.core.json_schema import known_part, made_of
from saffe_cache.core.outputs import read_json
from saffe_cache.evaluation.details import NAME as DETAILS_NAME
from saffe_cache.evaluation.details import Details, check_means, read_details
from saffe_cache.evaluation.results import EvaluationResult
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.report.ablations import Ablation, read_ablation
from saffe_cache.report.alignments import Alignment, read_alignment
from saffe_cache.report.captions import Captions, read_captions
from saffe_cache.report.episodes import Episodes, read_episodes
from saffe_cache.report.matches import Matches, read_matches

_OTHERS: Mapping[str, Callable[[Path], Any]] = {
    "ablation.json": read_ablation,
    "binding.json": read_episodes,
    "match.json": read_matches,
    "alignment.json": read_alignment,
    "caption.json": read_captions,
}
"""Results that stand in a folder of their own, and what reads them."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation's folder."""

    path: Path
    metrics: EvaluationResult
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    details: Details | None
    """None where an earlier release wrote the folder."""


@dataclass(frozen=True)
class LogLine:
    """One validation of a training."""

    epoch: int
    loss: float | None
    validation_score: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What result.json says, as far as a page shows it."""

    best_epoch: int
    best_validation_score: float
    validation_score: str
    trainable_parameters: int
    train_photos: int
    validation_photos: int
    steps: int
    seconds: float
    peak_memory_mb: float
    photos_seen: int
    texts_seen: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder."""

    path: Path
    spec: RunSpec
    config: Mapping[str, Any]
    result: Result
    log: tuple[LogLine, ...]
    permuted_log: tuple[LogLine, ...]
    """Of the control that was trained on permuted pairs; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """Everything that a report shows, in the order in which it was asked for."""

    runs: tuple[Run, ...]
    evaluations: tuple[Evaluation, ...]
    ablations: tuple[Ablation, ...]
    episodes: tuple[Episodes, ...]
    matches: tuple[Matches, ...]
    alignments: tuple[Alignment, ...]
    captions: Mapping[Path, Captions]


def read_material(folders: Sequence[str]) -> Material:
    """
    Raises:
        ValueError: a folder is nothing that a report shows, or a file in it is damaged.
    """
    runs: dict[Path, Run] = {}
    evaluations: dict[Path, Evaluation] = {}
    others: dict[str, dict[Path, Any]] = {file: {} for file in _OTHERS}
    for folder in map(Path, folders):
        place = folder.resolve()
        known = False
        for file, read in _OTHERS.items():
            if (folder / file).exists():
                others[file][place], known = read(folder / file), True
        if _verb(folder) == "train":
            runs[place], known = _read_run(folder), True
            for path in sorted(folder.glob("*/result.json")):
                evaluations.setdefault(path.parent.resolve(), _read_evaluation(path.parent))
        elif _verb(folder) == "evaluate":
            evaluations.setdefault(place, _read_evaluation(folder))
            parent, known = folder.resolve().parent, True
            if parent not in runs and _verb(parent) == "train":
                runs[parent] = _read_run(parent)
        if not known:
            lacks = f"none of {', '.join(('result.json', *_OTHERS))} is in it"
            raise ValueError(
                f"{folder}: {lacks if folder.exists() else 'nothing is there'}. Give a finished run's folder "
                "(saffe-train-fam --out), an evaluation's (saffe-index-eval --out), or one of saffe-ablate, "
                "saffe-bind, saffe-match, saffe-align or saffe-caption."
            )
    return Material(
        runs=tuple(runs.values()),
        evaluations=tuple(evaluations.values()),
        ablations=tuple(others["ablation.json"].values()),
        episodes=tuple(others["binding.json"].values()),
        matches=tuple(others["match.json"].values()),
        alignments=tuple(others["alignment.json"].values()),
        captions=others["caption.json"],
    )


def _verb(folder: Path) -> str | None:
    path = folder / "result.json"
    return read_json(path).get("verb") if path.exists() else None


def _read_run(folder: Path) -> Run:
    config = read_json(folder / "config.json")
    try:
        spec, given = RunSpec.from_json(config["run"]), config["config"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: damaged or of another version ({error}). Train again.") from None
    return Run(
        path=folder,
        spec=spec,
        config=given,
        result=_known_fields(Result, read_json(folder / "result.json"), folder / "result.json"),
        log=_read_log(folder / "log.jsonl"),
        permuted_log=_read_log(folder / "permuted" / "log.jsonl"),
    )


def _read_log(path: Path) -> tuple[LogLine, ...]:
    """Nothing where there is none; a half line at the end, as a kill leaves it, is left out."""
    if not path.exists():
        return ()
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if line.endswith("}"):
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not readable as JSON ({error}). Train again.") from None
            lines.append(_known_fields(LogLine, content, path))
    return tuple(lines)


def _read_evaluation(folder: Path) -> Evaluation:
    metrics = EvaluationResult.load(folder)
    content = read_json(folder / "config.json")
    details = read_details(folder) if (folder / DETAILS_NAME).exists() else None
    if details is not None:
        check_means(folder, details, {name: of[metrics.main_metric].value for name, of in metrics.systems.items()})
    return Evaluation(
        path=folder, metrics=metrics, config=content["config"], versions=content["versions"], details=details
    )


Made = TypeVar("Made")


def _known_fields(kind: type[Made], content: Any, path: Path) -> Made:
    """A dataclass from those fields of a JSON object that it has; the others are not for a page.

    Raises:
        ValueError: a field is missing or of another kind.
    """
    try:
        return made_of(kind, known_part(kind, content))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}. Run the stage that writes it again.") from None
