"""Baselines without a fusion, and features that a ridge regression makes pre-aligned.

For pre-aligned features photos are mapped to texts by a ridge regression of photos that nothing else uses. All later
steps see features as of an aligned encoder, though one that was aligned on photos of the same data set. The map is the
same for all seeds. It is compared with the cosine without it, and with maps fitted on permuted pairs, which must align
nothing. Their strength is that of the map, since choosing one for each would favour the luckiest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from saffe_cache.inputs.pairs import Pairs
from saffe_cache.retrieval.baselines import LinearMap, fit_ridge, unit_rows
from saffe_cache.studies.matching.examples import Examples, PairVectors, matching_examples
from saffe_cache.studies.matching.findings import MadeAlignment
from saffe_cache.studies.matching.scores import best_threshold

Scorer = Callable[[Examples], np.ndarray]
"""Scores of pairs, [n]."""
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of the logistic regression."""
_FOLDS = 4
_PERMUTATIONS = 10


@dataclass(frozen=True)
class Baseline:
    """Scores, the threshold above which a pair counts as a match, and what was tuned on validation."""

    scores: Scorer
    threshold: float
    chosen: float | None = None


def fit_baselines(vectors: PairVectors, training: Examples, validation: Examples) -> Mapping[str, Baseline]:
    """Fitted on training pairs, with strengths and thresholds by validation; the plain cosine only if widths agree."""
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


def _products(vectors: PairVectors, photos: np.ndarray, pairs: Examples) -> np.ndarray:
    """Products of unit vectors' coordinates, float32 [pairs, d]."""
    return np.asarray(photos[np.searchsorted(vectors.photo_rows, pairs.photos)] * vectors.of_texts(pairs.texts))


def pair_cosines(vectors: PairVectors, photos: np.ndarray, pairs: Examples) -> np.ndarray:
    """Float32 [pairs]; `photos` replace those of the vectors, row by row."""
    return np.asarray(_products(vectors, photos, pairs).sum(axis=1))


def _matches(vectors: PairVectors, pairs: Examples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of photos and texts that belong together, and the photos' rows."""
    own = pairs.labels == 1
    return vectors.of_photos(pairs.photos[own]), vectors.of_texts(pairs.texts[own]), pairs.photos[own]


def fit_ridge_map(vectors: PairVectors, training: Examples, validation: Examples) -> LinearMap:
    """From a photo's vector to its text's; the strength by the AUC of the cosine on validation."""
    photos, texts, _ = _matches(vectors, training)
    queries, against = vectors.of_photos(validation.photos), vectors.of_texts(validation.texts)

    def auc(ridge: LinearMap) -> float:
        return float(roc_auc_score(validation.labels, (unit_rows(ridge(queries)) * against).sum(axis=1)))

    return fit_ridge(photos, texts, auc)


def _fit_products(
    vectors: PairVectors, mapped: np.ndarray, strength: float, training: Examples, validation: Examples
) -> Baseline:
    """Logistic regression on products. Training photos are mapped by ridges that have not seen them."""
    unseen = _cross_fitted(vectors, strength, training)
    features = _products(vectors, unseen, training)
    queries = _products(vectors, mapped, validation)
    fits = []
    for penalty in PENALTIES:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000))
        model.fit(features, training.labels)
        fits.append((accuracy_score(validation.labels, model.predict(queries)), penalty, model))
    _, penalty, model = max(fits, key=lambda one: one[0])
    return _thresholded(
        lambda pairs: np.asarray(model.decision_function(_products(vectors, mapped, pairs))), validation, penalty
    )


def _cross_fitted(vectors: PairVectors, strength: float, training: Examples) -> np.ndarray:
    """Each training photo mapped by a ridge that was fitted without it, unit vectors [photos, d]."""
    photos, texts, rows = _matches(vectors, training)
    mapped = np.zeros((len(vectors.photos), vectors.widths[1]), np.float32)
    folds = GroupKFold(min(_FOLDS, len(np.unique(rows))))
    for seen, unseen in folds.split(photos, groups=rows):
        ridge = fit_ridge(photos[seen], texts[seen], lambda _: 0.0, (strength,))
        places = np.searchsorted(vectors.photo_rows, np.unique(rows[unseen]))
        mapped[places] = unit_rows(ridge(vectors.photos[places]))
    return mapped


def fit_alignment(vectors: PairVectors, others: Pairs, validation: Examples) -> LinearMap:
    """The ridge regression of these photos and all of their texts, with its strength by validation."""
    return fit_ridge_map(vectors, matching_examples(others), validation)


def judge_alignment(vectors: PairVectors, others: Pairs, ridge: LinearMap, test: Examples) -> MadeAlignment:
    """AUC of the cosine on the report's pairs: before, after, and after maps of permuted pairs.

    Args:
        vectors: the encoders' own.
        others: the photos that the map was fitted on.
        ridge: the map.
        test: pairs of the report.
    """
    permuted = []
    for seed in range(_PERMUTATIONS):
        photos, texts, _ = _matches(vectors, matching_examples(others.permuted(seed)))
        permuted.append(_cosine_auc(vectors.mapped(fit_ridge(photos, texts, lambda _: 0.0, (ridge.strength,))), test))
    num_matches = int(test.labels.sum())
    return MadeAlignment(
        photos=len(others),
        matches=num_matches,
        others=len(test) - num_matches,
        strength=ridge.strength,
        auc_before=_cosine_auc(vectors, test) if vectors.widths[0] == vectors.widths[1] else None,
        auc=_cosine_auc(vectors.mapped(ridge), test),
        auc_permuted=tuple(permuted),
    )


def _cosine_auc(vectors: PairVectors, test: Examples) -> float:
    return float(roc_auc_score(test.labels, pair_cosines(vectors, vectors.photos, test)))
