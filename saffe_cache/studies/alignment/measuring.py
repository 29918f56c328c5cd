"""Every measure of every pair of layers, from vectors that are read already."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.studies.alignment.correlation import principal_components, svcca_grid
from saffe_cache.studies.alignment.definitions import DEFINITIONS
from saffe_cache.studies.alignment.kernels import centered_gram, chance_of_neighbours, cka_grid, mutual_neighbours_grid
from saffe_cache.studies.alignment.maps import Answers, Ridge, answers
from saffe_cache.studies.alignment.scores import Grid, grid_of, permutations, unit_rows_clipped

OWN = "own"
"""In the place of a layer's number: the encoder's own vector."""
_RESAMPLES = 100
"""Of the judged photos, for SVCCA's intervals."""
_CLASS_HALVES = 6
"""Random halves of the classes that maps are fitted without."""
_LEAST_CLASSES = 4


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much is measured; see `AlignConfig`."""

    neighbours: int
    components: int
    permutations: int
    half_samples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """One vector of each photo and text for each layer, and for "own"."""

    photos: Mapping[str, np.ndarray]
    """[photos, d] of each layer; those that are judged come first."""
    texts: Mapping[str, np.ndarray]
    """Unit vectors of the distinct texts [texts, t] of each layer."""
    text_of: np.ndarray
    """int64 [photos]: which of the texts; a caption has the number of its photo."""
    num_judged: int
    has_captions: bool
    """Whether each photo has a text of its own, rather than that of its class."""

    @property
    def judged(self) -> np.ndarray:
        """Positions of the photos that are judged."""
        return np.arange(self.num_judged)

    @property
    def others(self) -> np.ndarray:
        """Positions of the photos that maps are fitted on."""
        return np.arange(self.num_judged, len(self.text_of))

    @property
    def fitted(self) -> np.ndarray:
        """Those of them that every pair of layers is fitted on: as many as are judged, where there are."""
        return self.others[: self.num_judged]

    @property
    def num_texts(self) -> int:
        """Those that are searched with or for among the judged photos: their captions, or all classes."""
        return self.num_judged if self.has_captions else len(self.texts[OWN])

    def texts_of(self, layer: str, photos: np.ndarray) -> np.ndarray:
        """One row for each of some photos."""
        return np.asarray(self.texts[layer][self.text_of[photos]])

    def searched(self, text_layer: str, photos: np.ndarray) -> Answers:
        """What the judged photos' vectors [judged, t] and the texts find of each other."""
        texts = self.texts[text_layer][: self.num_texts]
        return answers(photos, texts, self.text_of[self.judged], texts_search=self.has_captions)


def measure(vectors: Vectors, options: Options) -> tuple[dict[str, Any], dict[str, str]]:
    """Each measure as JSON, [photo layers][text layers] of values, intervals and nulls; and why one is absent."""
    orders = permutations(vectors.num_judged, options.permutations, options.seed)
    deals = permutations(vectors.num_texts, options.permutations, options.seed)
    measures = {
        "cka": _cka(vectors, options, deals),
        "mutual_neighbours": _mutual_neighbours(vectors, options, orders),
        "svcca": _svcca(vectors, options),
        "a_lin": _linear(vectors, options, orders),
    }
    zero, absent = _without_map(vectors, options, deals), {}
    if zero is None:
        widths = (next(iter(side.values())).shape[1] for side in (vectors.photos, vectors.texts))
        absent["a_0"] = "vectors of widths {} and {} have no cosine".format(*widths)
    else:
        measures["a_0"] = zero
    if not vectors.has_captions and vectors.num_texts < _LEAST_CLASSES:
        absent["a_new"] = f"{vectors.num_texts} classes, {_LEAST_CLASSES} are needed to leave half of them out"
    elif not vectors.has_captions:
        measures["a_new"] = _unseen_classes(vectors, options)
    definitions = DEFINITIONS["captions" if vectors.has_captions else "classes"]
    return {name: {"definition": definitions[name]} | of for name, of in measures.items()}, absent


def _cka(vectors: Vectors, options: Options, deals: Sequence[np.ndarray]) -> dict[str, Any]:
    judged = vectors.judged
    photos = np.stack([centered_gram(unit_rows(of[judged])) for of in vectors.photos.values()])

    def dealt(deal: np.ndarray) -> np.ndarray:
        """The texts' matrices after texts were dealt at random: to photos, or to classes."""
        return np.stack([centered_gram(of[deal[vectors.text_of[judged]]]) for of in vectors.texts.values()])

    texts = dealt(np.arange(vectors.num_texts))
    return _as_json(cka_grid(photos, texts, map(dealt, deals), options.half_samples, options.seed), 0.0)


def _mutual_neighbours(vectors: Vectors, options: Options, orders: Sequence[np.ndarray]) -> dict[str, Any]:
    judged, k = vectors.judged, options.neighbours
    photos = np.stack([_similarities(of[judged]) for of in vectors.photos.values()])
    if vectors.has_captions:
        texts = np.stack([_similarities(vectors.texts_of(name, judged)) for name in vectors.texts])
    else:
        classes = vectors.text_of[judged]
        texts = np.repeat((classes[:, None] == classes)[None], len(vectors.texts), axis=0)
    grid = mutual_neighbours_grid(photos, texts, k, orders, options.half_samples, options.seed)
    chance = chance_of_neighbours(texts[0], k)
    return _as_json(grid, chance) | {"normalised": _listed((grid.value - chance) / (1 - chance))}


