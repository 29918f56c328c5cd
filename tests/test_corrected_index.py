"""An index with a search correction: ranks of evaluation, updates, exports, and what is searched without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from quick_runs import report_of, setting_of, value
from test_trained_fusion import World, trained, world

from saffe_cache.inference.config import IndexConfig
from saffe_cache.inference.indexing import index
from saffe_cache.inference.search_index import SearchIndex
from saffe_cache.inference.serving import ServedIndex

__all__ = ["world"]


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(world, tmp_path_factory.mktemp("run") / "run", "linear")


def indexed(data: Path, run: str, out: Path, **options: Any) -> SearchIndex:
    given = {"splits": ("test",), "device": "cpu", "search_correction": "nnn"} | options
    index(IndexConfig(data=str(data), run=run, out=str(out), **given))
    return SearchIndex.open(out, device="cpu")


@pytest.fixture(scope="module")
def corrected(world: World, run: str, tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    return indexed(world.photos, run, tmp_path_factory.mktemp("corrected") / "index", ridge=True)


@pytest.fixture(scope="module")
def plain(world: World, run: str, tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    return indexed(world.photos, run, tmp_path_factory.mktemp("plain") / "index", search_correction="none", ridge=True)


def test_searches_rank_as_evaluation_does(world: World, run: str, corrected: SearchIndex, plain: SearchIndex) -> None:
    """The test split's captions are captions of training photos too, and so in no bank."""
    report = report_of(world.cache, run, search_correction="nnn")
    setting, _ = setting_of(world.cache, run, "captions")
    texts = setting.cache.table.inputs["text"].texts
    assert texts is not None
    queries = [
        (texts[row], setting.pairs.ids[owner])
        for row, owner in zip(setting.pairs.texts.values, setting.pairs.owners, strict=True)
    ]
    ranks = np.array([[hit.id for hit in corrected.search(text, k=12)].index(name) for text, name in queries])
    for k in (1, 5, 10):
        assert value(report, f"recall_at_{k}") == pytest.approx((ranks < k).mean(), abs=1e-9)
    assert value(report, "mrr") == pytest.approx((1 / (1 + ranks)).mean(), abs=1e-9)
    others = [[hit.id for hit in plain.search(text, k=12)].index(name) for text, name in queries]
    assert (ranks != others).any()
    assert corrected.manifest.bank_texts == report["bank_texts"] < 80
    assert vars(corrected.manifest.correction) == report["search_correction"]


def test_scores_are_inner_products_minus_biases(corrected: SearchIndex, plain: SearchIndex) -> None:
    query = corrected.fusion.embed_texts(["word1 word9"])
    expected = corrected.vectors @ query[0] - corrected.biases_at(slice(None))[:, 0]
    hits = corrected.search("word1 word9", k=12)
    assert [hit.id for hit in hits] == [corrected.ids[place] for place in np.argsort(-expected)]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(expected)[::-1], atol=1e-6)
    scores, ids = corrected.search_vectors(7 * query, 12)
    assert ids[0].tolist() == [hit.id for hit in hits]
    np.testing.assert_allclose(scores[0], 7 * np.sort(expected)[::-1], atol=1e-5)
    np.testing.assert_array_equal(corrected.vectors, plain.vectors)
    assert not plain.biases_at(slice(None)).any()


def test_photos_search_without_correction(world: World, corrected: SearchIndex, plain: SearchIndex) -> None:
    photo = world.photos / "test" / "3.png"
    assert corrected.search(image=photo, k=12) == plain.search(image=photo, k=12)
    assert corrected.like("test/3.png", k=12) == plain.like("test/3.png", k=12)
    own = corrected.vectors_at(np.array([3]))
    np.testing.assert_array_equal(corrected.search_vectors(own, corrected=False)[1], plain.search_vectors(own)[1])


