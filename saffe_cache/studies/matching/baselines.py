"""What needs no fusion: the cosine, the cosine after a ridge regression, a logistic regression on products of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from saffe_cache.retrieval.baselines import LinearMap, fit_ridge, unit_rows
from saffe_cache.studies.matching.examples import Examples
from saffe_cache.studies.matching.inputs import Vectors
from saffe_cache.studies.matching.scores import best_threshold

Scorer = Callable[[Examples], np.ndarray]
"""Scores of pairs, [n]."""
BASELINES: Mapping[str, str] = {
    "cosine": "of the vectors that fusions are given, above a threshold",
    "ridge_cosine": "the cosine after a ridge regression from photos to texts, above a threshold",
    "ridge_products": "logistic regression on products of the same vectors, coordinate by coordinate",
}
"""What each is."""
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of the logistic regression."""
_FOLDS = 4


@dataclass(frozen=True)
class Baseline:
    """Scores, the threshold above which a pair is called a match, and what was tuned on validation."""

    scores: Scorer
    threshold: float
    chosen: float | None = None


def fit_baselines(vectors: Vectors, training: Examples, validation: Examples) -> Mapping[str, Baseline]:
    """Fitted on training pairs; strengths and thresholds by validation. The plain cosine only where widths agree."""
    found = {}
    if vectors.widths[0] == vectors.widths[1]:
        found["cosine"] = _thresholded(lambda pairs: pair_cosines(vectors, vectors.photos, pairs), validation)
    ridge = fit_ridge_map(vectors, training, validation)
    mapped = unit_rows(ridge(vectors.photos))
    found["ridge_cosine"] = _thresholded(
        lambda pairs: pair_cosines(vectors, mapped, pairs), validation, chosen=ridge.strength
    )
    found["ridge_products"] = _fit_products(vectors, mapped, ridge.strength, training, validation)
    return found


def _thresholded(scores: Scorer, validation: Examples, chosen: float | None = None) -> Baseline:
    return Baseline(scores, best_threshold(scores(validation), validation.labels), chosen)


def _products(vectors: Vectors, photos: np.ndarray, pairs: Examples) -> np.ndarray:
    """Of unit vectors, coordinate by coordinate: float32 [pairs, d]."""
    return np.asarray(photos[np.searchsorted(vectors.photo_rows, pairs.photos)] * vectors.of_texts(pairs.texts))


def pair_cosines(vectors: Vectors, photos: np.ndarray, pairs: Examples) -> np.ndarray:
    """Float32 [pairs]; `photos` stand in for those of the vectors, row by row."""
    return np.asarray(_products(vectors, photos, pairs).sum(axis=1))


def _matches(vectors: Vectors, pairs: Examples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of photos and texts that belong together, and the photos' rows."""
    own = pairs.labels == 1
    return vectors.of_photos(pairs.photos[own]), vectors.of_texts(pairs.texts[own]), pairs.photos[own]


def fit_ridge_map(vectors: Vectors, training: Examples, validation: Examples) -> LinearMap:
    """From a photo's vector to its text's; the strength by the AUC of the cosine on validation."""
    photos, texts, _ = _matches(vectors, training)
    asked, against = vectors.of_photos(validation.photos), vectors.of_texts(validation.texts)

    def auc(ridge: LinearMap) -> float:
        return float(roc_auc_score(validation.labels, (unit_rows(ridge(asked)) * against).sum(axis=1)))

    return fit_ridge(photos, texts, auc)


def _fit_products(
    vectors: Vectors, mapped: np.ndarray, strength: float, training: Examples, validation: Examples
) -> Baseline:
    """Logistic regression on products. Training photos are mapped by ridges that have not seen them."""
    unseen = _cross_fitted(vectors, strength, training)
    features = _products(vectors, unseen, training)
    asked = _products(vectors, mapped, validation)
    fits = []
    for penalty in PENALTIES:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000))
        model.fit(features, training.labels)
        fits.append((accuracy_score(validation.labels, model.predict(asked)), penalty, model))
    _, penalty, model = max(fits, key=lambda one: one[0])
    return _thresholded(
        lambda pairs: np.asarray(model.decision_function(_products(vectors, mapped, pairs))), validation, penalty
    )


def _cross_fitted(vectors: Vectors, strength: float, training: Examples) -> np.ndarray:
    """Each training photo as the ridge maps it that was fitted without it, unit vectors [photos, d]."""
    photos, texts, rows = _matches(vectors, training)
    mapped = np.zeros((len(vectors.photos), vectors.widths[1]), np.float32)
    folds = GroupKFold(min(_FOLDS, len(np.unique(rows))))
    for seen, unseen in folds.split(photos, groups=rows):
        ridge = fit_ridge(photos[seen], texts[seen], lambda _: 0.0, (strength,))
        places = np.searchsorted(vectors.photo_rows, np.unique(rows[unseen]))
        mapped[places] = unit_rows(ridge(vectors.photos[places]))
    return mapped
