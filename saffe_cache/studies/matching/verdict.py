"""From cells to a result: scores over seeds, controls, and verdicts on the paper's claims.

The verdicts are on its rule, on the effect of degradation, and on where the errors of two fusions meet.

arXiv 2606.01207, Table 4: "Pre-aligned, any size: Concat"; "Unaligned, any size: Cross". Section 5.3: the worse the
alignment, the larger concatenation's lead. Its "weakly aligned" features (concatenation below 4,000 pairs,
cross-attention above 8,000) have neither a definition nor a number there, and no rule here. Its error curves over
training size, err = a N^-b + c (eq. 10-12), are drawn there with b = 1 and not fitted; here they are fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq, minimize_scalar, nnls

from saffe_cache.core.results import Estimate
from saffe_cache.core.tables import percent
from saffe_cache.retrieval.metrics import over_seeds
from saffe_cache.studies.matching.config import FUSIONS
from saffe_cache.studies.matching.findings import (
    Crossover,
    Findings,
    Lead,
    MadeAlignment,
    MatchCell,
    MatchSetting,
    OverSeeds,
    PowerLaw,
    Trend,
    degraded,
    of_first_ratio,
)
from saffe_cache.studies.matching.planning import CellPlan
from saffe_cache.studies.matching.scores import collect_trials, judge_controls

Accuracies = Mapping[str, Mapping[int, Sequence[float]]]
"""By system and training size: accuracy of each seed, in the same order everywhere."""
Errors = Mapping[int, Sequence[float]]
"""By training size, one for each seed."""
CONCAT = "concat"
BLIND = dict.fromkeys(("cross", "cross_equations"), " (which sees only one modality)")
_RESAMPLES, _GRID = 200, 200
_EXPONENTS = np.geomspace(0.01, 3, 20)


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


def summarise(
    cells: Mapping[CellPlan, MatchCell], features: Features, num_kinds: int, made: MadeAlignment | None
) -> Findings:
    """Everything that follows from all cells.

    `num_kinds`: of the test's photos. `made`: what made the features pre-aligned, if anything did.
    """
    settings = _settings(cells)
    accuracies = _accuracies(settings)
    contenders = [name for name in accuracies if _is_contender(name)]
    rule = judge_rule(features, accuracies, contenders)
    trends = [trend for kind in ("noise", "rotation") for trend in _trends(settings, kind)]
    errors = {name: {size: [1 - one for one in of[size]] for size in of} for name, of in accuracies.items()}
    compared = contenders if CONCAT in errors else []
    crossovers = [compare_risks(errors[CONCAT], errors[name], (CONCAT, name)) for name in compared]
    return Findings(
        settings=tuple(settings),
        controls=tuple(judge_controls(collect_trials(cells, num_kinds, made))),
        rule=tuple(rule),
        degradation=tuple(trends),
        crossovers=tuple(crossovers),
        verdict=(
            *([_alignment_sentence(made)] if made else []),
            *rule_sentences(features, rule),
            *(one.sentence for one in trends),
            *(one.sentence for one in crossovers),
            *_best_baseline(accuracies),
        ),
    )


def _is_contender(name: str) -> bool:
    return name in FUSIONS and not name.startswith(CONCAT)


def _paired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """First less second, by seed."""
    return over_seeds([a - b for a, b in zip(first, second, strict=True)])


def _points(estimate: Estimate) -> str:
    return estimate.points() + (" (one seed)" if estimate.half is None else "")


def _alignment_sentence(made: MadeAlignment) -> str:
    """What the map did to the report's pairs."""
    before = "undefined, since the encoders' widths differ" if made.auc_before is None else percent(made.auc_before)
    permuted = made.auc_permuted
    return (
        f"features were made pre-aligned by a ridge regression of {made.photos} other photos, which are in no pair of "
        f"this result: AUC of the cosine on the report {percent(made.auc)}; before, {before}; with permuted pairs "
        f"{percent(float(np.mean(permuted)))}, from {percent(min(permuted))} to {percent(max(permuted))} in "
        f"{len(permuted)} permutations; chance 50.0"
    )


def _settings(cells: Mapping[CellPlan, MatchCell]) -> list[MatchSetting]:
    """One for each setting and scale, with values in the order of the seeds."""
    groups: dict[tuple[str, int], dict[CellPlan, MatchCell]] = {}
    for plan, cell in cells.items():
        if not plan.is_permuted:
            groups.setdefault((plan.setting, plan.scale), {})[plan] = cell
    return [_setting(next(iter(of)), list(of.values())) for of in groups.values()]


def _setting(plan: CellPlan, cells: Sequence[MatchCell]) -> MatchSetting:
    majority = cells[0].majority
    measured = [cell.alignment for cell in cells if cell.alignment]
    names = dict.fromkeys(name for cell in cells for name in cell.systems)
    scores = {name: [cell.systems[name] for cell in cells if name in cell.systems] for name in names}
    return MatchSetting(
        setting=plan.setting,
        kind=plan.degradation.kind,
        level=plan.degradation.level,
        negatives=plan.negatives,
        scale=plan.scale,
        pairs=cells[0].pairs,
        chance=majority**2 + (1 - majority) ** 2,
        majority=majority,
        alignment={name: float(np.mean([one[name] for one in measured])) for name in measured[0]} if measured else {},
        systems={
            name: {metric: OverSeeds.of([one.test[metric] for one in of_seeds]) for metric in of_seeds[0].test}
            | {"shuffled_auc": OverSeeds.of([one.shuffled["auc"] for one in of_seeds])}
            for name, of_seeds in scores.items()
        },
    )


