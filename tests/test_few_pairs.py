"""saffe few-pairs: the same photos for all methods, paired intervals, verdicts, and nothing skipped silently."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from quick_runs import report_of, setting_of, value
from synthetic_cache import make_cache

from saffe_cache.cli import main
from saffe_cache.core.results import Estimate
from saffe_cache.fusion.registry import FUSIONS, FusionEntry
from saffe_cache.protocols.registry import load_protocol
from saffe_cache.retrieval.metrics import paired_bootstrap
from saffe_cache.studies.few_pairs import few_pairs as verb
from saffe_cache.studies.few_pairs.claims import CLAIMS, Claim, judge
from saffe_cache.studies.few_pairs.config import FewPairsConfig
from saffe_cache.studies.few_pairs.few_pairs import few_pairs
from saffe_cache.studies.few_pairs.planning import choose_methods, choose_sizes
from saffe_cache.studies.few_pairs.result import FewPairsResult
from saffe_cache.verbs import load_result

CLASSES = """
import torch
from saffe_cache.fusion.two_sided import TwoSided


class LeastSquares(TwoSided):
    def __init__(self, shape, blocks):
        super().__init__(shape)
        self.register_buffer("weight", torch.zeros(shape.summary_size, shape.text_size))

    def fit(self, seen):
        photos = torch.from_numpy(seen.photos)
        gram = photos.T @ photos + 10 * torch.eye(photos.shape[1])
        self.weight = torch.linalg.solve(gram, photos.T @ torch.from_numpy(seen.mean_texts))

    def photo_side(self, summary):
        return summary @ self.weight

    def text_side(self, unit):
        return unit


class Drawn(LeastSquares):
    def fit(self, seen):
        self.weight = torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(0))
"""
USUAL = ("linear", "concat", "late", "reuse")


@pytest.fixture(autouse=True)
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of four fusions and two closed forms, one of which knows nothing."""
    (tmp_path / "added_closed.py").write_text(CLASSES)
    monkeypatch.syspath_prepend(tmp_path)
    fusions = cast(dict[str, FusionEntry], FUSIONS)
    for name in set(fusions) - set(USUAL):
        monkeypatch.delitem(fusions, name)
    shared: dict[str, Any] = {"summary": "For this test.", "reads": "summary", "options": frozenset()}
    for name, made_by in (("drawn", "Drawn"), ("least_squares", "LeastSquares")):
        entry = FusionEntry(made_by=f"added_closed:{made_by}", is_closed_form=True, **shared)
        monkeypatch.setitem(fusions, name, entry)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("few") / "c.zarr", {"train": 80, "test": 40}, signal=2)


def config_of(cache: str, out: Path, **options: Any) -> FewPairsConfig:
    quick = {"quick": True, "fusions": ("linear",), "photos": (40, 80), "device": "cpu", "workers": 1}
    return FewPairsConfig(cache=(cache,), out=str(out), **(quick | options))


def result_of(config: FewPairsConfig) -> FewPairsResult:
    return FewPairsResult.load(few_pairs(config))


def test_leads_equal_a_bootstrap_of_the_runs_themselves(cache: str, tmp_path: Path) -> None:
    result = result_of(config_of(cache, tmp_path / "out", keep_runs=True))
    setting = result.settings[1]
    assert (setting.photos, setting.train_photos, setting.validation_photos) == (80, 72, 8)
    assert setting.reference == "least_squares"  # by validation, not by its name or place
    values = {}
    for name in ("linear", "least_squares"):
        run = tmp_path / "out" / "runs" / "c-80-seed0" / name
        of, model = setting_of(cache, str(run), "captions")
        scores = load_protocol("caption")(of).measure(model, of.honest())
        values[name] = {metric: scores[metric].of_queries for metric in ("mrr", "recall_at_1", "image_to_text_mrr")}
        for metric, expected in values[name].items():
            score = setting.methods[name].scores[metric]
            assert score.value == pytest.approx(expected.mean())
            assert score.seeds == (score.value,)
    owners = of.pairs.owners
    for metric, units in {"mrr": owners, "recall_at_1": owners, "image_to_text_mrr": np.arange(40)}.items():
        difference = values["linear"][metric] - values["least_squares"][metric]
        expected = paired_bootstrap(difference, units, resamples=1000)
        lead = setting.methods["linear"].leads[metric]
        assert (lead.value, lead.low, lead.high) == pytest.approx(expected, abs=1e-6)
    assert setting.methods["least_squares"].leads == {}
    assert setting.methods["least_squares"].default_leads == setting.methods["linear"].leads
    assert setting.methods["linear"].default_leads == {}
    assert setting.chance["recall_at_1"] == pytest.approx(1 / 40)


