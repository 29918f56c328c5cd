"""Draw the figures of core.figures: as SVG for the page, and as SVG and PNG files. The only importer of matplotlib.

In the page, text stays text, the background is the page's own, and ink is `currentColor`, so that one drawing serves
light and dark. Hues are Okabe and Ito's, and never the only sign: markers and lines differ too.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from saffe_cache.core import figures
from saffe_cache.core.figures import Figure

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
    """A drawn figure."""

    name: str
    """Of its files, without suffix."""
    caption: str
    inline: str
    """SVG to be put into the page."""
    svg: bytes
    png: bytes


def draw(figure: Figure, prefix: str) -> Plot:
    """
    Args:
        figure: what is drawn.
        prefix: of the name of its files and of everything inside that needs a name within the page.
    """
    name = f"{prefix}-{figure.name}"
    with matplotlib.rc_context(_SETTINGS):
        drawn, described = _DRAWERS[type(figure)](figure)
        svg, png = io.BytesIO(), io.BytesIO()
        drawn.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        drawn.savefig(png, format="png", dpi=200, metadata={"Software": None})
    inline = _inline(svg.getvalue().decode(), name, figure.described or described)
    return Plot(name, figure.caption, inline, svg.getvalue(), png.getvalue())


Drawn = tuple[matplotlib.figure.Figure, str]
"""A figure, and its numbers in words."""

_SETTINGS: dict[Any, Any] = {
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


def _frames(
    height: float, columns: int = 1, rows: int = 1, *, shared: bool = False
) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    """A figure of the page's width, and its axes, row after row, which may share the vertical axis."""
    figure = matplotlib.figure.Figure(figsize=(_WIDTH, height), layout="constrained")
    made = figure.subplots(rows, columns, squeeze=False, sharey=shared)
    return figure, list(made.ravel())


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


def _look(number: int) -> dict[str, Any]:
    """Of one of several lines. The first six differ in hue and line, the first eight in marker."""
    kinds = {"color": HUES, "marker": MARKERS, "linestyle": LINES}
    return {name: of[number % len(of)] for name, of in kinds.items()}


