"""What a page shows of the details of an evaluation where classes search: curves, classes, confusion."""

from __future__ import annotations

import numpy as np

from saffe_cache.core.figures import ClassPlot, Curve, CurvePlot, HeatMap
from saffe_cache.core.sections import Section
from saffe_cache.core.tables import Table, percent, plain_row
from saffe_cache.evaluation.details import RECALLS, Details

_MOST_CLASSES = 24
"""Drawn one by one; of more, the worst."""
_MOST_CONFUSED = 12
_MOST_CURVES, _MOST_BARS = 6, 3
"""Systems that are drawn."""


def show_classes(section: Section, details: Details, ranked: list[str]) -> None:
    """Add precision over recall, average precision of each class, and confusion to a page's section.

    `ranked`: the systems to draw, the FAM first and the best baselines next.
    """
    shown = [name for name in ranked if name in details.systems]
    if details.systems[shown[0]].classes is None:
        return
    section.figures += [_precision_recall(details, shown[:_MOST_CURVES]), _per_class(details, shown[:_MOST_BARS])]
    classes = details.systems[shown[0]].classes
    assert classes is not None
    counts, names = classes.confusion, details.class_names
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    if len(names) <= _MOST_CLASSES:
        section.figures.append(
            HeatMap(
                name="confusion",
                caption="Confusion of the FAM: percent of each class's photos, by the class whose text is nearest.",
                row_label="true class",
                column_label="nearest class text",
                rows=names,
                columns=names,
                cells=(100 * shares).tolist(),
                texts=[[f"{100 * share:.0f}" if share >= 0.005 else "" for share in row] for row in shares],
            )
        )
    confused = _confused(names, counts, shares)
    section.tables += [confused] if confused.rows else []


def _precision_recall(details: Details, shown: list[str]) -> CurvePlot:
    curves = []
    for name in shown:
        of = details.systems[name].classes
        if of is not None:
            curves.append(Curve(_label(name), (100 * RECALLS).tolist(), (100 * of.precision.mean(axis=0)).tolist()))
    return CurvePlot(
        name="precision-recall",
        caption="Precision over recall, mean over classes; interpolated for this drawing only (map is not).",
        x_label="recall, percent",
        y_label="precision, percent",
        curves=curves,
        y_limits=(0, 103),
    )


def _per_class(details: Details, shown: list[str]) -> ClassPlot:
    values = details.systems[shown[0]].metric
    worst = np.argsort(values, kind="stable")[:_MOST_CLASSES]
    left_out = f"; the {_MOST_CLASSES} worst of {len(values)} classes" if len(values) > _MOST_CLASSES else ""
    return ClassPlot(
        name="per-class",
        caption=f"Average precision of each class, not interpolated, worst first{left_out}.",
        label="average precision, percent",
        classes=[details.query_classes[query] for query in worst],
        systems=[(_label(name), (100 * details.systems[name].metric[worst]).tolist()) for name in shown],
    )


def _confused(names: tuple[str, ...], counts: np.ndarray, shares: np.ndarray) -> Table:
    """The pairs of classes that are confused most."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSED]
    places = zip(*np.unravel_index(order, wrong.shape), strict=True)
    rows = tuple(
        plain_row(names[true], names[nearest], str(wrong[true, nearest]), percent(shares[true, nearest]))
        for true, nearest in places
        if wrong[true, nearest]
    )
    header = ("true class", "nearest class text", "photos", "percent of the class")
    return Table("What the FAM confuses most.", header, rows, folded=True)


def _label(name: str) -> str:
    return "FAM" if name == "fam" else name
