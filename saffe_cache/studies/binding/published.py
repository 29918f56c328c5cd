"""Table 7 of the SAFFE paper: what it reports of 2-way and 5-way tasks."""

from __future__ import annotations

from typing import Any

_SHOTS = (1, 3, 5)
_ROWS: dict[str, tuple[dict[int, tuple[float | None, ...]], str]] = {
    "FSL frozen, test-blind, 1 epoch": (
        {2: (48.5, 46.7, 45.3), 5: (18.6, 19.9, 19.8)},
        "NF-ResNet-50 and a transformer; the photo is withheld",
    ),
    "Meta-Learning, 1 epoch": (
        {2: (58.7, None, 65.8), 5: (25.1, None, 29.6)},
        "CLIP ViT-B/32 and GPT-2; generates the name",
    ),
    "SAFFE non-aligned, 1 epoch": (
        {2: (80.0, 78.0, 77.0), 5: (30.4, 54.0, 46.4)},
        "CLIP ViT-B/16 and SBERT; falls from 3 shots to 5, and 2-way with every further shot",
    ),
    "SAFFE non-aligned, 2 epochs": (
        {2: (95.0, 90.0, 96.0), 5: (30.0, 80.0, 74.8)},
        "CLIP ViT-B/16 and SBERT; falls from 3 shots to 5 in 5-way, from 1 to 3 in 2-way",
    ),
}
_ALL = "published, on miniImageNet; the number of episodes is unknown"


def published_results() -> list[dict[str, Any]]:
    """One object a cell of the table; values are fractions."""
    return [
        {"name": name, "ways": ways, "shots": shots, "value": value / 100, "note": f"{_ALL}; {note}"}
        for name, (by_ways, note) in _ROWS.items()
        for ways, values in by_ways.items()
        for shots, value in zip(_SHOTS, values, strict=True)
        if value is not None
    ]
