"""From cells to a result: scores over seeds, controls, and verdicts on the paper's claims.

The verdicts are on its rule, on the effect of degradation, and on where the errors of two fusions meet.

arXiv 2606.01207, Table 4: "Pre-aligned, any size: Concat"; "Unaligned, any size: Cross". Section 5.3: the worse the
alignment, the larger concatenation's lead. Its "weakly aligned" features (concatenation below 4,000 pairs,
cross-attention above 8,000) have neither a definition nor a number there, and no rule here. Its error curves over
training size, err = a N^-b + c (eq. 10-12), are drawn there with b = 1 and not fitted; here they are fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq, minimize_scalar, nnls

from saffe_cache.core.controls import Control
from saffe_cache.core.results import Estimate
from saffe_cache.core.tables import percent
from saffe_cache.retrieval.metrics import over_seeds
from saffe_cache.studies.matching.config import FUSIONS
from saffe_cache.studies.matching.findings import (
    Crossover,
    Lead,
    MadeAlignment,
    MatchCell,
    MatchSetting,
    OverSeeds,
    PowerLaw,
    Trend,
)
from saffe_cache.studies.matching.scores import Trials, judge_controls, permuted_error, shuffled_error

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


def _paired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """First less second, by seed."""
    return over_seeds([a - b for a, b in zip(first, second, strict=True)])


def _points(estimate: Estimate) -> str:
    return estimate.points() + (" (one seed)" if estimate.half is None else "")


class Summary(NamedTuple):
    """What follows from all cells."""

    settings: list[MatchSetting]
    controls: list[Control]
    rule: list[Lead]
    degradation: list[Trend]
    crossovers: list[Crossover]
    verdict: list[str]


def summarise(cells: Sequence[MatchCell], features: Features, num_kinds: int, made: MadeAlignment | None) -> Summary:
    """Everything that follows from the cells.

    Args:
        cells: all of them.
        features: that they were measured on.
        num_kinds: of the test's photos.
        made: what made the features pre-aligned, if anything did.
    """
    settings = _settings([cell for cell in cells if not cell.permuted])
    trials = _trials(cells, num_kinds)
    accuracies = _accuracies(settings)
    contenders = [name for name in accuracies if name in FUSIONS and not name.startswith(CONCAT)]
    rule = judge_rule(features, accuracies, contenders)
    errors = {
        name: {scale: [1 - value for value in values] for scale, values in of.items()}
        for name, of in accuracies.items()
    }
    crossovers = [
        compare_risks(errors[CONCAT], errors[name], (CONCAT, name)) for name in contenders if CONCAT in errors
    ]
    trends = [trend for kind in ("noise", "rotation") for trend in _trends(settings, kind)]
    verdict = rule_sentences(features, rule)
    verdict += [*(one.sentence for one in trends), *(one.sentence for one in crossovers)]
    verdict += _best_baselines(accuracies)
    if made:
        trials.append(null_trials(made, num_kinds))
        verdict.insert(0, alignment_sentence(made))
    return Summary(settings, judge_controls(trials), rule, trends, crossovers, verdict)


def alignment_sentence(made: MadeAlignment) -> str:
    """What the map did to the report's pairs."""
    before = "undefined, since the encoders' widths differ" if made.auc_before is None else percent(made.auc_before)
    permuted = made.auc_permuted
    return (
        f"features were made pre-aligned by a ridge regression of {made.photos} other photos, which are in no pair of "
        f"this result: AUC of the cosine on the report {percent(made.auc)}; before, {before}; with permuted pairs "
        f"{percent(float(np.mean(permuted)))}, from {percent(min(permuted))} to {percent(max(permuted))} in "
        f"{len(permuted)} permutations; chance 50.0"
    )


def null_trials(made: MadeAlignment, num_kinds: int) -> Trials:
    """The control that permuted pairs align nothing. `num_kinds`: of the report's photos."""
    error = permuted_error(made.matches, made.others, num_kinds)
    return Trials("cosine, made pre-aligned by permuted pairs", list(made.auc_permuted), error, is_trained=True)


