"""Photos and sounds that find each other through texts, on synthetic caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from several_cache import make_several_cache

from saffe_cache.core.results import read_report
from saffe_cache.store.reader import open_cache
from saffe_cache.studies.bridge.bridge import _open_side, _relations, bridge
from saffe_cache.studies.bridge.config import BridgeConfig
from saffe_cache.studies.bridge.result import BridgeResult
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.train import train


def trained(cache: str, folder: Path, gallery: str, fusion: str = "ridge") -> str:
    out = str(folder / f"{fusion}-{gallery}")
    config = TrainConfig(cache=cache, out=out, gallery=gallery, fusion=fusion, log=("none",), device="cpu")  # type: ignore[arg-type]
    return train(config)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bridge") / "several.zarr"
    return make_several_cache(path, {"train": 200, "dev": 30, "test": 60}, strength=(4.0, 4.0), lacks=9)


@pytest.fixture(scope="module")
def runs(cache: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    return trained(cache, folder, "image"), trained(cache, folder, "audio")


def test_sounds_find_photos_without_pairs_of_both(cache: str, runs: tuple[str, str], tmp_path: Path) -> None:
    out = bridge(BridgeConfig(cache=cache, run=runs, out=str(tmp_path / "bridge"), device="cpu"))
    result = BridgeResult.load(out)
    assert (result.relevance, result.failures) == ("item", ())
    assert [one.name for one in result.directions] == ["image to audio", "audio to image"]
    for one in result.directions:
        assert one.num_queries == one.num_gallery == 60 - 2 * 7
        assert set(one.systems) == {"bridge, texts", "bridge, ridges", "direct ridge", "direct MLP"}
        for system in ("bridge, texts", "bridge, ridges"):
            score = one.systems[system]["map"]
            assert score.low is not None
            assert score.low > one.chance["map"]
        assert len(one.controls) == 2
        assert all(control.passed for control in one.controls)
    text = read_report(out)
    assert "audio to image: bridge, texts less direct ridge, map:" in text
    assert "control: texts permuted in the run of audio" in text


def test_classes_bind_media_of_different_items(tmp_path: Path) -> None:
    cache = make_several_cache(
        tmp_path / "classes.zarr", {"train": 120, "test": 60}, classes=5, lacks=2, strength=(4.0, 4.0)
    )
    runs = trained(cache, tmp_path, "image"), trained(cache, tmp_path, "audio")
    result = BridgeResult.load(bridge(BridgeConfig(cache=cache, run=runs, out=str(tmp_path / "out"), device="cpu")))
    (first, second) = result.directions
    assert (result.relevance, first.num_pairs, first.num_queries, first.num_gallery) == ("class", 0, 30, 30)
    assert set(first.systems) == {"bridge, texts", "bridge, ridges"}  # no item has both media
    assert second.systems["bridge, texts"]["map"].value > 1.5 * second.chance["map"]
    assert (result.num_texts, result.failures) == (5, ())
    sides = tuple(_open_side(run, open_cache(cache), "cpu") for run in runs)
    groups = _relations(open_cache(cache).table, sides, "test", "class").groups
    assert [np.bincount(one).tolist() for one in groups] == [[6] * 5, [6] * 5]  # drawn together in the controls


def test_runs_that_do_not_meet_are_refused(cache: str, runs: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--run: found two runs of image, expected runs of two modalities"):
        bridge(BridgeConfig(cache=cache, run=(runs[0], runs[0]), out=str(tmp_path)))
    with pytest.raises(ValueError, match=r"--run: found none, expected two runs"):
        BridgeConfig(cache=cache, run=(), out=str(tmp_path))
    with pytest.raises(ValueError, match="no image and audio of one class in it"):
        bridge(BridgeConfig(cache=cache, run=runs, out=str(tmp_path), relevance="class"))
