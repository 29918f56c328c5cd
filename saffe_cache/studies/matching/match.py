"""Concatenation against cross-attention: does a text belong to a photo? All from one cache.

Cells (saffe_cache/studies/harness.py) are a setting, a scale, a system and a seed each: a system trained on pairs of
features, clean or degraded, and judged on photos it has never seen. There are also cells of what made features
pre-aligned, of each fusion's cost, and of the pairs on each plane.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.manifold import TSNE

from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import CacheError
from saffe_cache.inputs.pairs import (
    Pairs,
    content_fingerprint,
    gallery_modality,
    hold_out,
    in_one_space,
    pair_kind,
    select_pairs,
    split_pairs,
)
from saffe_cache.inputs.spec import SplitOptions
from saffe_cache.retrieval.baselines import LinearMap, unit_rows
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.studies.harness import Study, run_study
from saffe_cache.studies.matching.baselines import System, fit_baselines, fit_ridge_map, judge_alignment
from saffe_cache.studies.matching.config import MatchConfig, QueryModality
from saffe_cache.studies.matching.examples import (
    Degradation,
    Examples,
    Inputs,
    PairVectors,
    draw_judged,
    matching_examples,
    num_kinds,
)
from saffe_cache.studies.matching.findings import MadeAlignment, MatchCell, MatchCost, Plane, SystemScores
from saffe_cache.studies.matching.fusions import fit, measure_cost, scores_of
from saffe_cache.studies.matching.planning import BASELINE_CELL, CellPlan, examples_of, plan_cells
from saffe_cache.studies.matching.result import MatchResult
from saffe_cache.studies.matching.scores import judge
from saffe_cache.studies.matching.verdict import Features, summarise


def match(config: MatchConfig) -> str:
    """Measure, and return the output folder.

    Whatever the data or the cache cannot support is found before anything is measured.

    Raises:
        CacheError, ValueError: cache, splits and options do not go together; the folder holds another result.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    cache = open_cache(config.cache)
    modality = gallery_modality(cache)
    photo, text = (cache.encoder(kind, config.encoder.get(kind)) for kind in (modality, "text"))
    parts = split_parts(config, cache, photo, text)
    features = _features(config, photo, text, parts)
    cells, skipped = plan_cells(config, parts)
    has_tokens = any(cell.system == "tokens" for cell in cells)
    layers = _layers(config, photo, text)
    resolved = {
        "photo": photo.key,
        "text": text.key,
        "layers": layers if has_tokens else None,
        "data": content_fingerprint(cache.table, modality, *(parts[name] for name in sorted(parts))),
    }
    bench = Bench(photo, text, parts, cells, layers)
    measure = partial(_measure, config=config, features=features, bench=bench, skipped=skipped)
    return run_study("match", config, resolved, measure)


def _measure(
    study: Study, config: MatchConfig, features: Features, bench: Bench, skipped: Sequence[str]
) -> MatchResult:
    """All that one command measures."""
    cells = bench.cells
    measure = partial(measure_cell, bench, config=config, device=choose_device(config.device))
    measured = study.cells(MatchCell, {cell.name: partial(measure, cell) for cell in cells})
    made = study.cell(MadeAlignment, "made-alignment", bench.made_alignment) if config.align_fraction else None
    costs = {
        name: study.cell(MatchCost, f"cost-{name}", partial(bench.cost, name, config.query_modality))
        for name in config.fusions_of_features
        if name in {cell.system for cell in cells}
    }
    shown = max((cell for cell in cells if cell.setting == cells[0].setting), key=lambda cell: cell.scale)
    planes = {
        name: study.cell(Plane, f"plane-{name}", partial(bench.plane, name, shown, config.tsne_pairs))
        for name in (bench.planes if config.tsne_pairs else ())
    }
    by_plan = dict(zip(cells, measured.values(), strict=True))
    findings = summarise(by_plan, features, num_kinds(bench.parts["test"]), made)
    return MatchResult(
        features=features.kind,
        features_in_words=str(features),
        made_alignment=made,
        seeds=config.seeds,
        cost=costs,
        planes=planes,
        skipped=tuple(skipped),
        photos={name: len(of) for name, of in bench.parts.items()},
        encoders={"photo": bench.photo.key, "text": bench.text.key},
        layers_of_tokens=bench.layers,
        **vars(findings),
        **study.common_fields(config, findings.controls),
    )


