"""AV digits: handwritten and spoken digits as items of a photo and a sound, each degraded, so that neither suffices.

    python pipelines/av_digits.py --sounds PATH/spoken_digits --work runs/av-digits

`--sounds` is a folder {train,dev,test}/DIGIT/*.flac, such as the Free Spoken Digit Dataset (3,000 recordings of 6
speakers); the photos are scikit-learn's handwritten digits (1,797 of 8 x 8 pixels). They are paired by class, at
random, as in MultiBench (Liang et al., 2021); photos and recordings of different splits are different ones. Each photo
and each sound has a severity of its own, drawn from 0 to 1: noise, blur, and a part that is cut out.

DINOv2-small at 56 px and Whisper tiny; MiniLM for the names of the digits. Then fused items with three seeds (saffe
subsets), a run for photos and one for sounds, and the bridge between them (saffe bridge).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

from saffe_cache.core.results import read_report
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.studies.bridge.bridge import bridge
from saffe_cache.studies.bridge.config import BridgeConfig
from saffe_cache.studies.subsets.config import SubsetsConfig
from saffe_cache.studies.subsets.subsets import subsets
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.train import train

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ITEMS: Mapping[str, int] = {"train": 900, "dev": 150, "test": 450}
PHOTOS: Mapping[str, slice] = {"train": slice(0, 1197), "dev": slice(1197, 1397), "test": slice(1397, 1797)}
SIDE = 56


def write_items(folder: Path, sounds: Path, seed: int = 0) -> Path:
    """Write the items' files and a table for each split, and return the folder; one that is there is kept."""
    generator = np.random.default_rng(seed)
    digits = load_digits()
    order = generator.permutation(len(digits.target))
    for split, count in ITEMS.items():
        table, rows = folder / split / "metadata.jsonl", []
        if table.exists():
            continue
        table.parent.mkdir(parents=True, exist_ok=True)
        photos = order[PHOTOS[split]]
        for number in range(count):
            digit = number % len(NAMES)
            photo = generator.choice(photos[digits.target[photos] == digit])
            recording = generator.choice(sorted((sounds / split / str(digit)).iterdir()))
            severities = generator.uniform(size=2).round(3).tolist()
            degraded_photo(digits.images[photo] / 16, severities[0], generator).save(table.parent / f"{number}.png")
            wave, rate = soundfile.read(recording, dtype="float32")
            soundfile.write(table.parent / f"{number}.wav", degraded_sound(wave, severities[1], generator), rate)
            severity = {"image_severity": severities[0], "audio_severity": severities[1]}
            rows.append({"image": f"{number}.png", "audio": f"{number}.wav", "label": NAMES[digit], **severity})
        table.write_text("\n".join(map(json.dumps, rows)))
    return folder


def degraded_photo(pixels: np.ndarray, severity: float, generator: np.random.Generator) -> Image.Image:
    """A picture of pixels [8, 8] from 0 to 1: blurred, with noise, and with a square cut out."""
    picture = Image.fromarray((255 * pixels).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    values = np.asarray(picture.filter(ImageFilter.GaussianBlur(severity * SIDE / 20)), np.float32) / 255
    values = values + generator.normal(scale=0.7 * severity, size=values.shape)
    size = int(0.6 * severity * SIDE)
    top, left = generator.integers(SIDE - size, size=2)
    values[top : top + size, left : left + size] = 0.5
    return Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8)).convert("RGB")


def degraded_sound(wave: np.ndarray, severity: float, generator: np.random.Generator) -> np.ndarray:
    """Samples [n]: smoothed, with noise, and with a part made silent."""
    width = 1 + int(12 * severity)
    values = np.convolve(wave, np.full(width, 1 / width), "same")
    loudness = float(np.sqrt(np.mean(np.square(values)))) + 1e-6
    size = int(0.6 * severity * len(values))
    start = int(generator.integers(len(values) - size))
    values[start : start + size] = 0
    values = values + generator.normal(scale=3 * severity * loudness, size=values.shape)
    return np.asarray(values / max(1.0, float(np.abs(values).max())), np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sounds", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--image-encoder", default="facebook/dinov2-small")
    parser.add_argument("--audio-encoder", default="openai/whisper-tiny.en")
    parser.add_argument("--text-encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--epochs", type=int, default=20, help="of the fused items")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    encoders = {"image": options.image_encoder, "audio": options.audio_encoder, "text": options.text_encoder}
    config = ExtractConfig(
        data=str(write_items(options.work / "data", options.sounds)),
        cache=str(options.work / "av-digits.zarr"),
        encoder=encoders,
        layers={"image": (11, 12), "audio": (3, 4), "text": (6,)},
        image_size=SIDE,
        class_prompt=("the digit {}",),
        storage="float16",
    )
    cache = extract(config)
    print(read_report(subsets(SubsetsConfig(cache=cache, out=str(options.work / "subsets"), epochs=options.epochs))))
    runs = []
    for gallery in ("image", "audio"):
        out = str(options.work / gallery)
        train(TrainConfig(cache=cache, out=out, gallery=gallery, fusion="ridge", log=("none",)))
        runs.append(out)
    print(read_report(bridge(BridgeConfig(cache=cache, run=tuple(runs), out=str(options.work / "bridge")))))


if __name__ == "__main__":
    main()
