"""The part of a page on pairs that are told apart, and its drawings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from saffe_cache.core import figures
from saffe_cache.core.figures import Fit, FitPlot, PlanePlot
from saffe_cache.report import old_plots as plots
from saffe_cache.report.matches import METRICS, Matches, MatchSetting, OverSeeds, Plane
from saffe_cache.report.old_plots import Bars, Plot
from saffe_cache.report.sections import Section
from saffe_cache.report.tables import Cell, Sheet, Table, TableRow, percent

_DRAWN = ("concat", "cross", "cross_residual", "tokens", "ridge_products", "cosine")
"""No more than there are hues; the tables have all."""


def match_section(matches: Matches, anchor: str, sheets: list[Sheet]) -> Section:
    """Verdicts first, then the largest size; the rest is folded."""
    sheets.append(_sheet(matches, anchor))
    whole = [_setting_table(one) for one in matches.settings]
    largest = max(range(len(matches.settings)), key=lambda place: _rank(matches, matches.settings[place]))
    return Section(
        anchor=anchor,
        title=f"Does a text belong to a photo? {matches.title}",
        lead=f"Concatenation against cross-attention on {matches.features_in_words or matches.features + ' features'}, "
        f"split {matches.split}.",
        facts=[
            ("controls", _controls_in_words([one.passed for one in matches.controls])),
            *[("not measured", one) for one in matches.left_out],
        ],
        texts=[f"{one[0].upper()}{one[1:]}." for one in matches.verdict],
        table=whole[largest],
        words=list(matches.meanings.items()),
        plots=match_plots(matches, anchor),
        more=[_cost_table(matches)],
        folded=[table for place, table in enumerate(whole) if place != largest],
    )


def match_plots(matches: Matches, name: str) -> list[Plot]:
    """Accuracy by size, risk with its fits, accuracy by degradation, pairs on a plane: as far as they were measured."""
    made = [_sizes_plot(matches, f"{name}-sizes")]
    if any(one.curves for one in matches.crossovers):
        made.append(_risk_plot(matches, f"{name}-risk"))
    for kind in ("noise", "rotation"):
        levels = matches.degraded(kind)
        if levels:
            made.append(_degraded_plot(levels, kind, f"{name}-{kind}"))
    if matches.planes:
        made.append(_planes_plot(matches.planes, f"{name}-planes"))
    return made


def _rank(matches: Matches, one: MatchSetting) -> tuple[bool, int]:
    return one in matches.of_sizes, one.scale


def _controls_in_words(passed: Sequence[bool | None]) -> str:
    told = f"{len(passed)}, {passed.count(False)} of them not where they must be"
    return told + (f", {passed.count(None)} not judged" if None in passed else "")


def _seeds_in_words(setting: MatchSetting) -> str:
    return "with its 95 % t-interval over seeds" if setting.num_seeds > 1 else "one seed"


def _score_cell(score: OverSeeds) -> Cell:
    return Cell(percent(score.mean), "" if score.half is None else f"± {percent(score.half)}")


def _setting_table(setting: MatchSetting) -> Table:
    rows = []
    for name, scores in setting.systems.items():
        cells = [_score_cell(scores[metric]) for metric in METRICS]
        cells.append(Cell(percent(scores["shuffled_auc"].mean)))
        rows.append(TableRow("plain", Cell(name), tuple(cells)))
    empty = [Cell("")] * (len(METRICS) - 2)
    rows += [
        TableRow("chance", Cell(name), (Cell(percent(value)), *empty, Cell("50.0"), Cell("")))
        for name, value in (("chance", setting.chance), ("majority class", setting.majority))
    ]
    measured = ", ".join(f"{name.replace('_', ' ')} {value:z.2f}" for name, value in setting.alignment.items())
    caption = f"{setting.setting}, {setting.scale} training pairs. Percent, "
    caption += "beneath half of the 95 % t-interval." if setting.num_seeds > 1 else "one seed."
    return Table(
        caption + (f" Mean cosines: {measured}." if measured else ""),
        ("", *METRICS, "AUC, photos shuffled"),
        tuple(rows),
    )


def _cost_table(matches: Matches) -> Table:
    base = matches.cost.get("concat")
    rows = []
    for name, cost in matches.cost.items():
        ratio = f"{cost.seconds_per_1000_pairs / base.seconds_per_1000_pairs:.2f} of concat's" if base else ""
        cells = (
            Cell(f"{cost.parameters:,}"),
            Cell(f"{cost.flops_per_pair / 1e6:.2f} M"),
            Cell(f"{1000 * cost.seconds_per_1000_pairs:.1f} ms", ratio),
            Cell(f"{cost.kept_bytes_per_pair / 1e3:.1f} KB"),
        )
        rows.append(TableRow("plain", Cell(name), cells))
    header = ("", "parameters", "FLOPs a pair", "a step over 1,000 pairs", "kept for the gradient, a pair")
    return Table("What each fusion costs: two FLOPs a multiplication and addition.", header, tuple(rows))


def _sheet(matches: Matches, name: str) -> Sheet:
    header = (
        "setting",
        "negatives",
        "kind",
        "level",
        "scale",
        "system",
        "metric",
        "seed",
        "value",
        "chance",
        "majority",
    )
    rows = [
        (
            one.setting,
            one.negatives,
            one.kind,
            one.level,
            one.scale,
            system,
            metric,
            seed,
            value,
            one.chance,
            one.majority,
        )
        for one in matches.settings
        for system, scores in one.systems.items()
        for metric, score in scores.items()
        for seed, value in enumerate(score.values)
    ]
    return Sheet(name, header, tuple(rows))


def _bars(name: str, found: Sequence[OverSeeds | None]) -> Bars:
    known = [(place, score) for place, score in enumerate(found) if score is not None]
    return Bars(
        name,
        [place for place, _ in known],
        [100 * score.mean for _, score in known],
        [100 * (score.half or 0.0) for _, score in known],
    )


def _series(settings: Sequence[MatchSetting]) -> list[Bars]:
    """Accuracies of the systems that are drawn, where the last setting or several have them."""
    counts = {name: sum(name in one.systems for one in settings) for name in _DRAWN}
    names = [name for name in _DRAWN if counts[name] > 1 or name in settings[-1].systems]
    scores = {name: [one.systems.get(name) for one in settings] for name in names}
    return [_bars(name, [of["accuracy"] if of else None for of in found]) for name, found in scores.items()]


def _sizes_plot(matches: Matches, name: str) -> Plot:
    settings = matches.of_sizes
    panel = plots.Panel([f"{one.scale}" for one in settings], _series(settings))
    return plots.draw_series(
        name,
        [panel],
        [("chance", 100 * settings[0].chance)],
        ("training pairs", "accuracy, percent"),
        f"Accuracy at 1:{settings[0].negatives} by the number of training pairs, {_seeds_in_words(settings[0])}.",
        joined=True,
    )


def _degraded_plot(levels: Sequence[MatchSetting], kind: str, name: str) -> Plot:
    """The axis tells the cosines that were measured."""

    def told(one: MatchSetting) -> str:
        cosine = one.alignment.get("photos_with_clean")
        return f"{one.level:g}" if cosine is None else f"{one.level:g}\n({cosine:.2f})"

    does = {
        "noise": "Noise on photos and texts destroys what they say",
        "rotation": "A rotation of the photos parts the two spaces and keeps what they say",
    }
    return plots.draw_series(
        name,
        [plots.Panel([told(one) for one in levels], _series(levels))],
        [("majority class", 100 * levels[0].majority)],
        (f"{kind} (mean cosine with the clean photos)", "accuracy, percent"),
        f"{does[kind]}: accuracy at {levels[0].scale} pairs, {_seeds_in_words(levels[0])}.",
        joined=True,
    )


def _risk_plot(matches: Matches, name: str) -> Plot:
    curves = {system: curve for one in matches.crossovers if one.curves for system, curve in one.curves.items()}
    sizes = np.geomspace(min(one.scale for one in matches.of_sizes), max(one.scale for one in matches.of_sizes), 60)
    fits = [
        Fit(
            system,
            [
                (one.scale, 100 * (1 - value))
                for one in matches.of_sizes
                if system in one.systems
                for value in one.systems[system]["accuracy"].values
            ],
            [(float(size), float(100 * (curve.a * (size / 1000) ** -curve.b + curve.c))) for size in sizes],
        )
        for system, curve in curves.items()
    ]
    return FitPlot(
        name=name.removeprefix("old-"),
        caption="Error of each seed, and its fit a N^-b + c.",
        described=f"Error by training pairs. {'; '.join(one.words for one in matches.crossovers)}",
        x_label="training pairs",
        y_label="error, percent",
        ticks=[one.scale for one in matches.of_sizes],
        fits=fits,
    )


def _planes_plot(planes: Mapping[str, Plane], name: str) -> Plot:
    titles = {"own": "as they are", "ridge": "photos mapped by ridge"}
    return PlanePlot(
        name=name.removeprefix("old-"),
        caption="t-SNE of matching pairs, a line between partners; above, the share of photos whose nearest text on "
        "the plane is their own.",
        planes=[
            figures.Plane(f"{titles[which]}: {percent(plane.own_is_nearest)} % nearest", plane.photos, plane.texts)
            for which, plane in planes.items()
        ],
    )
