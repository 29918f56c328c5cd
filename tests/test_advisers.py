"""How advice is judged: on cases with known answers, against scipy, and end to end on a tiny cache."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from synthetic_cache import make_cache

from pipelines import alignment
from pipelines.advisers import Case, advisers, correlations, judged, proposal
from saffe_cache.core.results import Estimate
from saffe_cache.studies.alignment.cases import best_threshold
from saffe_cache.studies.alignment.result import Evidence


def cases_with(found: list[tuple[str, float, float, float]], noise: float = 0.001) -> list[Case]:
    """Dataset, a measure, and what two fusions find."""
    generator = np.random.default_rng(0)
    return [
        Case(
            dataset=dataset,
            name=str(number),
            values={
                name: tuple((value + noise * generator.normal(size=3)).tolist())
                for name, value in (("no FAM", without), ("linear", linear))
            },
            measures={"useful": measure, "useless": float(generator.normal())},
            advised="linear",
            hypothesis="no FAM",
        )
        for number, (dataset, measure, without, linear) in enumerate(found)
    ]


def crossing(count: int) -> list[Case]:
    """Above 0.5 of the measure `linear` wins by 0.1, below it loses by as much; in two datasets."""
    return cases_with([("ab"[i % 2], i / count, 0.3, 0.4 if i / count > 0.5 else 0.2) for i in range(count)])


def test_advice_is_judged_by_what_it_loses() -> None:
    cases = cases_with([("a", 0, 0.3, 0.4), ("a", 1, 0.3, 0.1)], noise=0)
    assert judged(cases, ["linear", "linear"]) == pytest.approx({"best": 0.5, "within_noise": 0.5, "lost": 0.1})
    assert judged(cases, ["linear", "no FAM"]) == pytest.approx({"best": 1, "within_noise": 1, "lost": 0})
    assert advisers(cases)["at random"]["lost"] == pytest.approx((0.1 / 2 + 0.2 / 2) / 2)


def test_noise_does_not_count_as_a_better_fusion() -> None:
    [case] = cases_with([("a", 0, 0.3, 0.301)], noise=0.05)
    assert {case.within_noise(fusion) for fusion in case.fusions} == {True}
    [case] = cases_with([("a", 0, 0.3, 0.4)], noise=0.001)
    assert [case.within_noise(fusion) for fusion in case.fusions] == [False, True]


def test_threshold_is_proposed_if_it_holds_on_held_out_cases() -> None:
    rule = best_threshold(crossing(12))
    assert (rule.measure, rule.below, rule.above) == ("useful", "no FAM", "linear")
    assert 0.4 < rule.threshold < 0.6
    of = advisers(crossing(12))
    assert of["threshold fitted to the other datasets"]["best"] == 1
    assert of["best constant of the other cases"]["best"] < 0.6
    assert proposal(crossing(12)).startswith("no FAM where useful is at most 0.5")
    always = cases_with([("a", float(i % 3), 0.3, 0.4 if i != 4 else 0.29) for i in range(8)])
    assert proposal(always) == "always linear"


def test_correlations_within_datasets_equal_scipys() -> None:
    generator = np.random.default_rng(1)
    one = cases_with([("a", float(generator.normal()), 0.3, 0.3 + generator.random()) for _ in range(10)])
    found = correlations(one, lambda case: case.mean("linear"))
    for name, of in found.items():
        expected = spearmanr([case.measures[name] for case in one], [case.mean("linear") for case in one]).statistic
        assert of["rho"] == pytest.approx(expected)
        assert of["low"] <= of["rho"] <= of["high"]
    apart = [
        ("ab"[i // 10], i // 10 + 0.01 * generator.random(), 0, i // 10 + 0.01 * generator.random()) for i in range(20)
    ]
    found = correlations(cases_with(apart), lambda case: case.mean("linear"))  # across datasets it would be 0.9
    assert abs(found["useful"]["rho"]) < 0.6
    assert found["useful"]["p"] > 0.05
    assert correlations(crossing(12), lambda case: case.mean("linear"))["useful"]["p"] < 0.02


def gap(mean: float, low: float, high: float) -> Estimate:
    return Estimate(value=mean, low=low, high=high)


@pytest.mark.parametrize(
    ("changes", "alone", "paired"),
    [
        ({}, "linear", "concat"),
        ({"without_map": gap(0.05, 0.02, 0.08)}, "no FAM", "concat"),
        ({"without_map": None}, "linear", "concat"),
        ({"a_mlp": 0.3, "mlp_gain": gap(0.1, 0.07, 0.13)}, "decoder", "concat"),
        ({"a_mlp": 0.3, "mlp_gain": gap(0.1, -0.01, 0.21)}, "linear", "concat"),
        ({"a_mlp": 0.21, "mlp_gain": gap(0.01, 0.005, 0.015)}, "linear", "concat"),
        ({"token_gain": gap(0.1, 0.07, 0.13)}, "decoder", "decoder"),
        ({"a_lin": 0.01, "a_mlp": 0.005}, "no FAM", "concat"),
    ],
)
def test_earlier_rule_advised_decoders_beyond_noise(changes: dict[str, Any], alone: str, paired: str) -> None:
    usual = {"a_0": 0.0, "without_map": gap(-0.1, -0.12, -0.08), "a_lin": 0.2, "a_mlp": 0.2, "null": 0.01, "a_tok": 0.2}
    gains = {"mlp_gain": gap(0.0, -0.02, 0.02), "token_gain": gap(0.0, -0.03, 0.01)}
    evidence = Evidence(**(usual | gains | changes))
    assert [alignment.hypothesis(kind, evidence) for kind in (alignment.ALONE, alignment.BESIDE)] == [alone, paired]


@pytest.mark.slow
def test_pipeline_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [make_cache(tmp_path / f"{name}.zarr", {"train": 120, "dev": 30}, captions=3, classes=classes, signal=4)
              for name, classes in (("captions", 0), ("classes", 4))]  # fmt: skip
    arguments = [
        "--cache",
        *caches,
        "--work",
        str(tmp_path / "work"),
        "--seeds",
        "0",
        "--epochs",
        "0",
        "--workers",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["alignment.py", *arguments, "--train-fraction", "1"])
    alignment.main()
    path = tmp_path / "work" / "alignment-test.json"
    result = json.loads(path.read_text())
    alone, beside = (result[kind] for kind in (alignment.ALONE, alignment.BESIDE))
    assert [case["dataset"] for case in alone["cases"]] == ["captions", "classes"]
    assert list(alone["cases"][0]["values"]) == ["no FAM", "linear", "decoder"]
    assert list(beside["cases"][0]["values"]) == ["no FAM", "linear", "concat", "decoder"]
    linear = alone["cases"][0]["values"]
    assert linear["linear"] == pytest.approx(linear["no FAM"], abs=1e-3)  # untrained it is the ridge regression
    monkeypatch.setattr("saffe_cache.studies.alignment.align._measure", lambda *_: pytest.fail("measured twice"))
    alignment.main()
    assert json.loads(path.read_text()) == result


@pytest.mark.slow
def test_grown_cache_is_measured_again(tmp_path: Path) -> None:
    path, judged = tmp_path / "cache.zarr", []
    for count in (100, 120):
        shutil.rmtree(path, ignore_errors=True)
        [setting] = alignment.settings_of(make_cache(path, {"train": count, "dev": 10}))
        judged.append(alignment.measure(setting, tmp_path / "work", 3).photos["judged"])
    assert judged == [50, 60]
