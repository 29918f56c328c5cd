"""Baselines without a fusion, and features that a ridge regression makes pre-aligned.

For pre-aligned features photos are mapped to texts by a ridge regression of photos that nothing else uses. All later
steps see features as of an aligned encoder, though one that was aligned on photos of the same data set. The map is the
same for all seeds. It is compared with the cosine without it, and with maps fitted on permuted pairs, which must align
nothing. Their strength is that of the map, since choosing one for each would favour the luckiest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

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
class System:
    """What tells pairs apart."""

    scores: Scorer
    threshold: float
    """Above it a pair counts as a match."""
    how: Mapping[str, Any]
    """What was chosen on validation, and how it was trained, as `SystemScores` names them."""


def fit_baselines(vectors: PairVectors, training: Examples, validation: Examples) -> dict[str, System]:
    """Fitted on training pairs, with strengths and thresholds by validation; the plain cosine only if widths agree."""
    ridge = fit_ridge_map(vectors, training, validation)
    mapped = vectors.mapped(ridge)
    products, penalty = _fit_products(vectors, mapped, ridge.strength, training, validation)
    found: dict[str, tuple[Scorer, float | None]] = {
        "cosine": (vectors.cosines, None),
        "ridge_cosine": (mapped.cosines, ridge.strength),
        "ridge_products": (products, penalty),
    }
    return {
        name: System(scores, best_threshold(scores(validation), validation.labels), {"chosen": chosen})
        for name, (scores, chosen) in found.items()
        if name != "cosine" or vectors.are_comparable
    }


def fit_ridge_map(vectors: PairVectors, training: Examples, validation: Examples) -> LinearMap:
    """From a photo's vector to its text's; the strength by the AUC of the cosine on validation."""
    photos, texts, _ = _matches(vectors, training)
    queries, against = vectors.of_photos(validation.photos), vectors.of_texts(validation.texts)

    def auc(ridge: LinearMap) -> float:
        return float(roc_auc_score(validation.labels, (unit_rows(ridge(queries)) * against).sum(axis=1)))

    return fit_ridge(photos, texts, auc)


def _matches(vectors: PairVectors, pairs: Examples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of photos and texts that belong together, and the photos' rows."""
    own = pairs.labels == 1
    return vectors.of_photos(pairs.photos[own]), vectors.of_texts(pairs.texts[own]), pairs.photos[own]


def _fit_products(
    vectors: PairVectors, mapped: PairVectors, strength: float, training: Examples, validation: Examples
) -> tuple[Scorer, float]:
    """Logistic regression on products, and its penalty. Training photos are mapped by ridges without them."""
    features, queries = _cross_fitted(vectors, strength, training).products(training), mapped.products(validation)
    fits = []
    for penalty in PENALTIES:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000))
        model.fit(features, training.labels)
        fits.append((accuracy_score(validation.labels, model.predict(queries)), penalty, model))
    _, penalty, model = max(fits, key=lambda one: one[0])
    return lambda pairs: np.asarray(model.decision_function(mapped.products(pairs))), penalty


def _cross_fitted(vectors: PairVectors, strength: float, training: Examples) -> PairVectors:
    """Each training photo mapped by a ridge that was fitted without it."""
    photos, texts, rows = _matches(vectors, training)
    mapped = np.zeros((len(vectors.photos), vectors.widths[1]), np.float32)
    for seen, unseen in GroupKFold(min(_FOLDS, len(np.unique(rows)))).split(photos, groups=rows):
        ridge = fit_ridge(photos[seen], texts[seen], lambda _: 0.0, (strength,))
        places = np.searchsorted(vectors.photo_rows, np.unique(rows[unseen]))
        mapped[places] = unit_rows(ridge(vectors.photos[places]))
    return replace(vectors, photos=mapped)


def judge_alignment(vectors: PairVectors, others: Pairs, ridge: LinearMap, test: Examples) -> MadeAlignment:
    """AUC of the cosine on the report's pairs: of the encoders' own vectors, after the map, and after permuted ones.

    `others` are the photos that the map was fitted on.
    """

    def auc(of: PairVectors) -> float:
        return float(roc_auc_score(test.labels, of.cosines(test)))

    def permuted_map(seed: int) -> LinearMap:
        photos, texts, _ = _matches(vectors, matching_examples(others.permuted(seed)))
        return fit_ridge(photos, texts, lambda _: 0.0, (ridge.strength,))

    num_matches = int(test.labels.sum())
    return MadeAlignment(
        photos=len(others),
        matches=num_matches,
        others=len(test) - num_matches,
        strength=ridge.strength,
        auc_before=auc(vectors) if vectors.are_comparable else None,
        auc=auc(vectors.mapped(ridge)),
        auc_permuted=tuple(auc(vectors.mapped(permuted_map(seed))) for seed in range(_PERMUTATIONS)),
    )
