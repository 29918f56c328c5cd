"""Fusions that read one vector of each photo, those in closed form, and recipes of a fusion's own."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from quick_runs import quick_train, report_of, value
from store_cases import convert
from synthetic_cache import make_cache

from saffe_cache.core.options import attribute_docstrings
from saffe_cache.fusion.layers import summarize
from saffe_cache.fusion.registry import FUSIONS, FusionEntry
from saffe_cache.inputs.feature_loader import FeatureLoader, choose_residency
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.studies.sweep.runs import _OF_RECIPE, chosen
from saffe_cache.training.config import TrainConfig, TrainingRecipe
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.train import train

CLASSES = """
import torch
from torch import nn
from saffe_cache.fusion.two_sided import TwoSided


class Towers(TwoSided):
    def __init__(self, shape, blocks):
        super().__init__(shape)
        self.photo = nn.Linear(shape.summary_size, 7)
        self.text = nn.Linear(shape.text_size, 7)

    def photo_side(self, summary):
        return self.photo(summary)

    def text_side(self, unit):
        return self.text(unit)


class LeastSquares(TwoSided):
    def __init__(self, shape, blocks):
        super().__init__(shape)
        self.register_buffer("weight", torch.zeros(shape.summary_size, shape.text_size))

    def fit(self, seen):
        start = seen.validate()
        photos, texts = torch.from_numpy(seen.photos), torch.from_numpy(seen.mean_texts)
        penalty = 10 * torch.eye(photos.shape[1])
        self.weight = torch.linalg.solve(photos.T @ photos + penalty, photos.T @ texts)
        assert 0 < start <= 1 and start != seen.validate()

    def photo_side(self, summary):
        return summary @ self.weight

    def text_side(self, unit):
        return unit
"""
NO_STEPS: dict[str, Any] = {"epochs": None, "batch_size": None}
RECIPE = {"epochs": 4, "batch_size": 16, "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fusions on summaries: one with a recipe, one in closed form."""
    (tmp_path / "added_vectors.py").write_text(CLASSES)
    monkeypatch.syspath_prepend(tmp_path)
    shared: dict[str, Any] = {"summary": "For this test.", "reads": "summary", "options": frozenset()}
    trained = FusionEntry(made_by="added_vectors:Towers", recipe=RECIPE, recipe_from="published", **shared)
    closed = FusionEntry(made_by="added_vectors:LeastSquares", is_closed_form=True, **shared)
    for name, entry in {"towers": trained, "least_squares": closed}.items():
        monkeypatch.setitem(cast(dict[str, FusionEntry], FUSIONS), name, entry)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vectors")
    return make_cache(folder / "cache.zarr", {"train": 100, "dev": 30, "test": 30}, captions=2, shard_rows=16)


def config_for(cache: str, out: Path | str = "unused", **changes: Any) -> TrainConfig:
    return TrainConfig(cache=cache, out=str(out), **({"log": ("none",), "device": "cpu"} | changes))


def loader(path: str, residency: Any, fusion: str = "towers") -> FeatureLoader:
    cache = open_cache(path)
    return FeatureLoader(cache, resolve_run(config_for(path, fusion=fusion), cache), "cpu", residency)


@pytest.mark.parametrize("residency", ["mapped", "memory"])
def test_photos_are_their_summaries(path: str, residency: str) -> None:
    inputs, rows = loader(path, residency), np.array([9, 3, 70, 3])
    inputs.keep_summaries(np.arange(100)[::-1])
    [found], mask = inputs.photos(rows)
    expected = summarize(*loader(path, "mapped", "linear").photos(rows))
    assert mask is None
    assert found.shape == (4, 1, inputs.spec.shape.summary_size)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-6, rtol=1e-6)