def _similarities(vectors: np.ndarray) -> np.ndarray:
    clipped = unit_rows_clipped(vectors)
    return np.asarray(clipped @ clipped.T)


def _svcca(vectors: Vectors, options: Options) -> dict[str, Any]:
    fitted, judged = vectors.fitted, vectors.judged
    photos = [
        principal_components(unit_rows(of[fitted]), unit_rows(of[judged]), options.components)
        for of in vectors.photos.values()
    ]
    texts = [
        principal_components(vectors.texts_of(name, fitted), vectors.texts_of(name, judged), options.components)
        for name in vectors.texts
    ]
    return _as_json(svcca_grid(photos, texts, options.permutations, _RESAMPLES, options.seed), 0.0)


def _linear(vectors: Vectors, options: Options, orders: Sequence[np.ndarray]) -> dict[str, Any]:
    found = []
    for photos in vectors.photos.values():
        ridge = Ridge(photos[vectors.fitted])
        for name in vectors.texts:
            fit = ridge.fit(vectors.texts_of(name, vectors.fitted))
            found.append(vectors.searched(name, fit(photos[vectors.judged])))
    return _of_answers(vectors, found, [one.null(orders) for one in found], options.seed)


def _unseen_classes(vectors: Vectors, options: Options) -> dict[str, Any]:
    """R@1 of classes that the ridge regression has not seen, among these; mean over random halves of the classes.

    Half of the classes vary as all would: see `half_sample_deviations`. With few classes that is much.
    """
    orders = permutations(vectors.num_texts, _CLASS_HALVES, options.seed)
    unseen = [np.sort(order[vectors.num_texts // 2 :]) for order in orders]
    deals = permutations(len(unseen[0]), options.permutations, options.seed)
    shape = (_CLASS_HALVES, len(vectors.photos), len(vectors.texts))
    values, nulls = np.zeros(shape), np.zeros((options.permutations, *shape))
    for half, classes in enumerate(unseen):
        fitted = vectors.fitted[~np.isin(vectors.text_of[vectors.fitted], classes)]
        judged = vectors.judged[np.isin(vectors.text_of[vectors.judged], classes)]
        rows = np.searchsorted(classes, vectors.text_of[judged])
        for row, photos in enumerate(vectors.photos.values()):
            ridge = Ridge(photos[fitted])
            for column, (name, texts) in enumerate(vectors.texts.items()):
                fit = ridge.fit(vectors.texts_of(name, fitted))
                found = answers(fit(photos[judged]), texts[classes], rows, texts_search=False)
                values[half, row, column] = found.recall_at_1
                nulls[:, half, row, column] = found.null_of_deals(deals)
    grid = grid_of(values.mean(axis=0), values.std(axis=0, ddof=1), nulls.mean(axis=1))
    of_shares = replace(grid, low=np.maximum(grid.low, 0), high=np.minimum(grid.high, 1))
    return _as_json(of_shares, 1 / len(unseen[0]))


def _without_map(vectors: Vectors, options: Options, deals: Sequence[np.ndarray]) -> dict[str, Any] | None:
    """Cosines where both vectors have one width; None where none have."""
    found = [
        vectors.searched(name, photos[vectors.judged]) if photos.shape[1] == texts.shape[1] else None
        for photos in vectors.photos.values()
        for name, texts in vectors.texts.items()
    ]
    if not any(found):
        return None
    nulls = [None if one is None else one.null_of_deals(deals) for one in found]
    return _of_answers(vectors, found, nulls, options.seed)


def _of_answers(
    vectors: Vectors, found: Sequence[Answers | None], nulls: Sequence[np.ndarray | None], seed: int
) -> dict[str, Any]:
    """R@1 of all pairs, and median ranks."""
    absent, shape = math.nan, (len(vectors.photos), len(vectors.texts))
    intervals = np.array([(absent, absent) if one is None else one.interval(seed) for one in found])
    grid = Grid(
        value=np.array([absent if one is None else one.recall_at_1 for one in found]).reshape(shape),
        low=intervals[:, 0].reshape(shape),
        high=intervals[:, 1].reshape(shape),
        null_mean=np.array([absent if null is None else null.mean() for null in nulls]).reshape(shape),
        null_high=np.array([absent if null is None else np.quantile(null, 0.95) for null in nulls]).reshape(shape),
    )
    ranks = np.array([absent if one is None else one.median_rank for one in found]).reshape(shape)
    return _as_json(grid, 1 / vectors.num_texts) | {"median_rank": _listed(ranks)}


def _as_json(grid: Grid, chance: float) -> dict[str, Any]:
    return {name: _listed(of) for name, of in vars(grid).items()} | {"chance": chance}


def _listed(values: np.ndarray) -> list[list[float | None]]:
    """JSON has no NaN."""
    return [[None if math.isnan(value) else float(value) for value in row] for row in values]
