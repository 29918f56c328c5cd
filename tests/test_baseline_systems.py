"""Baselines that are evaluated without a run: the numbers, controls and files that stand beside a comparable run's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from extraction_cases import tiny_config
from quick_runs import Report, quick_train, report_of
from synthetic_cache import make_cache

from saffe_cache.cli import evaluate_command
from saffe_cache.core.options import attribute_docstrings
from saffe_cache.evaluation.baselines import BASELINES
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.evaluate import evaluate
from saffe_cache.evaluation.material import Material
from saffe_cache.evaluation.results import EvaluationResult
from saffe_cache.extraction.extract import extract
from saffe_cache.protocols.setting import FittedVectors
from saffe_cache.report.report import ReportConfig, make_report
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.retrieval.index import load_index
from saffe_cache.verbs import load_result

pytestmark = pytest.mark.slow

KINDS: dict[str, tuple[dict[str, int], dict[str, Any], dict[str, Any]]] = {
    "captions": ({"train": 250, "test": 60}, {"text_width": 16}, {}),  # what is held out depends on the seed
    "classes": ({"train": 240, "test": 90}, {"classes": 6, "signal": 0.5}, {}),
    "metadata": (
        {"train": 200, "dev": 40, "test": 60},
        {"captions": 3, "joint": True},
        {"gallery_text": "first_caption"},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def beside_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Report]:
    """A cache, and the report of a run on it, with all baselines."""
    sizes, cache_options, options = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    cache = make_cache(folder / "cache.zarr", sizes, **cache_options)
    run = quick_train(cache, folder / "run", fusion="linear", epochs=1, seed=3, **options)
    return cache, report_of(cache, run, baselines="all")


def alone(cache: str, system: str, out: Path, **options: Any) -> EvaluationResult:
    config = EvaluateConfig(cache=cache, system=system, out=str(out), device="cpu", **options)
    return EvaluationResult.load(evaluate(config))


@pytest.mark.slow
def test_numbers_equal_those_beside_a_run(beside_run: tuple[str, Report], tmp_path: Path) -> None:
    cache, report = beside_run
    names = set(report["systems"]) - {"fam"}
    assert len(names) > 2
    text = "first_caption" if report["protocol"] == "metadata" else "null"
    for name in names:
        found = alone(cache, name, tmp_path / name, data_seed=3, gallery_text=text)
        written = json.loads((tmp_path / name / "result.json").read_text())
        assert written["systems"][name] == report["systems"][name]
        assert (found.system, found.data, found.num_queries) == (name, report["data"], report["num_queries"])
        assert (found.protocol, found.definition) == (report["protocol"], report["definition"])
        assert found.failures == ()
        expected = set(report["controls"]) - (set() if BASELINES[name].is_fitted else {"pairs_permuted"})
        assert set(found.controls) == expected
        assert ("control pairs_permuted" in found.absent) != ("pairs_permuted" in expected)
        for part in ("gallery_key", "gallery_layers", "train_split", "validation", "data", "seed"):
            assert written["run"][part] == report["run"][part]


def test_layers_are_those_of_a_run_with_the_same_layers(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 80, "dev": 20, "test": 30})
    run = quick_train(cache, tmp_path / "run", fusion="linear", layers={"image": (3,)}, epochs=1)
    report = report_of(cache, run, baselines="linear", baseline_layers="run")
    found = alone(cache, "ridge", tmp_path / "one", layers={"image": (3,)})
    assert vars(found.main()) == report["systems"]["ridge"]["mrr"]
    assert found.run.gallery_layers == (3,)
    assert alone(cache, "ridge", tmp_path / "all").main() != found.main()


@pytest.mark.slow
def test_zero_shot_equals_that_beside_a_run(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    clip = str(tiny_model("clip-vision"))
    config = tiny_config(tmp_path, tiny_model, train=40)
    cache = extract(replace(config, encoder={"image": clip, "text": clip}, layers={"image": (1,), "text": (1,)}))
    run = quick_train(cache, tmp_path / "run", fusion="linear", epochs=1, validation="heldout")
    report = report_of(cache, run, baselines="linear", split="dev")
    found = alone(cache, "zero_shot", tmp_path / "out", split="dev", validation="heldout")
    assert {name: vars(number) for name, number in found.systems["zero_shot"].items()} == report["systems"]["zero_shot"]
    assert set(found.controls) == {"photos_shuffled", "photos_constant", "queries_constant"}
    with pytest.raises(ValueError, match="--system pooled_cosine: it does not apply: zero_shot is for both halves"):
        alone(cache, "pooled_cosine", tmp_path / "other", split="dev", validation="heldout")


def test_controls_of_a_baseline_find_a_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors that follow the place, not the photo, are found by the same controls as a model's."""
    cache = make_cache(tmp_path / "cache.zarr", {"train": 80, "dev": 20, "test": 60})
    honest = alone(cache, "ridge", tmp_path / "honest")
    assert honest.failures == ()

    def leaky(of: Material) -> FittedVectors:
        texts = of.setting.pairs.texts
        answers = unit_rows(of.text.vectors(texts.values[texts.offsets[:-1]]))
        return FittedVectors(lambda at: answers[: len(at.photos)])

    monkeypatch.setitem(BASELINES, "ridge", replace(BASELINES["ridge"], fit=leaky))
    found = alone(cache, "ridge", tmp_path / "leaky")
    assert {name for name, control in found.controls.items() if not control.passed} >= {
        "photos_shuffled", "photos_constant", "pairs_permuted",
    }  # fmt: skip
    assert found.failures[0].startswith("photos_shuffled: mrr is ")


