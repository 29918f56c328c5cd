"""The part of a page on how far two encoders agree: the advice, its numbers, and a heat map of each measure."""

from __future__ import annotations

import numpy as np

from saffe_cache.report import old_plots as plots
from saffe_cache.report.alignments import Alignment, LayerMeasure
from saffe_cache.report.old_plots import Plot
from saffe_cache.report.sections import Section
from saffe_cache.report.tables import Cell, Sheet, Table, TableRow, percent
from saffe_cache.studies.alignment.result import NAMES

_COLUMNS = ("value", "low", "high", "null_mean", "null_high")


def alignment_section(alignment: Alignment, anchor: str, sheets: list[Sheet]) -> Section:
    sheets.append(_sheet(alignment, anchor))
    advised = "; ".join(f"{one.fusion} ({one.gallery})" for one in alignment.advice)
    absent = [(f"no {NAMES.get(name, name)}", reason) for name, reason in alignment.absent.items()]
    return Section(
        anchor=anchor,
        title=f"Which fusion? {alignment.title}",
        lead=f"Advised before any training, from {alignment.photos['judged']} photos: {advised}.",
        table=_table(alignment),
        texts=[alignment.standing],
        facts=[(f"{one.fusion}, {one.gallery}", one.because) for one in alignment.advice] + absent,
        plots=[_heat_map(alignment, name, of, f"{anchor}-{name}") for name, of in alignment.measures.items()],
    )


def _table(alignment: Alignment) -> Table:
    """What each kind of map finds, between permuted pairs and chance."""
    rows = []
    for closer in alignment.closer:
        for name, score in closer.scores.items():
            rows.append(
                TableRow(
                    "plain",
                    Cell(
                        NAMES.get(name, name), f"photo {_told(closer.gallery_layer)}, text {_told(closer.text_layer)}"
                    ),
                    (
                        Cell(percent(closer.chance)),
                        Cell(percent(score.null_mean), f"95 % of them to {percent(score.null_high)}"),
                        Cell(percent(score.value), f"{percent(score.low)} – {percent(score.high)}"),
                        Cell(f"{score.median_rank:g}"),
                    ),
                )
            )
    caption = (
        f"{alignment.pairs}, split {alignment.split}: R@1 in percent on {alignment.photos['judged']} photos, of maps "
        f"fitted on {alignment.photos['fitted_closer']} others; beneath, 95 % bootstrap intervals over photos."
    )
    return Table(caption, ("", "chance", "permuted pairs", "R@1", "median rank"), tuple(rows))


def _told(layer: str) -> str:
    return "vector" if layer == "own" else f"layer {layer}"


def _heat_map(alignment: Alignment, name: str, measure: LayerMeasure, file: str) -> Plot:
    """Layers of photos downwards; the last row has the highest 95 % quantile of permuted pairs."""
    cells = np.array(measure.value, np.float64)
    nulls = np.array(measure.null_high, np.float64)
    highest = np.fmax.reduce(nulls, axis=0)  # NaN only where all are
    shown = 100 * np.vstack([cells, highest])
    texts = [["" if np.isnan(value) else f"{value:.1f}" for value in row] for row in shown]
    rows = [*alignment.gallery_layers, "permuted"]
    half = float(np.nanmax(np.array(measure.high, np.float64) - np.array(measure.low, np.float64)) / 2)
    best = np.unravel_index(np.nanargmax(cells), cells.shape)
    where = f"photo {_told(rows[best[0]])}, text {_told(alignment.text_layers[best[1]])}"
    caption = (
        f"{NAMES.get(name, name)} in percent: {measure.definition}. Last row: the highest 95 % quantile of permuted "
        f"pairs; chance {percent(measure.chance)}; half of a 95 % interval is at most {percent(half)}."
    )
    described = f"{NAMES.get(name, name)} by layers: highest {100 * cells[best]:.1f} at {where}"
    labels = "text layer", "photo layer"
    return plots.draw_grid(file, shown, texts, (rows, alignment.text_layers), labels, caption, described)


def _sheet(alignment: Alignment, name: str) -> Sheet:
    rows = tuple(
        (layer, text_layer, measure, *(getattr(of, column)[row][place] for column in _COLUMNS), of.chance)
        for measure, of in alignment.measures.items()
        for row, layer in enumerate(alignment.gallery_layers)
        for place, text_layer in enumerate(alignment.text_layers)
    )
    return Sheet(name, ("gallery_layer", "text_layer", "measure", *_COLUMNS, "chance"), rows)
