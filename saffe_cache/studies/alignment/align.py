"""How well the encoders of a cache agree, layer by layer, and which fusion that recommends. Only maps are fitted.

Cells (saffe_cache/studies/harness.py) are the measures of all pairs of layers, and the maps of the best photo layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from saffe_cache.core.controls import failed
from saffe_cache.core.features import CacheError, Ragged
from saffe_cache.core.options import require
from saffe_cache.fusion.layers import NormedTokens, mean_weights
from saffe_cache.inputs.pairs import gallery_modality, own_pairs, pair_kind, select_pairs
from saffe_cache.inputs.spec import PairKind
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.studies.alignment.config import AlignConfig
from saffe_cache.studies.alignment.maps import normed
from saffe_cache.studies.alignment.measuring import (
    OWN,
    TokenStates,
    Vectors,
    best_layer,
    measure_best_layer,
    measures_of,
)
from saffe_cache.studies.alignment.result import AlignmentResult, BestLayer, LayerMeasure, advise
from saffe_cache.studies.harness import Study, run_study

_BATCH = 256


def align(config: AlignConfig) -> str:
    """Measure, and return the output folder.

    Raises:
        CacheError, ValueError: cache, split and options do not go together, or there are too few photos.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    cache = open_cache(config.cache)
    modality = gallery_modality(cache)
    encoders = cache.encoder(modality, config.encoder.get(modality)), cache.encoder("text", config.encoder.get("text"))
    kind: PairKind = pair_kind(cache.table) if config.pairs == "auto" else config.pairs
    layers = _layers(config, encoders[0]), _layers(config, encoders[1])
    sample = _draw(config, cache, *encoders, kind)
    resolved = {
        "gallery": encoders[0].key,
        "text": encoders[1].key,
        "layers": layers,
        "pairs": kind,
        "data": _fingerprint(cache, encoders, sample),
    }
    return run_study("align", config, resolved, partial(_measure, config, encoders, layers, sample))


@dataclass(frozen=True)
class _Sample:
    """Which photos, and the text of each; those that are measured on come first."""

    kind: PairKind
    photos: np.ndarray
    """int64 [photos]: rows in their encoder's arrays."""
    texts: Ragged
    """Text rows of each distinct text: one caption, or the prompts of a class."""
    text_of: np.ndarray
    """int64 [photos]: which of the texts."""
    num_judged: int


def _measure(
    config: AlignConfig,
    encoders: tuple[EncoderCache, EncoderCache],
    layers: tuple[list[int], list[int]],
    sample: _Sample,
    study: Study,
) -> AlignmentResult:
    vectors = _vectors(encoders, layers, sample)
    measures, absent = measures_of(vectors, config)

    def at_best_layer() -> BestLayer:
        best = int(best_layer(vectors)), layers[1][-1]
        return measure_best_layer(vectors, _tokens(encoders, best, sample, vectors.num_texts), config)

    measured = study.cells(LayerMeasure, measures)
    best = study.cell(BestLayer, "best-layer", at_best_layer)
    return AlignmentResult(
        title=config.title or Path(config.cache).stem,
        split=config.split,
        failures=tuple(failed([best.control])),
        pairs=sample.kind,
        encoders={"gallery": encoders[0].key, "text": encoders[1].key},
        photos={"judged": sample.num_judged, "fitted": len(vectors.fitted), "fitted_closer": len(vectors.others)},
        num_texts=len(sample.texts),
        gallery_layers=tuple(vectors.photos),
        text_layers=tuple(vectors.texts),
        measures=measured,
        absent=absent,
        best_layer=best,
        advice=tuple(advise(best.evidence, has_paired_texts=vectors.has_captions)),
        seconds=study.seconds,
    )


