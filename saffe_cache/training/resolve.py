"""Resolve the options of a training for a cache: encoders, layers, the fusion's shape, defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from saffe_cache.core.features import CacheError, hidden_states_index
from saffe_cache.core.options import refuse
from saffe_cache.fusion.options import FusionShape, ModelOptions, ObjectiveOptions
from saffe_cache.fusion.registry import FUSIONS, OBJECTIVES
from saffe_cache.inputs.media import media_shapes
from saffe_cache.inputs.pairs import VALIDATION_SPLITS, gallery_modality, pair_kind, training_pairs
from saffe_cache.inputs.spec import RunSpec, SplitOptions
from saffe_cache.store.joined import MEDIA, JoinedEncoder, join_media, joined_key
from saffe_cache.store.reader import Cache, EncoderCache
from saffe_cache.training.config import TrainConfig

_OF_MEDIA: Mapping[str, Any] = {"modality_dropout": 0.3, "regroup": True}
"""Defaults where several media are fused."""


def resolve_run(config: TrainConfig, cache: Cache) -> RunSpec:
    """Fill in what the config leaves to the fusion or to the cache.

    Raises:
        CacheError, ValueError: the cache lacks what is requested.
    """
    config = with_pairs(config, cache)
    gallery = _gallery(config, cache)
    text = cache.encoder("text", config.encoder.get("text"))
    layers = _choose_layers(config, gallery, text)
    validation = config.validation
    if validation == "auto":
        present = set(cache.table.splits)
        validation = next((name for name in VALIDATION_SPLITS if name in present), "heldout")
    gallery_text = config.gallery_text or config.entry.gallery_text
    objective = {} if config.entry.is_closed_form else dict(config.objective or config.entry.objective)
    draws_views = config.train_views == "all" and not config.entry.is_closed_form
    temperature = config.entry.temperature if config.temperature is None else config.temperature
    objective_options = {"objective": objective, "temperature": temperature, "mixup": config.recipe.mixup or None}
    if config.media:
        objective_options |= {name: value for name, value in _OF_MEDIA.items() if getattr(config, name) is None}
    pairs = pair_kind(cache.table) if config.pairs == "auto" else config.pairs
    fuses = gallery_text != "null" or pairs == "composed"
    spec = RunSpec(
        **(_options(config, SplitOptions) | {"validation": validation}),
        **(_options(config, ObjectiveOptions) | objective_options),
        gallery_key=gallery.key,
        media={name: one.key for name, one in gallery.encoders.items()} if isinstance(gallery, JoinedEncoder) else {},
        text_key=text.key,
        gallery_layers=layers.gallery,
        views=gallery.views(layers.gallery) if draws_views else (),
        text_layers=layers.text,
        pairs=pairs,
        seed=config.seed if config.data_seed is None else config.data_seed,
        shape=_shape(config, gallery, text, layers, objective, fuses=fuses),
        gallery_text=gallery_text,
    )
    _check_supported(config, objective)
    _check_media(spec)
    _check_together(spec)
    _check_composed(spec)
    return _with_mixup(spec, config, cache)


def _gallery(config: TrainConfig, cache: Cache) -> EncoderCache:
    """The encoder of the gallery: of photos, sounds or videos, or of several media of an item joined.

    Raises:
        CacheError: the cache lacks one, or its extraction is unfinished.
    """
    if not config.media:
        modality = gallery_modality(cache) if config.gallery == "auto" else config.gallery
        return cache.encoder(modality, config.encoder.get(modality))  # type: ignore[arg-type]
    keys = {name: cache.encoder(name, config.encoder.get(name)).key for name in MEDIA if name in config.media}
    return join_media(cache, keys).encoders[joined_key(keys)]


def with_pairs(config: TrainConfig, cache: Cache) -> TrainConfig:
    """The config, in which auto is composed if the split that is trained on has such queries."""
    if config.pairs == "auto" and len(cache.table.queries_in(config.train_split)):
        return replace(config, pairs="composed")
    return config


def _options(config: TrainConfig, group: type[SplitOptions | ObjectiveOptions | ModelOptions]) -> dict[str, Any]:
    """The config's values of one group of options."""
    return {one.name: getattr(config, one.name) for one in fields(group)}


