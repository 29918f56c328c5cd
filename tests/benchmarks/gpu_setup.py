"""What the sections of gpu.py share: sizes, models with random weights, drawn photos, and what cannot be measured here.

Throughput does not depend on weights, so models are built from the configs of real ones, and nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from timing import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).parents[2]))  # the project

from tiny_models import SHAPE, WORDS, bert_tokenizer, image_processor

from saffe_cache.extraction.extract import ExtractConfig, extract
from saffe_cache.extraction.planning import Job


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    seconds: float = 0.75
    """That a turn of what is timed takes, about."""
    rounds: int = 2
    largest_batch: int = 1024
    photos: int = 6144
    """Read from JPEG in a turn; `distinct_photos` files, over and over."""
    distinct_photos: int = 256
    size: tuple[int, int] = (640, 480)
    large_photos: int = 128
    large_size: tuple[int, int] = (4000, 3000)
    train_photos: int = 6000
    """Flickr8k's."""
    dev_photos: int = 1000
    flickr_size: tuple[int, int] = (500, 375)
    steps: int = 8
    variants: int = 8
    released_batch: int = 20
    vectors: int = 1_000_000
    width: int = 768
    queries: int = 256
    gallery: int = 100_000
    map_queries: int = 1000
    epochs: int = 8


TINY = Sizes(
    seconds=0.001,
    rounds=1,
    largest_batch=8,
    photos=8,
    distinct_photos=4,
    size=(64, 48),
    large_photos=2,
    large_size=(400, 300),
    train_photos=64,
    dev_photos=32,
    flickr_size=(50, 37),
    steps=2,
    variants=2,
    released_batch=4,
    vectors=10_000,
    width=16,
    queries=8,
    gallery=2000,
    map_queries=20,
    epochs=2,
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a section is run with."""

    device: str
    work: Path
    """A folder that all sections share."""
    sizes: Sizes

    @property
    def is_tiny(self) -> bool:
        return self.sizes == TINY

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Of forward passes, as extraction chooses it."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()


def no_gpu(*names: str, unit: str = "ratio") -> list[Figure]:
    """The lines of what only a GPU shows."""
    return [Figure(name=name, unit=unit, note="no GPU") for name in names]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and seconds."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def amount_for(work: Callable[[int], Any], least: int, seconds: float) -> int:
    """How much of `work` takes so long, in multiples of `least`. Twice that little goes ahead, uncounted."""
    for _ in range(2):
        work(least)
    _, taken = timed(lambda: work(least))
    return least * max(1, round(seconds / taken))


# Models


@dataclass(frozen=True, kw_only=True)
class Model:
    """A real model's config."""

    name: str
    build: Callable[..., Any]
    shape: Mapping[str, Any]
    processor: Callable[[Path], None]
    timm: str
    """Its name in timm."""


def _vit(**shape: Any) -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**shape), add_pooling_layer=False)


def _dinov2(**shape: Any) -> Any:
    return transformers.Dinov2Model(transformers.Dinov2Config(**shape))


_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_DINOV2 = {"patch_size": 14, "image_size": 518, "layerscale_value": 1.0}
_SQUARE = image_processor("ViTImageProcessor", {"height": 224, "width": 224})
_CROPPED = image_processor("BitImageProcessor", {"shortest_edge": 256}, 224)
DINOV2_SMALL = Model(
    name="DINOv2-S/14",
    build=_dinov2,
    shape={**_SMALL, **_DINOV2},
    processor=_CROPPED,
    timm="vit_small_patch14_dinov2",
)
MODELS = (
    Model(
        name="ViT-S/16",
        build=_vit,
        shape={**_SMALL, "intermediate_size": 1536},
        processor=_SQUARE,
        timm="vit_small_patch16_224",
    ),
    DINOV2_SMALL,
    Model(name="ViT-B/16", build=_vit, shape={}, processor=_SQUARE, timm="vit_base_patch16_224"),
    Model(
        name="DINOv2-L/14",
        build=_dinov2,
        shape={**_LARGE, **_DINOV2},
        processor=_CROPPED,
        timm="vit_large_patch14_dinov2",
    ),
)
_TINY_SHAPE = {**SHAPE, "image_size": 32, "patch_size": 8}


