"""Where nothing can be found: other photos at the test pairs' places, and labels permuted in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm, t

from saffe_cache.studies.matching.scores import auc_error

_FALSE_ALARMS = {False: 1e-3, True: 1e-2}
"""Of all controls that are judged together; True for those that are trained."""


@dataclass(frozen=True)
class Control:
    """AUC, since accuracy at a ratio of 1:5 rewards who says "never"."""

    name: str
    values: list[float]
    """One for each seed."""
    error: float
    """Standard error of one of them, as far as it is known."""
    is_trained: bool
    """On what tells nothing: then seeds may differ by more than this error."""


def shuffled_error(num_matches: int, num_others: int) -> float:
    """Of a seed's AUC where the photos are shuffled: at most, since a photo's scores may exclude each other."""
    return float(2**0.5 * auc_error(num_matches, num_others))


def permuted_error(num_matches: int, num_others: int, num_kinds: int) -> float:
    """Of a seed's AUC after training on what was permuted.

    What learned nothing still puts things in some order. Photos of one class are alike to it, and so are a class's
    texts: that is an order of few things, by chance a good or a bad one.

    Args:
        num_matches: matching pairs of the test.
        num_others: its other pairs.
        num_kinds: of the test's photos, as their texts tell them apart: the classes, or all photos with captions.
    """
    return auc_error(min(num_matches, num_kinds), min(num_others, num_kinds * (num_kinds - 1)))


def judge_controls(controls: Sequence[Control]) -> list[dict[str, Any]]:
    """Whether the mean AUC of each control is at 0.5.

    The limit is a normal quantile of the known error of the mean over seeds; for what is trained it is at least
    Student's quantile, with a degree of freedom less than seeds, of the error that the seeds show. Where all is well,
    all controls of shuffled photos pass 999 times in 1,000, and all that are trained 99 times in 100: were that as
    strict, three seeds could hardly ever judge one. `passed` is None, and so is `limit`, where it is not judged: with
    one seed of what is trained, and wherever the limit lies beyond any AUC.
    """
    found = []
    for one in controls:
        count = sum(other.is_trained == one.is_trained for other in controls)
        limit = _limit(one, 1 - _FALSE_ALARMS[one.is_trained] / (2 * count))
        mean = float(np.mean(one.values))
        is_judged = limit < 0.5
        found.append(
            {
                "name": one.name,
                "auc": mean,
                "limit": limit if is_judged else None,
                "passed": abs(mean - 0.5) <= limit if is_judged else None,
            }
        )
    return found


def failures(judged: Sequence[Mapping[str, Any]]) -> list[str]:
    """In words."""
    return [
        f"{one['name']}: AUC {100 * one['auc']:.1f}, expected 50.0 ± {100 * one['limit']:.1f}"
        for one in judged
        if one["passed"] is False
    ]


def _limit(control: Control, level: float) -> float:
    num_seeds = len(control.values)
    known = float(norm.ppf(level) * control.error / num_seeds**0.5)
    if not control.is_trained:
        return known
    if num_seeds == 1:
        return float("inf")
    return max(known, float(t.ppf(level, num_seeds - 1) * np.std(control.values, ddof=1) / num_seeds**0.5))
