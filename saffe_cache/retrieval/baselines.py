"""Fits that any fusion has to beat: class means, ridge, linear probe, late fusion. Numpy, and torch's L-BFGS.

The MLP is in `mlp`, label propagation in `propagation`. What is tuned is tuned by a `judge`, a validation score of
which higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

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


class Ridge:
    """Ridge regressions with intercept, W = (X'X + lambda n I)^-1 X'Y, from one set of features.

    The features are decomposed once, for all strengths and all targets.
    """

    def __init__(self, features: np.ndarray) -> None:
        """`features` [n, in]."""
        self._features, self._center = features, features.mean(axis=0, dtype=np.float64)
        own = np.zeros((len(self._center), len(self._center)))
        for _, centered in self._blocks():
            own += centered.T @ centered
        eigenvalues, self._vectors = np.linalg.eigh(own)
        self._eigenvalues = np.maximum(eigenvalues, 0)

    def fit(
        self,
        targets: np.ndarray,
        judge: Callable[[LinearMap], float],
        strengths: Sequence[float] = RIDGE_STRENGTHS,
    ) -> LinearMap:
        """To targets [n, out]; `judge`, a validation score of which higher is better, picks lambda."""
        center = targets.mean(axis=0, dtype=np.float64)
        shared = np.zeros((len(self._center), len(center)))
        for rows, centered in self._blocks():
            shared += centered.T @ (targets[rows] - center)
        projected = self._vectors.T @ shared
        return max((self._map(projected, center, strength) for strength in strengths), key=judge)

    def fit_left_out(self, targets: np.ndarray) -> tuple[LinearMap, float]:
        """To targets [n, out], with the lambda that has the least squared error of left-out samples, and that error.

        The error of a sample when it is left out of the fit is its residual divided by one less its leverage: no second
        fit is needed. Source: Hastie et al., The Elements of Statistical Learning, eq. 7.64. It is a fraction of the
        targets' variance; 1 means that nothing was learned.
        """
        rotated, squares = self._rotated
        center = targets.mean(axis=0, dtype=np.float64)
        centered = (targets - center).astype(np.float32)
        projected = rotated.T @ centered
        spread = float((centered**2).mean()) or 1.0
        errors = []
        for strength in RIDGE_STRENGTHS:
            shrunk = (1 / (self._eigenvalues + strength * len(centered))).astype(np.float32)
            leverages = squares @ shrunk + 1 / len(centered)
            residuals = centered - rotated @ (shrunk[:, None] * projected)
            errors.append(float(((residuals / np.maximum(1 - leverages, 1e-6)[:, None]) ** 2).mean()) / spread)
        best = int(np.argmin(errors))
        return self._map(projected, center, RIDGE_STRENGTHS[best]), errors[best]

    def _map(self, projected: np.ndarray, center: np.ndarray, strength: float) -> LinearMap:
        """`projected` [in, out]: X'Y of centered X and Y, rotated as the features' covariance is."""
        shrunk = self._eigenvalues + strength * len(self._features)
        weight = (self._vectors @ (projected / shrunk[:, None])).T
        bias = center - weight @ self._center
        return LinearMap(weight.astype(np.float32), bias.astype(np.float32), strength)

    def _blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Centered features in float64, some rows at a time."""
        for start in range(0, len(self._features), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            yield rows, np.subtract(self._features[rows], self._center, dtype=np.float64)

    @cached_property
    def _rotated(self) -> tuple[np.ndarray, np.ndarray]:
        """The centered features in the axes of their covariance, float32 [n, in], and their squares."""
        vectors = self._vectors.astype(np.float32)
        rotated = np.concatenate([centered.astype(np.float32) @ vectors for _, centered in self._blocks()])
        return rotated, rotated**2


def fit_ridge(
    features: np.ndarray,
    targets: np.ndarray,
    judge: Callable[[LinearMap], float],
    strengths: Sequence[float] = RIDGE_STRENGTHS,
) -> LinearMap:
    """One ridge regression; see `Ridge.fit`."""
    return Ridge(features).fit(targets, judge, strengths)


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
