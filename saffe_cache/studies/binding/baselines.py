"""What needs no training, for many episodes: the ridge regression onto the names' vectors, the nearest class mean."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from saffe_cache.retrieval.baselines import fit_class_means


class LinearMaps(NamedTuple):
    """x -> weight x + bias, one for each episode."""

    weight: torch.Tensor
    """[episodes, out, in]"""
    bias: torch.Tensor
    """[episodes, out]"""

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """[episodes, photos, in] to [episodes, photos, out]."""
        return features @ self.weight.transpose(1, 2) + self.bias[:, None]


def fit_ridges(features: torch.Tensor, names: torch.Tensor, strength: float) -> LinearMaps:
    """Ridge regression with intercept of each episode's photos onto their names' vectors.

    In its dual form, W = Y' (X X' + strength m I)^-1 X for m photos, X and Y centred: m is far below the width.

    Args:
        features: [episodes, ways, shots, in].
        names: unit vectors [episodes, ways, out].
        strength: of the penalty, as a multiple of the number of photos.
    """
    ways, shots = features.shape[1:3]
    inputs = features.flatten(1, 2).double()
    targets = names.double().repeat_interleave(shots, dim=1)
    center, target_center = inputs.mean(dim=1, keepdim=True), targets.mean(dim=1, keepdim=True)
    inputs, targets = inputs - center, targets - target_center
    penalty = strength * ways * shots * torch.eye(ways * shots, dtype=inputs.dtype, device=inputs.device)
    solved = torch.linalg.solve(inputs @ inputs.transpose(1, 2) + penalty, targets)
    weight = solved.transpose(1, 2) @ inputs
    bias = target_center - center @ weight.transpose(1, 2)
    return LinearMaps(weight.float(), bias[:, 0].float())


def class_mean_accuracies(support: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Of the nearest class mean by centred cosine, [episodes].

    Args:
        support: features [episodes, ways, shots, in].
        queries: features [episodes, ways, queries, in].
    """
    ways, shots, num_queries = *support.shape[1:3], queries.shape[2]
    known, own = np.repeat(np.arange(ways), shots), np.repeat(np.arange(ways), num_queries)
    found = []
    for learned, questions in zip(support, queries, strict=True):
        means = fit_class_means(learned.reshape(ways * shots, -1), known, ways)
        found.append((means(questions.reshape(ways * num_queries, -1)).argmax(axis=1) == own).mean())
    return np.array(found)


def name_accuracies(vectors: torch.Tensor, names: torch.Tensor) -> np.ndarray:
    """Share of photos whose nearest name by cosine is their own, [episodes].

    Args:
        vectors: [episodes, ways * queries, d] of any length, the photos of a name one after the other.
        names: unit vectors [episodes, ways, d].
    """
    nearest = (vectors @ names.transpose(1, 2)).argmax(dim=2)
    ways = names.shape[1]
    own = torch.arange(ways, device=names.device).repeat_interleave(vectors.shape[1] // ways)
    return np.asarray((nearest == own).double().mean(dim=1).cpu())