def split_parts(config: MatchConfig, cache: Cache, photo: EncoderCache, text: EncoderCache) -> dict[str, Pairs]:
    """Photos to train on, to choose on, to report on, and to align with; no photo, by content, is in two of them.

    Raises:
        ValueError: a split is absent, or has no photo of its own.
    """
    kind = pair_kind(cache.table)
    test = select_pairs(cache.table, photo, text, config.split, kind)
    splits = SplitOptions(
        train_split=config.train_split,
        validation=config.validation,
        validation_fraction=config.validation_fraction,
    )
    training, validation, _ = split_pairs(cache, (photo, text), kind, splits, 0, reported=test)
    parts = {"train": training, "validation": validation, "test": test}
    if config.align_fraction:
        hashes = cache.table.inputs[photo.manifest.modality].content_hash
        parts["train"], parts["aligning"] = hold_out(training, config.align_fraction, 0, hashes)
    return parts


def _features(config: MatchConfig, photo: EncoderCache, text: EncoderCache, parts: Mapping[str, Pairs]) -> Features:
    """
    Raises:
        ValueError: they are aligned already, but should be made so.
    """
    are_aligned = in_one_space(photo, text)
    if are_aligned and config.align_fraction:
        raise ValueError(
            f"--align-fraction: found {config.align_fraction:g}, expected 0: {photo.key} and {text.key} are halves of "
            "one model, whose features are aligned already."
        )
    return Features(True, len(parts["aligning"])) if config.align_fraction else Features(are_aligned)


def _layers(config: MatchConfig, photo: EncoderCache, text: EncoderCache) -> tuple[int, int]:
    """Of photos and texts, whose tokens are used.

    Raises:
        CacheError: one is not cached.
    """
    found = []
    for encoder in (photo, text):
        wanted = config.layers.get(encoder.manifest.modality, tuple(encoder.layers[-1:]))
        if not set(wanted) <= set(encoder.layers) or not wanted:
            raise CacheError(
                f"{config.cache}: {encoder.key} has hidden states of layers {encoder.layers}, requested "
                f"{list(wanted) or 'one'}. Choose another with --layers, or add it with saffe extract."
            )
        found.append(wanted[0])
    return found[0], found[1]


