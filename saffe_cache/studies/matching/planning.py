"""Which cells a comparison consists of, and what of its config the data cannot support."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from saffe_cache.inputs.pairs import Pairs
from saffe_cache.studies.matching.config import MatchConfig
from saffe_cache.studies.matching.examples import Degradation, Examples, draw_examples, draw_judged

BASELINE_CELL = "baselines"


@dataclass(frozen=True, kw_only=True)
class CellPlan:
    """What is measured together, for one seed."""

    degradation: Degradation = field(default_factory=Degradation)
    negatives: int
    scale: int
    system: str
    """A fusion's name, or "baselines"."""
    seed: int
    is_permuted: bool = False
    """Trained on permuted labels: a control."""

    @property
    def setting(self) -> str:
        return f"1:{self.negatives} {self.degradation}"

    @property
    def name(self) -> str:
        """Of its file, without suffix."""
        permuted = "-permuted" if self.is_permuted else ""
        setting = self.setting.replace(":", "-to-").replace(" ", "-")
        return f"{setting}-{self.scale}-{self.system}{permuted}-seed{self.seed}"


def examples_of(parts: Mapping[str, Pairs], cell: CellPlan) -> tuple[Examples, Examples, Examples]:
    """To train on, to choose on, to report on.

    Raises:
        ValueError: the data cannot support them.
    """
    training = draw_examples(parts["train"], cell.scale, cell.negatives, cell.seed)
    if cell.is_permuted:
        training = training.with_labels_permuted(cell.seed)
    validation, test = (draw_judged(parts[name], cell.negatives, cell.seed) for name in ("validation", "test"))
    return training, validation, test


def plan_cells(config: MatchConfig, parts: Mapping[str, Pairs]) -> tuple[list[CellPlan], list[str]]:
    """All cells, and what of the config is in none of them, and why. Every cell's pairs can be drawn.

    Raises:
        ValueError: the data support no scale at the first ratio.
    """
    cells: list[CellPlan] = []
    skipped: list[str] = []
    fusions = [name for name in config.fusions_of_features if name != "tokens"]
    for negatives in config.negatives:
        obstacles = {scale: _obstacle(config, parts, negatives, scale) for scale in sorted(config.scales)}
        skipped += [f"{scale} pairs at 1:{negatives}: {reason}" for scale, reason in obstacles.items() if reason]
        scales = [scale for scale, reason in obstacles.items() if not reason]
        if negatives != config.negatives[0]:
            for scale in scales[-1:]:
                cells += _cells(config, fusions, negatives=negatives, scale=scale)
            continue
        if not scales:
            raise ValueError(obstacles[min(obstacles)])
        for scale in scales:
            own = config.fusions_of_features if scale in config.token_scales else fusions
            cells += _cells(config, own, negatives=negatives, scale=scale)
        cells += _permuted(config, cells)
        worse = max((scale for scale in scales if scale <= config.degraded_scale), default=scales[0])
        degraded = [name for name in config.degraded_fusions if name in fusions]
        levels = [Degradation("noise", level) for level in config.noise]
        for one in (*levels, *(Degradation("rotation", level) for level in config.rotation)):
            cells += _cells(config, degraded, degradation=one, negatives=negatives, scale=worse)
    return cells, [*skipped, *_skipped_fusions(config, cells)]


def _cells(config: MatchConfig, fusions: Sequence[str], **place: Any) -> list[CellPlan]:
    """`place`: the ratio, the scale, and the degradation if there is one."""
    systems = (BASELINE_CELL, *fusions)
    return [CellPlan(system=system, seed=seed, **place) for seed in config.seeds for system in systems]


def _permuted(config: MatchConfig, cells: Sequence[CellPlan]) -> list[CellPlan]:
    """Controls with permuted labels: each fusion at the smallest scale at which it is measured."""
    found = []
    for fusion in config.fusions_of_features:
        own = [cell for cell in cells if cell.system == fusion]
        least = min((cell.scale for cell in own), default=0)
        found += [replace(cell, is_permuted=True) for cell in own if cell.scale == least]
    return found


def _obstacle(config: MatchConfig, parts: Mapping[str, Pairs], negatives: int, scale: int) -> str:
    """Why the pairs cannot be drawn with some seed; empty if they can."""
    try:
        for cell in _cells(config, (), negatives=negatives, scale=scale):
            examples_of(parts, cell)
    except ValueError as error:
        return str(error)
    return ""


def _skipped_fusions(config: MatchConfig, cells: Sequence[CellPlan]) -> Iterator[str]:
    """What of tokens, and of noise and rotation, is not measured."""
    measured = {cell.scale for cell in cells if cell.system == "tokens"}
    missing = [f"{scale}" for scale in config.token_scales if scale not in measured]
    if "tokens" in config.fusions and config.align_fraction:
        yield "tokens: --align-fraction maps vectors, not hidden states"
    elif "tokens" in config.fusions and (missing or not measured):
        sizes = ", ".join(missing) or "any number of"
        yield f"tokens at {sizes} pairs: it needs sizes that --token-scales and --scales share and the data support"
    if config.noise or config.rotation:
        reasons = {name: "it is not among --fusions" for name in config.degraded_fusions if name not in config.fusions}
        if "tokens" in config.degraded_fusions:
            reasons["tokens"] = "vectors are degraded, not hidden states"
        yield from (f"{name} with noise or rotation: {reason}" for name, reason in reasons.items())
