"""Orthogonal Procrustes: the orthonormal projections of both sides that agree best.

Source: Schönemann 1966, and for encoders of different widths SOTAlign (Roschmann et al. 2026, arXiv 2602.23353,
proposition C.1). With the covariance C of `moments` and its singular value decomposition,

    C = U S V'        a photo is (a - m_x) U_1..w,  a text (b - m_y) V_1..w

which maximises the sum of the inner products under U'U = V'V = I. For equal widths and w = d, comparing these is
comparing a R with b, R = U V'. Validation chooses w: all directions in which C is not zero, or a half, a quarter or an
eighth of them. Both sides are centred with the means of the training pairs.
"""

from __future__ import annotations

import numpy as np

from saffe_cache.fusion.base import TrainingVectors
from saffe_cache.fusion.closed_form.fitting import LinearSides, widths
from saffe_cache.fusion.closed_form.moments import Moments


def procrustes(shared: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U [photo size, r], V [text size, r] and the singular values [r] of a covariance, without those that are zero."""
    left, values, right = np.linalg.svd(shared, full_matrices=False)
    count = max(1, int(np.count_nonzero(values > 1e-10 * max(values[0], 1e-10))))
    return left[:, :count], right[:count].T, values[:count]


class ProcrustesFusion(LinearSides):
    """(s + k) (w + 1) parameters; 443,520 for s = 768 and w = k = 384."""

    def fit(self, seen: TrainingVectors) -> None:
        moments = Moments.of_training(seen)
        photo, text, values = procrustes(moments.shared)
        self.set({"photo_mean": moments.photos.mean, "text_mean": moments.texts.mean})
        self.choose(({"from_photo": photo[:, :w], "from_text": text[:, :w]} for w in widths(len(values))), seen)