def test_page_corrects_texts_of_both_systems(corrected: SearchIndex, plain: SearchIndex) -> None:
    systems = ("fusion", "ridge")
    found, without = (ServedIndex(one).search("word1 word9", {}, 12, systems) for one in (corrected, plain))
    for place, system in enumerate(systems):
        bias = dict(zip(corrected.ids, corrected.biases_at(slice(None))[:, place], strict=True))
        expected = sorted(((hit.score - bias[hit.id], hit.id) for hit in without[system]), reverse=True)
        assert [hit.id for hit in found[system]] == [name for _, name in expected]
    liked = [ServedIndex(one).like("test/3.png", 5, systems) for one in (corrected, plain)]
    assert liked[0] == liked[1]


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_updated_index_equals_a_new_one(
    world: World, run: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its cache: the bank is kept."""
    data = tmp_path / "photos"
    shutil.copytree(world.photos / "test", data / "test")
    (data / "test" / "metadata.jsonl").unlink()
    (data / "test" / "5.png").rename(tmp_path / "5.png")
    options = {"index": kind, "ridge": True, "search_correction": "csls", "correction_k": 3}
    indexed(data, run, tmp_path / "updated", **options)
    (tmp_path / "5.png").rename(data / "test" / "5.png")
    (data / "test" / "7.png").unlink()
    fresh = indexed(data, run, tmp_path / "fresh", **options)
    monkeypatch.setattr("saffe_cache.inference.correcting.open_cache", None)
    for again in (options, {"index": kind, "ridge": True, "search_correction": None}):
        updated = indexed(data, run, tmp_path / "updated", **again)
        assert updated.ids == fresh.ids
        np.testing.assert_allclose(updated.vectors, fresh.vectors, atol=1e-5)
        np.testing.assert_allclose(updated.biases_at(slice(None)), fresh.biases_at(slice(None)), atol=1e-6)
        found, expected = (one.search("word1 word9", k=11) for one in (updated, fresh))
        assert [hit.id for hit in found] == [hit.id for hit in expected]
        assert updated.manifest.correction == fresh.manifest.correction


def test_export_holds_the_biases(
    world: World, run: str, corrected: SearchIndex, plain: SearchIndex, tmp_path: Path
) -> None:
    corrected.to_parquet(tmp_path / "corrected.parquet")
    plain.to_parquet(tmp_path / "plain.parquet")
    table = pq.read_table(tmp_path / "corrected.parquet")
    np.testing.assert_array_equal(table["bias"].to_numpy(), corrected.biases_at(slice(None))[:, 0])
    assert table.drop_columns(["bias"]).equals(pq.read_table(tmp_path / "plain.parquet"))


def test_other_corrections_and_missing_caches_are_refused(
    world: World, run: str, corrected: SearchIndex, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"another index \(search correction nnn, k 10, strength 0.5 there, csls, k 10 now"
    ):
        indexed(world.photos, run, corrected.folder, ridge=True, search_correction="csls")
    with pytest.raises(ValueError, match=r"strength 0.5 there, none now"):
        indexed(world.photos, run, corrected.folder, ridge=True, search_correction="none")
    with pytest.raises(ValueError, match=r"which is not in .*nowhere. Say where it is with --cache"):
        indexed(world.photos, run, tmp_path / "a", cache=str(tmp_path / "nowhere"))
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    config = json.loads((moved / "config.json").read_text())
    del config["config"]["cache"]
    (moved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"which is not in a known place\. Say where it is with --cache"):
        indexed(world.photos, str(moved), tmp_path / "b")
    found = indexed(world.photos, str(moved), tmp_path / "b", cache=world.cache, ridge=True)
    np.testing.assert_array_equal(found.biases_at(slice(None)), corrected.biases_at(slice(None)))


def test_default_correction_without_a_cache_is_left_out(
    world: World, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saffe_cache.retrieval.correction.DEFAULT_CORRECTION", "nnn")
    options = {"search_correction": None, "cache": str(tmp_path / "nowhere")}
    assert indexed(world.photos, run, tmp_path / "without", **options).manifest.correction is None
    assert indexed(world.photos, run, tmp_path / "with", search_correction=None).manifest.correction is not None
