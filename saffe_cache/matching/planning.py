"""Which cells a comparison is made of."""

from __future__ import annotations

from dataclasses import replace

from saffe_cache.matching.config import MatchConfig
from saffe_cache.matching.degrading import Degradation
from saffe_cache.matching.examples import most_examples
from saffe_cache.matching.measuring import BASELINE_CELL, Cell
from saffe_cache.pairs import Pairs


def plan_cells(config: MatchConfig, training: Pairs) -> tuple[list[Cell], list[str]]:
    """All cells, and what the data do not allow.

    Raises:
        ValueError: they allow no scale at all.
    """
    first = config.negatives[0]
    cells: list[Cell] = []
    left_out: list[str] = []
    for negatives in config.negatives:
        scales = _possible_scales(config, training, negatives, left_out)
        for scale in scales if negatives == first else scales[-1:]:
            cells += _clean_cells(config, negatives, scale)
        if negatives == first:
            cells += _control_cells(config, cells)
            worse = max((scale for scale in scales if scale <= config.degraded_scale), default=scales[0])
            cells += _degraded_cells(config, negatives, worse)
    left_out += [
        f"{name}: --align-fraction maps vectors, not hidden states"
        for name in config.fusions
        if name not in config.fusions_of_features
    ]
    return cells, left_out


def _possible_scales(config: MatchConfig, training: Pairs, negatives: int, left_out: list[str]) -> list[int]:
    """Ascending; the others are noted.

    Raises:
        ValueError: there are none.
    """
    most = most_examples(training, negatives)
    scales = sorted(scale for scale in config.scales if 1 + negatives <= scale <= most)
    if not scales:
        raise ValueError(
            f"--scales: found {config.scales}, expected {1 + negatives} to {most} pairs, which {len(training)} "
            f"training photos give at 1:{negatives}."
        )
    left_out += [
        f"{scale} pairs at 1:{negatives}, of which {len(training)} training photos give {most} at most"
        for scale in sorted(set(config.scales) - set(scales))
    ]
    return scales


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