def _draw(config: AlignConfig, cache: Cache, gallery: EncoderCache, text: EncoderCache, kind: PairKind) -> _Sample:
    """Photos in random order, each once, with a caption that none of the others has, or with their one class.

    Raises:
        ValueError: there are too few.
    """
    found = select_pairs(cache.table, gallery, text, config.split, kind)
    pairs = own_pairs(cache.table, gallery.manifest.modality, config.split, found)
    generator = np.random.default_rng(config.seed)
    order = generator.permutation(len(pairs))
    if kind == "captions":
        texts = np.array([generator.choice(pairs.texts[int(i)]) for i in order], np.int64)
        _, first = np.unique(texts, return_index=True)
        order, texts = order[np.sort(first)], texts[np.sort(first)]
    else:
        order = order[np.diff(pairs.labels.offsets)[order] == 1]
    num_judged, least = min(config.max_photos, len(order) // 2), 4 * config.neighbours
    if num_judged < least:
        raise ValueError(
            f"{config.cache}, split {config.split!r}: {len(order)} photos with {kind} of their own, expected "
            f"{2 * least} or more: as many to fit on as to measure on, and 4 times --neighbours. Use more data."
        )
    order = order[: num_judged + config.map_photos]
    if kind == "captions":
        distinct, text_of = Ragged.from_rows([row] for row in texts[: len(order)]), np.arange(len(order))
    else:
        classes, text_of = np.unique(pairs.labels.values[pairs.labels.offsets[order]], return_inverse=True)
        require(len(classes) > 1, "pairs", f"photos of {len(classes)} class", "two or more")
        distinct = Ragged.from_rows(cache.table.class_texts[int(label)] for label in classes)
    return _Sample(kind, pairs.rows[order], distinct, text_of, num_judged)


def _fingerprint(cache: Cache, encoders: tuple[EncoderCache, EncoderCache], sample: _Sample) -> str:
    """Hash over the content of the photos and their texts, in order."""
    photos, texts = (cache.table.inputs[encoder.manifest.modality].content_hash for encoder in encoders)
    digest = hashlib.sha256(photos[sample.photos].tobytes())
    digest.update(texts[sample.texts.values].tobytes())
    digest.update(sample.text_of.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _vectors(
    encoders: tuple[EncoderCache, EncoderCache], layers: tuple[list[int], list[int]], sample: _Sample
) -> Vectors:
    gallery, text = encoders
    photos = {str(layer): _means(gallery, sample.photos, layer) for layer in layers[0]}
    if gallery.manifest.vector in gallery.manifest.arrays:
        photos[OWN] = gallery.vectors(sample.photos)
    flat, starts = sample.texts.values, sample.texts.offsets[:-1]
    read = {str(layer): _means(text, flat, layer) for layer in layers[1]} | {OWN: text.vectors(flat)}
    return Vectors(
        photos=photos,
        texts={name: unit_rows(np.add.reduceat(unit_rows(of), starts, axis=0)) for name, of in read.items()},
        text_of=sample.text_of,
        num_judged=sample.num_judged,
        has_captions=sample.kind == "captions",
    )


def _layers(config: AlignConfig, encoder: EncoderCache) -> list[int]:
    """
    Raises:
        CacheError: the cache lacks a requested one.
    """
    modality = encoder.manifest.modality
    wanted = config.layers.get(modality, tuple(encoder.layers))
    missing = [layer for layer in wanted if layer not in encoder.layers]
    if missing or not wanted:
        raise CacheError(
            f"{encoder.key}: it has layers {encoder.layers}, requested {list(wanted)}. Add layers with saffe extract "
            f"--layers {modality}=…."
        )
    return sorted(set(wanted))


def _means(encoder: EncoderCache, rows: np.ndarray, layer: int) -> np.ndarray:
    """Mean over all tokens, each normed, float32 [n, d]."""
    parts = []
    for start in range(0, len(rows), _BATCH):
        tokens = encoder.tokens(rows[start : start + _BATCH], (layer,))
        state = torch.from_numpy(tokens.states[0]).float()
        mask = None if tokens.mask is None else torch.from_numpy(tokens.mask)
        parts.append(NormedTokens(state).sums(mean_weights(state, mask))[:, 0].numpy())
    return np.concatenate(parts)


def _tokens(
    encoders: tuple[EncoderCache, EncoderCache], layers: tuple[int, int], sample: _Sample, num_texts: int
) -> TokenStates:
    """For a class, the tokens of its first prompt."""
    gallery, text = encoders

    def photos() -> Iterator[torch.Tensor]:
        for start in range(0, sample.num_judged, _BATCH):
            rows = sample.photos[start : min(start + _BATCH, sample.num_judged)]
            yield normed(torch.from_numpy(gallery.tokens(rows, layers[:1]).states[0]))

    texts = text.tokens(sample.texts.values[sample.texts.offsets[:num_texts]], layers[1:])
    assert texts.mask is not None
    return TokenStates(
        gallery_layer=str(layers[0]),
        photos=photos(),
        text_layer=str(layers[1]),
        texts=[normed(torch.from_numpy(one[mask])) for one, mask in zip(texts.states[0], texts.mask, strict=True)],
    )
