"""What decides a fusion's parameters and its objective, as plain values that a run's folder can hold. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from saffe_cache.core.features import Modality
from saffe_cache.core.options import OptionGroup, require, require_keys
from saffe_cache.fusion.registry import AUTO, FUSIONS, OBJECTIVES, FusionEntry, HeadName, QuerySide


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """Model"""

    fusion: str = field(default=AUTO, metadata={"entries": FUSIONS})
    """How photo and text features are combined. auto: linear where photos are searched alone; compose where photo and
    text search (composed queries); reuse where a text is fused with photos, by --gallery-text or an objective over
    pairs; media_sum where several media are fused (--gallery image+audio)."""
    head: HeadName | None = None
    """How tokens become one vector. attention: learned queries pool them. mean: their mean. flatten: all tokens enter
    one linear map, as in the SAFFE paper. Default: the fusion's own, usually attention."""
    query_side: QuerySide = "gallery"
    """Whose tokens are the queries of a decoder's cross-attention: the gallery's (photos) or the text's."""
    share_decoder: bool | None = None
    """Use one decoder for all layers instead of one for each. Default: the fusion's own, usually no."""
    freeze_decoder: bool = False
    """Train the head only and leave the decoder as the encoders' blocks made it (the SAFFE paper's partially aligned
    case)."""
    pooled_text: bool | None = None
    """Add the paired text's own vector, mapped, to the output. Default: the fusion's own, usually yes where photos have
    paired texts."""
    dropout: float | None = None
    """Dropout in the head and in the query map, from 0 to below 1. Default: the fusion's own, usually 0.5."""

    def check(self) -> None:
        """Raise ValueError if the fusion is unknown or a value is out of range."""
        require(self.fusion in (AUTO, *FUSIONS), "fusion", self.fusion, " or ".join((AUTO, *FUSIONS)))
        require(0 <= (self.dropout or 0) < 1, "dropout", self.dropout, "a fraction from 0 to below 1")

    @property
    def entry(self) -> FusionEntry:
        """The fusion's registry entry."""
        return FUSIONS[self.fusion]


@dataclass(frozen=True, kw_only=True)
class MediumShape:
    """The tokens of one medium of fused items."""

    name: Modality
    """image, audio or video."""
    num_layers: int
    hidden_size: int