def _settings(cells: Iterable[MatchCell]) -> list[MatchSetting]:
    """One for each setting and scale, with values in the order of the seeds."""
    groups: dict[tuple[str, int], list[MatchCell]] = {}
    for cell in cells:
        groups.setdefault((cell.setting, cell.scale), []).append(cell)
    found = []
    for of in groups.values():
        first = of[0]
        systems = dict.fromkeys(name for cell in of for name in cell.systems)
        scores = {name: [cell.systems[name] for cell in of if name in cell.systems] for name in systems}
        measured = [cell.alignment for cell in of if cell.alignment]
        found.append(
            MatchSetting(
                setting=first.setting,
                kind=first.kind,
                level=first.level,
                negatives=first.negatives,
                scale=first.scale,
                pairs=first.pairs,
                chance=first.majority**2 + (1 - first.majority) ** 2,
                majority=first.majority,
                alignment={
                    name: float(np.mean([one[name] for one in measured])) for name in (measured[0] if measured else {})
                },
                systems={
                    name: {metric: OverSeeds.of([one.test[metric] for one in of_seeds]) for metric in of_seeds[0].test}
                    | {"shuffled_auc": OverSeeds.of([one.shuffled["auc"] for one in of_seeds])}
                    for name, of_seeds in scores.items()
                },
            )
        )
    return found


def _trials(cells: Sequence[MatchCell], num_kinds: int) -> list[Trials]:
    found: dict[str, Trials] = {}
    for cell in cells:
        matches = cell.pairs["test"] // (1 + cell.negatives)
        others = matches * cell.negatives
        if cell.permuted:
            which, error = "labels permuted", permuted_error(matches, others, num_kinds)
        else:
            which, error = "photos shuffled", shuffled_error(matches, others)
        for system, scores in cell.systems.items():
            name = f"{cell.setting}, {cell.scale} pairs, {system}, {which}"
            trials = found.setdefault(name, Trials(name, [], error, is_trained=cell.permuted))
            trials.values.append((scores.test if cell.permuted else scores.shuffled)["auc"])
    return list(found.values())


def _accuracies(settings: Sequence[MatchSetting]) -> Accuracies:
    """By system and size, on clean features at the first ratio."""
    clean = [one for one in settings if one.kind == "clean"]
    found: dict[str, dict[int, Sequence[float]]] = {}
    for one in clean:
        if one.negatives == clean[0].negatives:
            for name, scores in one.systems.items():
                found.setdefault(name, {})[one.scale] = scores["accuracy"].values
    return found


def _trends(settings: Sequence[MatchSetting], kind: str) -> list[Trend]:
    """Concat's lead over each cross-attention from clean features to the most degraded, at the scale of these."""
    of_kind = [one for one in settings if one.kind == kind]
    if not of_kind or CONCAT not in of_kind[0].systems:
        return []
    place = of_kind[0].scale, of_kind[0].negatives
    clean = [one for one in settings if one.kind == "clean" and (one.scale, one.negatives) == place]

    def leads(one: MatchSetting, name: str) -> list[float]:
        values = (one.systems[system]["accuracy"].values for system in (CONCAT, name))
        return [own - other for own, other in zip(*values, strict=True)]

    return [
        judge_degradation(
            {one.setting.split(" ", 1)[1]: leads(one, name) for one in [*clean, *of_kind]}, kind, name, place[0]
        )
        for name in of_kind[0].systems
        if name in FUSIONS and not name.startswith(CONCAT)
    ]


def _best_baselines(accuracies: Accuracies) -> list[str]:
    """At the largest scale: the best fusion less the best baseline."""
    fusions = {name: of for name, of in accuracies.items() if name in FUSIONS}
    others = {name: of for name, of in accuracies.items() if name not in FUSIONS}
    if not fusions or not others:
        return []
    scale = max(max(of) for of in fusions.values())
    fusion, baseline = (
        max((name for name in of if scale in of[name]), key=lambda name: float(np.mean(of[name][scale])), default=None)
        for of in (fusions, others)
    )
    if fusion is None or baseline is None:
        return []
    lead = _paired(fusions[fusion][scale], others[baseline][scale])
    several = "" if lead.low is None else "; each interval alone is 95 %, over seeds, on the same photos"
    return [
        f"at {scale} pairs the best fusion, {fusion}, less the best baseline, {baseline}: {_points(lead)} points "
        f"(both chosen by these numbers{several})"
    ]


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
            lead = _paired(accuracies[CONCAT][size], own)
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
    changes = {level: _paired(values, clean) for level, values in others}
    grown, fallen = (tuple(level for level, change in changes.items() if change.sign == sign) for sign in (1, -1))
    trend = f"grows at {len(grown)} and falls at {len(fallen)} of {len(changes)} levels; it"
    by_level = "; ".join(f"{level}: {_points(change)}" for level, change in changes.items())
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
