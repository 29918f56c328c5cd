"""The options of `saffe subsets`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from saffe_cache.core.features import MODALITIES
from saffe_cache.core.options import require, require_keys

FUSIONS = ("concat", "sum", "union", "cross")


@dataclass(frozen=True, kw_only=True)
class SubsetsConfig:
    """Fuse the media of each item, and measure every subset of them: what each adds, and what is left without it.

    Each fusion is trained on all media, with some dropped at random, and once more on each subset alone. The same
    command resumes a killed run and does nothing for a finished one. The exit status is 3 if a control fails.
    """

    cache: str
    """A cache of items with several media and texts or classes, as saffe extract wrote it."""
    out: str
    """Folder of the result."""
    modalities: tuple[str, ...] = ()
    """Media to fuse, such as --modalities image --modalities audio. Default: all that the cache has encoders of."""
    fusions: tuple[str, ...] = FUSIONS
    """concat: an MLP on the concatenated summaries. sum: the sum of one head's vector for each medium. union: attention
    over the tokens of all media together. cross: the same, after each medium's tokens have attended to the others'."""
    split: str = "test"
    """Split to report on: its items that have all the media."""
    train_split: str = "train"
    """Split to train on; inputs that are reported are left out."""
    validation: str = "auto"
    """Split that chooses epochs and weights, or heldout. auto: dev, val, valid or validation if there
    is one that is not reported."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers, as image=11,12. Default: all."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder, as image=PART-OF-KEY, if the cache has several for a modality."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the starting weights; one training of everything for each."""
    epochs: int = 20
    """Passes over the items; the best by validation counts."""
    modality_dropout: float = 0.3
    """How often a medium of an item is dropped in training; one is always left."""
    regroup: bool = True
    """In training, take each medium of an item from any item with the same texts, such as those of its class. Items of
    captions, which have texts of their own, stay as they are."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    title: str | None = None
    """Title of the result. Default: the cache's name."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu or cuda."""

    def __post_init__(self) -> None:
        for option, values in (("fusions", self.fusions), ("seeds", self.seeds)):
            require(bool(values) and len(set(values)) == len(values), option, values, "each once, at least one")
        require(len(set(self.modalities)) == len(self.modalities) != 1, "modalities", self.modalities, "two or three")
        for option, known in (("fusions", FUSIONS), ("modalities", ("image", "audio", "video"))):
            for name in getattr(self, option):
                require(name in known, option, name, " or ".join(known))
        require(0 <= self.modality_dropout < 1, "modality_dropout", self.modality_dropout, "from 0 to below 1")
        require(self.epochs > 0, "epochs", self.epochs, "a number above 0")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number above 0")
        require(self.split != self.train_split, "split", self.split, "another split than --train-split")
        require_keys("layers", self.layers, MODALITIES)
        require_keys("encoder", self.encoder, MODALITIES)
