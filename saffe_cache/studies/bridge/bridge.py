"""Search one medium by another through two runs that share a text encoder, and by maps fitted on pairs of the media.

Two ways lead through the texts. `ridges`: each run keeps the ridge regression from its summaries to the text encoder's
vectors; two inputs are compared by the cosine of what it makes of them, less the texts' mean. `texts`: each input is
described by how well it fits each text that the runs were trained on, a softmax of its scores, and two inputs by the
overlap of these (Bhattacharyya's coefficient):

    s(a, b) = sum over texts t of sqrt(p(t | a) p(t | b)),   p(t | a) = softmax_t(f(a) . g(t) / 0.05)

Source of binding by a shared modality: ImageBind (Girdhar et al., 2023) and, for finished spaces, C-MCR (Wang et al.,
2023). The direct maps are a ridge regression from the queries' summaries to those of the gallery, and an MLP of two
layers trained with InfoNCE, on items that have both media.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saffe_cache.core.controls import Control
from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import Modality
from saffe_cache.core.items import ItemTable, Ragged
from saffe_cache.core.options import refuse
from saffe_cache.core.results import Estimate
from saffe_cache.evaluation.details import Details, write_details
from saffe_cache.evaluation.single_queries import FIRST_K, MOST_QUERIES, system_details
from saffe_cache.fusion.base import Fusion
from saffe_cache.inputs.feature_loader import FeatureLoader, encode_gallery, encode_texts, summaries
from saffe_cache.inputs.pairs import training_pairs
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.retrieval.baselines import LinearMap, fit_ridge, unit_rows
from saffe_cache.retrieval.fitting import MlpFit, fit_mlp
from saffe_cache.retrieval.metrics import paired_bootstrap
from saffe_cache.retrieval.ranking import InnerProducts, top_k
from saffe_cache.retrieval.scores import Scores, drawn_queries, text_scores
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.studies.bridge.config import BridgeConfig
from saffe_cache.studies.bridge.result import BridgeResult, Direction
from saffe_cache.studies.harness import Study, run_study
from saffe_cache.training.runs import kept_ridge, load_permuted, open_run, weights_hash

TEMPERATURE = 0.05
"""Of the scores with texts."""
MAIN = "map"
_HELD_OUT = 0.1
"""Fraction of the pairs of media by which the direct maps are chosen."""
_FEWEST_PAIRS = 20


def bridge(config: BridgeConfig) -> str:
    """Measure, and return the output folder.

    Raises:
        CacheError, ValueError: cache, runs and split do not go together; the folder holds another result.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    cache = open_cache(config.cache)
    sides = tuple(_open_side(run, cache, choose_device(config.device)) for run in config.run)
    first, second = sides
    if first.modality == second.modality:
        refuse("run", f"two runs of {first.modality}", "runs of two modalities: train one with --gallery")
    if first.spec.text_key != second.spec.text_key:
        texts = f"runs with the texts of {first.spec.text_key} and {second.spec.text_key}"
        refuse("run", texts, "runs with one text encoder")
    relevance = config.relevance
    if relevance == "auto":
        relevance = "class" if len(cache.table.labels.take(cache.table.in_split(config.split)).values) else "item"
    bridging = _Bridging(config, cache, sides, _relations(cache.table, sides, config.split, relevance))
    resolved = {
        "galleries": [side.spec.gallery_key for side in sides],
        "text": first.spec.text_key,
        "weights": [weights_hash(run) for run in config.run],
        "relevance": relevance,
        "data": bridging.fingerprint,
    }
    return run_study("bridge", config, resolved, partial(bridging.measure, relevance=relevance))