def save_model(setting: Setting, model: Model) -> Path:
    """A folder with the model and its processor."""
    folder = setting.work / "models" / model.name.replace("/", "-")
    if not folder.exists():
        with torch.device(setting.device):
            built = model.build(**(_TINY_SHAPE if setting.is_tiny else model.shape))
        built.save_pretrained(folder)
        (image_processor("BitImageProcessor", {"shortest_edge": 36}, 32) if setting.is_tiny else model.processor)(
            folder
        )
    return folder


def save_text_model(setting: Setting) -> Path:
    """all-MiniLM-L6-v2's config, with a tokenizer of a few words."""
    folder = setting.work / "models" / "MiniLM"
    if not folder.exists():
        bert_tokenizer(folder)
        vocabulary = {"vocab_size": len(transformers.AutoTokenizer.from_pretrained(folder))}
        shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        config = transformers.BertConfig(**{**(SHAPE if setting.is_tiny else shape), **vocabulary})
        with torch.device(setting.device):
            built = transformers.BertModel(config, add_pooling_layer=False)
        built.save_pretrained(folder)
    return folder


# Photos


def draw_photos(folder: Path, count: int, size: tuple[int, int], *, distinct: int, captions: int = 1) -> Path:
    """A split: JPEGs of smooth colours with some noise. Above `distinct`, copies that differ by a comment alone."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    drawn = [_jpeg(generator, size) for _ in range(min(distinct, count))]
    lines = []
    for number in range(count):
        comment = f"{folder.name} {number}".encode()
        jpeg = drawn[number % len(drawn)]
        marked = jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]
        (folder / f"{number:06}.jpg").write_bytes(marked)
        texts = [" ".join(generator.choice(WORDS, 10)) for _ in range(captions)]
        lines.append(json.dumps({"file_name": f"{number:06}.jpg", "captions": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def _jpeg(generator: np.random.Generator, size: tuple[int, int]) -> bytes:
    """About 0.15 bytes a number, as photos have."""
    colours = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    noise = generator.integers(-25, 26, (64, 64, 3), dtype=np.int16)
    rows, columns = -(-size[1] // 64), -(-size[0] // 64)
    noisy = np.asarray(colours, np.int16) + np.tile(noise, (rows, columns, 1))[: size[1], : size[0]]
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def repeat_inputs(job: Job, count: int) -> Job:
    """The same job of photos for another number of inputs, over and over the same."""
    return replace(
        job,
        inputs=replace(job.inputs, content_hash=np.resize(job.inputs.content_hash, (count, 32))),
        is_wanted=np.ones(count, bool),
        arrays={name: (spec, count) for name, (spec, _) in job.arrays.items()},
    )


# A cache of Flickr8k's size


def flickr_config(setting: Setting) -> ExtractConfig:
    """Photos with five captions each, of Flickr8k's number and size, and two encoders; drawn where not there yet."""
    data, sizes = setting.work / "flickr", setting.sizes
    if not data.exists():
        splits = {"train": sizes.train_photos, "dev": sizes.dev_photos}
        for split, count in splits.items():
            partial = setting.work / "flickr.partial" / split
            draw_photos(partial, count, sizes.flickr_size, distinct=sizes.distinct_photos, captions=5)
        partial.parent.rename(data)
    layers = {"image": (1, 2, 3), "text": (1, 2, 3)} if setting.is_tiny else {"image": (10, 11, 12), "text": (4, 5, 6)}
    return ExtractConfig(
        data=str(data),
        cache=str(setting.work / "flickr.zarr"),
        encoder={"image": str(save_model(setting, DINOV2_SMALL)), "text": str(save_text_model(setting))},
        layers=layers,
        device=setting.device,
    )


def flickr_cache(setting: Setting) -> str:
    """The finished cache."""
    return extract(flickr_config(setting))


# Memory


def peaks(setting: Setting, stage: Callable[[], Any]) -> tuple[float, float | None]:
    """MB of main memory and of the card's that a stage has at most, in this process; what was there before counts."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc_pid_clear_refs(5)
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    stage()
    main = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return main, torch.cuda.max_memory_allocated() / 2**20 if setting.on_gpu else None


def memory_figures(stage: str, found: tuple[float, float | None]) -> Iterator[Figure]:
    """Its lines."""
    yield Figure(name=f"{stage}: peak memory of the process", unit="MB", value=found[0])
    name = f"{stage}: peak memory of the card"
    yield from no_gpu(name, unit="MB") if found[1] is None else [Figure(name=name, unit="MB", value=found[1])]
