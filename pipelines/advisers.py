"""How good is advice? Cases in which every fusion was trained, and advisers: ours, trivial ones, a fitted one.

A case is one combination of layers and one kind of gallery. Its values are scores of each fusion, one for each seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from saffe_cache.retrieval.metrics import seed_interval
from saffe_cache.studies.alignment.cases import Case as TrainedCase
from saffe_cache.studies.alignment.cases import best_constant, best_threshold, left_out

Adviser = Callable[["Case"], str]
_RESAMPLES = 2000
LEAST_CASES = 4
"""For correlations, and for a rule to be proposed."""


@dataclass(frozen=True, kw_only=True)
class Case(TrainedCase):
    """One combination of layers, one kind of gallery; "no FAM" is among its fusions."""

    advised: str
    """By the rule of saffe_cache.studies.alignment.result."""
    hypothesis: str
    """By the rule that it replaced."""
    metric: str = ""
    """What the values are."""
    chance: float = 0.0
    shuffled: float = 0.0
    """Of `linear` with the photos shuffled, mean over seeds; with paired texts, what the texts alone find."""
    failures: Sequence[str] = ()
    """Failed controls of its runs."""

    def within_noise(self, fusion: str) -> bool:
        """Whether the best fusion is not clearly better: the 95 % t-interval of the paired difference contains 0."""
        difference = np.subtract(self.values[self.best], self.values[fusion])
        return fusion == self.best or seed_interval(difference.tolist())[1] <= 0


def judged(cases: Sequence[Case], advised: Sequence[str]) -> dict[str, float]:
    """How often the best fusion was advised, how often one within noise of it, and what was lost on average."""
    both = list(zip(cases, advised, strict=True))
    return {
        "best": float(np.mean([fusion == case.best for case, fusion in both])),
        "within_noise": float(np.mean([case.within_noise(fusion) for case, fusion in both])),
        "lost": float(np.mean([case.regret(fusion) for case, fusion in both])),
    }


def advisers(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Our rule, every constant, chance, and what can be fitted, each judged on cases that it was not fitted to."""
    fusions = cases[0].fusions
    found = {
        "saffe align": judged(cases, [case.advised for case in cases]),
        "the rule before it": judged(cases, [case.hypothesis for case in cases]),
    }
    found |= {f"always {one}": judged(cases, [one] * len(cases)) for one in fusions}
    each = [judged(cases, [one] * len(cases)) for one in fusions]
    found["at random"] = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
    if len(cases) > 1:
        found["best constant of the other cases"] = judged(cases, left_out(cases, _is_same, best_constant))
        found["threshold fitted to the other cases"] = judged(cases, left_out(cases, _is_same, best_threshold))
    if len({case.dataset for case in cases}) > 1:
        advised = left_out(cases, lambda one, other: one.dataset == other.dataset, best_threshold)
        found["threshold fitted to the other datasets"] = judged(cases, advised)
    return found


def _is_same(one: Case, other: Case) -> bool:
    return one is other


def proposal(cases: Sequence[Case]) -> str:
    """The simplest rule that these cases support: a threshold only where it loses less on cases left out."""
    of = advisers(cases)
    if len(cases) < LEAST_CASES:
        return f"no rule: {len(cases)} cases, at least {LEAST_CASES} are needed"
    fitted, constant = "threshold fitted to the other cases", "best constant of the other cases"
    is_better = of[fitted]["lost"] < of[constant]["lost"]
    return str(best_threshold(cases) if is_better else best_constant(cases))


def correlations(cases: Sequence[Case], gain: Callable[[Case], float], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Spearman's rank correlation of each measure with a gain.

    Ranks are taken within each dataset, whose scores are of other metrics and sizes. The interval is a bootstrap over
    cases, p the share of permutations within datasets that correlate as much. Layers of one encoder are no independent
    cases, so both are too optimistic. Fewer than `LEAST_CASES` cases give no correlation.
    """
    if len(cases) < LEAST_CASES:
        return {}
    gains = np.array([gain(case) for case in cases])
    groups = [np.flatnonzero([case.dataset == one for case in cases]) for one in {case.dataset: 0 for case in cases}]
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(group, (_RESAMPLES, len(group))) for group in groups]
    mixed = [group[np.argsort(generator.random((_RESAMPLES, len(group))), axis=1)] for group in groups]
    found = {}
    for name in cases[0].measures:
        values = np.array([case.measures[name] for case in cases])
        value = float(_rank_correlation([values[None, of] for of in groups], [gains[None, of] for of in groups])[0])
        resampled = _rank_correlation([values[of] for of in drawn], [gains[of] for of in drawn])
        nulls = _rank_correlation([values[None, of] for of in groups], [gains[of] for of in mixed])
        low, high = np.percentile(resampled, [2.5, 97.5])
        p = (1 + int((np.abs(nulls) >= abs(value) - 1e-12).sum())) / (1 + _RESAMPLES)
        found[name] = {"rho": value, "low": float(low), "high": float(high), "p": p}
    return found


def _rank_correlation(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> np.ndarray:
    """Of groups [resamples, cases], ranked within each; 0 where nothing varies."""
    sides = []
    for groups in (ours, theirs):
        ranks = [rankdata(group, axis=1) / group.shape[1] for group in groups]
        sides.append(np.concatenate([of - of.mean(axis=1, keepdims=True) for of in ranks], axis=1))
    lengths = np.linalg.norm(sides[0], axis=1) * np.linalg.norm(sides[1], axis=1)
    return np.asarray((sides[0] * sides[1]).sum(axis=1) / np.maximum(lengths, 1e-12))
