"""Baselines that a fusion should beat: class means, ridge, linear probe, late fusion, label propagation.

The MLP is in `mlp`. Parameters are chosen by a `judge`, a validation score of which higher is better.

Label propagation (`fit_zlap`) goes from class texts over unlabelled photos, for photos that were not in the graph.
Source: Stojnić et al., Label Propagation for Zero-shot Classification with Vision-Language Models, CVPR 2024.
Nodes are c class texts and n training photos, whose labels are not used. Each photo has edges to its k nearest
other photos, weighted by their cosine, and to its k nearest texts, weighted by cosine ** gamma; negative cosines
count as 0. With W the sum of these weights and their transpose, S = D^-1/2 W D^-1/2,

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
from torch.nn import functional

RIDGE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties, as multiples of the number of samples."""
PROBE_STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
LATE_WEIGHTS = tuple(step / 20 for step in range(21))
"""Weights of the photo's vector; the text's vector has the rest."""
_ROWS_AT_ONCE, _COLUMNS_AT_ONCE = 16384, 64
"""Rows and columns of features that are float64 at a time."""
NEIGHBOURS = (5, 10, 20)
GAMMAS = (3.0, 5.0, 10.0)
ALPHAS = (0.3, 0.7, 0.9)
TOLERANCE = 1e-6
"""Residual at which label propagation stops, relative to the right side."""
MOST_STEPS = 100
"""Steps of conjugate gradients; alpha = 0.9 needs about 30."""
_PHOTOS_AT_ONCE, _CLASSES_AT_ONCE = 512, 64
"""Bounds on memory: no array is [n, n]."""


