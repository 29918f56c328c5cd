"""Prepare pictures for a model with the same result as its processor, bit for bit, in a fraction of the time.

The PIL processors of transformers resize, crop, and then map each channel's 256 values to numbers. Around that they
copy between PIL and numpy and compute in float64, mostly while holding the interpreter's lock, so threads do not help.
Here the picture goes through PIL's resize and crop without the lock, and then through a table filled by the processor.

This replaces only processors that use transformers' own steps, and only after random pictures of several shapes give
equal results; all other processors are used directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.image_transforms import to_pil_image

_STEPS = ("preprocess", "_preprocess", "process_image", "resize", "center_crop", "rescale", "normalize")
_THEIR_MODULES = ("transformers.image_processing_backends", "transformers.image_processing_utils")
_PROBES = ((40, 30), (31, 57), (64, 64), (301, 200), (9, 17))
"""Width and height of the pictures on which both must agree."""

_LONGEST = 2**17
"""Pixels of the longer edge after a resize; with 256 for the shorter one, these are 100 MB."""


@dataclass(frozen=True, kw_only=True)
class QuickPictures:
    """The steps of one processor."""

    resize: dict[str, int] | None
    """`height` and `width`, or `shortest_edge`; None keeps the size."""
    resample: int
    """PIL's number of the filter."""
    crop: tuple[int, int] | None
    """Height and width of the centre crop; None for no crop."""
    table: torch.Tensor
    """float32 [3, 256]: the number for each value of each channel."""

    def fill(self, picture: Any, out: torch.Tensor) -> bool:
        """Write a picture's numbers to `out`, [3, height, width] of any 2- or 4-byte type.

        Returns False and writes nothing if it is no RGB picture of PIL, or has another size after its preparation.
        """
        pixels = self._pixels(picture) if getattr(picture, "mode", None) == "RGB" else None
        if pixels is None or pixels.shape[:2] != out.shape[1:]:
            return False
        bits = torch.int16 if out.element_size() == 2 else torch.int32  # numpy has no bfloat16, so bits are copied
        table = self.table.to(out.dtype).view(bits).numpy()
        for channel in range(3):  # "clip" never clips here, but avoids the buffer for error checks
            np.take(table[channel], pixels[..., channel], out=out[channel].view(bits).numpy(), mode="clip")
        return True

    @property
    def edge(self) -> int | None:
        """Pixels of the longest edge that the resize states; None without a resize."""
        return max(self.resize.values()) if self.resize else None

    def seen_part(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what the crop leaves of a picture, as fractions of its size."""
        if self.crop is None:
            return 0.0, 0.0, 1.0, 1.0
        width, height = self._size(width, height) if self.resize else (width, height)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        return left / width, top / height, (left + self.crop[1]) / width, (top + self.crop[0]) / height

    def _pixels(self, picture: Any) -> np.ndarray | None:
        """uint8 [height, width, 3]; None if the picture is smaller than the crop."""
        if self.resize:
            width, height = self._size(*picture.size)
            picture = picture.resize((width, height), resample=self.resample)
        if self.crop:
            top, left = (picture.height - self.crop[0]) // 2, (picture.width - self.crop[1]) // 2
            if min(top, left) < 0:
                return None
            picture = picture.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return np.asarray(picture)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize."""
        assert self.resize
        if "shortest_edge" not in self.resize:
            return self.resize["width"], self.resize["height"]
        edge = self.resize["shortest_edge"]
        if width <= height:
            return edge, int(edge * height / width)
        return int(edge * width / height), edge


def quick_pictures(processor: Any) -> QuickPictures | None:
    """The processor's steps; None if they are not the known ones."""
    methods = [getattr(type(processor), step, None) for step in _STEPS]
    if getattr(processor, "backend", None) != "pil" or any(
        getattr(method, "__module__", None) not in _THEIR_MODULES for method in methods
    ):
        return None
    size = {name: int(value) for name, value in dict(processor.size or {}).items() if value}
    crop = dict(processor.crop_size or {}) if processor.do_center_crop else {}
    is_known = not processor.do_resize or set(size) in ({"height", "width"}, {"shortest_edge"})
    table = _table(processor)
    if not is_known or processor.do_pad or table.shape != (3, 256) or table.dtype != np.float32:
        return None
    quick = QuickPictures(
        resize=size if processor.do_resize else None,
        resample=int(2 if processor.resample is None else processor.resample),
        crop=(int(crop["height"]), int(crop["width"])) if crop else None,
        table=torch.from_numpy(table),
    )
    return quick if all(_agree(quick, processor, *probe) for probe in _PROBES) else None


def require_resizable(picture: Any, processor: Any) -> None:
    """
    Raises:
        ValueError: a resize of the shorter edge would make a very long picture, which no memory holds.
    """
    edge = dict(getattr(processor, "size", None) or {}).get("shortest_edge")
    shape = getattr(picture, "size", None)
    if not edge or not isinstance(shape, tuple):
        return
    shorter, longer = sorted(shape)
    if longer * edge > _LONGEST * shorter:
        raise ValueError(
            f"{shape[0]} x {shape[1]} pixels would be resized to {edge} x {longer * edge // shorter}, expected at most "
            f"{_LONGEST}; crop the picture"
        )


def _table(processor: Any) -> np.ndarray:
    """The processor's output for an unresized picture with all values."""
    values = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    made = processor(images=[to_pil_image(values)], do_resize=False, do_center_crop=False, return_tensors="np")
    return np.asarray(made["pixel_values"][0]).reshape(-1, 256)


def _agree(quick: QuickPictures, processor: Any, width: int, height: int) -> bool:
    """Whether both give the same result for a random picture."""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = processor(images=[to_pil_image(pixels)], return_tensors="pt")
    if set(expected) != {"pixel_values"}:
        return False
    out = torch.empty_like(expected["pixel_values"][0])
    return quick.fill(to_pil_image(pixels), out) and bool(torch.equal(out, expected["pixel_values"][0]))
