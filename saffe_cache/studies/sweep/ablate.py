"""Run a recipe's grid from one cache: runs that see the same batches train together, in a few processes at once.

A run's folder is named after a hash of its config and of the data and encoders that it sees, so that recipes share
runs, and finished runs are not repeated. The same command resumes a killed sweep.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from saffe_cache.core.atomic_io import hold_folder, make_folder
from saffe_cache.core.devices import choose_device, num_cores
from saffe_cache.core.features import short_hash
from saffe_cache.core.outputs import CONFIG, RESULT, provenance, read_json, write_json
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.evaluate import evaluate
from saffe_cache.inputs.pairs import data_fingerprint, reported_fingerprint, training_pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.protocols.registry import load_protocol, own_protocol
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.studies.sweep.outcome import Finished, collect
from saffe_cache.studies.sweep.recipe import AblateConfig, Recipe, read_recipe
from saffe_cache.studies.sweep.requirements import check_cache, stored_as
from saffe_cache.studies.sweep.result import SweepResult
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.train import same_batches, train_many

logger = logging.getLogger(__name__)

_MOST_WORKERS = 4
"""Processes of `auto`: each may need 2 GB."""


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
            finished = [[job.finished for job in jobs] for jobs in plan.jobs]
            collect(plan.recipe, finished, base, plan.out, workers).save(plan.out)
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

    @property
    def distinct(self) -> list[Job]:
        """Each run once."""
        return list({job.config.out: job for jobs in self.jobs for job in jobs}.values())


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
    return _Plan(recipe, out, jobs)


_WITHOUT_EFFECT = {"cache", "out", "device", "residency", "checkpoint_seconds", "tensorboard"}
"""Options that do not change a run's result."""


@dataclass(frozen=True)
class Job:
    """One run and its report."""

    config: TrainConfig
    report: EvaluateConfig
    reported: str
    """Hash over the data that are reported on, by `reported_fingerprint`."""
    batches: str
    """Equal for jobs whose runs can be trained side by side."""

    @property
    def is_done(self) -> bool:
        return (Path(self.config.out) / "result.json").exists() and self._is_reported

    @property
    def _is_reported(self) -> bool:
        folder = Path(self.report.out or "")
        if not (folder / RESULT).exists():
            return False
        found = read_json(folder / CONFIG).get("config"), read_json(folder / RESULT).get("data")
        return found == (json.loads(json.dumps(asdict(self.report))), self.reported)

    def evaluate(self) -> None:
        if not self._is_reported:
            evaluate(self.report)

    @property
    def finished(self) -> Finished:
        return Finished(self.config.seed, self.config.out, self.report.out or "")