@dataclass(frozen=True)
class LinearMap:
    """x -> weight x + bias."""

    weight: np.ndarray
    """[out, in]"""
    bias: np.ndarray
    strength: float
    """The chosen penalty."""

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
    photos of a class can be ranked by the same scores that classify them. `features` [n, in], `labels` int [n].
    """
    center = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    sums = np.zeros((num_classes, features.shape[1]))
    np.add.at(sums, labels, unit_rows(features - center))
    return ClassMeans(center, unit_rows(sums))


def fuse_late(image: np.ndarray, text: np.ndarray, weight: float) -> np.ndarray:
    """unit(weight image + (1 - weight) text), float32 [n, d]: the average of two scores, up to its norm.

    `image` and `text` are unit vectors [n, d] in the space of the queries; the weight is 0 to 1.
    """
    return unit_rows(weight * image + (1 - weight) * text)


def tune_late_fusion(image: np.ndarray, text: np.ndarray, judge: Callable[[np.ndarray], float]) -> float:
    """The weight of `fuse_late` on validation photos whose gallery `judge` scores best; the smallest of equal ones."""
    return max(LATE_WEIGHTS, key=lambda weight: judge(fuse_late(image, text, weight)))


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12), np.float32)


@dataclass(frozen=True)
class Rows:
    """Numbers of many rows that are computed when they are read, some rows at a time. Arrays are read in the same way.

    `compute` is given a slice with both ends, and returns [rows, …].
    """

    count: int
    compute: Callable[[slice], np.ndarray]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.compute(slice(*rows.indices(self.count)[:2]))

    @property
    def whole(self) -> np.ndarray:
        """All rows, in memory."""
        return self[:]

    def kept(self, most_bytes: int) -> Rows:
        """The same, read once and kept in memory if they are no larger than this."""
        if not self.count or self[:1].nbytes * self.count > most_bytes:
            return self
        return Rows(self.count, self.whole.__getitem__)

    def mapped(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """What a function makes of the rows, some at a time."""
        return np.concatenate([function(self[rows]) for rows in _blocks(self)])


def _blocks(features: np.ndarray | Rows) -> Iterator[slice]:
    """At least one."""
    for start in range(0, max(1, len(features)), _ROWS_AT_ONCE):
        yield slice(start, start + _ROWS_AT_ONCE)


@dataclass(frozen=True)
class _Spectrum:
    """Ridge regressions with intercept, W = (X'X + lambda n I)^-1 X'Y, for any lambda."""

    count: int
    center: np.ndarray
    """float64 [in], of the features."""
    eigenvalues: np.ndarray
    """Of X'X, X centered."""
    vectors: np.ndarray

    @classmethod
    def of(cls, count: int, center: np.ndarray, own: np.ndarray) -> _Spectrum:
        """`own` is X'X."""
        eigenvalues, vectors = np.linalg.eigh(own)
        return cls(count, center, np.maximum(eigenvalues, 0), vectors)

    def map(self, projected: np.ndarray, center: np.ndarray, strength: float) -> LinearMap:
        """`projected` [in, out]: X'Y of centered X and Y, rotated as X'X is; `center` of Y."""
        shrunk = self.eigenvalues + strength * self.count
        weight = (self.vectors @ (projected / shrunk[:, None])).T
        bias = center - weight @ self.center
        return LinearMap(weight.astype(np.float32), bias.astype(np.float32), strength)


class Ridge:
    """Ridge regressions from one set of features to any targets, each fitted without a validation set.

    The features are decomposed once, for all strengths and all targets.
    """

    def __init__(self, features: np.ndarray) -> None:
        center, own = features.mean(axis=0, dtype=np.float64), np.zeros((features.shape[1],) * 2)
        for rows in _blocks(features):
            centered = np.subtract(features[rows], center, dtype=np.float64)
            own += centered.T @ centered
        self._spectrum = _Spectrum.of(len(features), center, own)
        vectors = self._spectrum.vectors.astype(np.float32)
        self._rotated = np.concatenate(
            [
                np.subtract(features[rows], center, dtype=np.float64).astype(np.float32) @ vectors
                for rows in _blocks(features)
            ]
        )
        """The centered features in the axes of their covariance, float32 [n, in]."""
        self._squares = self._rotated**2

    def fit_left_out(self, targets: np.ndarray) -> tuple[LinearMap, float]:
        """To targets [n, out], with the lambda that has the least squared error of left-out samples, and that error.

        The error of a sample when it is left out of the fit is its residual divided by one less its leverage: no second
        fit is needed. Source: Hastie et al., The Elements of Statistical Learning, eq. 7.64. It is a fraction of the
        targets' variance; 1 means that nothing was learned.
        """
        rotated, squares = self._rotated, self._squares
        center = targets.mean(axis=0, dtype=np.float64)
        centered = (targets - center).astype(np.float32)
        projected = rotated.T @ centered
        spread = float((centered**2).mean()) or 1.0
        errors = []
        for strength in RIDGE_STRENGTHS:
            shrunk = (1 / (self._spectrum.eigenvalues + strength * len(centered))).astype(np.float32)
            leverages = squares @ shrunk + 1 / len(centered)
            residuals = centered - rotated @ (shrunk[:, None] * projected)
            errors.append(float(((residuals / np.maximum(1 - leverages, 1e-6)[:, None]) ** 2).mean()) / spread)
        best = int(np.argmin(errors))
        return self._spectrum.map(projected, center, RIDGE_STRENGTHS[best]), errors[best]


def fit_ridge(
    features: np.ndarray | Rows,
    targets: np.ndarray | Rows,
    judge: Callable[[LinearMap], float],
    strengths: Sequence[float] = RIDGE_STRENGTHS,
) -> LinearMap:
    """A ridge regression with intercept from features [n, in] to targets [n, out]; `judge` picks lambda.

    Both are read once, some rows at a time: X'X and X'Y are summed around the means of the first rows, and then moved
    to the means of all.
    """
    count, first = len(features), next(_blocks(features))
    starts = [of[first].mean(axis=0, dtype=np.float64) for of in (features, targets)]
    sums = [np.zeros_like(start) for start in starts]
    own, shared = (np.zeros((len(starts[0]), len(start))) for start in starts)
    for rows in _blocks(features):
        x, y = (
            np.subtract(of[rows], start, dtype=np.float64)
            for of, start in zip((features, targets), starts, strict=True)
        )
        own += x.T @ x
        shared += x.T @ y
        sums = [total + block.sum(axis=0) for total, block in zip(sums, (x, y), strict=True)]
    if count > _ROWS_AT_ONCE:  # of fewer, the first rows are all
        own -= np.outer(sums[0], sums[0]) / count
        shared -= np.outer(*sums) / count
        starts = [start + total / count for start, total in zip(starts, sums, strict=True)]
    spectrum = _Spectrum.of(count, starts[0], own)
    projected = spectrum.vectors.T @ shared
    return max((spectrum.map(projected, starts[1], strength) for strength in strengths), key=judge)


def fit_linear_probe(
    features: np.ndarray, labels: np.ndarray, num_classes: int, judge: Callable[[LinearMap], float]
) -> LinearMap:
    """Multinomial logistic regression by L-BFGS on standardised features, as CLIP's linear probe.

    `features` [n, in], `labels` int [n]; `judge` picks the penalty.
    """
    standardised, center, scale = _standardise(features)
    inputs, targets = torch.from_numpy(standardised), torch.from_numpy(labels.astype(np.int64))
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    fits = []
    for strength in sorted(PROBE_STRENGTHS, reverse=True):  # each fit starts from the stronger one before it
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure(optimizer: torch.optim.LBFGS = optimizer, strength: float = strength) -> torch.Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(inputs @ weight.T + bias, targets) + strength / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
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

        `images` are unit vectors [m, d], `image_text` their similarities to the class texts [m, c].
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
    gammas: Sequence[float] = GAMMAS,
    alphas: Sequence[float] = ALPHAS,
) -> LabelPropagation:
    """Build the graph over unlabelled photos and solve it; `judge` picks k (of `neighbours`), gamma and alpha.

    `images` are unit vectors of the training photos, [n, d], `image_text` their similarities to the class texts,
    [n, c]. ValueError if there are not more photos than neighbours.
    """
    if max(neighbours) >= len(images):
        raise ValueError(f"ZLaP: k={max(neighbours)} with {len(images)} training items. Use k below their number.")
    search = _Search(images)
    found, weights = search.find(search.images, max(neighbours), is_training=True)

    def solved() -> Iterator[LabelPropagation]:
        for k, gamma in product(neighbours, gammas):
            graph = _graph(found[:, :k], weights[:, :k], _text_weights(image_text, k, gamma))
            for alpha in alphas:
                yield LabelPropagation(k, gamma, alpha, _solve(graph, alpha, image_text.shape[1]), search)

    return max(solved(), key=judge)


