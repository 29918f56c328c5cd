"""The base of fusions in closed form: buffers that a fit sets, and the choice among several by validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from saffe_cache.fusion.base import Blocks, TrainingVectors
from saffe_cache.fusion.options import FusionShape
from saffe_cache.fusion.two_sided import TwoSided

Values = Mapping[str, np.ndarray | float]
"""Contents of a fusion's buffers, by name."""


class ClosedForm(TwoSided):
    """All numbers are in buffers, whose shapes may depend on the data. Unfitted, all inputs have the same vector."""

    def set(self, values: Values) -> None:
        """Set buffers."""
        for name, value in values.items():
            before = getattr(self, name)
            setattr(self, name, torch.as_tensor(np.asarray(value), dtype=before.dtype, device=before.device))

    def choose(self, candidates: Iterable[Values], seen: TrainingVectors) -> Values:
        """Keep the values with the best validation score, the first of equal ones, and return them."""
        best: tuple[float, Values] | None = None
        for values in candidates:
            self.set(values)
            score = seen.validate()
            if best is None or score > best[0]:
                best = score, values
        assert best is not None, "no candidate"
        self.set(best[1])
        return best[1]

    def _load_from_state_dict(self, state_dict: Mapping[str, torch.Tensor], prefix: str, *arguments: Any) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            if prefix + name in state_dict:
                setattr(self, name, buffer.new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class LinearSides(ClosedForm):
    """(unit(s) - its mean) X for a photo's summary s, and (t - its mean) Y for a text's unit vector t.

    (s + 1) w + (k + 1) w' parameters where the means count w = 1: s + k for both means and (s + k) w for both maps.
    """

    photo_mean: torch.Tensor
    text_mean: torch.Tensor
    from_photo: torch.Tensor
    from_text: torch.Tensor

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        for side, size in (("photo", shape.summary_size), ("text", shape.text_size)):
            self.register_buffer(f"{side}_mean", torch.zeros(size))
            self.register_buffer(f"from_{side}", torch.zeros(size, min(shape.summary_size, shape.text_size)))

    def photo_side(self, summary: torch.Tensor) -> torch.Tensor:
        return (functional.normalize(summary, dim=-1) - self.photo_mean) @ self.from_photo

    def text_side(self, unit: torch.Tensor) -> torch.Tensor:
        return (unit - self.text_mean) @ self.from_text


def in_both_spaces(shares: torch.Tensor, in_text: torch.Tensor, in_photo: torch.Tensor) -> torch.Tensor:
    """Vectors in the space of texts [n, k] and in that of photos [n, r], unit and scaled by their share, side by side:
    [n, k + r]. Once they are unit, too, the inner product of those with equal shares is the mean of both cosines."""
    parts = (functional.normalize(part, dim=-1) for part in (in_text, in_photo))
    return torch.cat([share * part for share, part in zip(shares, parts, strict=True)], dim=-1)


def widths(most: int) -> list[int]:
    """Widths to try: all, a half, a quarter, an eighth; 2 at least, as one coordinate has no angles."""
    return sorted({max(min(most, 2), most // part) for part in (1, 2, 4, 8)}, reverse=True)