def _points(number: int) -> dict[str, Any]:
    """The same without a line."""
    return _look(number) | {"linestyle": "none"}


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Named rows, from the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _dots(of: figures.DotPlot) -> Drawn:
    look = {"fam": (BLUE, "D"), "baseline": ("#d55e00", "o"), "control": (INK, "s")}
    figure, (axes,) = _frames(0.75 + 0.22 * len(of.dots))
    for place, dot in enumerate(of.dots):
        hue, marker = look[dot.kind]
        if dot.low is not None and dot.high is not None:
            axes.plot([dot.low, dot.high], [place, place], color=hue, linewidth=1.6, solid_capstyle="round")
        face = PAPER if dot.kind == "control" else hue
        axes.plot(dot.value, place, marker, color=hue, markerfacecolor=face, zorder=3)
    axes.axvline(of.chance, color=INK, linestyle=":", linewidth=1.2)
    axes.annotate("chance", (of.chance, 1), (4, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                  va="bottom", fontsize=8)  # fmt: skip
    _name_rows(axes, [f"control: {dot.name}" if dot.kind == "control" else dot.name for dot in of.dots])
    axes.set_xlim(left=min(0.0, of.chance))
    axes.set_xlabel(of.label)
    axes.grid(axis="y", visible=False)
    values = "; ".join(f"{dot.name} {dot.value:.1f}" for dot in of.dots)
    return figure, f"{of.label}: {values}; chance {of.chance:.1f}"


def _curves(of: figures.CurvePlot) -> Drawn:
    figure, (axes,) = _frames(2.9)
    for number, curve in enumerate(of.curves):
        every = max(1, len(curve.xs) // 8)
        axes.plot(curve.xs, curve.ys, **_look(number), label=curve.name, markevery=every)
    if of.y_limits:
        axes.set_ylim(*of.y_limits)
    axes.set(xlabel=of.x_label, ylabel=of.y_label)
    axes.legend(fontsize=8)
    values = "; ".join(f"{curve.name} from {curve.ys[0]:.1f} to {curve.ys[-1]:.1f}" for curve in of.curves)
    return figure, f"{of.y_label} over {of.x_label}: {values}"


def _training(of: figures.TrainingPlot) -> Drawn:
    figure, panels = _frames(2.3, 2)
    for axes, curves, label in zip(panels, (of.losses, of.scores), ("loss", of.score_label), strict=True):
        for number, curve in enumerate(curves):
            axes.plot(curve.xs, curve.ys, **_look(number), markersize=4, label=curve.name)
        axes.axvline(of.best_epoch, color=INK, linestyle=":", linewidth=1.2)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].legend(fontsize=8)
    highest = "".join(f"; {curve.name} at most {max(curve.ys):.1f}" for curve in of.scores if len(curve.ys))
    return figure, f"Training curves: best epoch {of.best_epoch}{highest}"


def _classes(of: figures.ClassPlot) -> Drawn:
    figure, (axes,) = _frames(0.7 + 0.2 * len(of.classes))
    for number, (system, values) in enumerate(of.systems):
        look = _points(number) | ({"markerfacecolor": PAPER} if number else {})
        axes.plot(values, range(len(values)), **look, label=system)
    _name_rows(axes, of.classes)
    axes.set_xlabel(of.label)
    _draw_legend(figure, [axes])
    system, values = of.systems[0]
    shown = ", ".join(f"{name} {value:.1f}" for name, value in zip(of.classes, values, strict=True))
    return figure, f"{of.label}, {system}: {shown}"


_GRID_POINTS = 290
"""Width of a heat map's cells together, about."""


def _heat_map(of: figures.HeatMap) -> Drawn:
    """At most half opaque, so that ink stays readable."""
    cells = np.array(of.cells, np.float64)
    rows, columns = cells.shape
    size = 9.0 if columns <= 6 else 7.5 if columns <= 12 else 5.0
    if of.notes is not None:
        size = min(11.0, 0.29 * _GRID_POINTS / columns)
    height = (0.27 if of.notes is None else 0.37) * rows
    figure, (axes,) = _frames(1.1 + height)
    words = _draw_cells(axes, of, cells, size)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.set_yticks(range(rows), of.rows)
    turned = columns > 6 or max(map(len, of.columns)) > 10
    axes.set_xticks(range(columns), of.columns, rotation=45 if turned else 0, ha="right" if turned else "center")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set(xlabel=of.column_label, ylabel=textwrap.fill(of.row_label, max(12, round(12 * height))))
    return figure, f"By {of.column_label} and {of.row_label}: {'; '.join(words)}"


def _draw_cells(axes: Axes, of: figures.HeatMap, cells: np.ndarray, size: float) -> list[str]:
    """Colours and texts; returns the cells in words."""
    low, high = of.limits or (np.nanmin(cells), np.nanmax(cells))
    words = []
    for row, column in np.argwhere(~np.isnan(cells)):
        value = float(cells[row, column])
        text = f"{value:.1f}" if of.texts is None else of.texts[row][column]
        note = "" if of.notes is None else of.notes[row][column]
        depth = 0.5 * (value - low) / (high - low or 1)
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=BLUE, alpha=depth, linewidth=0))
        axes.text(column, row if of.notes is None else row - 0.17, text, ha="center", va="center", fontsize=size)
        if of.notes is not None:
            axes.text(column, row + 0.25, note, ha="center", va="center", fontsize=0.78 * size)
        if text:
            words.append(f"{of.columns[column]}, {of.rows[row]}: {text} {note}".rstrip())
    return words


_BASELINE_STYLES = (("v", "--"), ("P", "-."), ("d", ":"))
"""Marker and line of the first baselines."""


