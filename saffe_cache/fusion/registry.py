"""All fusions by name, and what each needs of a cache. One more is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from saffe_cache.fusion.base import Blocks, Fusion
from saffe_cache.fusion.fam import FusionAlignModule
from saffe_cache.fusion.known.albef import AlbefFusion
from saffe_cache.fusion.known.flamingo import FlamingoFusion
from saffe_cache.fusion.known.hadamard import HadamardFusion
from saffe_cache.fusion.known.insertion import DeepInsertFusion, LimberFusion, MagmaFusion
from saffe_cache.fusion.known.late import LateFusion
from saffe_cache.fusion.known.mbt import BottleneckFusion
from saffe_cache.fusion.known.two_tower import TwoTowerFusion
from saffe_cache.fusion.shape import FamShape

BlockUse = Literal["none", "paired", "text", "both"]


@dataclass(frozen=True)
class Kind:
    """A fusion, and what it needs of a cache."""

    make: Callable[[FamShape, Blocks], Fusion]
    blocks: BlockUse = "none"
    """Cached blocks that it takes, and with them the text's tokens. paired: the one behind each layer of both encoders.
    text: of the text encoder all behind its layer. both: of both encoders as many as follow both layers."""
    objective: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({"info_nce": 1.0}))
    """What it trains by default."""


FUSIONS: Mapping[str, Kind] = {
    "reuse": Kind(FusionAlignModule, "paired"),
    "paper": Kind(FusionAlignModule, "paired"),
    "reference": Kind(FusionAlignModule, "paired", {"soft_target": 1.0}),
    "linear": Kind(FusionAlignModule),
    "concat": Kind(FusionAlignModule),
    "late": Kind(LateFusion),
    "hadamard": Kind(HadamardFusion),
    "two_tower": Kind(TwoTowerFusion, objective={"siglip": 1.0}),
    "mbt": Kind(BottleneckFusion, "both"),
    "flamingo": Kind(FlamingoFusion, "text"),
    "limber": Kind(LimberFusion, "text"),
    "magma": Kind(MagmaFusion, "text"),
    "deep_insert": Kind(DeepInsertFusion, "text"),
    "albef": Kind(AlbefFusion, "text", {"info_nce": 1.0, "matching": 1.0}),
}
