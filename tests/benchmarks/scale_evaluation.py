"""Time and peak memory of a training and its evaluation on many photos. See pipelines/LOG.md.

    python tests/benchmarks/scale_evaluation.py --work FOLDER [--photos 100000] [--captions 5] [--width 64]
    python tests/benchmarks/scale_evaluation.py --ranking [--photos 100000] [--width 384]

The cache is synthetic, with tokens of a few numbers. Each stage has a process of its own, and is left out where FOLDER
holds its result. With --ranking, the time of a query in a gallery is measured instead: by float32 products that are
checked, and by exact products alone, as before there were such.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # synthetic_cache.py

from synthetic_cache import make_cache

from saffe_cache.core.items import Ragged
from saffe_cache.evaluation.evaluate import EvaluateConfig, evaluate
from saffe_cache.retrieval import ranking
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.train import train

QUERIES = 4096


def make_stage(options: argparse.Namespace, work: Path) -> None:
    make_cache(
        work / "cache",
        {"train": options.train, "test": options.photos},
        captions=options.captions,
        signal=0.5,
        width=options.width,
        text_width=options.width,
        shard_rows=4096,
    )


def train_stage(options: argparse.Namespace, work: Path) -> None:
    cache = str(work / "cache")
    train(TrainConfig(cache=cache, out=str(work / "run"), fusion="linear", epochs=options.epochs, log=("none",)))


def evaluate_stage(options: argparse.Namespace, work: Path) -> None:
    evaluate(EvaluateConfig(cache=str(work / "cache"), run=str(work / "run")))


STAGES = {"make": make_stage, "train": train_stage, "evaluate": evaluate_stage}
RESULTS = {"make": "cache", "train": "run/result.json", "evaluate": "run/test-caption/result.json"}


def measured(stage: str, options: argparse.Namespace, work: Path) -> dict[str, float]:
    """Run a stage in this process."""
    started = time.perf_counter()
    STAGES[stage](options, work)
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    seconds = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time()}
    return {name: round(value, 1) for name, value in {**seconds, "peak_mb": peak}.items()}


def per_query(photos: int, width: int) -> None:
    """Milliseconds of a query that is near its photo, and of one that finds nothing; with one and five answers."""
    generator = np.random.default_rng(0)

    def unit(vectors: np.ndarray) -> np.ndarray:
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    gallery, own = unit(generator.standard_normal((photos, width))), generator.integers(photos, size=QUERIES)
    for name, noise, answers in (("near", 0.9, 1), ("chance", 1e3, 1), ("chance", 1e3, 5)):
        queries = unit(gallery[own] + noise * unit(generator.standard_normal((QUERIES, width))))
        relevant = Ragged.from_rows([[one, *generator.choice(photos, answers - 1, replace=False)] for one in own])
        found, times = [], []
        for most in (ranking._MOST_TARGETS, 0):
            ranking._MOST_TARGETS = most
            started = time.process_time()
            found.append(ranking.relevant_ranks(ranking.InnerProducts(gallery, queries), relevant).values)
            times.append(1000 * (time.process_time() - started) / QUERIES)
        ranking._MOST_TARGETS = 8
        assert (found[0] == found[1]).all()
        print(f"{name}, {answers} relevant: {times[0]:.2f} ms a query, exact products alone {times[1]:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work")
    parser.add_argument("--photos", type=int, default=100_000)
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--ranking", action="store_true")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ranking:
        per_query(options.photos, options.width)
        return
    work = Path(options.work)
    if options.stage:
        print(json.dumps(measured(options.stage, options, work)))
        return
    work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if not (work / RESULTS[stage]).exists():
            done = subprocess.run([sys.executable, *sys.argv, "--stage", stage], stdout=subprocess.PIPE, text=True)
            print(stage, done.stdout.strip() or f"ended with status {done.returncode}", flush=True)


if __name__ == "__main__":
    main()
