"""The result as a table for a terminal. 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from saffe_cache.core.features import printable

_NAME_WIDTH, _CELL_WIDTH = 48, 15


def format_binding(result: Mapping[str, Any]) -> str:
    """Percent, with half of the 95 % interval over episodes. What is wrong comes first."""
    lines = [f"CONTROL FAILED: {failure}. Do not use these numbers." for failure in result["failures"]]
    lines += [
        f"{result['title']}, split {result['split']}: few photos, made-up names such as "
        f"{', '.join(result['names']['examples'][:3])}",
        *textwrap.wrap(
            "accuracy of the nearest name in percent ± half of the 95 % interval over episodes; fam from ridge after 0 "
            "epochs is ridge itself; differences are of the same episodes; in parentheses the controls, which must be "
            "at chance",
            100,
        ),
        "",
    ]
    for ways in dict.fromkeys(setting["ways"] for setting in result["settings"]):
        lines += [*_block([setting for setting in result["settings"] if setting["ways"] == ways]), ""]
    lines += [*_published(result), ""]
    for replaced in result["names_replaced"]:
        lines += [f"{replaced['name']}, {replaced['metric']} in percent, mean ± deviation over seeds"]
        lines += [f"{name:{_NAME_WIDTH}}{_spread(of['values'])}" for name, of in replaced["systems"].items()] + [""]
    lines.append(f"{result['seconds']:.0f} s for all episodes")
    return "\n".join(map(printable, lines))


def _block(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings of one number of ways side by side."""
    first = settings[0]
    heads = [f"{setting['ways']}-way {setting['shots']}-shot" for setting in settings]
    lines = [_row(f"{first['episodes']} episodes, {first['queries']} queries a class", heads)]
    for part, shown in (("systems", "{}"), ("differences", "{} less class means"), ("controls", "({})")):
        lines += [_row(shown.format(name), [_cell(one[part][name]) for one in settings]) for name in first[part]]
    lines.append(_row("chance", [f"{100 * setting['chance']:.1f}" for setting in settings]))
    for start in first["epochs_to_convergence"]:
        told = (
            f"{setting['epochs_to_convergence'][start]['mean']:.1f} at {setting['chosen']['learning_rates'][start]:g}"
            for setting in settings
        )
        lines.append(_row(f"epochs of fam from {start}, learning rate", list(told)))
    strengths = [f"{setting['chosen']['ridge_strength']:g}" for setting in settings]
    return [*lines, _row("strength of ridge", strengths)]


def _published(result: Mapping[str, Any]) -> list[str]:
    settings = [(setting["ways"], setting["shots"]) for setting in result["settings"]]
    lines = ["published (SAFFE's Table 7: miniImageNet, other encoders, number of episodes unknown)"]
    cells: dict[str, dict[tuple[int, int], float]] = {}
    for one in result["published"]:
        cells.setdefault(one["name"], {})[one["ways"], one["shots"]] = one["value"]
    for ways in dict.fromkeys(ways for ways, _ in settings):
        shown = [setting for setting in settings if setting[0] == ways]
        lines.append(_row("", [f"{ways}-way {shots}-shot" for _, shots in shown]))
        for name, of_name in cells.items():
            values = [f"{100 * of_name[setting]:.1f}" if setting in of_name else "-" for setting in shown]
            lines.append(_row(name, values))
    return lines


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:{_NAME_WIDTH}}" + "".join(f"{cell:>{_CELL_WIDTH}}" for cell in cells)


def _cell(score: Mapping[str, float]) -> str:
    return f"{100 * score['mean']:.1f} ± {100 * score['half_interval']:.1f}"


def _spread(values: Sequence[float]) -> str:
    shown = [100 * value for value in values]
    return f"{mean(shown):.1f}" + (f" ± {stdev(shown):.1f}" if len(shown) > 1 else "")
