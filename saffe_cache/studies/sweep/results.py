"""What came of a recipe: the values of each cell over its seeds, baselines and chance beside them, and what it cost."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saffe_cache.core.outputs import read_json
from saffe_cache.core.tables import flops
from saffe_cache.evaluation.results import FAM, EvaluationResult, Numbers
from saffe_cache.extraction.ledger import extraction_seconds, reencoding
from saffe_cache.retrieval.metrics import seed_interval
from saffe_cache.store.reader import Cache
from saffe_cache.studies.sweep.jobs import Job
from saffe_cache.studies.sweep.recipe import Cell, Recipe

Jobs = Mapping[int, Sequence[Job]]
"""Of each cell, by its place in the recipe: one job for each seed."""


def outcome(recipe: Recipe, jobs: Jobs, caches: Mapping[str, Cache], folder: Path, workers: int) -> dict[str, Any]:
    """ablation.json: fractions, except for seconds and bytes.

    Args:
        recipe: what was varied.
        jobs: all of them done, and reported by one protocol.
        caches: those that they ran on, by their path.
        folder: that ablation.json will lie in; reports are named from there.
        workers: processes that ran side by side.
    """
    series: dict[str, list[dict[str, Any]]] = {}
    reports: list[EvaluationResult] = []
    for number, cell in enumerate(recipe.cells):
        of_cell = [EvaluationResult.load(job.report.out or "") for job in jobs[number]]
        series.setdefault(cell.series, []).append(_point(cell, jobs[number], of_cell, folder))
        reports += of_cell
    first = reports[0]
    metric = recipe.metric or first.main_metric
    distinct = {job.config.out: job for of_cell in jobs.values() for job in of_cell}
    return {
        "title": recipe.title,
        "question": recipe.question,
        "dataset": Path(next(iter(caches))).name,
        "protocol": first.protocol,
        "definition": first.definition,
        "split": first.split,
        "metric": metric,
        "x_label": recipe.x_label,
        "y_label": recipe.y_label,
        "series": [{"name": name, "points": points} for name, points in series.items()],
        "lines": _lines(metric, reports),
        "published": [vars(one) for one in recipe.published],
        "ledger": _ledger(list(distinct.values()), caches, workers),
    }


def _lines(metric: str, reports: Sequence[EvaluationResult]) -> list[dict[str, Any]]:
    """What needs neither layers nor training, where it is the same in all reports; cells of several encoders differ."""
    found = []
    for name in ("pooled_cosine", "zero_shot"):
        of_reports = [report.systems.get(name, {}).get(metric) for report in reports]
        values = {number and number.value for number in of_reports}
        if len(values) == 1 and None not in values:
            found.append({"name": name, "metric": metric, "value": values.pop()})
    return found


def _point(cell: Cell, jobs: Sequence[Job], reports: Sequence[EvaluationResult], folder: Path) -> dict[str, Any]:
    results = [read_json(Path(job.config.out) / "result.json") for job in jobs]
    first = reports[0]
    beside = {name: _values([report.systems[name] for report in reports]) for name in first.systems if name != FAM}
    return {
        "x": cell.x,
        "y": cell.y,
        "settings": cell.settings,
        "seeds": [job.config.seed for job in jobs],
        "reports": [Path(os.path.relpath(job.report.out or "", folder)).as_posix() for job in jobs],
        "values": _values([report.systems[FAM] for report in reports]),
        "chance": {metric: of.chance for metric, of in first.systems[FAM].items()},
        "baselines": beside,
        "controls": {
            name: _values([report.control_scores[name] for report in reports]) for name in first.control_scores
        },
        "best_epoch": [result["best_epoch"] for result in results],
        "failures": [
            f"seed {job.config.seed}: {failure}"
            for job, report in zip(jobs, reports, strict=True)
            for failure in report.failures
        ],
        "trainable_parameters": results[0]["trainable_parameters"],
        "fusing_flops": first.cost.fusing_flops,
        "training_seconds": [result["seconds"] for result in results],
        "evaluation_seconds": [report.cost.evaluation_seconds for report in reports],
    }


def _values(of_seeds: Sequence[Numbers]) -> dict[str, list[float]]:
    """The values of each metric, one for each seed."""
    return {metric: [numbers[metric].value for numbers in of_seeds] for metric in of_seeds[0]}


def _ledger(jobs: Sequence[Job], caches: Mapping[str, Cache], workers: int) -> dict[str, Any]:
    """What the runs took, each counted once, and what encoders in the loop would have taken (null where unknown).

    Runs and reports tell it themselves, whichever commands they were made by; loading and starting are not in it.
    """
    cache = next(iter(caches.values()))
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    evaluation = control = 0.0
    for job in jobs:
        spec = read_json(Path(job.config.out) / "config.json")["run"]
        result = read_json(Path(job.config.out) / "result.json")
        results.setdefault((spec["gallery_key"], spec["text_key"]), []).append(result)
        control += _control_seconds(job)
        evaluation += EvaluationResult.load(job.report.out or "").cost.evaluation_seconds
    training = sum(one["seconds"] for of in results.values() for one in of)
    costs = [reencoding(cache.encoders[mine], cache.encoders[other], of) for (mine, other), of in results.items()]
    known = [one for one in costs if one is not None]
    arrays = [array for encoder in cache.encoders.values() for array in encoder.manifest.arrays.values()]
    return {
        "extraction_seconds": extraction_seconds(cache),
        "training_seconds": training,
        "control_seconds": control,
        "evaluation_seconds": evaluation,
        "wall_seconds": (training + control + evaluation) / workers,
        "workers": workers,
        "cache_bytes": sum(array.rows * array.spec.row_bytes for array in arrays),
        "num_runs": len(jobs),
        "photos_seen": sum(one.photos_seen for one in known),
        "texts_seen": sum(one.texts_seen for one in known),
        "re_encoding_seconds": sum(one.seconds for one in known) if len(known) == len(costs) else None,
        "photo_seconds": known[0].photo_seconds if known else None,
        "text_seconds": known[0].text_seconds if known else None,
        "basis": known[0].basis if known else "nothing in the cache tells how long its encoders take",
    }


def _control_seconds(job: Job) -> float:
    """Of its training on permuted pairs, which result.json leaves out."""
    log = Path(job.config.out) / "permuted" / "log.jsonl"
    return float(json.loads(log.read_text().splitlines()[-1])["seconds"]) if log.exists() else 0.0


def as_csv(found: Mapping[str, Any]) -> str:
    """One line for each point and metric: the values of all seeds, their mean and its 95 % interval."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["series", "x", "y", "system", "metric", "mean", "low", "high", "values", "fusing_flops"])
    for series in found["series"]:
        for point in series["points"]:
            place = [series["name"], point["x"], point["y"] or ""]
            systems = {"fam": point["values"], **point["baselines"]}
            systems |= {f"control {name}": of for name, of in point["controls"].items()}
            for system, of in systems.items():
                for metric, values in of.items():
                    mean, low, high = seed_interval(values)
                    count = point["fusing_flops"] if system == "fam" else None
                    writer.writerow([*place, system, metric, mean, low, high, " ".join(map(str, values)), count])
            for metric, value in point["chance"].items():
                writer.writerow([*place, "chance", metric, value, "", "", value, ""])
    return file.getvalue()


