"""Several ranks give what one process gives: losses, gradients, trainings, evaluations; and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from composed_cache import make_composed
from rank_cases import (
    CAPTIONS,
    CLASSES,
    COMPOSED,
    LOSSES,
    REPORTS,
    TRAININGS,
    WINDOW_BYTES,
    config_of,
    divided,
    gradient,
    report,
)
from safetensors.torch import load_file
from synthetic_cache import WIDTH, make_cache

from saffe_cache.inputs import feature_loader
from saffe_cache.training.train import train

TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{TESTS.parent}", "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: object, ranks: int = 2) -> list[str]:
    """The command line."""
    launched = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *map(str, arguments)]
    return [sys.executable, "-m", *launched]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_cache(folder / CAPTIONS, {"train": 120, "dev": 40}, captions=3, text_width=WIDTH, joint=True, deep=True)
    make_cache(folder / CLASSES, {"train": 120, "dev": 30}, classes=3)
    make_composed(folder / COMPOSED, {"train": 120, "dev": 40}, captions=True)
    return folder


@pytest.fixture(scope="module")
def of_two(caches: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks wrote."""
    out = tmp_path_factory.mktemp("of_two")
    subprocess.run(torchrun(TESTS / "rank_cases.py", caches, out), env=ENVIRONMENT, check=True, timeout=300)
    return out


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_over_ranks_equals_one_process(caches: Path, of_two: Path, name: str) -> None:
    """Also dropout, negatives drawn at random, parameters without a gradient, and learned temperatures."""
    expected = gradient(config_of(caches, of_two, LOSSES[name]))
    for rank in (0, 1):
        found = load_file(of_two / f"{name}.{rank}")
        assert found.keys() == expected.keys()
        for parameter, value in expected.items():
            largest = max(1.0, float(value.abs().max()))
            torch.testing.assert_close(found[parameter], value, rtol=0, atol=1e-6 * largest)


def log_of(run: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (run / "log.jsonl").open()]
    return np.array([[line["step"], line["loss"] or 0.0, line["validation_score"]] for line in lines])


@pytest.mark.parametrize("name", TRAININGS)
def test_training_over_ranks_equals_one_process(
    caches: Path, of_two: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_loader, "_WINDOW_BYTES", WINDOW_BYTES)
    train(config_of(caches, tmp_path, TRAININGS[name]))
    np.testing.assert_allclose(log_of(of_two / name), log_of(tmp_path), rtol=1e-5)
    weights, expected = (load_file(run / "model.safetensors") for run in (of_two / name, tmp_path))
    for parameter, value in expected.items():  # AdamW moves a weight by its rate even where the gradient is rounding
        assert (weights[parameter] - value).norm() <= 1e-3 * value.norm() + 1e-6, parameter
    assert {path.name for path in (of_two / name).iterdir()} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", REPORTS)
def test_evaluation_over_ranks_equals_one_process(caches: Path, of_two: Path, tmp_path: Path, name: str) -> None:
    """Every number, bit by bit."""
    report(caches, of_two / name.split("-")[0], tmp_path, REPORTS[name])
    found, expected = (json.loads((out / "result.json").read_text()) for out in (of_two / f"{name}.of", tmp_path))
    assert {**found, "cost": None} == {**expected, "cost": None}
    assert (of_two / f"{name}.of" / "details.npz").read_bytes() == (tmp_path / "details.npz").read_bytes()
    assert {path.name for path in (of_two / f"{name}.of").iterdir()} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("rank", [0, 1])
def test_divided_rankings_and_rows_are_exact(of_two: Path, rank: int) -> None:
    expected = divided()
    with np.load(of_two / f"divided.{rank}.npz") as found:
        assert found.files == [*expected]
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


def test_shares_are_equal_and_complete(of_two: Path) -> None:
    assert json.loads((of_two / "shares.json").read_text()) == [[0, 0], [0, 1], [3, 4]]


def saffe(*arguments: object, ranks: int) -> subprocess.Popen[str]:
    """The command over ranks; `--` keeps torchrun from taking its options."""
    command = torchrun("-m", "--", "saffe_cache", *arguments, ranks=ranks)
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def lines_of(run: subprocess.Popen[str], start: str) -> list[str]:
    """What the ranks wrote to standard error that begins so, once they have ended."""
    _, errors = run.communicate(timeout=120)
    return [line[line.index(start) :] for line in errors.replace("\r", "\n").split("\n") if start in line]


def test_a_verb_that_is_not_divided_refuses(tmp_path: Path) -> None:
    run = saffe("cache", "inspect", tmp_path, ranks=2)
    assert lines_of(run, "saffe cache") == [
        "saffe cache inspect: 2 processes, started by torchrun, expected one: cache inspect is not divided. "
        "Run it without torchrun."
    ]
    assert run.returncode == 1


EPOCHS = 12


def cut_training(caches: Path, out: Path) -> tuple[object, ...]:
    """The command that is cut off, which saves its state after every step."""
    data = ("--cache", caches / CAPTIONS, "--device", "cpu", "--log", "none", "--control-epochs", 0, "--patience", 99)
    return ("train", *data, "--checkpoint-seconds", 0, "--batch-size", 33, "--epochs", EPOCHS, "--out", out)


def train_alone(*command: object) -> None:
    given = [sys.executable, "-m", "saffe_cache", *map(str, command)]
    subprocess.run(given, env=ENVIRONMENT, check=True, capture_output=True, timeout=120)


def kill_one(command: tuple[object, ...], out: Path, killed: int) -> None:
    """Start two ranks, kill one of them, and see both end in one line, soon."""
    run = saffe(*command, ranks=2)
    wait_for(out / "log.jsonl", 3)
    os.kill(ranks_of(run)[killed], signal.SIGKILL)
    [line] = lines_of(run, "saffe train:")
    assert f"rank {1 - killed} of 2: another rank has ended" in line or "interrupted" in line
    assert run.returncode


@pytest.mark.slow
def test_the_first_rank_ends_the_others_with_it(caches: Path, tmp_path: Path) -> None:
    kill_one(cut_training(caches, tmp_path), tmp_path, 0)


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_others_resume(caches: Path, tmp_path: Path) -> None:
    """Three ranks go on, and then one process, with the numbers of a run that nothing cut off."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    command = cut_training(caches, cut)
    kill_one(command, cut, 1)
    run = saffe(*command, ranks=3)
    wait_for(cut / "log.jsonl", 6)
    run.send_signal(signal.SIGTERM)
    assert len(lines_of(run, "saffe train: ")) == 1
    train_alone(*command)
    train_alone(*cut_training(caches, whole))
    np.testing.assert_allclose(log_of(cut), log_of(whole), rtol=1e-4)


def wait_for(path: Path, lines: int) -> None:
    """Until a file has so many lines."""
    for _ in range(1200):
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} does not come")


def ranks_of(run: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, in order."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    numbers = {}
    for child in map(int, children):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        numbers |= {int(one[5:]): child for one in variables if one.startswith(b"RANK=")}
    return [numbers[rank] for rank in sorted(numbers)]
