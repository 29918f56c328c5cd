"""Loggers of a training: each step once, also of resumed runs, and no failure of theirs costs a training."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from synthetic_cache import make_cache

from saffe_cache.core.options import parse_config
from saffe_cache.training import loggers
from saffe_cache.training import loop as fitting
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.result import TrainResult
from saffe_cache.training.train import train, train_many


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("loggers") / "cache.zarr", {"train": 80, "dev": 20})


def config(cache: str, out: Path, **options: Any) -> TrainConfig:
    given: dict[str, Any] = {"epochs": 3, "batch_size": 16, "log": ("none",), "control_epochs": 1, "device": "cpu"}
    return TrainConfig(cache=cache, out=str(out), fusion="linear", **(given | options))


class Recorder:
    """A callback that keeps what it is called with."""

    def __init__(self) -> None:
        self.started: list[tuple[Mapping[str, Any], str]] = []
        self.steps: list[tuple[int, Mapping[str, float]]] = []
        self.finished: list[TrainResult | None] = []

    def start(self, config: Mapping[str, Any], name: str) -> None:
        self.started.append((config, name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append((step, values))

    def finish(self, result: TrainResult | None) -> None:
        self.finished.append(result)


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def known(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of log.jsonl as loggers get it, without the time."""
    return {name: value for name, value in line.items() if value is not None and name not in ("step", "seconds")}


def test_callback_sees_what_the_log_holds(cache: str, tmp_path: Path) -> None:
    recorder = Recorder()
    out = Path(train(config(cache, tmp_path / "run"), callbacks=[recorder]))
    lines = lines_of(out)
    assert len(lines) == 4
    assert [step for step, _ in recorder.steps] == [line["step"] for line in lines]
    assert [known(values) for _, values in recorder.steps] == [known(line) for line in lines]
    [(options, name)] = recorder.started
    assert (name, options["fusion"], options["resolved"]["gallery_layers"]) == ("run", "linear", [2, 3])
    assert json.loads(json.dumps(options)) == options
    assert recorder.finished == [TrainResult.load(out)]
    train(config(cache, out), callbacks=[recorder])  # finished: nothing to do
    assert (len(recorder.started), len(recorder.finished)) == (1, 1)


@pytest.mark.parametrize("interval", [0.0, 1e9], ids=["with a checkpoint", "without one"])
def test_resumed_run_logs_each_step_once(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: float
) -> None:
    recorder, step = Recorder(), fitting._step

    def stopping(at: int) -> Any:
        def stop(config: Any, state: Any, *rest: Any) -> float:
            if state.step == at:
                raise KeyboardInterrupt
            return step(config, state, *rest)

        return stop

    for at in (8, 12):  # the second time behind the first one's last step where nothing was saved
        monkeypatch.setattr(fitting, "_step", stopping(at))
        with pytest.raises(KeyboardInterrupt):
            train(config(cache, tmp_path / "run", checkpoint_seconds=interval), callbacks=[recorder])
    monkeypatch.setattr(fitting, "_step", step)
    out = Path(train(config(cache, tmp_path / "run", checkpoint_seconds=interval), callbacks=[recorder]))
    assert [known(values) for _, values in recorder.steps] == [known(line) for line in lines_of(out)]
    assert [result is None for result in recorder.finished] == [True, True, False]
    assert len({name for _, name in recorder.started}) == 1


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_failing_logger_is_dropped_with_one_warning(
    cache: str, tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the service is down")

    broken, healthy = Recorder(), Recorder()
    setattr(broken, method, fail)
    with caplog.at_level(logging.WARNING):
        out = Path(train(config(cache, tmp_path / "run"), callbacks=[broken, healthy]))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "Logger Recorder, callback 1 failed (RuntimeError: the service is down). Training goes on without it."
    ]
    assert len(healthy.steps) == 4
    whole = Path(train(config(cache, tmp_path / "whole")))
    for name, values in load_file(whole / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(out / "model.safetensors")[name], values)


