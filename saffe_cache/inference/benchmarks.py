"""`saffe benchmark`: a trained run on tasks of mteb or CLIP_benchmark, with what the libraries lack.

The numbers are the library's own. Intervals and differences from another run come from the scores of single queries,
which are kept only where their mean is the library's number; all of them are written to queries.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

import numpy as np

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.outputs import output_folder
from saffe_cache.core.results import Estimate, Measurement, Result, Section
from saffe_cache.core.tables import ABSENT, Cell, Row, RowKind, Table
from saffe_cache.inference.benchmark_scores import Queries, Scored, fingerprint, measure
from saffe_cache.inference.config import BenchmarkConfig
from saffe_cache.retrieval.metrics import bootstrap_interval, paired_bootstrap, unit_totals

FAM, AGAINST = "fam", "against"
QUERIES = "queries.jsonl"
_SHOWN = ("ndcg_at_10", "hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10", "mean_per_class_recall")
_SIDES = ("image_retrieval_recall@", "text_retrieval_recall@")
_TOLERANCE = 1e-4
"""How far the mean over queries may be from the library's number, which may be rounded."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """What was measured on one task, split and subset."""

    main_metric: str
    num_queries: Mapping[str, int]
    """Queries of each metric that has an interval."""
    systems: Mapping[str, Mapping[str, Estimate]]
    """Each system's metrics, the library's numbers; intervals over queries where it scores single ones."""
    differences: Mapping[str, Estimate]
    """The run minus the other one, by paired bootstrap; empty without another one."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult(Result):
    """A run, and perhaps another one, on standard benchmarks."""

    verb: ClassVar[str] = "benchmark"

    library: str
    """Name and version."""
    runs: Mapping[str, str]
    """The folders of "fam", the run, and "against"."""
    tasks: Mapping[str, TaskScores]

    def measurements(self) -> Iterator[Measurement]:
        for task, scores in self.tasks.items():
            for system, metrics in scores.systems.items():
                for metric, estimate in metrics.items():
                    yield Measurement.of(task, system, metric, estimate)
            for metric, estimate in scores.differences.items():
                yield Measurement.of(task, f"{FAM} minus {AGAINST}", metric, estimate)

    def sections(self) -> list[Section]:
        """One section for each task."""
        return [self._section(task, scores) for task, scores in self.tasks.items()]

    def _section(self, task: str, scores: TaskScores) -> Section:
        known = scores.systems[FAM]
        others = (name for name in known if name in _SHOWN or name.startswith(_SIDES))
        metrics = list(dict.fromkeys([scores.main_metric, *others]))
        rows = []
        for system, of in scores.systems.items():
            cells = tuple(of[name].cell() if name in of else Cell(ABSENT) for name in metrics)
            kind: RowKind = "fam" if system == FAM else "baseline"
            rows.append(Row(Cell(self.runs[system]), cells, kind))
        points = ", ".join(
            f"{name} {scores.differences[name].points()}" for name in metrics if name in scores.differences
        )
        texts = [f"The run minus {self.runs[AGAINST]}, by paired bootstrap over queries: {points}."] if points else []
        count = scores.num_queries.get(scores.main_metric)
        return Section(
            title=f"{task}: {scores.main_metric}" + (f", {count} queries" if count else ""),
            lead=f"Numbers of {self.library}.",
            tables=[Table("Percent, with 95 % bootstrap intervals.", ("", *metrics), tuple(rows))],
            texts=texts,
        )


def benchmark(config: BenchmarkConfig) -> str:
    """Measure the run, and return the output folder.

    Raises:
        ValueError: a task is unknown, or needs what the run does not have; or a run is damaged.
        ImportError: the library is not installed.
        OSError: the disk is full or gone, or a dataset is unavailable.
    """
    out, library = Path(config.out), f"{config.library} {_version(config.library)}"
    folders = {FAM: config.run, **({AGAINST: config.against} if config.against else {})}
    ignored, resolved = ("device", "root", "encoder"), {one: fingerprint(config, path) for one, path in folders.items()}
    with output_folder(out, "benchmark", config, {"library": library, **resolved}, ignored) as is_finished:
        if is_finished:
            return config.out
        scored = {system: measure(config, folder) for system, folder in folders.items()}
        of_tasks = {task: {system: of[task] for system, of in scored.items()} for task in scored[FAM]}
        tasks = {task: _task_scores(of, config.seed) for task, of in of_tasks.items()}
        warnings = tuple(f"{task}: {text}" for task, of in of_tasks.items() for text in _unexplained(of[FAM]))
        write_whole(out / QUERIES, "".join(_lines(of_tasks)).encode())
        BenchmarkResult(library=library, runs=folders, tasks=tasks, warnings=warnings).save(out)
    return config.out


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        raise ImportError(f"saffe benchmark needs {library}: pip install 'saffe-cache[benchmarks]'.") from None


def _task_scores(systems: Mapping[str, Scored], seed: int) -> TaskScores:
    fam, against = systems[FAM], systems.get(AGAINST)
    of_other = dict(_explained(against)) if against else {}
    differences = {
        metric: _difference(metric, queries, of_other[metric], seed)
        for metric, queries in _explained(fam)
        if metric in of_other
    }
    return TaskScores(
        main_metric=fam.main_metric,
        num_queries={metric: len(queries.ids) for metric, queries in _explained(fam)},
        systems={name: _estimates(scored, seed) for name, scored in systems.items()},
        differences=differences,
    )


def _explained(scored: Scored) -> Iterator[tuple[str, Queries]]:
    """The metrics that are the mean of their values for single queries."""
    for queries in scored.queries:
        for metric, values in queries.values.items():
            if metric in scored.values and abs(values.mean() - scored.values[metric]) <= _TOLERANCE:
                yield metric, queries


def _unexplained(scored: Scored) -> Iterator[str]:
    explained = dict(_explained(scored))
    for queries in scored.queries:
        for metric, values in queries.values.items():
            if metric in scored.values and metric not in explained:
                found, expected = values.mean(), scored.values[metric]
                yield f"{metric} has no interval: its mean over queries is {found:.4f}, the library's is {expected:.4f}"


def _estimates(scored: Scored, seed: int) -> dict[str, Estimate]:
    intervals = {
        metric: bootstrap_interval(*unit_totals(queries.values[metric], np.array(queries.units)), seed=seed)
        for metric, queries in _explained(scored)
    }
    of = {metric: intervals.get(metric, (None, None)) for metric in scored.values}
    return {metric: Estimate(value=scored.values[metric], low=low, high=high) for metric, (low, high) in of.items()}


def _difference(metric: str, queries: Queries, others: Queries, seed: int) -> Estimate:
    """The mean difference of two runs on the same queries, which may come in another order."""
    places = {name: place for place, name in enumerate(others.ids)}
    matched = others.values[metric][[places[name] for name in queries.ids]]
    mean, low, high = paired_bootstrap(queries.values[metric] - matched, np.array(queries.units), seed=seed)
    return Estimate(value=mean, low=low, high=high)


def _lines(tasks: Mapping[str, Mapping[str, Scored]]) -> Iterator[str]:
    """JSON lines: one for each task, system and query."""
    for task, systems in tasks.items():
        for system, scored in systems.items():
            for queries in scored.queries:
                for row, (name, unit) in enumerate(zip(queries.ids, queries.units, strict=True)):
                    values = {metric: float(of[row]) for metric, of in queries.values.items()}
                    yield json.dumps({"task": task, "system": system, "query": name, "unit": unit, **values}) + "\n"
