"""Cells into results: each system's scores over seeds, controls, risks and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from saffe_cache.studies.matching.aligning import alignment_in_words, null_control
from saffe_cache.studies.matching.controls import Control, failures, judge_controls, permuted_error, shuffled_error
from saffe_cache.studies.matching.crossover import compare_risks
from saffe_cache.studies.matching.fusions import FUSIONS
from saffe_cache.studies.matching.scores import METRICS
from saffe_cache.studies.matching.verdict import (
    CONCAT,
    Features,
    judge_degradation,
    judge_rule,
    over_seeds,
    paired,
    points,
    rule_in_words,
)

Found = Mapping[str, Any]
"""What `measure_cell` gives."""


def summarise(cells: Sequence[Found], features: Features, num_kinds: int, made: Found | None = None) -> dict[str, Any]:
    """Everything that follows from the cells.

    Args:
        cells: all of them.
        features: what they were measured on.
        num_kinds: of the test's photos.
        made: what `judge_alignment` gives of features made pre-aligned.
    """
    settings = _settings([cell for cell in cells if not cell["permuted"]])
    controls = _controls(cells, num_kinds)
    verdicts = _verdicts(settings, features)
    if made:
        controls.append(null_control(made, num_kinds))
        verdicts["verdict"].insert(0, alignment_in_words(made))
    judged = judge_controls(controls)
    return {"failures": failures(judged), "settings": settings, "controls": judged, **verdicts}


def _settings(cells: Iterable[Found]) -> list[dict[str, Any]]:
    """One object for each setting and scale; values in the order of the seeds."""
    groups: dict[tuple[str, int], list[Found]] = {}
    for cell in cells:
        groups.setdefault((cell["setting"], cell["scale"]), []).append(cell)
    found = []
    for (setting, scale), of in groups.items():
        first = of[0]
        share = first["majority"]
        systems: dict[str, list[Found]] = {}
        for cell in of:
            for name, scores in cell["systems"].items():
                systems.setdefault(name, []).append(scores)
        measured = [cell["alignment"] for cell in of if "alignment" in cell]
        found.append(
            {
                "setting": setting,
                "kind": first["kind"],
                "level": first["level"],
                "negatives": first["negatives"],
                "scale": scale,
                "pairs": first["pairs"],
                "chance": share**2 + (1 - share) ** 2,
                "majority": share,
                "alignment": {
                    name: float(np.mean([one[name] for one in measured])) for name in (measured[0] if measured else {})
                },
                "systems": {
                    name: {metric: _values([one["test"][metric] for one in scores]) for metric in METRICS}
                    | {"shuffled_auc": _values([one["shuffled"]["auc"] for one in scores])}
                    for name, scores in systems.items()
                },
                "seconds": sum(cell["seconds"] for cell in of),
            }
        )
    return found


def _values(values: Sequence[float]) -> dict[str, Any]:
    return {"values": list(values), **over_seeds(values)}


def _controls(cells: Sequence[Found], num_kinds: int) -> list[Control]:
    found: dict[str, Control] = {}
    for cell in cells:
        matches = cell["pairs"]["test"] // (1 + cell["negatives"])
        others = matches * cell["negatives"]
        if cell["permuted"]:
            which, judged, error = "labels permuted", "test", permuted_error(matches, others, num_kinds)
        else:
            which, judged, error = "photos shuffled", "shuffled", shuffled_error(matches, others)
        for system, scores in cell["systems"].items():
            name = f"{cell['setting']}, {cell['scale']} pairs, {system}, {which}"
            control = found.setdefault(name, Control(name, [], error, is_trained=cell["permuted"]))
            control.values.append(scores[judged]["auc"])
    return list(found.values())


def _verdicts(settings: Sequence[Found], features: Features) -> dict[str, Any]:
    clean = [one for one in settings if one["kind"] == "clean"]
    ratios = list(dict.fromkeys(one["negatives"] for one in clean))
    accuracies: dict[str, dict[int, list[float]]] = {}
    for one in clean:
        if one["negatives"] == ratios[0]:
            for name, scores in one["systems"].items():
                accuracies.setdefault(name, {})[one["scale"]] = scores["accuracy"]["values"]
    contenders = [name for name in accuracies if name in FUSIONS and not name.startswith(CONCAT)]
    judged = judge_rule(features, accuracies, contenders)
    errors = {
        name: {scale: [1 - value for value in values] for scale, values in of.items()}
        for name, of in accuracies.items()
    }
    crossovers = [
        compare_risks(errors[CONCAT], errors[name], (CONCAT, name)) for name in contenders if CONCAT in errors
    ]
    degraded = [verdict for kind in ("noise", "rotation") for verdict in _degradations(settings, kind)]
    best = _best_baselines(accuracies)
    words = [*rule_in_words(features, judged), *(one["words"] for one in degraded)]
    words += [one["words"] for one in crossovers] + best
    return {"rule": judged, "degradation": degraded, "crossovers": crossovers, "verdict": words}


def _degradations(settings: Sequence[Found], kind: str) -> list[dict[str, Any]]:
    """The lead of concat over each cross-attention from clean features to the worst, at the scale of these."""
    of_kind = [one for one in settings if one["kind"] == kind]
    if not of_kind:
        return []
    scale, negatives = of_kind[0]["scale"], of_kind[0]["negatives"]
    clean = [
        one for one in settings if one["kind"] == "clean" and (one["scale"], one["negatives"]) == (scale, negatives)
    ]
    found = []
    for name in of_kind[0]["systems"]:
        if name not in FUSIONS or name.startswith(CONCAT) or CONCAT not in of_kind[0]["systems"]:
            continue
        leads = {
            one["setting"].split(" ", 1)[1]: [
                own - other
                for own, other in zip(
                    one["systems"][CONCAT]["accuracy"]["values"],
                    one["systems"][name]["accuracy"]["values"],
                    strict=True,
                )
            ]
            for one in [*clean, *of_kind]
        }
        found.append(judge_degradation(leads, kind, name) | {"scale": scale})
    return found


def _best_baselines(accuracies: Mapping[str, Mapping[int, Sequence[float]]]) -> list[str]:
    """At the largest scale: the best fusion less the best of what needs none."""
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
    lead = paired(fusions[fusion][scale], others[baseline][scale])
    several = (
        "" if lead["low"] is None else "; each interval of this page alone is 95 %, over seeds, on the same photos"
    )
    return [
        f"at {scale} pairs the best fusion, {fusion}, less the best of what needs none, {baseline}: {points(lead)} "
        f"points (both chosen by these very numbers{several})"
    ]
