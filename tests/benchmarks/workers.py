"""Two worker processes over one, on one cache: the rate, and what it costs in processor time. See bench.py.

    python tests/benchmarks/workers.py --work runs/bench          (this section alone)

Every process computes with one thread and has imported everything before the clock starts; each loads the encoder by
itself, which counts. Where the cores are busy with other jobs, two processes cannot be faster than one; the sum of
their processor time then tells what the protocol costs: claims, records, and blocks that are encoded twice.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from timing import Figure, Rounds

sys.path.insert(0, str(Path(__file__).parents[2]))  # data/

from data.encoders import fetch_encoders
from data.scenes import draw_scenes

ROUNDS = 3
PHOTOS = 128
LAYERS = (11, 12)
_WORKER = """
import sys, time
import torch
import transformers
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.workers import run_rank

data, cache, model, rank, world_size, *layers = sys.argv[1:]
torch.set_num_threads(1)
transformers.AutoModel, transformers.Dinov2Model
config = ExtractConfig(
    data=data, cache=cache, encoder={"image": model}, layers={"image": tuple(map(int, layers))}, image_size=112,
    shard_mb=2, workers=2, device="cpu", rank=int(rank), world_size=int(world_size),
)
print("ready", flush=True)
sys.stdin.readline()
before = time.process_time()
run_rank(config)
print(time.process_time() - before, flush=True)
"""


def measure(work: Path) -> list[Figure]:
    model = str(fetch_encoders(work.parent / "encoders")["dinov2-small"])
    data = str(draw_scenes(work / "data", {"train": PHOTOS}, seed=0, size=224))
    measured = {1: list[tuple[float, float]](), 2: list[tuple[float, float]]()}
    for number in range(ROUNDS):
        for count in measured:
            measured[count].append(extraction(data, str(work / f"{count}-{number}.zarr"), model, count))
    rates = Rounds({f"{count} wall": 1 / np.array([wall for wall, _ in found]) for count, found in measured.items()})
    costs = Rounds({f"{count} cpu": np.array([cpu for _, cpu in found]) for count, found in measured.items()})
    medians = "; ".join(
        f"{count}: {np.median([wall for wall, _ in found]):.1f} s, CPU {np.median([cpu for _, cpu in found]):.1f} s"
        for count, found in measured.items()
    )
    return [
        rates.ratio("2 wall", "1 wall", "2 worker processes over 1: rate", note=medians),
        costs.ratio("2 cpu", "1 cpu", "2 worker processes over 1: CPU seconds", note=medians),
    ]


def extraction(data: str, cache: str, model: str, num_workers: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of all workers together."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, data, cache, model, str(rank), str(num_workers), *map(str, LAYERS)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(num_workers)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    started = time.perf_counter()
    outputs = [worker.stdin for worker in workers]
    for pipe in outputs:
        assert pipe is not None
        pipe.write("\n")
        pipe.flush()
    spent = [float(worker.communicate()[0]) for worker in workers]
    return time.perf_counter() - started, sum(spent)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for figure in measure(Path(folder)):
            print(f"{figure.name}: {figure.value:.2f} {figure.interval} ({figure.note})")


if __name__ == "__main__":
    main()
