"""alignment.json: how far two encoders agree, layer by layer, and which fusion that speaks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from saffe_cache.core.json_schema import known_part, made_of
from saffe_cache.core.outputs import read_json

Cells = tuple[tuple[float | None, ...], ...]
"""Of each photo layer, of each text layer; None where the measure is absent."""
_CELLS = ("value", "low", "high", "null_mean", "null_high")


@dataclass(frozen=True, kw_only=True)
class LayerMeasure:
    """A measure of all pairs of layers; fractions."""

    definition: str
    chance: float
    value: Cells
    low: Cells
    high: Cells
    null_mean: Cells
    null_high: Cells
    """95 % quantile where pairs are permuted."""


@dataclass(frozen=True, kw_only=True)
class MapScore:
    """R@1 of one map."""

    value: float
    low: float
    high: float
    null_mean: float
    null_high: float
    median_rank: float


@dataclass(frozen=True, kw_only=True)
class Closer:
    """The maps between two layers."""

    gallery_layer: str
    text_layer: str
    chance: float
    scores: Mapping[str, MapScore]


@dataclass(frozen=True, kw_only=True)
class AdvisedFusion:
    """For one kind of gallery."""

    gallery: str
    fusion: str
    because: str


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """What alignment.json says, as far as a page shows it."""

    title: str
    split: str
    pairs: str
    photos: Mapping[str, int]
    gallery_layers: tuple[str, ...]
    text_layers: tuple[str, ...]
    measures: Mapping[str, LayerMeasure]
    absent: Mapping[str, str]
    closer: tuple[Closer, ...]
    advice: tuple[AdvisedFusion, ...]
    standing: str


def read_alignment(path: Path) -> Alignment:
    """
    Raises:
        ValueError: a field is missing or of another kind, or a grid has not one cell for each pair of layers.
    """
    content = read_json(path)
    try:
        alignment = made_of(Alignment, known_part(Alignment, content))
        for name in ("judged", "fitted_closer"):
            if name not in alignment.photos:
                raise ValueError(f"photos: {name} is missing")
        expected = [len(alignment.text_layers)] * len(alignment.gallery_layers)
        for name, measure in alignment.measures.items():
            for cells in _CELLS:
                found = [len(row) for row in getattr(measure, cells)]
                if found != expected or not expected:
                    raise ValueError(f"measures: {name}: {cells}: rows of {found} cells, expected {expected}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}. Run saffe-align again.") from None
    return alignment
