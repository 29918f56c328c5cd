"""Cases in which every method was trained, and rules that are fitted to them: what `saffe align` advises by.

A case is one data set, one pair of encoders and one number of photos (or, in pipelines/alignment.py, one layer). The
cases that come with the package are in cases.json, which pipelines/few_pairs.py writes; `--few-pairs` takes others.

A rule advises one method where a measure is at most a threshold, and another where it is above. It is used only if it
loses less than one constant method on cases whose data set and encoders are both in none of those that it was fitted
to. Otherwise the advice is that constant, whatever was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from saffe_cache.core.json_schema import made_of
from saffe_cache.core.outputs import read_json
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.studies.few_pairs.result import FewPairsResult

TABLE = Path(__file__).with_name("cases.json")
LEAST_TRAINED = 8
"""Cases below which a table advises nothing."""
LEVEL = 0.9
"""Photos are enough for a method if it finds this part of what it finds with the largest number that was measured."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every method reached."""

    dataset: str
    name: str
    values: Mapping[str, tuple[float, ...]]
    """Of each method, for each seed: fractions."""
    measures: Mapping[str, float]
    """What is known before training, such as the number of photos."""
    encoders: str = ""
    """Of photos and texts."""

    @property
    def fusions(self) -> list[str]:
        return list(self.values)

    def mean(self, fusion: str) -> float:
        return float(np.mean(self.values[fusion]))

    @property
    def best(self) -> str:
        return max(self.values, key=self.mean)

    def regret(self, fusion: str) -> float:
        """How much more the best one finds."""
        return self.mean(self.best) - self.mean(fusion)

    def is_related(self, other: Case) -> bool:
        """Whether it has the data set or the encoders of another case."""
        return self.dataset == other.dataset or self.encoders == other.encoders


