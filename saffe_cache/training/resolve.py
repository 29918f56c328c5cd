"""What a training is asked for, and what that means for the cache at hand: encoders, layers, shape, defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import MODALITIES, CacheError, IndexConvention, hidden_states_index
from saffe_cache.core.options import require, require_keys, require_seed
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.fusion.shape import FAM, FamShape, HeadName, QuerySide
from saffe_cache.inputs.pairs import VALIDATION_SPLITS, PairKind, gallery_modality, pair_kind
from saffe_cache.inputs.spec import GalleryText, RunSpec
from saffe_cache.store.reader import Cache, EncoderCache
from saffe_cache.training.loop import FitOptions, StartName
from saffe_cache.training.objective import OVER_PAIRS, TermName, TermOptions


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a FusionAlign Module from a cache.

    The same command resumes a killed run where it was, and does nothing for a finished one.
    """

    cache: str
    """The cache, as saffe-extract wrote it."""
    out: str
    """Folder of the run."""
    fusion: str = "reuse"
    """reuse: the encoder's next block with a gated cross-attention to the other modality. paper: the SAFFE paper's eq.
    1-4. reference: what its released code computes, to be looked at. linear: no attention; a text beside the photo
    enters as its own vector. concat: the same, and the head's MLP sees that vector too. From elsewhere: late, hadamard,
    two_tower, mbt, flamingo, limber, magma, deep_insert, albef."""
    head: HeadName | None = None
    """How tokens become a vector. attention: pooled by learned queries. mean: their mean. flatten: all tokens into one
    linear map, as in the paper. Default: attention; flatten for reference."""
    query_side: QuerySide = "gallery"
    """Whose tokens ask in a decoder's cross-attention: the gallery's (photos) or the text's."""
    share_decoder: bool | None = None
    """One decoder for all layers instead of one each. Default: no; yes for reference."""
    freeze_decoder: bool = False
    """Train the head alone, the decoder stays as the encoders' blocks made it (the paper's partially aligned case)."""
    pooled_text: bool | None = None
    """Add the vector of a text beside the photo, mapped, to the output. Default: yes where there are such texts, but
    no for paper and reference."""
    gallery_text: GalleryText | None = None
    """What lies beside a photo in training and in the gallery. null: nothing. first_caption: the item's first caption;
    the others are what is searched with. matched: one of the texts that are searched with, as the SAFFE release
    trains; such a model learns to copy the text. It is validated and indexed with null text, so that the weights that
    are kept are often those from before it learned that. Default: null; matched for reference."""
    text_dropout: float = 0.0
    """Part of the texts beside photos that are replaced by the null text, 0 to 1."""
    objective: Mapping[str, float] = field(default_factory=dict)
    """Weighted sum of losses, as info_nce=1 and pair=0.5: info_nce, siglip, soft_target (the SAFFE release's), pair
    (own text against wrong ones, each fused with the photo), matching (image-text matching on a head of its own).
    Default: info_nce=1; soft_target=1 for reference, siglip=1 for two_tower, info_nce=1 and matching=1 for albef."""
    negatives: int = 9
    """Wrong texts of a photo in pair, half of them the most alike."""
    pair_photos: int = 64
    """Photos of a batch that pair and matching look at."""
    control_epochs: int = 2
    """Epochs of the control, which is trained on permuted pairs; 0 for none, and the report will say so."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers to train on, as image=11,12 (and text=5 where text tokens enter). Default: all that the fusion can use, of
    a CNN its last stage; of texts whose encoder runs on from one layer, the first of its upper half that is cached."""
    index_convention: IndexConvention = "hidden_states"
    """How --layers counts. hidden_states, and the same in the SAFFE release (reference): i is the input of block i.
    paper: l is the output of its layer l, which is hidden_states l + 1."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder, as image=PART-OF-KEY or image=ID, where the cache has several of a modality."""
    pairs: Literal["auto", "captions", "classes"] = "auto"
    """What describes an item: its captions, or its classes' names. auto: captions where there are any."""
    train_split: str = "train"
    """Split to train on."""
    validation: str = "auto"
    """Where the best epoch is chosen: a split's name, or heldout for a part of the train split by photo.
    auto: dev, val, valid or validation where there is one, else heldout."""
    validation_fraction: float = 0.1
    """Part of the train split that heldout takes, 0 to 1."""
    train_fraction: float = 1.0
    """Part of the photos that are left to train on, above 0 to 1. A smaller part lies within a larger one of the same
    seed; what is held out stays the same."""
    start: StartName = "ridge"
    """What the attention head starts as. ridge: the ridge regression of the photos to their texts. random: weights
    drawn at random, as those of the other heads."""
    epochs: int = 20
    """Passes over the photos; 0 keeps the start as it is."""
    batch_size: int = 512
    """Photos in a batch, each with all its texts; smaller where there are fewer than 8 such batches."""
    learning_rate: float = 2e-3
    """Peak of AdamW's learning rate."""
    weight_decay: float = 0.05
    """AdamW's, on matrices."""
    warmup: float = 0.1
    """Part of the steps with a rising learning rate; a cosine to 2 % follows."""
    dropout: float = 0.5
    """In the head and the query map, 0 to 1."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    patience: int = 8
    """Stop after so many epochs without a better validation score."""
    seed: int = 0
    """Seed of the starting weights and of dropout."""
    data_seed: int | None = None
    """Seed of the order of photos and of what is held out; runs that share it can be trained side by side from the
    same batches. Default: the same as --seed."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda."""
    residency: Literal["auto", "device", "memory", "mapped", "streamed"] = "auto"
    """Where hidden states lie while training. device: in the accelerator's memory. memory: in main memory. mapped: in
    the cache's files. streamed: window after window of shards, for caches that are compressed or behind a URL; photos
    are then shuffled within a window. auto: the first of these that has room; on a CPU mapped, which is as fast."""
    checkpoint_seconds: float = 60.0
    """Time between states that a killed run resumes from."""
    tensorboard: bool = True
    """Also log to TensorBoard, where it is installed."""

    def __post_init__(self) -> None:
        require_keys("layers", self.layers, MODALITIES)
        require_keys("encoder", self.encoder, MODALITIES)
        require_keys("objective", self.objective, get_args(TermName))
        require(self.fusion in FUSIONS, "fusion", self.fusion, " or ".join(FUSIONS))
        has_tokens = FUSIONS[self.fusion].blocks != "none"
        require(has_tokens or "text" not in self.layers, "layers", "text=…", f"no text: {self.fusion} takes no tokens")
        for name, layers in self.layers.items():
            require(len(set(layers)) == len(layers), "layers", f"{name}={layers}", "each layer once")
        require(self.validation != self.train_split, "validation", self.validation, "another split, or heldout")
        for name, weight in self.objective.items():
            require(0 < weight < math.inf, "objective", f"{name}={weight}", "a weight above 0")
        require(0 < self.train_fraction <= 1, "train_fraction", self.train_fraction, "a fraction above 0, to 1")
        for option in ("batch_size", "learning_rate", "clip", "patience", "negatives", "pair_photos"):
            require(0 < getattr(self, option) < math.inf, option, getattr(self, option), "a number above 0")
        for option in ("validation_fraction", "warmup", "dropout", "text_dropout"):
            require(0 <= getattr(self, option) < 1, option, getattr(self, option), "a fraction from 0 to below 1")
        for option in ("seed", "data_seed"):
            require_seed(option, getattr(self, option) or 0)
        for option in ("epochs", "weight_decay", "checkpoint_seconds", "control_epochs"):
            require(getattr(self, option) >= 0, option, getattr(self, option), "0 or more")