class _Layers(NamedTuple):
    """The hidden states that a run reads, and the number of blocks that it runs from there."""

    gallery: tuple[int, ...]
    text: tuple[int, ...] = ()
    num_blocks: int = 0


def _shape(
    config: TrainConfig,
    gallery: EncoderCache,
    text: EncoderCache,
    layers: _Layers,
    objective: Mapping[str, float],
    *,
    fuses: bool,
) -> FusionShape:
    entry, text_rms = config.entry, 1.0
    if layers.num_blocks and entry.reads_text_tokens:
        numbers = text.statistics(f"hidden_states/{layers.text[0]}")
        text_rms = math.hypot(numbers.mean, numbers.std)
    adds_text = fuses and entry.pooled_text
    defaults = {
        "fusion": config.chosen_fusion,
        "head": config.head or entry.head,
        "share_decoder": entry.share_decoder if config.share_decoder is None else config.share_decoder,
        "dropout": entry.dropout if config.dropout is None else config.dropout,
        "pooled_text": adds_text if config.pooled_text is None else config.pooled_text,
    }
    media = media_shapes(gallery, layers.gallery)
    return FusionShape(
        **(_options(config, ModelOptions) | defaults),
        num_layers=len(layers.gallery),
        hidden_size=max(one.hidden_size for one in media) if media else _shape_of(gallery, layers.gallery[0])[-1],
        num_tokens=gallery.num_tokens(layers.gallery[0]),
        media=media,
        text_hidden_size=text.manifest.hidden_size,
        text_size=text.array(text.manifest.vector).spec.row_shape[0],
        maps_queries=entry.maps_queries,
        matches=any(OBJECTIVES[name].needs_match_head for name in objective),
        num_blocks=layers.num_blocks,
        text_rms=text_rms,
        has_class_token=gallery.manifest.class_tokens > 0,
    )


_STRUCTURE = ("structure", "structure_published")
_OF_LOSSES = {
    "temperature": ("info_nce", "query_nce"),
    "structure_levels": _STRUCTURE,
    "structure_diagonal": ("structure",),
    "structure_warmup": _STRUCTURE,
}
"""Losses that an option is for."""


def _check_supported(config: TrainConfig, objective: Mapping[str, float]) -> None:
    """Raise ValueError if an option is given that the fusion, or no loss of the objective, has."""
    given = {
        "head": config.head is not None,
        "query_side": config.query_side != ModelOptions.query_side,
        "share_decoder": bool(config.share_decoder),
        "freeze_decoder": config.freeze_decoder,
        "pooled_text": bool(config.pooled_text),
    }
    for option, is_given in given.items():
        if is_given and option not in config.entry.options:
            refuse(option, getattr(config, option), f"nothing: {config.chosen_fusion} has no such option")
    for option, losses in _OF_LOSSES.items():
        value, usual = getattr(config, option), getattr(ObjectiveOptions, option)
        if value != usual and not any(name in objective for name in losses):
            trained = ", ".join(objective) or "no loss"
            refuse(option, f"{value} with {trained}", f"this option only with --objective {' or '.join(losses)}")


