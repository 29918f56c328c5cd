"""The report on a synthetic cache: numbers, baselines, controls, warnings, exit status, and the saved index."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quick_runs import Report, quick_train, report_of, value
from synthetic_cache import make_cache

from saffe_cache.cli import evaluate_command
from saffe_cache.core.results import exit_status
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.evaluate import differences, evaluate
from saffe_cache.evaluation.results import EvaluationResult
from saffe_cache.inputs.feature_loader import FeatureLoader, encode_gallery, encode_queries
from saffe_cache.retrieval.index import load_index
from saffe_cache.retrieval.scores import Score
from saffe_cache.store.reader import open_cache
from saffe_cache.training.runs import open_run

KEYS = {
    "verb", "version", "protocol", "definition", "main_metric", "split", "data", "failures", "warnings", "num_photos",
    "num_queries", "num_unusable_items", "validation_photos", "validation_photos_drawn_from", "systems", "descriptions",
    "absent", "differences", "controls", "control_scores", "sensitivity", "duplicates", "index", "cost", "run",
    "config", "versions", "threads", "system", "resolved", "search_correction", "bank_texts", "bank_photos",
    "uncorrected", "media", "media_items",
}  # fmt: skip


@dataclass(frozen=True)
class Reported:
    """A run and its report, baselines included."""

    cache: str
    run: str
    report: Report


def reported(folder: Path, sizes: dict[str, int], cache_options: dict[str, Any], **options: Any) -> Reported:
    cache = make_cache(folder / "cache.zarr", sizes, **cache_options)
    run = quick_train(cache, folder / "run", fusion="linear", **options)
    return Reported(cache, run, report_of(cache, run, baselines="all"))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    return reported(tmp_path_factory.mktemp("captions"), {"train": 250, "dev": 30, "test": 60}, {})


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    sizes = {"train": 240, "test": 90}
    return reported(tmp_path_factory.mktemp("classes"), sizes, {"classes": 6, "signal": 0.5})


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    sizes, options = {"train": 300, "dev": 40, "test": 100}, {"captions": 3, "joint": True, "width": 64}
    return reported(tmp_path_factory.mktemp("beside"), sizes, options, gallery_text="first_caption")


def test_recall_equals_a_count_by_hand(captioned: Reported) -> None:
    cache = open_cache(captioned.cache)
    spec, model, _ = open_run(captioned.run, cache)
    items = cache.table.in_split("test")
    photos = encode_gallery(model, FeatureLoader(cache, spec), cache.table.rows["image"][items])
    hits = []
    for position, item in enumerate(items):
        for caption in cache.table.captions[int(item)]:
            query = encode_queries(model, cache.encoder("text").vectors(np.array([caption])))[0]
            hits.append(int((photos @ query).argmax()) == position)
    assert value(captioned.report, "recall_at_1") == pytest.approx(np.mean(hits))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captioned", "classified", pytest.param("beside", marks=pytest.mark.slow)])
def test_report_holds_what_the_readme_says(kind: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(kind).report
    assert set(report) == KEYS | {"out", "text", "status"}
    assert report["failures"] == report["warnings"] == []
    assert report["status"] == 0
    assert report["split"] == "test"
    for system in report["systems"].values():
        for metric, score in system.items():
            assert set(score) == {"value", "chance", "low", "high"}
            if score["low"] is not None:
                assert score["low"] <= score["value"] <= score["high"]
            if not metric.endswith("median_rank"):
                assert 0 <= score["value"] <= 1
    assert set(report["control_scores"]) == set(report["controls"])
    for name, control in report["controls"].items():
        assert control["value"] == report["control_scores"][name][control["metric"]]["value"]
        assert control["passed"] == (control["value"] <= control["limit"])
    assert set(report["cost"]) == {
        "trainable_parameters", "fusing_flops", "training_seconds", "training_peak_memory_mb", "evaluation_seconds",
        "evaluation_peak_memory_mb",
    }  # fmt: skip
    assert all(cost > 0 for cost in report["cost"].values())
    assert report["versions"]["torch"]
    assert report["config"]["protocol"] == "auto"
    assert report["run"]["gallery_text"] == ("first_caption" if kind == "beside" else "null")
    assert set(report["sensitivity"]) == ({"to_image", "to_text"} if kind == "beside" else {"to_image"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captioned", "classified", pytest.param("beside", marks=pytest.mark.slow)])
def test_result_reads_back_as_it_was_written(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    out = Path(request.getfixturevalue(kind).report["out"])
    result = EvaluationResult.load(out)
    result.save(tmp_path)
    for name in ("result.json", "report.txt"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert EvaluationResult.load(tmp_path) == result
    frame = result.to_frame()
    assert set(frame.system) == {*result.systems, *(f"control: {name}" for name in result.controls)}
    chosen = frame[(frame.system == "fam") & (frame.metric == result.main_metric)]
    assert chosen.value.tolist() == [result.main().value]
    content = json.loads((out / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(content | {"systems": {}}))
    with pytest.raises(ValueError, match=f"systems: {result.main_metric} of fam is missing"):
        EvaluationResult.load(tmp_path)


def test_caption_protocol_reports_baselines_and_chance(captioned: Reported) -> None:
    report = captioned.report
    assert report["protocol"] == "caption"
    assert (report["num_photos"], report["num_queries"]) == (60, 120)
    assert report["systems"]["fam"]["recall_at_1"]["chance"] == pytest.approx(1 / 60)
    assert set(report["systems"]) == {"fam", "ridge", "mlp"}
    for system in report["systems"].values():
        assert system["mrr"]["value"] > 3 * system["mrr"]["chance"]
    assert "widths 16 and 12" in report["absent"]["pooled_cosine"]


def test_class_protocol_reports_map_and_classifiers(classified: Reported) -> None:
    report = classified.report
    assert report["protocol"] == "class"
    systems = set(report["systems"])
    assert systems == {"fam", "ridge", "mlp", "linear_probe", "class_means", "zlap"}
    for system in report["systems"].values():
        assert system["map"]["value"] > 0.35
        assert system["top1"]["chance"] == pytest.approx(1 / 6)


@pytest.mark.slow
def test_metadata_protocol_reports_each_side_and_late_fusion(beside: Reported) -> None:
    systems = beside.report["systems"]
    assert beside.report["protocol"] == "metadata"
    assert (beside.report["num_photos"], beside.report["num_queries"]) == (100, 200)
    assert set(systems) == {
        "fam", "text_only", "image_only_ridge", "text_only_linear", "image_only_mlp", "concat_mlp",
        "late_fusion_ridge", "late_fusion_mlp",
    }  # fmt: skip
    alone = max(systems[name]["map"]["value"] for name in systems if name.startswith(("text_only", "image_only")))
    assert systems["fam"]["map"]["value"] > alone
    assert systems["late_fusion_ridge"]["map"]["value"] > alone


@pytest.mark.slow
def test_linear_baselines_may_see_the_runs_layers_alone(classified: Reported, tmp_path: Path) -> None:
    """Those of a cache with more layers are other ones; those on the run's own layers are found in the whole report."""
    run = quick_train(classified.cache, tmp_path / "run", fusion="linear", layers={"image": (3,)}, epochs=1)
    reports = [
        report_of(classified.cache, run, baseline_layers=layers, baselines="linear", out=str(tmp_path / f"on-{layers}"))
        for layers in ("run", "cache")
    ]
    on_run, on_cache = (report["systems"] for report in reports)
    assert set(on_run) == set(on_cache) == {"fam", "ridge", "linear_probe", "class_means"}
    assert on_run["fam"] == on_cache["fam"]
    assert on_run["ridge"]["map"]["value"] != on_cache["ridge"]["map"]["value"]