def resolve_run(config: TrainConfig, cache: Cache) -> RunSpec:
    """Fill in what the config leaves to the cache: encoders, layers, kind of pairs, validation.

    Raises:
        CacheError, ValueError: the cache lacks what is asked for.
    """
    modality = gallery_modality(cache)
    gallery = cache.encoder(modality, config.encoder.get(modality))
    text = cache.encoder("text", config.encoder.get("text"))
    layers = _choose_layers(config, gallery, text)
    validation = config.validation
    if validation == "auto":
        present = set(cache.table.splits)
        validation = next((name for name in VALIDATION_SPLITS if name in present), "heldout")
    kind: PairKind = pair_kind(cache.table) if config.pairs == "auto" else config.pairs
    gallery_text = config.gallery_text or ("matched" if config.fusion == "reference" else "null")
    spec = RunSpec(
        gallery_key=gallery.key,
        text_key=text.key,
        gallery_layers=layers.gallery,
        text_layers=layers.text,
        pairs=kind,
        train_split=config.train_split,
        validation=validation,
        validation_fraction=config.validation_fraction,
        train_fraction=config.train_fraction,
        seed=config.seed if config.data_seed is None else config.data_seed,
        shape=_shape(config, gallery, text, layers, gallery_text),
        gallery_text=gallery_text,
        trains_pairs=any(name in OVER_PAIRS for name in _objective(config)),
        pairs_alone=set(_objective(config)) == {"pair"},
        sees_null=gallery_text == "null" or config.text_dropout > 0,
    )
    _check_together(config, spec)
    return spec


