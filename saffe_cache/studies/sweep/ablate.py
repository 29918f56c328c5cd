"""Run a recipe's grid from one cache: runs that see the same batches train together, in a few processes at once.

A run's folder is named after a hash of its config and of the data and encoders that it sees, so that recipes share
runs, and finished runs are not repeated. The same command resumes a killed sweep.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from saffe_cache.core.atomic_io import hold_folder, make_folder
from saffe_cache.core.devices import choose_device
from saffe_cache.core.outputs import CONFIG, RESULT, provenance, write_json
from saffe_cache.core.processes import choose_workers, side_by_side
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.evaluate import evaluate
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.studies.sweep.recipe import AblateConfig, Recipe, read_recipe
from saffe_cache.studies.sweep.requirements import check_cache, stored_as
from saffe_cache.studies.sweep.result import SweepResult
from saffe_cache.studies.sweep.runs import Job, Planner, collect
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.train import train_many

logger = logging.getLogger(__name__)


def ablate(config: AblateConfig) -> tuple[str, ...]:
    """Run what is not finished, and return the folder of each recipe's result.

    Raises:
        CacheError: the cache lacks layers or encoders; the message names all, with the command that adds them.
        ValueError: a file is no recipe, or its options do not fit the cache.
        OSError: the disk is full or gone, or another process works in the folder.
    """
    return sweep(config, {Path(path).stem: read_recipe(path) for path in config.recipe})


def sweep(config: AblateConfig, recipes: Mapping[str, Recipe]) -> tuple[str, ...]:
    """As `ablate`, for recipes by name that need not be files."""
    out, device = Path(config.out), choose_device(config.device)
    workers = choose_workers(config.workers, device)
    with hold_folder(out):
        base = open_cache(config.cache)
        cells = (cell for recipe in recipes.values() for cell in recipe.cells)
        check_cache(base, (cell.config(config.cache, config.out, 0, "cpu") for cell in cells))
        protocols = {name: _protocol(config, recipe, base) for name, recipe in recipes.items()}
        plans = {name: _plan(config, recipe, protocols[name], base, device) for name, recipe in recipes.items()}
        for name, jobs in plans.items():
            distinct = list({job.config.out: job for of_cell in jobs for job in of_cell}.values())
            done = sum(job.is_done for job in distinct)
            logger.info("%s: %d runs, %d of them done; %d at a time.", out / name, len(distinct), done, workers)
            run_jobs(distinct, config.together, workers)
            make_folder(out / name)
            write_json(out / name / CONFIG, {"verb": SweepResult.verb, **provenance(config)})
            collect(recipes[name], jobs, base, out / name, workers).save(out / name)
    return tuple(str(out / name) for name in plans)


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


def _plan(config: AblateConfig, recipe: Recipe, protocol: str, base: Cache, device: str) -> list[list[Job]]:
    """Of each cell the jobs, one for each seed."""
    root = Path(config.out)
    planners: dict[str, Planner] = {}
    found = []
    for cell in recipe.cells:
        path = stored_as(config.cache, base, cell.settings.get("storage"), root / "caches")
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
            planners[path] = Planner(base if path == config.cache else open_cache(path), report)
        configs = (cell.config(path, config.out, seed, device) for seed in config.seeds or recipe.seeds)
        found.append([planners[path].job(one) for one in configs])
    return found


def run_jobs(jobs: Sequence[Job], together: int, workers: int) -> None:
    """Train and evaluate the jobs that are not done: up to `together` runs in each of some processes.

    The jobs have a run of their own each.

    Raises:
        CacheError, ValueError, OSError: as train and evaluate; finished jobs are kept.
    """
    pending = [job for job in jobs if not job.is_done]
    groups: dict[str, list[Job]] = {}
    for job in pending:
        groups.setdefault(job.batches, []).append(job)
    parts = [group[i : i + together] for group in groups.values() for i in range(0, len(group), together)]
    tasks = {part[0].config.out: partial(_work, part) for part in parts}
    with tqdm(total=len(pending), unit=" runs", desc="sweep", smoothing=0, disable=not tasks) as progress:
        for _, done in side_by_side(tasks, workers):
            progress.update(done)


def _work(jobs: Sequence[Job]) -> int:
    """Train some runs side by side, report on each, and return their number."""
    train_many([job.config for job in jobs])
    for job in jobs:
        if not job.is_reported:
            (Path(job.report.out or "") / RESULT).unlink(missing_ok=True)  # of other options, or of data since changed
            evaluate(job.report)
    return len(jobs)
