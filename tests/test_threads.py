"""How many threads a command computes with, and how they wait for one another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from saffe_cache.core import devices

ROOT = Path(__file__).parents[1]
SHOWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


def seen_by_torch(folder: Path, **given: str) -> list[str]:
    """The variables of SHOWN at the moment when a command loads torch, which reads them once."""
    fake = f"import os\nprint(*(os.environ.get(name, '-') for name in {SHOWN}), flush=True)\nos._exit(0)\n"
    (folder / "torch.py").write_text(fake)
    others = {name: value for name, value in os.environ.items() if name not in SHOWN}
    environment = {**others, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), **given}
    command = [sys.executable, "-m", "saffe_cache", "train", "--cache", "none.zarr", "--out", str(folder / "run")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["PASSIVE", "-", str(devices.num_cores())]),
        ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "7"}, ["ACTIVE", "-", "7"]),
        ({"GOMP_SPINCOUNT": "1000"}, ["-", "1000", str(devices.num_cores())]),
    ],
)
def test_threads_are_set_up_before_torch_is_loaded(given: dict[str, str], expected: list[str], tmp_path: Path) -> None:
    assert seen_by_torch(tmp_path, **given) == expected


def test_environment_stays_where_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    for name in SHOWN:
        monkeypatch.delenv(name, raising=False)
    devices.set_up_threads()
    assert not os.environ.keys() & set(SHOWN)


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/job/step", {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"}, 1.5),
        ("0::/", {"cpu.max": "300000 100000"}, 3),
        ("0::/../elsewhere", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/job", {"job/cpu.max": "max 100000"}, float("inf")),
        (
            "4:cpuset:/x\n3:cpu,cpuacct:/docker/1",
            {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
    ],
)
def test_quota_of_cgroups_limits_the_cores(
    own: str, files: dict[str, str], quota: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = tmp_path / "groups"
    for name, content in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(content + "\n")
    (tmp_path / "own").write_text(own + "\n")
    monkeypatch.setattr(devices, "_CGROUPS", groups)
    monkeypatch.setattr(devices, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert devices._quota() == quota
    assert devices.num_cores() == (64 if quota == float("inf") else max(1, -int(-quota // 1)))
