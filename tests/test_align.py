"""saffe-align on caches that hold captions or classes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_cache import make_cache

from saffe_cache.cli import main
from saffe_cache.core.features import CacheError
from saffe_cache.studies.alignment.align import AlignConfig, align, read_table

QUICK = {"neighbours": 4, "components": 4, "permutations": 5, "half_samples": 3}


def result_of(cache: str, out: Path, **options: Any) -> dict[str, Any]:
    folder = align(AlignConfig(cache=cache, out=str(out), **(QUICK | options)))
    return json.loads((Path(folder) / "alignment.json").read_text())


def test_captions(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 200, "dev": 20}, signal=4, shared=10)
    result = result_of(cache, tmp_path / "out", max_photos=90)
    assert result["photos"] == {"judged": 90, "fitted": 90, "fitted_closer": 100}  # 10 photos stand in dev too
    assert result["gallery_layers"] == ["2", "3", "own"] == result["text_layers"]
    for name in ("cka", "mutual_neighbours", "svcca", "a_lin"):
        measure = result["measures"][name]
        value, low, high, null = (np.array(measure[one]) for one in ("value", "low", "high", "null_high"))
        assert value.shape == (3, 3)
        assert ((low <= value) & (value <= high)).all(), name
        assert (value > null).all(), name
        assert np.array(measure["null_mean"]) == pytest.approx(measure["chance"], abs=0.12), name
    assert "widths 16 and 12" in result["absent"]["a_0"]
    assert [one["gallery"] for one in result["advice"]] == ["photos alone", "a text beside each photo"]
    assert result["evidence"]["a_0"] is None
    rows = list(csv.DictReader((tmp_path / "out" / "pairs.csv").open()))
    assert len(rows) == 4 * 9
    assert float(rows[0]["value"]) == result["measures"]["cka"]["value"][0][0]
    table = read_table(str(tmp_path / "out"))
    assert "photos alone: LINEAR" in table
    assert result["evidence"]["token_gain"][1] > 0  # one token of five tells of the text: the mean drowns it
    assert max(map(len, table.splitlines())) <= 100


def test_classes_are_searched_by_photos_and_their_names_dealt(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 240}, classes=4, signal=8, text_width=16)
    result = result_of(cache, tmp_path / "out")
    measures = result["measures"]
    assert [one["gallery"] for one in result["advice"]] == ["photos alone"]
    assert measures["a_lin"]["chance"] == 0.25
    assert np.array(measures["a_lin"]["value"]).min() > 0.5
    assert np.array(measures["cka"]["null_mean"]).min() > 0.1  # what photos of a class share stays in the null
    assert np.array(measures["mutual_neighbours"]["null_mean"]) == pytest.approx(0.25, abs=0.05)
    assert np.array(measures["a_0"]["value"]).shape == (3, 3)  # here the widths agree
    assert measures["a_new"]["chance"] == 0.5
    assert np.array(measures["a_new"]["null_mean"]) == pytest.approx(0.5, abs=0.2)


def test_a_map_carries_over_to_classes_that_it_has_not_seen_where_spaces_agree(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 360}, classes=24, signal=8, text_width=4)
    result = result_of(cache, tmp_path / "out", layers={"image": (3,), "text": (3,)})
    measure = result["measures"]["a_new"]
    assert measure["chance"] == pytest.approx(1 / 12)
    assert measure["value"][0][1] > 0.25 > measure["null_high"][0][1]
    assert np.min(measure["low"]) >= 0
    assert np.max(measure["high"]) <= 1
    two = make_cache(tmp_path / "d.zarr", {"train": 80}, classes=2, signal=8)
    assert result_of(two, tmp_path / "few")["absent"]["a_new"].startswith("2 classes, 4 are needed")


def test_layers_are_chosen_and_results_repeat(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 80})
    first = result_of(cache, tmp_path / "a", layers={"image": (3,), "text": (2,)})
    second = result_of(cache, tmp_path / "b", layers={"image": (3,), "text": (2,)})
    assert first["gallery_layers"] == ["3", "own"]
    assert first["text_layers"] == ["2", "own"]
    for part in ("measures", "closer", "evidence"):
        assert first[part] == second[part]
    assert first["closer"][0]["gallery_layer"] == "3"


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 20})
    with pytest.raises(ValueError, match=r"20 photos with captions of their own, expected 32 or more"):
        result_of(cache, tmp_path / "out")
    with pytest.raises(CacheError, match=r"it has layers \[2, 3\], asked for \[7\]"):
        result_of(make_cache(tmp_path / "d.zarr", {"train": 80}), tmp_path / "out", layers={"image": (7,)})
    with pytest.raises(ValueError, match=r"--neighbours: found 5, expected an even number"):
        AlignConfig(cache=cache, out="o", neighbours=5)
    assert not (tmp_path / "out").exists()
    assert main(["align", "--cache", str(tmp_path / "none.zarr"), "--out", str(tmp_path / "out")]) == 1
