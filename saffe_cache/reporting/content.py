"""What a page says: notices, then evaluations with plots and galleries, sweeps, episodes, trainings and costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np

from saffe_cache.evaluation.details import RECALLS, Details
from saffe_cache.reporting import plots, tables
from saffe_cache.reporting.ablations import Ablation, spread
from saffe_cache.reporting.episodes import Episodes
from saffe_cache.reporting.galleries import Card, make_cards
from saffe_cache.reporting.ledger import BASIS, Costs, costs_of
from saffe_cache.reporting.photos import Album
from saffe_cache.reporting.plots import Bars, Curve, Dot, Plot
from saffe_cache.reporting.reading import Evaluation, LogLine, Material, Metrics, Run
from saffe_cache.reporting.tables import Sheet, Table

_MOST_CLASSES = 24
"""Drawn one by one; of more, the worst."""
_MOST_CONFUSED = 12


@dataclass(frozen=True)
class Notice:
    """Something that a reader must know before the numbers."""

    kind: str
    """failure, warning or note."""
    where: str
    text: str


@dataclass(kw_only=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    lead: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Paragraphs below the first table."""
    table: Table | None = None
    words: list[tuple[str, str]] = field(default_factory=list)
    """Metrics and what they are."""
    plots: list[Plot] = field(default_factory=list)
    more: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    details: Details | None = None
    is_sound: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Of queries for the galleries."""

    asked: Sequence[str]
    num_random: int
    num_extreme: int


@dataclass(kw_only=True)
class Content:
    """All of a page."""

    notices: list[Notice]
    num_controls: int
    sections: list[Section]
    album: Album
    sheets: list[Sheet]

    @property
    def plots(self) -> list[Plot]:
        return [plot for section in self.sections for plot in section.plots]


def make_content(material: Material, album: Album, choice: Choice) -> Content:
    """Everything but the page itself."""
    names = short_names([one.path for one in material.evaluations])
    runs = short_names([run.path for run in material.runs])
    content = Content(
        notices=_notices(material, names),
        num_controls=sum(len(one.metrics.controls) for one in material.evaluations),
        sections=[],
        album=album,
        sheets=[],
    )
    for number, (evaluation, name) in enumerate(zip(material.evaluations, names, strict=True), start=1):
        content.sections.append(_evaluation_section(evaluation, name, f"evaluation-{number}", content.sheets))
    for section, evaluation in zip(content.sections, material.evaluations, strict=True):
        if evaluation.details is not None:
            section.cards = make_cards(evaluation, choice.asked, choice.num_random, choice.num_extreme)
            album.add(evaluation, {place for card in section.cards for place in card.places})
    album.keep_first(_in_turn(content.sections))
    content.notices += _missing_photos(content)
    for number, (ablation) in enumerate(material.ablations, start=1):
        content.sections.append(_ablation_section(ablation, f"ablation-{number}", content.sheets))
    for number, episodes in enumerate(material.episodes, start=1):
        content.sections.append(_episodes_section(episodes, f"episodes-{number}", content.sheets))
    for number, (run, name) in enumerate(zip(material.runs, runs, strict=True), start=1):
        content.sections.append(_run_section(run, name, f"run-{number}", content.sheets))
    if material.runs:
        costs = [(name, _costs(run, material)) for run, name in zip(material.runs, runs, strict=True)]
        content.sections.append(_ledger_section(costs, content.sheets))
    return content


def short_names(paths: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 2
    while depth < 12 and len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return [" / ".join(part[-depth:]) for part in parts]


def _notices(material: Material, names: Sequence[str]) -> list[Notice]:
    """Failures first, then warnings, then notes."""
    found = []
    for evaluation, name in zip(material.evaluations, names, strict=True):
        metrics = evaluation.metrics
        found += [Notice("failure", name, f"{text}. Do not use these numbers.") for text in metrics.failures]
        found += [Notice("warning", name, text) for text in metrics.warnings]
        found += _beaten(metrics, name)
        if evaluation.details is None:
            text = "it was written by an earlier release, without details of single queries: no galleries and curves. "
            found.append(Notice("note", name, text + "Run saffe-index-eval again."))
    for ablation in material.ablations:
        for series in ablation.series:
            for point in series.points:
                where = f"{ablation.title}: {series.name}, {' / '.join(filter(None, (point.x, point.y)))}"
                found += [Notice("failure", where, f"{text}. Do not use these numbers.") for text in point.failures]
    for episodes in material.episodes:
        found += [Notice("failure", episodes.title, f"{text}. Do not use these numbers.") for text in episodes.failures]
    order = ("failure", "warning", "note")
    return sorted(found, key=lambda notice: order.index(notice.kind))


def _beaten(metrics: Metrics, name: str) -> list[Notice]:
    """Where a baseline of the same cache finds more than the FAM."""
    main, best = metrics.main_metric, metrics.ranked_baselines()[:1]
    own = metrics.systems["fam"][main].value
    if not best or metrics.systems[best[0]][main].value <= own:
        return []
    value = tables.percent(metrics.systems[best[0]][main].value)
    return [
        Notice("note", name, f"the baseline {best[0]} finds more than the FAM: {main} {value}, {tables.percent(own)}.")
    ]


def _in_turn(sections: Sequence[Section]) -> Iterator[bytes]:
    """The photos of every section's first card, then of every second, so that none takes another's room."""
    for cards in zip_longest(*(section.cards for section in sections)):
        for section, card in zip(sections, cards, strict=True):
            if card is not None and section.details is not None:
                yield from (section.details.photo_hashes[place].tobytes() for place in sorted(card.places))


def _missing_photos(content: Content) -> list[Notice]:
    found = []
    for section in content.sections:
        if section.details is None or section.is_sound:
            continue
        hashes = section.details.photo_hashes
        shown = {hashes[place].tobytes() for card in section.cards for place in card.places}
        reasons = [content.album.reasons[one] for one in shown if one not in content.album.thumbnails]
        if reasons:
            common = max(sorted(set(reasons)), key=reasons.count)
            text = f"{len(reasons)} of the {len(shown)} photos of its gallery are not shown: {common}."
            found.append(Notice("note", section.title, text))
    return found


def _evaluation_section(evaluation: Evaluation, name: str, anchor: str, sheets: list[Sheet]) -> Section:
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


def _run_section(run: Run, name: str, anchor: str, sheets: list[Sheet]) -> Section:
    result = run.result
    section = Section(
        anchor=anchor,
        title=f"Training of {name}",
        facts=[
            ("photos", f"{result.train_photos} to train, {result.validation_photos} to validate"),
            (
                "kept",
                f"epoch {result.best_epoch} of {max((line.epoch for line in run.log), default=0)}, at validation "
                f"{result.validation_score} {tables.percent(result.best_validation_score)}",
            ),
            ("steps", f"{result.steps} in {tables.duration(result.seconds)}"),
            ("parameters", f"{result.trainable_parameters:,}"),
            ("objective", ", ".join(f"{name}={weight}" for name, weight in _objective(run)) or "default"),
        ],
    )
    if run.log:
        logs = {"run": run.log, "control: permuted pairs": run.permuted_log}
        losses = [_curve(name, log, "loss", 1) for name, log in logs.items()]
        scores = [_curve(name, log, "validation_score", 100) for name, log in logs.items()]
        section.plots.append(
            plots.draw_training(
                f"{anchor}-training",
                [one for one in losses if one.xs],
                [one for one in scores if one.xs],
                result.best_epoch,
                f"{result.validation_score}, percent",
                "Training curves. Dotted: the epoch that is kept. The control was trained on permuted pairs.",
            )
        )
        rows = tuple(
            (which, line.epoch, line.loss, line.validation_score, line.seconds)
            for which, log in logs.items()
            for line in log
        )
        sheets.append(Sheet(f"{anchor}-training", ("which", "epoch", "loss", "validation_score", "seconds"), rows))
    return section


def _objective(run: Run) -> list[tuple[str, object]]:
    """Losses and their weights, where the config names some."""
    return list(dict(run.config.get("objective") or {}).items())


def _curve(name: str, log: Sequence[LogLine], column: str, factor: float) -> Curve:
    known = [(line.epoch, factor * getattr(line, column)) for line in log if getattr(line, column) is not None]
    return Curve(name, [epoch for epoch, _ in known], [value for _, value in known])


def _costs(run: Run, material: Material) -> Costs:
    place = run.path.resolve()
    return costs_of(run, [one for one in material.evaluations if one.path.resolve().parent == place])


def _ledger_section(costs: Sequence[tuple[str, Costs]], sheets: list[Sheet]) -> Section:
    table, sheet = tables.ledger_table(costs)
    sheets.append(sheet)
    return Section(anchor="ledger", title="Cost ledger", lead=BASIS, table=table)


def _ablation_section(ablation: Ablation, anchor: str, sheets: list[Sheet]) -> Section:
    points, sheet = tables.points_table(ablation, anchor)
    sheets.append(sheet)
    section = Section(
        anchor=anchor,
        title=ablation.title,
        lead=ablation.question,
        facts=[
            ("dataset", ablation.dataset),
            ("reported on", f"{ablation.protocol} protocol, split {ablation.split}"),
            ("metric", f"{ablation.metric}: {tables.metric_words(ablation.metric)}"),
            *([("definition", ablation.definition)] if ablation.definition else []),
        ],
        folded=[points],
    )
    if ablation.y_label is None:
        section.plots.append(_series_plot(ablation, anchor))
    else:
        section.plots += [
            _heat_map(ablation, number, f"{anchor}-{number + 1}") for number in range(len(ablation.series))
        ]
    section.more += [table for table in (tables.baselines_table(ablation), tables.published_table(ablation)) if table]
    section.more.append(tables.sweep_ledger(ablation))
    return section


def _series_plot(ablation: Ablation, name: str) -> Plot:
    places = ablation.xs
    series = []
    for one in ablation.series:
        found = {point.x: spread(point.values[ablation.metric]) for point in one.points}
        series.append(_bars(one.name, places, {x: (of.mean, of.half_interval or 0.0) for x, of in found.items()}))
    at = {x: ablation.baselines_at(x) for x in places}
    names = dict.fromkeys(name for of in at.values() for name in of)
    dashed = [_bars(name, places, {x: (of[name], 0.0) for x, of in at.items() if name in of}) for name in names]
    levels = [(line.name, 100 * line.value) for line in ablation.lines if line.metric == ablation.metric]
    levels += [("chance", 100 * statistics.mean(ablation.chance))]
    published = [(one.name, places.index(one.x or ""), 100 * one.value) for one in ablation.comparable()]
    return plots.draw_series(
        name,
        places,
        series,
        dashed,
        levels,
        published,
        (ablation.x_label, f"{ablation.metric}, percent"),
        "Mean over seeds with its 95 % t-interval. Dashed: baselines of the same points. Dotted: chance and levels "
        "that no setting changes." + (" Hollow stars: published, in the same metric." if published else ""),
        joined=len(places) > 1,
    )


def _bars(name: str, places: Sequence[str], found: Mapping[str, tuple[float, float]]) -> Bars:
    """Of fractions by place: mean and half interval."""
    known = [(places.index(x), 100 * mean, 100 * half) for x, (mean, half) in found.items()]
    return Bars(name, [place for place, _, _ in known], [mean for _, mean, _ in known], [half for _, _, half in known])


def _heat_map(ablation: Ablation, number: int, name: str) -> Plot:
    series = ablation.series[number]
    xs = list(dict.fromkeys(point.x for point in series.points))
    ys = list(dict.fromkeys(point.y or "" for point in series.points))
    cells = np.full((len(ys), len(xs)), np.nan)
    texts = [[""] * len(xs) for _ in ys]
    for point in series.points:
        mean = 100 * spread(point.values[ablation.metric]).mean
        row, column = ys.index(point.y or ""), xs.index(point.x)
        cells[row, column], texts[row][column] = mean, f"{mean:.1f}"
    told = "; ".join(f"{x}, {y}: {texts[row][column]}" for row, y in enumerate(ys) for column, x in enumerate(xs))
    return plots.draw_grid(
        name,
        cells,
        texts,
        (ys, xs),
        (ablation.x_label, ablation.y_label or ""),
        f"{series.name}: {ablation.metric} in percent, mean over seeds; intervals are in the table and the CSV.",
        f"{ablation.metric} by {ablation.x_label} and {ablation.y_label}: {told}",
    )


def _episodes_section(episodes: Episodes, anchor: str, sheets: list[Sheet]) -> Section:
    made, new = tables.episodes_tables(episodes, anchor)
    sheets += new
    section = Section(anchor=anchor, title=episodes.title, table=made[0])
    section.more += made[1:]
    if episodes.settings:
        names = [setting.name for setting in episodes.settings]

        series = [
            _bars(
                system,
                names,
                {
                    setting.name: (setting.systems[system].mean, setting.systems[system].half_interval)
                    for setting in episodes.settings
                    if system in setting.systems
                },
            )
            for system in episodes.systems
        ]
        chance = _bars("chance", names, {setting.name: (setting.chance, 0.0) for setting in episodes.settings})
        section.plots.append(
            plots.draw_series(
                anchor,
                names,
                series,
                [chance],
                [],
                [],
                ("episodes", "accuracy, percent"),
                "Accuracy with its 95 % interval over episodes. Hollow: chance.",
                joined=False,
            )
        )
    return section
