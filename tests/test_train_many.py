"""Several runs from one pass over the cache are what each would be alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_cache import WIDTH, make_cache

from saffe_cache.fusion.base import TrainingVectors
from saffe_cache.fusion.closed_form.kernel import KernelRidgeFusion
from saffe_cache.fusion.losses import Batch
from saffe_cache.retrieval.baselines import LinearMap, fit_ridge
from saffe_cache.training import loop as fitting
from saffe_cache.training import starting
from saffe_cache.training.batches import TrainingData
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.train import train, train_many

pytestmark = pytest.mark.slow

VARIANTS: list[dict[str, Any]] = [
    {"fusion": "linear"},
    {"fusion": "linear", "seed": 1, "learning_rate": 1e-3},
    {"fusion": "linear", "seed": 2, "head": "mean", "epochs": 5},
    {"fusion": "linear", "seed": 3, "dropout": 0.1, "patience": 1, "control_epochs": 0},
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("many") / "cache.zarr"
    return make_cache(path, {"train": 120}, captions=3, text_width=WIDTH)


def configs(cache: str, out: Path, variants: list[dict[str, Any]] = VARIANTS, **options: Any) -> list[TrainConfig]:
    given: dict[str, Any] = {"epochs": 3, "batch_size": 32, "log": ("none",), "control_epochs": 1, "data_seed": 0}
    return [
        TrainConfig(cache=cache, out=str(out / str(number)), **{**given, **changes, **options})
        for number, changes in enumerate(variants)
    ]


def files(out: Path) -> dict[str, Any]:
    """Weights, and the log without its times, of all runs below a folder."""
    weights = {path.relative_to(out): path.read_bytes() for path in out.rglob("model.safetensors")}
    logs = {
        path.relative_to(out): [
            {name: value for name, value in json.loads(line).items() if name != "seconds"} for line in path.open()
        ]
        for path in out.rglob("log.jsonl")
    }
    return {**weights, **logs}


@pytest.fixture(scope="module")
def alone(cache: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("alone")
    for config in configs(cache, out):
        train(config)
    return files(out)


def test_parallel_runs_equal_single_ones_and_share_batches(
    cache: str, alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, steps, fits, kernels = TrainingData._read, [], [], []

    def counting(self: TrainingData, step: int) -> Batch:
        steps.append(step)
        return read(self, step)

    def counting_fits(*arguments: Any) -> LinearMap:
        fits.append([of[:1].shape[1] for of in arguments[:2]])
        return fit_ridge(*arguments)

    def counting_kernels(self: KernelRidgeFusion, seen: TrainingVectors) -> None:
        kernels.append(seen.photos.shape)
        fit_kernels(self, seen)

    fit_kernels = KernelRidgeFusion.fit
    monkeypatch.setattr(TrainingData, "_read", counting)
    monkeypatch.setattr(starting, "fit_ridge", counting_fits)
    monkeypatch.setattr(KernelRidgeFusion, "fit", counting_kernels)
    assert train_many(configs(cache, tmp_path)) == [str(tmp_path / str(number)) for number in range(len(VARIANTS))]
    assert files(tmp_path) == alone
    per_epoch = json.loads((tmp_path / "0" / "result.json").read_text())["steps"] // 3
    longest = 5 * per_epoch
    assert sorted(steps[:longest]) == list(range(longest))
    assert sorted(steps[longest:]) == list(range(per_epoch))  # of the controls
    assert (len(fits), len(kernels)) == (2, 2), "one regression of each kind serves all runs, another all controls"


@pytest.mark.slow
def test_killed_runs_that_stand_at_different_steps_go_on(
    cache: str, alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, count = fitting._step, 0

    def dying(*arguments: Any) -> float:
        nonlocal count
        count += 1
        if count > 9:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(fitting, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train_many(configs(cache, tmp_path, checkpoint_seconds=0.0))
    monkeypatch.setattr(fitting, "_step", step)
    train_many(configs(cache, tmp_path, checkpoint_seconds=0.0))
    assert files(tmp_path) == alone


@pytest.mark.slow
def test_runs_with_other_batches_are_trained_after_one_another(cache: str, tmp_path: Path) -> None:
    variants = [{"fusion": "linear"}, {"fusion": "linear", "data_seed": 1}, {"fusion": "linear", "batch_size": 64}]
    train_many(configs(cache, tmp_path / "many", variants, epochs=1))
    for config in configs(cache, tmp_path / "single", variants, epochs=1):
        train(config)
    assert files(tmp_path / "many") == files(tmp_path / "single")
    hashes = [json.loads((tmp_path / "many" / f"{i}" / "config.json").read_text())["run"]["data"] for i in range(3)]
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.slow
def test_finished_runs_are_left_alone_and_folders_differ(cache: str, tmp_path: Path) -> None:
    first, second = configs(cache, tmp_path, VARIANTS[:2], epochs=1)
    train(first)
    before = (tmp_path / "0" / "result.json").stat().st_mtime_ns
    train_many([first, second])
    assert (tmp_path / "0" / "result.json").stat().st_mtime_ns == before
    assert (tmp_path / "1" / "result.json").exists()
    with pytest.raises(ValueError, match=r"--out: found .*expected a folder of its own"):
        train_many([first, first])