@dataclass(frozen=True)
class Bench:
    """A cache's features, read once, and its photos in parts that share none."""

    photo: EncoderCache
    """Of photos (or sounds)."""
    text: EncoderCache
    parts: Mapping[str, Pairs]
    """"train", "validation" and "test"; "aligning" where features are made pre-aligned."""
    cells: Sequence[CellPlan]
    """All that will be measured."""
    layers: tuple[int, int]
    """Of photos and texts, whose hidden states are tokens."""

    @cached_property
    def own(self) -> PairVectors:
        """The encoders' own."""
        parts = self.parts.values()
        rows = (np.concatenate([of.rows for of in parts]), np.concatenate([of.texts.values for of in parts]))
        return PairVectors.read(self.photo, self.text, *map(np.unique, rows))

    @cached_property
    def alignment_map(self) -> LinearMap | None:
        """The ridge regression that makes features pre-aligned; None where they are taken as they are."""
        others = self.parts.get("aligning")
        if others is None:
            return None
        return fit_ridge_map(self.own, matching_examples(others), draw_judged(self.parts["validation"], 1, 0))

    @cached_property
    def clean(self) -> PairVectors:
        """The vectors that are measured without degradation."""
        return self.own.mapped(self.alignment_map) if self.alignment_map else self.own

    @cached_property
    def vectors(self) -> Callable[[Degradation, int], PairVectors]:
        """Unit vectors of a degradation and a seed; the last ones are kept in memory."""
        return lru_cache(1)(self._vectors)

    def _vectors(self, degradation: Degradation, seed: int) -> PairVectors:
        return self.clean if degradation.kind == "clean" else self.clean.degraded(degradation, seed)

    @cached_property
    def tokens(self) -> Inputs:
        """Of the photos and texts of the cells that need them."""
        drawn = [examples for cell in self.cells if cell.system == "tokens" for examples in self.examples(cell)]
        photos, texts = (np.unique(np.concatenate([getattr(one, of) for one in drawn])) for of in ("photos", "texts"))
        return Inputs.read_tokens(self.photo, self.text, photos, texts, self.layers)

    def examples(self, cell: CellPlan) -> tuple[Examples, Examples, Examples]:
        """See `examples_of`."""
        return examples_of(self.parts, cell)

    def made_alignment(self) -> MadeAlignment:
        """What the map did to the report's pairs."""
        assert self.alignment_map
        test = draw_judged(self.parts["test"], 1, 0)
        return judge_alignment(self.own, self.parts["aligning"], self.alignment_map, test)

    def cost(self, fusion: str, query_modality: QueryModality) -> MatchCost:
        """Of a fusion at the inputs' widths and numbers of tokens."""
        inputs = self.tokens if fusion == "tokens" else self.clean.inputs
        return measure_cost(fusion, inputs.widths, inputs.num_tokens, query_modality)

    @property
    def planes(self) -> tuple[str, ...]:
        """Names of the planes: photos as they are, if widths agree, and mapped to texts by a ridge regression."""
        return ("own", "ridge") if self.clean.are_comparable else ("ridge",)

    def plane(self, name: str, cell: CellPlan, count: int) -> Plane:
        """Matching pairs of the report on one of the planes."""
        training, validation, test = self.examples(cell)
        own = np.flatnonzero(test.labels == 1)[:count]
        photos, texts = self.clean.of_photos(test.photos[own]), self.clean.of_texts(test.texts[own])
        if name == "ridge":
            photos = unit_rows(fit_ridge_map(self.clean, training, validation)(photos))
        return embed_pairs(photos, texts, cell.seed)


def measure_cell(bench: Bench, cell: CellPlan, config: MatchConfig, device: str) -> MatchCell:
    """Scores of each system of a cell on test photos, and on these with the photos shuffled."""
    training, validation, test = bench.examples(cell)
    shuffled = test.with_photos_shuffled(cell.seed)
    vectors = bench.vectors(cell.degradation, cell.seed)
    if cell.system == BASELINE_CELL:
        systems = fit_baselines(vectors, training, validation)
    else:
        inputs = bench.tokens if cell.system == "tokens" else vectors.inputs
        model, fitted = fit(cell.system, inputs, training, validation, config, cell.seed, device)
        how = {"best_epoch": fitted.best_epoch, "validation_accuracy": fitted.scores, "losses": fitted.losses}
        systems = {cell.system: System(partial(scores_of, model, inputs, device=device), 0.0, how)}
    return MatchCell(
        pairs={"train": len(training), "validation": len(validation), "test": len(test)},
        majority=float(max(test.labels.mean(), 1 - test.labels.mean())),
        systems={
            name: SystemScores(
                test=judge(one.scores(test), test.labels, one.threshold),
                shuffled=judge(one.scores(shuffled), test.labels, one.threshold),
                **one.how,
            )
            for name, one in systems.items()
        },
        alignment=vectors.alignment(bench.clean, test) if cell.system == BASELINE_CELL else {},
    )


def embed_pairs(photos: np.ndarray, texts: np.ndarray, seed: int) -> Plane:
    """Matching pairs, unit vectors [pairs, d] each, on a plane."""
    count = len(photos)
    method = TSNE(metric="cosine", init="random", random_state=seed, perplexity=min(30.0, (2 * count - 1) / 3))
    places = method.fit_transform(np.concatenate([photos, texts]))
    nearest = cdist(places[:count], places[count:]).argmin(axis=1)
    rounded = [tuple(place) for place in np.round(places.astype(float), 3).tolist()]
    return Plane(
        photos=tuple(rounded[:count]),
        texts=tuple(rounded[count:]),
        own_is_nearest=float((nearest == np.arange(count)).mean()),
    )
