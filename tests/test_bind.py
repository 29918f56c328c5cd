"""saffe bind on caches whose photos tell of their class, or tell nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from extraction_cases import draw
from synthetic_cache import TEXT_WIDTH, make_cache

from saffe_cache.core.controls import failed
from saffe_cache.core.features import CacheError
from saffe_cache.core.results import Estimate, exit_status
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.store.reader import open_cache
from saffe_cache.studies.binding import episodes
from saffe_cache.studies.binding.bind import bind
from saffe_cache.studies.binding.config import BindConfig
from saffe_cache.studies.binding.episodes import Episodic, draw_episodes, judge_controls, summary
from saffe_cache.studies.binding.names import NamePool, make_names
from saffe_cache.studies.binding.result import PUBLISHED, BindingResult, Task

NUM_NAMES = 30


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("bind") / "c.zarr", {"train": 60, "test": 60}, classes=4, signal=8)


def config_of(cache: str, out: Path, **options: object) -> BindConfig:
    """A quick one. The synthetic encoder cannot be asked: its names' vectors are drawn."""
    if not (out / "names.npz").exists():
        names = make_names(NUM_NAMES, [], 0)
        vectors = np.random.default_rng(0).normal(size=(NUM_NAMES, TEXT_WIDTH)).astype(np.float32)
        NamePool(tuple(names), vectors, open_cache(cache).encoder("text").key).save(out / "names.npz")
    quick = {"ways": (2,), "shots": (3,), "queries": 5, "episodes": 12, "tuning_episodes": 2, "max_epochs": 6}
    return BindConfig(cache=cache, out=str(out), num_names=NUM_NAMES, device="cpu", **(quick | options))  # type: ignore[arg-type]


def result_of(config: BindConfig) -> BindingResult:
    return BindingResult.load(bind(config))


@pytest.mark.slow
def test_visible_classes_are_bound_and_controls_at_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "LEARNING_RATES", {"random": (1e-3,), "ridge": (3e-5,)})
    cache = make_cache(tmp_path / "c.zarr", {"train": 60, "test": 60}, classes=4, signal=8, width=128)
    result = result_of(config_of(cache, tmp_path, shots=(5,)))
    [setting] = result.settings
    systems, controls = setting.systems, setting.controls
    for name in ("class_means", "ridge", "fam from random, converged", "fam from ridge, converged"):
        assert systems[name].value > 0.8, name
    assert set(setting.differences) == {name for name in systems if name.startswith("fam")}
    for name, difference in setting.differences.items():
        assert difference.value == pytest.approx(systems[name].value - systems["class_means"].value)
    assert controls["fam from random, blind"] == Estimate(value=0.5, low=0.5, high=0.5)
    shuffled = controls["fam from random, converged, photos shuffled"]
    assert shuffled.half is not None
    assert abs(shuffled.value - 0.5) < 3 * shuffled.half / 1.96 + 1e-9
    assert result.failures == ()
    assert len(setting.verdicts) == len(controls)
    assert exit_status(str(tmp_path)) == 0
    assert "CONTROL FAILED" not in (tmp_path / "report.txt").read_text()


@pytest.mark.slow
def test_ridge_start_equals_ridge_baseline(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "LEARNING_RATES", {"random": (1e-3,), "ridge": (1e-12,)})
    [setting] = result_of(config_of(cache, tmp_path, shots=(1,))).settings
    for reading in ("1 epoch", "2 epochs", "converged"):
        assert setting.systems[f"fam from ridge, {reading}"] == setting.systems["ridge"]


