"""Vectors, stored bytes, trained metrics and resumed runs on the card, against those on the CPU. See gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from extraction_cases import files_of
from gpu_setup import DINOV2_SMALL, Setting, draw_photos, no_gpu, save_model, save_text_model
from synthetic_cache import make_cache
from timing import Figure
from tiny_models import WORDS
from training import config_of

from saffe_cache.core.outputs import read_json
from saffe_cache.encoders.encoder import FrozenEncoder, load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.extraction.extract import ExtractConfig, extract
from saffe_cache.store.dtypes import convert
from saffe_cache.store.layout import STORAGE_DTYPES
from saffe_cache.training import loop
from saffe_cache.training.train import train

MOST_ERROR = {"float32": 1e-4, "bfloat16": 0.03}
"""Of a hidden state's length: sums in another order, and eight bits of mantissa through all layers."""
SEEDS = 3
LEAST_NOISE = 0.01
"""Difference of a metric's means that is called noise, or twice the seeds' standard error if that is more."""


class _Killed(Exception):  # noqa: N818 — what a kill would be
    pass


def parts(setting: Setting) -> Iterator[Callable[[], Iterator[Figure]]]:
    yield partial(vectors, setting)
    yield partial(stored_bytes, setting)
    yield partial(resumed_extraction, setting)
    yield partial(resumed_training, setting)
    yield partial(trained_metrics, setting)


def vectors(setting: Setting) -> Iterator[Figure]:
    """Hidden states and vectors, against a float32 pass on the CPU: norm of the difference over the norm."""
    generator = torch.Generator().manual_seed(0)
    folders = {"image": save_model(setting, DINOV2_SMALL), "text": save_text_model(setting)}
    side = 32 if setting.is_tiny else 224
    pixels = {"pixel_values": torch.randn(8, 3, side, side, generator=generator)}
    for modality, folder in folders.items():
        request = EncoderRequest(modality=modality, model_id=str(folder))
        exact = load_encoder(request)
        texts = [" ".join(WORDS[: 1 + 4 * number]) for number in range(8)]
        inputs = pixels if modality == "image" else exact.pad(exact.tokenize(texts))
        expected = numbers_of(exact, inputs)
        pairs = [("the card's float32", "float32", setting.device), ("bfloat16", "bfloat16", setting.device)]
        for what, dtype, device in pairs:
            name = f"{modality}: {what} against the CPU's float32, relative error"
            if dtype == "float32" and not setting.on_gpu:
                yield from no_gpu(name)
                continue
            found = numbers_of(load_encoder(replace(request, dtype=dtype, device=device)), inputs)
            error = max(
                float(np.linalg.norm(found[key] - expected[key]) / np.linalg.norm(expected[key])) for key in found
            )
            yield Figure(name=name, unit="ratio", value=error, at_most=MOST_ERROR[dtype])


def numbers_of(encoder: FrozenEncoder, inputs: Mapping[str, torch.Tensor]) -> dict[Any, np.ndarray]:
    """Hidden states of real tokens, and vectors."""
    encoded = encoder.encode(inputs)
    states = encoded.states
    if "attention_mask" in inputs:
        states = {i: values[inputs["attention_mask"].bool().numpy()] for i, values in states.items()}
    return {**states, **encoded.vectors}


def stored_bytes(setting: Setting) -> Iterator[Figure]:
    """Bytes that the device's conversion makes otherwise than the CPU's, over odd numbers too."""
    generator = np.random.default_rng(0)
    drawn = (generator.normal(size=(4096, 384)) * 10.0 ** generator.integers(-40, 30, (4096, 1))).astype(np.float32)
    drawn[::7, ::5], drawn[::11, 3], drawn[::13, 4], drawn[5] = 0, np.nan, np.inf, 1e-42
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])[None]  # between two codes, where the scale is 1
    for dtype in STORAGE_DTYPES:
        name = f"bytes of {dtype} other than the CPU's"
        if not setting.on_gpu:
            yield from no_gpu(name, unit="bytes")
            continue
        differing = 0
        for values in (torch.from_numpy(drawn), torch.from_numpy(drawn).to(torch.bfloat16), ties):
            for here, there in zip(convert(values, dtype), convert(values.to(setting.device), dtype), strict=True):
                differing += int((here.view(torch.uint8) != there.cpu().view(torch.uint8)).sum())
        yield Figure(name=name, unit="bytes", value=differing, at_most=0)