@dataclass(frozen=True)
class _Side:
    """A run, and its control."""

    run: str
    spec: RunSpec
    model: Fusion
    permuted: Fusion | None
    ridge: LinearMap | None
    loader: FeatureLoader

    @property
    def encoder(self) -> EncoderCache:
        return self.loader.gallery

    @property
    def modality(self) -> Modality:
        return self.encoder.manifest.modality

    def vectors(self, rows: np.ndarray, *, permuted: bool = False) -> np.ndarray:
        """f of inputs with null text."""
        model = self.permuted if permuted else self.model
        assert model is not None
        return encode_gallery(model, self.loader, rows)

    def texts(self, rows: np.ndarray, *, permuted: bool = False) -> np.ndarray:
        """g of texts."""
        model = self.permuted if permuted else self.model
        assert model is not None
        return encode_texts(model, self.loader, Ragged(np.arange(len(rows) + 1), rows))

    def through(self, rows: np.ndarray, texts: np.ndarray, *, permuted: bool = False) -> np.ndarray:
        """Square roots of the probabilities of texts, unit vectors [n, texts]."""
        scores = self.vectors(rows, permuted=permuted) @ self.texts(texts, permuted=permuted).T
        return unit_rows(np.exp((scores - scores.max(axis=1, keepdims=True)) / (2 * TEMPERATURE)))

    def summaries(self, rows: np.ndarray) -> np.ndarray:
        return summaries(self.encoder, rows, self.spec.gallery_layers)


def _open_side(run: str, cache: Cache, device: str) -> _Side:
    spec, model, _ = open_run(run, cache)
    permuted = load_permuted(run, spec, cache)
    for one in (model, permuted):
        if one is not None:
            one.to(device)
    return _Side(run, spec, model, permuted, kept_ridge(Path(run)), FeatureLoader(cache, spec, device))


class _Relations(NamedTuple):
    """Inputs of two media, and which belong together."""

    rows: tuple[np.ndarray, np.ndarray]
    """int64: the distinct inputs of each, by their rows."""
    relevant: tuple[Ragged, Ragged]
    """Of each input, the positions of the other medium's that are relevant; some for each."""
    groups: tuple[np.ndarray, np.ndarray]
    """int64: the item of each input, or its first class. A map that was fitted on permuted texts may take one class
    for another, all of its inputs alike: they are drawn together in the intervals of controls."""


def _relations(table: ItemTable, sides: tuple[_Side, ...], split: str, relevance: str) -> _Relations:
    """
    Raises:
        ValueError: no two media of the split belong together.
    """
    items = table.in_split(split)
    items = items[table.problems.lengths[items] == 0]
    has = [side.encoder.usable(table.rows[side.modality][items]) for side in sides]
    if relevance == "item":
        has = [has[0] & has[1]] * 2
    keys = [_keys(table, items[one], relevance) for one in has]
    rows, belongs = [], []
    for side, one, of_items in zip(sides, has, keys, strict=True):
        distinct, places = np.unique(table.rows[side.modality][items[one]], return_inverse=True)
        rows.append(distinct)
        member = np.zeros((len(distinct), len(table) if relevance == "item" else len(table.class_names)), bool)
        member[places[of_items.owners], of_items.values] = True
        belongs.append(member)
    together = belongs[0].astype(np.float32) @ belongs[1].astype(np.float32).T > 0
    kept = together.any(axis=1), together.any(axis=0)
    if not together.any():
        media = " and ".join(side.modality for side in sides)
        raise ValueError(
            f"split {split!r}: no {media} of one {relevance} in it. Choose another --split or --relevance."
        )
    together = together[kept[0]][:, kept[1]]
    relevant = (Ragged.from_rows(map(np.flatnonzero, one)) for one in (together, together.T))
    groups = (of[one].argmax(axis=1) for of, one in zip(belongs, kept, strict=True))
    return _Relations((rows[0][kept[0]], rows[1][kept[1]]), tuple(relevant), tuple(groups))  # type: ignore[arg-type]


def _keys(table: ItemTable, items: np.ndarray, relevance: str) -> Ragged:
    """What makes items belong together: themselves, or their classes."""
    return Ragged(np.arange(len(items) + 1), items) if relevance == "item" else table.labels.take(items)