def test_kept_summaries_need_no_tokens(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = loader(path, "memory")
    inputs.keep_summaries(np.arange(20))
    monkeypatch.setattr(FeatureLoader, "_tokens", None)
    assert inputs.photos(np.array([19, 0]))[0][0].shape[0] == 2


def test_summaries_fit_in_memory_where_tokens_do_not(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache: Cache = open_cache(path)
    towers, tokens = (resolve_run(config_for(path, fusion=name), cache) for name in ("towers", "linear"))
    assert choose_residency("auto", cache, towers, "cpu") == "memory"
    assert choose_residency("auto", cache, tokens, "cpu") == "mapped"
    monkeypatch.setattr("saffe_cache.inputs.feature_loader.available_memory", lambda: 1000)
    assert choose_residency("auto", cache, towers, "cpu") == "mapped"


def test_runs_are_equal_wherever_summaries_are(path: str, tmp_path: Path) -> None:
    packed = convert(path, tmp_path / "zstd", compression="zstd", shard_mb=0)
    scores = {}
    for cache, residency in ((path, "memory"), (path, "mapped"), (packed, "memory")):
        run = tmp_path / f"{Path(cache).name}-{residency}"
        train(config_for(cache, run, fusion="towers", residency=residency, control_epochs=0))
        scores[run] = [json.loads(line)["validation_score"] for line in (run / "log.jsonl").open()]
    first, *others = scores.values()
    assert len(first) == 5
    assert all(other == pytest.approx(first) for other in others)
    assert first[-1] > first[0]
    train(config_for(packed, tmp_path / "streamed", fusion="towers", residency="streamed", control_epochs=0))


def test_closed_form_is_fitted_and_evaluated(path: str, tmp_path: Path) -> None:
    run = quick_train(path, tmp_path / "run", fusion="least_squares", **NO_STEPS)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["steps"], result["best_epoch"]) == (0, 0)
    assert result["trainable_parameters"] == 2 * 2 * 16 * 12
    assert result["seconds"] >= 0
    report = report_of(path, run)
    assert value(report, "mrr") > 2 * value(report, "mrr", "pairs_permuted")
    assert report["run"]["objective"] == {}
    assert "none: the fusion is fitted" in str(vars(_page(tmp_path / "run")))
    quick_train(path, tmp_path / "run", fusion="least_squares", **NO_STEPS)  # nothing to do


def _page(run: Path) -> Any:
    from saffe_cache.training.result import TrainResult

    [section] = TrainResult.load(run).page_sections(run)
    return section


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, "--epochs: found 3, expected none: least_squares is fitted in closed form"),
        ({"learning_rate": 0.1}, "--learning-rate: found 0.1, expected none"),
        ({"objective": {"siglip": 1.0}}, "--objective: found siglip, expected none"),
    ],
)
def test_closed_form_takes_no_steps(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_for("c", fusion="least_squares", **changes)


def test_given_options_replace_the_recipe() -> None:
    recipe = config_for("c", fusion="towers", epochs=2).recipe
    assert recipe == TrainingRecipe(epochs=2, batch_size=16, learning_rate=0.01)
    assert config_for("c", fusion="late").recipe == TrainingRecipe()
    assert "Recipe: epochs 4, batch_size 16, learning_rate 0.01, as published." in FUSIONS["towers"].help
    with pytest.raises(ValueError, match="--epochs: found -1, expected 0 or more"):
        config_for("c", fusion="towers", epochs=-1)


def test_help_says_the_usual_values() -> None:
    helps, usual = attribute_docstrings(TrainConfig), TrainingRecipe()
    for one in fields(TrainingRecipe):
        assert f"Default: the fusion's own, usually {getattr(usual, one.name)}" in helps[one.name]
        assert getattr(config_for("c"), one.name) is None


def test_every_recipe_is_valid() -> None:
    for name in FUSIONS:
        assert config_for("c", fusion=name).recipe


def test_run_of_before_recipes_is_still_the_same(path: str, tmp_path: Path) -> None:
    """Its config.json names the values that were defaults, and not the options that are new."""
    config = config_for(path, tmp_path / "run", fusion="towers", epochs=1, control_epochs=0)
    train(config)
    file = tmp_path / "run/config.json"
    content = json.loads(file.read_text())
    assert content["config"]["batch_size"] == 16
    del content["config"]["patience"]
    file.write_text(json.dumps(content))
    train(config)  # finished already
    train(replace(config, batch_size=16))
    with pytest.raises(ValueError, match="patience: 8 there, 3 now"):
        train(replace(config, patience=3))


def test_sweeps_name_runs_by_their_values() -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        config = config_for("c", **changes)
        return {name: one for name, one in chosen(config).items() if name not in _OF_RECIPE} | chosen(config.recipe)

    assert identity(fusion="linear") == identity(fusion="linear", epochs=30)
    assert identity(fusion="linear", epochs=8)["epochs"] == 8
    assert identity(fusion="towers") == identity(fusion="towers", epochs=4)
