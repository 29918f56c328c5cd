"""Named variants of one cache over several seeds, in one table: a sweep whose axis is the variant's name.

A pipeline gives the rows; finished runs are not repeated. The baselines depend on the data and on what is held out, not
on the variant: they are fitted once, for the first run.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saffe_cache.core.outputs import RESULT
from saffe_cache.core.tables import Cell, Row, Table, percent, plain_row
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.details import FAM
from saffe_cache.evaluation.evaluate import evaluate
from saffe_cache.evaluation.results import EvaluationResult
from saffe_cache.studies.sweep import recipe
from saffe_cache.studies.sweep.ablate import sweep
from saffe_cache.studies.sweep.recipe import AblateConfig
from saffe_cache.studies.sweep.result import SweepPoint, SweepResult


@dataclass(frozen=True)
class Variant:
    """One row: what is changed in TrainConfig, and the protocols that it is reported under."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    protocols: tuple[str, ...] | None = None
    """None for those of the table."""


@dataclass(frozen=True)
class Measured:
    """All variants under one protocol."""

    variants: SweepResult
    first: EvaluationResult
    """Of the first variant's first seed, with all baselines."""
    first_folder: Path

    @property
    def points(self) -> list[SweepPoint]:
        return [point for series in self.variants.series for point in series.points]

    def table(self, metrics: Sequence[str], control: str) -> Table:
        """Percent, mean ± standard deviation over seeds; below, baselines and chance.

        Args:
            metrics: the columns; the control is shown for the first.
            control: its name.
        """
        rows = [_variant_row(point, metrics, control) for point in self.points]
        for name, scores in self.first.systems.items():
            if name != FAM:
                cells = (percent(scores[metric].value) if metric in scores else "" for metric in metrics)
                rows.append(plain_row(f"*{name}*", *cells, *[""] * 5))
        chances = (percent(self.first.systems[FAM][metric].chance) for metric in metrics)
        rows.append(plain_row("*chance*", *chances, *[""] * 5))
        costs = (f"{control}: {metrics[0]}", "controls", "parameters", "seconds", "MB")
        return Table("", ("variant", *metrics, *costs), tuple(rows))


@dataclass(frozen=True, kw_only=True)
class Variants:
    """Several variants of one cache."""

    cache: str
    work: Path
    rows: Sequence[Variant]
    protocols: tuple[str, ...]
    split: str
    seeds: Sequence[int] = (0,)
    shared: Mapping[str, Any] = field(default_factory=dict)
    """What all variants change in TrainConfig."""
    workers: int | None = None
    """Training processes; None for the sweep's own choice."""

    def run(self) -> dict[str, Measured]:
        """By protocol."""
        protocols = dict.fromkeys(one for row in self.rows for one in row.protocols or self.protocols)
        return {protocol: self._measure(protocol) for protocol in protocols}

    def _measure(self, protocol: str) -> Measured:
        rows = [row for row in self.rows if protocol in (row.protocols or self.protocols)]
        given = recipe.Recipe(
            path=protocol,
            title=f"{protocol} protocol",
            question="Which variant finds most?",
            x_label="variant",
            seeds=tuple(self.seeds),
            cells=tuple(
                recipe.Cell(series="FAM", x=row.name, y=None, settings={**self.shared, **row.changes}) for row in rows
            ),
        )
        config = AblateConfig(
            recipe=(),
            cache=self.cache,
            out=str(self.work),
            split=self.split,
            protocol=protocol,
            baselines="none",
            together=1,
            workers=self.workers,
        )
        [folder] = sweep(config, {protocol: given})
        variants = SweepResult.load(folder)
        run = (Path(folder) / variants.series[0].points[0].reports[0]).resolve().parent
        out = run / f"{self.split}-{protocol}-baselines"
        if not (out / RESULT).exists():
            evaluate(EvaluateConfig(cache=self.cache, run=str(run), split=self.split, protocol=protocol, out=str(out)))
        return Measured(variants, EvaluationResult.load(out), out)


def failures(measured: Mapping[str, Measured]) -> Iterator[str]:
    """Every failed control, with its protocol, variant and seed."""
    return (f"{protocol}, {text}" for protocol, of in measured.items() for text in of.variants.failures)


def _variant_row(point: SweepPoint, metrics: Sequence[str], control: str) -> Row:
    failed = len({text.partition(":")[0] for text in point.failures})
    texts = [
        *(_spread(point.values.get(metric)) for metric in metrics),
        _spread(point.controls[control].get(metrics[0])),
        f"{failed} of {len(point.seeds)} fail" if failed else "hold",
        f"{point.trainable_parameters / 1e6:.2f} M",
        f"{statistics.mean(point.training_seconds):.0f}",
        f"{max(point.training_peak_memory_mb)}",
    ]
    return Row(Cell(point.x), tuple(map(Cell, texts)))


def _spread(values: Sequence[float] | None) -> str:
    if not values:
        return ""
    return percent(statistics.mean(values)) + (f" ± {percent(statistics.stdev(values))}" if len(values) > 1 else "")
