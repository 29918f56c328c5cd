"""Made-up names that can be pronounced, their vectors, and a cache whose classes carry them.

A name has two or three syllables, each an onset, a vowel and perhaps a coda, drawn with a seed: "blorbin", "skaduz".
There is no list of English words to compare with, so a short English word may come up by chance. No name equals a class
name or a word of one.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.items import Inputs, Ragged
from saffe_cache.core.texts import Texts
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.evaluation.baselines import log_odds
from saffe_cache.inputs.feature_loader import FeatureLoader, summaries
from saffe_cache.inputs.pairs import select_pairs, training_pairs
from saffe_cache.protocols.searches import ClassProtocol
from saffe_cache.protocols.setting import Setting
from saffe_cache.retrieval.baselines import LinearMap, fit_linear_probe, unit_rows
from saffe_cache.retrieval.scores import candidate_scores
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.reader import Cache, EncoderCache
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import text_hash
from saffe_cache.training.runs import open_run

METRICS = ("top1", "map")
"""What trainings on true and on made-up names are compared by."""

_ONSETS = [
    *("b", "bl", "br", "d", "dr", "f", "fl", "fr", "g", "gl", "gr", "j", "k", "kl", "kr", "l", "m", "n", "p", "pl"),
    *("pr", "r", "s", "sk", "sl", "sm", "sn", "sp", "st", "t", "tr", "v", "w", "z"),
]
_VOWELS = list("aeiou")
_CODAS = ["", "", "b", "d", "g", "k", "l", "m", "n", "p", "r", "s", "t", "x", "z"]
_TEXTS_AT_ONCE = 64


def make_names(count: int, avoid: Iterable[str], seed: int) -> list[str]:
    """Names of which none equals one of `avoid` or a word of it, regardless of case."""
    generator = np.random.default_rng(seed)
    avoided = {part.lower() for name in avoid for part in (name, *name.replace("_", " ").split())}
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [
            generator.choice(_ONSETS) + generator.choice(_VOWELS) + generator.choice(_CODAS)
            for _ in range(generator.integers(2, 4))
        ]
        if (name := "".join(syllables)) not in avoided:
            names[name] = None
    return list(names)


@dataclass(frozen=True)
class NamePool:
    """Names and their vectors."""

    names: tuple[str, ...]
    vectors: np.ndarray
    """float32 [names, d]: mean over the class prompts of the encoder's unit vectors, as for class names."""
    encoder: str
    """Its key."""

    def save(self, path: Path) -> None:
        file = io.BytesIO()
        np.savez(file, names=np.array(self.names), vectors=self.vectors, encoder=np.array(self.encoder))
        write_whole(path, file.getvalue())

    @staticmethod
    def load(path: Path) -> NamePool:
        """Read what `save` wrote; ValueError if it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as file:
                pool = NamePool(tuple(file["names"].tolist()), file["vectors"], str(file["encoder"]))
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise ValueError(f"{path}: not a pool of names ({error}). Delete it; it is then rebuilt.") from None
        if pool.vectors.dtype != np.float32 or pool.vectors.ndim != 2 or len(pool.vectors) != len(pool.names):
            found = f"{len(pool.names)} names and {pool.vectors.dtype} {pool.vectors.shape}"
            raise ValueError(f"{path}: {found}, expected a float32 vector for each. Delete it; it is then rebuilt.")
        return pool


def encode_names(encoder: FrozenEncoder, vector: str, names: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """Mean over the prompts of each name's unit vectors, float32 [names, d].

    `vector` is which of the encoder's, "pooled" or "projected"; prompts have a {} where the name goes.
    """
    encoder.select((encoder.num_layers,), vectors=True)
    of_prompts = []
    for prompt in prompts:
        ids = encoder.tokenize([prompt.replace("{}", name) for name in names])
        parts = [
            encoder.encode(encoder.pad(ids[start : start + _TEXTS_AT_ONCE])).vectors[vector]
            for start in range(0, len(ids), _TEXTS_AT_ONCE)
        ]
        of_prompts.append(unit_rows(np.concatenate(parts)))
    return np.asarray(np.mean(of_prompts, axis=0), np.float32)


class RenamedTexts(EncoderCache):
    """The text part of a cache, with the names' vectors only: row i is name i."""

    def __init__(self, storage: Storage, manifest: EncoderManifest, vectors: np.ndarray) -> None:
        super().__init__(storage, manifest)
        self._vectors = vectors

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._vectors[rows])

    def usable(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray((rows >= 0) & (rows < len(self._vectors)))


def renamed_cache(cache: Cache, text_key: str, names: Sequence[str], vectors: np.ndarray) -> Cache:
    """The cache as if its classes had these names; nothing changes on disk.

    `vectors` are those of the names by the text encoder `text_key`, float32 [classes, d].
    """
    hashes = np.frombuffer(b"".join(text_hash(name) for name in names), np.uint8).reshape(-1, 32)
    renamed = copy.copy(cache)
    renamed.table = replace(
        cache.table,
        class_names=tuple(names),
        class_texts=Ragged.from_rows([number] for number in range(len(names))),
        inputs={**cache.table.inputs, "text": Inputs(hashes, Texts.of(names))},
    )
    texts = RenamedTexts(cache.storage, cache.encoders[text_key].manifest, vectors)
    renamed.encoders = {**cache.encoders, text_key: texts}
    return renamed


def run_scores(run: str, cache: Cache, split: str, device: str) -> dict[str, float]:
    """top1 and map of a run when class names search a split."""
    spec, model, _ = open_run(run, cache)
    inputs = FeatureLoader(cache, spec, device)
    setting = Setting(inputs, select_pairs(cache.table, inputs.gallery, inputs.text, split, "classes"))
    search, model = ClassProtocol(setting), model.to(device)
    gallery, queries = setting.gallery(model, setting.honest()), setting.queries(model, search.queries)
    scores = search.score_vectors(gallery, queries, intervals=False)
    return {metric: scores[metric].value for metric in METRICS}


def probe_scores(run: str, cache: Cache, split: str) -> tuple[dict[str, float], dict[str, float]]:
    """top1 and map of the linear probe, which needs no names, fitted on the run's training photos; and of chance."""
    spec, _, _ = open_run(run, cache)
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
