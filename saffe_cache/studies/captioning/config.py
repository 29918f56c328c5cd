"""The options of `saffe caption`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from saffe_cache.core.options import require, require_keys, require_seed


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Train a projector that feeds photos to a frozen causal language model at one layer, and measure its captions.

    The same command resumes a killed run and does nothing for a finished one. The exit status is 3 if a control fails.
    """

    cache: str
    """A cache of captioned photos with a language model, as saffe extract wrote it with --position-offset."""
    out: str
    """Folder of the result."""
    layer: int
    """The first layer of the language model that sees the photo; 0 puts the photo in front of the text."""
    grid: int = 4
    """Photo tokens: the class token (for a CNN, the mean of all places), and the patches averaged over GRID x GRID
    fields."""
    image_layer: int | None = None
    """Layer of the photo's hidden states. Default: the last in the cache."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder, as text=PART-OF-KEY, if the cache has several for a modality."""
    train_split: str = "train"
    """Split to train on; photos that are also in --split are left out."""
    split: str = "dev"
    """Split to report on."""
    held_out: float = 0.1
    """Fraction of the training photos on which the best epoch is chosen."""
    report_photos: int = 1000
    """Photos of --split to report on at most: a random choice, the same for every --seed."""
    others: int = 9
    """Captions of other photos among which a photo's own must be found."""
    epochs: int = 10
    """Epochs; each sees every photo once, with one of its captions."""
    batch_size: int = 64
    """Photos in a step."""
    learning_rate: float = 5e-3
    """The highest learning rate; it rises over the first tenth of the steps, then falls."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_tokens: int = 30
    """Tokens in a greedy caption at most."""
    title: str | None = None
    """Title of the result. Default: the cache's name."""
    seed: int = 0
    """Seed of the held-out photos, starting weights and order."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu or cuda."""

    def __post_init__(self) -> None:
        for option in ("grid", "report_photos", "others", "epochs", "batch_size", "max_tokens"):
            require(getattr(self, option) > 0, option, getattr(self, option), "a number above 0")
        require(self.layer >= 0, "layer", self.layer, "0 or more")
        require(0 < self.held_out < 1, "held_out", self.held_out, "a fraction between 0 and 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number above 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(self.split != self.train_split, "split", self.split, "another split than --train-split")
        require_keys("encoder", self.encoder, ("image", "text"))
        require_seed("seed", self.seed)
