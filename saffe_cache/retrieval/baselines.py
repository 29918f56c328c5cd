"""Fits that any fusion has to beat. Numpy, and torch's L-BFGS for the linear probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

RIDGE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Multiples of the number of samples."""
PROBE_STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


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
    centered = (features - center).astype(np.float64)
    eigenvalues, vectors = np.linalg.eigh(centered.T @ centered)
    projected = vectors.T @ (centered.T @ (targets - target_center))
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
    center, scale = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64) + 1e-6
    inputs = torch.from_numpy(((features - center) / scale).astype(np.float32))
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
