"""Pointed collages: does the fusion bind on real photos? Grids of 2 or 4 photos with a note that points at one.

    python pipelines/collages.py --data flickr8k --work runs/collages --cells 2 4 --seeds 0 1 2

`flickr8k` is a folder of captioned photos (`{split}/metadata.jsonl`). Makes the collages (data/collages.py), extracts
DINOv2-small's hidden states 9 and 12 at 224 px and MiniLM's 5 and 6, trains each variant on collages paired with their
note, and searches with captions of the photo that is pointed at. A collage alone holds 2 or 4 photos that fit; the
note alone fits half or a quarter of all collages. The table also has the baselines, and what the sum of two ideal
scores reaches. Disk, for 7,000 photos: 4 GB for each number of cells. Results with dates: LOG.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # data/ and pipelines/ are next to the package, not in it

from data.collages import ideal_late_fusion, make_collages
from pipelines.tables import Variant, Variants, failures
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract

TOKENS = {"layers": {"image": (9,), "text": (5,)}}
ROWS = [
    Variant("reuse", TOKENS),
    Variant("reuse, text asks", TOKENS | {"query_side": "text"}),
    Variant("linear (late fusion)", {"fusion": "linear", "layers": {"image": (9, 12)}}),
    Variant("concat", {"fusion": "concat", "layers": {"image": (9, 12)}}),
]
METRICS = ("map", "recall_at_1", "recall_at_5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of captioned photos")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", type=int, default=[2, 4], choices=(2, 4))
    parser.add_argument("--most", type=int, help="most photos of a split (all)")
    parser.add_argument("--split", default="dev", help="that is reported; epochs are chosen on a part of train (dev)")
    parser.add_argument("--image-encoder", default="facebook/dinov2-small")
    parser.add_argument("--text-encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", nargs="+", default=[row.name for row in ROWS], choices=[row.name for row in ROWS])
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for cells in options.cells:
        compare(cells, options)


def compare(cells: int, options: argparse.Namespace) -> None:
    """Everything for collages of one number of cells, into a folder of its own."""
    work: Path = options.work / f"cells-{cells}"
    made = make_collages(options.data, work / "collages", cells, 0, most=options.most)
    cache = extract(
        ExtractConfig(
            data=str(made),
            cache=str(work / "collages.zarr"),
            encoder={"image": options.image_encoder, "text": options.text_encoder},
            layers={"image": (9, 12), "text": (5, 6)},
            image_size=options.image_size,
            storage="float16",
        )
    )
    shared = {"gallery_text": "first_caption", "validation": "heldout", "epochs": options.epochs, "batch_size": 256}
    table = Variants(
        cache=cache,
        work=work,
        rows=[row for row in ROWS if row.name in options.rows],
        protocols=("metadata",),
        split=options.split,
        seeds=options.seeds,
        shared=shared,
    )
    measured = table.run()
    print(f"\nCollages of {cells} photos")
    print(measured["metadata"].table(METRICS, "photos_shuffled").to_markdown(), *failures(measured), sep="\n")
    ideal = ", ".join(f"{metric} {100 * value:.1f}" for metric, value in ideal_late_fusion(cells).items())
    print(f"The sum of two ideal scores: {ideal}")


if __name__ == "__main__":
    main()
