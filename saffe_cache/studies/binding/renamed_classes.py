"""All names replaced: every class of a cache under a made-up name, for a training that is otherwise the usual one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from saffe_cache.core.features import Inputs, Ragged
from saffe_cache.evaluation.baselines import log_odds
from saffe_cache.inputs.feature_loader import FamInputs, encode_gallery, encode_queries, summaries
from saffe_cache.inputs.pairs import select_pairs
from saffe_cache.inputs.spec import training_pairs
from saffe_cache.protocols.search import make_search
from saffe_cache.retrieval.baselines import LinearMap, fit_linear_probe
from saffe_cache.retrieval.candidates import candidate_scores
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.reader import Cache, EncoderCache
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import text_hash
from saffe_cache.training.runs import load_run

METRICS = ("top1", "map")


class RenamedTexts(EncoderCache):
    """A text encoder's part of a cache that holds the vectors of the names alone: row i is name i."""

    def __init__(self, storage: Storage, manifest: EncoderManifest, vectors: np.ndarray) -> None:
        super().__init__(storage, manifest)
        self._vectors = vectors

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._vectors[rows])

    def usable(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray((rows >= 0) & (rows < len(self._vectors)))


def renamed_cache(cache: Cache, text_key: str, names: Sequence[str], vectors: np.ndarray) -> Cache:
    """The cache as if its classes had been called so; on disk nothing changes.

    Args:
        cache: with classes.
        text_key: its text encoder.
        names: one for each class.
        vectors: the text encoder's of them, float32 [classes, d].
    """
    hashes = np.frombuffer(b"".join(text_hash(name) for name in names), np.uint8).reshape(-1, 32)
    renamed = copy.copy(cache)
    renamed.table = replace(
        cache.table,
        class_names=tuple(names),
        class_texts=Ragged.from_rows([number] for number in range(len(names))),
        inputs={**cache.table.inputs, "text": Inputs(hashes, tuple(names))},
    )
    texts = RenamedTexts(cache.storage, cache.encoders[text_key].manifest, vectors)
    renamed.encoders = {**cache.encoders, text_key: texts}
    return renamed


def run_scores(run: str, cache: Cache, split: str, device: str) -> dict[str, float]:
    """top1 and map of a run's class search over a split."""
    spec, model, _ = load_run(run, cache)
    inputs = FamInputs(cache, spec, device)
    pairs = select_pairs(cache.table, inputs.gallery, inputs.text, split, "classes")
    search = make_search(cache, spec, pairs, "class")
    model.to(device)
    gallery, queries = encode_gallery(model, inputs, pairs.rows), encode_queries(model, search.vectors, device)
    scores = search.score(gallery, queries, intervals=False)
    return {metric: scores[metric].value for metric in METRICS}


def probe_scores(run: str, cache: Cache, split: str) -> tuple[dict[str, float], dict[str, float]]:
    """top1 and map of the linear probe, which needs no names, on what a run was trained on; and chance."""
    spec, _, _ = load_run(run, cache)
    gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    training, validation, _ = training_pairs(spec, cache)
    reported = select_pairs(cache.table, gallery, text, split, "classes")
    known, held, asked = (
        summaries(gallery, pairs.rows, spec.gallery_layers) for pairs in (training, validation, reported)
    )

    def judge(fit: LinearMap) -> float:
        return candidate_scores(fit(held), validation.labels, intervals=False)["top1"].value

    probe = fit_linear_probe(known, training.labels.values, len(cache.table.class_names), judge)
    scores = candidate_scores(log_odds(probe(asked)), reported.labels, intervals=False)
    return {metric: scores[metric].value for metric in METRICS}, {metric: scores[metric].chance for metric in METRICS}
