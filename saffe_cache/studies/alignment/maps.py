"""Retrieval between two encoders with no map, a ridge regression, or an MLP: what a cosine finds on unseen photos.

Maps go from photos to texts and are fitted on other photos than they are judged on. Captions search the judged photos,
one caption for each; classes are searched by the photos. So chance is 1 / photos, or 1 / classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from saffe_cache.core.features import Ragged
from saffe_cache.retrieval.baselines import RIDGE_STRENGTHS, unit_rows
from saffe_cache.retrieval.metrics import bootstrap_interval
from saffe_cache.retrieval.mlp import MlpFit, fit_mlp

_VALIDATION_PART = 5
"""One in so many of the photos to fit on chooses the MLP's epoch and dropout."""


@dataclass(frozen=True)
class Answers:
    """What judged photos and their texts find of each other."""

    ranks: np.ndarray
    """float64 [queries]: of the own photo of each caption, or of the own class of each photo; a tie is half a place."""
    first: np.ndarray
    """int64 [queries]: what stands first."""
    own: np.ndarray
    """int64 [queries]: what should."""

    @property
    def hits(self) -> np.ndarray:
        """1.0 where the own one stands first, [queries]."""
        return np.asarray(self.ranks == 1, np.float64)

    @property
    def recall_at_1(self) -> float:
        return float(self.hits.mean())

    @property
    def median_rank(self) -> float:
        return float(np.median(self.ranks))

    def interval(self, seed: int) -> tuple[float, float]:
        """Of R@1: a 95 % bootstrap over photos, in the gallery as it is, as saffe-index-eval has it."""
        return bootstrap_interval(self.hits, np.ones(len(self.hits)), seed=seed)

    def null(self, orders: Sequence[np.ndarray]) -> np.ndarray:
        """R@1 where the judged pairs are permuted, one for each order.

        The map stays: it has not seen the judged photos, so that if it knows nothing of the pairing, each order is as
        likely as the true one.
        """
        return np.array([(self.first == self.own[order]).mean() for order in orders])

    def null_of_deals(self, deals: Sequence[np.ndarray]) -> np.ndarray:
        """R@1 where texts are dealt at random, to photos or to classes: a permutation of them for each deal.

        For vectors that were fitted to nothing. All photos of a class then miss or hit together, as they do in truth.
        """
        return np.array([(self.first == deal[self.own]).mean() for deal in deals])


def answers(photos: np.ndarray, texts: np.ndarray, rows: np.ndarray, *, texts_search: bool) -> Answers:
    """By cosine, of photos in the texts' space.

    Args:
        photos: [n, d].
        texts: the distinct texts, [m, d].
        rows: int [n], the text of each photo.
        texts_search: whether the texts, one of each photo, search the photos; else photos search the texts.
    """
    return answers_of_scores(unit_rows(photos) @ unit_rows(texts).T, rows, texts_search=texts_search)


def answers_of_scores(scores: np.ndarray, rows: np.ndarray, *, texts_search: bool) -> Answers:
    """By scores of photos with distinct texts, [n, m]."""
    scores, own = (scores[:, rows].T, np.arange(len(rows))) if texts_search else (scores, rows)
    of_own = scores[np.arange(len(own)), own][:, None]
    ties = (scores == of_own).sum(axis=1) - 1
    return Answers(1 + (scores > of_own).sum(axis=1) + ties / 2, scores.argmax(axis=1), own)


class Ridge:
    """Ridge regressions from one set of features to many sets of targets: the features are decomposed once."""

    def __init__(self, features: np.ndarray) -> None:
        """`features` [n, d] of the photos to fit on."""
        self._center = features.mean(axis=0, dtype=np.float64).astype(np.float32)
        centered = np.subtract(features, self._center, dtype=np.float64)
        eigenvalues, vectors = np.linalg.eigh(centered.T @ centered)
        self._eigenvalues = np.maximum(eigenvalues, 0)
        self._vectors = vectors.astype(np.float32)
        self._rotated = centered.astype(np.float32) @ self._vectors

    def fit(self, targets: np.ndarray) -> RidgeMap:
        """To targets [n, t]; of the package's strengths that with the least squared error of left-out photos.

        The error of a photo when it is left out of the fit is its residual divided by one less its leverage: no second
        fit is needed. Source: Hastie et al., The Elements of Statistical Learning, eq. 7.64.
        """
        center = targets.mean(axis=0, dtype=np.float64).astype(np.float32)
        centered = (targets - center).astype(np.float32)
        shared = self._rotated.T @ centered
        spread = float((centered**2).mean()) or 1.0
        fits = []
        for strength in RIDGE_STRENGTHS:
            shrunk = (1 / (self._eigenvalues + strength * len(centered))).astype(np.float32)
            leverages = self._squares @ shrunk + 1 / len(centered)
            residuals = centered - self._rotated @ (shrunk[:, None] * shared)
            error = float(((residuals / np.maximum(1 - leverages, 1e-6)[:, None]) ** 2).mean())
            fits.append((error / spread, strength, shrunk))
        error, strength, shrunk = min(fits, key=lambda fit: fit[0])
        return RidgeMap(self._center, self._vectors @ (shrunk[:, None] * shared), center, strength, error)

    @cached_property
    def _squares(self) -> np.ndarray:
        return np.asarray(self._rotated**2)


@dataclass(frozen=True)
class RidgeMap:
    """A fitted ridge regression."""

    center: np.ndarray
    """Mean of the features, [d]."""
    weight: np.ndarray
    """[d, t]"""
    target_center: np.ndarray
    """Mean of the targets, [t]."""
    strength: float
    """Of the penalty."""
    left_out_error: float
    """Squared error of photos that are left out of the fit, as a part of the targets' variance: 1 tells nothing."""

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Of features [..., d], float32 [..., t]."""
        return np.asarray((features - self.center) @ self.weight + self.target_center, np.float32)


def mlp_answers(
    fitted: tuple[np.ndarray, np.ndarray],
    judged: tuple[np.ndarray, np.ndarray],
    texts: np.ndarray,
    num_judged_texts: int,
    epochs: int,
    seed: int,
    *,
    texts_search: bool,
) -> Answers:
    """What saffe-index-eval's MLP on pooled features finds: two layers, trained by InfoNCE as a FAM is.

    A fifth of the photos to fit on choose its dropout and epoch.

    Args:
        fitted: features [n, d] of the photos to fit on, and the text of each, int [n].
        judged: the same of the photos to judge.
        texts: the distinct texts, [m, t].
        num_judged_texts: so many of them, the first, are searched with or for among the judged photos.
        epochs: at most.
        seed: of starting weights, order and dropout.
        texts_search: see `answers`.
    """
    features, rows = fitted
    held = np.arange(len(features)) % _VALIDATION_PART == 0
    texts = unit_rows(texts)

    def judge(fit: MlpFit) -> float:
        distinct, place = np.unique(rows[held], return_inverse=True)
        queries = fit.queries(texts[distinct])
        found = answers(fit.gallery(features[held]), queries, place, texts_search=texts_search)
        return float((1 / found.ranks).mean())

    positives = Ragged.from_rows([row] for row in rows[~held])
    fit = fit_mlp(
        features[~held],
        texts,
        positives,
        judge,
        epochs=epochs,
        seed=seed,
    )
    queries = fit.queries(texts[:num_judged_texts])
    return answers(fit.gallery(judged[0]), queries, judged[1], texts_search=texts_search)
