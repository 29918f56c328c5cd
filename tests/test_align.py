"""saffe align on caches that hold captions or classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_cache import make_cache

from saffe_cache.cli import main
from saffe_cache.core.features import CacheError
from saffe_cache.core.results import exit_status
from saffe_cache.studies.alignment import measures
from saffe_cache.studies.alignment.align import align
from saffe_cache.studies.alignment.config import AlignConfig
from saffe_cache.studies.alignment.result import AlignmentResult

QUICK = {"neighbours": 4, "components": 4, "permutations": 5, "half_samples": 3}


def result_of(cache: str, out: Path, **options: Any) -> AlignmentResult:
    return AlignmentResult.load(align(AlignConfig(cache=cache, out=str(out), **(QUICK | options))))


@pytest.mark.slow
def test_captions(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 200, "dev": 20}, signal=4, shared=10)
    result = result_of(cache, tmp_path / "out", max_photos=90)
    assert result.photos == {"judged": 90, "fitted": 90, "fitted_closer": 100}  # 10 photos are in dev too
    assert result.gallery_layers == ("2", "3", "own") == result.text_layers
    for name in ("cka", "mutual_neighbours", "svcca", "a_lin"):
        measure = result.measures[name]
        value, low, high, null = (np.array(getattr(measure, one)) for one in ("value", "low", "high", "null_high"))
        assert value.shape == (3, 3)
        assert ((low <= value) & (value <= high)).all(), name
        assert (value > null).all(), name
        assert np.array(measure.null_mean) == pytest.approx(measure.chance, abs=0.12), name
    assert "widths 16 and 12" in result.absent["a_0"]
    assert [one.gallery for one in result.advice] == ["photos alone", "photos with paired text"]
    evidence = result.best_layer.evidence
    assert evidence.a_0 is None
    rows = result.to_frame()
    layers = rows[rows["system"] == "layers"]
    assert len(layers) == 4 * 9
    assert layers["value"].iloc[0] == result.measures["cka"].value[0][0]
    assert result.failures == ()
    assert exit_status(tmp_path / "out") == 0
    assert result.best_layer.control.passed
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "photos alone: LINEAR" in text
    assert evidence.token_gain.sign > 0  # one token of five carries the text, which the mean drowns
    assert max(map(len, text.splitlines())) <= 100


def test_photos_search_classes_and_names_are_permuted(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 240}, classes=4, signal=8, text_width=16)
    result = result_of(cache, tmp_path / "out")
    measures = result.measures
    assert [one.gallery for one in result.advice] == ["photos alone"]
    assert measures["a_lin"].chance == 0.25
    assert np.array(measures["a_lin"].value).min() > 0.5
    assert np.array(measures["cka"].null_mean).min() > 0.1  # what photos of a class share stays in the null
    assert np.array(measures["mutual_neighbours"].null_mean) == pytest.approx(0.25, abs=0.05)
    assert np.array(measures["a_0"].value).shape == (3, 3)  # here the widths agree
    assert measures["a_new"].chance == 0.5
    assert np.array(measures["a_new"].null_mean) == pytest.approx(0.5, abs=0.2)
    folded, shown = (sections[1].tables[0].folded for sections in (result.page_sections(tmp_path), result.sections()))
    assert folded
    assert not shown


@pytest.mark.slow
def test_map_carries_over_to_unseen_classes(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 360}, classes=24, signal=8, text_width=4)
    result = result_of(cache, tmp_path / "out", layers={"image": (3,), "text": (3,)})
    measure = result.measures["a_new"]
    value, null = measure.value[0][1], measure.null_high[0][1]
    assert measure.chance == pytest.approx(1 / 12)
    assert value is not None
    assert null is not None
    assert value > 0.25 > null
    assert np.array(measure.low, float).min() >= 0
    assert np.array(measure.high, float).max() <= 1
    two = make_cache(tmp_path / "d.zarr", {"train": 80}, classes=2, signal=8)
    assert result_of(two, tmp_path / "few").absent["a_new"].startswith("2 classes; leaving half of them out")


@pytest.mark.slow
def test_chosen_layers_and_killed_runs_repeat_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 80})
    options = {"layers": {"image": (3,), "text": (2,)}}
    first = result_of(cache, tmp_path / "a", **options)
    with monkeypatch.context() as patch:
        patch.setattr("saffe_cache.studies.alignment.align.measure_best_layer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            result_of(cache, tmp_path / "b", **options)
    monkeypatch.setattr(measures, "measure_cka", lambda *_: pytest.fail("it is measured already"))
    second = result_of(cache, tmp_path / "b", **options)
    assert first.gallery_layers == ("3", "own")
    assert first.text_layers == ("2", "own")
    assert first.measures == second.measures
    assert first.best_layer == second.best_layer
    assert first.best_layer.maps[0].gallery_layer == "3"
    with pytest.raises(ValueError, match="holds another result"):
        result_of(cache, tmp_path / "b", **options, seed=1)


def test_measurements_on_too_little_data_are_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 20})
    with pytest.raises(ValueError, match=r"20 items with captions of their own, expected 32 or more"):
        result_of(cache, tmp_path / "out")
    with pytest.raises(CacheError, match=r"it has layers \[2, 3\], requested \[7\]"):
        result_of(make_cache(tmp_path / "d.zarr", {"train": 80}), tmp_path / "out", layers={"image": (7,)})
    with pytest.raises(ValueError, match=r"--neighbours: found 5, expected an even number"):
        AlignConfig(cache=cache, out="o", neighbours=5)
    assert not (tmp_path / "out").exists()
    assert main(["align", "--cache", str(tmp_path / "none.zarr"), "--out", str(tmp_path / "out")]) == 1
