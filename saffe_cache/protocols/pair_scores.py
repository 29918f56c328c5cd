"""Scores of pairs: each photo fused with each of several texts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from saffe_cache.fusion.base import Fusion, Pairing, Texts
from saffe_cache.inputs.feature_loader import FamInputs
from saffe_cache.protocols.setting import Queries

_PAIRS_AT_ONCE = 256


class PairScores(NamedTuple):
    """Scores of photos fused with texts."""

    cosine: np.ndarray
    """cos(f(x, t), g(t))"""
    matching: np.ndarray | None
    """The matching head's logits, where there is one."""


@torch.inference_mode()
def score_all_pairs(model: Fusion, inputs: FamInputs, rows: np.ndarray, search: Queries) -> PairScores:
    """Each photo with the text of each query: [photos, queries].

    The part of a fusion that needs the photo alone is computed once for it.
    """
    num_texts = len(search.text_rows)
    block = max(1, _PAIRS_AT_ONCE // num_texts)
    texts, vectors = _texts_of(model, inputs, search, np.arange(num_texts))
    parts = []
    for start in range(0, len(rows), block):
        these = rows[start : start + block]
        pairing = np.divmod(np.arange(len(these) * num_texts), num_texts)
        parts.append(_score_pairs(model, inputs, these, texts, vectors, pairing))
    return _stack(parts, num_texts)


@torch.inference_mode()
def score_chosen_pairs(model: Fusion, inputs: FamInputs, rows: np.ndarray, search: Queries) -> PairScores:
    """The photos `rows` [queries, k] with the text of their query: [queries, k]."""
    k = rows.shape[1]
    block = max(1, _PAIRS_AT_ONCE // k)
    parts = []
    for start in range(0, len(rows), block):
        distinct, position = np.unique(rows[start : start + block], return_inverse=True)
        queries = np.arange(start, min(start + block, len(rows)))
        texts, vectors = _texts_of(model, inputs, search, queries)
        pairing = position.ravel(), np.arange(len(queries)).repeat(k)
        parts.append(_score_pairs(model, inputs, distinct, texts, vectors, pairing))
    return _stack(parts, k)


def _texts_of(model: Fusion, inputs: FamInputs, search: Queries, queries: np.ndarray) -> tuple[Texts, torch.Tensor]:
    """Texts of some queries, to be fused, and their unit vectors."""
    texts = inputs.texts(search.text_rows[queries])
    return texts, model.encode_queries(torch.from_numpy(search.vectors[queries]).to(inputs.device))


def _score_pairs(
    model: Fusion,
    inputs: FamInputs,
    rows: np.ndarray,
    texts: Texts,
    vectors: torch.Tensor,
    pairing: tuple[np.ndarray, np.ndarray],
) -> PairScores:
    """Scores [pairs] of photos by row and texts, paired by position; `vectors` are the texts' as queries."""
    states, mask = inputs.photos(rows)
    index = Pairing(*(torch.from_numpy(side).to(inputs.device) for side in pairing))
    fused, queries = model.fuse(states, mask, texts, index), vectors[index.text]
    matching = model.match(fused, queries).float().cpu().numpy() if model.shape.matches else None
    return PairScores((fused.vectors * queries).sum(dim=-1).float().cpu().numpy(), matching)


def _stack(parts: list[PairScores], width: int) -> PairScores:
    cosine = np.concatenate([part.cosine for part in parts]).reshape(-1, width)
    if parts[0].matching is None:
        return PairScores(cosine, None)
    return PairScores(
        cosine, np.concatenate([part.matching for part in parts if part.matching is not None]).reshape(-1, width)
    )
