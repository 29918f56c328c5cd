"""The result as a table for a terminal. 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from saffe_cache.core.features import printable

_NAME, _CELL, _WIDTH = 26, 12, 100
_SHOWN = {"accuracy": "accuracy", "f1": "F1", "precision": "precision", "recall": "recall", "auc": "AUC"}


def format_match(result: Mapping[str, Any]) -> str:
    """Percent, with half of the 95 % interval over several seeds. What is wrong comes first."""
    num_seeds = len(result["seeds"])
    half = f" ± half of the 95 % t-interval over {num_seeds} seeds" if num_seeds > 1 else " of one seed"
    num_open = sum(one["passed"] is None for one in result["controls"])
    lines = [f"CONTROL FAILED: {failure}. Do not use these numbers." for failure in result["failures"]]
    lines += [
        *textwrap.wrap(
            f"{result['title']}, split {result['split']}: does a text belong to a photo? {result['features_in_words']}",
            _WIDTH,
        ),
        *textwrap.wrap(
            f"percent{half}; photos of the report are in no training; the control's AUC, of shuffled photos, must be "
            "50",
            _WIDTH,
        ),
        "",
    ]
    for name, meaning in result["meanings"].items():
        lines += textwrap.wrap(f"{name}: {meaning}", _WIDTH, initial_indent="  ", subsequent_indent="    ")
    lines.append("")
    for setting in result["settings"]:
        lines += [*_block(setting), ""]
    for one in result["verdict"]:
        lines += textwrap.wrap(one, _WIDTH, initial_indent="- ", subsequent_indent="  ")
    lines += ["", *_costs(result), "", *_published(result)]
    lines += [f"not measured: {reason}" for reason in result["left_out"]]
    if num_open:
        lines.append(f"{num_open} controls of permuted labels or pairs not judged: it takes more seeds, or classes")
    lines.append(f"{len(result['controls'])} controls; {result['seconds']:.0f} s for all cells")
    return "\n".join(map(printable, lines))


def _block(setting: Mapping[str, Any]) -> list[str]:
    pairs = setting["pairs"]
    lines = [
        f"{setting['setting']}, {setting['scale']} training pairs",
        _row("", [*_SHOWN.values(), "control AUC"]),
    ]
    for name, scores in setting["systems"].items():
        cells = [_cell(scores[metric], with_half=metric in ("accuracy", "auc")) for metric in _SHOWN]
        lines.append(_row(name, [*cells, f"({100 * scores['shuffled_auc']['mean']:.1f})"]))
    chance, majority = f"{100 * setting['chance']:.1f}", f"{100 * setting['majority']:.1f}"
    lines.append(_row("chance; majority class", [f"{chance}; {majority}", "", "", "", "50.0"]))
    measured = ", ".join(f"{name.replace('_', ' ')} {value:z.2f}" for name, value in setting["alignment"].items())
    told = f"{pairs['validation']} pairs to choose by, {pairs['test']} to report on"
    told += f"; mean cosines: {measured}" if measured else ""
    return [*lines, *textwrap.wrap(told, _WIDTH, initial_indent="  ", subsequent_indent="  ")]


def _costs(result: Mapping[str, Any]) -> list[str]:
    heads = ["parameters", "FLOPs", "ms / 1,000", "of concat's", "kept bytes"]
    lines = [_row("cost, of a pair or 1,000", heads)]
    base = result["cost"].get("concat")
    for name, cost in result["cost"].items():
        ratio = f"{cost['seconds_per_1000_pairs'] / base['seconds_per_1000_pairs']:.2f}" if base else "-"
        cells = [
            f"{cost['parameters']:,}",
            f"{cost['flops_per_pair']:,}",
            f"{1000 * cost['seconds_per_1000_pairs']:.1f}",
        ]
        lines.append(_row(name, [*cells, ratio, f"{cost['kept_bytes_per_pair']:,.0f}"]))
    return lines


def _published(result: Mapping[str, Any]) -> list[str]:
    lines = ["published accuracies (arXiv 2606.01207, CLIP ViT-B/32, Flickr8k)"]
    for table, axis in ((1, "scale"), (2, "sigma")):
        of_table = [one for one in result["published"] if one["table"] == table]
        for system in dict.fromkeys(one["system"] for one in of_table):
            told = ", ".join(
                f"{one[axis]:g}: {100 * one['accuracy']:.1f}" for one in of_table if one["system"] == system
            )
            lines.append(f"  Table {table}, {system} by {axis}: {told}")
    return lines + [
        line
        for note in result["published_notes"]
        for line in textwrap.wrap(note, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    ]


def _row(name: str, cells: list[str]) -> str:
    return f"{name:{_NAME}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)


def _cell(score: Mapping[str, Any], *, with_half: bool) -> str:
    half = f" ± {50 * (score['high'] - score['low']):.1f}" if with_half and len(score["values"]) > 1 else ""
    return f"{100 * score['mean']:.1f}{half}"
