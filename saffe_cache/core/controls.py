"""Controls: the same measurement where nothing can be found. Numbers whose controls fail are void.

A control is compared with a level: what it reaches by chance, or what a part of the system reaches alone. It may exceed
the level by three standard errors. Some controls may not fall below it by more either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

STANDARD_ERRORS = 3.0
"""By how many a control may miss its level."""


@dataclass(frozen=True)
class Control:
    """One control and its verdict; values are fractions."""

    name: str
    metric: str
    """The metric that the verdict rests on."""
    value: float
    level: float
    """The value to expect where nothing is found."""
    expected: str
    """What the level is, in words, such as "chance"."""
    limit: float | None
    """The largest value that passes; None where the data cannot decide."""
    passed: bool | None
    """None where the data cannot decide."""
    sentence: str
    """Value and limit in words, for reports."""
    lowest: float | None = None
    """The smallest value that passes; None where a low value is no failure."""

    @classmethod
    def at_most(
        cls, name: str, metric: str, value: float, level: float, error: float, expected: str = "chance"
    ) -> Self:
        """A control that passes at or below its level, or up to three standard errors above it."""
        limit = level + STANDARD_ERRORS * error
        sentence = f"{name}: {metric} is {100 * value:.2f}, expected at most {100 * limit:.2f} ({expected})"
        return cls(name, metric, value, level, expected, limit, value <= limit, sentence)

    @classmethod
    def within(
        cls, name: str, metric: str, value: float, level: float, tolerance: float | None, expected: str = "chance"
    ) -> Self:
        """A control that passes within a tolerance of its level; undecided where there is none."""
        sentence = f"{name}: {metric} is {100 * value:.2f}, expected {100 * level:.2f}"
        if tolerance is None:
            sentence += f" ({expected}); the data cannot decide"
            return cls(name, metric, value, level, expected, None, None, sentence)
        sentence += f" ± {100 * tolerance:.2f} ({expected})"
        limit, lowest, passed = level + tolerance, level - tolerance, abs(value - level) <= tolerance
        return cls(name, metric, value, level, expected, limit, passed, sentence, lowest)


def failed(controls: Iterable[Control]) -> list[str]:
    """The sentences of the controls that failed."""
    return [control.sentence for control in controls if control.passed is False]


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def interval_error(low: float, high: float) -> float:
    """The standard error of which a 95 % interval is 1.96 to each side."""
    return (high - low) / (2 * 1.96)
