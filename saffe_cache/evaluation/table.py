"""The report of an evaluation, as JSON values and as a table for a terminal. 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from saffe_cache.core.features import printable
from saffe_cache.evaluation.controls import Control
from saffe_cache.evaluation.cost import flops_in_words
from saffe_cache.retrieval.scores import Scores

_NAME_WIDTH, _CELL_WIDTH = 19, 27


def scores_to_json(scores: Scores) -> dict[str, Any]:
    return {
        name: {"value": score.value, "chance": score.chance}
        | ({"low": score.interval[0], "high": score.interval[1]} if score.interval else {})
        for name, score in scores.items()
    }


def control_to_json(control: Control) -> dict[str, Any]:
    return {
        "scores": scores_to_json(control.scores),
        "metric": control.metric,
        "expected": control.expected,
        "limit": control.limit,
        "passed": control.passed,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """Percent, 95 % intervals in brackets. What is wrong comes first."""
    lines = [f"CONTROL FAILED: {failure}. Do not use these numbers." for failure in report["failures"]]
    lines += [f"WARNING: {warning}" for warning in report["warnings"]]
    lines += [
        f"{report['protocol']} protocol, split {report['split']}: {report['num_photos']} photos, "
        f"{report['num_queries']} queries",
        *textwrap.wrap(f"{report['definition']}; percent, 95 % intervals over photos in brackets", 100),
        "",
    ]
    rows = dict(report["systems"]) | {f"({name})": control["scores"] for name, control in report["controls"].items()}
    metrics = list(report["systems"]["fam"])
    for start in range(0, len(metrics), 3):
        lines += [*_block(rows, metrics[start : start + 3]), ""]
    lines += [*_differences(report), *_sensitivity(report), *_index(report["index"])]
    lines += [f"{name}: not applicable, {reason}" for name, reason in report["absent"].items()]
    cost = report["cost"]
    lines.append(
        f"{cost['trainable_parameters'] / 1e6:.2f} M trainable parameters, {cost['training_seconds']:.0f} s of "
        f"training at {cost['training_peak_memory_mb']} MB, evaluation {cost['evaluation_seconds']:.0f} s"
    )
    lines.append(f"{flops_in_words(cost['fusing_flops'])} FLOPs to fuse one photo of the gallery")
    return "\n".join(map(printable, lines))


def _block(rows: Mapping[str, Mapping[str, Any]], metrics: list[str]) -> list[str]:
    """A few metrics of all systems, controls in parentheses, and chance."""
    lines = [f"{'':{_NAME_WIDTH}}" + "".join(f"{metric:>{_CELL_WIDTH}}" for metric in metrics)]
    for name, scores in rows.items():
        cells = (f"{_cell(metric, scores.get(metric)):>{_CELL_WIDTH}}" for metric in metrics)
        lines.append(f"{name:{_NAME_WIDTH}}" + "".join(cells))
    chances = (f"{_cell(metric, {'value': rows['fam'][metric]['chance']}):>{_CELL_WIDTH}}" for metric in metrics)
    return [*lines, f"{'chance':{_NAME_WIDTH}}" + "".join(chances)]


def _cell(metric: str, score: Mapping[str, float] | None) -> str:
    if score is None:
        return "-"
    if metric.endswith("median_rank"):
        return f"{score['value']:.0f}"
    interval = f" [{100 * score['low']:.1f}, {100 * score['high']:.1f}]" if "low" in score else ""
    return f"{100 * score['value']:.2f}{interval}"


def _differences(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, metrics in report["differences"].items():
        told = ", ".join(
            f"{metric} {100 * of['mean']:+.2f} [{100 * of['low']:+.2f}, {100 * of['high']:+.2f}]"
            for metric, of in metrics.items()
        )
        lines += textwrap.wrap(f"fam less {name}, the best of these, by paired bootstrap: {told}", 100)
    return lines


def _sensitivity(report: Mapping[str, Any]) -> list[str]:
    moves = ", ".join(f"{part.removeprefix('to_')} {value:.2f}" for part, value in report["sensitivity"].items())
    shared = report["duplicates"]
    return [
        f"how far the fused vector moves with another: {moves}; shared with training: {shared['photos']} photos, "
        f"{shared['texts']} texts"
    ]


def _index(index: Mapping[str, Any]) -> list[str]:
    """How much an approximate index finds of what there is."""
    if index["kind"] == "flat":
        return []
    shares = [f"{100 * index[key]:.1f} of the first {k}" for k in (10, 100) if (key := f"recall_at_{k}") in index]
    return [f"index {index['kind']} finds {' and '.join(shares)} that a flat index does; the numbers above are exact"]
