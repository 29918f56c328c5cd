"""What a comparison of fusions is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from saffe_cache.core.features import MODALITIES
from saffe_cache.core.options import require, require_keys, require_seed
from saffe_cache.studies.matching.fusions import FUSIONS, Asks


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Tell a photo's own text from another's by concatenation, by cross-attention and by what needs neither.

    The same command goes on with a killed run, and does nothing for a finished one. Exits with status 3 where a control
    is not where it must be.
    """

    cache: str
    """A cache of photos with captions or classes, as saffe extract wrote it."""
    out: str
    """Folder of the result."""
    split: str = "test"
    """Split to report on."""
    train_split: str = "train"
    """Split to train on; photos that stand in any other split too are left out."""
    validation: str = "heldout"
    """Split to choose epochs, thresholds and strengths by; heldout is a part of the train split, by photo."""
    validation_fraction: float = 0.1
    """Part of the photos of the train split that heldout takes."""
    align_fraction: float = 0.0
    """Makes features pre-aligned: a ridge regression from photos to texts is fitted on this part of the photos left to
    train on, which nothing else uses, and maps all others. 0 takes features as they are."""
    fusions: tuple[str, ...] = ("concat", "concat_linear", "cross", "cross_residual", "tokens")
    """Which, each with a flag of its own; also concat_wide, cross_residual_linear, cross_two_norms, cross_equations."""
    asks: Asks = "text"
    """Which modality asks in cross-attention."""
    negatives: tuple[int, ...] = (1, 5)
    """Texts of other photos for each of its own. The first is measured at all scales and degraded, the others at the
    largest scale."""
    scales: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Training pairs, others' texts included; those that the data do not allow are left out, and told."""
    token_scales: tuple[int, ...] = (2048, 4096)
    """Those of --scales at which tokens is measured."""
    noise: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    """Deviations of the noise on every coordinate of unit vectors."""
    rotation: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """How far photos are rotated: at 1 their mean cosine with themselves before is 0."""
    degraded_fusions: tuple[str, ...] = ("concat", "cross_residual")
    """Those of --fusions that noise and rotation are measured with."""
    degraded_scale: int = 4096
    """Training pairs for these; the largest of --scales up to it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of pairs, starting weights, noise and rotation."""
    epochs: int = 10
    """Of each training; the best is chosen on validation."""
    batch_size: int = 128
    """Pairs of a step."""
    learning_rate: float = 1e-3
    """Of AdamW, with a cosine schedule."""
    weight_decay: float = 0.01
    """Of AdamW."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The layer whose tokens are taken, as image=12. Default: the last one cached."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder, as image=PART-OF-KEY, where the cache has several of a modality."""
    tsne_pairs: int = 300
    """Pairs of the split that are drawn on a plane; 0 for none."""
    title: str | None = None
    """What the result is called. Default: the cache's name."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda."""

    def __post_init__(self) -> None:
        for option in ("fusions", "negatives", "scales", "seeds"):
            values = getattr(self, option)
            require(bool(values), option, "none", "at least one")
        for option in ("fusions", "degraded_fusions", "negatives", "scales", "token_scales", "seeds"):
            values = getattr(self, option)
            require(len(set(values)) == len(values), option, values, "each once")
        for name in (*self.fusions, *self.degraded_fusions):
            require(name in FUSIONS, "fusions", name, " or ".join(FUSIONS))
        for option in ("negatives", "scales", "epochs", "batch_size", "degraded_scale", "learning_rate"):
            values = getattr(self, option)
            least = min(values) if isinstance(values, tuple) else values
            require(least > 0, option, least, "above 0")
        require(min(self.noise, default=1) > 0, "noise", self.noise, "above 0: clean vectors are measured anyway")
        require(min(self.rotation, default=1) > 0, "rotation", self.rotation, "above 0: as with --noise")
        require(0 < self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "between 0 and 1")
        require(0 <= self.align_fraction < 1, "align_fraction", self.align_fraction, "0 or more, below 1")
        require(bool(self.fusions_of_features), "fusions", "tokens alone", "others too: --align-fraction maps vectors")
        require(
            len({self.split, self.train_split, self.validation}) == 3, "split", self.split, "three different splits"
        )
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(self.tsne_pairs == 0 or self.tsne_pairs >= 10, "tsne_pairs", self.tsne_pairs, "10 or more, or 0")
        require_keys("layers", self.layers, MODALITIES)
        require_keys("encoder", self.encoder, MODALITIES)
        for layers in self.layers.values():
            require(len(layers) == 1, "layers", layers, "one")
        for seed in self.seeds:
            require_seed("seeds", seed)

    @property
    def fusions_of_features(self) -> tuple[str, ...]:
        """Those of `fusions` whose features there are: hidden states are not made pre-aligned."""
        return tuple(name for name in self.fusions if not (self.align_fraction and name == "tokens"))
