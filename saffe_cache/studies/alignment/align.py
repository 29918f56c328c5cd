"""How well the encoders of a cache agree, layer by layer, and which fusion that recommends. Only maps are fitted.

Cells (saffe_cache/studies/harness.py) are the measures of all pairs of layers, and the maps of the best photo layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from saffe_cache.core.features import CacheError
from saffe_cache.core.items import Ragged
from saffe_cache.core.options import require
from saffe_cache.inputs.pairs import gallery_modality, own_pairs, pair_kind, select_pairs
from saffe_cache.inputs.spec import PairKind
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.studies.alignment.cases import Case, advise_method, read_cases
from saffe_cache.studies.alignment.config import AlignConfig
from saffe_cache.studies.alignment.measuring import Sample, measure_best_layer, measures_of
from saffe_cache.studies.alignment.result import AlignmentResult, BestLayer, LayerMeasure, advise
from saffe_cache.studies.harness import Study, run_study


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
    sample = _draw(config, cache, encoders, kind)
    resolved = {
        "gallery": encoders[0].key,
        "text": encoders[1].key,
        "layers": sample.layers,
        "pairs": kind,
        "data": _fingerprint(cache, sample),
    }
    cases = read_cases(config.few_pairs)
    return run_study("align", config, resolved, partial(_measure, sample, cases))


def _measure(sample: Sample, cases: Sequence[Case], study: Study) -> AlignmentResult:
    config = sample.config
    measures, absent = measures_of(sample)
    measured = study.cells(LayerMeasure, measures)
    best = study.cell(BestLayer, "best-layer", partial(measure_best_layer, sample))
    advice = advise(best.evidence, has_paired_texts=sample.has_captions)
    method = advise_method(cases, best.evidence.measures(sample.num_available))
    if method and advice[0].fusion != "no FAM":
        advice[0] = replace(advice[0], fusion=method.method, because=f"{method.sentence}; {advice[0].because}")
    return AlignmentResult(
        pairs=sample.kind,
        encoders={"gallery": sample.encoders[0].key, "text": sample.encoders[1].key},
        photos={"judged": sample.num_judged, "fitted": len(sample.fitted), "fitted_closer": len(sample.others)},
        num_texts=len(sample.prompts),
        gallery_layers=tuple(sample.photos),
        text_layers=tuple(sample.texts),
        measures=measured,
        absent=absent,
        best_layer=best,
        advice=tuple(advice),
        method=method,
        **study.common_fields(config, [best.control]),
    )


def _draw(config: AlignConfig, cache: Cache, encoders: tuple[EncoderCache, EncoderCache], kind: PairKind) -> Sample:
    """Photos in random order, each once, with a caption that none of the others has, or with their one class.

    Raises:
        CacheError: the cache lacks a requested layer.
        ValueError: there are too few photos.
    """
    layers = _layers(config, encoders[0]), _layers(config, encoders[1])
    found = select_pairs(cache.table, *encoders, config.split, kind)
    pairs = own_pairs(cache.table, encoders[0].manifest.modality, config.split, found)
    generator = np.random.default_rng(config.seed)
    order = generator.permutation(len(pairs))
    if kind == "captions":
        texts = np.array([generator.choice(pairs.texts[int(i)]) for i in order], np.int64)
        first = np.sort(np.unique(texts, return_index=True)[1])
        order, texts = order[first], texts[first]
    else:
        order = order[np.diff(pairs.labels.offsets)[order] == 1]
    num_available = len(order)
    num_judged, least = min(config.max_photos, len(order) // 2), 4 * config.neighbours
    if num_judged < least:
        raise ValueError(
            f"{config.cache}, split {config.split!r}: {len(order)} items with {kind} of their own, expected "
            f"{2 * least} or more: as many to fit on as to measure on, and 4 times --neighbours. Use more data."
        )
    order = order[: num_judged + config.map_photos]
    if kind == "captions":
        prompts, text_of = Ragged.from_rows([row] for row in texts[: len(order)]), np.arange(len(order))
    else:
        classes, text_of = np.unique(pairs.labels.values[pairs.labels.offsets[order]], return_inverse=True)
        require(len(classes) > 1, "pairs", f"items of {len(classes)} class", "two or more")
        prompts = Ragged.from_rows(cache.table.class_texts[int(label)] for label in classes)
    return Sample(
        config=config,
        encoders=encoders,
        layers=layers,
        kind=kind,
        rows=pairs.rows[order],
        prompts=prompts,
        text_of=text_of,
        num_judged=num_judged,
        num_available=num_available,
    )


def _fingerprint(cache: Cache, sample: Sample) -> str:
    """Hash over the content of the photos and their texts, in order."""
    photos, texts = (cache.table.inputs[encoder.manifest.modality].content_hash for encoder in sample.encoders)
    parts = photos[sample.rows], texts[sample.prompts.values], sample.text_of.astype("<i8")
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]


def _layers(config: AlignConfig, encoder: EncoderCache) -> list[int]:
    """Those to compare; CacheError if the cache lacks a requested one."""
    modality = encoder.manifest.modality
    wanted = config.layers.get(modality, tuple(encoder.layers))
    missing = [layer for layer in wanted if layer not in encoder.layers]
    if missing or not wanted:
        raise CacheError(
            f"{encoder.key}: it has layers {encoder.layers}, requested {list(wanted)}. Add layers with saffe extract "
            f"--layers {modality}=…."
        )
    return sorted(set(wanted))
