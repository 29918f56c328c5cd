"""Drawing: matplotlib figures as SVG for the page, and as SVG and PNG files. The only importer of matplotlib.

In the page text stays text, the ground is the page's own, and ink is `currentColor`, so that one drawing serves light
and dark. Hues are Okabe and Ito's, and never the only sign: markers and lines differ too.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

INK, PAPER = "#1f2328", "#fefefe"
"""In files; in the page `currentColor`, and nothing."""
BLUE = "#0072b2"
HUES = (BLUE, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", ">")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_WIDTH = 4.8
"""Inches."""


@dataclass(frozen=True)
class Plot:
    """One drawing."""

    name: str
    """Of its files, without suffix."""
    caption: str
    described: str
    """For who does not see it."""
    inline: str
    svg: bytes
    png: bytes


@dataclass(frozen=True)
class Style:
    """One of several lines."""

    hue: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]


def style(number: int) -> Style:
    """Of the first six all hues and lines differ, of the first eight all markers."""
    return Style(HUES[number % len(HUES)], MARKERS[number % len(MARKERS)], LINES[number % len(LINES)])


@contextmanager
def drawing(height: float, columns: int = 1, rows: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of the page's width, and its axes, row after row; those of several rows share the vertical axis."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "saffe",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.linewidth": 0.4,
        "grid.alpha": 0.35,
        "legend.frameon": False,
        "lines.linewidth": 1.5,
        "lines.markersize": 5,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), INK),
        **dict.fromkeys(("xtick.color", "ytick.color"), INK),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAPER),
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        made = figure.subplots(rows, columns, squeeze=False, sharey=rows > 1)
        yield figure, list(made.ravel())


def finished(figure: Figure, name: str, caption: str, described: str) -> Plot:
    """To be called within `drawing`."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    text = svg.getvalue().decode()
    return Plot(name, caption, described, _inline(text, name, described), svg.getvalue(), png.getvalue())


