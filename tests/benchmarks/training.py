"""Training from a cache against steps on tensors in memory, against separate runs, against encoders in the loop.

Photos are drawn, the encoders are those of `make demo`. See bench.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import Candidate, Figure, take_turns
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from data.encoders import fetch_encoders
from data.scenes import draw_scenes
from saffe_cache.core.devices import choose_device, kept_memory
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.fusion.base import Texts
from saffe_cache.fusion.losses import Batch, soft_target
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.inputs.pairs import training_pairs
from saffe_cache.store.reader import Cache, open_cache
from saffe_cache.training.batches import TrainingData
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.loop import _step, start
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.runs import build_fusion
from saffe_cache.training.train import train, train_many

PHOTOS = {"train": 800, "dev": 100}
LAYERS = {"image": (11, 12), "text": (5, 6)}
RELEASED_BATCH, RELEASED_STEPS = 20, 3
ROUNDS = 5


def measure(work: Path) -> list[Figure]:
    encoders = fetch_encoders(work.parent / "encoders")
    scenes = draw_scenes(work / "scenes", PHOTOS, seed=0)
    named = {"image": str(encoders["dinov2-small"]), "text": str(encoders["all-MiniLM-L6-v2"])}
    cache = extract(
        ExtractConfig(data=str(scenes), cache=str(work / "cache.zarr"), encoder=named, layers=LAYERS, image_size=112)
    )
    found = [*against_memory(cache, "linear", 16), *against_memory(cache, "reuse", 4)]
    return [*found, *many_at_once(cache, work), *encoders_in_the_loop(cache, scenes, named)]


def against_memory(cache: str, fusion: str, num_steps: int) -> list[Figure]:
    """Steps per second: batches read from the cache, also with cold files, gathered from tensors, and ready-made."""
    config = config_of(cache, "unused", fusion=fusion)
    opened = open_cache(cache)
    spec = resolve_run(config, opened)
    training, validation, _ = training_pairs(spec, opened)

    from_cache, from_tensors = (
        TrainingData(FeatureLoader(opened, spec, config.device, residency), training, validation, 256, 0)
        for residency in ("mapped", "memory")
    )
    encoder = from_tensors.inputs.text
    vectors = torch.from_numpy(encoder.vectors(np.arange(len(encoder.array("pooled"))))).to(config.device)
    from_tensors.inputs.vectors = lambda rows: vectors[torch.from_numpy(rows)]
    ready = list(from_cache.batches(0, num_steps))
    state = start(config, spec, from_cache, resumes=True)
    starts = count(0, num_steps)

    def steps(batches: Callable[[int], Iterable[Batch]]) -> int:
        for batch in batches(next(starts)):
            _step(config, state, batch, 100)
        return num_steps

    def gathered(first: int) -> Iterator[Batch]:
        return (from_tensors._read(step) for step in range(first, first + num_steps))

    warm = {
        "cache": partial(steps, lambda first: from_cache.batches(first, first + num_steps)),
        "gathered": partial(steps, gathered),
        "ready": partial(steps, lambda first: ready),
    }
    with kept_memory():
        rounds = take_turns(warm, ROUNDS)
        del warm["ready"]
        cold = take_turns(warm, ROUNDS, before=partial(forget_files, opened, cache))
    loop = "the same loop; its batches are gathered from stored numbers in memory and converted in the loop itself"
    unread = (
        "batches of float32 made beforehand: what reading would be if it cost nothing. It takes time from the steps"
    )
    dropped = "files dropped from the page cache before every pass, as in a cache larger than memory"
    return [
        rounds.rate("cache", f"{fusion}: from the cache", "steps/s"),
        rounds.ratio("cache", "gathered", f"{fusion}: from the cache / from memory", at_least=0.95, note=loop),
        rounds.ratio("cache", "ready", f"{fusion}: from the cache / from ready-made batches", note=unread),
        cold.ratio("cache", "gathered", f"{fusion}: from cold files / from memory", at_least=0.95, note=dropped),
    ]


def many_at_once(cache: str, work: Path) -> list[Figure]:
    """Eight runs of the attention head in one pass over the cache, against one after the other."""
    folder = count()

    def configs() -> list[TrainConfig]:
        out = work / f"many{next(folder)}"
        return [config_of(cache, str(out / str(seed)), seed=seed, data_seed=0, epochs=2) for seed in range(8)]

    def one_by_one() -> int:
        return len([train(config) for config in configs()])

    def together() -> int:
        return len(train_many(configs()))

    rounds = take_turns({"together": together, "one by one": one_by_one}, 2)
    same = {(path.parent.name, path.read_bytes()) for path in work.glob("many*/*/model.safetensors")}
    if len(same) != 8:
        raise AssertionError("runs that were trained side by side differ from those alone")
    return [rounds.ratio("together", "one by one", "8 runs together / one by one", note="weights equal byte for byte")]


def encoders_in_the_loop(cache: str, scenes: Path, encoders: Mapping[str, str]) -> list[Figure]:
    """Photos per second of one epoch of the SAFFE release's loop, and of the same FAM from the cache."""
    sizes = {"batch_size": RELEASED_BATCH, "num_steps": RELEASED_STEPS}
    rounds = take_turns(released_loops(cache, scenes, encoders, **sizes), ROUNDS)
    note = f"the release's FAM, batches of {RELEASED_BATCH}, DINOv2-small at 112 px and MiniLM; without the extraction"
    return [
        rounds.rate("released", "the release's loop, encoders in it", "photos/s"),
        rounds.ratio("cache", "released", "epoch from the cache / the release's, autograd through encoders", note=note),
        rounds.ratio("cache", "frozen", "epoch from the cache / encoders in the loop, without autograd", note=note),
    ]


