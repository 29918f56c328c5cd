"""Storage types: what a smaller type of hidden states costs in retrieval, and what it saves.

    python pipelines/storage.py --data PATH/flickr8k --work runs/storage --seeds 0 1 2 \\
        --image-encoder facebook/dinov2-small --text-encoder sentence-transformers/all-MiniLM-L6-v2

Extracts once as float32, converts to every other type, plain and compressed, and trains the same FAM (`linear` of
flickr8k.py) and the same ridge regression from each. Differences from float32 compare equal seeds. Errors of tokens are
relative to the tokens' norms, without the mean and the 2 % largest channels, where information would be lost first.
Disk: 8 GB. Time on two CPU cores: 7 min to extract, 2 min a training; `--train 1000` makes another pair of encoders
affordable. Results with dates: LOG.md.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # pipelines/ is next to the package, not in it

from pipelines.flickr8k import LAST_TWO
from pipelines.tables import Measured, Variant, Variants
from saffe_cache.core.features import StorageType
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.store.config import ConvertConfig
from saffe_cache.store.exchange import convert_cache
from saffe_cache.store.reader import EncoderCache, open_cache

ROUNDS, BATCHES, BATCH = 5, 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--image-encoder", default="facebook/dinov2-small")
    parser.add_argument("--text-encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--split", default="dev", help="split to report on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--train", type=int, help="photos to train on; default: all")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    exact = extract(
        ExtractConfig(
            data=options.data,
            cache=str(options.work / "float32.zarr"),
            encoder={"image": options.image_encoder, "text": options.text_encoder},
            layers={"image": (11, 12), "text": (6,)},
            image_size=options.image_size,
            max_items={"train": options.train} if options.train else {},
            storage="float32",
        )
    )
    caches = {dtype: convert(exact, options.work / f"{dtype}.zarr", dtype) for dtype in get_args(StorageType)}
    packed = {dtype: weigh_compressed(cache, options.work) for dtype, cache in caches.items()}
    speeds = reading_speeds(caches)
    measured = {
        dtype: Variants(
            cache=cache,
            work=options.work / "runs" / dtype,
            rows=[Variant("linear", LAST_TWO)],
            protocols=("caption",),
            split=options.split,
            seeds=options.seeds,
            shared={"validation": "heldout"},
        ).run()["caption"]
        for dtype, cache in caches.items()
    }
    print(
        "| stored as | KB a photo and layer | with zstd | read at random | mean and largest error, layers 11 and 12 |",
        end="",
    )
    print(" R@1 | less than float32 | ridge: R@1 |")
    print("|---" * 8 + "|")
    for dtype, cache in caches.items():
        sizes = [weigh(cache) / 1000, packed[dtype] / 1000]
        cells = [
            dtype,
            *(f"{size:.1f}" for size in sizes),
            f"{speeds[dtype]:.2f}",
            errors(exact, cache),
            *scores(measured, dtype),
        ]
        print("| " + " | ".join(cells) + " |")


def convert(exact: str, path: Path, dtype: StorageType) -> str:
    """The cache in another type; an existing one is kept."""
    if dtype == "float32" or (path / "zarr.json").exists():
        return str(path)
    return convert_cache(ConvertConfig(cache=exact, new=str(path), storage=dtype))


def weigh_compressed(cache: str, work: Path) -> float:
    """Bytes of a photo's layer when compressed; the compressed cache is not kept."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        return weigh(convert_cache(ConvertConfig(cache=cache, new=f"{folder}/zstd.zarr", compression="zstd")))


def weigh(cache: str) -> float:
    """Bytes on disk of a photo's layer."""
    encoder = open_cache(cache).encoder("image")
    files = (Path(cache) / "encoders" / encoder.key / "hidden_states/12/c").rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file()) / encoder.manifest.finished_rows


def reading_speeds(caches: dict[str, str]) -> dict[str, float]:
    """Rate of random batches of photos, read as float32, over that of photos stored so; median of several rounds."""
    encoders = {dtype: open_cache(cache).encoder("image") for dtype, cache in caches.items()}
    rounds = [{dtype: _read(encoder, seed) for dtype, encoder in encoders.items()} for seed in range(ROUNDS + 1)][1:]
    return {dtype: statistics.median(one["float32"] / one[dtype] for one in rounds) for dtype in caches}


def _read(encoder: EncoderCache, seed: int) -> float:
    """Seconds."""
    generator, count = np.random.default_rng(seed), encoder.manifest.finished_rows
    started = time.perf_counter()
    for _ in range(BATCHES):
        encoder.tokens(generator.integers(0, count, BATCH), (12,)).states[0].astype(np.float32)
    return time.perf_counter() - started


def errors(exact: str, cache: str) -> str:
    """Mean and largest error of some photos' tokens."""
    cells = []
    for layer in (11, 12):
        rows = np.arange(0, open_cache(exact).encoder("image").manifest.finished_rows, 20)
        true, found = (_tokens(path, layer, rows) for path in (exact, cache))
        small = np.argsort(np.abs(true).mean(axis=0))[: -max(1, true.shape[1] // 50)]
        off = np.linalg.norm((found - true)[:, small], axis=1) / np.linalg.norm(true[:, small], axis=1)
        cells.append(f"{100 * off.mean():.2g} and {100 * off.max():.2g} %")
    return "; ".join(cells)


def _tokens(cache: str, layer: int, rows: np.ndarray) -> np.ndarray:
    """float32 [n, d], less each token's mean."""
    states = open_cache(cache).encoder("image").tokens(rows, (layer,)).states[0].astype(np.float32)
    return np.asarray((states - states.mean(axis=-1, keepdims=True)).reshape(-1, states.shape[-1]))


def scores(measured: Mapping[str, Measured], dtype: str) -> list[str]:
    """R@1 of the FAM, what float32 has more, both over seeds; R@1 of the ridge regression."""
    found, exact = (
        [100 * value for value in measured[name].points[0].values["recall_at_1"]] for name in (dtype, "float32")
    )
    losses = [other - mine for mine, other in zip(found, exact, strict=True)]
    ridge = 100 * measured[dtype].first.systems["ridge"]["recall_at_1"].value
    return [_spread(found), "" if dtype == "float32" else _spread(losses), f"{ridge:.2f}"]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