def _series(of: figures.SeriesPlot) -> Drawn:
    columns = min(2, len(of.panels))
    rows = -(-len(of.panels) // columns)
    figure, frames = _frames(0.8 + 2.1 * rows, columns, rows, shared=True)
    names = list(dict.fromkeys(one.name for panel in of.panels for one in panel.series))
    kinds = list(dict.fromkeys(one.name for panel in of.panels for series in panel.series for one in series.baselines))
    for axes, panel in zip(frames, of.panels, strict=False):
        for place, one in enumerate(panel.series):
            shift = 0.08 * (place - (len(panel.series) - 1) / 2)
            look = (_look if of.joined else _points)(names.index(one.name))
            _draw_series(axes, one, look, shift, kinds)
        for of_level, (level, value) in enumerate(of.levels):
            axes.axhline(value, color=INK, linestyle=LINES[3 - of_level % 2], linewidth=1, label=level)
        for who, place, value in panel.published:
            axes.plot(place, value, "*", color=INK, markerfacecolor=PAPER, markersize=12, label="published")
            axes.annotate(who, (place, value), (6, 6), textcoords="offset points", fontsize=8)
        _name_places(axes, panel.places, columns)
        axes.set_title(panel.title, fontsize=8)
    for axes in frames[len(of.panels) :]:
        axes.set_visible(False)
    for axes in frames[len(of.panels) - columns : len(of.panels)]:
        axes.set_xlabel(of.x_label)
    for axes in frames[::columns]:
        axes.set_ylabel(of.y_label)
    _draw_legend(figure, frames)
    values = []
    for panel in of.panels:
        for one in panel.series:
            means = (f"{panel.places[place]} {mean:.1f}" for place, mean in zip(one.places, one.means, strict=True))
            titled = f"{panel.title}, {one.name}" if panel.title else one.name
            values.append(f"{titled}: {', '.join(means)}")
    return figure, f"{of.y_label} by {of.x_label}. {'; '.join(values)}"


def _draw_series(axes: Axes, one: figures.Series, look: dict[str, Any], shift: float, kinds: Sequence[str]) -> None:
    """A series and its baselines."""
    places = [place + shift for place in one.places]
    axes.errorbar(places, one.means, yerr=one.halves or None, capsize=3, label=one.name, **look)
    for baseline in one.baselines:
        marker, line = _BASELINE_STYLES[kinds.index(baseline.name) % len(_BASELINE_STYLES)]
        hollow = look | {"marker": marker, "markerfacecolor": PAPER, "markersize": 4, "linewidth": 1}
        hollow["linestyle"] = "none" if look["linestyle"] == "none" else line
        axes.plot(baseline.places, baseline.means, label=baseline.name, **hollow)


def _name_places(axes: Axes, places: Sequence[str], columns: int) -> None:
    axes.set_xticks(range(len(places)), places)
    widest = max(len(line) for place in places for line in place.splitlines())
    if widest * len(places) > 60 / columns:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, len(places) - 0.5)


def _draw_legend(figure: matplotlib.figure.Figure, frames: Sequence[Axes]) -> None:
    """Each name once, below the frames, which keep their height; up to three names in a row."""
    found: dict[str, Any] = {}
    for axes in frames:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    columns = max(1, min(3, 66 // (max(map(len, found)) + 6)))
    figure.legend(found.values(), found.keys(), fontsize=8, loc="outside lower center", ncols=columns)
    figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(found) // columns))


def _fits(of: figures.FitPlot) -> Drawn:
    figure, (axes,) = _frames(3.2)
    for number, fit in enumerate(of.fits):
        axes.plot(*zip(*fit.points, strict=True), **_points(number), markersize=4)
        axes.plot(*zip(*fit.curve, strict=True), **_look(number), markevery=[0], markersize=4, label=fit.name)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(of.ticks, [f"{tick:g}" for tick in of.ticks])
    axes.set(xlabel=of.x_label, ylabel=of.y_label)
    axes.legend(fontsize=8)
    ends = "; ".join(f"{fit.name} from {fit.curve[0][1]:.1f} to {fit.curve[-1][1]:.1f}" for fit in of.fits)
    return figure, f"{of.y_label} by {of.x_label}: {ends}"


def _planes(of: figures.PlanePlot) -> Drawn:
    figure, frames = _frames(2.9, columns=len(of.planes))
    for axes, plane in zip(frames, of.planes, strict=True):
        pairs = np.array([plane.photos, plane.texts])
        axes.plot(pairs[..., 0], pairs[..., 1], color=INK, alpha=0.2, linewidth=0.4)
        for number, label in enumerate(("photos", "texts")):
            axes.plot(*pairs[number].T, **_points(number), markersize=2.5, label=label)
        axes.set_title(plane.title, fontsize=8)
        axes.set(xticks=[], yticks=[])
    figure.legend(*frames[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    return figure, f"Pairs on a plane: {'; '.join(plane.title for plane in of.planes)}"


_DRAWERS: Mapping[type[Figure], Callable[[Any], Drawn]] = {
    figures.DotPlot: _dots,
    figures.CurvePlot: _curves,
    figures.TrainingPlot: _training,
    figures.ClassPlot: _classes,
    figures.HeatMap: _heat_map,
    figures.SeriesPlot: _series,
    figures.FitPlot: _fits,
    figures.PlanePlot: _planes,
}