@pytest.mark.slow
def test_killed_run_resumes_and_finished_one_stays(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(cache, tmp_path / "killed", shots=(1, 2), head="mean")
    whole = result_of(replace(config_of(cache, tmp_path / "whole", shots=(1, 2), head="mean")))
    measure, calls = Episodic.measure, []

    def dying(*arguments: object) -> object:
        calls.append(arguments[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Episodic, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        bind(config)
    result = result_of(config)
    assert len(calls) == 3  # the first setting is not measured again
    assert result.settings == whole.settings
    before = (tmp_path / "killed" / "result.json").read_bytes()
    bind(config)
    assert (tmp_path / "killed" / "result.json").read_bytes() == before
    assert len(calls) == 3
    with pytest.raises(ValueError, match=r"holds another result \(seed: 0 there, 1 now"):
        bind(replace(config, seed=1))


@pytest.mark.slow
def test_all_names_replaced(cache: str, tmp_path: Path) -> None:
    config = config_of(cache, tmp_path, episodes=2, shots=(1,), replaced_seeds=2, replaced_epochs=4)
    top1, by_map = result_of(config).names_replaced
    assert (top1.metric, by_map.metric, top1.classes) == ("top1", "map", 4)
    for name in ("fam, made-up names", "fam, true names"):
        assert len(top1.systems[name]) == 2
        assert min(top1.systems[name]) > 0.6, name
    assert top1.systems["linear probe"][0] > 0.6
    assert top1.systems["chance"] == (0.25,)


def test_names_are_encoded_once_with_the_caches_encoder(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number, label in enumerate(("word1", "word2") * 4):
            draw(tmp_path / "data" / split / label / f"{number}.png", number + 100 * len(split))
    encoder = {"image": str(tiny_model("dinov2")), "text": str(tiny_model("bert"))}
    cache = extract(
        ExtractConfig(data=str(tmp_path / "data"), cache=str(tmp_path / "c.zarr"), encoder=encoder, device="cpu")
    )
    config = BindConfig(
        cache=cache,
        out=str(tmp_path / "out"),
        ways=(2,),
        shots=(1,),
        queries=2,
        episodes=2,
        tuning_episodes=2,
        max_epochs=2,
        head="mean",
        num_names=8,
        text_encoder=str(tmp_path / "gone"),
        device="cpu",
    )
    with pytest.raises(ValueError, match="found no model"):
        bind(config)
    with pytest.raises(CacheError, match=r"is not the encoder of the cache.*--text-encoder"):
        bind(replace(config, text_encoder=str(tiny_model("roberta"))))
    bind(replace(config, text_encoder=None))
    pool = NamePool.load(tmp_path / "out" / "names.npz")
    assert len(set(pool.names)) == 8
    assert np.allclose(np.linalg.norm(pool.vectors, axis=1), 1, atol=1e-5)
    for left in ("result.json", "cells/2-way-1-shot.json"):
        (tmp_path / "out" / left).unlink()
    bind(config)  # the names are there, so the encoder is not needed


def test_episodes_are_disjoint_and_their_names_new() -> None:
    labels = np.repeat(np.arange(6), 10)
    drawn = draw_episodes(labels, 50, Task(ways=3, shots=2, queries=5), 40, 0)
    for support, queries, classes, names in zip(drawn.support, drawn.queries, drawn.classes, drawn.names, strict=True):
        photos = np.concatenate([support, queries], axis=1)
        assert len(np.unique(photos)) == photos.size
        assert (labels[photos] == classes[:, None]).all()
        assert len(set(classes)) == len(set(names)) == 3
    assert len(np.unique(drawn.names, axis=0)) > 35
    again = draw_episodes(labels, 50, Task(ways=3, shots=2, queries=5), 40, 0)
    assert np.array_equal(drawn.support, again.support)
    assert np.array_equal(drawn.names, again.names)
    shuffled = drawn.shuffled(0)
    assert not np.array_equal(shuffled.support, drawn.support)
    assert np.array_equal(np.sort(shuffled.support.reshape(40, -1)), np.sort(drawn.support.reshape(40, -1)))


def test_made_up_names_avoid_class_names() -> None:
    plain = make_names(200, [], 0)
    assert len(set(plain)) == 200
    assert all(name.isalpha() and name.islower() for name in plain)
    avoided = [plain[0].upper(), f"a_{plain[1]}", f"big {plain[2]}"]
    assert not {plain[0], plain[1], plain[2]} & set(make_names(200, avoided, 0))
    assert make_names(5, [], 1) != plain[:5]


def test_interval_and_failed_controls() -> None:
    values = np.array([0.2, 0.4, 0.9, 0.5])
    deviation = np.sqrt(((values - 0.5) ** 2).sum() / 3)
    assert summary(values) == Estimate(
        value=0.5, low=pytest.approx(0.5 - 1.96 * deviation / 2), high=pytest.approx(0.5 + 1.96 * deviation / 2)
    )
    task = Task(ways=2, shots=1, queries=5)
    assert failed(judge_controls(task, {"shuffled": values, "blind": np.full(4, 0.5)})) == []
    [failure] = failed(judge_controls(task, {"shuffled": np.array([0.7, 0.71, 0.72])}))
    assert failure.startswith("2-way 1-shot, shuffled: accuracy is 71.00, expected 50.00 ± ")


def test_too_few_photos_or_classes_are_reported(cache: str, tmp_path: Path) -> None:
    config = config_of(cache, tmp_path)
    with pytest.raises(ValueError, match=r"6-way 3-shot: 6 classes with 8 photos.*4 of 4 classes have them"):
        bind(replace(config, ways=(6,)))
    with pytest.raises(ValueError, match=r"0 of 4 classes have them, the largest has 15. Use fewer"):
        bind(config_of(cache, tmp_path / "b", queries=20))
    with pytest.raises(ValueError, match=r"--ways: found 40, expected at most 30"):
        replace(config, ways=(40,))
    with pytest.raises(CacheError, match="does not say where its encoder is"):
        bind(replace(config, out=str(tmp_path / "c")))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "names.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="not a pool of names"):
        bind(replace(config, out=str(tmp_path / "d")))


def test_published_table_has_all_its_numbers() -> None:
    found = {(name, ways): values for (name, _), by_ways in PUBLISHED.items() for ways, values in by_ways.items()}
    assert sum(value is not None for values in found.values() for value in values) == 22
    assert found["SAFFE non-aligned, 1 epoch", 5][1] == 54.0
    assert found["Meta-Learning, 1 epoch", 2][2] == 65.8


def test_result_is_shown_as_rows_and_text(cache: str, tmp_path: Path) -> None:
    result = result_of(config_of(cache, tmp_path, shots=(1,), head="mean"))
    rows = result.to_frame().set_index("system")
    ridge = result.settings[0].systems["ridge"]
    assert rows.loc["ridge", ["setting", "value", "chance"]].tolist() == ["2-way 1-shot", ridge.value, 0.5]
    assert rows.loc["ridge", "high"] == ridge.high
    assert "control: fam from random, blind" in rows.index
    text = (tmp_path / "report.txt").read_text()
    assert text == result.to_text()
    assert f"{ridge.half_cell().text} {ridge.half_cell().note}" in text
    assert "SAFFE non-aligned, 2 epochs" in text