def test_logger_that_cannot_be_made_is_dropped(
    cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(out: Path, run_id: str) -> Any:
        raise OSError("no room for it")

    pytest.importorskip("tensorboard")
    monkeypatch.setattr(loggers, "_MADE_BY", {"tensorboard": fail})
    out = Path(train(config(cache, tmp_path / "run", log=("tensorboard",), epochs=1)))
    assert (out / "result.json").exists()
    assert "Logger tensorboard failed (OSError: no room for it)" in caplog.text


def test_damaged_state_starts_a_new_log(cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    for damaged in ("{", '{"id": 3}', "[]"):
        (tmp_path / "run" / "loggers.json").write_text(damaged)
        recorder = Recorder()
        one = loggers.Loggers(tmp_path / "run", callbacks=[recorder])
        one.log(0, {"loss": None, "epoch": 0})
        assert recorder.steps == [(0, {"epoch": 0})]
        assert caplog.text.count("loggers.json is damaged") == 1
        caplog.clear()


def test_package_that_is_missing_is_named_before_training(cache: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loggers, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"--log wandb: .* not installed: pip install 'saffe-cache\[wandb\]'"):
            train(config(cache, tmp_path / "run", log=("auto", "wandb")))
        assert not (tmp_path / "run" / "model.safetensors").exists()
        assert loggers.required(("auto", "none")) == []
    with pytest.raises(
        ValueError, match="--log: found paper, expected auto or none or tensorboard or wandb or trackio"
    ):
        config(cache, tmp_path / "run", log=("paper",))
    arguments = ["--cache", "c", "--out", "o", "--log", "wandb", "--log", "trackio"]
    assert parse_config(TrainConfig, arguments, "saffe train").log == ("wandb", "trackio")


def test_runs_side_by_side_have_a_log_each(cache: str, tmp_path: Path) -> None:
    recorders = {str(tmp_path / str(seed)): Recorder() for seed in (0, 1)}
    configs = [config(cache, tmp_path / str(seed), seed=seed, data_seed=0) for seed in (0, 1)]
    train_many(configs, callbacks={out: [recorder] for out, recorder in recorders.items()})
    for out, recorder in recorders.items():
        assert [known(values) for _, values in recorder.steps] == [known(line) for line in lines_of(Path(out))]
    ids = {json.loads((Path(out) / "loggers.json").read_text())["id"] for out in recorders}
    assert len(ids) == 2


def stopped_and_resumed(cache: str, out: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with one logger that is killed in its second epoch, and resumes."""
    step = fitting._step

    def stop(config: Any, state: Any, *rest: Any) -> float:
        if state.step == 7:
            raise KeyboardInterrupt
        return step(config, state, *rest)

    options = {"log": (name,), "checkpoint_seconds": 0.0, "control_epochs": 0}
    monkeypatch.setattr(fitting, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config(cache, out, **options))
    monkeypatch.setattr(fitting, "_step", step)
    return Path(train(config(cache, out, **options)))


def test_tensorboard_holds_a_resumed_run_once(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = stopped_and_resumed(cache, tmp_path / "run", "tensorboard", monkeypatch)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("validation_score")]
    assert found == [(line["step"], pytest.approx(line["validation_score"])) for line in lines_of(out)]
    assert len(events.Scalars("loss")) == 3


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline run's file: LevelDB's log format behind a header of 7 bytes."""
    content = path.read_bytes()
    place, record = 7, b""
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_continues_one_offline_run(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    for name, value in {"MODE": "offline", "SILENT": "true", "PROJECT": "ours", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    out = stopped_and_resumed(cache, tmp_path / "run", "wandb", monkeypatch)
    files = sorted(out.glob("wandb/offline-run-*/run-*.wandb"), key=os.path.getmtime)
    assert len(files) == 2
    assert len({path.name for path in files}) == 1  # one id
    steps, options, summary = [], {}, {}
    for path in files:
        for content in wandb_records(path):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.WhichOneof("record_type") == "run":
                assert record.run.project == "ours"
                options |= {one.key: one.value_json for one in record.run.config.update}
            elif record.WhichOneof("record_type") == "summary":
                summary |= {one.key or one.nested_key[0]: one.value_json for one in record.summary.update}
            elif record.WhichOneof("record_type") == "history":
                values = {one.key or one.nested_key[0]: one.value_json for one in record.history.item}
                steps.append((record.history.step.num, json.loads(values["validation_score"])))
    assert steps == [(line["step"], pytest.approx(line["validation_score"])) for line in lines_of(out)]
    assert json.loads(options["fusion"]) == "linear"
    assert json.loads(summary["best_epoch"]) == TrainResult.load(out).best_epoch


def test_trackio_continues_one_local_run(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_PROJECT", "ours")
    pytest.importorskip("trackio")
    out = stopped_and_resumed(cache, tmp_path / "run", "trackio", monkeypatch)
    with sqlite3.connect(tmp_path / "trackio" / "ours.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, *_ in rows}) == 1
    assert rows[0][0].startswith("run-")
    found = [(step, json.loads(metrics)["validation_score"]) for _, step, metrics in rows]
    assert found == [(line["step"], pytest.approx(line["validation_score"])) for line in lines_of(out)]
