"""Candidates timed side by side, and the figures that come of it.

A machine's speed changes from second to second, with what else it does. So candidates take turns, round by round,
within one run; what counts is the ratio of two candidates in the same round, its median over the rounds, and a
bootstrap interval of that median. A rate tells what kind of machine this is: it is never compared across runs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Candidate = Callable[[], int]
"""Does its share of a round; returns how much that was, in a unit that all candidates share, such as rows or bytes."""

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table."""

    name: str
    unit: str
    """Of `value`: "ratio", or for instance "MB/s"."""
    value: float | None = None
    """None where it could not be measured; `note` tells why."""
    interval: tuple[float, float] | None = None
    """95 % of bootstrap resamples of the rounds have their median here."""
    at_least: float | None = None
    """The target, where there is one."""
    at_most: float | None = None
    """The target of what is to be small: memory, or a time over another."""
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the target is; None where there is no target or no value."""
        if self.value is None or (self.at_least is None and self.at_most is None):
            return None
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "is_met": self.is_met}


def not_installed(name: str, unit: str = "ratio") -> Figure:
    """The line of a competitor that is missing here."""
    return Figure(name=name, unit=unit, note="not installed")


@dataclass(frozen=True)
class Rounds:
    """What each candidate did in a second, in each round."""

    rates: Mapping[str, np.ndarray]
    """float64 [rounds] of each candidate."""

    def ratio(self, candidate: str, other: str, name: str, **options: Any) -> Figure:
        """How many times the other's rate a candidate has; `options` are fields of the figure."""
        ratios = self.rates[candidate] / self.rates[other]
        return Figure(name=name, unit="ratio", value=float(np.median(ratios)), interval=_interval(ratios), **options)

    def rate(self, candidate: str, name: str, unit: str, scale: float = 1.0, **options: Any) -> Figure:
        """A candidate's own rate, times `scale`."""
        rates = self.rates[candidate] * scale
        return Figure(name=name, unit=unit, value=float(np.median(rates)), interval=_interval(rates), **options)


def take_turns(
    candidates: Mapping[str, Candidate],
    rounds: int,
    *,
    before: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Time all candidates once in each round, in an order drawn anew each time.

    Each has one turn ahead that does not count. What runs beside the interpreter (an accelerator, threads) is the
    candidate's to wait for.

    Args:
        before: done before each turn, and not timed.
    """
    generator = random.Random(0)
    order = list(candidates)
    rates: dict[str, list[float]] = {name: [] for name in order}
    for counted in range(-1, rounds):
        generator.shuffle(order)
        for name in order:
            before()
            started = clock()
            amount = candidates[name]()
            seconds = clock() - started
            if counted >= 0:
                rates[name].append(amount / seconds)
    return Rounds({name: np.array(found) for name, found in rates.items()})


def _interval(values: np.ndarray) -> tuple[float, float]:
    """95 % of the medians of resamples, by the percentile bootstrap (Efron 1979)."""
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[drawn], axis=1), [0.025, 0.975])
    return float(low), float(high)