class _Search:
    """Nearest training photos. Remembers its last answer: each candidate is judged on the same photos."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = _tensor(images)
        self._last: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Training photos int64 [m, k], nearest first, and their cosines clipped at 0, float32 [m, k]."""
        if self._last is None or self._last[0] is not queries or self._last[1].shape[1] < k:
            self._last = queries, *self.find(_tensor(queries), k)
        return self._last[1][:, :k], self._last[2][:, :k]

    def find(self, queries: torch.Tensor, k: int, is_training: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """As `nearest`; of each training photo among the others."""
        best = []
        for start in range(0, len(queries), _PHOTOS_AT_ONCE):
            cosines = queries[start : start + _PHOTOS_AT_ONCE] @ self.images.T
            if is_training:
                cosines.diagonal(start).fill_(-torch.inf)
            best.append(cosines.topk(k, dim=1))
        weights, found = map(torch.cat, zip(*best, strict=True))
        return found.numpy(), weights.clamp(min=0).numpy()


def _text_weights(similarities: np.ndarray, k: int, gamma: float) -> np.ndarray:
    """The k largest similarities of each row, to the power gamma, and 0 for the others: float32 [m, c]."""
    powers = _tensor(similarities).clamp(min=0) ** gamma
    best = powers.topk(min(k, powers.shape[1]), dim=1)
    return np.asarray(torch.zeros_like(powers).scatter_(1, best.indices, best.values).numpy())


def _graph(found: np.ndarray, weights: np.ndarray, text_weights: np.ndarray) -> torch.Tensor:
    """S = D^-1/2 (W + W^T) D^-1/2, sparse float64 [c + n, c + n]; a node without edges has a row of zeros.

    From the neighbours int64 [n, k] of each photo, their weights, and the weights [n, c] of texts, 0 for no edge.
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
    columns = []
    for start in range(0, num_classes, _CLASSES_AT_ONCE):
        target = torch.zeros(graph.shape[0], min(_CLASSES_AT_ONCE, num_classes - start), dtype=torch.float64)
        target[start:].fill_diagonal_(1)
        columns.append(_conjugate_gradients(graph, alpha, target).float())
    return np.asarray(torch.cat(columns, dim=1).numpy())


def _conjugate_gradients(graph: torch.Tensor, alpha: float, target: torch.Tensor) -> torch.Tensor:
    """Columns x of (I - alpha S) x = target, each with its own step sizes; I - alpha S is positive definite."""
    tiny = torch.finfo(target.dtype).tiny
    solution, residual = torch.zeros_like(target), target.clone()
    direction, power = residual.clone(), residual.square().sum(dim=0)
    goal = TOLERANCE**2 * power
    for _ in range(MOST_STEPS):
        if (power <= goal).all():
            break
        image = direction - alpha * torch.sparse.mm(graph, direction)
        step = power / (direction * image).sum(dim=0).clamp(min=tiny)
        solution += step * direction
        residual -= step * image
        before, power = power, residual.square().sum(dim=0)
        direction = residual + power / before.clamp(min=tiny) * direction
    return solution


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
