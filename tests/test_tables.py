"""Variants over seeds in one table: what is finished is not done again, and the numbers are those of the reports."""

from __future__ import annotations

import json
import resource
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_cache import make_cache

from pipelines.tables import Row, Table, failures, markdown

COLUMNS = ("mrr", "recall_at_1")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("tables")
    cache = make_cache(folder / "cache.zarr", {"train": 120, "dev": 40, "test": 40})
    shared = {"fusion": "linear", "epochs": 1, "control_epochs": 1, "tensorboard": False}
    rows = [Row("attention", {}), Row("mean", {"head": "mean"})]
    return Table(
        cache=cache, work=folder / "runs", rows=rows, protocols=("caption",), split="test", seeds=(0, 1), shared=shared
    )


def test_cells_are_means_over_the_seeds_reports(table: Table) -> None:
    reports = table.run()
    lines = markdown(reports["caption"], COLUMNS, "photos_shuffled").splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert list(cells)[:4] == ["variant", "---", "attention", "mean"]
    files = [table.work / f"mean-seed{seed}" / "test-caption" / "result.json" for seed in (0, 1)]
    written = [json.loads(file.read_text()) for file in files]
    for column, metric in enumerate(COLUMNS):
        values = [100 * report["systems"]["fam"][metric]["value"] for report in written]
        assert cells["mean"][column] == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert cells["*ridge*"][0]
    assert cells["*chance*"][0] == f"{100 * sum(1 / r for r in range(1, 41)) / 40:.1f}"
    assert len({len(of_row) for of_row in cells.values()}) == 1


def test_baselines_are_fitted_once_and_nothing_is_done_twice(table: Table) -> None:
    reports = table.run()["caption"]
    assert set(reports["attention"][0].systems) == {"fam", "ridge", "mlp"}
    assert [set(report.systems) for report in (reports["attention"][1], *reports["mean"])] == [{"fam"}] * 3
    before = {path: path.stat().st_mtime_ns for path in table.work.rglob("result.json")}
    table.run()
    assert {path: path.stat().st_mtime_ns for path in table.work.rglob("result.json")} == before


def test_failed_controls_are_told_with_row_and_seed(table: Table, tmp_path: Path) -> None:
    without = Table(
        cache=table.cache,
        work=tmp_path,
        rows=table.rows[1:],
        protocols=("caption",),
        split="test",
        seeds=(3,),
        shared={**table.shared, "control_epochs": 0},
    )
    reports = without.run()
    assert [line.split(":")[0] for line in failures(reports)] == ["caption, mean, seed 3"]
    assert "1 of 1 fail" in markdown(reports["caption"], COLUMNS, "photos_shuffled")


def test_peak_memory_is_the_trainings_own(table: Table, tmp_path: Path) -> None:
    ballast = np.ones(2**27)  # 1 GiB in this process
    alone = replace(table, work=tmp_path, rows=table.rows[:1], seeds=(0,))
    cost = alone.run()["caption"]["attention"][0].cost
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert 0 < cost.training_peak_memory_mb < here - ballast.nbytes / 2**20 / 2
