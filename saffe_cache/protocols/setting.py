"""What a protocol measures on: pairs, arrangements of the gallery, systems; and how a system orders the gallery.

A system is whatever answers queries: a trained fusion, or a fitted baseline. Controls measure it on other arrangements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from saffe_cache.core.items import Ragged
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.feature_loader import (
    FeatureLoader,
    compose_queries,
    encode_gallery,
    encode_queries,
    encode_texts,
)
from saffe_cache.inputs.pairs import Pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.retrieval.correction import Bank
from saffe_cache.retrieval.ranking import InnerProducts, ScoreMatrix
from saffe_cache.retrieval.scores import NO_BIASES, Biases, Scores
from saffe_cache.store.reader import Cache

ALL = slice(None)


class Arrangement(NamedTuple):
    """Which photo and which text stand at each place of the gallery: positions in the pairs, int64 [n] each.

    The honest one is the identity; controls are measured by the same code with others.
    """

    photos: np.ndarray
    texts: np.ndarray


@dataclass(frozen=True)
class Queries:
    """Texts that search a gallery of pairs."""

    text_rows: np.ndarray
    """int64 [queries]: a text row of each query: the caption, or the first prompt of the class."""
    vectors: np.ndarray
    """The text encoder's own vectors of the queries, [queries, d]; of a class, the mean over its prompts."""
    relevant: Ragged
    """Positions in the gallery that are relevant to each query; none for a class without photos."""
    units: np.ndarray
    """int64 [queries]: the photo that each query is drawn with in a bootstrap."""
    several: Ragged | None = None
    """All text rows of each query, where `vectors` are means over several texts; None where each is one."""
    references: np.ndarray | None = None
    """int64 [queries]: the photo that each query's text is fused with, a position in the pairs; None where texts search
    alone."""

    def __len__(self) -> int:
        return len(self.text_rows)

    @property
    def prompts(self) -> Ragged:
        """The text rows of each query: of a class, all its prompts."""
        return Ragged(np.arange(len(self) + 1), self.text_rows) if self.several is None else self.several

    def take(self, chosen: np.ndarray) -> Queries:
        """Some of the queries."""
        rows, vectors, relevant = self.text_rows[chosen], self.vectors[chosen], self.relevant.take(chosen)
        several = None if self.several is None else self.several.take(chosen)
        references = None if self.references is None else self.references[chosen]
        return Queries(rows, vectors, relevant, self.units[chosen], several, references)

    def with_one_text(self) -> Queries:
        """The same queries, if each of them were the first one."""
        first = self.take(np.zeros(len(self), np.int64))
        return replace(first, relevant=self.relevant, units=self.units)

    @staticmethod
    def of_texts(inputs: FeatureLoader, rows: np.ndarray) -> Queries:
        """Texts to which nothing is relevant: those of a bank."""
        nothing = np.zeros(len(rows), np.int64)
        return Queries(rows, inputs.text.vectors(rows), Ragged(np.append(nothing, 0), nothing[:0]), nothing)

    def sample(self, most: int, seed: int) -> Queries:
        """The queries that have a relevant photo; at most `most` of them, drawn at random."""
        usable = np.flatnonzero(self.relevant.lengths)
        if len(usable) > most:
            usable = np.sort(np.random.default_rng(seed).choice(usable, most, replace=False))
        return self.take(usable)


@dataclass(frozen=True, eq=False)
class FittedVectors:
    """A fitted baseline that makes unit vectors of the gallery and of the queries."""

    gallery: Callable[[Arrangement], np.ndarray]
    """Unit vectors [n, d] of an arrangement."""
    map_queries: Callable[[np.ndarray], np.ndarray] | None = None
    """From the unit vectors of texts to unit vectors in the gallery's space; None where they are in it already."""
    bank_photos: np.ndarray | None = None
    """Unit vectors of the photos of the setting's bank; None without one, or where no photo searches."""
    compose: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """From the references of composed queries, positions in the pairs, and the unit vectors of their texts to unit
    vectors in the gallery's space."""


@dataclass(frozen=True, eq=False)
class FittedScores:
    """A fitted baseline that scores photos against classes."""

    scores: np.ndarray
    """[photos, classes], of the setting's pairs in order."""


VectorSystem = Fusion | FittedVectors
System = VectorSystem | FittedScores


