"""Verdicts on controls: what passes, what fails, and what is said of it."""

from __future__ import annotations

import numpy as np
import pytest

from saffe_cache.core.controls import Control, failed, interval_error, standard_error


def test_control_passes_up_to_three_standard_errors_above_level() -> None:
    inside = Control.at_most("a", "map", 0.129, 0.1, 0.01)
    outside = Control.at_most("b", "map", 0.131, 0.1, 0.01, "no more than text_only")
    assert (inside.passed, outside.passed) == (True, False)
    assert Control.at_most("c", "map", 0.0, 0.1, 0.01).passed
    assert failed([inside, outside]) == ["b: map is 13.10, expected at most 13.00 (no more than text_only)"]


def test_two_sided_control_fails_on_either_side() -> None:
    verdicts = [Control.within("a", "accuracy", value, 0.5, 0.02).passed for value in (0.47, 0.49, 0.51, 0.53)]
    assert verdicts == [False, True, True, False]
    assert failed([Control.within("a", "accuracy", 0.47, 0.5, 0.02)]) == [
        "a: accuracy is 47.00, expected 50.00 ± 2.00 (chance)"
    ]


def test_undecided_control_is_no_failure() -> None:
    undecided = Control.within("a", "auc", 0.9, 0.5, None)
    assert undecided.passed is None
    assert undecided.limit is None
    assert failed([undecided]) == []


def test_standard_errors_equal_their_formulas() -> None:
    values = np.random.default_rng(0).normal(size=400)
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / 20)
    assert interval_error(0.3 - 1.96 * 0.02, 0.3 + 1.96 * 0.02) == pytest.approx(0.02)
