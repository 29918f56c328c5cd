"""Regularised canonical correlation analysis.

Source: Hotelling 1936; with a ridge Vinod 1976, as SOTAlign (Roschmann et al. 2026, arXiv 2602.23353) uses it for a
teacher. With the covariances of `moments`, and lambda in units of each side's mean variance,

    (S_x + lambda I)^-1/2 C (S_y + lambda I)^-1/2 = U P V'
    a photo is (a - m_x) (S_x + lambda I)^-1/2 U_1..w,   a text (b - m_y) (S_y + lambda I)^-1/2 V_1..w

Without lambda and with n near the width, CCA finds correlations of 1 in any data and retrieves nothing. SOTAlign adds
0.1 to the eigenvalues, of matrices whose scale the paper does not state; here validation chooses lambda, from 0.001 to
10, and w: all components, a half, a quarter or an eighth of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from saffe_cache.fusion.base import TrainingVectors
from saffe_cache.fusion.closed_form.fitting import LinearSides, widths
from saffe_cache.fusion.closed_form.moments import Moments

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Canonical(NamedTuple):
    """Maps of centred vectors to canonical coordinates, and what correlation each pair of coordinates has."""

    photo: np.ndarray
    """[photo size, r]"""
    text: np.ndarray
    """[text size, r]"""
    correlations: np.ndarray
    """P, [r], descending. On the training pairs; less where there is a penalty."""


def canonical(moments: Moments, strength: float) -> Canonical:
    """All canonical components."""
    photo, text = moments.photos.whitening(strength), moments.texts.whitening(strength)
    left, values, right = np.linalg.svd(photo.T @ moments.shared @ text, full_matrices=False)
    return Canonical(photo @ left, text @ right.T, values)


class CcaFusion(LinearSides):
    """(s + k) (w + 1) parameters; 443,520 for s = 768 and w = k = 384."""

    def fit(self, seen: TrainingVectors) -> None:
        moments = Moments.of_training(seen)
        self.set({"photo_mean": moments.photos.mean, "text_mean": moments.texts.mean})
        every = (canonical(moments, strength) for strength in STRENGTHS)
        self.choose(
            (
                {"from_photo": one.photo[:, :w], "from_text": one.text[:, :w]}
                for one in every
                for w in widths(len(one.correlations))
            ),
            seen,
        )