def _check_together(spec: RunSpec) -> None:
    """Raise ValueError if two options exclude each other."""
    shape, entry, has_text = spec.shape, spec.shape.entry, spec.gallery_text != "null"
    fuses = has_text or spec.pairs == "composed"
    over_pairs = ", ".join(name for name in spec.objective if OBJECTIVES[name].fuses_pairs)
    if over_pairs and not shape.takes_text:
        refuse("objective", over_pairs, f"no objective over fused pairs: {shape.fusion} takes no text")
    if spec.pairs == "captions" and spec.trains_only_pairs:
        before = "info_nce=1 too: captions search with null text before pairs are scored"
        refuse("objective", f"{over_pairs} alone", before)
    if spec.pairs == "classes" and spec.gallery_text == "first_caption":
        answer = "null: a class paired with its item is the answer itself"
        refuse("gallery_text", "first_caption with classes", answer)
    if not fuses and not over_pairs and shape.pooled_text:
        refuse("pooled_text", "yes", "no: no text is fused in training")
    if entry.without_text and not fuses and not any(name in spec.objective for name in entry.text_objectives):
        others = f"--gallery-text first_caption, or --fusion {entry.without_text}"
        refuse("fusion", f"{shape.fusion} with null text", others)
    if shape.head == "flatten" and entry.has_decoder and shape.query_side == "text":
        refuse("head", "flatten", "attention or mean: texts differ in length")
    if shape.head == "flatten" and not shape.num_tokens:
        refuse("head", "flatten", "attention or mean: sounds differ in length")
    if shape.head != "attention" and entry.text_in_head == "always":
        refuse("head", shape.head, f"attention: {shape.fusion} shows the text to that head's MLP")
    if spec.unpaired is not None:
        able = [name for name, of in OBJECTIVES.items() if of.uses_unpaired]
        if not any(name in able for name in spec.objective):
            refuse("unpaired", spec.unpaired, f"none, or --objective {' or '.join(able)}: no other term uses it")
        if spec.unpaired in (spec.train_split, spec.validation):
            refuse("unpaired", spec.unpaired, "a split that neither trains nor validates, or rest")
    if not has_text and spec.text_dropout:
        refuse("text_dropout", spec.text_dropout, "0: no text is paired with the items")


def _check_composed(spec: RunSpec) -> None:
    """Raise ValueError if composed queries exclude an option, or a fusion is made for them alone."""
    shape, entry = spec.shape, spec.shape.entry
    if spec.pairs != "composed":
        if entry.for_composed:
            refuse("fusion", f"{shape.fusion} with --pairs {spec.pairs}", "--pairs composed: photo and text search")
        if spec.caption_weight != ObjectiveOptions.caption_weight:
            refuse("caption_weight", spec.caption_weight, "this option only with --pairs composed")
        return
    others = [name for name in spec.objective if not OBJECTIVES[name].contrasts]
    able = " or ".join(name for name, of in OBJECTIVES.items() if of.contrasts)
    for option, value, expected in (
        ("gallery_text", spec.gallery_text != "null" and spec.gallery_text, "null: photo and text are the query"),
        ("objective", ", ".join(others), f"{able}: others need a text for each item"),
        ("fusion", entry.is_closed_form and shape.fusion, "one that is trained: closed forms fit items to texts"),
        ("fusion", not shape.takes_text and f"{shape.fusion} without --pooled-text", "one that fuses photo and text"),
        ("unpaired", spec.unpaired, "none: no loss of composed queries uses it"),
    ):
        if value:
            refuse(option, f"{value} with --pairs composed", expected)


def _check_media(spec: RunSpec) -> None:
    """Raise ValueError if several media exclude an option, or one that is for them is given without."""
    shape, of_media = spec.shape, [name for name in spec.objective if OBJECTIVES[name].needs_media]
    if not spec.media:
        several = "several media: --gallery image+audio"
        for option, value in (
            ("fusion", shape.entry.for_media and shape.fusion),
            ("objective", ", ".join(of_media)),
            *((name, getattr(spec, name)) for name in _OF_MEDIA),
        ):
            if value not in (None, False, ""):
                refuse(option, f"{value} with one medium", several)
        return
    able = " or ".join(name for name, entry in FUSIONS.items() if entry.for_media)
    gallery = "+".join(spec.media)
    for option, value, expected in (
        ("fusion", not shape.entry.for_media and shape.fusion, f"{able}: others read one medium"),
        ("pairs", spec.pairs == "composed" and spec.pairs, "captions or classes: composed queries have one photo"),
        ("gallery_text", spec.gallery_text != "null" and spec.gallery_text, "null: no text enters fused media"),
        ("unpaired", spec.unpaired, "none: no loss of fused media uses it"),
    ):
        if value:
            refuse(option, f"{value} with --gallery {gallery}", expected)


