"""All fusions and objectives by name, and everything that generic code asks of them.

Torch-free: classes are named as "module:Class" and imported when one is built, so that options can be read without
torch. A new fusion, or a new loss, is one class and one entry here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BlockUse = Literal["none", "paired", "text", "one_text", "both"]
HeadName = Literal["attention", "mean", "flatten"]
QuerySide = Literal["gallery", "text"]
GalleryText = Literal["null", "first_caption", "matched"]
Reading = Literal["tokens", "summary"]
Scoring = Literal["inner", "own"]
Origin = Literal["published", "validation", ""]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Something that is built from a class."""

    made_by: str
    """MODULE:CLASS."""
    summary: str
    """For --help: one or two short sentences."""

    @property
    def help(self) -> str:
        """What --help says of it."""
        return self.summary

    def make(self, *arguments: Any) -> Any:
        """Import the class and call it."""
        module, _, name = self.made_by.partition(":")
        return getattr(importlib.import_module(module), name)(*arguments)


@dataclass(frozen=True, kw_only=True)
class FusionEntry(Entry):
    """A fusion; its class is called with a FusionShape and the Blocks that it uses."""

    blocks: BlockUse = "none"
    """Which cached encoder blocks it uses, and with them the text's tokens. none: no block, and no text tokens.
    paired: for each layer, the block that follows it in both encoders. text: all blocks of the text encoder from the
    text's layer on. one_text: the one that follows the text's layer, and no text tokens. both: as many blocks of each
    encoder as follow both layers."""
    options: frozenset[str] = frozenset({"pooled_text"})
    """Which of the options --head, --query-side, --share-decoder, --freeze-decoder and --pooled-text it understands."""
    head: HeadName = "attention"
    """Its default --head."""
    share_decoder: bool = False
    """Its default --share-decoder."""
    pooled_text: bool = True
    """Its default --pooled-text where texts are paired with photos."""
    gallery_text: GalleryText = "null"
    """Its default --gallery-text."""
    dropout: float = 0.5
    """Its default --dropout."""
    objective: Mapping[str, float] = field(default_factory=lambda: {"info_nce": 1.0})
    """Its default --objective."""
    temperature: float | None = None
    """Its default --temperature; None for a learned one."""
    query_tokens: bool = False
    """Whether it reads the tokens of texts that search (`Fusion.encode_texts`), and not the text encoder's own vectors.
    It then needs a text layer."""
    maps_queries: bool = True
    """Whether queries pass a learned map; otherwise they are the text encoder's own vectors."""
    fuses_text: bool = True
    """Whether a paired text changes a photo's vector even without --pooled-text."""
    text_in_head: Literal["never", "with pooled_text", "always"] = "never"
    """When the attention head's MLP sees the paired text's own vector."""
    without_text: str | None = None
    """The fusion that it equals when no text is fused in training: then that one should be used."""
    text_objectives: tuple[str, ...] = ("pair", "matching")
    """Objectives that fuse texts in training even when none is paired with the photos; used with `without_text`."""
    is_deterministic: bool = True
    """Whether the same inputs always give the same vectors in evaluation."""
    reads: Reading = "tokens"
    """What it sees of a photo: its tokens, or their summary (`layers.summarize`) as one token of width summary_size."""
    has_spread: bool = False
    """Whether a photo's summary also holds the standard deviation of each channel over its tokens."""
    sees_photos_first: bool = False
    """Whether it computes something from the training photos before the first step (`Fusion.prepare`)."""
    for_composed: bool = False
    """Whether it is made for composed queries (photo and text search photos): it trains with --pairs composed alone."""
    for_media: bool = False
    """Whether it is made for items of several media, of which any may be missing: it takes no other gallery."""
    scores: Scoring = "inner"
    """How a composed query scores the gallery. inner: by the inner product of unit vectors, which any index can search.
    own: by `Fusion.similarities`."""
    adds_kernels: bool = False
    """Whether, trained with null text, it gets kernel ridge regressions beside it (`with_kernels`)."""
    is_closed_form: bool = False
    """Whether its weights are computed by `Fusion.fit`, without steps and without an objective."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Its default of options in `training.config.TrainingRecipe` that differ from the usual ones, such as epochs."""
    mixes_from: int = 0
    """Items to train on from which its recipe mixes pairs; with fewer, `mixup` of the recipe is 0."""
    recipe_from: Origin = ""
    """Where the recipe is from: its paper or released code, or our choice on validation photos. Of a closed form: how
    its parameters, such as the strength of a penalty, are chosen."""

    @property
    def help(self) -> str:
        of_few = {"mixup": f" from {self.mixes_from:,} items on"} if self.mixes_from else {}
        parts = [f"{name} {value}{of_few.get(name, '')}" for name, value in self.recipe.items()]
        parts += {"published": ["as published"], "validation": ["chosen on validation photos"], "": []}[
            self.recipe_from
        ]
        what = "Closed form" if self.is_closed_form else "Recipe"
        return f"{self.summary} {what}: {', '.join(parts)}." if parts else self.summary

    @property
    def is_special(self) -> bool:
        """Whether it takes composed queries or several media alone, and not photos that texts describe."""
        return self.for_composed or self.for_media

    @property
    def has_decoder(self) -> bool:
        """Whether one modality's tokens attend to the other's, in a decoder for each layer."""
        return "query_side" in self.options

    @property
    def continues_text(self) -> bool:
        """Whether the text encoder's blocks run from the text's layer to the last one."""
        return self.blocks in ("text", "both")

    @property
    def reads_text_tokens(self) -> bool:
        """Whether text tokens enter it."""
        return self.blocks not in ("none", "one_text")

    @property
    def needs_gallery_blocks(self) -> bool:
        """Whether it uses blocks of the gallery's encoder; a CNN has none."""
        return self.blocks in ("paired", "both")


