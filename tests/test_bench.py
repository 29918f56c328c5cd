"""What a benchmark could get wrong silently: ratios, verdicts, missing competitors, unequal rows. Nothing is timed."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent / "benchmarks"))

import average_precision
import bench
import crowded
import decoding
import evaluation
import extraction
import growth
import reading
import training
import writing
from synthetic_cache import make_cache
from timing import Figure, Rounds, not_installed, take_turns

import data.encoders
from saffe_cache.store.reader import open_cache

SMALL: Mapping[str, Mapping[str, Any]] = {
    "reading": {"NUM_ROWS": 64, "BATCH": 16, "NEAR_ROUNDS": 1, "FAR_ROUNDS": 1},
    "readers": {"SHARD_MB": 1, "NUM_SHARDS": 4, "NUM_ROWS": 4, "ROUNDS": 1},
    "streaming": {"SHARD_MB": 1, "NUM_SHARDS": 4, "LATENCY": 0.001, "ROUNDS": 1},
    "writing": {"SHARD_BYTES": 2**20, "TURN_SHARDS": 2, "ROUNDS": 1},
    "objects": {"SHARD_MB": 1, "NUM_SHARDS": 3, "LATENCY": 0.001, "NUM_ROWS": 4, "ROUNDS": 1},
    "extraction": {"PHOTOS": 6, "TEXTS": 24, "PIXELS": 48, "LAYERS": {"image": (2, 3), "text": (2, 3)}}
    | {"ROUNDS": 1, "LOADINGS": 1, "DECODING_TURNS": 1},
    "workers": {"PHOTOS": 4, "LAYERS": (2, 3), "ROUNDS": 1},
    "training": {"PHOTOS": {"train": 24, "dev": 8}, "LAYERS": {"image": (2, 3), "text": (2, 3)}}
    | {"RELEASED_BATCH": 4, "RELEASED_STEPS": 2, "ROUNDS": 1},
    "crowded": {"PHOTOS": 4, "TRAINED_ON": 30, "LAYERS": (2, 3), "STEPS": 1, "BUSY": (0, 1), "ROUNDS": 1},
    "growth": {"ITEMS": 10},
}
"""Sizes of the sections at which a test can run them. Evaluation and decoding have tests of their own."""
SLOW = ("objects", "extraction", "workers", "training", "growth")


class Clock:
    """A machine on which work takes `slowness` times the seconds that it should."""

    def __init__(self) -> None:
        self.now, self.slowness = 0.0, 1.0
        self.turns: list[str] = []

    def work(self, name: str, seconds: float, amount: int) -> Callable[[], int]:
        def turn() -> int:
            self.turns.append(name)
            self.now += seconds * self.slowness
            return amount

        return turn

    def __call__(self) -> float:
        return self.now


def test_a_ratio_is_of_amounts_by_time_in_the_same_round() -> None:
    """Twice the rows in half the time is four times the rate, whatever else the machine does from round to round."""
    clock = Clock()
    generator = np.random.default_rng(0)
    candidates = {"ours": clock.work("ours", 0.5, 20), "theirs": clock.work("theirs", 1.0, 10)}

    def before() -> None:
        clock.now += 1000  # not timed
        if len(clock.turns) % 2 == 0:
            clock.slowness = float(generator.uniform(1, 50))

    rounds = take_turns(candidates, 9, before=before, clock=clock)
    figure = rounds.ratio("ours", "theirs", "x", at_least=4.0)
    assert figure.value == pytest.approx(4)
    assert figure.interval == pytest.approx((4, 4))
    assert rounds.ratio("theirs", "ours", "x").value == pytest.approx(0.25)
    assert np.ptp(rounds.rates["ours"]) > 1


def test_every_round_has_each_candidate_once_in_changing_order() -> None:
    clock = Clock()
    candidates = {name: clock.work(name, 1.0, 1) for name in "abc"}
    rounds = take_turns(candidates, 20, clock=clock)
    assert [len(rates) for rates in rounds.rates.values()] == [20, 20, 20]
    orders = [tuple(clock.turns[start : start + 3]) for start in range(0, 63, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)  # the first of them did not count
    assert len(set(orders)) > 3


def test_figure_is_the_median_of_ratios() -> None:
    rounds = Rounds({"a": np.array([1.0, 4.0, 9.0]), "b": np.array([1.0, 2.0, 30.0])})
    figure = rounds.ratio("a", "b", "x")
    assert figure.value == 1
    assert figure.interval is not None
    assert figure.interval[0] >= 0.3
    assert figure.interval[1] <= 2
    assert rounds.rate("a", "x", "MB/s", 1e-6).value == pytest.approx(4e-6)


@pytest.mark.parametrize(
    "section", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SMALL]
)
def test_a_small_section_measures_every_figure(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]
) -> None:
    """With tiny encoders, and in this process where a section starts others. What sections check holds at any size."""
    module = importlib.import_module(section)
    for name, value in SMALL[section].items():
        monkeypatch.setattr(module, name, value)
    encoders = {"dinov2-small": tiny_model("dinov2"), "all-MiniLM-L6-v2": tiny_model("bert")}
    for place in (module, data.encoders):
        monkeypatch.setattr(place, "fetch_encoders", lambda folder: encoders, raising=False)
    monkeypatch.setattr(growth, "measure_apart", growth.measure_stage)
    monkeypatch.setattr(crowded, "worker", worker_here)
    monkeypatch.setattr(extraction, "measure_memory", peaks_here)
    work = tmp_path / "section"
    work.mkdir()
    figures = module.measure(work)
    assert len({figure.name for figure in figures}) == len(figures)
    measured = [figure for figure in figures if figure != not_installed(figure.name)]
    assert measured
    assert all(figure.value is not None and math.isfinite(figure.value) for figure in measured)


@contextmanager
def worker_here(kind: str, work: Path) -> Iterator[Callable[[], int]]:
    yield crowded.TURNS[kind](work)


def peaks_here(photos: Path, model_path: str) -> list[Figure]:
    peaks = {what: extraction.peak_of(what, photos, model_path) for what in ("extraction", "loop")}
    return [Figure(name=what, unit="MB", value=peak) for what, peak in peaks.items()]


def test_every_section_of_the_command_has_a_small_form() -> None:
    assert {*SMALL, "decoding", "evaluation"} == set(bench.SECTIONS)


@pytest.mark.parametrize(
    ("value", "at_least", "at_most", "expected"),
    [
        (0.8, 0.8, None, True),
        (0.79, 0.8, None, False),
        (1.0, None, 1.0, True),
        (1.1, None, 1.0, False),
        (1.1, 0.9, 1.0, False),
        (float("nan"), 0.8, None, False),
        (5.0, None, None, None),
        (None, 0.8, None, None),
    ],
)
def test_verdicts(value: float | None, at_least: float | None, at_most: float | None, expected: bool | None) -> None:
    assert Figure(name="x", unit="ratio", value=value, at_least=at_least, at_most=at_most).is_met is expected


def test_the_table_shows_misses_and_who_is_missing() -> None:
    figures = [
        Figure(name="reading", unit="ratio", value=0.5, interval=(0.4, 0.6), at_least=0.8, note="cached"),
        Figure(name="memory", unit="MB", value=12345.6, at_most=20000.0, note="cached"),
        not_installed("rate over LitData's"),
    ]
    report = bench.Report({"cores": 2}, {"one": figures}, {"one": 3.0})
    lines = report.to_text().splitlines()
    (reading_line,) = [line.split() for line in lines if "reading" in line]
    assert reading_line == ["reading", "0.500", "0.400–0.600", "≥", "0.8", "MISSED", "[1]"]
    (memory_line,) = [line.split() for line in lines if "memory" in line]
    assert memory_line == ["memory", "12346", "MB", "≤", "20000", "met", "[1]"]
    (missing_line,) = [line for line in lines if "LitData" in line]
    assert missing_line.endswith("not installed")
    found = json.loads(json.dumps(report.to_json()))["figures"]
    assert [figure["is_met"] for figure in found] == [False, True, None]
    assert [figure["section"] for figure in found] == ["one"] * 3


def test_what_is_measured_is_kept_when_a_later_section_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fine(work: Path) -> list[Figure]:
        assert list(work.iterdir()) == []
        (work / "left").write_text("")
        return [Figure(name="a", unit="ratio", value=1.0)]

    def broken(work: Path) -> list[Figure]:
        raise AssertionError("other numbers than were written")

    monkeypatch.setitem(sys.modules, "fine", SimpleNamespace(measure=fine))
    monkeypatch.setitem(sys.modules, "broken", SimpleNamespace(measure=broken))
    with pytest.raises(AssertionError, match="other numbers"):
        bench.run(tmp_path / "work", ["fine", "broken"])
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["bench.json", "bench.txt"]
    assert [one["name"] for one in json.loads((tmp_path / "work" / "bench.json").read_text())["figures"]] == ["a"]


def test_readers_that_err_are_not_timed() -> None:
    states = writing.draw_states(4).astype(np.float16)
    everything = [(np.array([2, 0]), states[[2, 0]]), (np.array([1, 3]), states[[1, 3]])]
    reading.check("x", everything, states)
    wrong = states[[1, 3]].copy()
    wrong[0, 0, 0] = -wrong[0, 0, 0]
    for batches, message in [
        ([everything[0], (np.array([1, 3]), wrong)], "other numbers"),
        (everything[:1], "0 to 1 times each row"),
        ([*everything, everything[0]], "1 to 2 times each row"),
    ]:
        with pytest.raises(AssertionError, match=message):
            reading.check("x", batches, states)


def test_every_way_of_reading_gives_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in any order, once or often, from several shards."""
    monkeypatch.setattr(writing, "SHARD_BYTES", 2**20)
    states = writing.draw_states(60).astype(np.float16)
    ours = reading.write_ours(tmp_path, states)
    generator = np.random.default_rng(0)
    for rows in (generator.permutation(60), generator.integers(0, 60, 90), np.arange(60), np.arange(59, -1, -1)):
        np.testing.assert_array_equal(ours.rows(rows), states[rows])
    np.testing.assert_array_equal(ours.block(7, 58), states[7:58])
    assert ours.block(7, 7).shape == (0, 50, 768)