def _with_mixup(spec: RunSpec, config: TrainConfig, cache: Cache) -> RunSpec:
    """The spec without the mixing of pairs where they cannot be mixed, or where the recipe does not mix so few.

    Raises:
        ValueError: it is asked for, and they cannot be mixed.
    """
    found, expected = _why_not_mixed(spec) or ("", "")
    if expected and config.mixup:
        refuse("mixup", f"{config.mixup} {found}", f"0{expected}")
    least = config.entry.mixes_from if spec.mixup and config.mixup is None else 0
    if expected or (least and len(training_pairs(spec, cache).training) < least):
        return replace(spec, mixup=None)
    return spec


def _why_not_mixed(spec: RunSpec) -> tuple[str, str] | None:
    """With what pairs cannot be mixed, and why or with what they could; None if they can, or are not."""
    if not spec.mixup:
        return None
    if spec.pairs == "composed":
        return "with --pairs composed", ": composed queries cannot be mixed"
    if spec.media:
        return f"with --gallery {'+'.join(spec.media)}", ": items of several media cannot be mixed"
    if spec.gallery_text != "null":
        return f"with --gallery-text {spec.gallery_text}", ": paired texts cannot be mixed"
    if spec.shape.entry.query_tokens:
        return f"with {spec.shape.fusion}", ": it reads texts token by token, which differ in length"
    if spec.fuses_pairs:
        over_pairs = ", ".join(name for name in spec.objective if OBJECTIVES[name].fuses_pairs)
        return f"with {over_pairs}", ": these objectives fuse items with whole texts"
    if spec.shape.entry.reads == "tokens" and not spec.shape.num_tokens:
        others = ", ".join(name for name, entry in FUSIONS.items() if entry.reads == "summary")
        return "of tokens", f", or --fusion {others}: these sounds differ in length"
    return None


def _choose_layers(config: TrainConfig, gallery: EncoderCache, text: EncoderCache) -> _Layers:
    """
    Raises:
        CacheError: the cache lacks a layer or the block that follows it, or the encoder has no blocks.
        ValueError: several text layers are given to a fusion that continues the text encoder from one.
    """
    if isinstance(gallery, JoinedEncoder):
        return _Layers(_joined_layers(config, gallery))
    if gallery.manifest.has_feature_maps and config.entry.needs_gallery_blocks:
        others = ", ".join(name for name, entry in FUSIONS.items() if not entry.needs_gallery_blocks)
        raise CacheError(
            f"{gallery.key}: its hidden states are feature maps, which differ in shape from layer to layer; --fusion "
            f"{config.chosen_fusion} needs the block that follows a layer. Use another encoder, or one of --fusion "
            f"{others}."
        )
    needing = {"none": (), "text": (text,), "one_text": (text,)}.get(config.entry.blocks, (gallery, text))
    for encoder in needing:
        if encoder.manifest.selected_tokens != "all":
            without = ", ".join(name for name, entry in FUSIONS.items() if entry.blocks == "none")
            raise CacheError(
                f"{encoder.key}: it was extracted with --tokens {encoder.manifest.selected_tokens}; --fusion "
                f"{config.chosen_fusion} runs an encoder's blocks, which need all tokens. Extract with --tokens "
                f"{encoder.manifest.modality}=all, or use one of --fusion {without}."
            )
    match config.entry.blocks:
        case "none":
            return _Layers(_layers_of(config, gallery, gallery.layers))
        case "paired":
            layers = _layers_of(config, gallery, _before_blocks(gallery))
            text_layers = _layers_of(config, text, _before_blocks(text))[-len(layers) :]
            return _Layers(layers[-len(text_layers) :], text_layers)
        case "text":
            first = _first_layer(config, text)
            return _Layers(_layers_of(config, gallery, gallery.layers), (first,), text.manifest.num_layers - first)
        case "one_text":
            chosen = _layers_of(config, text, text.block_layers, text.block_layers[-1:])
            if len(chosen) != 1:
                refuse("layers", f"text={','.join(map(str, chosen))}", "one: the block that follows it runs")
            return _Layers(_layers_of(config, gallery, gallery.layers), chosen, 1)
        case "both":
            first, depth = _first_layer(config, text), gallery.manifest.num_layers
            begins = depth - (text.manifest.num_layers - first)  # so that both encoders end together
            default = [layer for layer in (begins, depth) if layer in gallery.layers]
            layers = _layers_of(config, gallery, gallery.layers, default)
            num_blocks = min(depth - layers[0], text.manifest.num_layers - first)
            if num_blocks < 2:
                expected = "layers followed by two blocks or more: with one, nothing passes between the encoders"
                refuse("layers", f"image={layers[0]} and text={first}", expected)
            _check_blocks(config, gallery, layers[0], num_blocks)
            return _Layers(layers, (first,), num_blocks)


