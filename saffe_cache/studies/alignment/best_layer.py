"""A closer look at one photo layer: maps that are fitted on all photos that are not judged, and tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from saffe_cache.retrieval.metrics import paired_bootstrap
from saffe_cache.studies.alignment.advice import ENOUGH_WITHOUT_MAP, Evidence, Gap
from saffe_cache.studies.alignment.maps import Answers, Ridge, RidgeMap, answers_of_scores, mlp_answers
from saffe_cache.studies.alignment.measuring import OWN, Options, Vectors
from saffe_cache.studies.alignment.scores import permutations
from saffe_cache.studies.alignment.tokens import maxsim

_MLP_EPOCHS = 15


def best_layer(vectors: Vectors) -> str:
    """The photo layer that tells most of the texts' own vectors.

    By the error of left-out photos among those that maps are fitted on: the judged ones have no part in the choice.
    """
    targets = vectors.texts_of(OWN, vectors.others)
    errors = {
        name: Ridge(of[vectors.others]).fit(targets).left_out_error
        for name, of in vectors.photos.items()
        if name != OWN
    }
    return min(errors, key=lambda name: errors[name])


@dataclass(frozen=True, kw_only=True)
class TokenStates:
    """Normed tokens of the judged photos and of the texts that are searched with or for."""

    gallery_layer: str
    photos: Iterable[torch.Tensor]
    """[photos, tokens, d], some at a time"""
    text_layer: str
    texts: Sequence[torch.Tensor]
    """[tokens, t] of each."""


def look_closer(vectors: Vectors, tokens: TokenStates, options: Options) -> tuple[list[dict[str, Any]], Evidence]:
    """R@1 of each kind of map on the judged photos, as JSON; and what the advice rests on."""
    orders = permutations(vectors.num_judged, options.permutations, options.seed)
    layer, others, judged = tokens.gallery_layer, vectors.others, vectors.judged
    features = vectors.photos[layer]
    ridge = Ridge(features[others])
    to_own, to_tokens = (ridge.fit(vectors.texts_of(name, others)) for name in (OWN, tokens.text_layer))
    linear = vectors.searched(OWN, to_own(features[judged]))
    linear_mean = vectors.searched(tokens.text_layer, to_tokens(features[judged]))
    mlp = mlp_answers(
        (features[others], vectors.text_of[others]),
        (features[judged], vectors.text_of[judged]),
        vectors.texts[OWN],
        vectors.num_texts,
        _MLP_EPOCHS,
        options.seed,
        texts_search=vectors.has_captions,
    )
    scores = maxsim(tokens.photos, tokens.texts, to_tokens)
    late = answers_of_scores(scores, vectors.text_of[judged], texts_search=vectors.has_captions)
    own = vectors.photos.get(OWN)
    is_comparable = own is not None and own.shape[1] == vectors.texts[OWN].shape[1]
    zero = vectors.searched(OWN, own[judged]) if own is not None and is_comparable else None
    found = []
    if zero is not None:
        deals = permutations(vectors.num_texts, options.permutations, options.seed)
        found.append(_scores(vectors, (OWN, OWN), None, {"a_0": (zero, zero.null_of_deals(deals))}))
    for layers, fit, systems in (
        ((layer, OWN), to_own, {"a_lin": linear, "a_mlp": mlp}),
        ((layer, tokens.text_layer), to_tokens, {"a_lin": linear_mean, "a_tok": late}),
    ):
        found.append(_scores(vectors, layers, fit, {name: (one, one.null(orders)) for name, one in systems.items()}))
    evidence = Evidence(
        a_0=None if zero is None else zero.recall_at_1,
        without_map=None if zero is None else _gap(zero, linear, ENOUGH_WITHOUT_MAP),
        a_lin=linear.recall_at_1,
        a_mlp=mlp.recall_at_1,
        mlp_gain=_gap(mlp, linear),
        null=max(float(np.quantile(one.null(orders), 0.95)) for one in (linear, mlp)),
        a_tok=late.recall_at_1,
        token_gain=_gap(late, linear_mean),
    )
    return found, evidence


def _scores(
    vectors: Vectors,
    layers: tuple[str, str],
    ridge: RidgeMap | None,
    systems: Mapping[str, tuple[Answers, np.ndarray]],
) -> dict[str, Any]:
    """As JSON; of each system its answers and its null."""
    scores = {}
    for name, (one, null) in systems.items():
        low, high = one.interval(0)
        scores[name] = {
            "value": one.recall_at_1,
            "low": low,
            "high": high,
            "null_mean": float(null.mean()),
            "null_high": float(np.quantile(null, 0.95)),
            "median_rank": one.median_rank,
        }
    return {
        "gallery_layer": layers[0],
        "text_layer": layers[1],
        "chance": 1 / vectors.num_texts,
        "scores": scores,
        "ridge_strength": None if ridge is None else ridge.strength,
        "left_out_error": None if ridge is None else ridge.left_out_error,
    }


def _gap(system: Answers, other: Answers, part: float = 1.0) -> Gap:
    """R@1 of a system less (a part of) another's."""
    difference = system.hits - part * other.hits
    return Gap(*paired_bootstrap(difference, np.arange(len(difference))))