@dataclass(frozen=True, kw_only=True)
class FusionShape(ModelOptions):
    """Everything that decides a fusion's parameters: the options with their defaults filled in, and the sizes of what
    the cache holds."""

    dropout: float = 0.5
    """As the option, with the fusion's own filled in."""
    num_layers: int
    """P: layers of the gallery's tokens."""
    hidden_size: int
    """Width of the gallery's tokens."""
    num_tokens: int
    """Tokens of a gallery input; 0 if they differ, as sounds do."""
    text_hidden_size: int
    """Width of the text's tokens."""
    text_size: int
    """Width of the text encoder's own vector, and of the output."""
    maps_queries: bool = True
    """Whether queries pass a learned map; otherwise they are the text encoder's own vectors."""
    matches: bool = False
    """Whether there is a head for image-text matching."""
    num_blocks: int = 0
    """Encoder blocks that run from the layer on, in fusions that continue an encoder."""
    text_rms: float = 1.0
    """Root mean square of the text's tokens: the scale at which a projection into their space starts."""
    has_class_token: bool = True
    """Whether the gallery's first token stands for the whole input; a CNN's feature maps have no such token."""
    media: tuple[MediumShape, ...] = ()
    """The media of fused items, whose layers follow one another; empty where the gallery has one medium."""

    @property
    def summary_size(self) -> int:
        """Width of what `summarize` makes of an input: 2 P d, P d without a class token, P d more with spreads."""
        parts = 1 + self.has_class_token + self.entry.has_spread
        sizes = [one.num_layers * one.hidden_size for one in self.media]
        return parts * (sum(sizes) if sizes else self.num_layers * self.hidden_size)

    @property
    def read_size(self) -> int:
        """Width of what the fusion reads of a gallery input: of its tokens, or of their summary."""
        return self.hidden_size if self.entry.reads == "tokens" else self.summary_size

    @property
    def takes_text(self) -> bool:
        """Whether a paired text changes a gallery input's vector."""
        return self.entry.fuses_text or bool(self.pooled_text)

    @property
    def head_sees_text(self) -> bool:
        """Whether the head's MLP sees the text's own vector."""
        when = self.entry.text_in_head
        return self.head == "attention" and (
            when == "always" or (when == "with pooled_text" and bool(self.pooled_text))
        )

    @property
    def pooled_size(self) -> int:
        """Width of the tokens that the head pools: those of the querying modality."""
        by_text = self.entry.has_decoder and self.query_side == "text"
        return self.text_hidden_size if by_text else self.hidden_size


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(OptionGroup):
    """Objective"""

    objective: Mapping[str, float] = field(default_factory=dict, metadata={"entries": OBJECTIVES})
    """Weighted sum of losses, for example info_nce=1 and pair=0.5. Default: the fusion's own, usually
    info_nce=1."""
    negatives: int = 9
    """Number of wrong texts for each photo in pair; half of them are the most similar ones."""
    pair_photos: int = 64
    """Number of photos of a batch that pair and matching use."""
    text_dropout: float = 0.0
    """Fraction of paired texts that training replaces by the null text, from 0 to below 1."""
    modality_dropout: float | None = None
    """How often training drops a medium of an item that has several, from 0 to below 1; one is always left. Default:
    0.3 where several media are fused."""
    regroup: bool | None = None
    """In training, take each medium of an item from any item with the same texts, such as those of its class. Items of
    captions, which have texts of their own, stay as they are. Default: yes where several media are fused."""
    temperature: float | None = None
    """Temperature of info_nce, fixed. Default: the fusion's own, usually learned from 0.07 on."""
    mixup: float | None = None
    """Mix each photo and its texts with another's of the batch, with a weight from Beta(X, X); 0 mixes nothing.
    Default: the fusion's own, usually 0.0."""
    caption_weight: float = 0.3
    """With --pairs composed, the weight of the same losses over photos and their captions, where they have any, so that
    texts alone find photos in the same index too; 0 for none."""
    structure_levels: int = 1
    """Steps between neighbours, up to which structure and structure_published compare neighbourhoods."""
    structure_diagonal: bool = True
    """Count each photo's and text's similarity to itself in structure. It holds most of the mass, so that the term is
    small."""
    structure_warmup: int = 100
    """Number of steps in which the weight of structure and structure_published rises from 0. The paper has 1,000, of
    more data."""
    unpaired: str | None = None
    """Split whose photos and texts structure and transport use too, without their pairing: both are drawn
    independently. rest: the photos that --train-fraction leaves out, and their texts. Photos that belong to several
    splits are left out. Each batch gets as many as it has photos."""

    def check(self) -> None:
        """Raise ValueError if a loss is unknown or a value is out of range."""
        require_keys("objective", self.objective, tuple(OBJECTIVES))
        for name, weight in self.objective.items():
            require(0 < weight < math.inf, "objective", f"{name}={weight}", "a weight above 0")
        for option in ("negatives", "pair_photos", "structure_levels"):
            require(getattr(self, option) > 0, option, getattr(self, option), "a number above 0")
        require(0 <= self.caption_weight < math.inf, "caption_weight", self.caption_weight, "0 or more")
        require(0 <= (self.mixup or 0) < math.inf, "mixup", self.mixup, "0 or more")
        if self.temperature is not None:
            require(0.001 <= self.temperature <= 10, "temperature", self.temperature, "a number from 0.001 to 10")
        require(self.structure_warmup >= 0, "structure_warmup", self.structure_warmup, "0 or more")
        for option in ("text_dropout", "modality_dropout"):
            fraction = getattr(self, option) or 0
            require(0 <= fraction < 1, option, fraction, "a fraction from 0 to below 1")

    @property
    def fuses_pairs(self) -> bool:
        """Whether training fuses photos with several texts each."""
        return any(OBJECTIVES[name].fuses_pairs for name in self.objective)

    @property
    def trains_only_pairs(self) -> bool:
        """Whether only vectors of fused pairs are trained, so that a gallery with null text means nothing."""
        of_pairs = [OBJECTIVES[name].trains_only_pairs for name in self.objective]
        return bool(of_pairs) and all(of_pairs)
