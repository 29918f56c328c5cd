"""The result as a table for a terminal. 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from saffe_cache.core.features import printable
from saffe_cache.studies.alignment.definitions import NAMES

_WIDTH, _CELL, _HEAD = 100, 9, 10


def format_alignment(result: Mapping[str, Any]) -> str:
    """Percent. The advice comes first, then its numbers, then every pair of layers."""
    photos = result["photos"]
    lines = [f"{result['title']}, split {result['split']}: which fusion?"]
    for advice in result["advice"]:
        lines += _wrapped(f"{advice['gallery']}: {advice['fusion'].upper()}, for {advice['because']}.")
    lines += [*_wrapped(result["standing"]), ""]
    lines += _wrapped(
        f"{photos['judged']} photos judged; maps of the photo layer that is looked at closer are fitted on "
        f"{photos['fitted_closer']} others, those of all pairs on {photos['fitted']} of them. R@1 in percent with its "
        "95 % bootstrap interval over photos; null: 95 % quantile with judged pairs permuted."
    )
    for closer in result["closer"]:
        lines.append(f"photo layer {closer['gallery_layer']}, text {_named(closer['text_layer'])}")
        for name, score in closer["scores"].items():
            lines.append(
                f"  {NAMES[name]:8}{100 * score['value']:6.1f}  [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
                f"  null {100 * score['null_high']:.1f}, chance {100 * closer['chance']:.1f}"
                f"; median rank {score['median_rank']:g}"
            )
    for name, measure in result["measures"].items():
        lines += ["", *_wrapped(f"{NAMES[name]}, percent: {measure['definition']}.")]
        lines += _grid(result["gallery_layers"], result["text_layers"], measure)
    lines += [f"\n{NAMES[name]} is absent: {reason}" for name, reason in result["absent"].items()]
    lines += ["", f"{result['seconds']:.0f} s"]
    return "\n".join(printable(part) for line in lines for part in line.split("\n"))


def _named(layer: str) -> str:
    return "vector of its own" if layer == "own" else f"layer {layer}"


def _grid(rows: Sequence[str], columns: Sequence[str], measure: Mapping[str, Any]) -> list[str]:
    """Photo layers downwards, text layers across, and the highest null of each text layer."""
    lines = [f"{'photo/text':{_HEAD}}" + "".join(f"{one:>{_CELL}}" for one in columns)]
    for name, values in zip(rows, measure["value"], strict=True):
        lines.append(f"{name:{_HEAD}}" + "".join(f"{_percent(value):>{_CELL}}" for value in values))
    nulls = (
        max((one for one in of if one is not None), default=None) for of in zip(*measure["null_high"], strict=True)
    )
    lines.append(f"{'null':{_HEAD}}" + "".join(f"{_percent(value):>{_CELL}}" for value in nulls))
    widest = max(
        (high - low) / 2
        for lows, highs in zip(measure["low"], measure["high"], strict=True)
        for low, high in zip(lows, highs, strict=True)
        if low is not None
    )
    return [*lines, f"chance {100 * measure['chance']:.1f}; half of the 95 % interval at most {100 * widest:.1f}"]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH)