@pytest.mark.slow
def test_rerank_and_candidate_share_their_baselines(classified: Reported) -> None:
    for protocol, metrics in (("candidate", {"map", "top1", "top1_prior_removed"}), ("rerank", {"map", "mrr"})):
        report = report_of(classified.cache, classified.run, protocol=protocol, baselines="all", rerank_k=200)
        assert metrics <= set(report["systems"]["fam"])
        assert {"ridge", "mlp"} <= set(report["systems"])
        assert report["failures"] == []
    image = report_of(classified.cache, classified.run, protocol="image", baselines="all")
    assert set(image["systems"]) == {"fam", "summary_cosine", "ridge", "pooled_cosine"}
    assert image["num_queries"] == 90


def test_text_says_what_is_in_the_report(captioned: Reported) -> None:
    text = captioned.report["text"]
    assert text.startswith("caption protocol, split test: 60 photos, 120 queries\n")
    controls = [f"control: {name}" for name in ("photos_shuffled", "pairs_permuted", "queries_constant")]
    for name in ("FAM", "ridge", "mlp", "chance", *controls):
        assert f"\n{name} " in text
    score = captioned.report["systems"]["fam"]["recall_at_1"]
    shown = rf"{100 * score['value']:.1f} +\[{100 * score['low']:.1f}, {100 * score['high']:.1f}\]"
    assert re.search(shown, text)
    assert "by paired bootstrap" in text
    assert "pooled_cosine is absent: the encoders' own vectors cannot be compared: widths 16 and" in text
    assert "How far the fused vector moves with another input, 0 to 2: photo" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("kind", ["captioned", "classified", pytest.param("beside", marks=pytest.mark.slow)])
