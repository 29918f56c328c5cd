"""What the makers of drawn sets share: a folder that is there whole or not at all, and a command line.

The folder appears by one rename, with a marker file that holds its settings: the same settings return it as it is,
others are refused.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL

Draw = Callable[[Path], dict[str, Any]]
"""Fills a folder, and returns what the marker is to hold beside the settings."""


def draw_once(out_dir: Path, marker_name: str, settings: dict[str, Any], draw: Draw) -> Path:
    """Let `draw` fill `out_dir`, then write the marker: `settings` and what `draw` returns for it."""
    if out_dir.exists():
        marker = out_dir / marker_name
        found = json.loads(marker.read_text())["settings"] if marker.exists() else f"no {marker_name}"
        if found != settings:
            remedy = "Choose another --out, or remove the folder."
            raise ValueError(f"{out_dir}: found {found}, expected {settings}. {remedy}")
        return out_dir
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as scratch:
        drawing = Path(scratch) / out_dir.name
        made_with = {"pillow": PIL.__version__, "numpy": np.__version__}
        content = {"settings": settings, "made_with": made_with, **draw(drawing)}
        (drawing / marker_name).write_text(json.dumps(content, indent=2) + "\n")
        drawing.rename(out_dir)
    return out_dir


def run_command(draw: Callable[[Path, dict[str, int], int], Path], description: str, sizes: dict[str, int]) -> None:
    """The command line of a drawn set; `sizes` are the pictures of each split unless told otherwise."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    for split, num_scenes in sizes.items():
        parser.add_argument(f"--{split}", type=int, default=num_scenes, help=f"pictures in it ({num_scenes})")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    splits = {split: getattr(arguments, split) for split in sizes}
    print(draw(arguments.out, splits, arguments.seed))
