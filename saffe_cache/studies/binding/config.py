"""The options of `saffe bind`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from saffe_cache.core.features import MODALITIES
from saffe_cache.core.options import require, require_keys, require_seed

BATCH_PHOTOS = 30
"""Photos in a training step at most, as in the SAFFE paper."""


@dataclass(frozen=True, kw_only=True)
class BindConfig:
    """Bind made-up names to photos from a few examples each, in many episodes, with baselines and controls.

    The same command resumes a killed run and does nothing for a finished one. The exit status is 3 if a control fails.
    """

    cache: str
    """A cache of photos with classes, as saffe extract wrote it."""
    out: str
    """Folder of the result."""
    ways: tuple[int, ...] = (2, 5)
    """Classes in an episode; one setting for each number."""
    shots: tuple[int, ...] = (1, 3, 5)
    """Photos of each class to learn from; one setting for each number."""
    queries: int = 15
    """Photos of each class to test on."""
    episodes: int = 600
    """Episodes in a setting."""
    split: str = "test"
    """Split from which the episodes are drawn."""
    train_split: str = "train"
    """Split whose episodes choose the learning rates and the ridge's strength; photos of --split are left out."""
    tuning_episodes: int = 20
    """Episodes for these choices, in each setting."""
    head: Literal["attention", "mean"] = "attention"
    """How the FAM pools tokens: with learned queries and an MLP, or as their mean."""
    max_epochs: int = 20
    """Epochs after which a fit counts as converged even if its loss still falls."""
    num_names: int = 1000
    """Made-up names to draw from."""
    replaced_seeds: int = 0
    """Number of trainings on the whole train split in which every class gets a made-up name. Each has its own seed and
    names, and is compared with a training on the true names."""
    replaced_epochs: int = 20
    """Epochs of these trainings at most; the best is chosen on a tenth of the train split."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers, as image=11,12. Default: all."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder, as image=PART-OF-KEY, if the cache has several for a modality."""
    text_encoder: str | None = None
    """Where the text encoder is now. Needed once, to encode the names. Default: where the extraction found it."""
    title: str | None = None
    """Title of the result. Default: the cache's name."""
    seed: int = 0
    """Seed of names, episodes and starting weights."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu or cuda."""

    def __post_init__(self) -> None:
        for option, values, least in (("ways", self.ways, 2), ("shots", self.shots, 1)):
            require(bool(values) and min(values) >= least, option, values, f"numbers of {least} or more")
            require(len(set(values)) == len(values), option, values, "each number once")
        require(max(self.ways) <= BATCH_PHOTOS, "ways", max(self.ways), f"at most {BATCH_PHOTOS}: a step's photos")
        for option in ("queries", "max_epochs", "replaced_epochs"):
            require(getattr(self, option) > 0, option, getattr(self, option), "a number above 0")
        for option in ("episodes", "tuning_episodes"):
            require(getattr(self, option) > 1, option, getattr(self, option), "2 or more")
        require(self.max_epochs >= 2, "max_epochs", self.max_epochs, "2 or more: both are reported")
        require(self.num_names >= 2, "num_names", self.num_names, "2 or more")
        require(self.replaced_seeds >= 0, "replaced_seeds", self.replaced_seeds, "0 or more")
        require(self.split != self.train_split, "split", self.split, "another split than --train-split")
        require_keys("layers", self.layers, MODALITIES)
        require_keys("encoder", self.encoder, MODALITIES)
        require_seed("seed", self.seed)