_CLOSED = "saffe_cache.fusion.closed_form"
_KNOWN, _VECTORS, _FAM = "saffe_cache.fusion.known", "saffe_cache.fusion.vectors", "saffe_cache.fusion.fam"
_COMPOSED, _MEDIA = "saffe_cache.fusion.composed", "saffe_cache.fusion.media"
_HEAD = frozenset({"pooled_text", "head"})
_DECODER = _HEAD | {"query_side", "share_decoder", "freeze_decoder"}
_TWO_SIDED: Mapping[str, Any] = {"options": frozenset(), "pooled_text": False}
"""Of fusions of two separate sides, in which a paired text is averaged with the photo."""


_OF_VECTORS: Mapping[str, Any] = {
    "options": frozenset(),
    "pooled_text": False,
    "reads": "summary",
    "maps_queries": False,
    "for_composed": True,
}
"""Of fusions that compose a query of one photo vector and one text vector."""


def _closed_form(made_by: str, summary: str) -> FusionEntry:
    return FusionEntry(
        made_by=f"{_CLOSED}.{made_by}",
        summary=summary,
        options=frozenset(),
        pooled_text=False,
        reads="summary",
        is_closed_form=True,
        recipe_from="validation",
    )


_OF_MEDIA: Mapping[str, Any] = {
    "options": frozenset(),
    "pooled_text": False,
    "fuses_text": False,
    "for_media": True,
    "dropout": 0.2,
    "recipe": {"learning_rate": 1e-3, "batch_size": 64},
    "recipe_from": "validation",
}
"""Of fusions of several media of an item."""


AUTO = "auto"
"""A fusion that follows from what is fused."""
OF_PHOTOS_ALONE, OF_PAIRS, OF_COMPOSED, OF_MEDIA = "linear", "reuse", "compose", "media_sum"
"""What it is where photos are searched alone, where texts are fused with them, where both together search, and where
items have several media."""

