"""Concatenation against cross-attention: does a text belong to a photo? All from one cache.

Cells (saffe_cache/studies/harness.py) are a setting, a scale, a system and a seed each; and what made features
pre-aligned, the costs, and the pairs on planes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from saffe_cache.studies.matching.examples import Degradation, num_kinds
from saffe_cache.studies.matching.findings import Costs, MadeAlignment, MatchCell, Plane, Planes
from saffe_cache.studies.matching.fusions import measure_cost
from saffe_cache.studies.matching.measuring import BASELINE_CELL, Bench, CellPlan, examples_of, measure_cell
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
    token_cells = [cell for cell in cells if cell.system == "tokens"]
    layers = _layers(config, photo, text)
    comparison = _Comparison(config, features, cells, skipped, Bench(photo, text, parts, token_cells, layers))
    resolved = {
        "photo": photo.key,
        "text": text.key,
        "layers": layers if token_cells else None,
        "data": content_fingerprint(cache.table, modality, *(parts[name] for name in sorted(parts))),
    }
    return run_study("match", config, resolved, comparison.measure)


@dataclass(frozen=True)
class _Comparison:
    """All that one command measures."""

    config: MatchConfig
    features: Features
    cells: Sequence[CellPlan]
    skipped: Sequence[str]
    bench: Bench

    def measure(self, study: Study) -> MatchResult:
        config, cells, bench = self.config, self.cells, self.bench
        measure = partial(measure_cell, bench, config=config, device=choose_device(config.device))
        measured = study.cells(MatchCell, {cell.name: partial(measure, cell) for cell in cells})
        made = study.cell(MadeAlignment, "made-alignment", bench.made_alignment) if config.align_fraction else None
        costs = study.cell(Costs, "costs", self._costs).costs
        planes: Mapping[str, Plane] = {}
        if config.tsne_pairs:
            shown = max((cell for cell in cells if cell.setting == cells[0].setting), key=lambda cell: cell.scale)
            planes = study.cell(Planes, "planes", partial(bench.planes, shown, config.tsne_pairs)).planes
        found = summarise(list(measured.values()), self.features, num_kinds(bench.parts["test"]), made)
        return MatchResult(
            title=config.title or Path(config.cache).stem,
            split=config.split,
            failures=tuple(failed(found.controls)),
            features=self.features.kind,
            features_in_words=str(self.features),
            made_alignment=made,
            seeds=config.seeds,
            cost=costs,
            planes=planes,
            skipped=tuple(self.skipped),
            photos={name: len(of) for name, of in bench.parts.items()},
            encoders={"photo": bench.photo.key, "text": bench.text.key},
            layers_of_tokens=bench.layers,
            seconds=study.seconds,
            **{name: tuple(of) for name, of in found._asdict().items()},
        )

    def _costs(self) -> Costs:
        """Of each fusion at these widths."""
        config, bench, found = self.config, self.bench, {}
        for name in config.fusions_of_features:
            if name != "tokens":
                found[name] = measure_cost(name, bench.clean.widths, (1, 1), config.query_modality)
            elif bench.num_tokens:
                found[name] = measure_cost(name, bench.tokens.widths, bench.num_tokens, config.query_modality)
        return Costs(costs=found)


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
    if not config.align_fraction:
        return Features(in_one_space(photo, text))
    if in_one_space(photo, text):
        raise ValueError(
            f"--align-fraction: found {config.align_fraction:g}, expected 0: {photo.key} and {text.key} are halves of "
            "one model, whose features are aligned already."
        )
    return Features(True, len(parts["aligning"]))


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


def plan_cells(config: MatchConfig, parts: Mapping[str, Pairs]) -> tuple[list[CellPlan], list[str]]:
    """All cells, and what of the config is in none of them, and why. Every cell's pairs can be drawn.

    Raises:
        ValueError: the data support no scale at the first ratio.
    """
    first = config.negatives[0]
    cells: list[CellPlan] = []
    skipped: list[str] = []
    for negatives in config.negatives:
        obstacles = {scale: _obstacle(config, parts, negatives, scale) for scale in sorted(config.scales)}
        scales = [scale for scale, obstacle in obstacles.items() if not obstacle]
        if not scales and negatives == first:
            raise ValueError(obstacles[min(obstacles)])
        skipped += [f"{scale} pairs at 1:{negatives}: {reason}" for scale, reason in obstacles.items() if reason]
        for scale in scales if negatives == first else scales[-1:]:
            cells += _clean_cells(config, negatives, scale)
        if negatives == first:
            cells += _control_cells(config, cells)
            worse = max((scale for scale in scales if scale <= config.degraded_scale), default=scales[0])
            cells += _degraded_cells(config, negatives, worse)
    return cells, skipped + _tokens_skipped(config, cells) + _degraded_skipped(config)


def _obstacle(config: MatchConfig, parts: Mapping[str, Pairs], negatives: int, scale: int) -> str:
    """Why the pairs cannot be drawn with some seed; empty if they can."""
    try:
        for seed in config.seeds:
            examples_of(parts, CellPlan(negatives=negatives, scale=scale, system=BASELINE_CELL, seed=seed))
    except ValueError as error:
        return str(error)
    return ""


def _tokens_skipped(config: MatchConfig, cells: Sequence[CellPlan]) -> list[str]:
    if "tokens" not in config.fusions:
        return []
    if config.align_fraction:
        return ["tokens: --align-fraction maps vectors, not hidden states"]
    measured = {cell.scale for cell in cells if cell.system == "tokens"}
    missing = [f"{scale}" for scale in config.token_scales if scale not in measured]
    if measured and not missing:
        return []
    sizes = ", ".join(missing) or "any number of"
    return [f"tokens at {sizes} pairs: it needs sizes that --token-scales and --scales share and the data support"]


def _degraded_skipped(config: MatchConfig) -> list[str]:
    if not config.noise and not config.rotation:
        return []
    reasons = {name: "it is not among --fusions" for name in config.degraded_fusions if name not in config.fusions}
    if "tokens" in config.degraded_fusions:
        reasons["tokens"] = "vectors are degraded, not hidden states"
    return [f"{name} with noise or rotation: {reason}" for name, reason in reasons.items()]


def _clean_cells(config: MatchConfig, negatives: int, scale: int) -> list[CellPlan]:
    """Hidden states are used only at the first ratio."""
    with_tokens = scale in config.token_scales and negatives == config.negatives[0]
    fusions = [name for name in config.fusions_of_features if name != "tokens" or with_tokens]
    return [
        CellPlan(negatives=negatives, scale=scale, system=system, seed=seed)
        for seed in config.seeds
        for system in (BASELINE_CELL, *fusions)
    ]


def _control_cells(config: MatchConfig, cells: list[CellPlan]) -> list[CellPlan]:
    """Labels permuted: each fusion at the smallest scale at which it is measured."""
    found = []
    for fusion in config.fusions_of_features:
        own = [cell for cell in cells if cell.system == fusion]
        least = min((cell.scale for cell in own), default=0)
        found += [replace(cell, is_permuted=True) for cell in own if cell.scale == least]
    return found


def _degraded_cells(config: MatchConfig, negatives: int, scale: int) -> list[CellPlan]:
    levels = [Degradation("noise", level) for level in config.noise]
    levels += [Degradation("rotation", level) for level in config.rotation]
    fusions = [name for name in config.degraded_fusions if name in config.fusions and name != "tokens"]
    return [
        CellPlan(degradation=level, negatives=negatives, scale=scale, system=system, seed=seed)
        for level in levels
        for seed in config.seeds
        for system in (BASELINE_CELL, *fusions)
    ]
