"""What the tests of extraction share: drawn photos with captions, a config, and the files of a cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import WORDS

from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.encoders.transfers import Launched
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.store.writer import EncoderWriter, Portion


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def make_captioned(folder: Path, splits: dict[str, int]) -> Path:
    for split, count in splits.items():
        lines = []
        for number in range(count):
            draw(folder / split / f"{number:03}.png", number + 1000 * len(split))
            words = [WORDS[(number * 3 + i) % 40] for i in range(2 + number % 4)]
            captions = [" ".join(words), f"{split} {number}", "the same for all"]
            lines.append(json.dumps({"file_name": f"{number:03}.png", "captions": captions}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def tiny_config(folder: Path, tiny_model: Callable[[str], Path], train: int = 20) -> ExtractConfig:
    """Photos and their captions, `train` and 6 more, to be extracted with two tiny encoders.

    The smallest shard of photos has 64 of them: fewer are not committed before the end.
    """
    return ExtractConfig(
        data=str(make_captioned(folder / "data", {"train": train, "dev": 6})),
        cache=str(folder / "cache.zarr"),
        encoder={"image": str(tiny_model("dinov2")), "text": str(tiny_model("bert"))},
        layers={"image": (2, 3), "text": (1, 3)},
        storage="float32",
        batch_size=4,
        device="cpu",
    )


def files_of(cache: str, below: str = "") -> dict[str, bytes]:
    """All shards and array metadata; manifests hold times and are left out."""
    root = Path(cache)
    return {
        name: path.read_bytes()
        for path in sorted((root / below).rglob("*"))
        if path.is_file()
        and (name := path.relative_to(root).as_posix()) != "zarr.json"
        and not (name.startswith("encoders/") and name.count("/") == 2)
        and not path.name.startswith(".")
    }


@contextmanager
def dying_behind(launches: int) -> Iterator[None]:
    """What is done within dies as by Ctrl-C, when a batch more than these is launched."""
    launch, calls = FrozenEncoder.launch, []

    def dying(self: FrozenEncoder, inputs: Mapping[str, torch.Tensor]) -> Launched:
        calls.append(1)
        if len(calls) > launches:
            raise KeyboardInterrupt
        return launch(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenEncoder, "launch", dying)
        with pytest.raises(KeyboardInterrupt):
            yield


@contextmanager
def full_disk_from(row: int) -> Iterator[None]:
    """What is done within ends with an error of the disk, when a portion from this row on is written."""
    put = EncoderWriter.put

    def full(self: EncoderWriter, portion: Portion) -> None:
        if any(first >= row for first, _ in portion.rows.values()):
            raise OSError(28, "No space left on device")
        put(self, portion)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncoderWriter, "put", full)
        with pytest.raises(OSError, match="No space left"):
            yield