@dataclass(frozen=True)
class _Bridging:
    """All that one command measures."""

    config: BridgeConfig
    cache: Cache
    sides: tuple[_Side, ...]
    relations: _Relations

    @property
    def fingerprint(self) -> str:
        inputs, digest = self.cache.table.inputs, hashlib.sha256()
        for side, rows, relevant in zip(self.sides, self.relations.rows, self.relations.relevant, strict=True):
            digest.update(inputs[side.modality].content_hash[rows].tobytes() + relevant.values.tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def texts(self) -> np.ndarray:
        """Rows of the texts that the bridge goes through."""
        found = [training_pairs(side.spec, self.cache).training.texts.values for side in self.sides]
        rows, most = np.unique(np.concatenate(found)), self.config.texts
        drawn = np.random.default_rng(self.config.seed).permutation(len(rows))[:most]
        return rows[np.sort(drawn)]

    def measure(self, study: Study, relevance: str) -> BridgeResult:
        first, second = (side.modality for side in self.sides)
        cells = study.cells(
            Direction,
            {
                name: partial(self._direction, study.out / name, *places)
                for name, places in {f"{first}-to-{second}": (0, 1), f"{second}-to-{first}": (1, 0)}.items()
            },
        )
        directions = tuple(cells.values())
        lacking = [side.run for side in self.sides if side.permuted is None]
        return BridgeResult(
            runs={side.modality: side.run for side in self.sides},
            encoders={side.modality: side.encoder.key for side in self.sides},
            relevance=relevance,
            num_texts=len(self.texts),
            directions=directions,
            warnings=tuple(
                f"{run} has no control on permuted pairs: train it with --control-epochs" for run in lacking
            ),
            **study.common_fields(self.config, (one for of in directions for one in of.controls)),
        )

    def _direction(self, folder: Path, asking: int, found: int) -> Direction:
        """Everything about one medium that searches the other; what single queries find is written to the folder."""
        queries, gallery = self.sides[asking], self.sides[found]
        rows, relevant, seed = self.relations.rows, self.relations.relevant[asking], self.config.seed
        scored = partial(text_scores, relevant=relevant, seed=seed)
        shown = drawn_queries(len(relevant), MOST_QUERIES, seed)
        systems: dict[str, Scores] = {}
        first: dict[str, np.ndarray] = {}
        for name, (of_gallery, of_queries) in self._systems(queries, gallery, rows[asking], rows[found]):
            systems[name] = scored(of_gallery, of_queries, units=np.arange(len(relevant)))
            nearest = InnerProducts(of_gallery, of_queries[shown])
            first[name] = top_k(nearest, min(FIRST_K, len(rows[found])), seed=seed)
        folder.mkdir(exist_ok=True)
        write_details(folder, self._details(asking, found, shown, systems, first))
        bridges = {name for name in systems if name.startswith("bridge")}
        differences = {
            f"{one} less {other}": _difference(systems[one], systems[other], seed)
            for one in sorted(bridges)
            for other in systems
            if other not in bridges
        }
        controls = {}
        for side in (queries, gallery):
            if side.permuted is not None:
                of_queries = queries.through(rows[asking], self.texts, permuted=side is queries)
                of_gallery = gallery.through(rows[found], self.texts, permuted=side is gallery)
                scores = scored(of_gallery, of_queries, units=self.relations.groups[asking])
                controls[f"texts permuted in the run of {side.modality}"] = scores
        chance = next(iter(systems.values()))
        return Direction(
            queries=queries.modality,
            gallery=gallery.modality,
            num_queries=len(rows[asking]),
            num_gallery=len(rows[found]),
            num_pairs=len(self._pairs(queries, gallery)[0]),
            systems={name: _estimates(scores) for name, scores in systems.items()},
            chance={metric: score.chance for metric, score in chance.items()},
            differences=differences,
            controls=tuple(self._verdict(name, scores) for name, scores in controls.items()),
        )

    def _details(
        self, asking: int, found: int, shown: np.ndarray, systems: Mapping[str, Scores], first: Mapping[str, np.ndarray]
    ) -> Details:
        """For galleries: the first inputs of each system for the queries that are shown."""
        rows, relevant = self.relations.rows, self.relations.relevant[asking].take(shown)
        answers = relevant.values[relevant.offsets[:-1]]
        gallery = np.unique(np.concatenate([answers, *(of.ravel() for of in first.values())]))
        named = [(self.sides[found].modality, int(rows[found][place])) for place in gallery]
        named += [(self.sides[asking].modality, int(rows[asking][query])) for query in shown]
        table = self.cache.table
        items = [int(np.flatnonzero(table.rows[modality] == row)[0]) for modality, row in named]
        return Details(
            main_metric=MAIN,
            shown=shown,
            texts=(),
            answers=np.searchsorted(gallery, answers),
            asking=len(gallery) + np.arange(len(shown)),
            num_relevant=relevant.lengths,
            photo_ids=tuple(table.ids[item] for item in items),
            photo_hashes=np.stack([table.inputs[modality].content_hash[row] for modality, row in named]),
            photo_texts=tuple(_description(table, item) for item in items),
            query_classes=(),
            class_names=(),
            systems={
                name: system_details(scores[MAIN].of_queries, first[name], gallery, relevant)
                for name, scores in systems.items()
            },
        )

    def _verdict(self, name: str, scores: Scores) -> Control:
        score = scores[MAIN]
        return Control.at_most(name, MAIN, score.value, score.chance, score.error)

    def _systems(
        self, queries: _Side, gallery: _Side, asking: np.ndarray, found: np.ndarray
    ) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
        """Each system's vectors of the gallery and of the queries."""
        texts = self.texts
        yield "bridge, texts", (gallery.through(found, texts), queries.through(asking, texts))
        if queries.ridge is not None and gallery.ridge is not None:
            center = unit_rows(queries.loader.text.vectors(texts)).mean(axis=0)
            of_gallery = unit_rows(gallery.ridge(gallery.summaries(found)) - center)
            yield "bridge, ridges", (of_gallery, unit_rows(queries.ridge(queries.summaries(asking)) - center))
        pairs = self._pairs(queries, gallery)
        if len(pairs[0]) >= _FEWEST_PAIRS:
            yield from _direct(queries, gallery, pairs, (asking, found), self.config.seed)

    def _pairs(self, queries: _Side, gallery: _Side) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the two media of each item to fit direct maps on."""
        table, config = self.cache.table, self.config
        items = np.flatnonzero(table.splits.are(config.train_split) & (table.problems.lengths == 0))
        found = [table.rows[side.modality][items] for side in (queries, gallery)]
        reported = dict(zip((side.modality for side in self.sides), self.relations.rows, strict=True))
        kept = np.ones(len(items), bool)
        for side, rows in zip((queries, gallery), found, strict=True):
            kept &= side.encoder.usable(rows) & ~np.isin(rows, reported[side.modality])
        return found[0][kept], found[1][kept]


def _direct(
    queries: _Side, gallery: _Side, pairs: tuple[np.ndarray, np.ndarray], rows: tuple[np.ndarray, np.ndarray], seed: int
) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Maps that are fitted on pairs of the media, and chosen on some that are held out."""
    order = np.random.default_rng(seed).permutation(len(pairs[0]))
    held, fitted = np.split(order, [max(2, round(_HELD_OUT * len(order)))])
    inputs, targets = queries.summaries(pairs[0]), unit_rows(gallery.summaries(pairs[1]))
    own = Ragged(np.arange(len(held) + 1), np.arange(len(held)))

    def found(of_gallery: np.ndarray, of_queries: np.ndarray) -> float:
        return text_scores(of_gallery, of_queries, own, np.arange(len(held)), intervals=False)["mrr"].value

    def judge_ridge(one: LinearMap) -> float:
        return found(targets[held], unit_rows(one(inputs[held])))

    def judge_mlp(one: MlpFit) -> float:
        return found(one.queries(targets[held]), one.gallery(inputs[held]))

    asking, of_gallery = queries.summaries(rows[0]), unit_rows(gallery.summaries(rows[1]))
    ridge = fit_ridge(inputs[fitted], targets[fitted], judge_ridge)
    yield "direct ridge", (of_gallery, unit_rows(ridge(asking)))
    each = Ragged(np.arange(len(fitted) + 1), np.arange(len(fitted)))
    mlp = fit_mlp(inputs[fitted], targets[fitted], each, judge_mlp, seed=seed)
    yield "direct MLP", (mlp.queries(of_gallery), mlp.gallery(asking))


def _description(table: ItemTable, item: int) -> str:
    """The classes of an item, or its first caption."""
    texts, captions = table.inputs["text"].texts, table.captions[item]
    if texts is not None and len(captions):
        return texts[int(captions[0])]
    return ", ".join(table.class_names[label] for label in table.labels[item])


def _estimates(scores: Scores) -> Mapping[str, Estimate]:
    return {
        name: Estimate(value=one.value, low=one.interval[0], high=one.interval[1])
        if one.interval
        else Estimate(value=one.value)
        for name, one in scores.items()
    }


def _difference(first: Scores, second: Scores, seed: int) -> Estimate:
    values = first[MAIN].of_queries - second[MAIN].of_queries
    value, low, high = paired_bootstrap(values, np.arange(len(values)), seed=seed)
    return Estimate(value=value, low=low, high=high)
