"""How well pairs are told apart: accuracy, F1, precision, recall and AUC, by scikit-learn."""

from __future__ import annotations

import numpy as np
from sklearn import metrics

METRICS = ("accuracy", "balanced_accuracy", "f1", "precision", "recall", "auc")


def judge(scores: np.ndarray, labels: np.ndarray, threshold: float = 0.0) -> dict[str, float]:
    """Fractions. What lies above the threshold is called a match; AUC needs none.

    Args:
        scores: of pairs, [n]; the higher, the more alike.
        labels: 1 where they belong together, else 0.
        threshold: chosen elsewhere.
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
    """Of the highest accuracy, halfway between two scores; of several the highest."""
    false, true, thresholds = metrics.roc_curve(labels, scores, drop_intermediate=False)
    right = true * (labels == 1).sum() + (1 - false) * (labels == 0).sum()
    place = int(np.argmax(right))
    if place + 1 == len(thresholds):
        return float(thresholds[-1]) - 1.0
    above = thresholds[place] if place else thresholds[1] + 2.0
    return float(above + thresholds[place + 1]) / 2


def auc_error(num_matches: int, num_others: int) -> float:
    """Standard error of the AUC of scores that know nothing (Hanley and McNeil, 1982, at 0.5)."""
    return float(np.sqrt((num_matches + num_others + 1) / (12 * num_matches * num_others)))
