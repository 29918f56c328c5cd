"""The options of a training, in groups. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args

from saffe_cache.core.features import MODALITIES, IndexConvention
from saffe_cache.core.options import OptionGroup, refuse, require, require_keys, require_seed
from saffe_cache.fusion.options import ModelOptions, ObjectiveOptions
from saffe_cache.fusion.registry import (
    AUTO,
    FUSIONS,
    OBJECTIVES,
    OF_COMPOSED,
    OF_MEDIA,
    OF_PAIRS,
    OF_PHOTOS_ALONE,
    FusionEntry,
    GalleryText,
)
from saffe_cache.inputs.spec import PairKind, Residency, SplitOptions

OptimizerName = Literal["adamw", "lion"]
GalleryMedia = Literal[
    "auto", "image", "audio", "video", "image+audio", "image+video", "audio+video", "image+audio+video"
]
LOGGERS = ("auto", "none", "tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class DataOptions(OptionGroup):
    """Data"""

    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers to train on, for example image=11,12 (and text=5 where text tokens enter the fusion). Default: all that
    the fusion can use. Of a CNN: its last stage. Of a text encoder whose blocks the fusion continues: the first cached
    layer of its upper half."""
    index_convention: IndexConvention = "hidden_states"
    """How --layers counts. hidden_states, and the same in the SAFFE release (reference): i is the input of block i.
    paper: l is the output of its layer l, which is hidden_states l + 1."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder to use if the cache has several of a modality: image=PART-OF-KEY or image=ID."""
    gallery: GalleryMedia = "auto"
    """What the gallery holds, if the cache has several: its photos, sounds or videos, or several media of each item
    that are fused, such as image+audio; an item may lack some of them. auto: the first of image, audio and video that
    the cache has."""
    pairs: Literal["auto", PairKind] = "auto"
    """What searches. captions, or names of classes (classes), which describe photos; composed: a photo and a text that
    changes it. auto: composed if the train split has such queries, else captions if there are any."""
    gallery_text: GalleryText | None = None
    """The text that is paired with each photo in training and in the gallery. null: none. first_caption: the item's
    first caption; the other captions are the queries. matched: one of the queries themselves, as the SAFFE release
    trains; such a model learns to copy the text. It is validated and indexed with null text, so the weights that are
    kept are often from before it learned to copy. Default: the fusion's own, usually null."""

    def check(self) -> None:
        """Raise ValueError if a modality is unknown, or a layer is given twice."""
        require_keys("layers", self.layers, MODALITIES)
        require_keys("encoder", self.encoder, MODALITIES)
        require(self.gallery in get_args(GalleryMedia), "gallery", self.gallery, " or ".join(get_args(GalleryMedia)))
        for name, layers in self.layers.items():
            require(len(set(layers)) == len(layers), "layers", f"{name}={layers}", "each layer once")

    @property
    def media(self) -> tuple[str, ...]:
        """The media that are fused; none where the gallery has one."""
        return tuple(self.gallery.split("+")) if "+" in self.gallery else ()


TrainingType = Literal["auto", "float32", "bfloat16"]
"""Type of the matrix products of training steps."""


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe(OptionGroup):
    """How a fusion is trained: the usual values of the options of the same names.

    A fusion may have others (`FusionEntry.recipe`), and an option that is given replaces either.
    """

    epochs: int = 20
    batch_size: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    patience: int = 8
    optimizer: OptimizerName = "adamw"
    mixup: float = 0.0
    gallery_photos: int = 0

    def check(self) -> None:
        """Raise ValueError if a value is out of range."""
        for option in ("batch_size", "learning_rate", "patience"):
            require(0 < getattr(self, option) < math.inf, option, getattr(self, option), "a number above 0")
        for option in ("epochs", "weight_decay", "gallery_photos"):
            require(getattr(self, option) >= 0, option, getattr(self, option), "0 or more")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "a fraction from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class OptimisationOptions(OptionGroup):
    """Optimisation"""

    start: Literal["ridge", "random"] = "ridge"
    """Starting weights of the attention head. ridge: the ridge regression from photos to their texts. random: drawn at
    random, as those of the other heads."""
    epochs: int | None = None
    """Passes over the photos; 0 keeps the starting weights. Default: the fusion's own, usually 20; a fusion in closed
    form has none."""
    control_epochs: int = 2
    """Epochs of the control, which is trained on permuted pairs; 0 trains no control, and the report says so."""
    batch_size: int | None = None
    """Photos in a batch, each with all its texts, or composed queries; fewer if the data would give fewer than 8 such
    batches. Default: the fusion's own, usually 512."""
    gallery_photos: int | None = None
    """With --pairs composed, photos of a batch at least: random ones join the references and targets of its queries, as
    wrong answers. Default: the fusion's own, usually 0."""
    optimizer: OptimizerName | None = None
    """adamw: AdamW. lion: Lion, whose steps are of equal size for all weights. Default: the fusion's own, usually
    adamw."""
    learning_rate: float | None = None
    """Peak learning rate. Default: the fusion's own, usually 0.002, with its own optimiser; a tenth or ten times of it
    if --optimizer is the other one."""
    weight_decay: float | None = None
    """Weight decay, on matrices. Default: the fusion's own, usually 0.05."""
    train_views: Literal["all", "plain"] = "all"
    """Views of the photos in training: each step takes one of each photo at random. all: those that the cache has of
    all --layers. plain: the photos themselves, as in validation and in a closed form."""
    warmup: float | None = None
    """Fraction of the steps in which the learning rate rises; a cosine down to 2 % follows. Default: the fusion's own,
    usually 0.1."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    patience: int | None = None
    """Stop after this many epochs without a better validation score. Default: the fusion's own, usually 8."""
    seed: int = 0
    """Seed of the starting weights and of dropout."""
    data_seed: int | None = None
    """Seed of the order of photos and of what is held out; runs that share it can be trained side by side on the same
    batches. Default: the same as --seed."""

    def check(self) -> None:
        """Raise ValueError if a value is out of range."""
        require(0 < self.clip < math.inf, "clip", self.clip, "a number above 0")
        require(self.control_epochs >= 0, "control_epochs", self.control_epochs, "0 or more")
        for option in ("seed", "data_seed"):
            require_seed(option, getattr(self, option) or 0)