def test_split_that_tuned_or_trained_is_flagged(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 80, "dev": 30, "test": 30}, text_width=16)
    assert alone(cache, "ridge", tmp_path / "a").warnings == ()
    tuned = alone(cache, "ridge", tmp_path / "b", split="dev")
    assert tuned.warnings[0].startswith("the baseline was tuned on split 'dev' itself")
    trained = alone(cache, "ridge", tmp_path / "c", split="train")
    assert trained.warnings[0].startswith("the baseline was trained on split 'train'")
    assert "80 photos were trained on" in trained.failures
    untrained = alone(cache, "pooled_cosine", tmp_path / "d", split="train")
    assert (untrained.warnings, untrained.failures) == ((), ())


@pytest.mark.slow
def test_files_and_page_are_as_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_cache(tmp_path / "small.zarr", {"train": 120, "test": 60}, classes=6, signal=0.5)
    arguments = ["--cache", "small.zarr", "--device", "cpu", "--system"]
    assert evaluate_command([*arguments, "ridge"]) == 0
    assert evaluate_command([*arguments, "linear_probe"]) == 0
    ridge, probe = (Path("small-baselines", f"test-class-{name}") for name in ("ridge", "linear_probe"))
    common = {"config.json", "result.json", "report.txt", "details.npz"}
    assert {path.name for path in probe.iterdir()} == common
    assert {path.name for path in ridge.iterdir()} == common | {"index.faiss", "index_ids.json"}
    assert len(load_index(ridge).ids) == 60
    text = (ridge / "report.txt").read_text()
    assert text.startswith("ridge, class protocol, split test: 60 photos, 6 queries\n")
    assert "FAM" not in text
    result = load_result(ridge)
    assert set(result.to_frame().system) == {"ridge", *(f"control: {name}" for name in result.controls)}  # type: ignore[attr-defined]
    assert load_result(probe).index is None  # type: ignore[attr-defined]
    page = Path(make_report(ReportConfig(runs=(str(ridge), str(probe)), out="page"))).read_text()
    assert "that ridge and baselines find" in page
    assert "Confusion of linear_probe" in page
    assert "FAM" not in page