@dataclass(frozen=True)
class _Layers:
    """Which hidden states a run reads, and how many blocks it runs behind them."""

    gallery: tuple[int, ...]
    text: tuple[int, ...] = ()
    num_blocks: int = 0


def _shape(
    config: TrainConfig, gallery: EncoderCache, text: EncoderCache, layers: _Layers, gallery_text: GalleryText
) -> FamShape:
    tokens, hidden_size = gallery.array(f"hidden_states/{layers.gallery[0]}").row_shape
    is_reference = config.fusion == "reference"
    adds_text = gallery_text != "null" and config.fusion not in _WITHOUT_ADDED_TEXT
    return FamShape(
        fusion=config.fusion,
        head=config.head or ("flatten" if is_reference else "attention"),
        num_layers=len(layers.gallery),
        hidden_size=hidden_size,
        num_tokens=tokens,
        text_hidden_size=text.manifest.hidden_size,
        text_size=text.array(text.manifest.vector).row_shape[0],
        query_side=config.query_side,
        shares_decoder=is_reference if config.share_decoder is None else config.share_decoder,
        freezes_decoder=config.freeze_decoder,
        adds_text=adds_text if config.pooled_text is None else config.pooled_text,
        maps_queries=not is_reference,
        matches="matching" in _objective(config),
        dropout=config.dropout,
        num_blocks=layers.num_blocks,
        text_rms=_root_mean_square(text, layers.text[0]) if layers.num_blocks else 1.0,
        has_class_token=not gallery.manifest.has_feature_maps,
    )


_WITHOUT_ADDED_TEXT = ("reference", "paper", "two_tower")
"""Unless asked for, in the release and in the paper; two towers average their vectors."""


def _root_mean_square(encoder: EncoderCache, layer: int) -> float:
    """Of a layer's numbers."""
    found = encoder.statistics(f"hidden_states/{layer}")
    return math.hypot(found.mean, found.std)