def as_table(found: Mapping[str, Any]) -> str:
    """Markdown: percent, mean and 95 % interval over seeds; of the baselines and one control the mean."""
    points = [(series["name"], point) for series in found["series"] for point in series["points"]]
    metric = found["metric"]
    names = list(dict.fromkeys(name for _, point in points for name, of in point["baselines"].items() if metric in of))
    where = [found["x_label"], found["y_label"]] if found["y_label"] else [found["x_label"]]
    head = ["series", *where, metric, *names, "photos shuffled", "chance", "best epoch", "parameters"]
    head += ["FLOPs a photo", "seconds"]
    lines = [f"{found['title']}. {found['question']}", "", f"{found['definition']}; split {found['split']}.", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, point in points:
        place = [name, point["x"], *([point["y"]] if found["y_label"] else [])]
        beside = [_mean(point["baselines"].get(one, {}).get(metric)) for one in names]
        control = _mean(point["controls"]["photos_shuffled"][metric])
        seconds = f"{sum(point['training_seconds']) / len(point['seeds']):.0f}"
        sizes = [f"{point['trainable_parameters'] / 1e6:.2f} M", flops(point["fusing_flops"])]
        costs = [" ".join(map(str, point["best_epoch"])), *sizes, seconds]
        chance = f"{100 * point['chance'][metric]:.1f}"
        cells = [*place, _interval(point["values"][metric]), *beside, control, chance, *costs]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"{line['name']}, {line['metric']}: {100 * line['value']:.1f}" for line in found["lines"])]
    for name, point in points:
        cell = ", ".join(filter(None, (name, point["x"], point["y"])))
        lines += [f"CONTROL FAILED: {cell}: {one}" for one in point["failures"]]
    lines += [
        f"published: {one['name']} {one['x'] or ''}: {100 * one['value']:.1f} {one['metric']} ({one['note']})"
        for one in found["published"]
    ]
    lines.append(_told(found["ledger"]))
    return "\n".join(lines) + "\n"


def _told(ledger: Mapping[str, Any]) -> str:
    """The ledger in words."""
    parts = ("extraction", "training", "control", "evaluation", "wall")
    extraction, training, control, evaluation, wall = (_minutes(ledger[f"{part}_seconds"]) for part in parts)
    spent = (
        f"{ledger['num_runs']} runs in about {wall} ({ledger['workers']} at a time; added up, {training} of training, "
        f"{control} of controls, {evaluation} of reports) after one extraction of {extraction}; "
    )
    if ledger["re_encoding_seconds"] is None:
        return f"{spent}{ledger['basis']}"
    return (
        f"{spent}encoders in the loop would have taken {_minutes(ledger['re_encoding_seconds'])} more "
        f"({ledger['photos_seen']} photos, {ledger['texts_seen']} texts; {ledger['basis']})"
    )


def _interval(values: Sequence[float]) -> str:
    """A share of queries or photos: nothing lies beyond 0 and 100."""
    mean, low, high = seed_interval(values)
    return f"{100 * mean:.1f}" + ("" if len(values) < 2 else f" [{100 * max(0, low):.1f}, {100 * min(1, high):.1f}]")


def _mean(values: Sequence[float] | None) -> str:
    return f"{100 * sum(values) / len(values):.1f}" if values else ""


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