class Planner:
    """Makes jobs of configs over one cache."""

    def __init__(self, cache: Cache, report: EvaluateConfig, folder: Path) -> None:
        """
        Args:
            cache: the runs' cache.
            report: how each run is evaluated, by a protocol that is named; `run` and `out` are filled in.
            folder: of the runs.
        """
        self._cache, self._report, self._folder = cache, report, folder
        self._fingerprints: dict[tuple[Any, ...], str] = {}
        self._reported: dict[tuple[str, ...], str] = {}

    def job(self, config: TrainConfig) -> Job:
        """
        Raises:
            CacheError, ValueError: the cache lacks what the config or its report asks for.
        """
        spec = resolve_run(config, self._cache)
        spec = replace(spec, data=self._fingerprint(spec))
        options = {name: value for name, value in _chosen(config).items() if name not in _WITHOUT_EFFECT}
        identity = short_hash({"config": options, "run": _chosen(spec), "stored": self._stored(spec)})
        layers = "+".join(map(str, spec.gallery_layers))
        name = re.sub(r"[^A-Za-z0-9+-]+", "-", f"{config.fusion}-{layers}-seed{config.seed}")
        out = self._folder / f"{name}-{identity}"
        config = replace(config, out=str(out))
        report = replace(self._report, run=str(out), out=str(out / f"{self._report.split}-{self._report.protocol}"))
        return Job(config, report, self._of_report(spec), repr(same_batches(config, spec)))

    def _fingerprint(self, spec: RunSpec) -> str:
        """Hash over what a run sees."""
        pairs = (spec.gallery_key, spec.text_key, spec.pairs, spec.train_split, spec.validation)
        drawn = (spec.validation_fraction, spec.train_fraction, spec.seed, spec.gallery_text)
        if (*pairs, *drawn) not in self._fingerprints:
            training, validation, _ = training_pairs(spec, self._cache)
            self._fingerprints[*pairs, *drawn] = data_fingerprint(self._cache, spec, training, validation)
        return self._fingerprints[*pairs, *drawn]

    def _of_report(self, spec: RunSpec) -> str:
        """Hash over what its report is measured on."""
        split, protocol = self._report.split, self._report.protocol
        assert protocol != "auto"
        pairs = (spec.gallery_key, spec.text_key, spec.pairs, spec.gallery_text)
        if pairs not in self._reported:
            found = load_protocol(protocol).select(self._cache, spec, split)
            self._reported[pairs] = reported_fingerprint(self._cache, spec, found)
        return self._reported[pairs]

    def _stored(self, spec: RunSpec) -> list[str]:
        """The types of the hidden states that a run reads."""
        sides = ((spec.gallery_key, spec.gallery_layers), (spec.text_key, spec.text_layers))
        encoders = self._cache.encoders
        return [encoders[key].array(f"hidden_states/{layer}").dtype for key, layers in sides for layer in layers]


def _chosen(of: Any) -> dict[str, Any]:
    """A dataclass's fields that are not at their default: an option that a later release adds does not rename runs."""
    found = {}
    for one in fields(of):
        value = getattr(of, one.name)
        default = one.default_factory() if callable(one.default_factory) else one.default
        if default is MISSING or value != default:
            found[one.name] = _chosen(value) if is_dataclass(value) else value
    return found


def run_jobs(jobs: Sequence[Job], together: int, workers: int) -> None:
    """Train and evaluate the jobs that are not done.

    Args:
        jobs: each with a run of its own.
        together: largest number of runs that train side by side in one process.
        workers: processes; with 1, this one.

    Raises:
        CacheError, ValueError, OSError: as train and evaluate; finished jobs are kept.
    """
    pending = [job for job in jobs if not job.is_done]
    groups: dict[str, list[Job]] = {}
    for job in pending:
        groups.setdefault(job.batches, []).append(job)
    tasks = [group[i : i + together] for group in groups.values() for i in range(0, len(group), together)]
    with tqdm(total=len(pending), unit=" runs", desc="sweep", smoothing=0, disable=not tasks) as progress:
        for done in _side_by_side(tasks, workers) if workers > 1 else map(_work, tasks):
            progress.update(done)


def _side_by_side(tasks: Sequence[Sequence[Job]], workers: int) -> Iterator[int]:
    """Each task in a new process, so that its peak memory is its own; yields tasks' counts as they finish."""
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    context.set_forkserver_preload([__name__])
    threads = max(1, num_cores() // workers)

    def run(task: Sequence[Job]) -> int:
        with ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(threads,)) as process:
            return process.submit(_work, task).result()

    with (
        _environment("TQDM_DISABLE", "1"),  # for the workers: this process has read it already
        ThreadPoolExecutor(workers) as pool,
    ):
        started = [pool.submit(run, task) for task in tasks]
        try:
            for future in as_completed(started):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # or this process could not end before their tasks
            raise


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.getLogger("saffe_cache").setLevel(logging.WARNING)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose sweep was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(jobs: Sequence[Job]) -> int:
    """Train some runs side by side, report on each, and return their number."""
    train_many([job.config for job in jobs])
    for job in jobs:
        job.evaluate()
    return len(jobs)