def _inline(svg: str, name: str, described: str) -> str:
    """The drawing as a part of a page: no names of its own outside, no colours of ink and paper, no links."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body).replace("xlink:href", "href")
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    body = body.replace(INK, "currentColor").replace(PAPER, "none")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    view = re.search(r'viewBox="[^"]*"', body)
    assert view is not None
    inside = body[body.index(">") + 1 :]
    return f'<svg role="img" aria-label="{html.escape(described)}" {view.group()}>{inside}'


@dataclass(frozen=True)
class Dot:
    """One value with its interval, in percent."""

    name: str
    value: float
    low: float | None
    high: float | None
    kind: str
    """fam, baseline or control."""


def draw_dots(name: str, dots: Sequence[Dot], level: tuple[str, float], metric: str) -> Plot:
    """Systems and controls below each other, with chance as a line."""
    look = {"fam": (BLUE, "D"), "baseline": ("#d55e00", "o"), "control": (INK, "s")}
    with drawing(0.75 + 0.22 * len(dots)) as (figure, (axes,)):
        for place, dot in enumerate(dots):
            hue, marker = look[dot.kind]
            if dot.low is not None and dot.high is not None:
                axes.plot([dot.low, dot.high], [place, place], color=hue, linewidth=1.6, solid_capstyle="round")
            face = PAPER if dot.kind == "control" else hue
            axes.plot(dot.value, place, marker, color=hue, markerfacecolor=face, zorder=3)
        axes.axvline(level[1], color=INK, linestyle=":", linewidth=1.2)
        axes.annotate(level[0], (level[1], 1), (4, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                      va="bottom", fontsize=8)  # fmt: skip
        axes.set_yticks(
            range(len(dots)), [dot.name if dot.kind != "control" else f"control: {dot.name}" for dot in dots]
        )
        axes.set_ylim(len(dots) - 0.4, -0.6)
        axes.set_xlim(left=min(0.0, level[1]))
        axes.set_xlabel(f"{metric}, percent")
        axes.grid(axis="y", visible=False)
        told = "; ".join(f"{dot.name} {dot.value:.1f}" for dot in dots)
        caption = (
            f"{metric} of all systems with 95 % intervals. Diamond: the FAM. Discs: baselines. Hollow squares: "
            f"controls, which must lie at their level. Dotted: chance."
        )
        return finished(figure, name, caption, f"{metric} in percent: {told}; {level[0]} {level[1]:.1f}")


@dataclass(frozen=True)
class Curve:
    """A line through points."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def draw_curves(
    name: str, curves: Sequence[Curve], labels: tuple[str, str], caption: str, limits: tuple[float, float] | None = None
) -> Plot:
    """Lines in one frame, such as precision over recall."""
    with drawing(2.9) as (figure, (axes,)):
        for number, curve in enumerate(curves):
            look = style(number)
            axes.plot(curve.xs, curve.ys, color=look.hue, linestyle=look.line, marker=look.marker, label=curve.name,
                      markevery=max(1, len(curve.xs) // 8), markersize=5)  # fmt: skip
        if limits:
            axes.set_ylim(*limits)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.legend(fontsize=8)
        told = "; ".join(f"{curve.name} from {curve.ys[0]:.1f} to {curve.ys[-1]:.1f}" for curve in curves)
        return finished(figure, name, caption, f"{labels[1]} over {labels[0]}: {told}")


def draw_training(
    name: str, losses: Sequence[Curve], scores: Sequence[Curve], best_epoch: int, metric: str, caption: str
) -> Plot:
    """Loss at the left, validation score at the right; the kept epoch is marked."""
    with drawing(2.3, 2) as (figure, panels):
        for axes, curves, label in zip(panels, (losses, scores), ("loss", f"validation {metric}"), strict=True):
            for number, curve in enumerate(curves):
                look = style(number)
                axes.plot(curve.xs, curve.ys, color=look.hue, linestyle=look.line, marker=look.marker, markersize=4,
                          label=curve.name)  # fmt: skip
            axes.axvline(best_epoch, color=INK, linestyle=":", linewidth=1.2)
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[1].legend(fontsize=8)
        told = f"best epoch {best_epoch}" + "".join(
            f"; {curve.name} at most {max(curve.ys):.1f}" for curve in scores if len(curve.ys)
        )
        return finished(figure, name, caption, f"Training curves: {told}")


def draw_per_class(
    name: str, names: Sequence[str], systems: Sequence[tuple[str, Sequence[float]]], caption: str
) -> Plot:
    """Average precision of each class, several systems beside each other."""
    with drawing(0.9 + 0.2 * len(names)) as (figure, (axes,)):
        places = np.arange(len(names))
        for number, (system, values) in enumerate(systems):
            look = style(number)
            axes.plot(values, places, look.marker, color=look.hue, label=system,
                      markerfacecolor=look.hue if number == 0 else PAPER)  # fmt: skip
        axes.set_yticks(places, names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("average precision, percent")
        axes.legend(fontsize=8, loc="lower left")
        system, values = systems[0]
        told = ", ".join(f"{one} {value:.1f}" for one, value in zip(names, values, strict=True))
        return finished(figure, name, caption, f"Average precision of {system} in percent: {told}")


_GRID_POINTS = 290
"""Width of a grid's cells together, about."""


def draw_grid(
    name: str, cells: np.ndarray, texts: Sequence[Sequence[str]], axes_names: tuple[Sequence[str], Sequence[str]],
    labels: tuple[str, str], caption: str, described: str, *,
    notes: Sequence[Sequence[str]] | None = None, limits: tuple[float, float] | None = None,
) -> Plot:  # fmt: skip
    """Cells with their numbers as text, the higher the deeper; at most half opaque, so that ink stays readable.

    Args:
        name: of the files.
        cells: [rows, columns]; NaN where there is none.
        texts: of the cells.
        axes_names: of rows and of columns.
        labels: of the horizontal and of the vertical axis.
        caption: below the drawing.
        described: for who does not see it.
        notes: of the cells, beneath the texts and smaller.
        limits: values of no and of the deepest colour. Default: the lowest and the highest of the cells.
    """
    rows, columns = cells.shape
    low, high = limits or (np.nanmin(cells), np.nanmax(cells))
    size = 9.0 if columns <= 6 else 7.5 if columns <= 12 else 5.0
    if notes is not None:
        size = min(11.0, 0.29 * _GRID_POINTS / columns)
    height = (0.27 if notes is None else 0.37) * rows
    with drawing(1.1 + height) as (figure, (axes,)):
        for row in range(rows):
            for column in range(columns):
                if not np.isnan(cells[row, column]):
                    depth = 0.5 * float((cells[row, column] - low) / (high - low or 1))
                    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=BLUE, alpha=depth,
                                                               linewidth=0))  # fmt: skip
                    place = row if notes is None else row - 0.17
                    axes.text(column, place, texts[row][column], ha="center", va="center", fontsize=size)
                    if notes is not None:
                        axes.text(column, row + 0.25, notes[row][column], ha="center", va="center",
                                  fontsize=0.78 * size)  # fmt: skip
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.set_yticks(range(rows), axes_names[0])
        turned = columns > 6 or max(map(len, axes_names[1])) > 10
        axes.set_xticks(range(columns), axes_names[1], rotation=45 if turned else 0, ha="right" if turned else "center")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(textwrap.fill(labels[1], max(12, round(12 * height))))
        return finished(figure, name, caption, described)


@dataclass(frozen=True)
class Bars:
    """Means with half intervals at some of the named places, in percent; a half interval is 0 where there is none."""

    name: str
    places: Sequence[int]
    means: Sequence[float]
    halves: Sequence[float]
    beside: Sequence[Bars] = ()
    """Baselines of the same points."""


@dataclass(frozen=True)
class Panel:
    """Series over the same named places."""

    places: Sequence[str]
    series: Sequence[Bars]
    published: Sequence[tuple[str, int, float]] = ()
    """Numbers of others: name, place, percent."""


_BESIDE = (("v", "--"), ("P", "-."), ("d", ":"))
"""Marker and line of the first baselines."""


def draw_series(
    name: str, panels: Sequence[Panel], levels: Sequence[tuple[str, float]], labels: tuple[str, str], caption: str, *,
    joined: bool,
) -> Plot:  # fmt: skip
    """Series with error bars over named places, baselines hollow in their series' hue, levels across.

    Args:
        name: of the files.
        panels: one frame each, two in a row; they share the vertical axis.
        levels: what no setting changes, in percent.
        labels: of the horizontal and of the vertical axis.
        caption: below the drawing.
        joined: whether lines go from point to point.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with drawing(0.8 + 2.1 * rows, columns, rows) as (figure, frames):
        number, kinds = 0, _kinds(panels)
        for axes, panel in zip(frames, panels, strict=False):
            for place, one in enumerate(panel.series):
                look, shift = style(number), 0.08 * (place - (len(panel.series) - 1) / 2)
                _draw_bars(axes, one, look, shift, kinds, joined=joined)
                number += 1
            for of_level, (level, value) in enumerate(levels):
                axes.axhline(value, color=INK, linestyle=LINES[3 - of_level % 2], linewidth=1, label=level)
            for who, place, value in panel.published:
                axes.plot(place, value, "*", color=INK, markerfacecolor=PAPER, markersize=12, label="published")
                axes.annotate(who, (place, value), (6, 6), textcoords="offset points", fontsize=8)
            axes.set_xticks(range(len(panel.places)), panel.places)
            widest = max(len(line) for place in panel.places for line in place.splitlines())
            if widest * len(panel.places) > 60 / columns:
                for label in axes.get_xticklabels():
                    label.set(rotation=30, ha="right", rotation_mode="anchor")
            axes.set_xlim(-0.5, len(panel.places) - 0.5)
        for axes in frames[len(panels) :]:
            axes.set_visible(False)
        for axes in frames[len(panels) - columns : len(panels)]:
            axes.set_xlabel(labels[0])
        for axes in frames[::columns]:
            axes.set_ylabel(labels[1])
        _draw_legend(figure, frames)
        told = "; ".join(f"{one.name}: {_told(panel.places, one)}" for panel in panels for one in panel.series)
        return finished(figure, name, caption, f"{labels[1]} by {labels[0]}. {told}")


def _kinds(panels: Sequence[Panel]) -> list[str]:
    """The names of the baselines."""
    return list(dict.fromkeys(one.name for panel in panels for series in panel.series for one in series.beside))


def _draw_bars(axes: Axes, one: Bars, look: Style, shift: float, kinds: Sequence[str], *, joined: bool) -> None:
    """A series and its baselines."""
    line = look.line if joined else "none"
    axes.errorbar([place + shift for place in one.places], one.means, yerr=one.halves, capsize=3, label=one.name,
                  color=look.hue, marker=look.marker, linestyle=line)  # fmt: skip
    for beside in one.beside:
        marker, line = _BESIDE[kinds.index(beside.name) % len(_BESIDE)]
        axes.plot(beside.places, beside.means, color=look.hue, marker=marker, markersize=4, linewidth=1,
                  linestyle=line if joined else "none", markerfacecolor=PAPER, label=beside.name)  # fmt: skip


def _draw_legend(figure: Figure, frames: Sequence[Axes]) -> None:
    """Each name once, below the frames, which keep their height; as many beside each other as there is room for."""
    found: dict[str, Any] = {}
    for axes in frames:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    columns = max(1, min(3, 66 // (max(map(len, found)) + 6)))
    figure.legend(found.values(), found.keys(), fontsize=8, loc="outside lower center", ncols=columns)
    figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(found) // columns))


def _told(places: Sequence[str], bars: Bars) -> str:
    return ", ".join(f"{places[place]} {mean:.1f}" for place, mean in zip(bars.places, bars.means, strict=True))
