"""Advice of a method from cases in which all were trained: fitted to some, tested on others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_cache import make_cache

from pipelines import few_pairs as pipeline
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.studies.alignment import cases as module
from saffe_cache.studies.alignment.align import align
from saffe_cache.studies.alignment.cases import Case, advise_method, enough_photos, left_out, read_cases
from saffe_cache.studies.alignment.config import AlignConfig
from saffe_cache.studies.alignment.result import AlignmentResult
from saffe_cache.studies.few_pairs.claims import BEST, CLAIMS, VARIANTS, Method
from saffe_cache.studies.few_pairs.config import FewPairsConfig
from saffe_cache.studies.few_pairs.few_pairs import few_pairs
from saffe_cache.training.config import TrainConfig

QUICK: dict[str, Any] = {"neighbours": 4, "components": 4, "permutations": 5, "half_samples": 3}


def case(dataset: str, encoders: str, photos: int, **scores: float) -> Case:
    values = {name: (score,) for name, score in scores.items()}
    measures = {"photos": float(photos), "a_lin": 0.2}
    return Case(dataset=dataset, encoders=encoders, name=f"{dataset} {photos}", values=values, measures=measures)


def grid(late_gain: float) -> list[Case]:
    """Three data sets with encoders of their own: `ridge` wins below 2,000 photos, `linear` above by `late_gain`."""
    return [
        case(name, f"encoders of {name}", photos, ridge=0.3, linear=0.25 if photos < 2000 else 0.3 + late_gain)
        for name in ("a", "b", "c")
        for photos in (500, 1500, 3000, 6000)
    ]


def test_threshold_is_advised_if_it_holds_on_other_data() -> None:
    small, large = (advise_method(grid(0.1), {"photos": photos, "a_lin": 0.2}) for photos in (1000.0, 5000.0))
    assert small is not None
    assert large is not None
    assert (small.method, large.method) == ("ridge", "linear")
    assert small.rule == "ridge where photos is at most 2.25e+03, else linear"
    assert small.lost == pytest.approx(0)
    assert small.lost_by_constant == pytest.approx(0.05 / 2)


def test_constant_is_advised_where_no_threshold_beats_it() -> None:
    generator = np.random.default_rng(0)
    cases = [
        case(name, name, photos, ridge=0.3 + 0.02 * generator.normal(), linear=0.3 + 0.02 * generator.normal())
        for name in ("a", "b", "c", "d")
        for photos in (500, 1500, 3000)
    ]
    advice = advise_method(cases, {"photos": 500.0})
    assert advice is not None
    assert advice.rule.startswith("always ")
    assert advice.lost is not None
    assert advice.lost_by_constant is not None
    assert advice.lost >= advice.lost_by_constant


def test_cases_of_one_data_set_test_nothing() -> None:
    cases = [
        case("a", str(number), photos, ridge=0.3, linear=photos / 6000)
        for number in range(3)
        for photos in (500, 1500, 6000)
    ]
    advice = advise_method(cases, {"photos": 500.0})
    assert advice is not None
    assert (advice.rule, advice.lost) == ("always linear", None)
    assert "which no other data set and encoders have tested" in advice.sentence


def test_few_cases_advise_nothing() -> None:
    assert advise_method(grid(0.1)[:7], {"photos": 500.0}) is None
    assert advise_method([], {"photos": 500.0}) is None


def test_related_cases_are_left_out_of_the_fit() -> None:
    cases = [case("a", "x", 1, m=0.1), case("a", "y", 2, m=0.1), case("b", "x", 3, m=0.1), case("b", "y", 4, m=0.1)]
    fitted: list[list[str]] = []

    def fit(others: Any) -> Any:
        fitted.append([other.name for other in others])
        return module.best_constant(others)

    left_out(cases, Case.is_related, fit)
    assert fitted == [["b 4"], ["b 3"], ["a 2"], ["a 1"]]


def test_methods_that_a_case_lacks_are_not_advised() -> None:
    cases = [*grid(0.1), case("d", "d", 500, ridge=0.3, linear=0.2, better=0.9)]
    advice = advise_method(cases, {"photos": 500.0, "unknown": 1.0})
    assert advice is not None
    assert advice.method == "ridge"


def test_enough_photos_are_the_median_over_data() -> None:
    cases = [
        case(name, name, photos, m=score)
        for name, scores in {"a": (0.1, 0.2, 0.21), "b": (0.2, 0.2, 0.21), "c": (0.1, 0.15, 0.3)}.items()
        for photos, score in zip((500, 1500, 6000), scores, strict=True)
    ]
    assert enough_photos(cases, "m") == 1500  # of 1,500, 500 and 6,000
    assert enough_photos(cases[:1], "m") is None


def test_claims_compare_methods_that_can_be_trained() -> None:
    for name, claim in CLAIMS.items():
        method = VARIANTS.get(name, Method(fusion=name))
        TrainConfig(cache="c.zarr", out="o", fusion=method.fusion, **method.options, **claim.plain)
        assert claim.plain or claim.against in {BEST, *FUSIONS, *VARIANTS}, name


def test_packaged_table_can_be_read() -> None:
    for one in read_cases(None):
        assert one.encoders
        assert len(one.values) > 1
        assert one.measures["photos"] > 0


def test_align_advises_by_the_cases_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 120}, signal=4)
    monkeypatch.setattr("saffe_cache.studies.alignment.align.read_cases", lambda folder: grid(0.1))
    options: dict[str, Any] = {"layers": {"image": (3,), "text": (3,)}, **QUICK}
    result = AlignmentResult.load(align(AlignConfig(cache=cache, out=str(tmp_path / "out"), **options)))
    assert result.method is not None
    assert [one.fusion for one in result.advice] == ["ridge", "concat"]  # 120 photos
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "photos alone: RIDGE" in text
    assert "by 12 cases in which all methods were trained" in " ".join(text.split())


@pytest.mark.slow
def test_pipeline_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a-one", "b-two")
    caches = [make_cache(tmp_path / f"{name}.zarr", {"train": 96, "test": 30}, signal=3) for name in names]
    table = tmp_path / "table.json"
    monkeypatch.setattr(pipeline, "TABLE", table)
    monkeypatch.setattr(module, "LEAST_TRAINED", 4)
    monkeypatch.setattr(pipeline, "AlignConfig", lambda **given: AlignConfig(**(QUICK | given)))
    studies = [str(tmp_path / f"study-{name}") for name in names]
    for cache, study in zip(caches, studies, strict=True):
        options = {"photos": (48, 96), "fusions": ("linear",), "quick": True, "workers": 1}
        few_pairs(FewPairsConfig(cache=(cache,), out=study, **options))
    given = ["few_pairs.py", *studies, "--work", str(tmp_path / "work"), "--install", "--align-photos", "40"]
    monkeypatch.setattr(sys, "argv", given)
    pipeline.main()
    found = json.loads(table.read_text())["cases"]
    assert [one["name"] for one in found] == [f"{name}, {photos} photos" for name in names for photos in (48, 96)]
    assert {one["dataset"] for one in found} == {"a", "b"}
    assert "linear" in found[0]["values"]
    assert set(found[0]["values"]) <= set(FUSIONS)
    assert set(found[0]["measures"]) == {"photos", "a_lin", "mlp_gain", "token_gain"}
    monkeypatch.setattr(module, "TABLE", table)
    advice = advise_method(read_cases(None), {"photos": 60.0, "a_lin": 0.2})
    assert advice is not None
    assert advice.cases == 4