def test_libraries_agree_on_rankings_with_negative_scores() -> None:
    """torchmetrics takes what scores below 0 for irrelevant, which would show in the second digit."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(330, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = generator.integers(4, size=330)
    task = average_precision.Task(vectors[30:], labels[30:], vectors[:30], labels[:30])
    expected = task.precisions()
    found = []
    for name, (make, count, _) in average_precision.JUDGES.items():
        some = slice(0, min(count, 30))
        if judge := make(task):
            found.append(name)
            assert judge(task.queries[some] @ task.gallery.T, some) == pytest.approx(expected[some].mean(), abs=1e-4)
    assert found  # scikit-learn at least


def test_the_section_of_evaluation_checks_what_it_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one: ranks, pair scores and indices are compared with others inside, in this process and another."""
    small = {"ITEMS": 3000, "QUERIES": 60, "CAPTIONS": 60, "CLUSTERS": 50, "TEXTS": 50, "ROUNDS": 1}
    for name, value in small.items():
        monkeypatch.setattr(evaluation, name, value)
    monkeypatch.setattr(evaluation, "memory", lambda *_: not_installed("memory"))
    monkeypatch.setattr(evaluation, "indices", lambda *_: [])
    named = {figure.name: figure for figure in evaluation.measure(tmp_path)}
    assert named["one relevant of 3,000: ours / float32 product and count"].value
    assert named["reuse: pairs / full forward passes"].value
    for metric, folder in (("mAP", tmp_path), ("MRR", tmp_path / "captions")):
        assert 0 < evaluation.peak(folder, metric)["value"] < 1


