"""Cells into results: each system's scores over seeds, the controls, and the sentences of the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saffe_cache.core.controls import Control
from saffe_cache.core.tables import percent
from saffe_cache.studies.matching.config import FUSIONS
from saffe_cache.studies.matching.findings import (
    Crossover,
    Difference,
    Lead,
    MadeAlignment,
    MatchCell,
    MatchSetting,
    OverSeeds,
    Trend,
)
from saffe_cache.studies.matching.scores import Trials, judge_controls, permuted_error, shuffled_error
from saffe_cache.studies.matching.verdict import (
    CONCAT,
    Features,
    compare_risks,
    judge_degradation,
    judge_rule,
    rule_sentences,
)


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


def _accuracies(settings: Sequence[MatchSetting]) -> Mapping[str, Mapping[int, Sequence[float]]]:
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


def _best_baselines(accuracies: Mapping[str, Mapping[int, Sequence[float]]]) -> list[str]:
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
    lead = Difference.paired(fusions[fusion][scale], others[baseline][scale])
    several = "" if lead.low is None else "; each interval alone is 95 %, over seeds, on the same photos"
    return [
        f"at {scale} pairs the best fusion, {fusion}, less the best baseline, {baseline}: {lead.points()} points "
        f"(both chosen by these numbers{several})"
    ]
