"""Tables of a page, and the same numbers unrounded as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from saffe_cache.core.tables import flops as flops_in_words
from saffe_cache.evaluation.results import Numbers
from saffe_cache.report.ablations import Ablation, spread
from saffe_cache.report.episodes import Episodes
from saffe_cache.report.ledger import Costs
from saffe_cache.report.reading import Evaluation
from saffe_cache.retrieval.metrics import metric_named

_ABSENT = "–"

Value = str | int | float | None


@dataclass(frozen=True)
class Sheet:
    """A CSV file; numbers are whole, fractions are fractions."""

    name: str
    header: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]

    def csv(self) -> bytes:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([self.header, *self.rows])
        return file.getvalue().encode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Cell:
    """Of a table."""

    text: str
    note: str = ""
    """Beneath, smaller."""


@dataclass(frozen=True)
class TableRow:
    """A heading and its cells."""

    kind: str
    """By which it looks: fam, baseline, control, chance, plain."""
    head: Cell
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table with its caption."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[TableRow, ...]


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def results_sheet(evaluation: Evaluation, name: str) -> Sheet:
    """Every number of an evaluation."""
    metrics = evaluation.metrics
    rows: list[tuple[Value, ...]] = []
    for control, of in metrics.controls.items():
        judged = of.metric, of.limit, of.passed
        rows += _sheet_rows("control", control, metrics.control_scores[control], judged)
    for system, scores in metrics.systems.items():
        rows += _sheet_rows("fam" if system == "fam" else "baseline", system, scores, (None, None, None))
    header = ("kind", "name", "metric", "value", "low", "high", "chance", "judged_by", "limit", "passed")
    return Sheet(name, header, tuple(rows))


def _sheet_rows(
    kind: str, name: str, scores: Numbers, judged: tuple[str | None, float | None, bool | None]
) -> list[tuple[Value, ...]]:
    return [(kind, name, metric, of.value, of.low, of.high, of.chance, *judged) for metric, of in scores.items()]


def per_query_sheet(evaluation: Evaluation, name: str) -> Sheet:
    """The main metric of each query, of each system; for classes with their names."""
    details = evaluation.details
    assert details is not None
    named = details.query_classes
    count = len(details.systems["fam"].metric)
    rows = tuple(
        (number + 1, named[number] if named else None, *(float(of.metric[number]) for of in details.systems.values()))
        for number in range(count)
    )
    header = ("query", "class", *(f"{system}: {details.main_metric}" for system in details.systems))
    return Sheet(name, header, rows)


def points_table(ablation: Ablation, name: str) -> tuple[Table, Sheet]:
    """All points of an ablation: mean over seeds and interval of each metric."""
    metrics = list(
        dict.fromkeys(metric for series in ablation.series for point in series.points for metric in point.values)
    )
    metrics = [ablation.metric, *(metric for metric in metrics if metric != ablation.metric)]
    rows, sheet = [], []
    for series in ablation.series:
        for point in series.points:
            place = series.name, point.x, point.y
            cells = [Cell(point.x)] + ([] if ablation.y_label is None else [Cell(point.y or "")])
            for metric in metrics:
                values = point.values.get(metric)
                if values is None:
                    cells.append(Cell(_ABSENT))
                    continue
                mean, half = spread(values)
                kind = metric_named(metric)
                shown, wide = kind.show(mean), half is not None and not kind.is_rank
                cells.append(Cell(shown, f"± {percent(half)}" if wide and half is not None else ""))
                sheet += [
                    (*place, metric, seed, value, mean, half, point.chance.get(metric), point.fusing_flops)
                    for seed, value in zip(point.seeds, values, strict=True)
                ]
            chance = percent(point.chance[ablation.metric])
            epochs = ", ".join(map(str, point.best_epoch))
            cells += [
                Cell(chance),
                Cell(str(len(point.seeds))),
                Cell(epochs),
                Cell(f"{point.trainable_parameters / 1e6:.2f} M"),
                Cell(flops_in_words(point.fusing_flops)),
                Cell(f"{sum(point.training_seconds) / len(point.training_seconds):.0f}"),
            ]
            row_kind = "failed" if point.failures else "plain"
            rows.append(TableRow(row_kind, Cell(series.name, "; ".join(point.failures)), tuple(cells)))
    axes = (ablation.x_label,) if ablation.y_label is None else (ablation.x_label, ablation.y_label)
    header = (
        "series",
        *axes,
        *metrics,
        f"chance: {ablation.metric}",
        "seeds",
        "best epoch",
        "parameters",
        "FLOPs a photo",
        "training s",
    )
    caption = "All points. Percent, mean over seeds; beneath, half the 95 % t-interval."
    columns = ("series", "x", "y", "metric", "seed", "value", "mean", "half_interval", "chance", "fusing_flops")
    return Table(caption, header, tuple(rows)), Sheet(name, columns, tuple(sheet))


def baselines_table(ablation: Ablation) -> Table | None:
    """The baselines of each point, on its own layers and photos; None where there are none."""
    points = [(series.name, point) for series in ablation.series for point in series.points]
    names = list(dict.fromkeys(name for _, point in points for name in point.baselines))
    rows = []
    for series, point in points:
        cells = [Cell(point.x)] + ([] if ablation.y_label is None else [Cell(point.y or "")])
        for name in names:
            values = point.baselines.get(name, {}).get(ablation.metric)
            cells.append(Cell(_ABSENT) if values is None else Cell(percent(spread(values).mean)))
        rows.append(TableRow("baseline", Cell(series), tuple(cells)))
    if not names:
        return None
    axes = (ablation.x_label,) if ablation.y_label is None else (ablation.x_label, ablation.y_label)
    caption = f"Baselines on the layers and photos of each point, {ablation.metric} in percent, mean over seeds."
    return Table(caption, ("series", *axes, *names), tuple(rows))


def published_table(ablation: Ablation) -> Table | None:
    """Numbers of others, with what metric they truly are; None where there are none."""
    rows = tuple(
        _plain_row(one.name, one.x or _ABSENT, percent(one.value), one.metric, one.note) for one in ablation.published
    )
    caption = "Published, with what metric they truly are. Only those of the plot's own metric are drawn in it."
    return Table(caption, ("", ablation.x_label, "percent", "metric", "note"), rows) if rows else None


def sweep_ledger(ablation: Ablation) -> Table:
    """What a sweep cost."""
    of = ablation.ledger
    told = (
        ("runs", f"{of.num_runs}"),
        ("extraction, once", duration(of.extraction_seconds)),
        ("training, all runs", duration(of.training_seconds)),
        ("evaluation, all runs", duration(of.evaluation_seconds)),
        ("by the clock, with controls, about", duration(of.wall_seconds)),
        ("cache", size(of.cache_bytes)),
        ("photos and texts seen in training", f"{of.photos_seen:,} and {of.texts_seen:,}"),
        ("re-encoding them at every step would have cost", _told(of.re_encoding_seconds)),
        ("encoding one photo, one text", f"{_told(of.photo_seconds)}, {_told(of.text_seconds)}"),
    )
    rows = tuple(_plain_row(*one) for one in told)
    return Table(f"Cost ledger. {of.basis}", ("", ""), rows)


def episodes_tables(episodes: Episodes, title: str) -> tuple[list[Table], list[Sheet]]:
    """Few-shot episodes; classifications with replaced names; numbers of others."""
    systems = episodes.systems
    rows: list[TableRow] = []
    sheet: list[tuple[Value, ...]] = []
    for setting in episodes.settings:
        cells = [Cell(percent(setting.chance))]
        kind = (setting.ways, setting.shots, setting.episodes, setting.chance)
        for told, names in ((setting.controls, episodes.controls), (setting.systems, systems)):
            for name in names:
                mean = told.get(name)
                half = "" if mean is None else f"± {percent(mean.half_interval)}"
                cells.append(Cell(_ABSENT if mean is None else percent(mean.mean), half))
                if mean is not None:
                    sheet.append((*kind, name, mean.mean, mean.half_interval))
        note = f"{setting.episodes} episodes, {setting.queries} queries a class"
        rows.append(TableRow("plain", Cell(setting.name, note), tuple(cells)))
    caption = (
        f"{episodes.dataset}: accuracy of few-shot episodes, percent; beneath, half the 95 % interval over episodes."
    )
    shown = [f"control: {name}" for name in episodes.controls]
    tables = [Table(caption, ("", "chance", *shown, *systems), tuple(rows))]
    header = ("ways", "shots", "episodes", "chance", "system", "mean", "half_interval")
    sheets = [Sheet(title, header, tuple(sheet))]
    if episodes.names_replaced:
        rows, sheet = [], []
        names = list(dict.fromkeys(system for one in episodes.names_replaced for system in one.systems))
        for one in episodes.names_replaced:
            cells = []
            for system in names:
                seeds = one.systems.get(system)
                found = spread(seeds.values) if seeds else None
                half = f"± {percent(found.half_interval)}" if found and found.half_interval is not None else ""
                cells.append(Cell(percent(found.mean), half) if found else Cell(_ABSENT))
                sheet += [
                    (one.name, one.classes, one.metric, system, value) for value in (seeds.values if seeds else ())
                ]
            rows.append(TableRow("plain", Cell(one.name, f"{one.classes} classes, {one.metric}"), tuple(cells)))
        caption = "Classes whose names were replaced. Percent, mean over seeds; beneath, half the 95 % t-interval."
        tables.append(Table(caption, ("", *names), tuple(rows)))
        sheets.append(Sheet(f"{title}-names", ("name", "classes", "metric", "system", "value"), tuple(sheet)))
    if episodes.published:
        published = tuple(
            _plain_row(one.name, f"{one.ways}-way {one.shots}-shot", percent(one.value), one.note)
            for one in episodes.published
        )
        tables.append(Table("Published, by others' protocols.", ("", "setting", "percent", "note"), published))
    return tables, sheets


def ledger_table(costs: Sequence[tuple[str, Costs]]) -> tuple[Table, Sheet]:
    """What runs cost, and what re-encoding at every step would have."""
    rows, sheet = [], []
    for name, of in costs:
        paid = of.cache
        cells = [
            Cell(f"{of.trainable_parameters / 1e6:.2f} M"),
            Cell(", ".join(map(flops_in_words, of.fusing_flops.values())) or _ABSENT, ", ".join(of.fusing_flops)),
            Cell(duration(of.training_seconds), f"{of.peak_memory_mb:.0f} MB"),
            Cell(_ABSENT if of.evaluation_seconds is None else duration(of.evaluation_seconds)),
        ]
        if paid is None:
            cells += [Cell(_ABSENT, of.why_no_cache), Cell(_ABSENT), Cell(_ABSENT), Cell(_ABSENT)]
        else:
            loop = paid.in_loop
            times = loop.seconds / of.training_seconds if of.training_seconds else 0.0
            cells += [
                Cell(duration(paid.extraction_seconds), "once, for all runs"),
                Cell(size(paid.cache_bytes)),
                Cell(f"{loop.photos_seen:,}", f"and {loop.texts_seen:,} texts"),
                Cell(duration(loop.seconds), f"{times:.0f} times its training"),
            ]
        rows.append(TableRow("plain", Cell(name), tuple(cells)))
        sheet.append(
            (name, of.trainable_parameters, of.training_seconds, of.peak_memory_mb, of.evaluation_seconds)
            + ((None,) * 7 if paid is None else (
                paid.extraction_seconds, paid.cache_bytes, paid.in_loop.photos_seen, paid.in_loop.texts_seen,
                paid.in_loop.photo_seconds, paid.in_loop.text_seconds, paid.in_loop.seconds,
            ))
            + (" ".join(f"{protocol}={flops}" for protocol, flops in of.fusing_flops.items()),)
        )  # fmt: skip
    header = (
        "",
        "trainable parameters",
        "FLOPs a photo",
        "training",
        "evaluation",
        "extraction",
        "cache",
        "photos seen",
        "re-encoding at every step",
    )
    columns = (
        "run", "trainable_parameters", "training_seconds", "training_peak_memory_mb", "evaluation_seconds",
        "extraction_seconds", "cache_bytes", "photos_seen", "texts_seen", "photo_seconds", "text_seconds",
        "re_encoding_seconds", "fusing_flops",
    )  # fmt: skip
    return Table("What was paid, and what would have been.", header, tuple(rows)), Sheet(
        "ledger", columns, tuple(sheet)
    )


def _told(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds)


def _plain_row(head: str, *texts: str) -> TableRow:
    return TableRow("plain", Cell(head), tuple(map(Cell, texts)))


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(num_bytes: float) -> str:
    """For people."""
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"
