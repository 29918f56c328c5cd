"""CIFAR-10: classes search photos (P1), and every photo is fused with every class (P2).

    python pipelines/cifar10.py --data PATH/cifar10 --work runs/cifar10 --seeds 0 1 2
    python pipelines/cifar10.py --data PATH/cifar10 --work runs/cifar10-clip --paper-pair --train 2000 --test 1000

`--data` is a folder of class folders, {train,test}/CLASS/*.png, or `uoft-cs/cifar10` from the hub. The first line
takes DINOv2-small at 112 px and MiniLM, the second the SAFFE paper's own pair, CLIP ViT-B/16 at 224 px and
all-mpnet-base-v2. `reuse` and `paper` are trained with null text for P1 and over pairs for P2, each validated so, and
`reference` as the released code trains. The best epoch is chosen on a tenth of train. Time on two CPU cores: 4 min to
extract 7,000 photos with DINOv2, 1 to 6 min a training; CLIP encodes about 4 photos a second. Disk: 0.8 GB and 1.9 GB.
Results with dates: LOG.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # pipelines/ is next to the package, not in it

from pipelines.tables import Variant, Variants, failures
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract


def rows_of(layers: dict[str, object], epochs: int) -> list[Variant]:
    """The variants, on the layers of one pair of encoders."""
    alone = layers | {"epochs": epochs}
    pairs = alone | {"objective": {"pair": 1.0}, "negatives": 4, "pair_photos": 32, "batch_size": 128}
    pairs |= {"epochs": epochs // 2, "learning_rate": 5e-4}
    return [
        Variant("linear", {"fusion": "linear", "layers": {"image": (11, 12)}}),
        Variant("reuse", alone, ("class",)),
        Variant("paper", alone | {"fusion": "paper"}, ("class",)),
        Variant("reuse, pairs", pairs, ("candidate",)),
        Variant("paper, pairs", pairs | {"fusion": "paper"}, ("candidate",)),
        Variant("reference", alone | {"fusion": "reference"}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--paper-pair", action="store_true", help="CLIP ViT-B/16 and all-mpnet-base-v2")
    parser.add_argument("--image-encoder", help="default: the pair's")
    parser.add_argument("--text-encoder", help="default: the pair's")
    parser.add_argument("--train", type=int, default=5000, help="photos to train on")
    parser.add_argument("--test", type=int, default=2000, help="photos to report on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=8, help="of the decoders")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.paper_pair:
        image, text = "openai/clip-vit-base-patch16", "sentence-transformers/all-mpnet-base-v2"
    else:
        image, text = "facebook/dinov2-small", "sentence-transformers/all-MiniLM-L6-v2"
    text_layers = (11, 12) if options.paper_pair else (5, 6)
    cache = extract(
        ExtractConfig(
            data=options.data,
            cache=str(options.work / "cifar10.zarr"),
            encoder={"image": options.image_encoder or image, "text": options.text_encoder or text},
            layers={"image": (11, 12), "text": text_layers},
            image_size=None if options.paper_pair else 112,
            max_items={"train": options.train, "test": options.test},
            storage="float16",
        )
    )
    table = Variants(
        cache=cache,
        work=options.work,
        rows=rows_of({"layers": {"image": (11,), "text": text_layers[:1]}}, options.epochs),
        protocols=("class", "candidate"),
        split="test",
        seeds=options.seeds,
    )
    measured = table.run()
    for protocol, found in measured.items():
        metrics = ("map", "map_at_100", "top1") + (("top1_prior_removed",) if protocol == "candidate" else ())
        print(f"{protocol} protocol", found.table(metrics, "photos_shuffled").to_markdown(), sep="\n\n")
    print(*failures(measured), sep="\n")


if __name__ == "__main__":
    main()
