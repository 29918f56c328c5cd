"""Fits that any fusion has to beat: class means, ridge, linear probe, late fusion. Numpy, and torch's L-BFGS.

The MLP is in `mlp`, label propagation in `propagation`. What is tuned is tuned by a `judge`, a validation score of
which higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

RIDGE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Multiples of the number of samples."""
PROBE_STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
LATE_WEIGHTS = tuple(step / 20 for step in range(21))
"""Of the photo's vector; the text's has the rest."""
_ROWS_AT_ONCE, _COLUMNS_AT_ONCE = 16384, 64
"""Of features in float64."""


@dataclass(frozen=True)
class LinearMap:
    """x -> weight x + bias."""

    weight: np.ndarray
    """[out, in]"""
    bias: np.ndarray
    strength: float
    """Of the penalty that was chosen."""

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return np.asarray(features @ self.weight.T + self.bias, np.float32)


@dataclass(frozen=True)
class ClassMeans:
    """Nearest class mean by cosine."""

    center: np.ndarray
    """[in], of the training features."""
    means: np.ndarray
    """Unit vectors [c, in]; zero for a class without samples."""

    def gallery(self, features: np.ndarray) -> np.ndarray:
        """Centred features as unit vectors, float32 [n, in]; `means` are the queries that go with them."""
        return unit_rows(features - self.center)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Cosines to the class means, float32 [n, c]."""
        return np.asarray(self.gallery(features) @ self.means.T, np.float32)


def fit_class_means(features: np.ndarray, labels: np.ndarray, num_classes: int) -> ClassMeans:
    """Mean of each class's centred unit features. Nothing is tuned.

    Source: SimpleShot's "CL2N" (Wang et al., 2019, sec. 3.2), but with means of unit length: with cosines, the
    photos of a class can be ranked by the same scores that classify them.

    Args:
        features: [n, in].
        labels: int [n].
        num_classes: number of classes.
    """
    center = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    sums = np.zeros((num_classes, features.shape[1]))
    np.add.at(sums, labels, unit_rows(features - center))
    return ClassMeans(center, unit_rows(sums))


def fuse_late(image: np.ndarray, text: np.ndarray, weight: float) -> np.ndarray:
    """unit(weight image + (1 - weight) text), float32 [n, d]: the average of two scores, up to its norm.

    Args:
        image: unit vectors [n, d], in the space of the queries.
        text: unit vectors [n, d] of the text beside each photo.
        weight: of the photos, 0 to 1.
    """
    return unit_rows(weight * image + (1 - weight) * text)


def tune_late_fusion(image: np.ndarray, text: np.ndarray, judge: Callable[[np.ndarray], float]) -> float:
    """The weight of `fuse_late` whose gallery `judge` likes best; of several, the least.

    Args:
        image: unit vectors of validation photos, [n, d].
        text: unit vectors of the texts beside them, [n, d].
        judge: a validation score of a gallery, float32 [n, d].
    """
    return max(LATE_WEIGHTS, key=lambda weight: judge(fuse_late(image, text, weight)))


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), np.float32)


def fit_ridge(
    features: np.ndarray,
    targets: np.ndarray,
    judge: Callable[[LinearMap], float],
    strengths: Sequence[float] = RIDGE_STRENGTHS,
) -> LinearMap:
    """Ridge regression with intercept, W = (X'X + lambda n I)^-1 X'Y; `judge` (higher is better) picks lambda.

    One eigendecomposition serves all strengths.

    Args:
        features: [n, in].
        targets: [n, out].
        judge: a validation score.
    """
    center, target_center = features.mean(axis=0, dtype=np.float64), targets.mean(axis=0, dtype=np.float64)
    own, shared = np.zeros((len(center), len(center))), np.zeros((len(center), len(target_center)))
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        centered = np.subtract(features[rows], center, dtype=np.float64)
        own += centered.T @ centered
        shared += centered.T @ (targets[rows] - target_center)
    eigenvalues, vectors = np.linalg.eigh(own)
    projected = vectors.T @ shared
    fits = []
    for strength in strengths:
        weight = (vectors @ (projected / (np.maximum(eigenvalues, 0) + strength * len(features))[:, None])).T
        bias = target_center - weight @ center
        fits.append(LinearMap(weight.astype(np.float32), bias.astype(np.float32), strength))
    return max(fits, key=judge)


def fit_linear_probe(
    features: np.ndarray, labels: np.ndarray, num_classes: int, judge: Callable[[LinearMap], float]
) -> LinearMap:
    """Multinomial logistic regression by L-BFGS on standardised features, as CLIP's linear probe.

    Args:
        features: [n, in].
        labels: int [n].
        num_classes: number of outputs.
        judge: a validation score; picks the penalty.
    """
    standardised, center, scale = _standardise(features)
    inputs = torch.from_numpy(standardised)
    targets = torch.from_numpy(labels.astype(np.int64))
    fits = []
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    for strength in sorted(PROBE_STRENGTHS, reverse=True):  # each fit starts from the stronger one before it
        _minimize_cross_entropy(weight, bias, inputs, targets, strength)
        scaled = weight.detach().numpy() / scale
        shifted = bias.detach().numpy() - scaled @ center
        fits.append(LinearMap(scaled.astype(np.float32), shifted.astype(np.float32), strength))
    return max(fits, key=judge)


def _standardise(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of mean 0 and deviation 1, float32 [n, in], and the mean and deviation that they had."""
    center, scale = np.empty((2, features.shape[1]))
    standardised = np.empty(features.shape, np.float32)
    for start in range(0, features.shape[1], _COLUMNS_AT_ONCE):
        columns = slice(start, start + _COLUMNS_AT_ONCE)
        some = features[:, columns]
        center[columns], scale[columns] = some.mean(axis=0, dtype=np.float64), some.std(axis=0, dtype=np.float64) + 1e-6
        standardised[:, columns] = (some - center[columns]) / scale[columns]
    return standardised, center, scale


def _minimize_cross_entropy(
    weight: torch.Tensor, bias: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor, strength: float
) -> None:
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(inputs @ weight.T + bias, targets) + strength / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
