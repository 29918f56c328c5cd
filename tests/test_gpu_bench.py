"""The benchmark for a GPU: its dry run on the CPU, and sections that fail, hang or die."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parent / "benchmarks"))

import gpu
from gpu_setup import TINY, Setting
from timing import Figure


@pytest.mark.slow
def test_dry_run_measures_every_row(tmp_path: Path) -> None:
    out = tmp_path / "made" / "gpu"
    command = [sys.executable, str(gpu.__file__), "--tiny", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.with_suffix(".json").read_text())
    rows = {figure["name"]: figure for figure in report["figures"]}
    assert report["seconds"].keys() == gpu.SECTIONS.keys() == {figure["section"] for figure in report["figures"]}
    assert len(rows) == len(report["figures"])
    for name, row in rows.items():
        if row["value"] is None:
            assert row["note"] in ("no GPU", "not installed"), name
        else:
            assert 0 <= row["value"] < (1e4 if row["unit"] == "ratio" else 1e9), name
            assert row["value"] > 0 or row["at_most"] == 0, name
        assert name in done.stdout
        assert f"| {name} |" in out.with_suffix(".md").read_text()
    assert not [name for name, row in rows.items() if row["at_most"] is not None and row["is_met"] is False]
    only_a_gpu_shows = ("compiled", "from device", "card", "transfer", "other than the CPU's")
    absent = {name for name, row in rows.items() if row["note"] == "no GPU"}
    assert absent == {name for name in rows if any(part in name for part in only_a_gpu_shows)}


def test_rows_make_sense_together(tmp_path: Path) -> None:
    """Two parts of the dry run: a share found of flat's results, and cores against one core."""
    report = gpu.run(Setting(device="cpu", work=tmp_path, sizes=TINY), ["search"], tmp_path / "out")
    rows = {figure.name: figure.value for figure in report["search"]}
    shares = [value for name, value in rows.items() if "of flat's first" in name or name.endswith(": mAP")]
    assert len(shares) == 2
    assert all(value is not None and 0.1 < value <= 1 for value in shares)


def section_of(monkeypatch: pytest.MonkeyPatch, *parts: Callable[[], Iterator[Figure]]) -> None:
    monkeypatch.setitem(sys.modules, "gpu_drawn", SimpleNamespace(parts=lambda setting: iter(parts)))


def row(name: str) -> Iterator[Figure]:
    yield Figure(name=name, unit="ratio", value=1.0)


def failing() -> Iterator[Figure]:
    yield from row("before")
    raise RuntimeError("an error of the card")


def hanging() -> Iterator[Figure]:
    yield from row("in time")
    subprocess.Popen(["sleep", "60"]).wait()


def dying() -> Iterator[Figure]:
    yield from row("alive")
    os._exit(7)


@pytest.mark.parametrize(
    ("parts", "limit", "names", "note"),
    [
        ([failing, partial(row, "after")], 60, ["before", "drawn: a part", "after"], "failed: RuntimeError: an error"),
        ([hanging, partial(row, "after")], 1, ["in time", "drawn: the rest"], "stopped at its limit of 1 s"),
        ([dying, partial(row, "after")], 60, ["alive", "drawn: the rest"], "failed: its process ended with 7"),
    ],
    ids=["failing", "hanging", "dying"],
)
def test_what_a_section_measured_stays_however_it_ends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts: list[Callable[[], Iterator[Figure]]],
    limit: float,
    names: list[str],
    note: str,
) -> None:
    section_of(monkeypatch, *parts)
    started = time.monotonic()
    figures = list(gpu.section_figures(Setting(device="cpu", work=tmp_path, sizes=TINY), "drawn", limit))
    assert time.monotonic() - started < 50
    assert [figure.name for figure in figures] == names
    assert [figure.note[: len(note)] for figure in figures if gpu.has_failed(figure)] == [note]


def test_table_is_written_with_notes_and_without_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[Figure]:
        yield Figure(name="a | b", unit="ratio", value=0.5, at_least=0.95, note="float8")
        yield Figure(name="broken", unit="ratio", value=math.nan)
        yield Figure(name="absent", unit="ratio", note="no GPU")

    section_of(monkeypatch, rows)
    monkeypatch.setitem(gpu.SECTIONS, "drawn", 60)
    gpu.run(Setting(device="cpu", work=tmp_path, sizes=TINY), ["drawn"], tmp_path / "out")
    table = (tmp_path / "out.md").read_text()
    assert r"| a \| b | 0.500 |  | ≥ 0.95 | MISSED | float8 |" in table
    assert "| absent | no GPU |  |  |  |  |" in table
    found = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert [figure["value"] for figure in found] == [0.5, None, None]
    assert [figure["section"] for figure in found] == ["drawn"] * 3
