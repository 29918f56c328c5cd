"""Where nothing can be found: other photos at the test pairs' places, and labels permuted in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from saffe_cache.matching.scores import auc_error

_FALSE_ALARMS = 1e-3
"""Of all controls that are judged together."""


def judge_controls(controls: Mapping[str, Sequence[float]], num_matches: int, num_others: int) -> list[dict[str, Any]]:
    """Whether the mean AUC of each control is at 0.5: AUC, since accuracy at a ratio of 1:5 rewards who says "never".

    The limit is that of a single seed's AUC, or of the mean over seeds where these differ more: a fusion that learned
    nothing still gives some order, which a lucky one finds a little of. It is so wide that all of these controls
    pass 999 times in 1,000 where all is well.

    Args:
        controls: by name, the AUC of each seed.
        num_matches: matching pairs of a seed's test.
        num_others: its other pairs.
    """
    deviations = float(norm.ppf(1 - _FALSE_ALARMS / (2 * max(1, len(controls)))))
    found = []
    for name, values in controls.items():
        spread = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
        limit = deviations * max(auc_error(num_matches, num_others), spread)
        mean = float(np.mean(values))
        found.append({"name": name, "auc": mean, "limit": limit, "passed": abs(mean - 0.5) <= limit})
    return found


def failures(judged: Sequence[Mapping[str, Any]]) -> list[str]:
    """In words."""
    return [
        f"{one['name']}: AUC {100 * one['auc']:.1f}, expected 50.0 ± {100 * one['limit']:.1f}"
        for one in judged
        if not one["passed"]
    ]