def resumed_extraction(setting: Setting) -> Iterator[Figure]:
    """Killed in the middle and run again, against a run in one go: files with other bytes."""
    data = draw_photos(setting.work / "resumed" / "train", 80, (64, 48), distinct=80).parent
    encoder = {"image": str(save_model(setting, DINOV2_SMALL)), "text": str(save_text_model(setting))}
    small = {"shard_mb": 0, "batch_size": 8, "batch_tokens": 256}
    caches = [str(setting.work / f"resumed-{name}.zarr") for name in ("whole", "killed")]
    whole, killed = (
        ExtractConfig(data=str(data), cache=cache, encoder=encoder, device=setting.device, **small) for cache in caches
    )
    extract(whole)
    with dying_after(FrozenEncoder, "launch", 12), suppress(_Killed):
        extract(killed)
    extract(killed)
    expected, found = files_of(whole.cache), files_of(killed.cache)
    differing = len({name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)})
    yield Figure(
        name=f"extraction, killed and resumed: of {len(expected)} files other", unit="files", value=differing, at_most=0
    )


def resumed_training(setting: Setting) -> Iterator[Figure]:
    """The same for a training: bytes of its weights."""
    cache = make_cache(setting.work / "resumed-training.zarr", {"train": 120, "dev": 40})
    for fusion in ("linear", "reuse"):
        outs = [str(setting.work / f"{fusion}-{name}") for name in ("whole", "killed")]
        options = {"fusion": fusion, "epochs": 2, "batch_size": 32, "checkpoint_seconds": 0, "device": setting.device}
        whole, killed = (config_of(cache, out, **options) for out in outs)
        train(whole)
        with dying_after(loop, "_step", 4), suppress(_Killed):
            train(killed)
        train(killed)
        expected, found = (np.frombuffer((Path(out) / "model.safetensors").read_bytes(), np.uint8) for out in outs)
        name = f"training of {fusion}, killed and resumed: bytes of its weights other"
        yield Figure(name=name, unit="bytes", value=int((expected != found).sum()), at_most=0)


def dying_after(owner: Any, name: str, calls: int) -> Any:
    """What is done within dies when a function is called once more than that."""
    call, seen = getattr(owner, name), []

    def dying(*arguments: Any, **keywords: Any) -> Any:
        seen.append(1)
        if len(seen) > calls:
            raise _Killed
        return call(*arguments, **keywords)

    return patch.object(owner, name, dying)


def validation_scores(setting: Setting, cache: str, fusion: str, device: str) -> np.ndarray:
    """Of the best epoch, for each seed."""
    scores = []
    for seed in range(SEEDS):
        out = str(setting.work / f"metrics-{fusion}-{device}-{seed}")
        options = {"fusion": fusion, "seed": seed, "data_seed": 0, "epochs": setting.sizes.epochs}
        run = train(config_of(cache, out, device=device, batch_size=64, **options))
        scores.append(float(read_json(Path(run) / "result.json")["best_validation_score"]))
    return np.array(scores)


def trained_metrics(setting: Setting) -> Iterator[Figure]:
    """Best validation scores over seeds, on the card, where steps run in bfloat16, less those in float32 on the CPU."""
    names = {fusion: f"{fusion}: score trained on the card less the CPU's" for fusion in ("linear", "reuse")}
    if not setting.on_gpu:
        yield from no_gpu(*names.values(), unit="points")
        return
    cache = make_cache(setting.work / "metrics.zarr", {"train": 600, "dev": 300}, signal=0.3)
    for fusion, name in names.items():
        on_cpu, on_card = (validation_scores(setting, cache, fusion, place) for place in ("cpu", setting.device))
        difference = float(on_card.mean() - on_cpu.mean())
        noise = max(LEAST_NOISE, 2 * float(np.sqrt((on_cpu.var(ddof=1) + on_card.var(ddof=1)) / SEEDS)))
        note = f"{SEEDS} seeds; {100 * on_cpu.mean():.1f} on the CPU; goal: twice the standard error, or 1 point"
        yield Figure(
            name=name, unit="points", value=100 * difference, at_least=-100 * noise, at_most=100 * noise, note=note
        )
