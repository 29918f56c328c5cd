"""What the tests of captioning share: a cache of drawn photos and captions with a tiny GPT-2, and its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from extraction_cases import tiny_config
from tiny_models import NUM_LAYERS, rand

from saffe_cache.extraction.extract import extract
from saffe_cache.store.reader import open_cache
from saffe_cache.studies.captioning.captions import CaptionSource
from saffe_cache.studies.captioning.config import CaptionConfig
from saffe_cache.studies.captioning.inserting import InsertedModel, Projector

GRID = 2
PHOTO_TOKENS = 1 + GRID**2


def captioned_cache(folder: Path, tiny_model: Callable[[str], Path], *, train: int = 12, prompt: str = "{}") -> str:
    """All layers of a language model, whose texts begin behind 5 photo tokens, and of a photo encoder the last."""
    config = tiny_config(folder, tiny_model, train=train)
    encoder = {"image": config.encoder["image"], "text": str(tiny_model("gpt2"))}
    layers = {"image": (3,), "text": tuple(range(NUM_LAYERS))}
    return extract(replace(config, encoder=encoder, layers=layers, prompt=prompt, position_offset=PHOTO_TOKENS))


def source_of(cache: str, layer: int, grid: int = GRID) -> CaptionSource:
    found = open_cache(cache)
    config = CaptionConfig(cache=cache, out="unused", image_layer=3, layer=layer, grid=grid, device="cpu")
    return CaptionSource(found, found.encoder("image"), found.encoder("text"), config)


def model_of(cache: str, layer: int) -> InsertedModel:
    return source_of(cache, layer).model


def projector_of(scale: float = 1.0) -> Projector:
    """With random weights, far from its start."""
    projector = Projector(32, 32, scale)
    with torch.no_grad():
        for number, parameter in enumerate(projector.parameters()):
            parameter.add_(0.3 * rand(*parameter.shape, seed=number))
    return projector
