"""Canonical similarity analysis: canonical coordinates, weighted by their correlation.

Source: Li, Chinchali and Topcu 2024, arXiv 2410.07610; repository UTAustin-SwarmLab/Multi-modal-Data-Alignment. With
the canonical coordinates a and b of a photo and a text (`cca`), cut to the first w,

    S(x, y) = sum_i rho_i a_i b_i / (|a| |b|)

Here this is an inner product of unit vectors: (sqrt(rho) a / |a|, p, 0) and (sqrt(rho) b / |b|, 0, q), where p and q
fill up the length to 1 and meet zeros.

Differences: the released code has no ridge by default, and is at chance for few pairs; its class with one multiplies by
U where the transpose is needed. It measures rho on the training pairs, where it is near 1 for n near the width, and has
a rank for each data set. Here CCA has a ridge, rho_i is the correlation of held-out photos and captions (five folds of
photos; 0 at least), and validation chooses lambda and w.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional

from saffe_cache.core.items import Ragged
from saffe_cache.fusion.base import Blocks, TrainingVectors
from saffe_cache.fusion.closed_form.cca import STRENGTHS, Canonical, canonical
from saffe_cache.fusion.closed_form.fitting import LinearSides, Values
from saffe_cache.fusion.closed_form.moments import Moments, unit
from saffe_cache.fusion.options import FusionShape

RANKS = (10, 25, 50, 100, 200, 350, 500, 750)
"""Numbers of components to try; all of them too."""
FOLDS = 5


def held_out_correlations(
    photos: np.ndarray, texts: np.ndarray, positives: Ragged, strengths: Sequence[float]
) -> list[np.ndarray]:
    """rho, [r], in [0, 1]: what correlations canonical coordinates have on photos that they were not fitted on.

    Args:
        photos, texts, positives: as of `Moments.of`.
        strengths: penalties, for each of which there is a rho.
    """
    if len(photos) < 2:
        raise ValueError("csa: found 1 item to train on, expected 2 or more, of which some are held out. Add items.")
    folds = np.random.default_rng(0).permutation(len(photos)) % min(FOLDS, len(photos))
    found: list[list[np.ndarray]] = [[] for _ in strengths]
    for fold in range(folds.max() + 1):
        fitted, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        moments = Moments.of(photos[fitted], texts, positives.take(fitted))
        for of_strength, strength in zip(found, strengths, strict=True):
            maps = canonical(moments, strength)
            of_strength.append(_correlations(moments, maps, photos[held], texts, positives.take(held)))
    count = min(len(rho) for of_strength in found for rho in of_strength)
    return [np.clip(np.mean([rho[:count] for rho in of_strength], axis=0), 0, 1) for of_strength in found]


def _correlations(
    moments: Moments, maps: Canonical, photos: np.ndarray, texts: np.ndarray, positives: Ragged
) -> np.ndarray:
    """Of coordinates of photos and of their captions, each photo counting once; around the training means."""
    weights = (1 / positives.lengths)[positives.owners, None]
    a = ((photos - moments.photos.mean) @ maps.photo)[positives.owners]
    b = (texts[positives.values] - moments.texts.mean) @ maps.text
    product, of_a, of_b = ((weights * one).sum(axis=0) for one in (a * b, a * a, b * b))
    return np.asarray(product / np.maximum(np.sqrt(of_a * of_b), 1e-12))


class CsaFusion(LinearSides):
    """(s + k) (w + 1) + w parameters, w of them correlations."""

    correlations: torch.Tensor

    def __init__(self, shape: FusionShape, blocks: Blocks) -> None:
        super().__init__(shape, blocks)
        self.register_buffer("correlations", torch.zeros(self.from_text.shape[1]))

    def fit(self, seen: TrainingVectors) -> None:
        moments = Moments.of_training(seen)
        self.set({"photo_mean": moments.photos.mean, "text_mean": moments.texts.mean})
        self.choose(_candidates(moments, seen), seen)

    def photo_side(self, summary: torch.Tensor) -> torch.Tensor:
        weighted, rest = self._weighted(super().photo_side(summary))
        return torch.cat([weighted, rest, torch.zeros_like(rest)], dim=-1)

    def text_side(self, unit: torch.Tensor) -> torch.Tensor:
        weighted, rest = self._weighted(super().text_side(unit))
        return torch.cat([weighted, torch.zeros_like(rest), rest], dim=-1)

    def _weighted(self, coordinates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(rho) a / |a|, and what its length lacks of 1."""
        weighted = functional.normalize(coordinates, dim=-1) * self.correlations.sqrt()
        return weighted, (1 - weighted.square().sum(dim=-1, keepdim=True)).clamp(min=0).sqrt()


def _candidates(moments: Moments, seen: TrainingVectors) -> Iterator[Values]:
    pairs = unit(seen.photos), seen.texts.astype(np.float64), seen.positives
    for strength, rho in zip(STRENGTHS, held_out_correlations(*pairs, STRENGTHS), strict=True):
        maps = canonical(moments, strength)
        for w in sorted({min(rank, len(rho), len(maps.correlations)) for rank in (*RANKS, len(rho))}):
            yield {"from_photo": maps.photo[:, :w], "from_text": maps.text[:, :w], "correlations": rho[:w]}
