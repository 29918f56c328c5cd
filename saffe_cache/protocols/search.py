"""How some pairs are searched: the queries, what is relevant to them, and the scores of a gallery."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from saffe_cache.core.features import Ragged
from saffe_cache.inputs.pairs import Pairs, class_vectors
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.retrieval.ranking import members
from saffe_cache.retrieval.scores import Scores, caption_scores, class_scores, text_scores
from saffe_cache.store.reader import Cache

SearchName = Literal["caption", "class", "metadata"]


@dataclass(frozen=True)
class Search:
    """Texts that search a gallery of `pairs`, under one protocol."""

    protocol: SearchName
    pairs: Pairs
    text_rows: np.ndarray
    """int64 [queries]: a text row of each query: the caption, or the first prompt of the class."""
    vectors: np.ndarray
    """The text encoder's own vectors of the queries, [queries, d]; of a class, the mean over its prompts."""
    relevant: Ragged
    """Positions in the gallery that are relevant to each query; none for a class without photos."""
    units: np.ndarray
    """int64 [queries]: the photo that each query is drawn with in a bootstrap."""
    seed: int

    @property
    def main_metric(self) -> str:
        return main_metric(self.protocol)

    def score(self, gallery: np.ndarray, queries: np.ndarray, *, intervals: bool = True) -> Scores:
        """Scores of unit vectors: `gallery` [pairs, d], `queries` [queries, d]."""
        if self.protocol == "caption":
            return caption_scores(gallery, queries, self.units, intervals=intervals, seed=self.seed)
        if self.protocol == "class":
            return class_scores(gallery, queries, self.pairs.labels, intervals=intervals, seed=self.seed)
        return self.score_texts(gallery, queries, intervals=intervals)

    def score_texts(self, gallery: np.ndarray, queries: np.ndarray, *, intervals: bool = True) -> Scores:
        """map, recall, mrr and median rank of texts that search, whatever the protocol."""
        return text_scores(gallery, queries, self.relevant, self.units, intervals=intervals, seed=self.seed)

    def asked(self, most: int) -> Search:
        """The queries that have something relevant, and of these at most so many, drawn at random."""
        able = np.flatnonzero(np.diff(self.relevant.offsets))
        if len(able) > most:
            able = np.sort(np.random.default_rng(self.seed).choice(able, most, replace=False))
        return replace(
            self,
            text_rows=self.text_rows[able],
            vectors=self.vectors[able],
            relevant=Ragged.from_rows(self.relevant[int(i)] for i in able),
            units=self.units[able],
        )


def main_metric(protocol: str) -> str:
    """By which a protocol is judged: where one photo is relevant, mean average precision is the mean of 1 / rank."""
    return "mrr" if protocol == "caption" else "map"


def make_search(cache: Cache, spec: RunSpec, pairs: Pairs, protocol: SearchName, seed: int = 0) -> Search:
    """The queries of some pairs: every caption, every class, or every distinct text that describes a pair."""
    text = cache.encoders[spec.text_key]
    if protocol == "class":
        rows = np.array([prompts[0] for prompts in cache.table.class_texts], np.int64)
        relevant = members(pairs.labels, len(rows))
        units = np.array([photos[0] if len(photos) else -1 for photos in relevant], np.int64)
        return Search(protocol, pairs, rows, class_vectors(cache.table, text), relevant, units, seed)
    if protocol == "caption":
        rows, units = pairs.texts.values, pairs.owners
        relevant = Ragged(np.arange(len(rows) + 1), units)
    else:
        rows, query_of = np.unique(pairs.texts.values, return_inverse=True)
        relevant = members(Ragged(pairs.texts.offsets, query_of), len(rows))
        units = relevant.values[relevant.offsets[:-1]]
    return Search(protocol, pairs, rows, text.vectors(rows), relevant, units, seed)


def own_search(spec: RunSpec) -> SearchName:
    """How texts search the gallery that a run was made for."""
    if spec.gallery_text == "first_caption":
        return "metadata"
    return "caption" if spec.pairs == "captions" else "class"


def own_protocol(spec: RunSpec) -> SearchName | Literal["candidate"]:
    """The protocol that a run is validated with."""
    return "candidate" if spec.pairs_alone else own_search(spec)
