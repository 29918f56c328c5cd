"""Tasks in several processes: what they return, what one that fails does to the others, and studies that use them."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from synthetic_cache import make_cache

from saffe_cache.core.devices import num_cores
from saffe_cache.core.processes import choose_workers, side_by_side
from saffe_cache.studies.few_pairs.config import FewPairsConfig
from saffe_cache.studies.few_pairs.few_pairs import few_pairs
from saffe_cache.studies.few_pairs.result import FewPairsResult


def whereabouts() -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def fail(after: Path) -> None:
    """Once another task has begun."""
    deadline = time.monotonic() + 60
    while not after.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    raise ValueError("a task of two")


def write_and_wait(path: Path) -> None:
    path.write_text("begun")
    time.sleep(300)


def test_each_task_has_a_process_and_its_share_of_the_cores() -> None:
    found = dict(side_by_side({str(number): whereabouts for number in range(3)}, workers=2))
    assert found.keys() == {"0", "1", "2"}
    assert len({process for process, _ in found.values()} - {os.getpid()}) == 3
    assert {threads for _, threads in found.values()} == {max(1, num_cores() // 2)}


def test_one_worker_is_this_process() -> None:
    assert [process for _, (process, _) in side_by_side({"a": whereabouts}, workers=1)] == [os.getpid()]


def test_error_of_a_task_ends_the_others(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    started = time.monotonic()
    with pytest.raises(ValueError, match="a task of two"):
        list(side_by_side({"waits": partial(write_and_wait, begun), "fails": partial(fail, begun)}, workers=2))
    assert time.monotonic() - started < 200, "it waited for the other task"


def test_gpu_has_one_worker_unless_more_are_requested() -> None:
    assert choose_workers(None, "cuda:0") == 1
    assert choose_workers(3, "cuda:0") == 3
    assert 1 <= choose_workers(None, "cpu") <= num_cores()


@pytest.mark.slow
def test_study_in_two_processes_equals_one(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c.zarr", {"train": 80, "test": 40}, signal=2)
    found = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        options = {"fusions": ("linear",), "photos": (40, 80), "quick": True, "device": "cpu"}
        result = FewPairsResult.load(
            few_pairs(FewPairsConfig(cache=(cache,), out=str(out), workers=workers, **options))
        )
        found.append([{name: of.scores for name, of in setting.methods.items()} for setting in result.settings])
        assert not (out / "runs").exists()
    assert found[0] == found[1]
