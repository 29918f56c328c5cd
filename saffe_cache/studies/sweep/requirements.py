"""What recipes require of a cache: layers and encoders, or else the command that adds them; and other storage types."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from saffe_cache.core.features import MODALITIES, CacheError, Modality, StorageType, hidden_states_index
from saffe_cache.extraction.config import ExtractConfig, config_from_json
from saffe_cache.store.config import ConvertConfig
from saffe_cache.store.exchange import convert_cache
from saffe_cache.store.manifest import content_hash
from saffe_cache.store.reader import Cache, EncoderCache
from saffe_cache.store.root import read_root
from saffe_cache.store.storage import Storage
from saffe_cache.training.config import TrainConfig

_OF_MODALITY: Mapping[str, tuple[str, ...]] = {
    "image": ("image_size", "decoding"),
    "video": ("video_frames",),
    "text": ("max_length", "prompt", "prompt_name", "position_offset"),
}
"""Options of an extraction that belong to one encoder; for another encoder of the modality they have their default."""
_SHOWN = ("data", "encoder", "revision", "column", "max_items", "image_size", "decoding", "max_length", "prompt",
          "prompt_name", "position_offset", "dtype", "attention", "splits", "class_prompt")  # fmt: skip
"""The options of a command, where they are not at their default."""


@dataclass
class _Lack:
    """Hidden states of one encoder that recipes need and a cache does not hold."""

    modality: Modality
    name: str
    """The encoder's key in the cache, or else the recipes' name."""
    encoder: EncoderCache | None
    """None if the cache does not hold it."""
    layers: set[int]
    """Empty where a recipe names no layers."""
    runs_on: bool = False
    """Whether a fusion runs the blocks from the first of these layers to the last, of an unknown number."""


def check_cache(cache: Cache, configs: Iterable[TrainConfig]) -> None:
    """
    Raises:
        CacheError: layers or encoders are missing; the message names all, with the commands that add them.
    """
    found: dict[tuple[str, str], _Lack] = {}
    for config in configs:
        for modality in (name for name in MODALITIES if name in config.layers or name in config.encoder):
            lack = _lack(cache, config, modality)
            if lack:
                known = found.setdefault((modality, lack.name), lack)
                known.layers |= lack.layers
                known.runs_on |= lack.runs_on
    if not found:
        return
    lacks = sorted(found.values(), key=lambda one: one.encoder is None)
    absent = [one for one in lacks if one.encoder is None]
    problems = [f"{one.name} lacks layers {_joined(one.layers)}" for one in lacks if one.encoder]
    problems += [f"it holds no {one.modality} encoder {one.name!r}" for one in absent]
    hints = [
        f" The fusion runs blocks of {one.name}: let --layers {one.modality} name all from its first to its last but "
        "one."
        for one in sorted(absent, key=lambda one: (one.modality, one.name))
        if one.runs_on
    ]
    if any("/" not in one.name for one in absent):
        hints.append(" --encoder takes a hub id or a folder: write it in full if the recipe names a part of it.")
    commands = "\n".join(_commands(cache, lacks))
    raise CacheError(
        f"{cache.storage.root}: {'; '.join(problems)}. Add them as follows, then run this again.{''.join(hints)}\n"
        f"{commands}"
    )


def _lack(cache: Cache, config: TrainConfig, modality: Modality) -> _Lack | None:
    """What one run needs of one modality and the cache does not hold.

    Raises:
        CacheError: the encoder has no such layer, or several encoders fit.
    """
    requested = _requested(config, modality)
    runs_on = modality == "text" and config.entry.continues_text and bool(requested)
    name = config.encoder.get(modality)
    if name is not None and not cache.encoders_named(modality, name):
        return _Lack(modality, name, None, requested, runs_on)
    encoder = cache.encoder(modality, name)
    depth, first = encoder.manifest.num_layers, min(requested, default=0)
    beyond = sorted(layer for layer in requested if not 0 <= layer <= depth)
    if beyond:
        raise CacheError(
            f"{encoder.key}: found hidden_states 0 to {depth}, the recipe needs {beyond[0]}. Change the recipe's "
            "layers."
        )
    if runs_on:
        requested = set(range(first, depth))
    elif requested and config.entry.blocks == "both":
        requested |= set(range(first, min(depth, first + _blocks_of_text(cache, config))))
    uncached = requested - set(encoder.layers)
    return _Lack(modality, encoder.key, encoder, uncached) if uncached else None


def _requested(config: TrainConfig, modality: Modality) -> set[int]:
    return {hidden_states_index(layer, config.index_convention) for layer in config.layers.get(modality, ())}


def _blocks_of_text(cache: Cache, config: TrainConfig) -> int:
    """Number of blocks of the text encoder that a fusion runs which runs as many of both; 0 where unknown."""
    named, requested = cache.encoders_named("text", config.encoder.get("text")), _requested(config, "text")
    return cache.encoders[named[0]].manifest.num_layers - min(requested) if named and requested else 0


@dataclass
class _Command:
    """An extraction, and the layers of its encoders to add."""

    config: ExtractConfig
    layers: dict[Modality, set[int]]


def _commands(cache: Cache, lacks: Iterable[_Lack]) -> Iterator[str]:
    """As few as possible: a command takes one encoder of each modality, with the data and options of one extraction."""
    commands: list[_Command] = []
    for one in lacks:
        if one.encoder:
            config = replace(_last_config(one.encoder), layers={})
            into = next((other for other in commands if _line(other.config) == _line(config)), None)
        else:
            like = min(cache.encoders.values(), key=lambda other: (other.manifest.modality != one.modality, other.key))
            config = _last_config(like)
            free = (other for other in commands if one.modality not in other.layers)
            into = next((other for other in free if _data(other.config) == _data(config)), None)
        if into is None:
            commands.append(into := _Command(config, {}))
        if one.encoder is None:
            others = into.config.encoder if into.layers else {}
            into.config = _with_encoder(into.config, {**others, one.modality: one.name}, one.modality)
        into.layers[one.modality] = one.layers
    for command in commands:
        layers = [f"--layers {modality}={_joined(of)}" for modality, of in command.layers.items() if of]
        yield " ".join([_line(command.config), f"--cache {shlex.quote(str(cache.storage.root))}", *layers])


def _data(config: ExtractConfig) -> tuple[object, ...]:
    """The options that say what an extraction reads."""
    return config.data, config.column, config.splits, config.max_items, config.class_prompt


def _with_encoder(config: ExtractConfig, encoder: Mapping[str, str], changed: Modality) -> ExtractConfig:
    """The same data with these encoders; that of modality `changed` is new to the cache."""
    kept = encoder.keys() - {changed}
    idle = [option for modality, own in _OF_MODALITY.items() if modality not in kept for option in own]
    revision = {modality: commit for modality, commit in config.revision.items() if modality in kept}
    options = {option: getattr(ExtractConfig, option) for option in idle}
    return replace(config, encoder=encoder, layers={}, revision=revision, **options)


def _last_config(encoder: EncoderCache) -> ExtractConfig:
    extractions = encoder.manifest.extractions
    if not extractions:
        raise CacheError(f"{encoder.key}: its manifest does not say how it was extracted. Extract into a new cache.")
    return config_from_json(extractions[-1]["config"])


def _line(config: ExtractConfig) -> str:
    """The command line of an extraction without --cache and --layers."""
    default = ExtractConfig(data="", cache="", encoder={"text": ""})
    parts = ["saffe", "extract"]
    for option in _SHOWN:
        value = getattr(config, option)
        if value != getattr(default, option):
            values = [f"{key}={one}" for key, one in value.items()] if isinstance(value, Mapping) else value
            for one in values if isinstance(values, (list, tuple)) else [values]:
                parts += ["--" + option.replace("_", "-"), str(one)]
    return shlex.join(parts)


def _joined(layers: Iterable[int]) -> str:
    return ",".join(map(str, sorted(layers)))


_NARROWER: Mapping[str, tuple[str, ...]] = {
    "float32": ("float16", "bfloat16", "int8", "float8"),
    "float16": ("int8", "float8"),
}
"""The types that can be made from each storage type."""


def stored_as(path: str, cache: Cache, storage: StorageType | None, folder: Path) -> str:
    """The path of the cache, or of one in `folder` with its hidden states in another type.

    The latter is named after the content of the cache: added data, or another cache, get another one.

    Raises:
        CacheError: its own type cannot represent the other.
    """
    own = {
        encoder.manifest.arrays[f"hidden_states/{layer}"].spec.dtype
        for encoder in cache.encoders.values()
        for layer in encoder.manifest.layers
    }
    if storage is None or own == {storage}:
        return path
    if any(storage not in _NARROWER.get(dtype, ()) for dtype in own):
        raise CacheError(
            f"{path}: it stores {', '.join(sorted(own))}, from which {storage} cannot be made. Extract a cache with "
            "--storage float32."
        )
    converted = folder / f"{storage}-{content_hash(cache.storage)}.zarr"
    if read_root(Storage(converted)) is None:  # a killed conversion has none
        convert_cache(ConvertConfig(cache=path, new=str(converted), storage=storage))
    return str(converted)