FUSIONS: Mapping[str, FusionEntry] = {
    "reuse": FusionEntry(
        made_by=f"{_FAM}:ReuseFusion",
        summary="The encoder's next block with a gated cross-attention to the other modality.",
        blocks="paired",
        options=_DECODER,
        text_in_head="with pooled_text",
    ),
    "paper": FusionEntry(
        made_by=f"{_FAM}:PaperFusion",
        summary="The SAFFE paper's decoder, eq. 1-4.",
        blocks="paired",
        options=_DECODER,
        pooled_text=False,
    ),
    "reference": FusionEntry(
        made_by=f"{_FAM}:ReferenceFusion",
        summary="What the released SAFFE code computes; for comparison only.",
        blocks="paired",
        options=_DECODER,
        head="flatten",
        share_decoder=True,
        pooled_text=False,
        gallery_text="matched",
        objective={"soft_target": 1.0},
        maps_queries=False,
        is_deterministic=False,
    ),
    "linear": FusionEntry(
        made_by="saffe_cache.fusion.with_kernels:WithKernels",
        summary="No attention between modalities: the head pools the photo's tokens; a paired text adds its vector.",
        options=_HEAD,
        fuses_text=False,
        recipe={"mixup": 0.4, "epochs": 30},
        mixes_from=1000,
        recipe_from="validation",
        adds_kernels=True,
    ),
    "concat": FusionEntry(
        made_by=f"{_FAM}:FusionAlignModule",
        summary="As linear, and the head's MLP sees the paired text's vector too.",
        options=_HEAD,
        text_in_head="always",
        without_text="linear",
    ),
    "late": FusionEntry(
        made_by=f"{_KNOWN}.correction:LateFusion",
        summary="Late fusion: a linear map of the photo plus a linear map of the text.",
    ),
    "hadamard": FusionEntry(
        made_by=f"{_KNOWN}.correction:HadamardFusion",
        summary="Low-rank bilinear pooling (MLB).",
        without_text="late",
        text_objectives=("pair",),
    ),
    "two_tower": FusionEntry(
        made_by=f"{_KNOWN}.correction:TwoTowerFusion",
        summary="One linear map for each encoder into a shared space.",
        options=frozenset(),
        pooled_text=False,
        objective={"siglip": 1.0},
    ),
    "mbt": FusionEntry(
        made_by=f"{_KNOWN}.insertion:BottleneckFusion",
        summary="Bottleneck tokens between the blocks of both encoders (MBT).",
        blocks="both",
    ),
    "flamingo": FusionEntry(
        made_by=f"{_KNOWN}.cross_attention:FlamingoFusion",
        summary="Perceiver resampler and gated cross-attention in the text encoder (Flamingo).",
        blocks="text",
    ),
    "limber": FusionEntry(
        made_by=f"{_KNOWN}.insertion:LimberFusion",
        summary="Linearly mapped photo tokens in front of the text's (LiMBeR).",
        blocks="text",
    ),
    "magma": FusionEntry(
        made_by=f"{_KNOWN}.insertion:MagmaFusion",
        summary="LiMBeR with an adapter behind each text block (MAGMA).",
        blocks="text",
    ),
    "deep_insert": FusionEntry(
        made_by=f"{_KNOWN}.insertion:DeepInsertFusion",
        summary="LiMBeR whose photo tokens enter at a later text layer (DeepInsert).",
        blocks="text",
    ),
    "frozen": FusionEntry(
        made_by=f"{_KNOWN}.insertion:FrozenFusion",
        summary="The photo's summary as a prefix of 2 tokens in front of the text's (Frozen).",
        blocks="text",
    ),
    "fromage": FusionEntry(
        made_by=f"{_KNOWN}.fromage:FromageFusion",
        summary="A learned [RET] token behind the text in the frozen text encoder, and linear maps (FROMAGe).",
        blocks="text",
        query_tokens=True,
        options=frozenset(),
        pooled_text=False,
        recipe_from="validation",
    ),
    "pang": FusionEntry(
        made_by=f"{_KNOWN}.pang:PangFusion",
        summary="A frozen text block between two linear maps as one more layer of the photo encoder (Pang et al.).",
        blocks="one_text",
    ),
    "albef": FusionEntry(
        made_by=f"{_KNOWN}.cross_attention:AlbefFusion",
        summary="Cross-attention in the text encoder's upper blocks, with a matching head (ALBEF).",
        blocks="text",
        objective={"info_nce": 1.0, "matching": 1.0},
    ),
    "ridge": _closed_form("ridge:RidgeFusion", "Ridge regressions in both directions, averaged."),
    "kernel_ridge": _closed_form("kernel:KernelRidgeFusion", "Kernel ridge regressions in both directions, averaged."),
    "procrustes": _closed_form("procrustes:ProcrustesFusion", "The orthonormal projections that agree best."),
    "cca": _closed_form("cca:CcaFusion", "Regularised canonical correlation analysis."),
    "csa": _closed_form("csa:CsaFusion", "Canonical coordinates, weighted by held-out correlations (CSA)."),
    "asif": _closed_form("asif:AsifFusion", "Similarities to paired anchors (ASIF)."),
    "contrastive": FusionEntry(
        made_by=f"{_VECTORS}.contrastive:ContrastiveFusion",
        summary="One linear map a side, trained with InfoNCE.",
        reads="summary",
        recipe={"learning_rate": 5e-3, "epochs": 30},
        recipe_from="validation",
        **_TWO_SIDED,
    ),
    "structure": FusionEntry(
        made_by=f"{_VECTORS}.contrastive:ContrastiveFusion",
        summary="One linear map a side that keeps its encoder's neighbourhoods (STRUCTURE).",
        reads="summary",
        objective={"info_nce": 1.0, "structure": 10.0},
        temperature=0.05,
        recipe={"learning_rate": 5e-3, "epochs": 30},
        recipe_from="validation",
        **_TWO_SIDED,
    ),
    "sotalign": FusionEntry(
        made_by=f"{_VECTORS}.sotalign:SotalignFusion",
        summary="One linear map a side that follows a closed-form teacher, on unpaired data too (SOTAlign).",
        reads="summary",
        objective={"siglip": 1.0, "transport": 1.0},
        recipe={"learning_rate": 5e-3},
        recipe_from="validation",
        **_TWO_SIDED,
    ),
    "fusemix": FusionEntry(
        made_by=f"{_VECTORS}.fusemix:FuseMixFusion",
        summary="A residual MLP a side, trained on mixed pairs (FuseMix).",
        reads="summary",
        recipe={"mixup": 1.0, "learning_rate": 1e-3, "weight_decay": 0.1, "epochs": 25},
        recipe_from="published",
        **_TWO_SIDED,
    ),
    "sail": FusionEntry(
        made_by=f"{_VECTORS}.sail:SailFusion",
        summary="A gated head a side, with a sigmoid loss (SAIL).",
        reads="summary",
        objective={"sail": 1.0},
        recipe={"optimizer": "lion", "learning_rate": 3e-4, "weight_decay": 1e-4},
        recipe_from="validation",
        **_TWO_SIDED,
    ),
    "sharelock": FusionEntry(
        made_by=f"{_VECTORS}.sharelock:ShareLockFusion",
        summary="The photo's own vectors, and an MLP that maps texts to them (ShareLock).",
        reads="summary",
        temperature=0.07,
        recipe={"learning_rate": 1e-3, "weight_decay": 1e-4},
        recipe_from="published",
        **_TWO_SIDED,
    ),
    "freeze_align": FusionEntry(
        made_by=f"{_VECTORS}.freeze_align:FreezeAlignFusion",
        summary="Projectors of patches, class token and text (Freeze-Align).",
        recipe={"learning_rate": 1e-3, "weight_decay": 0.02},
        recipe_from="published",
        **_TWO_SIDED,
    ),
    "gpo": FusionEntry(
        made_by=f"{_KNOWN}.gpo:GpoFusion",
        summary="Learned weights of each channel's sorted tokens (GPO).",
        recipe={"learning_rate": 5e-3, "weight_decay": 1e-4, "epochs": 25},
        **_TWO_SIDED,
    ),
    "dino_txt": FusionEntry(
        made_by=f"{_KNOWN}.dino_txt:DinoTxtFusion",
        summary="Class token and patch mean side by side, each mapped linearly (dino.txt).",
        reads="summary",
        recipe={"learning_rate": 3e-3, "weight_decay": 1e-4, "epochs": 30},
        recipe_from="validation",
        **_TWO_SIDED,
    ),
    "sum": FusionEntry(
        made_by=f"{_COMPOSED}.sum:SumFusion",
        summary="The normalised sum of the mapped photo and the mapped text.",
        **_OF_VECTORS,
    ),
    "tirg": FusionEntry(
        made_by=f"{_COMPOSED}.tirg:TirgFusion",
        summary="The text gates the photo's vector and adds a residual (TIRG).",
        **_OF_VECTORS,
    ),
    "combiner": FusionEntry(
        made_by=f"{_COMPOSED}.combiner:CombinerFusion",
        summary="A learned share of photo and text, and a learned vector (Combiner of CLIP4Cir).",
        temperature=0.01,
        recipe={"learning_rate": 5e-4},
        **_OF_VECTORS,
    ),
    "compose": FusionEntry(
        made_by=f"{_COMPOSED}.compose:ComposeFusion",
        summary="A photo's vector, gated by the text, plus the text, plus a residual of both; ours.",
        has_spread=True,
        sees_photos_first=True,
        recipe={"learning_rate": 1e-3, "batch_size": 256, "epochs": 12, "gallery_photos": 640},
        recipe_from="validation",
        **{**_OF_VECTORS, "reads": "tokens"},
    ),
    "artemis": FusionEntry(
        made_by=f"{_COMPOSED}.artemis:ArtemisFusion",
        summary="The text weighs the target's channels, and those of its likeness to the reference (ARTEMIS).",
        scores="own",
        **_OF_VECTORS,
    ),
    "media_sum": FusionEntry(
        made_by=f"{_MEDIA}:MediaSum",
        summary="Several media: the sum of one MLP's vector for each, which are also trained alone.",
        objective={"info_nce": 1.0, "media_alone": 1.0},
        **_OF_MEDIA,
    ),
    "media_concat": FusionEntry(
        made_by=f"{_MEDIA}:MediaConcat", summary="Several media: an MLP on their summaries.", **_OF_MEDIA
    ),
    "media_union": FusionEntry(
        made_by=f"{_MEDIA}:MediaUnion",
        summary="Several media: learned queries attend to the tokens of all of them together.",
        **_OF_MEDIA,
    ),
    "media_cross": FusionEntry(
        made_by=f"{_MEDIA}:MediaCross",
        summary="media_union, after the tokens of each medium have attended to those of the others.",
        **_OF_MEDIA,
    ),
}


