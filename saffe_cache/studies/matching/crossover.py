"""Error over training size, err = a N^-b + c, of two fusions: from which size on is the other one better?

The paper (arXiv 2606.01207, eq. 10-12) draws such curves with b = 1 and fits none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq, minimize_scalar, nnls

_RESAMPLES, _GRID = 200, 200
_EXPONENTS = np.geomspace(0.01, 3, 20)
_UNIT = 1000.0
"""Pairs: N is counted in thousands within the fit."""

Errors = Mapping[int, Sequence[float]]
"""By training size, one for each seed."""
Curve = tuple[float, float, float]
"""a, b and c."""


def fit_power_law(errors: Errors) -> Curve:
    """a N^-b + c by least squares, N in thousands of pairs, a and c not negative, b from 0.01 to 3.

    For a given b the other two are a linear problem: b alone is searched.
    """
    sizes = np.repeat([size / _UNIT for size in errors], [len(values) for values in errors.values()])
    values = np.concatenate([np.asarray(values, float) for values in errors.values()])

    def solve(b: float) -> tuple[np.ndarray, float]:
        found: tuple[np.ndarray, float] = nnls(np.stack([sizes**-b, np.ones(len(sizes))], axis=1), values)
        return found

    residuals = [solve(b)[1] for b in _EXPONENTS]
    place = int(np.argmin(residuals))
    around = _EXPONENTS[max(place - 1, 0)], _EXPONENTS[min(place + 1, len(_EXPONENTS) - 1)]
    b = float(minimize_scalar(lambda b: solve(b)[1], bounds=around, method="bounded").x)
    a, c = solve(b)[0]
    return float(a), b, float(c)


def find_crossover(first: Curve, second: Curve, low: float, high: float) -> float | None:
    """The smallest N in [low, high] where the curves meet; None where they do not."""

    def gap(log_size: float) -> float:
        size = float(np.exp(log_size)) / _UNIT
        return float(_power_law(size, *first) - _power_law(size, *second))

    grid = np.linspace(np.log(low), np.log(high), _GRID)
    signs = np.sign([gap(place) for place in grid])
    places = np.flatnonzero(signs[:-1] * signs[1:] < 0)
    return float(np.exp(brentq(gap, grid[places[0]], grid[places[0] + 1]))) if len(places) else None


def compare_risks(first: Errors, second: Errors, names: tuple[str, str], seed: int = 0) -> dict[str, Any]:
    """Both fits and N*, with its interval over resampled seeds.

    `crossover` is None where the curves do not meet within the measured sizes; `share` says in how many of the
    resamples they do, and `low` and `high` span 95 % of N* among these. All three are None with one seed.
    """
    sizes = [size for size in first if size in second]
    if len(sizes) < 3:
        words = f"{names[0]} and {names[1]}: no curves, three parameters need three sizes or more, found {len(sizes)}"
        return {"names": list(names), "words": words}
    first, second = ({size: of[size] for size in sizes} for of in (first, second))
    low, high = float(min(sizes)), float(max(sizes))
    curves = fit_power_law(first), fit_power_law(second)
    crossover = find_crossover(*curves, low, high)
    several = len(first[sizes[0]]) > 1
    drawn = _resampled(first, second, (low, high), seed) if several else []
    share = len(drawn) / _RESAMPLES if several else None
    ends = [float(value) for value in np.quantile(drawn, (0.025, 0.975))] if drawn else [None, None]
    met = "no crossover" if crossover is None else f"they meet at N* = {crossover:.0f},"
    told = "one seed" if share is None else f"{share:.0%} of resampled seeds have one"
    told += f", 95 % of these from {ends[0]:.0f} to {ends[1]:.0f}" if drawn else ""
    return {
        "names": list(names),
        "curves": {name: dict(zip("abc", curve, strict=True)) for name, curve in zip(names, curves, strict=True)},
        "sizes": sizes,
        "crossover": crossover,
        "low": ends[0],
        "high": ends[1],
        "share": share,
        "words": f"{names[0]} and {names[1]}: {met} within {low:.0f} to {high:.0f} pairs ({told})",
    }


def _resampled(first: Errors, second: Errors, within: tuple[float, float], seed: int) -> list[float]:
    """Crossovers of the same sizes' errors with the seeds drawn again, where there is one."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(_RESAMPLES):
        chosen = {size: generator.integers(len(values), size=len(values)) for size, values in first.items()}
        again = [{size: [of[size][i] for i in chosen[size]] for size in chosen} for of in (first, second)]
        found.append(find_crossover(fit_power_law(again[0]), fit_power_law(again[1]), *within))
    return [one for one in found if one is not None]


def _power_law(size: Any, a: float, b: float, c: float) -> Any:
    return a * np.power(size, -b) + c
