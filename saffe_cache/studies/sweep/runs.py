"""The runs of a sweep: the folder that each gets, whether it is finished, and what came of all of a recipe's."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.core.features import short_hash
from saffe_cache.core.outputs import CONFIG, RESULT, read_json, with_defaults
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.details import FAM
from saffe_cache.evaluation.results import EvaluationResult, Numbers
from saffe_cache.extraction.ledger import extraction_seconds, reencoding
from saffe_cache.inputs.media import named_layers, seen_by
from saffe_cache.inputs.pairs import reported_fingerprint, run_fingerprint, training_pairs
from saffe_cache.protocols.registry import load_protocol
from saffe_cache.store.reader import Cache
from saffe_cache.studies.sweep.recipe import Cell, Recipe
from saffe_cache.studies.sweep.result import Level, SweepCost, SweepPoint, SweepResult, SweepSeries
from saffe_cache.training.config import TrainConfig, TrainingRecipe
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.result import TrainResult
from saffe_cache.training.train import same_batches

_WITHOUT_EFFECT = {"cache", "out", "device", "residency", "checkpoint_seconds", "log"}
"""Options that do not change a run's result."""
_OF_RECIPE = {one.name for one in fields(TrainingRecipe)}


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
        return (Path(self.config.out) / RESULT).exists() and self.is_reported

    @property
    def is_reported(self) -> bool:
        folder = Path(self.report.out or "")
        if not (folder / RESULT).exists():
            return False
        options = with_defaults(EvaluateConfig, read_json(folder / CONFIG).get("config", {}))
        found = options, read_json(folder / RESULT).get("data")
        return found == (json.loads(json.dumps(asdict(self.report))), self.reported)

    @cached_property
    def trained(self) -> TrainResult:
        """Of a finished job."""
        return TrainResult.load(self.config.out)

    @cached_property
    def evaluated(self) -> EvaluationResult:
        """Of a finished job."""
        return EvaluationResult.load(self.report.out or "")


@dataclass(frozen=True)
class Planner:
    """Makes jobs of configs over one cache."""

    cache: Cache
    report: EvaluateConfig
    """How each run is evaluated, by a protocol that is named; `run` is the folder of all runs, and `out` filled in."""
    hashes: dict[tuple[Any, ...], str] = field(default_factory=dict)
    """What was computed before, by what it depends on."""

    def job(self, config: TrainConfig) -> Job:
        """
        Raises:
            CacheError, ValueError: the cache lacks what the config or its report asks for.
        """
        split, protocol = self.report.split, self.report.protocol
        assert protocol != "auto"
        spec = resolve_run(config, self.cache)
        cache = seen_by(self.cache, spec)
        pairs = (spec.gallery_key, spec.text_key, spec.pairs, spec.gallery_text)
        validation = (spec.validation, spec.validation_fraction, spec.validation_photos)
        drawn = (spec.train_split, *validation, spec.train_fraction, spec.unpaired, spec.seed)
        seen = self._once((*pairs, *drawn), lambda: run_fingerprint(cache, spec, *training_pairs(spec, cache)[:2]))
        reported = self._once(
            pairs, lambda: reported_fingerprint(cache, spec, load_protocol(protocol).select(cache, spec, split))
        )
        spec = replace(spec, data=seen)
        sides = ((spec.gallery_key, spec.gallery_layers), (spec.text_key, spec.text_layers))
        members = [one for key, of in sides for one in cache.encoders[key].members(np.zeros(0, np.int64), of)]
        stored = [one.array(f"hidden_states/{layer}").spec.dtype for one, _, of in members for layer in of]
        options = {name: value for name, value in chosen(config).items() if name not in _WITHOUT_EFFECT | _OF_RECIPE}
        options |= chosen(config.recipe)
        identity = short_hash({"config": options, "run": chosen(spec), "stored": stored})
        layers = named_layers(spec).replace(", ", "+")
        name = re.sub(r"[^A-Za-z0-9+-]+", "-", f"{config.chosen_fusion}-{layers}-seed{config.seed}")
        out = Path(self.report.run or "") / f"{name}-{identity}"
        config = replace(config, out=str(out))
        report = replace(self.report, run=str(out), out=str(out / f"{split}-{protocol}"))
        return Job(config, report, reported, repr(same_batches(config, spec)))

    def _once(self, key: tuple[Any, ...], hashed: Callable[[], str]) -> str:
        if key not in self.hashes:
            self.hashes[key] = hashed()
        return self.hashes[key]


