"""Time and peak memory of each stage at 1, 2, 4 and 8 times the items: linear in time, flat in memory. See bench.py.

All captions search all photos in the evaluation, so that its time has a part that grows with the square.
Photos are noise and the encoders tiny, so that what is measured is the pipeline. Each stage at each size has a process
of its own. The plot is `growth.svg` beside the table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from timing import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny_models.py

from tiny_models import WORDS, save_tiny

from saffe_cache.evaluation.evaluate import EvaluateConfig, evaluate
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.train import train

ITEMS = 1000
FACTORS = (1, 2, 4, 8)
CAPTIONS = 2


def measure(work: Path) -> list[Figure]:
    measured: dict[str, dict[int, dict[str, float]]] = {stage: {} for stage in STAGES}
    encoders = {name: save_tiny(name, work / name) for name in ("dinov2", "bert")}
    for factor in FACTORS:
        folder = work / str(factor)
        draw(folder / "data", factor * ITEMS)
        for stage in STAGES:
            measured[stage][factor] = measure_apart(stage, folder, *map(str, encoders.values()))
    plot(measured, work.parent / "growth.svg")
    return [figure for stage, of_stage in measured.items() for figure in figures_of(stage, of_stage)]


def measure_apart(stage: str, folder: Path, image: str, text: str) -> dict[str, float]:
    """`measure_stage` in a process of its own."""
    arguments = [sys.executable, __file__, stage, str(folder), image, text]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure_stage(stage: str, folder: Path, image: str, text: str) -> dict[str, float]:
    started = time.perf_counter()
    STAGES[stage](folder, image, text)
    return {"seconds": time.perf_counter() - started, "peak_mb": peak_megabytes()}


def figures_of(stage: str, measured: Mapping[int, Mapping[str, float]]) -> list[Figure]:
    """Of one stage: what an item more costs, between 1 and 4 and between 4 and 8 times the items, and the memory."""
    seconds = {factor: of_size["seconds"] for factor, of_size in measured.items()}
    memory = {factor: of_size["peak_mb"] for factor, of_size in measured.items()}
    late, early = (seconds[8] - seconds[4]) / 4, (seconds[4] - seconds[1]) / 3
    sizes = ", ".join(f"{factor * ITEMS}: {seconds[factor]:.1f} s, {memory[factor]:.0f} MB" for factor in FACTORS)
    if stage == "evaluate":
        sizes += "; captions and photos both grow, and so their pairs with the square"
    time_name = f"{stage}: time of an item, 5th to 8th part / 2nd to 4th"
    memory_name = f"{stage}: peak memory at 8 times the items less at 1"
    return [
        Figure(name=time_name, unit="ratio", value=late / early, note=sizes),
        Figure(name=memory_name, unit="MB", value=memory[8] - memory[1]),
    ]


def draw(folder: Path, count: int) -> None:
    """Noise with captions: `count` photos to train on, a fixed number to validate and to report on."""
    for split, number in {"train": count, "dev": ITEMS // 5, "test": ITEMS // 5}.items():
        (folder / split).mkdir(parents=True)
        generator = np.random.default_rng([number, len(split)])
        lines = []
        for index in range(number):
            Image.fromarray(generator.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / split / f"{index}.png")
            captions = [" ".join(generator.choice(WORDS, 12)) for _ in range(CAPTIONS)]
            lines.append(json.dumps({"file_name": f"{index}.png", "captions": captions}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))


def extract_stage(folder: Path, image: str, text: str) -> None:
    layers = {"image": (2, 3), "text": (2,)}
    encoder = {"image": image, "text": text}
    extract(
        ExtractConfig(
            data=str(folder / "data"), cache=str(folder / "cache"), encoder=encoder, layers=layers, shard_mb=1
        )
    )


def train_stage(folder: Path, image: str, text: str) -> None:
    config = {"fusion": "linear", "epochs": 3, "control_epochs": 1, "log": ("none",), "batch_size": 128}
    train(TrainConfig(cache=str(folder / "cache"), out=str(folder / "run"), **config))


def evaluate_stage(folder: Path, image: str, text: str) -> None:
    evaluate(EvaluateConfig(cache=str(folder / "cache"), run=str(folder / "run"), split="train"))


STAGES = {"extract": extract_stage, "train": train_stage, "evaluate": evaluate_stage}


def plot(measured: Mapping[str, Mapping[int, Mapping[str, float]]], path: Path) -> None:
    """Seconds and peak memory against items, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure as Drawing
    except ImportError:
        return
    drawing = Drawing(figsize=(8, 3.2), layout="constrained")
    shown = {"seconds": "seconds", "peak_mb": "peak memory, MB"}
    for axes, (key, label) in zip(drawing.subplots(1, 2), shown.items(), strict=True):
        for (stage, of_stage), marker in zip(measured.items(), "os^", strict=True):
            items = [factor * ITEMS for factor in of_stage]
            axes.plot(items, [of_size[key] for of_size in of_stage.values()], marker=marker, label=stage)
        axes.set(xlabel="photos", ylabel=label, xlim=(0, None), ylim=(0, None))
        axes.legend(frameon=False)
    drawing.savefig(path)


def peak_megabytes() -> float:
    """Of this process alone; ru_maxrss would begin with what its parent had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    print(json.dumps(measure_stage(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])))
