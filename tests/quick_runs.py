"""Short trainings and reports on synthetic caches, for tests that look at what a report says."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.core.items import Ragged
from saffe_cache.core.results import exit_status
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.evaluate import evaluate
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.inputs.pairs import same_training_pairs, select_pairs
from saffe_cache.protocols.setting import Setting
from saffe_cache.store.reader import open_cache
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.runs import open_run, run_cache
from saffe_cache.training.train import train

Report = dict[str, Any]


def quick_train(cache: str, out: Path, **options: Any) -> str:
    quick = {"fusion": "reuse", "epochs": 6, "batch_size": 64, "control_epochs": 1, "log": ("none",), "device": "cpu"}
    return train(TrainConfig(cache=cache, out=str(out), **(quick | options)))


def report_of(cache: str, run: str, **options: Any) -> Report:
    """Evaluate without baselines, by default: result.json, config.json, report.txt as `text`, the exit status."""
    quick = {"baselines": "none", "device": "cpu"}
    with contextlib.redirect_stdout(io.StringIO()):
        out = Path(evaluate(EvaluateConfig(cache=cache, run=run, **(quick | options))))
    written = {"out": str(out), "text": (out / "report.txt").read_text(), "status": exit_status(str(out))}
    result, config = (json.loads((out / name).read_text()) for name in ("result.json", "config.json"))
    return config | result | written  # type: ignore[no-any-return]


def value(report: Report, metric: str, control: str | None = None) -> float:
    """Of the FAM, or of one of its controls."""
    scores = report["control_scores"][control] if control else report["systems"]["fam"]
    return float(scores[metric]["value"])


def error_of(score: dict[str, float]) -> float:
    """Standard error, from the 95 % interval."""
    return (score["high"] - score["low"]) / (2 * 1.96)


def setting_of(
    cache_path: str, run: str, kind: Any, *, paired_texts: bool = False, split: str = "test"
) -> tuple[Setting, Fusion]:
    """What a report of a run is measured on, and its model."""
    cache = run_cache(run, open_cache(cache_path))
    spec, model, _ = open_run(run, cache)
    gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    pairs = select_pairs(cache.table, gallery, text, split, kind, first_paired=paired_texts)
    return Setting(FeatureLoader(cache, spec), pairs, same_training_pairs(spec, cache, run)[0].rows, 0), model


def first_labels(labels: Ragged) -> np.ndarray:
    """The class of each photo that has one."""
    return labels.values[labels.offsets[:-1]]
