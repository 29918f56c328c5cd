"""Training and extraction beside other busy processes, against themselves alone. See bench.py.

    python tests/benchmarks/crowded.py --work runs/bench          (this section alone)

A worker computes as a command does, with a thread for each core that sleeps while it waits. Its turns, alone and beside
processes that each keep a core busy, alternate. The fair share is what a scheduler that gives equal time to all threads
leaves it: of N threads on N cores beside B busy ones, N / (N + B).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from timing import Figure, take_turns

from saffe_cache.core.devices import num_cores, set_up_threads

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # data/, and the synthetic cache

BUSY = (0, 1, 2)
ROUNDS = 5
STEPS, PHOTOS = 12, 64
TRAINED_ON = 1000
LAYERS = (11, 12)
TARGET = 0.9


def measure(work: Path) -> list[Figure]:
    return [
        *beside_others("training", "steps/s", work),
        *beside_others("extraction", "photos/s", work),
    ]


def beside_others(kind: str, unit: str, work: Path) -> list[Figure]:
    """The rate alone, and the part of it that is left beside busy processes."""
    with worker(kind, work) as turn:

        def beside(number: int) -> int:
            with busy_processes(number):
                return turn()

        rounds = take_turns({str(number): partial(beside, number) for number in BUSY}, ROUNDS)
    found = [rounds.rate("0", f"{kind} alone", unit)]
    for number in BUSY[1:]:
        share = num_cores() / (num_cores() + number)
        name, note = f"{kind} beside {number} busy / alone", f"the fair share beside {number} is {share:.2f}"
        found.append(rounds.ratio(str(number), "0", name, at_least=TARGET * share, note=note))
    return found


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@contextmanager
def worker(kind: str, work: Path) -> Iterator[Callable[[], int]]:
    """A process that does one turn at a time, and returns its amount; it has not loaded torch before its set-up."""
    command = [sys.executable, __file__, "--work", str(work), "--worker", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def turn() -> int:
            asked.write("\n")
            asked.flush()
            return int(answers.readline())

        yield turn
        asked.close()


def serve_turns(kind: str, work: Path) -> None:
    set_up_threads()
    turn = TURNS[kind](work)
    for _ in sys.stdin:
        print(turn(), flush=True)


def training_turns(work: Path) -> Callable[[], int]:
    """Steps of `linear` on TRAINED_ON photos, whose summaries are kept in memory."""
    import numpy as np
    from synthetic_cache import make_cache

    from saffe_cache.inputs.feature_loader import FeatureLoader
    from saffe_cache.inputs.pairs import training_pairs
    from saffe_cache.store.reader import open_cache
    from saffe_cache.training.batches import TrainingData
    from saffe_cache.training.config import TrainConfig
    from saffe_cache.training.loop import _step, start
    from saffe_cache.training.resolve import resolve_run

    path = make_cache(work / "cache.zarr", {"train": TRAINED_ON, "dev": 100}, captions=5, width=384, text_width=384)
    config = TrainConfig(cache=path, out="unused", fusion="linear", validation="dev", device="cpu").resolved()
    cache = open_cache(path)
    spec = resolve_run(config, cache)
    training, validation, _ = training_pairs(spec, cache)
    inputs = FeatureLoader(cache, spec, "cpu", "memory")
    inputs.keep_summaries(np.concatenate([training.rows, validation.rows]))
    data = TrainingData(inputs, training, validation, 256, 0)
    state, firsts = start(config, spec, data, resumes=True), count(0, STEPS)

    def turn() -> int:
        first = next(firsts)
        return sum(_step(config, state, batch, 100) is not None for batch in data.batches(first, first + STEPS))

    return turn


def extraction_turns(work: Path) -> Callable[[], int]:
    """A whole extraction of DINOv2-small at 112 px."""
    from data.encoders import fetch_encoders
    from data.scenes import draw_scenes
    from saffe_cache.extraction.config import ExtractConfig
    from saffe_cache.extraction.extract import extract

    encoder = {"image": str(fetch_encoders(work.parent / "encoders")["dinov2-small"])}
    data, numbers = str(draw_scenes(work / "photos", {"train": PHOTOS}, seed=0, size=224)), count()

    def turn() -> int:
        to = str(work / f"extracted-{next(numbers)}.zarr")
        options = {"layers": {"image": LAYERS}, "image_size": 112, "device": "cpu"}
        extract(ExtractConfig(data=data, cache=to, encoder=encoder, **options))
        return PHOTOS

    return turn


TURNS = {"training": training_turns, "extraction": extraction_turns}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--worker", choices=("training", "extraction"), help="serve turns; the section starts it")
    options = parser.parse_args(arguments)
    if options.worker:
        serve_turns(options.worker, options.work)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for figure in measure(Path(folder)):
            print(f"{figure.name}: {figure.value:.2f} {figure.unit} {figure.interval}, target {figure.at_least}")


if __name__ == "__main__":
    main()
