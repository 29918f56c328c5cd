"""The options of `saffe align`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from saffe_cache.core.features import MODALITIES
from saffe_cache.core.options import require, require_keys, require_seed


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Measure how well a cache's encoders agree, for every pair of layers, and advise a fusion.

    No FAM is trained, so it takes a minute or two on a CPU. The same command resumes a killed run and does nothing for
    a finished one. The exit status is 3 if a control fails.
    """

    cache: str
    """The cache, as saffe extract wrote it."""
    out: str
    """Folder of the result."""
    split: str = "train"
    """Split whose photos are used; those that are also in another split are left out."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers to compare, as image=11,12. Default: all. The encoders' own vectors are always compared."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder, as image=PART-OF-KEY, if the cache has several for a modality."""
    pairs: Literal["auto", "captions", "classes"] = "auto"
    """What describes an item: one of its captions, drawn at random, or its class. auto: captions if there are any."""
    max_photos: int = 1000
    """Photos to measure on, at most half of those available. Shared neighbours shrink as this number grows, so compare
    only results with equal numbers."""
    map_photos: int = 4000
    """Other photos, at most, to fit the maps of the best photo layer on; all other fits use as many of them as are
    measured on."""
    neighbours: int = 10
    """Nearest photos to compare; an even number."""
    components: int = 20
    """Principal components that SVCCA keeps at most."""
    permutations: int = 20
    """Permutations of the pairs, for the null."""
    half_samples: int = 40
    """Random halves of the photos, for the intervals of CKA and shared neighbours."""
    few_pairs: str | None = None
    """Folder of a result of saffe few-pairs, whose cases decide which method is advised. Default: the cases that come
    with the package, if there are enough."""
    title: str | None = None
    """Title of the result. Default: the cache's name."""
    seed: int = 0
    """Seed of photos, captions, permutations, halves and the MLP."""

    def __post_init__(self) -> None:
        require_keys("layers", self.layers, MODALITIES)
        require_keys("encoder", self.encoder, MODALITIES)
        require(self.neighbours > 0 and self.neighbours % 2 == 0, "neighbours", self.neighbours, "an even number")
        least = 4 * self.neighbours
        for option in ("max_photos", "map_photos"):
            require(
                getattr(self, option) >= least, option, getattr(self, option), f"{least} or more: 4 times --neighbours"
            )
        require(self.components > 0, "components", self.components, "a number above 0")
        for option in ("permutations", "half_samples"):
            require(getattr(self, option) > 1, option, getattr(self, option), "2 or more")
        require_seed("seed", self.seed)