def test_one_of_run_and_system_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="found neither --run nor --system, expected one of them"):
        EvaluateConfig(cache="c")
    with pytest.raises(ValueError, match="found both --run r and --system ridge, expected one of them"):
        EvaluateConfig(cache="c", run="r", system="ridge")
    for option, value in {"layers": {"image": (1,)}, "train_fraction": 0.5, "data_seed": 1}.items():
        with pytest.raises(ValueError, match=rf"--{option.replace('_', '-')}: found .*this option only with --system"):
            EvaluateConfig(cache="c", run="r", **{option: value})
    for option, value in {"baselines": "none", "baseline_layers": "run", "leak_true_text": True}.items():
        with pytest.raises(ValueError, match=rf"--{option.replace('_', '-')}: found .*this option only with --run"):
            EvaluateConfig(cache="c", system="ridge", **{option: value})
    with pytest.raises(SystemExit) as stop:
        evaluate_command(["--cache", "c"])
    assert stop.value.code == 2
    assert "found neither --run nor --system" in capsys.readouterr().err


def test_baselines_that_do_not_apply_say_so(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 40, "dev": 10, "test": 20})
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--system: found nonsense, expected ridge or mlp or zero_shot"):
        alone(cache, "nonsense", out)
    with pytest.raises(ValueError, match="--system: found zlap, expected a baseline of protocol caption: ridge, mlp"):
        alone(cache, "zlap", out)
    with pytest.raises(ValueError, match="--system zero_shot: it does not apply: zero_shot is for both halves of an"):
        alone(cache, "zero_shot", out)
    with pytest.raises(ValueError, match=r"--system pooled_cosine: it does not apply: .* widths 16 and 12"):
        alone(cache, "pooled_cosine", out)
    assert not (out / "result.json").exists()


def test_help_names_every_baseline() -> None:
    text = attribute_docstrings(EvaluateConfig)["system"]
    assert set(BASELINES) <= set(text.replace(",", "").split())


def test_result_of_other_options_is_never_replaced(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 60, "dev": 20, "test": 30})
    out = tmp_path / "out"
    first = alone(cache, "ridge", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for options, what in (
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"split": "dev"}, "split: 'test' there, 'dev' now"),
        ({"index": "hnsw"}, "index: 'flat' there, 'hnsw' now"),
        ({"protocol": "rerank"}, "protocol_name: 'caption' there, 'rerank' now"),
    ):
        with pytest.raises(ValueError, match=f"holds another result .*{what}.*Choose another --out, or delete it"):
            alone(cache, "ridge", out, **options)
    with pytest.raises(ValueError, match="system: 'ridge' there, 'mlp' now"):
        alone(cache, "mlp", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    again = alone(cache, "ridge", out, protocol="caption")  # what auto resolved to
    assert again.systems == first.systems


@pytest.mark.slow
def test_runs_evaluations_lie_side_by_side_or_are_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 60, "dev": 20, "test": 30})
    run, other = (quick_train(cache, tmp_path / name, fusion="linear", epochs=1, seed=seed, data_seed=0)
                  for name, seed in (("run", 0), ("other", 1)))  # fmt: skip
    folders = [report_of(cache, run, **options)["out"] for options in ({}, {"split": "dev"}, {"protocol": "rerank"})]
    assert len(set(folders)) == 3
    with pytest.raises(ValueError, match=r"baselines: 'none' there, 'linear' now"):
        report_of(cache, run, baselines="linear")
    with pytest.raises(ValueError, match=r"weights: '\w+' there, '\w+' now"):
        report_of(cache, other, out=folders[0])
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert report_of(cache, str(moved))["out"] == str(moved / "test-caption")


def test_interrupted_evaluation_leaves_no_foreign_index(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 120, "test": 60}, classes=6, signal=0.5)
    out = tmp_path / "out"
    alone(cache, "ridge", out)
    (out / "result.json").unlink()  # as where an evaluation was cut off before its end
    probe = alone(cache, "linear_probe", out)
    assert probe.index is None
    assert not (out / "index.faiss").exists()
    assert np.isfinite(probe.main().value)