@pytest.mark.parametrize(
    ("able", "expected"), [("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2", "float32")]
)
def test_training_steps_take_the_type_that_the_processor_has(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
    result = result_of(config_of(cache, tmp_path / "out", keep_runs=True, photos=(40,)))
    configs = [json.loads(path.read_text())["config"] for path in (tmp_path / "out" / "runs").glob("*/*/config.json")]
    assert {one["dtype"] for one in configs} == {result.dtype} == {expected}
    assert f"matrix products in {expected}" in (tmp_path / "out" / "report.txt").read_text()
    earlier = json.loads((tmp_path / "out" / "result.json").read_text())
    del earlier["dtype"]
    facts = FewPairsResult.from_json(earlier, tmp_path).sections()[0].facts
    assert facts == [fact for fact in result.sections()[0].facts if fact[0] != "training steps"]


def test_all_methods_see_equal_numbers_of_photos(cache: str, tmp_path: Path) -> None:
    result_of(config_of(cache, tmp_path / "out", keep_runs=True, photos=(33,)))
    runs = [json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").glob("*/*/result.json")]
    assert len(runs) == 3
    assert {run["train_photos"] + run["validation_photos"] for run in runs} == {33}
    specs = [json.loads(path.read_text())["run"] for path in (tmp_path / "out" / "runs").glob("*/*/config.json")]
    assert len({spec["data"] for spec in specs}) == 1


def test_finished_parts_are_not_measured_again(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = result_of(config_of(cache, tmp_path / "whole"))
    assert not (tmp_path / "whole" / "runs").exists()
    measure, calls = verb.measure_part, []

    def dying(*arguments: Any) -> Any:
        calls.append(arguments[2:])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(verb, "measure_part", dying)
    config = config_of(cache, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        few_pairs(config)
    result = result_of(config)
    assert len(calls) == 5 == len(set(calls)) + 1  # two sizes of two groups, one of them twice
    assert [of.methods.keys() for of in result.settings] == [of.methods.keys() for of in whole.settings]
    for mine, other in zip(result.settings, whole.settings, strict=True):
        for name, of in mine.methods.items():
            assert of.scores == other.methods[name].scores
            assert of.leads == other.methods[name].leads
    with pytest.raises(ValueError, match="holds another result"):
        few_pairs(replace(config, photos=(40,)))
    assert len(result_of(config).settings) == 2
    assert len(calls) == 5


def test_what_is_skipped_is_reported(cache: str, tmp_path: Path) -> None:
    result = result_of(config_of(cache, tmp_path / "out", fusions=("linear", "concat"), photos=(40, 500)))
    skipped = result.caches["c"].skipped
    assert skipped["500 photos"] == "the cache has 80"
    assert "null text" in skipped["concat"]
    assert skipped["late"] == skipped["reuse"] == "--fusions does not name it"
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "c skips reuse, late: --fusions does not name it" in text
    assert max(map(len, text.splitlines())) <= 100


def test_run_that_fails_is_reported_and_others_stay(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saffe_cache.fusion.known.correction.LateFusion.__init__", _refuse)
    result = result_of(config_of(cache, tmp_path / "out", fusions=("linear", "late"), photos=(40,)))
    assert result.caches["c"].skipped["late at 40 photos"] == "too few photos"
    assert set(result.settings[0].methods) == {"linear", "least_squares", "drawn"}


def _refuse(*_: object) -> None:
    raise ValueError("too few photos")


def test_blocks_run_only_if_all_fusions_are_named() -> None:
    chosen, skipped = choose_methods(())
    assert list(chosen) == ["linear", "concat", "late", "drawn", "least_squares"]
    assert list(skipped) == ["reuse"]
    assert "reuse" in choose_methods(("all",))[0]
    assert list(choose_methods(("late",))[0]) == ["late", "drawn", "least_squares"]
    assert list(choose_methods(("default", "reuse"))[0])[:2] == ["reuse", "linear"]


def test_plain_form_of_a_claim_is_trained_too(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Claim(text="it helps", source="a paper", against="late without dropout", plain={"dropout": 0.0})
    monkeypatch.setitem(cast(dict[str, Claim], CLAIMS), "late", claim)
    chosen, _ = choose_methods(("late",))
    assert chosen["late without dropout"].fusion == "late"
    assert chosen["late without dropout"].options == {"dropout": 0.0}
    assert "late without dropout" not in choose_methods(("linear",))[0]


def test_sizes_that_a_cache_lacks_are_left_out() -> None:
    def sizes(available: int, **options: Any) -> tuple[int, ...]:
        return choose_sizes(FewPairsConfig(cache=("c",), out="o", **options), available)[0]

    assert sizes(6000) == (500, 1500, 3000, 6000)
    assert sizes(5950) == (500, 1500, 3000, 5950)  # a few photos are in other splits, too
    assert sizes(5000) == (500, 1500, 3000)
    assert sizes(200) == (50, 200)
    assert sizes(6000, quick=True) == (500, 1500)
    assert sizes(700, photos=(100, 900)) == (100,)
    with pytest.raises(ValueError, match=r"--photos: found 900, expected at most the 700"):
        sizes(700, photos=(900,))


@pytest.mark.parametrize(
    ("ends", "answer"),
    [((0.01, 0.05), "holds"), ((-0.05, -0.01), "does not hold"), ((-0.01, 0.05), "is not decided")],
)
def test_interval_of_the_lead_decides(ends: tuple[float, float], answer: str) -> None:
    lead = Estimate(value=sum(ends) / 2, low=ends[0], high=ends[1])
    verdict = judge("linear", "mrr", {("c", 500): lead, ("c", 1500): Estimate(value=0.1, low=0.05, high=0.2)})
    assert verdict.places[0].answer == answer
    assert verdict.places[1].answer == "holds"
    expected = "holds with 500 and 1,500 photos" if answer == "holds" else f"{answer} with 500 photos, holds with 1,500"
    assert expected in verdict.sentence
    assert "1,500: +10.0 [+5.0, +20.0]" in verdict.sentence


def test_classes_are_compared_by_map_with_intervals(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "k.zarr", {"train": 80, "test": 48}, classes=8, signal=6)
    result = result_of(config_of(cache, tmp_path / "out", photos=(80,)))
    [setting] = result.settings
    assert setting.main_metric == "map"
    lead = setting.methods["drawn"].leads["map"]
    own, other = (setting.methods[name].scores["map"] for name in ("drawn", "least_squares"))
    assert lead.value == pytest.approx(own.value - other.value)
    assert lead.sign == -1
    assert own.low is not None
    assert own.low < own.value < cast(float, own.high)
    assert "median_rank" not in (tmp_path / "out" / "report.txt").read_text()


def test_other_language_is_reported_with_the_same_runs(tmp_path: Path) -> None:
    first, second = (
        make_cache(tmp_path / f"{name}.zarr", {"train": 60, "test": 40}, signal=2) for name in ("en", "de")
    )
    config = config_of(first, tmp_path / "out", photos=(60,), report_cache={"en": (second,)})
    result = result_of(config)
    own, other = result.settings
    assert (own.name, other.name) == ("en", "en on de")
    assert other.methods["linear"].scores == own.methods["linear"].scores  # here the same photos and texts
    leaky = make_cache(tmp_path / "leaky.zarr", {"train": 60, "test": 40}, shared=5)
    with pytest.raises(ValueError, match=r"en on leaky: 5 of its 40 reported photos are among those to train on"):
        few_pairs(replace(config, out=str(tmp_path / "b"), report_cache={"en": (leaky,)}))


def test_corrected_search_is_reported_beside_the_plain_one(cache: str, tmp_path: Path) -> None:
    options = {"photos": (80,), "search_correction": "nnn", "keep_runs": True}
    plain, corrected = result_of(config_of(cache, tmp_path / "out", **options)).settings
    assert (plain.name, corrected.name) == ("c", "c with nnn")
    run = str(tmp_path / "out" / "runs" / "c-80-seed0" / "linear")
    report = report_of(cache, run, search_correction="nnn")
    for metric in ("mrr", "recall_at_1", "image_to_text_mrr"):
        assert corrected.methods["linear"].scores[metric].value == pytest.approx(value(report, metric))
    assert corrected.methods["linear"].scores != plain.methods["linear"].scores


def test_correction_without_a_bank_is_skipped_with_its_reason(cache: str, tmp_path: Path) -> None:
    """Not refused after everything is trained."""
    options = {"photos": (40, 80), "search_correction": "nnn", "correction_k": 50, "fusions": ("linear",)}
    result = result_of(config_of(cache, tmp_path / "out", **options))
    assert {setting.name for setting in result.settings} == {"c"}
    assert "--correction-k" in result.caches["c"].skipped["c with nnn"]


def test_command_prints_its_report_and_page_draws_it(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "out", tmp_path / "page"
    assert (
        main(
            [
                "few-pairs",
                cache,
                "--out",
                str(out),
                "--quick",
                "--fusions",
                "linear",
                "--photos",
                "40,80",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    assert "The best method for each number of photos." in capsys.readouterr().out
    assert main(["report", str(out), "--out", str(page)]) == 0
    drawn = {path.stem for path in (page / "figures").glob("*.png")}
    assert drawn == {"few-pairs-1-mrr", "few-pairs-1-recall-at-1", "few-pairs-1-2-methods-1"}
    rows = load_result(out).to_frame()
    assert set(rows["system"]) >= {"linear", "least_squares", "control: linear of permuted pairs"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusions": ("linaer",)}, "--fusions: found linaer, expected default, all or reuse, linear, concat"),
        ({"photos": (1,)}, r"--photos: found \(1,\), expected 2 or more"),
        ({"seeds": ()}, "--seeds: found none, expected one or more"),
        ({"validation": "train"}, "--validation: found train, expected heldout, or a split"),
        ({"report_cache": {"x": ("y",)}}, "--report-cache: found x=…, expected c=…"),
    ],
)
def test_wrong_options_are_refused(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewPairsConfig(cache=("c.zarr",), out="o", **options)
