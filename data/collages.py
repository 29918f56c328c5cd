"""Makes a set that needs binding out of real photos: collages of 2 or 4, each with a note that points at one of them.

    python data/collages.py --data flickr8k --out DIR --cells 2 --seed 0        (7,000 photos: 88 MB)

reads a folder of captioned photos, `{split}/metadata.jsonl` with `file_name` and `captions`, and writes for each split
`DIR/{split}/{split}-00000.jpg`, ... and a metadata.jsonl with a line per collage,

    {"file_name": "train-00000.jpg", "captions": ["the one on the left", a caption of that photo, another, ...]}

so that with `--gallery-text first_caption` the note is paired with the collage and the captions search. `DIR/
collages.json` holds the settings and what is where; `read_collages` reads that back.

Design: a split of n photos makes n collages. Every photo is in as many collages as a collage has cells, beside others,
and is pointed at in one of them. So a caption fits several collages by what they show, and the note alone says which
photo is meant, but not what it shows: by any of both parts alone, or by the sum of two ideal scores, one in `cells`
answers is right at best, but for what a sum gains by favouring some places (see notes.py). Where a photo stands is
random.

A photo stays in its split; one that is in several splits, by its content, is left out. Photos are scaled to fit their
cell whole, as captions tell of all that they show; a collage of two leaves a margin above and below.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

if not __package__:  # run as a script: the path then holds data/, not its parent
    sys.path.insert(0, str(Path(__file__).parents[1]))

from data.drawn import draw_once

VERSION = 1
"""Counts up when the same settings would make other collages or notes."""

SIZE = 224
MARGIN = (127, 127, 127)
PLACES = {
    2: ("on the left", "on the right"),
    4: ("at the top left", "at the top right", "at the bottom left", "at the bottom right"),
}
"""Of each cell, row by row, by the number of cells."""

WORDINGS = (
    "the one {place}",
    "the photo {place}",
    "this is about the picture {place}",
    "look {place}",
    "what you see {place}",
    "I mean the image {place}",
)


@dataclass(frozen=True)
class Collage:
    """Which photos are in a collage, by their names in the source, row by row."""

    photos: tuple[str, ...]
    pointed: int
    """The cell of the photo that the note points at."""
    note: str


def plan_collages(names: Sequence[str], cells: int, rng: random.Random) -> list[Collage]:
    """A collage for each photo, which points at it; every photo is in `cells` of them, no two show the same photos.

    Photos in random order stand in a ring. The collage of one holds it and those at some distances behind it.
    """
    if cells not in PLACES:
        raise ValueError(f"--cells {cells}: expected 2 or 4. Choose one of these.")
    order, most = rng.sample(names, len(names)), len(names)
    if most <= 4 * cells:
        raise ValueError(
            f"a split has {most} photos, expected more than {4 * cells} for collages of {cells}. Use more photos."
        )
    while True:
        distances = [0, *rng.sample(range(1, most), cells - 1)]
        shown = [[order[(start + far) % most] for far in distances] for start in range(most)]
        if len(set(map(frozenset, shown))) == most:
            break
    collages = []
    for photos in shown:
        placed = rng.sample(photos, cells)
        pointed = placed.index(photos[0])
        collages.append(Collage(tuple(placed), pointed, rng.choice(WORDINGS).format(place=PLACES[cells][pointed])))
    return collages


def paste(photos: Sequence[Path], size: int) -> Image.Image:
    """A square collage of `size` pixels; each photo is whole in its cell."""
    canvas = Image.new("RGB", (size, size), MARGIN)
    side = size // 2
    top = size // 4 if len(photos) == 2 else 0
    for cell, path in enumerate(photos):
        with Image.open(path) as photo:
            fitted = ImageOps.pad(ImageOps.exif_transpose(photo).convert("RGB"), (side, side), color=MARGIN)
        canvas.paste(fitted, (side * (cell % 2), top + side * (cell // 2)))
    return canvas


Captions = dict[str, list[str]]
"""By the name of a photo."""


def read_captions(source: Path) -> dict[str, Captions]:
    """The captions of each split's photos; ValueError if there are none.

    Photos without captions, and those whose content is in several splits or twice in one, are left out and counted.
    """
    found: dict[str, Captions] = {}
    for listing in sorted(source.glob("*/metadata.jsonl")):
        rows = map(json.loads, listing.read_text().splitlines())
        found[listing.parent.name] = {row["file_name"]: row["captions"] for row in rows if row.get("captions")}
    if not found:
        raise ValueError(
            f"{source}: found no SPLIT/metadata.jsonl with captions, expected one a split. Choose another --data."
        )
    digests = {
        (split, name): hashlib.sha256((source / split / name).read_bytes()).digest()
        for split, captions in found.items()
        for name in captions
    }
    counts = Counter(digests.values())
    repeated = [place for place, digest in digests.items() if counts[digest] > 1]
    if repeated:
        print(
            f"{len(repeated)} photos are left out: their content is there twice; for instance {'/'.join(repeated[0])}"
        )
    for split, name in repeated:
        del found[split][name]
    return found


def make_collages(
    source: Path, out_dir: Path, cells: int, seed: int, *, most: int | None = None, size: int = SIZE
) -> Path:
    """Make the collages of all splits of `source`, each of at most `most` photos, in `out_dir`, and return it."""

    def draw(drawing: Path) -> dict[str, Any]:
        planned = {}
        for split, captions in read_captions(source).items():
            rng = random.Random(f"{seed}/{split}/collages")
            names = rng.sample(sorted(captions), len(captions))[:most]
            planned[split] = plan_collages(names, cells, rng)
            _write_split(drawing / split, source / split, planned[split], captions, size)
        return {"collages": {split: [asdict(one) for one in collages] for split, collages in planned.items()}}

    settings = {"version": VERSION, "data": str(source), "cells": cells, "seed": seed, "most": most, "size": size}
    return draw_once(out_dir, "collages.json", settings, draw)


def _write_split(out: Path, source: Path, collages: Sequence[Collage], captions: Captions, size: int) -> None:
    out.mkdir(parents=True)
    with (out / "metadata.jsonl").open("w") as metadata:
        for number, collage in enumerate(collages):
            name = f"{out.name}-{number:05d}.jpg"
            paste([source / photo for photo in collage.photos], size).save(out / name, quality=92)
            texts = [collage.note, *captions[collage.photos[collage.pointed]]]
            metadata.write(json.dumps({"file_name": name, "captions": texts}) + "\n")


def read_collages(folder: Path, split: str) -> list[Collage]:
    """What the collages of a split show, in the order of its metadata.jsonl."""
    rows = json.loads((folder / "collages.json").read_text())["collages"][split]
    return [Collage(tuple(row["photos"]), row["pointed"], row["note"]) for row in rows]


def ideal_late_fusion(cells: int) -> dict[str, float]:
    """mAP and R@1 where the photo is always found in its `cells` collages, whose order is random."""
    return {"map": sum(1 / rank for rank in range(1, cells + 1)) / cells, "recall_at_1": 1 / cells}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make collages of captioned photos with notes that point at one.")
    parser.add_argument("--data", type=Path, required=True, help="folder with SPLIT/metadata.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--cells", type=int, default=2, choices=tuple(PLACES), help="photos of a collage (2)")
    parser.add_argument("--most", type=int, help="most photos of a split (all)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(make_collages(given.data, given.out, given.cells, given.seed, most=given.most))


if __name__ == "__main__":
    main()