def released_loops(
    cache: str,
    data: Path,
    encoders: Mapping[str, str],
    *,
    pixels: int = 112,
    batch_size: int,
    num_steps: int,
    **options: Any,
) -> dict[str, Candidate]:
    """Some steps of the release's loop: from the cache, with its encoders in it, and these without autograd.

    `options` are fields of TrainConfig.
    """
    config = config_of(cache, "unused", fusion="reference", **options)
    opened = open_cache(cache)
    spec = resolve_run(config, opened)
    inputs = FeatureLoader(opened, spec, config.device)
    pairs, _, _ = training_pairs(spec, opened)
    rows = np.arange(batch_size * num_steps).reshape(num_steps, batch_size)
    model = build_fusion(spec, opened).to(inputs.device)
    optimizer = torch.optim.AdamW(model.parameters())
    live = LiveEncoders(encoders, inputs, data, pixels)

    def epoch(read: Callable[[np.ndarray, np.ndarray], tuple[list[torch.Tensor], Texts]]) -> int:
        for batch in rows:
            states, texts = read(pairs.rows[batch], np.array([pairs.texts[int(i)][0] for i in batch]))
            loss = soft_target(model(states, None, texts), torch.nn.functional.normalize(texts.vectors, dim=-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if inputs.device != "cpu":
            torch.cuda.synchronize()
        return rows.size

    def cached(photos: np.ndarray, captions: np.ndarray) -> tuple[list[torch.Tensor], Texts]:
        return inputs.photos(photos)[0], inputs.texts(captions)

    for from_cache, from_encoders in zip(cached(rows[0], rows[0])[0], live(rows[0], rows[0])[0], strict=True):
        error = (from_cache - from_encoders.detach()).norm() / from_encoders.detach().norm()
        assert error < 0.08, f"cached states are {error:.2g} of their length off"  # float8 and bfloat16 together: 0.03
    return {
        "cache": partial(epoch, cached),
        "released": partial(epoch, live),
        "frozen": partial(epoch, torch.no_grad()(live.__call__)),
    }


class LiveEncoders:
    """Decodes, prepares and encodes a batch, as the release does in every step."""

    def __init__(self, encoders: Mapping[str, str], inputs: FeatureLoader, data: Path, pixels: int) -> None:
        self._inputs = inputs
        self._image = AutoModel.from_pretrained(encoders["image"]).to(inputs.device).eval()
        self._text = AutoModel.from_pretrained(encoders["text"]).to(inputs.device).eval()
        self._processor = AutoImageProcessor.from_pretrained(encoders["image"], backend="pil")
        resized = pixels * self._processor.size["shortest_edge"] // self._processor.crop_size["height"]
        self._processor.size = {"shortest_edge": resized}
        self._processor.crop_size = {"height": pixels, "width": pixels}
        self._tokenizer = AutoTokenizer.from_pretrained(encoders["text"])
        table = inputs.cache.table
        self._files = {int(row): data / name for row, name in zip(table.rows["image"], table.ids, strict=True)}
        self._captions = table.inputs["text"].texts or ()

    def __call__(self, photos: np.ndarray, captions: np.ndarray) -> tuple[list[torch.Tensor], Texts]:
        device, spec = self._inputs.device, self._inputs.spec
        images = [Image.open(self._files[int(row)]).convert("RGB") for row in photos]
        pixels = self._processor(images=images, return_tensors="pt").to(device)
        seen: Any = self._image(**pixels, output_hidden_states=True)
        words = self._tokenizer([self._captions[row] for row in captions], padding=True, return_tensors="pt").to(device)
        read: Any = self._text(**words, output_hidden_states=True)
        mask = words["attention_mask"].bool()
        mean = (read.last_hidden_state * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        text_states = [read.hidden_states[layer] for layer in spec.text_layers]
        return [seen.hidden_states[layer] for layer in spec.gallery_layers], Texts(text_states, mask, mean)


def config_of(cache: str, out: str, **options: Any) -> TrainConfig:
    given: dict[str, Any] = {"fusion": "linear", "validation": "dev", "control_epochs": 0, "log": ("none",)}
    given["device"] = choose_device("auto")
    return TrainConfig(cache=cache, out=out, **{**given, **options})


def forget_files(opened: Cache, folder: str) -> None:
    """Drop a cache's files from the page cache; first their memory maps, which would keep them there."""
    for encoder in opened.encoders.values():
        for array in encoder._readers.values():
            array._shards._mapped.clear()
    for path in Path(folder).rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
