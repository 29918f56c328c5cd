"""result.json of `saffe few-pairs`: all methods in each setting, what their papers claim, and what was skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from saffe_cache.core.features import Modality, medium_of_key, nouns
from saffe_cache.core.figures import Figure, HeatMap, Panel, SeriesPlot
from saffe_cache.core.results import Estimate, Measurement, Section, series_of
from saffe_cache.core.tables import ABSENT, Cell, Row, Table, drawn, percent
from saffe_cache.fusion.registry import OF_PHOTOS_ALONE
from saffe_cache.retrieval.metrics import metric_named
from saffe_cache.studies.few_pairs.claims import CLAIMS, Verdict
from saffe_cache.studies.few_pairs.summary import FewPairsSetting
from saffe_cache.studies.harness import StudyResult

_MOST_DRAWN = 6
"""Methods in a plot, each with a hue of its own; tables and heat maps have all."""
_PLOTTED = ("recall_at_1", "top1")
"""Metrics that are drawn besides the main one, where there are any."""
_BACKWARDS = "image_to_text_"


@dataclass(frozen=True, kw_only=True)
class FewPairsCache:
    """A cache that was trained on."""

    gallery: str
    text: str
    protocol: str
    photos: int
    """Of the train split, as far as they belong to no other."""
    skipped: Mapping[str, str]
    """Methods and numbers of photos that were left out, and why."""


@dataclass(frozen=True, kw_only=True)
class FewPairsResult(StudyResult):
    """All methods on all caches."""

    verb: ClassVar[str] = "few-pairs"

    seeds: tuple[int, ...]
    closed_forms: tuple[str, ...]
    caches: Mapping[str, FewPairsCache]
    settings: tuple[FewPairsSetting, ...]
    verdicts: tuple[Verdict, ...]
    dtype: str | None = None
    """Of the matrix products of training steps; earlier results do not have it."""

    def measurements(self) -> Iterator[Measurement]:
        for setting in self.settings:
            where = f"{setting.name}, {setting.photos} photos"
            for method, of in setting.methods.items():
                for metric, score in of.scores.items():
                    yield Measurement.of(where, method, metric, score, setting.chance.get(metric))
                if of.permuted is not None:
                    name, metric = f"control: {method} of permuted pairs", setting.main_metric
                    yield Measurement(where, name, metric, of.permuted, chance=setting.chance[metric])

    def sections(self) -> list[Section]:
        names = list(dict.fromkeys(setting.name for setting in self.settings))
        found = [self._overview(names)]
        known: set[str] = set()
        for number, name in enumerate(names, start=1):
            settings = [setting for setting in self.settings if setting.name == name]
            metrics = [metric for metric in settings[0].chance if metric not in known]
            known.update(metrics)
            found.append(
                Section(
                    title=name,
                    lead=f"Reported on split {self.split}. Intervals are 95 %, "
                    f"over the reported photos, of the mean of {len(self.seeds)} seed{'s' * (len(self.seeds) > 1)}.",
                    tables=[_table(setting) for setting in settings],
                    definitions=[
                        (one, metric_named(one).description) for one in metrics if not metric_named(one).is_rank
                    ],
                    figures=[_heat_map(settings, f"methods-{number}")],
                )
            )
        media = {medium_of_key(of.gallery) for of in self.caches.values()}
        medium: Modality = media.pop() if len(media) == 1 else "media"
        return [section.spoken_of(medium) for section in found]

    def _overview(self, names: Sequence[str]) -> Section:
        """Which method is best where, the verdicts, and what is missing."""
        rows = []
        for setting in self.settings:
            method, best = next(iter(setting.methods.items()))
            lead = best.leads.get(setting.main_metric)
            cells = (
                Cell(method),
                best.scores[setting.main_metric].cell(),
                Cell(setting.reference),
                setting.methods[setting.reference].scores[setting.main_metric].cell(),
                Cell(lead.points() if lead else ABSENT),
            )
            rows.append(Row(Cell(f"{setting.name}, {setting.photos:,}"), cells))
        metric = " or ".join(dict.fromkeys(setting.main_metric for setting in self.settings))
        header = (
            "cache, photos",
            "best method",
            f"its {metric}",
            "best closed form",
            f"its {metric}",
            "lead, in points",
        )
        skipped = [
            (f"{name} skips {', '.join(what)}", why)
            for name, of in self.caches.items()
            for why, what in _by_reason(of.skipped).items()
        ]
        facts = [
            (name, f"{of.gallery} with {of.text}, {of.photos:,} {nouns([medium_of_key(of.gallery)])}")
            for name, of in self.caches.items()
        ]
        steps = [("training steps", f"matrix products in {self.dtype}")] if self.dtype else []
        return Section(
            title=f"What to train with few pairs: {self.title}",
            lead="The best closed form is chosen by its validation score; the best method, by the numbers shown.",
            tables=[Table("The best method for each number of photos.", header, tuple(rows))],
            texts=[
                *self._of_default(),
                *(verdict.sentence for verdict in self.verdicts),
                *self._without_claims(),
            ],
            facts=[*facts, *steps, *skipped],
            figures=self._plots(names),
        )

    def _of_default(self) -> list[str]:
        """Whether the default is above all other methods, in each setting that it was trained in."""
        found = []
        for setting in self.settings:
            leads = {name: of.default_leads.get(setting.main_metric) for name, of in setting.methods.items()}
            not_above = [name for name, lead in leads.items() if lead and lead.sign <= 0]
            if not any(leads.values()):
                continue
            above = sum(lead is not None and lead.sign > 0 for lead in leads.values())
            rest = f"; not above {', '.join(not_above)}" if not_above else ""
            found.append(f"{setting.name}, {setting.photos:,}: above {above} of {above + len(not_above)}{rest}")
        return [f"{OF_PHOTOS_ALONE}, the default, by intervals that exclude 0. {'. '.join(found)}."] if found else []

    def _without_claims(self) -> list[str]:
        """The methods that have no verdict."""
        judged = {verdict.method for verdict in self.verdicts} | {claim.against for claim in CLAIMS.values()}
        others = dict.fromkeys(method for of in self.settings for method in of.methods if method not in judged)
        return [f"No claim is tested for {', '.join(others)}."] if others else []

    def _plots(self, names: Sequence[str]) -> list[Figure]:
        """The main metrics and R@1 over the number of photos, in settings that share a metric."""
        metrics = [setting.main_metric for setting in self.settings]
        metrics += [metric for metric in _PLOTTED for setting in self.settings if metric in setting.chance]
        return [self._plot(metric, names) for metric in dict.fromkeys(metrics)]

    def _plot(self, metric: str, names: Sequence[str]) -> SeriesPlot:
        panels, drawn_methods, level = [], self._drawn(metric), []
        for name in names:
            settings = [one for one in self.settings if one.name == name and metric in one.chance]
            if not settings:
                continue
            level.append(settings[0].chance[metric])
            series = []
            for method in drawn_methods:
                found = [one.methods.get(method) for one in settings]
                estimates = [of.scores[metric] if of else None for of in found]
                if any(estimates):
                    series.append(series_of(method, estimates))
            panels.append(Panel([f"{one.photos:,}" for one in settings], series, title=name))
        caption = f"{metric} over the number of photos, mean over seeds with its 95 % interval over reported photos"
        count = len({method for of in self.settings for method in of.methods})
        left_out = f"; {len(drawn_methods)} of {count} methods, the others are in the tables" * (
            len(drawn_methods) < count
        )
        return SeriesPlot(
            name=metric.replace("_", "-"),
            caption=f"{caption}{left_out}.",
            x_label="photos",
            y_label=f"{metric}, percent",
            panels=panels,
            levels=[("chance", 100 * level[0])] if len(set(level)) == 1 else [],
            joined=True,
        )

    def _drawn(self, metric: str) -> list[str]:
        """The references, our default, and the methods of the best mean rank."""
        settings = [one for one in self.settings if metric in one.chance]
        ranks: dict[str, list[int]] = {}
        for setting in settings:
            for rank, method in enumerate(setting.methods):
                ranks.setdefault(method, []).append(rank)
        most = max(map(len, ranks.values()))
        everywhere = [method for method, of in ranks.items() if len(of) == most]
        best = sorted(everywhere, key=lambda method: sum(ranks[method]))
        first = [setting.reference for setting in settings][-1:] + [OF_PHOTOS_ALONE] * (OF_PHOTOS_ALONE in ranks)
        return list(dict.fromkeys((*first, *best)))[:_MOST_DRAWN]


def _by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for what, why in skipped.items():
        found.setdefault(why, []).append(what)
    return found


def _table(setting: FewPairsSetting) -> Table:
    """All methods in one setting, ranked."""
    main = setting.main_metric
    first = [main, *(metric for metric in _PLOTTED if metric in setting.chance and metric != main)]
    others = [metric for metric in setting.chance if metric not in first and not metric_named(metric).is_rank]
    others.sort(key=lambda metric: metric.startswith(_BACKWARDS))
    rows = [Row(Cell("chance"), _chance_cells(setting, first, others), "chance")]
    for rank, (method, of) in enumerate(setting.methods.items(), start=1):
        cells = [cell for metric in first for cell in (of.scores[metric].cell(), _lead_cell(of.leads.get(metric)))]
        cells.append(_lead_cell(of.default_leads.get(main)))
        cells += [Cell(percent(of.scores[metric].value)) for metric in others]
        control = ABSENT if of.permuted is None else percent(of.permuted)
        cells += [Cell(control), Cell(f"{of.seconds:.1f}"), Cell(_count(of.parameters))]
        is_reference = method == setting.reference
        rows.append(Row(Cell(f"{rank}. {method}"), tuple(cells), "baseline" if is_reference else "plain"))
    header = [name for metric in first for name in (metric, f"above {setting.reference}")]
    counts = f"{setting.train_photos:,} to train on, {drawn(setting.validation_photos, 0)} to validate on"
    return Table(
        f"{setting.photos:,} photos: {counts}. Percent; leads in points, paired over photos.",
        ("", *header, f"{OF_PHOTOS_ALONE} above it: {main}", *others, f"permuted: {main}", "training s", "parameters"),
        tuple(rows),
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters >= 1e6 else f"{parameters / 1e3:.1f} K"


def _chance_cells(setting: FewPairsSetting, first: Sequence[str], others: Sequence[str]) -> tuple[Cell, ...]:
    cells = [cell for metric in first for cell in (Cell(percent(setting.chance[metric])), Cell(""))]
    cells += [Cell(""), *(Cell(percent(setting.chance[metric])) for metric in others)]
    return (*cells, Cell(percent(setting.chance[setting.main_metric])), Cell(""), Cell(""))


def _lead_cell(lead: Estimate | None) -> Cell:
    if lead is None:
        return Cell(ABSENT)
    value, _, interval = lead.points().partition(" ")
    return Cell(value, interval)


def _heat_map(settings: Sequence[FewPairsSetting], name: str) -> HeatMap:
    """All methods, ranked by the largest number of photos."""
    last = settings[-1]
    main, methods = last.main_metric, dict.fromkeys(method for one in (last, *settings) for method in one.methods)
    found = [[one.methods.get(method) for one in settings] for method in methods]
    return HeatMap(
        name=name,
        caption=f"{main} of all methods in percent, by the number of photos; smaller, the lead above the best closed "
        "form in points.",
        row_label="method",
        column_label="photos",
        rows=list(methods),
        columns=[f"{one.photos:,}" for one in settings],
        cells=[[100 * of.scores[main].value if of else None for of in row] for row in found],
        notes=[[f"{100 * of.leads[main].value:+.1f}" if of and of.leads else "" for of in row] for row in found],
    )
