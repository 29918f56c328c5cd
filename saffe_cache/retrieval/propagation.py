"""Label propagation from class texts over unlabelled photos (ZLaP), for photos that were not in the graph.

Source: Stojnić et al., Label Propagation for Zero-shot Classification with Vision-Language Models, CVPR 2024.
Nodes are c class texts and n training photos, whose labels nobody looks at. Each photo has edges to its k nearest
other photos, weighted by their cosine, and to its k nearest texts, weighted by cosine ** gamma; negative cosines
count 0. With W the sum of these weights and their transpose, S = D^-1/2 W D^-1/2,

    (I - alpha S) Z = E,  E the first c columns of the identity,

and a new photo with weights y to the nodes, found in the same way, scores Z^T y.

Deviations: a photo is not among its own k neighbours (the release counts it and drops it from the graph, which
leaves k - 1). Z is kept whole: the paper's sparse form keeps the largest entry of each row. Similarities to texts are
not scaled, as the release does for proxies that are no text vectors: it was no better on CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

_Values = Sequence[float]
NEIGHBOURS = (5, 10, 20)
GAMMAS = (3.0, 5.0, 10.0)
ALPHAS = (0.3, 0.7, 0.9)
TOLERANCE = 1e-6
"""Of the residual, relative to the right side."""
MOST_STEPS = 100
"""Of conjugate gradients; alpha = 0.9 needs about 30."""
_PHOTOS_AT_ONCE, _CLASSES_AT_ONCE = 512, 64
"""Bounds on memory: no array is [n, n]."""


@dataclass(frozen=True)
class LabelPropagation:
    """The solved graph."""

    k: int
    gamma: float
    alpha: float
    spread: np.ndarray
    """Z: float32 [c + n, c], texts first."""
    search: _Search

    def scores(self, images: np.ndarray, image_text: np.ndarray) -> np.ndarray:
        """Scores of the classes, float32 [m, c], not negative; rows of unit length, uniform where no node is near.

        Args:
            images: unit vectors of the photos, [m, d].
            image_text: their similarities to the class texts, [m, c].
        """
        texts, photos = np.split(self.spread, [self.spread.shape[1]])
        found, weights = self.search.nearest(images, self.k)
        totals = _text_weights(image_text, self.k, self.gamma) @ texts
        for column in range(found.shape[1]):
            totals += weights[:, column, None] * photos[found[:, column]]
        totals[~totals.any(axis=1)] = 1
        return np.asarray(totals / np.linalg.norm(totals, axis=1, keepdims=True), np.float32)


def fit_zlap(
    images: np.ndarray,
    image_text: np.ndarray,
    judge: Callable[[LabelPropagation], float],
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    gammas: _Values = GAMMAS,
    alphas: _Values = ALPHAS,
) -> LabelPropagation:
    """Build the graph over unlabelled photos and solve it; `judge` (higher is better) picks k, gamma and alpha.

    Args:
        images: unit vectors of the training photos, [n, d].
        image_text: their similarities to the class texts, [n, c].
        judge: a validation score.
        neighbours: values of k, below n.
        gammas: exponents of the similarities to texts, above 0.
        alphas: how far labels spread, 0 to below 1.

    Raises:
        ValueError: there are not more photos than neighbours.
    """
    if max(neighbours) >= len(images):
        raise ValueError(f"ZLaP: k={max(neighbours)} with {len(images)} training photos. Use k below their number.")
    return max(_candidates(images, image_text, (neighbours, gammas, alphas)), key=judge)


def _candidates(
    images: np.ndarray, image_text: np.ndarray, grid: tuple[Sequence[int], _Values, _Values]
) -> Iterator[LabelPropagation]:
    """The solved graph for each k, gamma and alpha of the grid, one at a time."""
    neighbours, gammas, alphas = grid
    search = _Search(images)
    found, weights = search.nearest_others(max(neighbours))
    for k, gamma in product(neighbours, gammas):
        graph = _graph(found[:, :k], weights[:, :k], _text_weights(image_text, k, gamma))
        for alpha in alphas:
            yield LabelPropagation(k, gamma, alpha, _solve(graph, alpha, image_text.shape[1]), search)


class _Search:
    """Nearest training photos. Remembers its last answer: each candidate is judged on the same photos."""

    def __init__(self, images: np.ndarray) -> None:
        """`images` [n, d], unit vectors."""
        self._images = _tensor(images)
        self._last: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Training photos int64 [m, k], nearest first, and their cosines clipped at 0, float32 [m, k]."""
        if self._last is None or self._last[0] is not queries or self._last[1].shape[1] < k:
            self._last = queries, *self._find(_tensor(queries), k, is_training=False)
        return self._last[1][:, :k], self._last[2][:, :k]

    def nearest_others(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The same of each training photo among the others."""
        return self._find(self._images, k, is_training=True)

    def _find(self, queries: torch.Tensor, k: int, is_training: bool) -> tuple[np.ndarray, np.ndarray]:
        found, weights = [], []
        for start in range(0, len(queries), _PHOTOS_AT_ONCE):
            cosines = queries[start : start + _PHOTOS_AT_ONCE] @ self._images.T
            if is_training:
                cosines.diagonal(start).fill_(-torch.inf)
            best = cosines.topk(k, dim=1)
            found.append(best.indices.numpy())
            weights.append(best.values.clamp(min=0).numpy())
        return np.concatenate(found), np.concatenate(weights)


def _text_weights(similarities: np.ndarray, k: int, gamma: float) -> np.ndarray:
    """The k largest similarities of each row, to the power gamma, and 0 for the others: float32 [m, c]."""
    powers = _tensor(similarities).clamp(min=0) ** gamma
    best = powers.topk(min(k, powers.shape[1]), dim=1)
    return np.asarray(torch.zeros_like(powers).scatter_(1, best.indices, best.values).numpy())


def _graph(found: np.ndarray, weights: np.ndarray, text_weights: np.ndarray) -> torch.Tensor:
    """S = D^-1/2 (W + W^T) D^-1/2, sparse float64 [c + n, c + n]; a node without edges has a row of zeros.

    Args:
        found: int64 [n, k], neighbours of each photo.
        weights: [n, k], of these edges.
        text_weights: [n, c], of the edges to texts; 0 for none.
    """
    num_photos, num_classes = text_weights.shape
    photos, classes = text_weights.nonzero()
    starts = num_classes + np.concatenate([np.repeat(np.arange(num_photos), found.shape[1]), photos])
    ends = np.concatenate([num_classes + found.ravel(), classes])
    values = torch.from_numpy(np.concatenate([weights.ravel(), text_weights[photos, classes]]).astype(np.float64))
    edges = torch.from_numpy(np.stack([np.concatenate([starts, ends]), np.concatenate([ends, starts])]))
    size = num_classes + num_photos
    summed = torch.sparse_coo_tensor(edges, torch.cat([values, values]), (size, size), check_invariants=True).coalesce()
    rows, columns = summed.indices()
    degrees = torch.zeros(size, dtype=torch.float64).index_add_(0, rows, summed.values())
    scale = torch.where(degrees > 0, degrees, 1).rsqrt()
    normalised = summed.values() * scale[rows] * scale[columns]
    return torch.sparse_coo_tensor(summed.indices(), normalised, (size, size), is_coalesced=True, check_invariants=True)


def _solve(graph: torch.Tensor, alpha: float, num_classes: int) -> np.ndarray:
    """Z of (I - alpha S) Z = E by conjugate gradients, float32 [c + n, c]."""
    solved = np.empty((graph.shape[0], num_classes), np.float32)
    for start in range(0, num_classes, _CLASSES_AT_ONCE):
        stop = min(start + _CLASSES_AT_ONCE, num_classes)
        target = torch.zeros(graph.shape[0], stop - start, dtype=torch.float64)
        target[start:stop] = torch.eye(stop - start, dtype=torch.float64)
        solved[:, start:stop] = _conjugate_gradients(graph, alpha, target).numpy()
    return solved


def _conjugate_gradients(graph: torch.Tensor, alpha: float, target: torch.Tensor) -> torch.Tensor:
    """Columns x of (I - alpha S) x = target, each with its own step sizes; I - alpha S is positive definite."""
    solution, residual = torch.zeros_like(target), target.clone()
    direction, power = residual.clone(), residual.square().sum(dim=0)
    goal = TOLERANCE**2 * power
    for _ in range(MOST_STEPS):
        if (power <= goal).all():
            break
        image = direction - alpha * torch.sparse.mm(graph, direction)
        step = power / (direction * image).sum(dim=0).clamp(min=torch.finfo(target.dtype).tiny)
        solution += step * direction
        residual -= step * image
        before, power = power, residual.square().sum(dim=0)
        direction = residual + power / before.clamp(min=torch.finfo(target.dtype).tiny) * direction
    return solution


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