def _check_together(config: TrainConfig, spec: RunSpec) -> None:
    """
    Raises:
        ValueError: two options exclude each other.
    """
    shape, objective = spec.shape, _objective(config)
    over_pairs = ", ".join(name for name in OVER_PAIRS if name in objective)
    require(
        shape.takes_text or not over_pairs, "objective", over_pairs, f"no term over pairs: {shape.fusion} takes no text"
    )
    require(
        spec.pairs == "classes" or not spec.pairs_alone,
        *("objective", "pair alone", "info_nce=1 beside it: captions search with null text before pairs are scored"),
    )
    require(
        spec.pairs == "captions" or spec.gallery_text != "first_caption",
        *("gallery_text", "first_caption with classes", "null: a class beside the photo is the answer itself"),
    )
    trains_text = spec.gallery_text != "null" or over_pairs
    require(not shape.adds_text or bool(trains_text), "pooled_text", "yes", "no: no text is fused in training")
    require(
        shape.fusion != "concat" or bool(trains_text),
        *("fusion", "concat with null text", "--gallery-text first_caption, or --fusion linear"),
    )
    require(
        shape.fusion != "hadamard" or spec.gallery_text != "null" or "pair" in objective,
        *("fusion", "hadamard with null text", "--gallery-text first_caption, or --fusion late"),
    )
    for option, given in (
        ("query_side", config.query_side != "gallery"),
        ("share_decoder", bool(config.share_decoder)),
        ("freeze_decoder", config.freeze_decoder),
    ):
        require(shape.has_decoder or not given, option, getattr(config, option), f"nothing: {shape.fusion} has none")
    require(config.head is None or shape.fusion in FAM, "head", config.head, f"nothing: {shape.fusion} has its own")
    require(
        shape.fusion != "two_tower" or not shape.adds_text, "pooled_text", "yes", "no: two_tower averages its towers"
    )
    varies = shape.has_decoder and shape.query_side == "text"
    require(shape.head != "flatten" or not varies, "head", "flatten", "attention or mean: texts differ in length")
    require(shape.fusion != "concat" or shape.head == "attention", "head", shape.head, "attention: concat is its MLP's")
    require(
        spec.gallery_text != "null" or config.text_dropout == 0,
        *("text_dropout", config.text_dropout, "0: there is no text beside the photos"),
    )


def _choose_layers(config: TrainConfig, gallery: EncoderCache, text: EncoderCache) -> _Layers:
    """
    Raises:
        CacheError: the cache lacks a layer, or the block behind one; or the encoder has no blocks.
        ValueError: several layers of the text are given where one is where a fusion begins.
    """
    if gallery.manifest.has_feature_maps and not _runs_without_blocks(config.fusion):
        raise CacheError(
            f"{gallery.key}: a convolutional encoder, whose layers have no queries, keys and values; --fusion "
            f"{config.fusion} needs the block behind a layer. Use another encoder, or one of --fusion "
            f"{', '.join(filter(_runs_without_blocks, FUSIONS))}."
        )
    match FUSIONS[config.fusion].blocks:
        case "none":
            return _Layers(_layers_of(config, gallery, gallery.layers))
        case "paired":
            layers = _layers_of(config, gallery, gallery.block_layers)
            text_layers = _layers_of(config, text, text.block_layers)[-len(layers) :]
            return _Layers(layers[-len(text_layers) :], text_layers)
        case "text":
            first = _first_layer(config, text)
            return _Layers(_layers_of(config, gallery, gallery.layers), (first,), text.manifest.num_layers - first)
        case "both":
            first, depth = _first_layer(config, text), gallery.manifest.num_layers
            begins = depth - (text.manifest.num_layers - first)  # so that both encoders end together
            default = [layer for layer in (begins, depth) if layer in gallery.layers]
            layers = _layers_of(config, gallery, gallery.layers, default)
            num_blocks = min(depth - layers[0], text.manifest.num_layers - first)
            expected = "layers with two blocks or more behind them: with one nothing passes between the encoders"
            require(num_blocks > 1, "layers", f"image={layers[0]} and text={first}", expected)
            _check_blocks(config, gallery, layers[0], num_blocks)
            return _Layers(layers, (first,), num_blocks)


def _runs_without_blocks(fusion: str) -> bool:
    """Whether it needs no block of the gallery's encoder."""
    return FUSIONS[fusion].blocks in ("none", "text")


