"""ASIF: a photo and a text meet as their similarities to paired anchors.

Source: Norelli et al. 2022, arXiv 2210.01738; repository noranta4/ASIF. The anchors are the training pairs, unit
vectors a_i and b_i. For a photo x,

    r_i = <x, a_i>,  the k largest of which are kept and the others set to 0,  v = unit(r^p)

and for a text the same with the anchors b_i. The score is <v, v'>, in a space with an axis for each anchor.

Differences: similarities are clipped at 0 before the power, which otherwise makes large numbers of strongly negative
ones if p is even. All similarities that equal the k-th largest are kept, so that the order of anchors does not matter.
There is one anchor a photo, with the mean of its captions' vectors: one for each caption would repeat the photo's axis.
Photos with the same mean (of classes, or of one caption) share one weight on both sides, or a text that is repeated
would count several times. Validation chooses whether both sides are centred before the cosine, then k among n / 50,
n / 20, n / 10 and n / 4, then p among 1, 2, 4, 8, 16 (the release: k = 800 and p = 8, not centred).

At most 10,000 anchors are used, as the vectors are as wide as their number; of more pairs, as many are drawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from saffe_cache.fusion.base import Blocks, TrainingVectors
from saffe_cache.fusion.closed_form.fitting import ClosedForm, Values
from saffe_cache.fusion.closed_form.moments import unit as unit_rows
from saffe_cache.fusion.options import FusionShape

MOST_ANCHORS = 10_000
PARTS, POWERS = (50, 20, 10, 4), (1.0, 2.0, 4.0, 8.0, 16.0)


def relative(
    vectors: torch.Tensor, anchors: torch.Tensor, weights: torch.Tensor, kept: int, power: torch.Tensor
) -> torch.Tensor:
    """v before its length is made 1, [n, anchors]; zero if no anchor is near.

    Args:
        vectors: unit vectors [n, d].
        anchors: unit vectors [anchors, d].
        weights: [anchors]: what an axis counts.
        kept: k.
        power: p, [1].
    """
    similarities = (vectors @ anchors.T).clamp(min=0)
    least = similarities.topk(kept).values[:, -1:]
    near = torch.where(similarities >= least, similarities, 0.0)
    return (near / near.amax(dim=-1, keepdim=True).clamp(min=1e-12)) ** power * weights


def axis_weights(anchors: np.ndarray) -> np.ndarray:
    """1 / sqrt(number of rows that equal it) of each row, so that equal ones count as one in an inner product."""
    _, places, counts = np.unique(anchors, axis=0, return_inverse=True, return_counts=True)
    return np.asarray(1 / np.sqrt(counts[places.ravel()]))


class AsifFusion(ClosedForm):
    """n (s + k + 1) + s + k + 2 parameters, none trained: n anchors, summaries of width s, text vectors of width k."""

    photo_mean: torch.Tensor
    text_mean: torch.Tensor
    photo_anchors: torch.Tensor
    text_anchors: torch.Tensor
    weights: torch.Tensor
    kept: torch.Tensor
    power: torch.Tensor

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape)
        for side, size in (("photo", shape.summary_size), ("text", shape.text_size)):
            self.register_buffer(f"{side}_mean", torch.zeros(size))
            self.register_buffer(f"{side}_anchors", torch.zeros(1, size))
        self.register_buffer("weights", torch.ones(1))
        self.register_buffer("kept", torch.ones(1, dtype=torch.int64))
        self.register_buffer("power", torch.ones(1))
        self._num_kept = 1

    def set(self, values: Values) -> None:
        super().set(values)
        self._num_kept = int(self.kept)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._num_kept = int(self.kept)

    def fit(self, seen: TrainingVectors) -> None:
        photos, texts = unit_rows(seen.photos), seen.mean_texts.astype(np.float64)
        if len(photos) > MOST_ANCHORS:
            drawn = np.sort(np.random.default_rng(0).permutation(len(photos))[:MOST_ANCHORS])
            photos, texts = photos[drawn], texts[drawn]
        kept = [max(1, len(photos) // part) for part in PARTS]
        self.set({"weights": axis_weights(texts), "kept": np.array([kept[2]]), "power": np.array([POWERS[2]])})
        means = (np.zeros(photos.shape[1]), np.zeros(texts.shape[1])), (photos.mean(axis=0), texts.mean(axis=0))
        anchors = (
            {
                "photo_mean": photo,
                "text_mean": text,
                "photo_anchors": unit_rows(photos - photo),
                "text_anchors": unit_rows(texts - text),
            }
            for photo, text in means
        )
        self.choose(anchors, seen)
        self.choose(({"kept": np.array([one])} for one in dict.fromkeys(kept)), seen)
        self.choose(({"power": np.array([one])} for one in POWERS), seen)

    def photo_side(self, summary: torch.Tensor) -> torch.Tensor:
        return self._relative(functional.normalize(summary, dim=-1) - self.photo_mean, self.photo_anchors)

    def text_side(self, unit: torch.Tensor) -> torch.Tensor:
        return self._relative(unit - self.text_mean, self.text_anchors)

    def _relative(self, vectors: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        return relative(functional.normalize(vectors, dim=-1), anchors, self.weights, self._num_kept, self.power)