@dataclass(frozen=True, kw_only=True)
class HardwareOptions(OptionGroup):
    """Hardware"""

    device: str = "auto"
    """cpu, cuda or cuda:N. auto: a GPU if there is one."""
    dtype: TrainingType = "auto"
    """Type of the matrix products of training steps. auto: float32 on a CPU, bfloat16 on a GPU. A CPU with AVX-512 BF16
    or AMX trains about twice as fast with bfloat16."""
    residency: Literal["auto", Residency] = "auto"
    """Where hidden states are kept during training. device: in the accelerator's memory. memory: in main memory.
    mapped: in the cache's files. streamed: a few shards at a time, for caches that are compressed or behind a URL;
    photos are then shuffled within these shards. auto: the first of these that has room; on a CPU mapped, which is as
    fast."""
    checkpoint_seconds: float = 60.0
    """Seconds between the checkpoints that an interrupted run resumes from."""
    log: tuple[str, ...] = ("auto",)
    """Where every validation is logged besides log.jsonl: tensorboard (in the run's folder), wandb or trackio; repeat
    it for several. auto: tensorboard if it is installed. none: nowhere else."""

    def check(self) -> None:
        """Raise ValueError if a value is out of range."""
        require(self.checkpoint_seconds >= 0, "checkpoint_seconds", self.checkpoint_seconds, "0 or more")
        for name in self.log:
            require(name in LOGGERS, "log", name, " or ".join(LOGGERS))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    HardwareOptions, OptimisationOptions, ObjectiveOptions, ModelOptions, SplitOptions, DataOptions
):  # a dataclass lists the fields of its last base first
    """Train a fusion from a cache.

    If the run was interrupted, the same command resumes it; if it is finished, the command does nothing.
    """

    cache: str
    """The cache, as saffe extract wrote it: a folder, or a URL with credentials as in extraction. SAFFE_CACHE_DIR=DIR
    keeps its shards on the local disk, up to SAFFE_CACHE_DIR_GB (50)."""
    out: str
    """Folder of the run."""

    @property
    def chosen_fusion(self) -> str:
        """The fusion; in the place of auto, the one that fits what is fused."""
        if self.fusion != AUTO:
            return self.fusion
        if self.media:
            return OF_MEDIA
        if self.pairs == "composed":
            return OF_COMPOSED
        fuses = self.gallery_text not in (None, "null")
        fuses = fuses or any(OBJECTIVES[name].fuses_pairs for name in self.objective)
        return OF_PAIRS if fuses else OF_PHOTOS_ALONE

    @property
    def entry(self) -> FusionEntry:
        """The chosen fusion's registry entry."""
        return FUSIONS[self.chosen_fusion]

    def check(self) -> None:
        """Raise ValueError if an option is out of range, or the fusion takes none."""
        if "text" in self.layers and self.entry.blocks == "none":
            refuse("layers", "text=…", f"no text: {self.chosen_fusion} takes no tokens")
        self.recipe.check()
        if self.entry.is_closed_form:
            for option, value in asdict(self._own_recipe).items():
                if getattr(self, option) not in (None, value):
                    refuse(option, getattr(self, option), f"none: {self.fusion} is fitted in closed form")
            if self.objective:
                refuse("objective", ", ".join(self.objective), f"none: {self.fusion} is fitted in closed form")

    @property
    def recipe(self) -> TrainingRecipe:
        """The options that are given, and for the others the fusion's own values or the usual ones."""
        names = [one.name for one in fields(TrainingRecipe)]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        own = self._own_recipe
        if given.get("optimizer", own.optimizer) != own.optimizer:  # Lion's steps do not shrink with the gradients
            own = replace(own, learning_rate=own.learning_rate * (0.1 if own.optimizer == "adamw" else 10))
        return replace(own, **given)

    @property
    def _own_recipe(self) -> TrainingRecipe:
        """The fusion's own recipe, whatever is given."""
        without_steps: Mapping[str, Any] = {"epochs": 0} if self.entry.is_closed_form else {}
        return TrainingRecipe(**{**without_steps, **self.entry.recipe})

    def resolved(self) -> Self:
        """With the values of its recipe, as a run's config.json holds them."""
        dropout = self.entry.dropout if self.dropout is None else self.dropout
        return replace(self, **asdict(self.recipe), fusion=self.chosen_fusion, dropout=dropout)

    @property
    def of_control(self) -> Self:
        """The training of the control."""
        return self if self.entry.is_closed_form else replace(self, epochs=self.control_epochs)
