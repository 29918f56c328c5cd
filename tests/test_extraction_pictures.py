"""The quick way of a picture into the model against its processor: equal to the last bit, or not taken."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import CASES, load_tiny
from transformers.image_processing_backends import PilBackend

from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.encoders.pictures import quick_pictures

IMAGE_FAMILIES = [name for name, case in CASES.items() if case.modality == "image"]
ASKED = ["resnet", "convnext"]
"""Whose processor, ConvNeXt's, resizes in a way of its own, and is asked."""


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def room_for(encoder: FrozenEncoder, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    blank = encoder.prepare(picture(32, 32))
    return {name: torch.full(value.shape[1:], torch.nan, dtype=dtype) for name, value in blank.items()}


@pytest.fixture(scope="module")
def encoders(tiny_model: Callable[[str], Path]) -> dict[str, FrozenEncoder]:
    return {name: load_tiny(name, tiny_model(name)) for name in IMAGE_FAMILIES}


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(IMAGE_FAMILIES),
    width=st.integers(1, 130),
    height=st.integers(1, 130),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_shape_equals_the_processors_result(
    encoders: dict[str, FrozenEncoder], name: str, width: int, height: int, dtype: torch.dtype
) -> None:
    out = room_for(encoders[name], dtype)
    encoders[name].prepare_into(picture(width, height), out)
    expected = encoders[name].prepare(picture(width, height))["pixel_values"][0].to(dtype)
    assert torch.equal(out["pixel_values"], expected)


@pytest.mark.parametrize("name", [name for name in IMAGE_FAMILIES if name not in ASKED])
def test_quick_preparation_is_used(
    encoders: dict[str, FrozenEncoder], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the processor was asked")

    out = room_for(encoders[name])
    monkeypatch.setattr(encoders[name], "prepare", refuse)
    encoders[name].prepare_into(picture(50, 40), out)
    assert out["pixel_values"].isfinite().all()


def test_other_inputs_go_to_the_processor(encoders: dict[str, FrozenEncoder]) -> None:
    encoder, out = encoders["vit"], room_for(encoders["vit"])
    encoder.prepare_into(np.asarray(picture(50, 40)), out)
    assert torch.equal(out["pixel_values"], encoder.prepare(picture(50, 40))["pixel_values"][0])


def test_an_input_of_another_shape_is_refused(encoders: dict[str, FrozenEncoder]) -> None:
    with pytest.raises(ValueError, match=r"its prepared pixel_values is \(3, 32, 32\), expected \(3, 32, 40\)"):
        encoders["vit"].prepare_into(picture(50, 40), {"pixel_values": torch.empty(3, 32, 40)})


def test_processor_with_its_own_steps_is_used(encoders: dict[str, FrozenEncoder]) -> None:
    theirs = encoders["dinov2"]._processor

    class Inverting(type(theirs)):  # type: ignore[misc]
        def rescale(self, image: np.ndarray, scale: float, **_: Any) -> np.ndarray:
            return super().rescale(255 - image, scale)

    assert quick_pictures(theirs) is not None
    assert quick_pictures(Inverting(**theirs.to_dict())) is None


def test_release_with_other_results_is_detected(
    encoders: dict[str, FrozenEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same classes, same names, other pixels: the drawn pictures do not agree."""
    resize = PilBackend.resize

    @functools.wraps(resize)
    def reducing(self: Any, image: np.ndarray, size: Any, resample: Any = None, **_: Any) -> np.ndarray:
        return resize(self, image, size, resample=0)

    monkeypatch.setattr(PilBackend, "resize", reducing)
    assert quick_pictures(encoders["dinov2"]._processor) is None