@dataclass(frozen=True)
class Setting:
    """The encoders and layers of a run, and the pairs that systems are measured on."""

    inputs: FeatureLoader
    pairs: Pairs
    training_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Photos of the training pairs; empty where no trained model is measured."""
    seed: int = 0
    bank: Bank | None = None
    """Of the search correction; None for none."""
    _vectors: dict[Fusion, np.ndarray] = field(default_factory=dict, repr=False)
    _banks: dict[tuple[Fusion, str], np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def cache(self) -> Cache:
        return self.inputs.cache

    @property
    def spec(self) -> RunSpec:
        return self.inputs.spec

    def honest(self) -> Arrangement:
        places = np.arange(len(self.pairs))
        return Arrangement(places, places)

    def gallery(self, system: VectorSystem, arrangement: Arrangement) -> np.ndarray:
        """f(photo, paired text) at each place: unit vectors [n, d]. With null text a model encodes each photo once."""
        if isinstance(system, FittedVectors):
            return system.gallery(arrangement)
        if self.pairs.paired_texts is not None:
            rows, paired = self.pairs.rows[arrangement.photos], self.pairs.paired_texts[arrangement.texts]
            return encode_gallery(system, self.inputs, rows, paired)
        if system not in self._vectors:
            self._vectors[system] = encode_gallery(system, self.inputs, self.pairs.rows)
        return np.asarray(self._vectors[system][arrangement.photos])

    def queries(self, system: VectorSystem, queries: Queries, gallery: np.ndarray | None = None) -> np.ndarray:
        """g(text), or f(photo, text), of each query: [queries, d]; unit vectors, if their inner products count.

        `gallery` are the honest places' vectors, which some fusions compose queries of; by default they are kept ones.
        """
        if isinstance(system, FittedVectors):
            vectors = unit_rows(queries.vectors)
            if queries.references is not None:
                assert system.compose is not None
                return system.compose(queries.references, vectors)
            return vectors if system.map_queries is None else system.map_queries(vectors)
        if queries.references is not None and system.composes_vectors:
            photos = self.gallery(system, self.honest()) if gallery is None else gallery
            return compose_queries(system, self.inputs, photos[queries.references], queries.text_rows)
        if queries.references is not None:
            return encode_gallery(system, self.inputs, self.pairs.rows[queries.references], queries.text_rows)
        if system.shape.entry.query_tokens:
            return encode_texts(system, self.inputs, queries.prompts)
        return encode_queries(system, queries.vectors, self.inputs.device)

    def vectors(
        self, system: VectorSystem, arrangement: Arrangement, queries: Queries, *, photos_search: bool = False
    ) -> Vectors:
        """The gallery, what searches it, and what the search correction subtracts, also where photos search."""
        gallery, searching = self.gallery(system, arrangement), self.queries(system, queries)
        if self.bank is None:
            return Vectors(gallery, searching)
        correct = self.bank.correction.biases
        of_gallery = correct(gallery, self._bank_vectors(system, "texts"))
        of_queries = correct(searching, self._bank_vectors(system, "photos")) if photos_search else None
        return Vectors(gallery, searching, Biases(of_gallery, of_queries))

    def _bank_vectors(self, system: VectorSystem, side: Literal["texts", "photos"]) -> np.ndarray:
        """The bank's texts, mapped as queries of a system, or its photos with null text: unit vectors."""
        assert self.bank is not None
        if isinstance(system, Fusion) and (system, side) in self._banks:
            return self._banks[system, side]
        if side == "texts":
            return self._kept(system, side, self.queries(system, Queries.of_texts(self.inputs, self.bank.texts)))
        if isinstance(system, FittedVectors):
            assert system.bank_photos is not None
            return system.bank_photos
        rows = self.training_rows[self.bank.photos]
        return self._kept(system, side, encode_gallery(system, self.inputs, rows))

    def _kept(self, system: VectorSystem, side: str, vectors: np.ndarray) -> np.ndarray:
        """A model is measured several times, with its control arrangements."""
        if isinstance(system, Fusion):
            self._banks[system, side] = vectors
        return vectors

    def with_true_texts(self) -> Setting:
        """The leak: each photo is fused with a text that searches for it, or with its own class's name."""
        if not self.spec.shape.takes_text:
            fusion = self.spec.shape.fusion
            raise ValueError(f"--leak-true-text: no text enters fusion {fusion}, so nothing can leak. Leave it out.")
        pairs, table = self.pairs, self.cache.table
        if pairs.kind == "captions":
            paired = pairs.texts.values[pairs.texts.offsets[:-1]]
        else:
            paired = np.array([table.class_texts[int(of_photo[0])][0] for of_photo in pairs.labels], np.int64)
        return replace(self, pairs=replace(pairs, paired_texts=paired), _vectors={})


class Vectors(NamedTuple):
    """A query's results are the gallery's largest inner products with it."""

    gallery: np.ndarray
    """[n, d], of unit length."""
    queries: np.ndarray
    """[m, d]"""
    biases: Biases = NO_BIASES
    """What a search correction subtracts."""

    def scores(self, chosen: slice | np.ndarray = ALL) -> ScoreMatrix:
        """Scores of some queries with the gallery, [chosen, n]."""
        return InnerProducts(self.gallery, self.queries[chosen], self.biases.gallery)

    def part(self, queries: np.ndarray, photos: np.ndarray) -> ScoreMatrix:
        """Scores of some queries with some photos of the gallery, both by position."""
        bias = self.biases.gallery
        return InnerProducts(self.gallery[photos], self.queries[queries], None if bias is None else bias[photos])

    def matrix(self) -> np.ndarray:
        """All scores, [n, m]."""
        scores = np.asarray(self.gallery @ self.queries.T)
        return scores if self.biases.gallery is None else scores - self.biases.gallery[:, None]


class QueryScores(NamedTuple):
    """A score of each photo with each query, such as a class."""

    values: np.ndarray
    """[photos, queries]"""

    def scores(self, chosen: slice | np.ndarray = ALL) -> ScoreMatrix:
        """As `Vectors.scores`."""
        return self.values[:, chosen].T

    def part(self, queries: np.ndarray, photos: np.ndarray) -> ScoreMatrix:
        """As `Vectors.part`."""
        return np.asarray(self.values[np.ix_(photos, queries)].T)

    def matrix(self) -> np.ndarray:
        """As `Vectors.matrix`."""
        return self.values

    def with_one_query(self) -> QueryScores:
        """The same photos, where every query is the first one."""
        return QueryScores(np.tile(self.values[:, :1], self.values.shape[1]))


class Reordered(NamedTuple):
    """A search whose first results were reordered; below them the first order holds."""

    vectors: Vectors
    """Of the first order."""
    positions: np.ndarray
    """int64 [queries, k]: the first results in their new order."""

    def scores(self, chosen: slice | np.ndarray = ALL) -> ScoreMatrix:
        """Of the first order."""
        return self.vectors.scores(chosen)


Answers = Vectors | QueryScores | Reordered
"""How a system orders the gallery, before it is scored."""


class Answered(NamedTuple):
    """A system under a protocol."""

    scores: Scores
    answers: Answers
