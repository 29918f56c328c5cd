"""Verdicts on the paper's claims: its rule, the effect of degradation, and where the errors of two fusions meet.

arXiv 2606.01207, Table 4: "Pre-aligned, any size: Concat"; "Unaligned, any size: Cross". Section 5.3: the worse the
alignment, the larger concatenation's lead. Its "weakly aligned" features (concatenation below 4,000 pairs,
cross-attention above 8,000) have neither a definition nor a number there, and no rule here. Its error curves over
training size, err = a N^-b + c (eq. 10-12), are drawn there with b = 1 and not fitted; here they are fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize_scalar, nnls

from saffe_cache.studies.matching.findings import Crossover, Difference, Lead, PowerLaw, Trend

Accuracies = Mapping[str, Mapping[int, Sequence[float]]]
"""By system and training size: accuracy of each seed, in the same order everywhere."""
Errors = Mapping[int, Sequence[float]]
"""By training size, one for each seed."""
CONCAT = "concat"
BLIND = dict.fromkeys(("cross", "cross_equations"), " (which sees only one modality)")
_RESAMPLES, _GRID = 200, 200
_EXPONENTS = np.geomspace(0.01, 3, 20)
_UNIT = 1000.0
"""Pairs: N is counted in thousands within the fit."""


@dataclass(frozen=True)
class Features:
    """Which half of the rule applies."""

    are_aligned: bool
    num_aligning: int = 0
    """Photos of the ridge regression that made them aligned; 0 if the encoders did."""

    @property
    def kind(self) -> str:
        return "pre-aligned" if self.are_aligned else "non-aligned"

    def __str__(self) -> str:
        if self.num_aligning:
            return f"features made pre-aligned by a ridge regression of {self.num_aligning} other photos"
        return f"{self.kind} features"


def judge_rule(features: Features, accuracies: Accuracies, contenders: Sequence[str]) -> list[Lead]:
    """The rule at each size, for concatenation against each contender that was measured there.

    It is undecided unless the 95 % interval of the difference excludes 0. With one seed there is no interval, and
    nothing is decided.
    """
    found = []
    expected = 1 if features.are_aligned else -1
    for contender in contenders:
        for size, own in accuracies.get(contender, {}).items():
            if size not in accuracies.get(CONCAT, {}):
                continue
            lead = Difference.paired(accuracies[CONCAT][size], own)
            holds = lead.sign == expected if lead.sign else None
            found.append(Lead(contender=contender, size=size, lead=lead, holds=holds))
    return found


def rule_sentences(features: Features, judged: Sequence[Lead]) -> list[str]:
    """One sentence for each contender."""
    winner = "concatenation" if features.are_aligned else "cross-attention"
    sentences = []
    for contender in dict.fromkeys(one.contender for one in judged):
        of_it = [one for one in judged if one.contender == contender]
        leads = "; ".join(f"{one.size}: {one.lead.points()}" for one in of_it)
        by_verdict = {
            verdict: [f"{one.size}" for one in of_it if one.holds is held]
            for verdict, held in (("holds", True), ("fails", False), ("is undecided", None))
        }
        verdicts = ", ".join(f"{verdict} at {', '.join(sizes)}" for verdict, sizes in by_verdict.items() if sizes)
        sentences.append(
            f"the rule for {features}, that {winner} wins at any size, {verdicts} pairs against {contender}"
            f"{BLIND.get(contender, '')}; concat's lead in points by training pairs: {leads}"
        )
    return sentences


def judge_degradation(leads: Mapping[str, Sequence[float]], kind: str, contender: str, scale: int) -> Trend:
    """Does concatenation's lead grow as alignment falls? At each level the lead less that on clean features.

    Args:
        leads: by level, clean first: concat's accuracy less the contender's, for each seed.
        kind: noise or rotation.
        contender: a cross-attention.
        scale: training pairs.
    """
    (_, clean), *others = leads.items()
    changes = {level: Difference.paired(values, clean) for level, values in others}
    grown, fallen = (tuple(level for level, change in changes.items() if change.sign == sign) for sign in (1, -1))
    trend = f"grows at {len(grown)} and falls at {len(fallen)} of {len(changes)} levels; it"
    by_level = "; ".join(f"{level}: {change.points()}" for level, change in changes.items())
    sentence = (
        f"with {kind} concat's lead over {contender} {trend if len(clean) > 1 else 'is not judged by one seed; it'} is "
        f"{100 * sum(clean) / len(clean):+.1f} points on clean features and changes by {by_level}"
    )
    return Trend(
        kind=kind,
        contender=contender,
        scale=scale,
        changes=changes,
        grown=grown,
        fallen=fallen,
        sentence=sentence,
    )


def fit_power_law(errors: Errors) -> PowerLaw:
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
    return PowerLaw(a=float(a), b=b, c=float(c))


def find_crossover(first: PowerLaw, second: PowerLaw, low: float, high: float) -> float | None:
    """The smallest N in [low, high] where the curves meet; None where they do not."""

    def gap(log_size: float) -> float:
        size = float(np.exp(log_size))
        return first(size) - second(size)

    grid = np.linspace(np.log(low), np.log(high), _GRID)
    signs = np.sign([gap(place) for place in grid])
    places = np.flatnonzero(signs[:-1] * signs[1:] < 0)
    return float(np.exp(brentq(gap, grid[places[0]], grid[places[0] + 1]))) if len(places) else None


def compare_risks(first: Errors, second: Errors, names: tuple[str, str], seed: int = 0) -> Crossover:
    """Both fits and the size N* where they meet, with its interval over resampled seeds, if there are several."""
    sizes = [size for size in first if size in second]
    if len(sizes) < 3:
        sentence = f"{names[0]} and {names[1]}: no curves, since three parameters need three sizes, found {len(sizes)}"
        return Crossover(names=names, sentence=sentence)
    first, second = ({size: of[size] for size in sizes} for of in (first, second))
    low, high = float(min(sizes)), float(max(sizes))
    curves = fit_power_law(first), fit_power_law(second)
    crossover = find_crossover(*curves, low, high)
    several = len(first[sizes[0]]) > 1
    drawn = _resampled(first, second, (low, high), seed) if several else []
    share = len(drawn) / _RESAMPLES if several else None
    ends = [float(value) for value in np.quantile(drawn, (0.025, 0.975))] if drawn else [None, None]
    meeting = "no crossover" if crossover is None else f"they meet at N* = {crossover:.0f},"
    seeds = "one seed" if share is None else f"{share:.0%} of resampled seeds have one"
    seeds += f", 95 % of these from {ends[0]:.0f} to {ends[1]:.0f}" if drawn else ""
    return Crossover(
        names=names,
        sentence=f"{names[0]} and {names[1]}: {meeting} within {low:.0f} to {high:.0f} pairs ({seeds})",
        curves=dict(zip(names, curves, strict=True)),
        sizes=tuple(sizes),
        crossover=crossover,
        low=ends[0],
        high=ends[1],
        share=share,
    )


def _resampled(first: Errors, second: Errors, within: tuple[float, float], seed: int) -> list[float]:
    """The crossovers found with resampled seeds."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(_RESAMPLES):
        chosen = {size: generator.integers(len(values), size=len(values)) for size, values in first.items()}
        again = [{size: [of[size][i] for i in chosen[size]] for size in chosen} for of in (first, second)]
        found.append(find_crossover(fit_power_law(again[0]), fit_power_law(again[1]), *within))
    return [one for one in found if one is not None]
