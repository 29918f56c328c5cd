"""Train and evaluate named variants over several seeds, and set them into one table.

A recipe gives the rows; what is finished already is not done again. The baselines depend on the data and on what is
held out, not on the variant: they are fitted once, in the first report. Each training has a process of its own, or its
peak memory would be that of the largest before it.
"""

from __future__ import annotations

import logging
import multiprocessing
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from saffe_cache.core.outputs import CONFIG, RESULT, read_json
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.evaluate import evaluate
from saffe_cache.evaluation.results import FAM, EvaluationResult, Numbers
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.train import train


@dataclass(frozen=True)
class Row:
    """One variant: what is changed in TrainConfig, and the protocols that it is reported under."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    protocols: tuple[str, ...] | None = None
    """None for those of the table."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Several variants of one cache."""

    cache: str
    work: Path
    rows: Sequence[Row]
    protocols: tuple[str, ...]
    split: str
    seeds: Sequence[int] = (0,)
    shared: Mapping[str, Any] = field(default_factory=dict)
    """What all rows change in TrainConfig."""

    def run(self) -> dict[str, dict[str, list[EvaluationResult]]]:
        """The reports of each protocol, by row, one for each seed."""
        reports: dict[str, dict[str, list[EvaluationResult]]] = {}
        for row in self.rows:
            for seed in self.seeds:
                run = _train(
                    TrainConfig(
                        cache=self.cache,
                        out=str(self.work / f"{row.name}-seed{seed}"),
                        seed=seed,
                        **{**self.shared, **row.changes},
                    )
                )
                for protocol in row.protocols or self.protocols:
                    of_protocol = reports.setdefault(protocol, {})
                    report = self._report(run, protocol, baselines=not of_protocol)
                    of_protocol.setdefault(row.name, []).append(report)
        return reports

    def _report(self, run: str, protocol: str, *, baselines: bool) -> EvaluationResult:
        out = Path(run) / f"{self.split}-{protocol}"
        is_done = (out / RESULT).exists()
        if not is_done or (baselines and read_json(out / CONFIG)["config"]["baselines"] != "all"):
            evaluate(
                EvaluateConfig(
                    cache=self.cache,
                    run=run,
                    split=self.split,
                    protocol=protocol,
                    out=str(out),
                    baselines="all" if baselines else "none",
                )
            )
        return EvaluationResult.load(out)


def _train(config: TrainConfig) -> str:
    if (Path(config.out) / "result.json").exists():
        return train(config)  # which sees that it is finished, and by the same config
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    log = partial(logging.basicConfig, level=logging.getLogger().level, format="%(message)s")
    with ProcessPoolExecutor(1, mp_context=context, initializer=log) as pool:
        return pool.submit(train, config).result()


def markdown(reports: Mapping[str, Sequence[EvaluationResult]], metrics: Sequence[str], control: str) -> str:
    """Percent, mean ± standard deviation over seeds; baselines below; one control's main metric beside it.

    Args:
        reports: of each row, one for each seed.
        metrics: columns; the control is shown in the first.
        control: its name.
    """
    lines = [
        "| variant | " + " | ".join(metrics) + f" | {control}: {metrics[0]} | controls | parameters | seconds | MB |",
        "|---" * (len(metrics) + 6) + "|",
    ]
    for name, of_row in reports.items():
        cells = [_spread([_percent(report.systems[FAM], metric) for report in of_row]) for metric in metrics]
        failed = sum(bool(report.failures) for report in of_row)
        costs = [report.cost for report in of_row]
        cells += [
            _spread([_percent(report.control_scores[control], metrics[0]) for report in of_row]),
            f"{failed} of {len(of_row)} fail" if failed else "hold",
            f"{costs[0].trainable_parameters / 1e6:.2f} M",
            f"{statistics.mean(cost.training_seconds for cost in costs):.0f}",
            f"{max(cost.training_peak_memory_mb for cost in costs)}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    first = next(iter(next(iter(reports.values()))))
    for name, scores in first.systems.items():
        if name != FAM:
            lines.append(f"| *{name}* | " + " | ".join(_one(scores, metric) for metric in metrics) + " | | | | | |")
    chances = (f"{100 * first.systems[FAM][metric].chance:.1f}" for metric in metrics)
    lines.append("| *chance* | " + " | ".join(chances) + " | | | | | |")
    return "\n".join(lines)


def failures(reports: Mapping[str, Mapping[str, Sequence[EvaluationResult]]]) -> Iterable[str]:
    """Every failed control, with its row and seed."""
    for protocol, of_protocol in reports.items():
        for name, of_row in of_protocol.items():
            for report in of_row:
                for failure in report.failures:
                    yield f"{protocol}, {name}, seed {report.run.seed}: {failure}"


def _percent(numbers: Numbers, metric: str) -> float | None:
    return 100 * numbers[metric].value if metric in numbers else None


def _one(scores: Numbers, metric: str) -> str:
    value = _percent(scores, metric)
    return "" if value is None else f"{value:.1f}"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{statistics.mean(known):.1f}" + (f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else "")
