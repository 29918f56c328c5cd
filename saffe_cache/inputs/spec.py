"""The specification of a run on a cache: encoders, layers, pairs, splits. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from saffe_cache.core.features import Modality, medium_of_key
from saffe_cache.core.options import OptionGroup, require
from saffe_cache.fusion.options import FusionShape, ObjectiveOptions
from saffe_cache.fusion.registry import GalleryText

PairKind = Literal["captions", "classes", "composed"]
ReferenceChoice = Literal["removed", "kept"]
"""Whether a composed query ranks its own reference photo."""
Residency = Literal["device", "memory", "mapped", "streamed"]


@dataclass(frozen=True, kw_only=True)
class SplitOptions(OptionGroup):
    """Splits"""

    train_split: str = "train"
    """Split to train on. A photo that also belongs to another split is not trained on."""
    validation: str = "auto"
    """Where the best epoch is chosen: the name of a split, or heldout for a part of the photos of the train split.
    auto: dev, val, valid or validation if there is one, else heldout."""
    validation_fraction: float = 0.1
    """Fraction of the train split that heldout takes, from 0 to below 1."""
    validation_photos: int = 5000
    """Most photos that are validated on, drawn by their content; 0 for all. Each validation searches all of them, at a
    cost that grows with their square. What heldout does not take is trained on."""
    train_fraction: float = 1.0
    """Fraction of the remaining photos to train on, above 0, at most 1. For the same seed, a smaller part lies within
    a larger one; what is held out stays the same."""

    def check(self) -> None:
        """Raise ValueError if a value is out of range."""
        require(self.validation != self.train_split, "validation", self.validation, "another split, or heldout")
        fraction = self.validation_fraction
        require(0 <= fraction < 1, "validation_fraction", fraction, "a fraction from 0 to below 1")
        require(
            self.validation_photos >= 0, "validation_photos", self.validation_photos, "a number above 0, or 0 for all"
        )
        require(0 < self.train_fraction <= 1, "train_fraction", self.train_fraction, "a fraction above 0, to 1")


@dataclass(frozen=True, kw_only=True)
class RunSpec(SplitOptions, ObjectiveOptions):
    """A training's options with their defaults filled in for a cache: everything that evaluation needs to know."""

    gallery_key: str
    text_key: str
    gallery_layers: tuple[int, ...]
    text_layers: tuple[int, ...]
    """Empty where neither text tokens nor blocks of the text encoder enter the fusion."""
    pairs: PairKind
    gallery_text: GalleryText
    """The text that is paired with each photo in training."""
    seed: int
    """Seed of the order of photos and of what is held out."""
    shape: FusionShape
    views: tuple[str, ...] = ()
    """Views of the photos that training draws from besides the plain ones."""
    shuffled_shards: int | None = None
    """A streamed training shuffles the photos of this many shards together; None shuffles all photos."""
    media: Mapping[Modality, str] = field(default_factory=dict)
    """Keys of the encoders of the media that are fused, by modality; empty where the gallery has one medium."""
    data: str = ""
    """Hash of the photos and texts that the run trains on and is validated on."""

    @property
    def medium(self) -> Modality:
        """Of the gallery; "media" where several are fused."""
        return medium_of_key(self.gallery_key)

    @property
    def token_layers(self) -> tuple[int, ...]:
        """The text layers whose tokens enter the fusion."""
        return self.text_layers if self.shape.entry.reads_text_tokens else ()

    @property
    def fuses_text(self) -> bool:
        """Whether training fuses photos with texts."""
        return self.gallery_text != "null" or self.fuses_pairs or self.pairs == "composed"

    @property
    def sees_null(self) -> bool:
        """Whether training pairs photos with the null text."""
        return self.gallery_text == "null" or self.text_dropout > 0