def _layers_of(
    config: TrainConfig, encoder: EncoderCache, usable: Sequence[int], default: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The layers given, or by default all that are usable and whose tokens are as many and as wide as the last one's.

    Raises:
        CacheError: some of them are not usable, or not of one shape.
    """
    given = config.layers.get(encoder.manifest.modality)
    if given is None:
        chosen = tuple(_of_last_shape(encoder, usable) if default is None else default)
    else:
        chosen = tuple(hidden_states_index(layer, config.index_convention) for layer in given)
    if FUSIONS[config.fusion].blocks in ("text", "both"):  # which read the last or the first of them
        chosen = tuple(sorted(chosen))
    wrong = [layer for layer in chosen if layer not in usable]
    if wrong or not chosen:
        why = "" if encoder.layers == usable else " (it needs the block behind a layer)"
        raise CacheError(
            f"{encoder.key}: --fusion {config.fusion} can use layers {list(usable)}{why}, "
            f"{f'asked for {list(chosen)}' if given else 'none of them by default'}. "
            f"Add layers with saffe-extract --layers {encoder.manifest.modality}=…."
        )
    alike = _of_last_shape(encoder, chosen)
    if len(alike) < len(chosen):
        shapes = "; ".join(f"layer {layer}: {' x '.join(map(str, _shape_of(encoder, layer)))}" for layer in chosen)
        raise CacheError(
            f"{encoder.key}: layers that are fused together need equally many tokens of one width, found {shapes}. "
            f"Choose --layers {encoder.manifest.modality}={','.join(map(str, alike))}."
        )
    return chosen


def _of_last_shape(encoder: EncoderCache, layers: Sequence[int]) -> Sequence[int]:
    """Those of the layers with the last one's shape: all but for a CNN, whose stages have shapes of their own."""
    if not encoder.manifest.has_feature_maps:
        return layers
    return [layer for layer in layers if _shape_of(encoder, layer) == _shape_of(encoder, layers[-1])]


def _shape_of(encoder: EncoderCache, layer: int) -> tuple[int, ...]:
    """Of a photo's row: tokens and their width."""
    return encoder.array(f"hidden_states/{layer}").row_shape


def _first_layer(config: TrainConfig, text: EncoderCache) -> int:
    """Where the text encoder runs on from: the layer given, or the first of its upper half that is cached."""
    half, depth = text.manifest.num_layers // 2, text.manifest.num_layers
    chosen = _layers_of(config, text, text.block_layers, [layer for layer in text.block_layers if layer >= half][:1])
    require(len(chosen) == 1, "layers", f"text={','.join(map(str, chosen))}", "one: from it the text encoder runs on")
    _check_blocks(config, text, chosen[0], depth - chosen[0])
    return chosen[0]


def _check_blocks(config: TrainConfig, encoder: EncoderCache, first: int, count: int) -> None:
    """
    Raises:
        CacheError: the cache lacks one of the blocks from a layer on.
    """
    missing = [layer for layer in range(first, first + count) if layer not in encoder.block_layers]
    if missing:
        raise CacheError(
            f"{encoder.key}: --fusion {config.fusion} runs the blocks from layer {first} on, found "
            f"{encoder.block_layers}, expected {missing} too. Add them with "
            f"saffe-extract --layers {encoder.manifest.modality}={','.join(map(str, missing))}."
        )


def fit_options(config: TrainConfig) -> FitOptions:
    values = {one.name: getattr(config, one.name) for one in fields(FitOptions) if one.name != "device"}
    return FitOptions(**values, device=choose_device(config.device))


def term_options(config: TrainConfig) -> TermOptions:
    values = {one.name: getattr(config, one.name) for one in fields(TermOptions) if one.name != "objective"}
    return TermOptions(**values, objective=_objective(config))


def _objective(config: TrainConfig) -> Mapping[str, float]:
    return config.objective or FUSIONS[config.fusion].objective
