"""Collect what `details` stores: the first photos of each system for single queries, and how it ranks classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saffe_cache.core.items import Ragged
from saffe_cache.evaluation.details import RECALLS, ClassDetails, Details, SystemDetails
from saffe_cache.protocols.base import Protocol
from saffe_cache.protocols.setting import Answered, Answers, Reordered, Setting, Vectors
from saffe_cache.retrieval.ranking import members, relevant_ranks, top_k
from saffe_cache.retrieval.scores import Scores, drawn_queries, nearest_classes
from saffe_cache.store.joined import JoinedEncoder

FIRST_K = 10
MOST_QUERIES = 2000


class Shown(NamedTuple):
    """What is kept of a system's answers: its scores, and what is shown of single queries."""

    scores: Scores
    first: np.ndarray
    """int64 [shown, up to 10]: the first photos of the queries that are shown, best first."""
    classes: ClassDetails | None


def shown_of(protocol: Protocol, answered: Answered) -> Shown:
    """All vectors of all queries would be too large to keep for every system."""
    queries, shown = _shown_queries(protocol)
    first = _first(protocol, answered.answers, queries[shown])
    classes = _class_details(answered.answers, protocol) if protocol.shows_classes else None
    return Shown(answered.scores, first, classes)


def _shown_queries(protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    """The queries that have something relevant, and which of them are shown."""
    queries = np.flatnonzero(protocol.relevant.lengths)
    return queries, drawn_queries(len(queries), MOST_QUERIES, protocol.setting.seed)


def details_of(protocol: Protocol, systems: Mapping[str, Shown]) -> Details:
    """The details of some systems under one protocol."""
    setting, (queries, shown) = protocol.setting, _shown_queries(protocol)
    chosen = queries[shown]
    relevant = protocol.relevant.take(chosen)
    answers = relevant.values[relevant.offsets[:-1]]
    asking = _asking(protocol, chosen)
    named = np.unique(np.concatenate([answers, asking[asking >= 0], *(of.first.ravel() for of in systems.values())]))
    inputs = setting.cache.table.inputs
    hashes, texts = _file_hashes(setting), inputs["text"].texts
    assert texts is not None
    return Details(
        main_metric=protocol.main_metric,
        shown=shown,
        texts=() if protocol.queries is None else tuple(texts[row] for row in protocol.queries.text_rows[chosen]),
        answers=np.searchsorted(named, answers),
        asking=np.where(asking < 0, -1, np.searchsorted(named, asking)),
        num_relevant=relevant.lengths,
        photo_ids=tuple(setting.pairs.ids[place] for place in named),
        photo_hashes=hashes[setting.pairs.rows[named]],
        photo_texts=tuple(_photo_text(setting, texts, place) for place in named),
        query_classes=tuple(protocol.class_names[query] for query in queries) if protocol.shows_classes else (),
        class_names=protocol.class_names,
        systems={
            name: system_details(of.scores[protocol.main_metric].of_queries, of.first, named, relevant, of.classes)
            for name, of in systems.items()
        },
    )


def system_details(
    metric: np.ndarray, first: np.ndarray, named: np.ndarray, relevant: Ragged, classes: ClassDetails | None = None
) -> SystemDetails:
    """What is stored of one system, from the first items of the shown queries and those that are relevant to them.

    `named`: the items that are named in the details, ascending; their places are stored.
    """
    return SystemDetails(
        metric=metric,
        first=np.searchsorted(named, first),
        is_relevant=np.array([np.isin(row, relevant[query]) for query, row in enumerate(first)]),
        classes=classes,
    )


def _file_hashes(setting: Setting) -> np.ndarray:
    """uint8 [inputs, 32]: of the file of each input of the gallery; of several media, of the first that an item has."""
    inputs, gallery = setting.cache.table.inputs, setting.inputs.gallery
    if not isinstance(gallery, JoinedEncoder):
        return inputs[gallery.manifest.modality].content_hash
    found = np.zeros((len(gallery.parts), 32), np.uint8)
    for place, medium in reversed(list(enumerate(gallery.encoders))):
        has = gallery.parts[:, place] >= 0
        found[has] = inputs[medium].content_hash[gallery.parts[has, place]]
    return found


def _asking(protocol: Protocol, queries: np.ndarray) -> np.ndarray:
    """The photo that searches for each query, or that its text is fused with; -1 where a text searches alone."""
    if protocol.queries is None:
        return queries
    references = protocol.queries.references
    return np.full(len(queries), -1) if references is None else references[queries]


def _first(protocol: Protocol, answers: Answers, queries: np.ndarray) -> np.ndarray:
    """The first photos of some queries; a photo that searches is not among its own."""
    scores, by_photo = protocol.ranked(answers, queries), protocol.queries is None
    first = top_k(scores, min(FIRST_K + by_photo, scores.shape[1]), seed=protocol.setting.seed)
    if isinstance(answers, Reordered):
        width = min(first.shape[1], answers.positions.shape[1])
        first[:, :width] = answers.positions[queries, :width]
    if not by_photo:
        return first
    is_own = first == queries[:, None]
    is_own[~is_own.any(axis=1), -1] = True
    return np.asarray(first[~is_own].reshape(len(first), -1))


def _photo_text(setting: Setting, texts: Sequence[str], place: int) -> str:
    pairs = setting.pairs
    if pairs.paired_texts is None and pairs.kind == "classes":
        return ", ".join(setting.cache.table.class_names[label] for label in pairs.labels[place])
    own = pairs.texts[place] if pairs.paired_texts is None else pairs.paired_texts[place : place + 1]
    return texts[int(own[0])] if len(own) else ""


def _class_details(answers: Answers, protocol: Protocol) -> ClassDetails:
    pairs, seed, num_classes = protocol.setting.pairs, protocol.setting.seed, len(protocol.class_names)
    alone = np.flatnonzero(pairs.labels.lengths == 1)
    labels = pairs.labels.values[pairs.labels.offsets[alone]]
    confusion, bias = np.zeros((num_classes, num_classes), np.int64), None
    if isinstance(answers, Vectors):
        bias = answers.biases.queries
    np.add.at(confusion, (labels, nearest_classes(answers.scores(), seed, bias)[alone]), 1)
    ranks = relevant_ranks(answers.scores(), members(pairs.labels, num_classes), seed=seed)
    curves = [interpolated_precision(of_class) for of_class in ranks if len(of_class)]
    return ClassDetails(precision=np.array(curves, np.float32), confusion=confusion)


def interpolated_precision(ranks: np.ndarray) -> np.ndarray:
    """The highest precision at each of `RECALLS` or above it, float64 [101], from the ranks of all relevant photos.

    For drawing alone: average precision is not interpolated.
    Source: Manning et al., Introduction to Information Retrieval, sec. 8.4.
    """
    found = np.arange(1, len(ranks) + 1)
    highest = np.maximum.accumulate((found / ranks)[::-1])[::-1]
    needed = np.ceil(RECALLS * len(ranks) - 1e-9).astype(int)  # how many of them make this recall
    return np.asarray(highest[np.maximum(needed, 1) - 1])
