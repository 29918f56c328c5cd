"""The report on a synthetic cache: numbers, baselines, controls, warnings, and the saved index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_cache import make_cache

from saffe_cache.evaluate import EvaluateConfig, evaluate
from saffe_cache.retrieval.index import load_index
from saffe_cache.runs import encode_gallery, encode_queries, load_run
from saffe_cache.store.reader import open_cache
from saffe_cache.train import TrainConfig, train


def run_on(cache: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Train briefly and evaluate; the report."""
    train(TrainConfig(cache=cache, out=str(folder / "run"), epochs=12, batch_size=32, tensorboard=False, device="cpu"))
    out = evaluate(EvaluateConfig(cache=cache, run=str(folder / "run"), out=str(folder / "out"), **options))
    return json.loads((Path(out) / "metrics.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("captions")
    cache = make_cache(folder / "cache.zarr", {"train": 200, "dev": 20, "test": 50})
    return cache, folder, run_on(cache, folder)


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("classes")
    cache = make_cache(folder / "cache.zarr", {"train": 120, "test": 60}, classes=3)
    return run_on(cache, folder)


def test_recall_equals_a_count_by_hand(captioned: tuple[str, Path, dict[str, Any]]) -> None:
    path, folder, report = captioned
    cache = open_cache(path)
    spec, model, _ = load_run(folder / "run", cache)
    items = cache.table.in_split("test")
    gallery, text = cache.encoder("image"), cache.encoder("text")
    photos = encode_gallery(model, gallery, cache.table.rows["image"][items], spec.gallery_layers)
    hits = []
    for position, item in enumerate(items):
        for caption in cache.table.captions[int(item)]:
            query = encode_queries(model, text.vectors(np.array([caption])))[0]
            hits.append(int((photos @ query).argmax()) == position)
    assert report["systems"]["fam"]["recall_at_1"]["value"] == pytest.approx(np.mean(hits))


def test_report_holds_baselines_chance_controls_and_costs(captioned: tuple[str, Path, dict[str, Any]]) -> None:
    report = captioned[2]
    assert report["warnings"] == []
    assert report["systems"]["fam"]["recall_at_1"]["chance"] == pytest.approx(1 / 50)
    for system in ("fam", "ridge"):
        score = report["systems"][system]["mrr"]
        assert score["low"] <= score["value"] <= score["high"]
        assert score["value"] > 3 * score["chance"]
    assert "widths 16 and 12" in report["absent"]["pooled_cosine"]
    shuffled = report["controls"]["photos_shuffled"]["mrr"]
    assert shuffled["low"] - 0.03 < shuffled["chance"] < shuffled["high"] + 0.03
    assert report["cost"]["trainable_parameters"] > 0
    assert report["versions"]["torch"]


def test_saved_index_finds_what_the_model_finds(captioned: tuple[str, Path, dict[str, Any]]) -> None:
    path, folder, _ = captioned
    index = load_index(folder / "out")
    cache = open_cache(path)
    spec, model, _ = load_run(folder / "run", cache)
    item = cache.table.ids.index("test/7")
    vector = encode_gallery(model, cache.encoder("image"), cache.table.rows["image"][[item]], spec.gallery_layers)
    _, found = index.index.search(vector, 1)
    assert index.ids[found[0, 0]] == "test/7"


def test_class_protocol_reports_map_and_linear_probe(classified: dict[str, Any]) -> None:
    systems = classified["systems"]
    assert classified["protocol"] == "class"
    assert set(systems) >= {"fam", "ridge", "linear_probe"}
    for system in ("fam", "ridge", "linear_probe"):
        assert systems[system]["map"]["value"] > 0.8
        assert systems[system]["top1"]["chance"] == pytest.approx(1 / 3)
    assert abs(classified["controls"]["photos_shuffled"]["map"]["value"] - systems["fam"]["map"]["chance"]) < 0.15


def test_split_that_chose_the_epoch_is_flagged_first(captioned: tuple[str, Path, dict[str, Any]]) -> None:
    path, folder, _ = captioned
    out = evaluate(EvaluateConfig(cache=path, run=str(folder / "run"), split="dev"))
    assert out == str(folder / "run" / "dev")
    assert (Path(out) / "report.txt").read_text().startswith("WARNING: the best epoch was chosen on split 'dev' itself")
    out = evaluate(EvaluateConfig(cache=path, run=str(folder / "run"), split="train", out=str(folder / "train")))
    assert "was trained on split 'train'" in (Path(out) / "report.txt").read_text().splitlines()[0]


def test_same_widths_are_compared_without_training(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 60, "test": 20}, text_width=16)
    assert "pooled_cosine" in run_on(cache, tmp_path)["systems"]


def test_errors_say_what_to_do(captioned: tuple[str, Path, dict[str, Any]], tmp_path: Path) -> None:
    path, folder, _ = captioned
    run = str(folder / "run")
    with pytest.raises(ValueError, match=r"split 'nope' has no items; the cache has \['dev', 'test', 'train'\]"):
        evaluate(EvaluateConfig(cache=path, run=run, split="nope", out=str(tmp_path)))
    with pytest.raises(ValueError, match="no finished run"):
        evaluate(EvaluateConfig(cache=path, run=str(tmp_path / "none"), out=str(tmp_path)))
    with pytest.raises(ValueError, match="none of its 50 items"):
        evaluate(EvaluateConfig(cache=path, run=run, protocol="class", out=str(tmp_path)))
