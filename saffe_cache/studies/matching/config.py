"""The options of `saffe match`, and what the fusions and baselines are that it compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from saffe_cache.core.features import MODALITIES
from saffe_cache.core.options import require, require_keys, require_seed

FUSIONS: Mapping[str, str] = {
    "concat": "Linear(1024, 256), then the head: ReLU, Linear(256, 128), ReLU, Linear(128, 2). 295,554 parameters at "
    "widths of 512, the paper's 296K",
    "concat_linear": "concat without the first ReLU: the paper's eq. 1 as written. 295,554",
    "concat_wide": 'concat with Linear(256, 256) in the head: the paper\'s "hidden dim 256" taken literally. 328,706',
    "cross": "three Linear(512, 256), MultiheadAttention(256, 4), Linear(256, 256), LayerNorm, the head of concat. "
    "756,610 at widths of 512, the paper's 757K; blind to the modality of the queries",
    "cross_residual": "cross, with its queries added before the LayerNorm. 756,610",
    "cross_residual_linear": "cross_residual without the first ReLU of the head. 756,610",
    "cross_two_norms": "a transformer block with two residuals and two LayerNorms. 757,122",
    "cross_equations": "only eq. 2 and 3, 3hd + h = 393,472, and the head. 426,626; blind to the modality of the "
    "queries",
    "tokens": "cross_residual over cached hidden states: many keys, so that attention can choose. 756,610",
}
"""What each fusion is, and its parameters at widths of 512."""
BASELINES: Mapping[str, str] = {
    "cosine": "cosine of the vectors that fusions get, with a threshold",
    "ridge_cosine": "cosine after a ridge regression from photos to texts, with a threshold",
    "ridge_products": "logistic regression on the products of the same vectors' coordinates",
}
"""What each baseline is."""
QueryModality = Literal["text", "photo"]


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Tell a photo's own text from another's, with concatenation, with cross-attention and with neither.

    The same command resumes a killed run and does nothing for a finished one. The exit status is 3 if a control fails.
    """

    cache: str
    """A cache of photos with captions or classes, as saffe extract wrote it."""
    out: str
    """Folder of the result."""
    split: str = "test"
    """Split to report on."""
    train_split: str = "train"
    """Split to train on; photos that are also in any other split are left out."""
    validation: str = "heldout"
    """Split to choose epochs, thresholds and strengths on; heldout is a part of the train split, by photo."""
    validation_fraction: float = 0.1
    """Fraction of the train split's photos that heldout takes."""
    align_fraction: float = 0.0
    """Makes features pre-aligned: a ridge regression from photos to texts is fitted on this fraction of the training
    photos, which nothing else uses, and maps all others. 0 takes features as they are."""
    fusions: tuple[str, ...] = ("concat", "concat_linear", "cross", "cross_residual", "tokens")
    """Which fusions; repeat the option for several. Others: concat_wide, cross_residual_linear, cross_two_norms,
    cross_equations."""
    query_modality: QueryModality = "text"
    """Which modality provides the queries of cross-attention."""
    negatives: tuple[int, ...] = (1, 5)
    """Texts of other photos for each of a photo's own. The first ratio is measured at all scales and degraded, the
    others at the largest scale."""
    scales: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Training pairs, including those with others' texts. Scales that the data cannot support are skipped and listed
    in the report."""
    token_scales: tuple[int, ...] = (2048, 4096)
    """Those of --scales at which tokens is measured."""
    noise: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    """Standard deviations of the noise on every coordinate of unit vectors."""
    rotation: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """How far photos are rotated: at 1 the mean cosine with their originals is 0."""
    degraded_fusions: tuple[str, ...] = ("concat", "cross_residual")
    """Those of --fusions that are measured with noise and rotation."""
    degraded_scale: int = 4096
    """Training pairs with noise and rotation: the largest of --scales up to this number."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of pairs, starting weights, noise and rotation."""
    epochs: int = 10
    """Epochs of each training; the best is chosen on validation."""
    batch_size: int = 128
    """Pairs in a step."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW, with a cosine schedule."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The layer whose tokens are used, as image=12. Default: the last one cached."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder, as image=PART-OF-KEY, if the cache has several for a modality."""
    tsne_pairs: int = 300
    """Pairs of the split to show on a plane; 0 for none."""
    title: str | None = None
    """Title of the result. Default: the cache's name."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu or cuda."""

    def __post_init__(self) -> None:
        for option in ("fusions", "negatives", "scales", "seeds"):
            require(bool(getattr(self, option)), option, "none", "at least one")
        for option in ("fusions", "degraded_fusions", "negatives", "scales", "token_scales", "seeds"):
            values = getattr(self, option)
            require(len(set(values)) == len(values), option, values, "each once")
        for name in (*self.fusions, *self.degraded_fusions):
            require(name in FUSIONS, "fusions", name, " or ".join(FUSIONS))
        for option in ("negatives", "scales", "epochs", "batch_size", "degraded_scale", "learning_rate"):
            values = getattr(self, option)
            least = min(values) if isinstance(values, tuple) else values
            require(least > 0, option, least, "above 0")
        require(min(self.noise, default=1) > 0, "noise", self.noise, "above 0: clean vectors are always measured")
        require(min(self.rotation, default=1) > 0, "rotation", self.rotation, "above 0, as with --noise")
        require(0 < self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "between 0 and 1")
        require(0 <= self.align_fraction < 1, "align_fraction", self.align_fraction, "0 or more, below 1")
        require(bool(self.fusions_of_features), "fusions", "only tokens", "others too: --align-fraction maps vectors")
        require(
            len({self.split, self.train_split, self.validation}) == 3, "split", self.split, "three different splits"
        )
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(self.tsne_pairs == 0 or self.tsne_pairs >= 10, "tsne_pairs", self.tsne_pairs, "10 or more, or 0")
        require_keys("layers", self.layers, MODALITIES)
        require_keys("encoder", self.encoder, MODALITIES)
        for layers in self.layers.values():
            require(len(layers) == 1, "layers", layers, "one layer")
        for seed in self.seeds:
            require_seed("seeds", seed)

    @property
    def fusions_of_features(self) -> tuple[str, ...]:
        """Those of `fusions` whose features exist: hidden states are not made pre-aligned."""
        return tuple(name for name in self.fusions if not (self.align_fraction and name == "tokens"))
