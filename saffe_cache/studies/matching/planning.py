"""Which cells a comparison is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from saffe_cache.inputs.pairs import Pairs
from saffe_cache.studies.matching.config import MatchConfig
from saffe_cache.studies.matching.degrading import Degradation
from saffe_cache.studies.matching.measuring import BASELINE_CELL, Cell, examples_of


def plan_cells(config: MatchConfig, parts: Mapping[str, Pairs]) -> tuple[list[Cell], list[str]]:
    """All cells, and what of the config is in none of them, and why. Every cell's pairs can be drawn.

    Raises:
        ValueError: the data allow no scale at the first ratio.
    """
    first = config.negatives[0]
    cells: list[Cell] = []
    left_out: list[str] = []
    for negatives in config.negatives:
        obstacles = {scale: _obstacle(config, parts, negatives, scale) for scale in sorted(config.scales)}
        scales = [scale for scale, obstacle in obstacles.items() if not obstacle]
        if not scales and negatives == first:
            raise ValueError(obstacles[min(obstacles)])
        left_out += [f"{scale} pairs at 1:{negatives}: {reason}" for scale, reason in obstacles.items() if reason]
        for scale in scales if negatives == first else scales[-1:]:
            cells += _clean_cells(config, negatives, scale)
        if negatives == first:
            cells += _control_cells(config, cells)
            worse = max((scale for scale in scales if scale <= config.degraded_scale), default=scales[0])
            cells += _degraded_cells(config, negatives, worse)
    return cells, left_out + _tokens_left_out(config, cells) + _degraded_left_out(config)


def _obstacle(config: MatchConfig, parts: Mapping[str, Pairs], negatives: int, scale: int) -> str:
    """Why the pairs cannot be drawn with some seed; empty where they can."""
    try:
        for seed in config.seeds:
            examples_of(parts, Cell(negatives=negatives, scale=scale, system=BASELINE_CELL, seed=seed))
    except ValueError as error:
        return str(error)
    return ""


def _tokens_left_out(config: MatchConfig, cells: Sequence[Cell]) -> list[str]:
    if "tokens" not in config.fusions:
        return []
    if config.align_fraction:
        return ["tokens: --align-fraction maps vectors, not hidden states"]
    measured = {cell.scale for cell in cells if cell.system == "tokens"}
    missing = [f"{scale}" for scale in config.token_scales if scale not in measured]
    if measured and not missing:
        return []
    sizes = ", ".join(missing) or "any number of"
    return [f"tokens at {sizes} pairs: it needs sizes that --token-scales and --scales share, and the data allow"]


def _degraded_left_out(config: MatchConfig) -> list[str]:
    if not config.noise and not config.rotation:
        return []
    reasons = {name: "it is not among --fusions" for name in config.degraded_fusions if name not in config.fusions}
    if "tokens" in config.degraded_fusions:
        reasons["tokens"] = "vectors are degraded, not hidden states"
    return [f"{name} with noise or rotation: {reason}" for name, reason in reasons.items()]


def _clean_cells(config: MatchConfig, negatives: int, scale: int) -> list[Cell]:
    """Hidden states are taken at the first ratio alone."""
    with_tokens = scale in config.token_scales and negatives == config.negatives[0]
    fusions = [name for name in config.fusions_of_features if name != "tokens" or with_tokens]
    return [
        Cell(negatives=negatives, scale=scale, system=system, seed=seed)
        for seed in config.seeds
        for system in (BASELINE_CELL, *fusions)
    ]


def _control_cells(config: MatchConfig, cells: list[Cell]) -> list[Cell]:
    """Labels permuted: each fusion at the smallest scale at which it is measured."""
    found = []
    for fusion in config.fusions_of_features:
        own = [cell for cell in cells if cell.system == fusion]
        least = min((cell.scale for cell in own), default=0)
        found += [replace(cell, is_permuted=True) for cell in own if cell.scale == least]
    return found


def _degraded_cells(config: MatchConfig, negatives: int, scale: int) -> list[Cell]:
    levels = [Degradation("noise", level) for level in config.noise]
    levels += [Degradation("rotation", level) for level in config.rotation]
    fusions = [name for name in config.degraded_fusions if name in config.fusions and name != "tokens"]
    return [
        Cell(degradation=level, negatives=negatives, scale=scale, system=system, seed=seed)
        for level in levels
        for seed in config.seeds
        for system in (BASELINE_CELL, *fusions)
    ]
