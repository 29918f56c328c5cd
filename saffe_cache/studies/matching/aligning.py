"""Features made pre-aligned: photos mapped to texts by a ridge regression of photos that nothing else uses.

To all that follows, these come from an aligned encoder, if from one that was aligned on photos of the same data set.
The map is one for all seeds. Beside it stand the cosine without it, and maps fitted on permuted pairs, which must align
nothing; their strength is that of the map, since one chosen for each would be the luckiest of several.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from saffe_cache.inputs.pairs import Pairs
from saffe_cache.retrieval.baselines import LinearMap, fit_ridge
from saffe_cache.studies.matching.baselines import fit_ridge_map, pair_cosines
from saffe_cache.studies.matching.controls import Control, permuted_error
from saffe_cache.studies.matching.examples import Examples, matching_examples
from saffe_cache.studies.matching.inputs import Vectors

_PERMUTATIONS = 10


def fit_alignment(vectors: Vectors, others: Pairs, validation: Examples) -> LinearMap:
    """The ridge regression of these photos and all of their texts; its strength by validation, as the baseline's."""
    return fit_ridge_map(vectors, matching_examples(others), validation)


def judge_alignment(vectors: Vectors, others: Pairs, ridge: LinearMap, test: Examples) -> Mapping[str, Any]:
    """AUC of the cosine on the report's pairs: before, where widths agree, after, and after permuted pairs.

    Args:
        vectors: the encoders' own.
        others: the photos that the map was fitted on.
        ridge: the map.
        test: pairs of the report.
    """
    permuted = []
    for seed in range(_PERMUTATIONS):
        matches = matching_examples(others.permuted(seed))
        photos, texts = vectors.of_photos(matches.photos), vectors.of_texts(matches.texts)
        permuted.append(_cosine_auc(vectors.mapped(fit_ridge(photos, texts, lambda _: 0.0, (ridge.strength,))), test))
    num_matches = int(test.labels.sum())
    return {
        "photos": len(others),
        "pairs": {"matches": num_matches, "others": len(test) - num_matches},
        "strength": ridge.strength,
        "auc_before": _cosine_auc(vectors, test) if vectors.widths[0] == vectors.widths[1] else None,
        "auc": _cosine_auc(vectors.mapped(ridge), test),
        "auc_permuted": permuted,
    }


def alignment_in_words(found: Mapping[str, Any]) -> str:
    """One sentence, from what `judge_alignment` gives."""
    before = found["auc_before"]
    told = "of the encoders' own vectors there is none, their widths differ" if before is None else _percent(before)
    permuted = found["auc_permuted"]
    return (
        f"features were made pre-aligned by a ridge regression of {found['photos']} other photos, in no pair of this "
        f"result: AUC of the cosine on the report {_percent(found['auc'])}; before, {told}; by permuted pairs "
        f"{_percent(float(np.mean(permuted)))}, from {_percent(min(permuted))} to {_percent(max(permuted))} in "
        f"{len(permuted)} permutations; chance 50.0"
    )


def null_control(found: Mapping[str, Any], num_kinds: int) -> Control:
    """That permuted pairs aligned nothing, from what `judge_alignment` gives and the kinds of the report's photos."""
    error = permuted_error(found["pairs"]["matches"], found["pairs"]["others"], num_kinds)
    return Control("cosine, made pre-aligned by permuted pairs", found["auc_permuted"], error, is_trained=True)


def _cosine_auc(vectors: Vectors, test: Examples) -> float:
    return float(roc_auc_score(test.labels, pair_cosines(vectors, vectors.photos, test)))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
