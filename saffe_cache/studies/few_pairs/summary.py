"""From cells to what a result holds: means over seeds, leads with paired intervals, the reference, verdicts, controls.

Intervals are bootstraps over the reported photos of the mean over seeds. They cover which photos are searched, not
which were drawn to train on; for these, results hold the value of every seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saffe_cache.core.results import Estimate
from saffe_cache.fusion.registry import OF_PHOTOS_ALONE
from saffe_cache.retrieval.metrics import middle
from saffe_cache.studies.few_pairs.cells import Measured, Part, Trained
from saffe_cache.studies.few_pairs.claims import BEST, CLAIMS, Verdict, judge

Runs = Mapping[str, Sequence[Trained]]
"""Of each method, one for each seed."""


@dataclass(frozen=True, kw_only=True)
class MethodScore(Estimate):
    """One metric of one method: mean over seeds."""

    seeds: tuple[float, ...]
    """The value of each seed."""


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One method in one setting; fractions."""

    scores: Mapping[str, MethodScore]
    """By metric."""
    leads: Mapping[str, Estimate]
    """By metric, less the reference's; empty for the reference itself."""
    default_leads: Mapping[str, Estimate]
    """By metric, the default fusion's less this one's; empty for the default itself."""
    permuted: float | None
    """The main metric after training on permuted pairs, mean over seeds."""
    validation_score: float
    parameters: int
    seconds: float
    """Of training one run, mean over seeds; runs that were trained side by side share it."""


@dataclass(frozen=True, kw_only=True)
class FewPairsSetting:
    """A cache, a gallery and a number of photos."""

    name: str
    """The cache, and what is reported on where it is another, or with search correction."""
    photos: int
    """Of training and validation together, where that is held out."""
    train_photos: int
    validation_photos: int
    reference: str
    """The closed form with the highest validation score."""
    main_metric: str
    chance: Mapping[str, float]
    methods: Mapping[str, MethodResult]
    """Ranked by the main metric, best first."""


def runs_of(parts: Sequence[Part], num_seeds: int) -> tuple[dict[str, list[Trained]], dict[str, str]]:
    """The runs of each method that was trained with all seeds, and why the others could not be."""
    runs: dict[str, list[Trained]] = {}
    failed: dict[str, str] = {}
    for part in parts:
        failed |= part.failed
        for name, run in part.runs.items():
            runs.setdefault(name, []).append(run)
    return {name: of for name, of in runs.items() if len(of) == num_seeds}, failed


def reference_of(runs: Runs, closed_forms: Sequence[str]) -> str:
    """The closed form with the highest validation score, mean over seeds: chosen without the reported photos."""
    known = [name for name in closed_forms if name in runs]
    return max(known, key=lambda name: float(np.mean([one.validation_score for one in runs[name]])))


def lead_of(mine: Sequence[Measured], other: Sequence[Measured], metric: str) -> Estimate:
    """Mean over seeds of one method's metric less another's, with the paired interval over photos."""
    values = np.mean([one.values[metric] for one in mine]) - np.mean([one.values[metric] for one in other])
    if metric not in mine[0].resampled:
        return Estimate(value=float(values))
    low, high = middle(_resampled(mine, metric) - _resampled(other, metric))
    return Estimate(value=float(values), low=low, high=high)


def _resampled(of_seeds: Sequence[Measured], metric: str) -> np.ndarray:
    """Mean over seeds in each resample."""
    return np.mean([one.resampled[metric] for one in of_seeds], axis=0)  # type: ignore[no-any-return]


def setting_of(name: str, photos: int, runs: Runs, reference: str, main_metric: str) -> FewPairsSetting:
    """What all methods reach in one place."""
    first = runs[reference][0]
    measured = {method: [one.galleries[name] for one in of] for method, of in runs.items()}
    found = {method: _method_result(of, method, measured, reference) for method, of in runs.items()}
    ranked = sorted(found, key=lambda method: -found[method].scores[main_metric].value)
    return FewPairsSetting(
        name=name,
        photos=photos,
        train_photos=first.train_photos,
        validation_photos=first.validation_photos,
        reference=reference,
        main_metric=main_metric,
        chance=measured[reference][0].chance,
        methods={method: found[method] for method in ranked},
    )


def _method_result(
    runs: Sequence[Trained], method: str, measured: Mapping[str, Sequence[Measured]], reference: str
) -> MethodResult:
    own = measured[method]
    permuted = [one.permuted.value for one in own if one.permuted]

    def leads(name: str, against: str) -> dict[str, Estimate]:
        """By metric, of two methods of which this is one."""
        if name == against or not {name, against} <= measured.keys():
            return {}
        return {metric: lead_of(measured[name], measured[against], metric) for metric in own[0].resampled}

    return MethodResult(
        scores={metric: _score(own, metric) for metric in own[0].values},
        leads=leads(method, reference),
        default_leads=leads(OF_PHOTOS_ALONE, method),
        permuted=float(np.mean(permuted)) if permuted else None,
        validation_score=float(np.mean([one.validation_score for one in runs])),
        parameters=runs[0].parameters,
        seconds=float(np.mean([one.seconds for one in runs])),
    )


def _score(measured: Sequence[Measured], metric: str) -> MethodScore:
    values = tuple(one.values[metric] for one in measured)
    low, high = middle(_resampled(measured, metric)) if metric in measured[0].resampled else (None, None)
    return MethodScore(value=float(np.mean(values)), low=low, high=high, seeds=values)


def verdicts_of(places: Mapping[tuple[str, int], tuple[str, Runs, str]]) -> list[Verdict]:
    """The verdict on the claim of each method that has one and was measured with what it names.

    Args:
        places: by setting and number of photos, the main metric, the runs and the reference.
    """
    found = []
    for method, claim in CLAIMS.items():
        leads = {}
        metrics = []
        for place, (metric, runs, reference) in places.items():
            against = reference if claim.against == BEST else claim.against
            if method in runs and against in runs and against != method:
                mine, other = ([one.galleries[place[0]] for one in runs[name]] for name in (method, against))
                leads[place] = lead_of(mine, other, metric)
                metrics.append(metric)
        if leads:
            found.append(judge(method, " or ".join(dict.fromkeys(metrics)), leads))
    return found