def test_files_are_dropped_while_a_cache_is_open(tmp_path: Path) -> None:
    opened = open_cache(make_cache(tmp_path / "cache", {"train": 40}))
    arrays = [one.array("hidden_states/2") for one in opened.encoders.values()]
    before = [array.read(np.arange(40)).copy() for array in arrays]
    training.forget_files(opened, str(tmp_path / "cache"))
    for array, rows in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array.read(np.arange(40)), rows)


def test_a_library_that_is_missing_has_no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(average_precision, "optional_module", lambda name: None)
    assert [make(None) for make, _, _ in average_precision.JUDGES.values()] == [None] * 4


def test_decoding_is_compared_with_plain_pil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PHOTOS", {"tiny": ((80, 60), 1, 3.0)})
    monkeypatch.setattr(decoding, "EDGE", 16)
    monkeypatch.setattr(decoding, "ROUNDS", 1)
    monkeypatch.setattr(decoding, "measure_workers", lambda *_: iter(()))
    found = {figure.name: figure for figure in decoding.measure_size("tiny")}
    assert found["tiny: ours / plain PIL"].at_least == 3.0
    assert any("OpenCV" in name for name in found)  # measured, or named as missing
    assert decoding.size_of(decoding.draw_photo((80, 60), 0)) == (40, 30)
