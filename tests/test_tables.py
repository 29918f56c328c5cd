"""Variants over seeds in one table: finished runs are not repeated, and the numbers are those of the reports."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_cache import make_cache

from pipelines.tables import Measured, Variant, Variants, failures
from saffe_cache.evaluation.results import EvaluationResult

pytestmark = pytest.mark.slow

COLUMNS = ("mrr", "recall_at_1")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Variants:
    folder = tmp_path_factory.mktemp("tables")
    cache = make_cache(folder / "cache.zarr", {"train": 120, "dev": 40, "test": 40})
    shared = {"fusion": "linear", "epochs": 1, "control_epochs": 1, "log": ("none",)}
    rows = [Variant("attention", {}), Variant("mean", {"head": "mean"})]
    return Variants(
        cache=cache, work=folder / "runs", rows=rows, protocols=("caption",), split="test", seeds=(0, 1), shared=shared
    )


@pytest.fixture(scope="module")
def measured(table: Variants) -> Measured:
    return table.run()["caption"]


def cells_of(measured: Measured) -> dict[str, list[str]]:
    lines = measured.table(COLUMNS, "photos_shuffled").to_markdown().splitlines()
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}


def reports_of(table: Variants, measured: Measured, place: int) -> Sequence[EvaluationResult]:
    return [EvaluationResult.load(table.work / "caption" / name) for name in measured.points[place].reports]


def test_cells_are_means_over_the_reports(table: Variants, measured: Measured) -> None:
    cells = cells_of(measured)
    assert list(cells)[:4] == ["variant", "---", "attention", "mean"]
    for column, metric in enumerate(COLUMNS):
        values = [100 * one.systems["fam"][metric].value for one in reports_of(table, measured, 1)]
        assert cells["mean"][column] == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert cells["*ridge*"][0]
    assert cells["*chance*"][0] == f"{100 * sum(1 / r for r in range(1, 41)) / 40:.1f}"
    assert len({len(of_row) for of_row in cells.values()}) == 1


def test_baselines_are_fitted_once_and_nothing_twice(table: Variants, measured: Measured) -> None:
    assert {"fam", "ridge", "mlp"} <= set(measured.first.systems)
    for place in (0, 1):
        assert "mlp" not in {system for one in reports_of(table, measured, place) for system in one.systems}
    before = {path: path.stat().st_mtime_ns for path in table.work.glob("runs/**/result.json")}
    assert len(before) == 4 + 4 + 1
    table.run()
    assert {path: path.stat().st_mtime_ns for path in table.work.glob("runs/**/result.json")} == before


def test_failed_controls_name_variant_and_seed(table: Variants, tmp_path: Path) -> None:
    shared = {**table.shared, "control_epochs": 0}
    found = replace(table, work=tmp_path, rows=table.rows[1:], seeds=(3,), shared=shared).run()
    assert [line.split(":")[0] for line in failures(found)] == ["caption, FAM, mean, seed 3"]
    assert "1 of 1 fail" in cells_of(found["caption"])["mean"]


def test_peak_memory_is_the_trainings_own(table: Variants, tmp_path: Path) -> None:
    ballast = np.ones(2**27)  # 1 GiB in this process
    alone = replace(table, work=tmp_path, rows=table.rows[:1], seeds=(0,), workers=2).run()["caption"]
    resource = pytest.importorskip("resource")
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert 0 < alone.points[0].training_peak_memory_mb[0] < here - ballast.nbytes / 2**20 / 2