def test_differences_are_those_to_the_best_baseline(kind: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(kind).report
    systems, main = report["systems"], "mrr" if kind == "captioned" else "map"
    found = {metric: (best, of) for best, metrics in report["differences"].items() for metric, of in metrics.items()}
    assert ("top1" if kind == "classified" else main) in found
    assert not any(metric.startswith("image_to_text") or metric.endswith("median_rank") for metric in found)
    for metric, (best, difference) in found.items():
        others = {name: scores[metric]["value"] for name, scores in systems.items() if name != "fam"}
        assert others[best] == max(others.values())
        assert difference["mean"] == pytest.approx(systems["fam"][metric]["value"] - others[best], abs=1e-9)
        assert difference["low"] <= difference["mean"] <= difference["high"]


def test_differences_equal_a_direct_paired_bootstrap_over_photos() -> None:
    generator = np.random.default_rng(0)
    units = np.repeat(np.arange(40), 3)
    values = {name: generator.random(120) for name in ("fam", "worse", "better")}
    values["better"] += 0.5
    scores = {name: {"mrr": Score(float(of.mean()), 0.1, None, of, units)} for name, of in values.items()}
    found = differences(scores["fam"], {name: scores[name] for name in ("worse", "better")})
    difference = (values["fam"] - values["better"]).reshape(40, 3)
    drawn = [difference[generator.integers(40, size=40)].mean() for _ in range(4000)]
    assert set(found) == {"better"}
    of_mrr = found["better"]["mrr"]
    assert of_mrr.mean == pytest.approx(difference.mean())
    assert [of_mrr.low, of_mrr.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.01)
    assert differences(scores["fam"], {}) == {}


def test_saved_index_finds_what_the_model_finds(captioned: Reported) -> None:
    index = load_index(Path(captioned.report["out"]))
    cache = open_cache(captioned.cache)
    spec, model, _ = open_run(captioned.run, cache)
    item = cache.table.ids.index("test/7")
    vector = encode_gallery(model, FeatureLoader(cache, spec), cache.table.rows["image"][[item]])
    assert index.search(vector, 1)[1] == "test/7"


def test_approximate_index_changes_no_metric(captioned: Reported, tmp_path: Path) -> None:
    report = report_of(captioned.cache, captioned.run, index="hnsw", out=str(tmp_path))
    assert report["controls"] == captioned.report["controls"]
    assert report["systems"]["fam"] == captioned.report["systems"]["fam"]
    assert set(report["index"]["parameters"]) == {"neighbours", "kept_in_search"}
    assert list(report["index"]["recall"]) == ["10"]
    assert report["index"]["recall"]["10"] > 0.9
    assert "Index hnsw finds" in report["text"]
    flat = {"kind": "flat", "bytes_per_vector": 49, "parameters": {}, "recall": {}}  # 12 float32, and a header
    assert captioned.report["index"] == flat
    assert "Index flat" not in captioned.report["text"]
    assert "HNSW" in type(load_index(tmp_path).faiss_index).__name__


def test_index_for_larger_galleries_is_refused_at_once(captioned: Reported, tmp_path: Path) -> None:
    config = EvaluateConfig(cache=captioned.cache, run=captioned.run, index="ivf", out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"index ivf: 60 vectors, .* from 624 or more\. Use flat or hnsw"):
        evaluate(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_split_that_chose_the_epoch_is_flagged(captioned: Reported, tmp_path: Path) -> None:
    report = report_of(captioned.cache, captioned.run, split="dev")
    assert report["warnings"][0].startswith("the best epoch was chosen on split 'dev' itself")
    assert "WARNING: the best epoch was chosen on split 'dev' itself" in report["text"]
    report = report_of(captioned.cache, captioned.run, split="train", out=str(tmp_path))
    assert "was trained on split 'train'" in report["warnings"][0]
    assert report["text"].startswith("CONTROL FAILED: 250 photos were trained on.")


def test_reports_without_a_folder_lie_side_by_side(captioned: Reported) -> None:
    """SPLIT-PROTOCOL in the run's folder."""
    assert captioned.report["out"] == str(Path(captioned.run) / "test-caption")
    assert report_of(captioned.cache, captioned.run, protocol="rerank")["out"].endswith("test-rerank")
    assert report_of(captioned.cache, captioned.run, split="dev")["out"].endswith("dev-caption")
    files = {path.name for path in Path(captioned.report["out"]).iterdir()}
    assert files == {"config.json", "result.json", "details.npz", "report.txt", "index.faiss", "index_ids.json"}


def test_same_seed_gives_the_same_report(classified: Reported, tmp_path: Path) -> None:
    found = [
        report_of(classified.cache, classified.run, seed=seed, out=str(tmp_path / name))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    for part in ("systems", "controls", "sensitivity"):
        assert found[0][part] == found[1][part]
    assert found[0]["controls"] != found[2]["controls"]
    assert value(found[0], "map") == pytest.approx(value(found[2], "map"), abs=1e-3)


@pytest.mark.slow
def test_same_widths_are_compared_without_training(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 60, "test": 20}, text_width=16)
    report = report_of(cache, quick_train(cache, tmp_path / "run", epochs=1), baselines="all")
    assert "pooled_cosine" in report["systems"]
    assert report["absent"] == {}


def test_command_exits_with_3_where_a_control_failed(
    captioned: Reported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cache", captioned.cache, "--run", captioned.run, "--baselines", "none"]
    assert evaluate_command([*arguments, "--out", str(tmp_path / "fine")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("caption protocol, split test")
    assert printed.splitlines()[-1] == str(tmp_path / "fine")
    assert evaluate_command([*arguments, "--split", "train", "--out", str(tmp_path / "seen")]) == 3
    assert capsys.readouterr().out.startswith("CONTROL FAILED: 250 photos")
    assert evaluate_command([*arguments, "--split", "nope"]) == 1
    metrics = tmp_path / "fine" / "result.json"
    assert exit_status(str(metrics.parent)) == 0
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"failures": ["one"]}))
    assert exit_status(str(metrics.parent)) == 3


def test_errors_say_what_to_do(captioned: Reported, classified: Reported, tmp_path: Path) -> None:
    path, run, out = captioned.cache, captioned.run, str(tmp_path)
    with pytest.raises(ValueError, match=r"split 'nope' has no items; the cache has dev, test, train\. Choose one"):
        evaluate(EvaluateConfig(cache=path, run=run, split="nope", out=out))
    with pytest.raises(ValueError, match="no finished run"):
        evaluate(EvaluateConfig(cache=path, run=str(tmp_path / "none"), out=out))
    for protocol in ("class", "candidate", "image"):
        with pytest.raises(ValueError, match="none of its 60 items"):
            evaluate(EvaluateConfig(cache=path, run=run, protocol=protocol, out=out))
    with pytest.raises(ValueError, match="none of its 90 items"):
        evaluate(EvaluateConfig(cache=classified.cache, run=classified.run, protocol="caption", out=out))
    with pytest.raises(ValueError, match=r"--gallery-text null, it has not learned to fuse.*first_caption"):
        evaluate(EvaluateConfig(cache=path, run=run, protocol="metadata", out=out))
    for protocol in ("candidate", "rerank", "image"):
        config = EvaluateConfig(cache=classified.cache, run=classified.run, protocol=protocol, leak_true_text=True)
        with pytest.raises(ValueError, match=f"--leak-true-text: found --protocol {protocol}, expected one that"):
            evaluate(config)
    with pytest.raises(ValueError, match="--protocol: found nope, expected auto or caption or class"):
        EvaluateConfig(cache=path, run=run, protocol="nope")
    for option in ("rerank_k", "rerank_queries"):
        with pytest.raises(ValueError, match=r"found 0, expected a number above 0"):
            EvaluateConfig(cache=path, run=run, **{option: 0})
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"--seed: found {seed}, expected 0 or more, below 2\*\*63"):
            EvaluateConfig(cache=path, run=run, seed=seed)
    assert list(tmp_path.iterdir()) == []