def chosen(of: Any) -> dict[str, Any]:
    """A dataclass's fields that are not at their default: an option that a later release adds does not rename runs."""
    found = {}
    for one in fields(of):
        value = getattr(of, one.name)
        default = one.default_factory() if callable(one.default_factory) else one.default
        if default is MISSING or value != default:
            found[one.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """A field's value as JSON holds it."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return chosen(value) if is_dataclass(value) else value


def collect(recipe: Recipe, cells: Sequence[Sequence[Job]], cache: Cache, out: Path, workers: int) -> SweepResult:
    """What came of finished jobs.

    Args:
        recipe: what was varied.
        cells: of each of its cells the jobs, one for each seed.
        cache: what encoders in the loop are reckoned by.
        out: folder of the result, relative to which reports are named.
        workers: processes that ran side by side.
    """
    series: dict[str, list[SweepPoint]] = {}
    for cell, jobs in zip(recipe.cells, cells, strict=True):
        series.setdefault(cell.series, []).append(_point(cell, jobs, out))
    first = cells[0][0].evaluated
    media = {job.evaluated.run.medium for jobs in cells for job in jobs}
    metric = recipe.metric or first.main_metric
    result = SweepResult(
        title=recipe.title,
        question=recipe.question,
        dataset=Path(str(cache.storage.root)).name,
        medium=next(iter(media)) if len(media) == 1 else "media",
        protocol=first.protocol,
        definition=first.definition,
        split=first.split,
        metric=metric,
        x_label=recipe.x_label,
        y_label=recipe.y_label,
        series=tuple(SweepSeries(name=name, points=tuple(points)) for name, points in series.items()),
        levels=tuple(_levels(metric, [job.evaluated for jobs in cells for job in jobs])),
        published=recipe.published,
        cost=_cost(list({job.config.out: job for jobs in cells for job in jobs}.values()), cache, workers),
    )
    return replace(result, failures=tuple(f"{place}, {text}" for place, of in result.points for text in of.failures))


def _levels(metric: str, reports: Sequence[EvaluationResult]) -> list[Level]:
    """Systems without layers and training, where all reports agree; cells of several encoders differ."""
    found = []
    for name in ("pooled_cosine", "zero_shot"):
        numbers = [report.systems.get(name, {}).get(metric) for report in reports]
        values = {number.value for number in numbers if number}
        if all(numbers) and len(values) == 1:
            found.append(Level(name=name, value=values.pop()))
    return found


def _point(cell: Cell, jobs: Sequence[Job], out: Path) -> SweepPoint:
    trained, reports = [job.trained for job in jobs], [job.evaluated for job in jobs]
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
        best_epoch=tuple(one.best_epoch for one in trained),
        failures=tuple(f"seed {job.config.seed}: {text}" for job in jobs for text in job.evaluated.failures),
        trainable_parameters=trained[0].trainable_parameters,
        fusing_flops=reports[0].cost.fusing_flops or 0,
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


def _cost(jobs: Sequence[Job], cache: Cache, workers: int) -> SweepCost:
    """`jobs`: each run once."""
    trained = [job.trained for job in jobs]
    by_encoders: dict[tuple[str, str], list[dict[str, object]]] = {}
    for job in jobs:
        spec = read_json(Path(job.config.out) / CONFIG)["run"]
        by_encoders.setdefault((spec["gallery_key"], spec["text_key"]), []).append(vars(job.trained))
    costs = [
        reencoding(cache.encoders[mine], cache.encoders[other], of) if mine in cache.encoders else None  # several media
        for (mine, other), of in by_encoders.items()
    ]
    known = [one for one in costs if one is not None]
    arrays = [array for encoder in cache.encoders.values() for array in encoder.manifest.arrays.values()]
    return SweepCost(
        num_runs=len(jobs),
        workers=workers,
        extraction_seconds=extraction_seconds(cache),
        training_seconds=sum(one.seconds for one in trained),
        control_seconds=sum(one.control_seconds for one in trained),
        evaluation_seconds=sum(job.evaluated.cost.evaluation_seconds for job in jobs),
        cache_bytes=sum(array.rows * array.spec.row_bytes for array in arrays),
        photos_seen=sum(one.photos_seen for one in known),
        texts_seen=sum(one.texts_seen for one in known),
        re_encoding_seconds=sum(one.seconds for one in known) if len(known) == len(costs) else None,
        photo_seconds=known[0].photo_seconds if known else None,
        text_seconds=known[0].text_seconds if known else None,
        basis=known[0].basis if known else "the cache does not say how long its encoders take",
    )
