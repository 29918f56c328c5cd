"""Drawn numbers of unit length, and how numbers are compared, for several files of tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Vectors [n, d] at length 1, float32."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def unit_vectors(count: int, width: int, seed: int) -> np.ndarray:
    """Drawn unit vectors, float32 [count, width]."""
    return unit_rows(np.random.default_rng(seed).normal(size=(count, width)))


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return functional.normalize(vectors, dim=-1)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def woken(module: nn.Module) -> Any:
    """A module away from its start, with running means that are not 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    for one in module.modules():
        if isinstance(one, nn.BatchNorm1d):
            one.running_mean.normal_(generator=generator)  # type: ignore[union-attr]
            one.running_var.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr]
    return module
