"""A picture's way into the model: what its processor computes, bit for bit, at a fraction of the time.

transformers' processors for PIL resize, crop, and then map each channel's 256 values to numbers; around that they copy
between PIL and numpy and compute in float64, most of it under the interpreter's lock, so that threads would not help.
Here the same picture goes through PIL's resize and crop, without the lock, and one look-up a number in a table that the
processor itself has filled.

Taken over are only processors whose steps are transformers' own, and only where drawn pictures of several shapes come
out equal; every other one is used as it is.
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
"""Width and height of the pictures that both ways must agree on."""


@dataclass(frozen=True, kw_only=True)
class QuickPictures:
    """The steps of one processor."""

    resize: dict[str, int] | None
    """`height` and `width`, or `shortest_edge`; None leaves the size."""
    resample: int
    """PIL's number of the filter."""
    crop: tuple[int, int] | None
    """Height and width of the middle that is cut out; None cuts nothing."""
    table: torch.Tensor
    """float32 [3, 256]: what each value of each channel becomes."""

    def fill(self, picture: Any, out: torch.Tensor) -> bool:
        """Write a picture's numbers to `out`, [3, height, width] of any 2- or 4-byte type.

        False, and nothing is written, where it is no RGB picture of PIL's or of another size in the end.
        """
        pixels = self._pixels(picture) if getattr(picture, "mode", None) == "RGB" else None
        if pixels is None or pixels.shape[:2] != out.shape[1:]:
            return False
        bits = torch.int16 if out.element_size() == 2 else torch.int32  # numpy has no bfloat16; bits are copied as well
        table = self.table.to(out.dtype).view(bits).numpy()
        for channel in range(3):  # "clip" never clips here; it spares the buffer that the check for errors needs
            np.take(table[channel], pixels[..., channel], out=out[channel].view(bits).numpy(), mode="clip")
        return True

    def _pixels(self, picture: Any) -> np.ndarray | None:
        """uint8 [height, width, 3]; None where the picture is smaller than what is cut out."""
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
    """The processor's steps; None where they are not those known here."""
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


def _table(processor: Any) -> np.ndarray:
    """What the processor makes of a picture that holds all values, unresized."""
    values = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    made = processor(images=[to_pil_image(values)], do_resize=False, do_center_crop=False, return_tensors="np")
    return np.asarray(made["pixel_values"][0]).reshape(-1, 256)


def _agree(quick: QuickPictures, processor: Any, width: int, height: int) -> bool:
    """Do both make the same of a drawn picture?"""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = processor(images=[to_pil_image(pixels)], return_tensors="pt")
    if set(expected) != {"pixel_values"}:
        return False
    out = torch.empty_like(expected["pixel_values"][0])
    return quick.fill(to_pil_image(pixels), out) and bool(torch.equal(out, expected["pixel_values"][0]))
