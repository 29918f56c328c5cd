"""Options of `saffe ablate`; importing them loads neither torch nor a cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from saffe_cache.core.options import one_of, positional, require, require_seed
from saffe_cache.evaluation.config import BaselineChoice
from saffe_cache.protocols.registry import protocol_choices


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Train and evaluate every cell of a recipe, for every seed, from one cache.

    Runs that exist are not repeated, whether this recipe made them or another with the same --out; the same command
    resumes a killed sweep. Exits with status 3 if a control of a cell failed.
    """

    recipe: tuple[str, ...] = positional()
    """Recipes, such as pipelines/layers.toml: what is varied."""
    cache: str
    """The cache, with all layers and encoders that the recipes name."""
    out: str
    """Folder for all runs, and for each recipe a folder with its result."""
    split: str = "test"
    """Split to report on; the recipe's validation chooses the best epoch."""
    protocol: str | None = one_of(protocol_choices, None)
    """As for saffe evaluate. Default: as the runs are trained; a recipe needs the same one for all of its runs."""
    seeds: tuple[int, ...] = ()
    """Seeds that replace the recipe's."""
    baselines: BaselineChoice = "linear"
    """Which baselines are fitted for each run, on the layers that it fuses."""
    together: int = 8
    """Largest number of runs trained side by side from one pass over the shards, if they see the same batches."""
    workers: int | None = None
    """Training processes. Default: one per processor core, at most 4; 1 on a GPU."""
    device: str = "auto"
    """auto uses a GPU if there is one; or cpu, cuda."""

    def __post_init__(self) -> None:
        require(self.together > 0, "together", self.together, "a number above 0")
        require(self.workers is None or self.workers > 0, "workers", self.workers, "a number above 0")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "each once")
        for seed in self.seeds:
            require_seed("seeds", seed)
        stems = [Path(path).stem for path in self.recipe]
        require(len(set(stems)) == len(stems), "recipe", stems, "files of different names")
        require("runs" not in stems and "caches" not in stems, "recipe", stems, "another name than runs or caches")
