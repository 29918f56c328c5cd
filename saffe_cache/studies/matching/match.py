"""Concatenation against cross-attention: does a text belong to a photo? All from one cache.

Cells (saffe_cache/studies/harness.py) are a setting, a scale, a system and a seed each; and what made features
pre-aligned, the cost of each fusion, and the pairs on each plane.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from saffe_cache.core.controls import failed
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
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.studies.harness import Study, run_study
from saffe_cache.studies.matching.config import MatchConfig
from saffe_cache.studies.matching.examples import num_kinds
from saffe_cache.studies.matching.findings import MadeAlignment, MatchCell, MatchCost, Plane
from saffe_cache.studies.matching.measuring import Bench, measure_cell
from saffe_cache.studies.matching.planning import CellPlan, plan_cells
from saffe_cache.studies.matching.result import MatchResult
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
    measure = partial(_measure, config=config, features=features, bench=bench, cells=cells, skipped=skipped)
    return run_study("match", config, resolved, measure)


def _measure(
    study: Study,
    config: MatchConfig,
    features: Features,
    bench: Bench,
    cells: Sequence[CellPlan],
    skipped: Sequence[str],
) -> MatchResult:
    """All that one command measures."""
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
        title=config.title or Path(config.cache).stem,
        split=config.split,
        failures=tuple(failed(findings.controls)),
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
        seconds=study.seconds,
        **vars(findings),
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
