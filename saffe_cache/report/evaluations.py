"""The part of a page that shows one evaluation: results, curves, confusion."""

from __future__ import annotations

import numpy as np

from saffe_cache.evaluation.cost import flops_in_words
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
    metrics, details = evaluation.metrics, evaluation.details
    table, sheet = tables.results_table(evaluation, anchor)
    sheets.append(sheet)
    section = Section(
        anchor=anchor,
        title=name,
        lead=f"{metrics.definition[:1].upper()}{metrics.definition[1:]}.",
        facts=_evaluation_facts(evaluation),
        table=table,
        words=[(metric, tables.metric_words(metric)) for metric in table.header[1:]],
        texts=_sentences(evaluation),
        plots=[_dots(evaluation, f"{anchor}-systems")],
        details=details,
        is_sound=evaluation.spec.gallery_key.startswith("audio-"),
    )
    if details is not None:
        sheets.append(tables.per_query_sheet(evaluation, f"{anchor}-queries"))
        if details.systems["fam"].classes is not None:
            _add_classes(section, evaluation, details, sheets)
    return section


def _evaluation_facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    metrics, spec = evaluation.metrics, evaluation.spec
    return [
        ("cache", str(metrics.config.get("cache", ""))),
        ("gallery encoder", f"{spec.gallery_key}, layers {', '.join(map(str, spec.gallery_layers))}"),
        (
            "text encoder",
            spec.text_key + (f", layers {', '.join(map(str, spec.text_layers))}" if spec.text_layers else ""),
        ),
        ("fusion", f"{spec.shape.fusion}, head {spec.shape.head}, beside a photo in training: {spec.gallery_text}"),
        ("trained on", f"split {spec.train_split}; the epoch was chosen on {spec.validation}; seed {spec.seed}"),
        ("reported on", f"split {metrics.split}, seed {metrics.config.get('seed', '')}"),
        ("FLOPs of fusing one photo", flops_in_words(metrics.cost.fusing_flops)),
        ("unusable items", str(metrics.num_unusable_items)),
        ("versions", ", ".join(f"{name} {version}" for name, version in metrics.versions.items())),
    ]


def _sentences(evaluation: Evaluation) -> list[str]:
    """What does not fit a table: differences, sensitivity, duplicates, absent systems."""
    metrics = evaluation.metrics
    told = []
    for name, of in metrics.differences.items():
        parts = [
            f"{metric} {100 * one.mean:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
            for metric, one in of.items()
        ]
        told.append(
            f"FAM less {name}, the best of the baselines there, by paired bootstrap over photos: {', '.join(parts)}."
        )
    moves = ", ".join(f"{part.removeprefix('to_')} {value:.2f}" for part, value in metrics.sensitivity.items())
    shared = ", ".join(f"{count} {name}" for name, count in metrics.duplicates.items())
    told.append(f"How far the fused vector moves with another, 0 to 2: {moves}. Shared with training: {shared}.")
    told += [f"{name} is absent: {why}." for name, why in metrics.absent.items()]
    return told


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
            number = of.scores[main]
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