def _accuracies(settings: Sequence[MatchSetting]) -> Accuracies:
    """By system and size, on clean features at the first ratio."""
    found: dict[str, dict[int, Sequence[float]]] = {}
    for one in of_first_ratio(settings):
        for name, scores in one.systems.items():
            found.setdefault(name, {})[one.scale] = scores["accuracy"].values
    return found


def _trends(settings: Sequence[MatchSetting], kind: str) -> list[Trend]:
    """Concat's lead over each cross-attention from clean features to the most degraded, at the scale of these."""
    levels = degraded(settings, kind)
    if not levels or CONCAT not in levels[-1].systems:
        return []

    def leads(name: str) -> dict[str, list[float]]:
        found = {}
        for one in levels:
            values = (one.systems[system]["accuracy"].values for system in (CONCAT, name))
            found[one.setting.split(" ", 1)[1]] = [own - other for own, other in zip(*values, strict=True)]
        return found

    contenders = filter(_is_contender, levels[-1].systems)
    return [judge_degradation(leads(name), kind, name, levels[0].scale) for name in contenders]


def _best_baseline(accuracies: Accuracies) -> list[str]:
    """At the largest scale: the best fusion less the best baseline."""
    scale = max((max(of) for name, of in accuracies.items() if name in FUSIONS), default=0)
    there = {name: of[scale] for name, of in accuracies.items() if scale in of}
    ranked = sorted(there, key=lambda name: -float(np.mean(there[name])))
    fusion = next((name for name in ranked if name in FUSIONS), None)
    baseline = next((name for name in ranked if name not in FUSIONS), None)
    if fusion is None or baseline is None:
        return []
    lead = _paired(there[fusion], there[baseline])
    several = "" if lead.low is None else "; each interval alone is 95 %, over seeds, on the same photos"
    return [
        f"at {scale} pairs the best fusion, {fusion}, less the best baseline, {baseline}: {_points(lead)} points "
        f"(both chosen by these numbers{several})"
    ]


def judge_rule(features: Features, accuracies: Accuracies, contenders: Sequence[str]) -> list[Lead]:
    """The rule at each size, for concatenation against each contender that was measured there.

    It is undecided unless the 95 % interval of the difference excludes 0; with one seed there is none.
    """
    expected, ours, found = 1 if features.are_aligned else -1, accuracies.get(CONCAT, {}), []
    for contender in contenders:
        for size in (size for size in accuracies[contender] if size in ours):
            lead = _paired(ours[size], accuracies[contender][size])
            holds = lead.sign == expected if lead.sign else None
            found.append(Lead(contender=contender, size=size, lead=lead, holds=holds))
    return found


def rule_sentences(features: Features, judged: Sequence[Lead]) -> list[str]:
    """One sentence for each contender."""
    winner = "concatenation" if features.are_aligned else "cross-attention"
    sentences = []
    for contender in dict.fromkeys(one.contender for one in judged):
        of_it = [one for one in judged if one.contender == contender]
        leads = "; ".join(f"{one.size}: {_points(one.lead)}" for one in of_it)
        verdicts = ", ".join(
            f"{verdict} at {', '.join(f'{one.size}' for one in of_it if one.holds is held)}"
            for verdict, held in (("holds", True), ("fails", False), ("is undecided", None))
            if held in {one.holds for one in of_it}
        )
        sentences.append(
            f"the rule for {features}, that {winner} wins at any size, {verdicts} pairs against {contender}"
            f"{BLIND.get(contender, '')}; concat's lead in points by training pairs: {leads}"
        )
    return sentences


def judge_degradation(leads: Mapping[str, Sequence[float]], kind: str, contender: str, scale: int) -> Trend:
    """Does concatenation's lead grow as alignment falls? At each level the lead less that on clean features.

    `leads`: by level, clean first, concat's accuracy less the contender's, for each seed.
    """
    (_, clean), *others = leads.items()
    changes = {level: _paired(values, clean) for level, values in others}
    grown, fallen = (tuple(level for level, change in changes.items() if change.sign == sign) for sign in (1, -1))
    trend = f"grows at {len(grown)} and falls at {len(fallen)} of {len(changes)} levels"
    trend = trend if len(clean) > 1 else "is not judged by one seed"
    by_level = "; ".join(f"{level}: {_points(change)}" for level, change in changes.items())
    sentence = (
        f"with {kind} concat's lead over {contender} {trend}; it is "
        f"{100 * sum(clean) / len(clean):+.1f} points on clean features and changes by {by_level}"
    )
    return Trend(
        kind=kind, contender=contender, scale=scale, changes=changes, grown=grown, fallen=fallen, sentence=sentence
    )


def fit_power_law(errors: Errors) -> PowerLaw:
    """a N^-b + c by least squares, N in thousands of pairs, a and c not negative, b from 0.01 to 3.

    For a given b the other two are a linear problem: b alone is searched.
    """
    sizes = np.repeat([size / 1000 for size in errors], [len(values) for values in errors.values()])
    values = np.concatenate([np.asarray(values, float) for values in errors.values()])

    def solve(b: float) -> Any:
        return nnls(np.stack([sizes**-b, np.ones(len(sizes))], axis=1), values)

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
