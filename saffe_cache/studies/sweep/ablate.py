"""Run a recipe's grid from one cache, and collect what came of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saffe_cache.core.atomic_io import hold_folder, make_folder
from saffe_cache.core.devices import choose_device, num_cores
from saffe_cache.core.outputs import CONFIG, provenance, read_json, write_json
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.results import FAM, EvaluationResult, Numbers
from saffe_cache.extraction.ledger import extraction_seconds, reencoding
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.studies.sweep.config import AblateConfig
from saffe_cache.studies.sweep.jobs import Job, Planner, run_jobs
from saffe_cache.studies.sweep.recipe import Cell, Recipe, read_recipe
from saffe_cache.studies.sweep.requirements import check_cache, stored_as
from saffe_cache.studies.sweep.result import Level, SweepCost, SweepPoint, SweepResult, SweepSeries, place_of
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.result import TrainResult

logger = logging.getLogger(__name__)

_MOST_WORKERS = 4
"""Processes of `auto`: each may need 2 GB."""


def ablate(config: AblateConfig) -> tuple[str, ...]:
    """Run what is not done, and return the folder of each recipe's result.

    Raises:
        CacheError: the cache lacks layers or encoders; the message names all, with the command that adds them.
        ValueError: a file is no recipe, or its options do not fit the cache.
        OSError: the disk is full or gone, or another process works in the folder.
    """
    return sweep(config, {Path(path).stem: read_recipe(path) for path in config.recipe})


def sweep(config: AblateConfig, recipes: Mapping[str, Recipe]) -> tuple[str, ...]:
    """As `ablate`, for recipes by name that need not be files."""
    out = Path(config.out)
    workers = config.workers or (min(_MOST_WORKERS, num_cores()) if choose_device(config.device) == "cpu" else 1)
    with hold_folder(out):
        base = open_cache(config.cache)
        cells = (cell for recipe in recipes.values() for cell in recipe.cells)
        check_cache(base, (cell.config(config.cache, config.out, 0, "cpu") for cell in cells))
        protocols = {name: _protocol(config, recipe, base) for name, recipe in recipes.items()}
        plans = [_plan(config, recipe, out / name, protocols[name], base) for name, recipe in recipes.items()]
        for plan in plans:
            done = sum(job.is_done for job in plan.distinct)
            logger.info("%s: %d runs, %d of them done; %d at a time.", plan.out, len(plan.distinct), done, workers)
            run_jobs(plan.distinct, config.together, workers)
            make_folder(plan.out)
            write_json(plan.out / CONFIG, {"verb": SweepResult.verb, **provenance(config)})
            plan.result(workers).save(plan.out)
    return tuple(str(plan.out) for plan in plans)


def _protocol(config: AblateConfig, recipe: Recipe, cache: Cache) -> str:
    """The protocol of all cells, as one table needs; it measures the recipe's metric.

    Raises:
        ValueError: cells have several protocols, or do not measure the metric.
    """
    specs = [resolve_run(cell.config(config.cache, config.out, 0, "cpu"), cache) for cell in recipe.cells]
    chosen = {config.protocol or own_protocol(spec): cell for spec, cell in zip(specs, recipe.cells, strict=True)}
    if len(chosen) > 1:
        names = " and ".join(f"{name} (as series {cell.series!r}, {cell.x})" for name, cell in chosen.items())
        raise ValueError(
            f"{recipe.path}: found cells that are trained for the protocols {names}, expected one for all cells of a "
            "table. Make a recipe of each, or choose --protocol."
        )
    [protocol] = chosen
    for spec, cell in zip(specs, recipe.cells, strict=True):
        metrics = load_protocol(protocol).metric_names(cache, spec)
        if recipe.metric not in (None, *metrics):
            raise ValueError(
                f"{recipe.path}: metric: {recipe.metric!r}, expected one that protocol {protocol} has for series "
                f"{cell.series!r}, {cell.x}: {', '.join(metrics)}."
            )
    return protocol


@dataclass(frozen=True)
class _Plan:
    """A recipe over its caches."""

    recipe: Recipe
    out: Path
    """Of its result."""
    jobs: Sequence[Sequence[Job]]
    """Of each cell, one for each seed."""
    caches: Mapping[str, Cache]

    @property
    def distinct(self) -> list[Job]:
        """Each run once."""
        return list({job.config.out: job for of_cell in self.jobs for job in of_cell}.values())

    def result(self, workers: int) -> SweepResult:
        """What came of it, once all jobs are done."""
        recipe = self.recipe
        series: dict[str, list[SweepPoint]] = {}
        reports = [[job.found() for job in of_cell] for of_cell in self.jobs]
        for cell, jobs, of_cell in zip(recipe.cells, self.jobs, reports, strict=True):
            series.setdefault(cell.series, []).append(_point(cell, jobs, of_cell, self.out))
        first = reports[0][0]
        metric = recipe.metric or first.main_metric
        return SweepResult(
            title=recipe.title,
            question=recipe.question,
            dataset=Path(next(iter(self.caches))).name,
            protocol=first.protocol,
            definition=first.definition,
            split=first.split,
            metric=metric,
            x_label=recipe.x_label,
            y_label=recipe.y_label,
            series=tuple(SweepSeries(name=name, points=tuple(points)) for name, points in series.items()),
            levels=tuple(_levels(metric, [report for of_cell in reports for report in of_cell])),
            published=recipe.published,
            cost=_cost(self.distinct, next(iter(self.caches.values())), workers),
            failures=tuple(
                f"{place_of(name, point)}, {text}"
                for name, points in series.items()
                for point in points
                for text in point.failures
            ),
        )


def _plan(config: AblateConfig, recipe: Recipe, out: Path, protocol: str, base: Cache) -> _Plan:
    root, device = Path(config.out), choose_device(config.device)
    caches = {config.cache: base}
    planners: dict[str, Planner] = {}
    jobs = []
    for cell in recipe.cells:
        path = stored_as(config.cache, base, cell.settings.get("storage"), root / "caches")
        if path not in caches:
            caches[path] = open_cache(path)
        if path not in planners:
            report = EvaluateConfig(
                cache=path,
                run=str(root / "runs"),
                split=config.split,
                protocol=protocol,
                baselines=config.baselines,
                baseline_layers="run",
                device=device,
            )
            planners[path] = Planner(caches[path], report, root / "runs")
        configs = (cell.config(path, config.out, seed, device) for seed in config.seeds or recipe.seeds)
        jobs.append([planners[path].job(one) for one in configs])
    return _Plan(recipe, out, jobs, caches)


def _levels(metric: str, reports: Sequence[EvaluationResult]) -> list[Level]:
    """Systems without layers and training, where all reports agree; cells of several encoders differ."""
    found = []
    for name in ("pooled_cosine", "zero_shot"):
        numbers = [report.systems.get(name, {}).get(metric) for report in reports]
        values = {number.value for number in numbers if number}
        if all(numbers) and len(values) == 1:
            found.append(Level(name=name, value=values.pop()))
    return found


def _point(cell: Cell, jobs: Sequence[Job], reports: Sequence[EvaluationResult], out: Path) -> SweepPoint:
    results = [TrainResult.load(job.config.out) for job in jobs]

    systems = _values([report.systems for report in reports])
    return SweepPoint(
        x=cell.x,
        y=cell.y,
        settings=cell.settings,
        seeds=tuple(job.config.seed for job in jobs),
        reports=tuple(Path(os.path.relpath(job.report.out or "", out)).as_posix() for job in jobs),
        values=systems.pop(FAM),
        chance={metric: number.chance for metric, number in reports[0].systems[FAM].items()},
        baselines=systems,
        controls=_values([report.control_scores for report in reports]),
        best_epoch=tuple(result.best_epoch for result in results),
        failures=tuple(
            f"seed {job.config.seed}: {text}"
            for job, report in zip(jobs, reports, strict=True)
            for text in report.failures
        ),
        trainable_parameters=results[0].trainable_parameters,
        fusing_flops=reports[0].cost.fusing_flops,
        training_seconds=tuple(result.seconds for result in results),
        training_peak_memory_mb=tuple(result.peak_memory_mb for result in results),
        evaluation_seconds=tuple(report.cost.evaluation_seconds for report in reports),
    )


def _values(of_seeds: Sequence[Mapping[str, Numbers]]) -> dict[str, dict[str, tuple[float, ...]]]:
    """One value for each seed, of systems and metrics that all seeds have."""
    return {
        name: {metric: tuple(of[name][metric].value for of in of_seeds) for metric in numbers}
        for name, numbers in of_seeds[0].items()
        if all(name in of for of in of_seeds)
    }


def _cost(jobs: Sequence[Job], cache: Cache, workers: int) -> SweepCost:
    results = {job.config.out: TrainResult.load(job.config.out) for job in jobs}
    by_encoders: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job in jobs:
        spec = read_json(Path(job.config.out) / CONFIG)["run"]
        by_encoders.setdefault((spec["gallery_key"], spec["text_key"]), []).append(vars(results[job.config.out]))
    costs = [reencoding(cache.encoders[mine], cache.encoders[other], of) for (mine, other), of in by_encoders.items()]
    known = [one for one in costs if one is not None]
    arrays = [array for encoder in cache.encoders.values() for array in encoder.manifest.arrays.values()]
    return SweepCost(
        num_runs=len(jobs),
        workers=workers,
        extraction_seconds=extraction_seconds(cache),
        training_seconds=sum(result.seconds for result in results.values()),
        control_seconds=sum(result.control_seconds for result in results.values()),
        evaluation_seconds=sum(job.found().cost.evaluation_seconds for job in jobs),
        cache_bytes=sum(array.rows * array.spec.row_bytes for array in arrays),
        photos_seen=sum(one.photos_seen for one in known),
        texts_seen=sum(one.texts_seen for one in known),
        re_encoding_seconds=sum(one.seconds for one in known) if len(known) == len(costs) else None,
        photo_seconds=known[0].photo_seconds if known else None,
        text_seconds=known[0].text_seconds if known else None,
        basis=known[0].basis if known else "the cache does not say how long its encoders take",
    )