AnyCase = TypeVar("AnyCase", bound=Case)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One fusion where a measure is at most a threshold, another where it is above; or one fusion always."""

    below: str
    above: str
    measure: str | None = None
    threshold: float = 0.0

    def __call__(self, case: Case) -> str:
        return self.advise(case.measures)

    def advise(self, measures: Mapping[str, float]) -> str:
        return self.below if self.measure is None or measures[self.measure] <= self.threshold else self.above

    def __str__(self) -> str:
        if self.measure is None:
            return f"always {self.below}"
        return f"{self.below} where {self.measure} is at most {self.threshold:.3g}, else {self.above}"


Fit = Callable[[Sequence[AnyCase]], Rule]


def best_constant(cases: Sequence[Case]) -> Rule:
    """The fusion that loses least on these cases."""
    fusion = min(cases[0].fusions, key=lambda one: sum(case.regret(one) for case in cases))
    return Rule(below=fusion, above=fusion)


def best_threshold(cases: Sequence[Case]) -> Rule:
    """The one threshold on one measure that loses least on these cases; a constant where it loses as little."""
    rules = [best_constant(cases)]
    for measure in cases[0].measures:
        found = np.unique([case.measures[measure] for case in cases])
        for threshold in (found[:-1] + found[1:]) / 2:
            sides = [
                [case for case in cases if (case.measures[measure] <= threshold) == is_below]
                for is_below in (True, False)
            ]
            below, above = (best_constant(side).below for side in sides)
            rules.append(Rule(below=below, above=above, measure=measure, threshold=float(threshold)))
    return min(rules, key=lambda rule: sum(case.regret(rule(case)) for case in cases) - 1e-12 * (rule.measure is None))


def left_out(cases: Sequence[AnyCase], is_related: Callable[[AnyCase, AnyCase], bool], fit: Fit[AnyCase]) -> list[str]:
    """The advice for each case by a rule fitted to the cases that are not related to it; "" where there are none."""
    advised = []
    for case in cases:
        others = [one for one in cases if not is_related(one, case)]
        advised.append(fit(others)(case) if others else "")
    return advised


@dataclass(frozen=True, kw_only=True)
class MethodAdvice:
    """What a table of cases advises for photos without paired texts."""

    method: str
    rule: str
    """In words."""
    cases: int
    lost: float | None
    """On average, by rules that are fitted to unrelated cases; None where none is unrelated."""
    lost_by_constant: float | None
    """The same, by the best constant."""
    photos: int | None
    """The number with which the method reaches `LEVEL` of what it finds with the most; None if that is not known."""

    @property
    def sentence(self) -> str:
        if self.lost is None or self.lost_by_constant is None:
            tested = "which no other data set and encoders have tested"
        else:
            tested = (
                f"tested on data sets and encoders that were left out: a threshold loses {100 * self.lost:.1f} points "
                f"on average to the best method of each case, the best constant {100 * self.lost_by_constant:.1f}"
            )
        enough = ""
        if self.photos is not None:
            enough = f"; with {self.photos:,} photos it finds {LEVEL:.0%} of what it finds with the most measured"
        return f"{self.rule}, by {self.cases} cases in which all methods were trained, {tested}{enough}"


def advise_method(cases: Sequence[Case], measures: Mapping[str, float]) -> MethodAdvice | None:
    """The method that cases recommend where so much was measured; None if there are too few cases."""
    cases = comparable(cases, measures)
    if len(cases) < LEAST_TRAINED:
        return None
    lost = [_lost(cases, fit) for fit in (best_threshold, best_constant)]
    is_better = lost[0] is not None and lost[1] is not None and lost[0] < lost[1] - 1e-9
    rule = best_threshold(cases) if is_better else best_constant(cases)
    method = rule.advise(measures)
    return MethodAdvice(
        method=method,
        rule=str(rule),
        cases=len(cases),
        lost=lost[0],
        lost_by_constant=lost[1],
        photos=enough_photos(cases, method),
    )


def comparable(cases: Sequence[Case], measures: Mapping[str, float]) -> list[Case]:
    """The cases with the methods that all of them have, and the measures that all have and that are known."""
    methods = [name for name in (cases[0].values if cases else ()) if all(name in case.values for case in cases)]
    common = [name for name in measures if all(name in case.measures for case in cases)]
    return [
        Case(
            dataset=case.dataset,
            encoders=case.encoders,
            name=case.name,
            values={name: case.values[name] for name in methods},
            measures={name: case.measures[name] for name in common},
        )
        for case in cases
        if methods
    ]


def _lost(cases: Sequence[Case], fit: Fit[Case]) -> float | None:
    """What advice loses on average on cases whose data set and encoders it has not seen."""
    advised = left_out(cases, Case.is_related, fit)
    lost = [case.regret(method) for case, method in zip(cases, advised, strict=True) if method]
    return float(np.mean(lost)) if lost else None


def enough_photos(cases: Sequence[Case], method: str) -> int | None:
    """The median over data sets and encoders of the smallest number of photos that is enough for a method."""
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for case in cases:
        if "photos" in case.measures:
            curve = curves.setdefault((case.dataset, case.encoders), {})
            curve[int(case.measures["photos"])] = case.mean(method)
    found = [
        min(photos for photos, score in curve.items() if score >= LEVEL * curve[max(curve)])
        for curve in curves.values()
        if len(curve) > 1
    ]
    return sorted(found)[len(found) // 2] if found else None


def cases_of(result: FewPairsResult, measures: Mapping[str, Mapping[str, float]] | None = None) -> list[Case]:
    """The cases of a study of few pairs: its caches' own galleries, without search correction, and fusions as they are
    by default, not the forms that claims compare them with.

    The data set of a cache is its name up to the first hyphen, as in flickr8k-clip.zarr. `measures` are those of
    `saffe align`, by cache.
    """
    return [
        Case(
            dataset=setting.name.partition("-")[0],
            encoders=" with ".join((result.caches[setting.name].gallery, result.caches[setting.name].text)),
            name=f"{setting.name}, {setting.photos} photos",
            values={
                name: of.scores[setting.main_metric].seeds for name, of in setting.methods.items() if name in FUSIONS
            },
            measures={"photos": float(setting.photos), **(measures or {}).get(setting.name, {})},
        )
        for setting in result.settings
        if setting.name in result.caches
    ]


def read_cases(folder: str | None) -> list[Case]:
    """The cases of a result of `saffe few-pairs`, or those that come with the package.

    Raises:
        ValueError: the folder holds no such result, or the table is damaged.
    """
    if folder is not None:
        return cases_of(FewPairsResult.load(folder))
    try:
        return [made_of(Case, case) for case in read_json(TABLE)["cases"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{TABLE}: it is damaged ({error}). Install the package again.") from None
