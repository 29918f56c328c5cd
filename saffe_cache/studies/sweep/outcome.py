"""Collect what came of a recipe from the folders of its runs and reports."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from saffe_cache.core.outputs import CONFIG, read_json
from saffe_cache.evaluation.results import FAM, EvaluationResult, Numbers
from saffe_cache.extraction.ledger import extraction_seconds, reencoding
from saffe_cache.store.reader import Cache
from saffe_cache.studies.sweep.recipe import Cell, Recipe
from saffe_cache.studies.sweep.result import Level, SweepCost, SweepPoint, SweepResult, SweepSeries, place_of
from saffe_cache.training.result import TrainResult


@dataclass(frozen=True)
class Finished:
    """A run that is trained and evaluated."""

    seed: int
    run: str
    """Its folder."""
    report: str
    """The folder of its evaluation."""

    @cached_property
    def trained(self) -> TrainResult:
        return TrainResult.load(self.run)

    @cached_property
    def evaluated(self) -> EvaluationResult:
        return EvaluationResult.load(self.report)


def collect(recipe: Recipe, cells: Sequence[Sequence[Finished]], cache: Cache, out: Path, workers: int) -> SweepResult:
    """
    Args:
        recipe: what was varied.
        cells: of each of its cells the runs, one for each seed.
        cache: what encoders in the loop are reckoned by.
        out: folder of the result; reports are named from there.
        workers: processes that ran side by side.
    """
    series: dict[str, list[SweepPoint]] = {}
    for cell, runs in zip(recipe.cells, cells, strict=True):
        series.setdefault(cell.series, []).append(_point(cell, runs, out))
    first = cells[0][0].evaluated
    metric = recipe.metric or first.main_metric
    return SweepResult(
        title=recipe.title,
        question=recipe.question,
        dataset=Path(str(cache.storage.root)).name,
        protocol=first.protocol,
        definition=first.definition,
        split=first.split,
        metric=metric,
        x_label=recipe.x_label,
        y_label=recipe.y_label,
        series=tuple(SweepSeries(name=name, points=tuple(points)) for name, points in series.items()),
        levels=tuple(_levels(metric, [one.evaluated for runs in cells for one in runs])),
        published=recipe.published,
        cost=_cost({one.run: one for runs in cells for one in runs}, cache, workers),
        failures=tuple(
            f"{place_of(name, point)}, {text}"
            for name, points in series.items()
            for point in points
            for text in point.failures
        ),
    )


def _levels(metric: str, reports: Sequence[EvaluationResult]) -> list[Level]:
    """Systems without layers and training, where all reports agree; cells of several encoders differ."""
    found = []
    for name in ("pooled_cosine", "zero_shot"):
        numbers = [report.systems.get(name, {}).get(metric) for report in reports]
        values = {number.value for number in numbers if number}
        if all(numbers) and len(values) == 1:
            found.append(Level(name=name, value=values.pop()))
    return found


def _point(cell: Cell, runs: Sequence[Finished], out: Path) -> SweepPoint:
    trained, reports = [one.trained for one in runs], [one.evaluated for one in runs]
    systems = _values([report.systems for report in reports])
    return SweepPoint(
        x=cell.x,
        y=cell.y,
        settings=cell.settings,
        seeds=tuple(one.seed for one in runs),
        reports=tuple(Path(os.path.relpath(one.report, out)).as_posix() for one in runs),
        values=systems.pop(FAM),
        chance={metric: number.chance for metric, number in reports[0].systems[FAM].items()},
        baselines=systems,
        controls=_values([report.control_scores for report in reports]),
        best_epoch=tuple(one.best_epoch for one in trained),
        failures=tuple(f"seed {one.seed}: {text}" for one in runs for text in one.evaluated.failures),
        trainable_parameters=trained[0].trainable_parameters,
        fusing_flops=reports[0].cost.fusing_flops,
        training_seconds=tuple(one.seconds for one in trained),
        training_peak_memory_mb=tuple(one.peak_memory_mb for one in trained),
        evaluation_seconds=tuple(report.cost.evaluation_seconds for report in reports),
    )


def _values(of_seeds: Sequence[Mapping[str, Numbers]]) -> dict[str, dict[str, tuple[float, ...]]]:
    """One value for each seed, of systems and metrics that all seeds have."""
    return {
        name: {metric: tuple(of[name][metric].value for of in of_seeds) for metric in numbers}
        for name, numbers in of_seeds[0].items()
        if all(name in of for of in of_seeds)
    }


def _cost(runs: Mapping[str, Finished], cache: Cache, workers: int) -> SweepCost:
    """`runs`: by folder, each once."""
    trained = [one.trained for one in runs.values()]
    by_encoders: dict[tuple[str, str], list[dict[str, object]]] = {}
    for one in runs.values():
        spec = read_json(Path(one.run) / CONFIG)["run"]
        by_encoders.setdefault((spec["gallery_key"], spec["text_key"]), []).append(vars(one.trained))
    costs = [reencoding(cache.encoders[mine], cache.encoders[other], of) for (mine, other), of in by_encoders.items()]
    known = [one for one in costs if one is not None]
    arrays = [array for encoder in cache.encoders.values() for array in encoder.manifest.arrays.values()]
    return SweepCost(
        num_runs=len(runs),
        workers=workers,
        extraction_seconds=extraction_seconds(cache),
        training_seconds=sum(one.seconds for one in trained),
        control_seconds=sum(one.control_seconds for one in trained),
        evaluation_seconds=sum(one.evaluated.cost.evaluation_seconds for one in runs.values()),
        cache_bytes=sum(array.rows * array.spec.row_bytes for array in arrays),
        photos_seen=sum(one.photos_seen for one in known),
        texts_seen=sum(one.texts_seen for one in known),
        re_encoding_seconds=sum(one.seconds for one in known) if len(known) == len(costs) else None,
        photo_seconds=known[0].photo_seconds if known else None,
        text_seconds=known[0].text_seconds if known else None,
        basis=known[0].basis if known else "the cache does not say how long its encoders take",
    )