def _joined_layers(config: TrainConfig, gallery: JoinedEncoder) -> tuple[int, ...]:
    """The layers of all media, in the order of the media."""
    chosen = {name: _layers_of(config, one, one.layers) for name, one in gallery.encoders.items()}
    return tuple(gallery.layer(name, layer) for name, layers in chosen.items() for layer in layers)


def _layers_of(
    config: TrainConfig, encoder: EncoderCache, usable: Sequence[int], default: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The given layers; by default all usable ones whose tokens have the shape of the last one's.

    Raises:
        CacheError: a layer is not usable, or shapes differ.
    """
    given = config.layers.get(encoder.manifest.modality)
    if given is None:
        chosen = tuple(_of_last_shape(encoder, usable) if default is None else default)
    else:
        chosen = tuple(hidden_states_index(layer, config.index_convention) for layer in given)
    if config.entry.continues_text:  # which read the last or the first of them
        chosen = tuple(sorted(chosen))
    wrong = [layer for layer in chosen if layer not in usable]
    if wrong or not chosen:
        why = "" if encoder.layers == usable else " (it needs the block that follows a layer)"
        unusable = encoder.manifest.unusable_blocks
        if refused := [layer for layer in wrong or encoder.layers if layer in unusable]:
            raise CacheError(
                f"{encoder.key}: --fusion {config.chosen_fusion} runs its block {refused[0]}, which cannot be used: "
                f"{unusable[refused[0]]}. Use another layer, another --fusion, or another encoder."
            )
        raise CacheError(
            f"{encoder.key}: --fusion {config.chosen_fusion} can use layers {list(usable)}{why}, "
            f"{f'requested {list(chosen)}' if given else 'found none'}. "
            f"Add layers with saffe extract --layers {encoder.manifest.modality}=…."
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
    """The layers with the last one's shape: all layers, except for a CNN, whose stages differ in shape."""
    if not encoder.manifest.has_feature_maps:
        return layers
    return [layer for layer in layers if _shape_of(encoder, layer) == _shape_of(encoder, layers[-1])]


def _shape_of(encoder: EncoderCache, layer: int) -> tuple[int, ...]:
    """Shape of a row: of a photo, tokens and their width."""
    return encoder.array(f"hidden_states/{layer}").spec.row_shape


def _before_blocks(encoder: EncoderCache) -> list[int]:
    """Cached layers whose block is cached too; a language model has blocks also of layers that are not."""
    return [layer for layer in encoder.block_layers if layer in encoder.layers]


def _first_layer(config: TrainConfig, text: EncoderCache) -> int:
    """The layer that the text encoder continues from: the given one, or the first cached one of its upper half."""
    half, depth = text.manifest.num_layers // 2, text.manifest.num_layers
    usable = _before_blocks(text)
    chosen = _layers_of(config, text, usable, [layer for layer in usable if layer >= half][:1])
    if len(chosen) != 1:
        refuse("layers", f"text={','.join(map(str, chosen))}", "one: the text encoder continues from it")
    _check_blocks(config, text, chosen[0], depth - chosen[0])
    return chosen[0]


def _check_blocks(config: TrainConfig, encoder: EncoderCache, first: int, count: int) -> None:
    """Raise CacheError if the cache lacks one of the blocks from a layer on."""
    missing = [layer for layer in range(first, first + count) if layer not in encoder.block_layers]
    if missing:
        raise CacheError(
            f"{encoder.key}: --fusion {config.chosen_fusion} runs the blocks from layer {first}, found "
            f"{encoder.block_layers}, expected {missing} too. Add them with "
            f"saffe extract --layers {encoder.manifest.modality}={','.join(map(str, missing))}."
        )
