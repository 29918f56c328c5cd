"""The part of a page that shows one evaluation: results, curves, confusion."""

from __future__ import annotations

import numpy as np

from saffe_cache.evaluation.details import RECALLS, Details
from saffe_cache.report import plots, tables
from saffe_cache.report.plots import Curve, Dot, Plot
from saffe_cache.report.reading import Evaluation
from saffe_cache.report.sections import Section
from saffe_cache.report.tables import Sheet, Table

_MOST_CLASSES = 24
"""Drawn one by one; of more, the worst."""
_MOST_CONFUSED = 12


def evaluation_section(evaluation: Evaluation, name: str, anchor: str, sheets: list[Sheet]) -> Section:
    details = evaluation.details
    [shared] = evaluation.metrics.page_sections(evaluation.path)
    sheets.append(tables.results_sheet(evaluation, anchor))
    section = Section(
        anchor=anchor,
        title=name,
        lead=f"{shared.title}. {shared.lead}",
        facts=shared.facts,
        table=shared.tables[0],
        words=shared.definitions,
        texts=shared.texts,
        plots=[_dots(evaluation, f"{anchor}-systems")],
        details=details,
        is_sound=evaluation.metrics.run.gallery_key.startswith("audio-"),
    )
    if details is not None:
        sheets.append(tables.per_query_sheet(evaluation, f"{anchor}-queries"))
        if details.systems["fam"].classes is not None:
            _add_classes(section, evaluation, details, sheets)
    return section


def _dots(evaluation: Evaluation, name: str) -> Plot:
    metrics = evaluation.metrics
    main = metrics.main_metric
    dots = []
    for system in ["fam", *metrics.ranked_baselines()]:
        number = metrics.systems[system][main]
        low, high = (None if bound is None else 100 * bound for bound in (number.low, number.high))
        label = "FAM" if system == "fam" else system
        dots.append(Dot(label, 100 * number.value, low, high, "fam" if system == "fam" else "baseline"))
    for control, of in metrics.controls.items():
        if main == of.metric:
            number = metrics.control_scores[control][main]
            low, high = (None if bound is None else 100 * bound for bound in (number.low, number.high))
            dots.append(Dot(control, 100 * number.value, low, high, "control"))
    return plots.draw_dots(name, dots, ("chance", 100 * metrics.systems["fam"][main].chance), main)


def _add_classes(section: Section, evaluation: Evaluation, details: Details, sheets: list[Sheet]) -> None:
    """Precision–recall, average precision of each class, and confusion."""
    anchor = section.anchor
    shown = ["fam", *(name for name in evaluation.metrics.ranked_baselines() if name in details.systems)]
    curves = []
    for name in shown[:6]:
        of = details.systems[name].classes
        if of is not None:
            curves.append(Curve(_label(name), (100 * RECALLS).tolist(), (100 * of.precision.mean(axis=0)).tolist()))
    section.plots.append(
        plots.draw_curves(
            f"{anchor}-precision-recall",
            curves,
            ("recall, percent", "precision, percent"),
            "Precision over recall, mean over classes; interpolated for drawing alone (the map above is not).",
            (0, 103),
        )
    )
    sheets.append(
        Sheet(
            f"{anchor}-precision-recall",
            ("system", "class", "recall", "precision"),
            tuple(
                (name, class_name, float(recall), float(precision))
                for name, of in details.systems.items()
                if of.classes is not None
                for class_name, curve in zip(details.query_classes, of.classes.precision, strict=True)
                for recall, precision in zip(RECALLS, curve, strict=True)
            ),
        )
    )
    fam = details.systems["fam"]
    worst = np.argsort(fam.metric, kind="stable")[:_MOST_CLASSES]
    left_out = f"; the {_MOST_CLASSES} worst of {len(fam.metric)} classes" if len(fam.metric) > _MOST_CLASSES else ""
    section.plots.append(
        plots.draw_per_class(
            f"{anchor}-per-class",
            [details.query_classes[query] for query in worst],
            [(_label(name), (100 * details.systems[name].metric[worst]).tolist()) for name in shown[:3]],
            f"Average precision of each class, not interpolated, worst first{left_out}.",
        )
    )
    _add_confusion(section, details, sheets)


def _add_confusion(section: Section, details: Details, sheets: list[Sheet]) -> None:
    of, names = details.systems["fam"].classes, details.class_names
    assert of is not None
    counts = of.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    if len(names) <= _MOST_CLASSES:
        texts = [[f"{100 * share:.0f}" if share >= 0.005 else "" for share in row] for row in shares]
        section.plots.append(
            plots.draw_grid(
                f"{section.anchor}-confusion",
                shares,
                texts,
                (names, names),
                ("nearest class text", "true class"),
                "Confusion of the FAM: percent of each class's photos, by the class whose text is nearest.",
                "Confusion matrix; its numbers are in the CSV and the worst pairs in the table",
            )
        )
    sheets.append(
        Sheet(
            f"{section.anchor}-confusion",
            ("system", "true", "nearest", "photos"),
            tuple(
                (name, names[true], names[nearest], int(of.classes.confusion[true, nearest]))
                for name, of in details.systems.items()
                if of.classes is not None
                for true, nearest in zip(*np.nonzero(of.classes.confusion), strict=True)
            ),
        )
    )
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSED]
    rows = []
    for true, nearest in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[true, nearest]:
            cells = (
                tables.Cell(names[nearest]),
                tables.Cell(str(wrong[true, nearest])),
                tables.Cell(tables.percent(shares[true, nearest])),
            )
            rows.append(tables.TableRow("plain", tables.Cell(names[true]), cells))
    if rows:
        header = ("true class", "nearest class text", "photos", "percent of the class")
        section.folded.append(Table("What the FAM confuses most.", header, tuple(rows)))


def _label(name: str) -> str:
    return "FAM" if name == "fam" else name