@dataclass(frozen=True, kw_only=True)
class ObjectiveEntry(Entry):
    """A loss; its class is called with the run's ObjectiveOptions."""

    fuses_pairs: bool = False
    """Whether photos of a batch are fused with several candidate texts. Each photo then needs a wrong text."""
    needs_wrong_photos: bool = False
    """Whether each text of a batch needs a wrong photo too."""
    uses_unpaired: bool = False
    """Whether it uses photos and texts without pairing."""
    has_teacher: bool = False
    """Whether its `fit` gets the training pairs' vectors before the first step."""
    contrasts: bool = False
    """Whether it contrasts photos with all that searches in a batch, by scores alone: it then trains composed queries
    too."""
    needs_media: bool = False
    """Whether it is over items of several media."""
    needs_match_head: bool = False
    """Whether the fusion needs a head for image-text matching."""
    trains_only_pairs: bool = False
    """Whether it trains the vectors of fused pairs alone. A gallery with null text then means nothing, unless another
    objective trains it."""


_LOSSES = "saffe_cache.fusion.losses"

OBJECTIVES: Mapping[str, ObjectiveEntry] = {
    "info_nce": ObjectiveEntry(
        made_by=f"{_LOSSES}:InfoNce", summary="Contrast photos and texts of a batch (CLIP).", contrasts=True
    ),
    "query_nce": ObjectiveEntry(
        made_by=f"{_LOSSES}:QueryNce",
        summary="The same in one direction: each text, or composed query, against the photos.",
        contrasts=True,
    ),
    "siglip": ObjectiveEntry(
        made_by=f"{_LOSSES}:Siglip", summary="A yes-or-no question for each pair (SigLIP).", contrasts=True
    ),
    "sail": ObjectiveEntry(
        made_by=f"{_VECTORS}.sail:Sail",
        summary="siglip as a mean, with a bias that fits the batch size (SAIL).",
        contrasts=True,
    ),
    "media_alone": ObjectiveEntry(
        made_by=f"{_MEDIA}:MediaAlone",
        summary="info_nce of items of which one medium is shown, mean over the media.",
        needs_media=True,
    ),
    "soft_target": ObjectiveEntry(made_by=f"{_LOSSES}:SoftTarget", summary="The released SAFFE code's loss."),
    "pair": ObjectiveEntry(
        made_by=f"{_LOSSES}:Pair",
        summary="A photo's own text against wrong ones, each fused with the photo.",
        fuses_pairs=True,
        trains_only_pairs=True,
    ),
    "matching": ObjectiveEntry(
        made_by=f"{_LOSSES}:Matching",
        summary="Image-text matching with a head of its own (ALBEF).",
        fuses_pairs=True,
        needs_wrong_photos=True,
        needs_match_head=True,
    ),
    "structure": ObjectiveEntry(
        made_by=f"{_VECTORS}.structure:Structure",
        summary="Keep each side's neighbourhoods (STRUCTURE); added to a contrast.",
        uses_unpaired=True,
    ),
    "structure_published": ObjectiveEntry(
        made_by=f"{_VECTORS}.structure:PublishedStructure",
        summary="The same as the paper's code computes it.",
        uses_unpaired=True,
    ),
    "transport": ObjectiveEntry(
        made_by=f"{_VECTORS}.sotalign:Transport",
        summary="Match photos and texts as a closed-form teacher does, without their pairing (SOTAlign).",
        uses_unpaired=True,
        has_teacher=True,
    ),
}
