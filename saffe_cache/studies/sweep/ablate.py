"""Run a recipe's grid from one cache, and set its outcome into a table."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from saffe_cache.core.atomic_io import hold_folder, make_folder, write_whole
from saffe_cache.core.devices import choose_device, num_cores
from saffe_cache.core.options import one_of, positional, require, require_seed
from saffe_cache.core.outputs import read_json, write_json
from saffe_cache.evaluation.config import BaselineChoice, EvaluateConfig
from saffe_cache.protocols.registry import load_protocol, own_protocol, protocol_choices
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.studies.sweep.jobs import Job, Planner, run_jobs
from saffe_cache.studies.sweep.recipe import Recipe, read_recipe
from saffe_cache.studies.sweep.requirements import check_cache
from saffe_cache.studies.sweep.results import as_csv, as_table, outcome
from saffe_cache.studies.sweep.storage import stored_as
from saffe_cache.training.resolve import resolve_run

logger = logging.getLogger(__name__)

_MOST_WORKERS = 4
"""Processes of `auto`: each may need 2 GB."""


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Train and evaluate every cell of a recipe, for every seed, from one cache.

    What exists is not run again, by this recipe or by another with the same --out; a killed sweep goes on with the same
    command. Exits with status 3 where a control of a cell is not where it must be.
    """

    recipe: tuple[str, ...] = positional()
    """Recipes, such as pipelines/layers.toml: what is varied."""
    cache: str
    """The cache, with all layers and encoders that the recipes name."""
    out: str
    """Folder of all runs, and for each recipe a folder with ablation.json, table.md and points.csv."""
    split: str = "test"
    """Split to report on; the best epoch is chosen as the recipe's validation says."""
    protocol: str | None = one_of(protocol_choices, None)
    """As for saffe-index-eval. Default: as the runs are trained, all of a recipe for the same one."""
    seeds: tuple[int, ...] = ()
    """Seeds in the place of the recipe's."""
    baselines: BaselineChoice = "linear"
    """Which baselines are fitted beside each run, on the layers that it fuses."""
    together: int = 8
    """Most runs that are trained side by side from one pass over the shards, where they see the same batches."""
    workers: int | None = None
    """Processes that train at once. Default: one a processor core, at most 4; 1 on a GPU."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda."""

    def __post_init__(self) -> None:
        require(self.together > 0, "together", self.together, "a number above 0")
        require(self.workers is None or self.workers > 0, "workers", self.workers, "a number above 0")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "each once")
        for seed in self.seeds:
            require_seed("seeds", seed)
        stems = [Path(path).stem for path in self.recipe]
        require(len(set(stems)) == len(stems), "recipe", stems, "files of different names")
        require("runs" not in stems and "caches" not in stems, "recipe", stems, "another name than runs or caches")


def ablate(config: AblateConfig) -> str:
    """Run what is not done, and return the output folder.

    Raises:
        CacheError: the cache lacks layers or encoders; the message names all, with the command that adds them.
        ValueError: a recipe is none, or its options do not fit the cache.
        OSError: the disk is full or gone, or another process works in the folder.
    """
    out = Path(config.out)
    recipes = {Path(path).stem: read_recipe(path) for path in config.recipe}
    workers = config.workers or (min(_MOST_WORKERS, num_cores()) if choose_device(config.device) == "cpu" else 1)
    with hold_folder(out):
        base = open_cache(config.cache)
        cells = (cell for recipe in recipes.values() for cell in recipe.cells)
        check_cache(base, (cell.config(config.cache, config.out, 0, "cpu") for cell in cells))
        protocols = {name: _protocol(config, recipe, base) for name, recipe in recipes.items()}
        planned = {name: _plan(config, recipe, protocols[name], base) for name, recipe in recipes.items()}
        for name, plan in planned.items():
            distinct = {job.config.out: job for jobs in plan.jobs.values() for job in jobs}
            done = sum(job.is_done for job in distinct.values())
            logger.info("%s: %d runs, %d of them done; %d at a time.", name, len(distinct), done, workers)
            run_jobs(list(distinct.values()), config.together, workers)
            folder = out / name
            make_folder(folder)
            found = outcome(recipes[name], plan.jobs, plan.caches, folder, workers)
            table = as_table(found)
            write_whole(folder / "points.csv", as_csv(found).encode())
            write_whole(folder / "table.md", table.encode())
            write_json(folder / "ablation.json", found)
    return str(out)


def read_tables(config: AblateConfig) -> str:
    """The tables of all recipes, for people."""
    return "\n".join((folder / "table.md").read_text() for folder in _folders(config))


def exit_status(config: AblateConfig) -> int:
    """0, or 3 where a control of a cell is not where it must be."""
    found = (read_json(folder / "ablation.json") for folder in _folders(config))
    failed = any(point["failures"] for one in found for series in one["series"] for point in series["points"])
    return 3 if failed else 0


def _folders(config: AblateConfig) -> list[Path]:
    """Of the recipes' results."""
    return [Path(config.out) / Path(path).stem for path in config.recipe]


@dataclass(frozen=True)
class _Plan:
    """A recipe over its caches."""

    jobs: Mapping[int, Sequence[Job]]
    """Of each cell, by its place in the recipe."""
    caches: Mapping[str, Cache]


def _protocol(config: AblateConfig, recipe: Recipe, cache: Cache) -> str:
    """That of all cells, which one table holds; its scores have the recipe's metric.

    Raises:
        ValueError: cells have several protocols, or scores of another name.
    """
    specs = [resolve_run(cell.config(config.cache, config.out, 0, "cpu"), cache) for cell in recipe.cells]
    chosen = {config.protocol or own_protocol(spec): cell for spec, cell in zip(specs, recipe.cells, strict=True)}
    if len(chosen) > 1:
        told = " and ".join(f"{name} (as series {cell.series!r}, {cell.x})" for name, cell in chosen.items())
        raise ValueError(
            f"{recipe.path}: found cells that are trained for the protocols {told}, expected one for all cells of a "
            "table. Make a recipe of each, or choose --protocol."
        )
    [protocol] = chosen
    for spec, cell in zip(specs, recipe.cells, strict=True):
        names = load_protocol(protocol).metric_names(cache, spec)
        if recipe.metric not in (None, *names):
            raise ValueError(
                f"{recipe.path}: metric: {recipe.metric!r}, expected one that protocol {protocol} has for series "
                f"{cell.series!r}, {cell.x}: {', '.join(names)}."
            )
    return protocol


def _plan(config: AblateConfig, recipe: Recipe, protocol: str, base: Cache) -> _Plan:
    out, device = Path(config.out), choose_device(config.device)
    caches = {config.cache: base}
    planners: dict[str, Planner] = {}
    jobs: dict[int, list[Job]] = {}
    for number, cell in enumerate(recipe.cells):
        path = stored_as(config.cache, base, cell.settings.get("storage"), out / "caches")
        if path not in caches:
            caches[path] = open_cache(path)
        if path not in planners:
            report = EvaluateConfig(
                cache=path,
                run=str(out / "runs"),
                split=config.split,
                protocol=protocol,
                baselines=config.baselines,
                baseline_layers="run",
                device=device,
            )
            planners[path] = Planner(caches[path], report, out / "runs")
        configs = (cell.config(path, config.out, seed, device) for seed in config.seeds or recipe.seeds)
        jobs[number] = [planners[path].job(one) for one in configs]
    return _Plan(jobs, caches)
