"""How well pairs are told apart, and controls: shuffled photos, and permuted labels or pairs in training.

All controls are of the AUC, since accuracy at a ratio of 1:5 rewards always saying no.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t
from sklearn import metrics

from saffe_cache.core.controls import Control
from saffe_cache.studies.matching.findings import MadeAlignment, MatchCell
from saffe_cache.studies.matching.planning import CellPlan

_FALSE_ALARMS = {False: 1e-3, True: 1e-2}
"""Of all controls that are judged together; True for those that are trained."""


def judge(scores: np.ndarray, labels: np.ndarray, threshold: float = 0.0) -> dict[str, float]:
    """Fractions, of pairs' scores [n] and labels, which are 1 where they belong together.

    Pairs above the threshold, which is chosen elsewhere, count as matches; AUC needs none.
    """
    called = scores > threshold
    found = {
        "accuracy": metrics.accuracy_score(labels, called),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, called),
        "f1": metrics.f1_score(labels, called, zero_division=0.0),
        "precision": metrics.precision_score(labels, called, zero_division=0.0),
        "recall": metrics.recall_score(labels, called),
        "auc": metrics.roc_auc_score(labels, scores),
    }
    return {name: float(value) for name, value in found.items()}


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the highest accuracy, halfway between two scores; the highest of several."""
    false, true, thresholds = metrics.roc_curve(labels, scores, drop_intermediate=False)
    right = true * (labels == 1).sum() + (1 - false) * (labels == 0).sum()
    thresholds = np.array([thresholds[1] + 2.0, *thresholds[1:], thresholds[-1] - 2.0])
    place = int(np.argmax(right))
    return float(thresholds[place : place + 2].mean())


@dataclass(frozen=True)
class Trials:
    """AUC of one control."""

    name: str
    values: list[float]
    """One for each seed."""
    error: float
    """Standard error of one of them, as far as it is known."""
    is_trained: bool
    """Trained on uninformative data: then seeds may differ by more than this error."""


def auc_error(num_matches: int, num_others: int) -> float:
    """Standard error of the AUC of uninformative scores (Hanley and McNeil, 1982, at 0.5)."""
    return float(np.sqrt((num_matches + num_others + 1) / (12 * num_matches * num_others)))


def shuffled_error(num_matches: int, num_others: int) -> float:
    """Upper bound on the error of a seed's AUC with shuffled photos: a photo's scores may exclude each other."""
    return float(2**0.5 * auc_error(num_matches, num_others))


def permuted_error(num_matches: int, num_others: int, num_kinds: int) -> float:
    """Error of a seed's AUC after training on permuted data.

    A model that learned nothing still orders its inputs. It treats photos of one class alike, and texts of one class
    too: that is an order of few things, good or bad by chance. `num_kinds` are the test's photos, as distinguished by
    their texts: classes, or all photos with captions.
    """
    return auc_error(min(num_matches, num_kinds), min(num_others, num_kinds * (num_kinds - 1)))


def collect_trials(cells: Mapping[CellPlan, MatchCell], num_kinds: int, made: MadeAlignment | None) -> list[Trials]:
    """The controls of all cells, and that permuted pairs align nothing. `num_kinds`: of the report's photos."""
    found: dict[str, Trials] = {}
    for plan, cell in cells.items():
        matches = cell.pairs["test"] // (1 + plan.negatives)
        others = matches * plan.negatives
        if plan.is_permuted:
            which, error = "labels permuted", permuted_error(matches, others, num_kinds)
        else:
            which, error = "photos shuffled", shuffled_error(matches, others)
        for system, scores in cell.systems.items():
            name = f"{plan.setting}, {plan.scale} pairs, {system}, {which}"
            trials = found.setdefault(name, Trials(name, [], error, is_trained=plan.is_permuted))
            trials.values.append((scores.test if plan.is_permuted else scores.shuffled)["auc"])
    return [*found.values(), *([null_trials(made, num_kinds)] if made else [])]


def null_trials(made: MadeAlignment, num_kinds: int) -> Trials:
    """The control that permuted pairs align nothing."""
    error = permuted_error(made.matches, made.others, num_kinds)
    return Trials("cosine, made pre-aligned by permuted pairs", list(made.auc_permuted), error, is_trained=True)


def judge_controls(controls: Sequence[Trials]) -> list[Control]:
    """Whether the mean AUC of each control is at 0.5.

    The tolerance is a normal quantile of the known error of the mean over seeds; for trained controls it is at least
    Student's quantile, with one degree of freedom less than seeds, of the error that the seeds show. If all is well,
    all controls of shuffled photos pass 999 times in 1,000, and all trained ones 99 times in 100: with the stricter
    level, three seeds could hardly ever decide. A control is undecided with one seed of a trained one, and wherever
    the tolerance admits any AUC.
    """
    counts = Counter(one.is_trained for one in controls)
    judged = []
    for one in controls:
        num_seeds, level = len(one.values), 1 - _FALSE_ALARMS[one.is_trained] / (2 * counts[one.is_trained])
        tolerance = float(norm.ppf(level) * one.error / num_seeds**0.5)
        if one.is_trained:
            spread = np.std(one.values, ddof=1) / num_seeds**0.5 if num_seeds > 1 else np.inf
            tolerance = max(tolerance, float(t.ppf(level, max(1, num_seeds - 1)) * spread))
        mean = float(np.mean(one.values))
        judged.append(Control.within(one.name, "AUC", mean, 0.5, tolerance if tolerance < 0.5 else None))
    return judged
