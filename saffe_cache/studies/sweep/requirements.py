"""What recipes require of a cache: layers and encoders, or else the command that adds them; and other storage types."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from saffe_cache.core.features import MODALITIES, CacheError, Modality, StorageType, hidden_states_index
from saffe_cache.extraction.config import ExtractConfig, config_from_json
from saffe_cache.store.config import ConvertConfig
from saffe_cache.store.exchange import convert_cache
from saffe_cache.store.manifest import content_hash, read_root
from saffe_cache.store.reader import Cache, EncoderCache
from saffe_cache.store.storage import Storage
from saffe_cache.training.config import TrainConfig

_OF_MODALITY: Mapping[str, tuple[str, ...]] = {
    "image": ("image_size",),
    "text": ("max_length", "prompt", "position_offset"),
}
"""Options of an extraction that belong to one encoder; for another encoder of the modality they have their default."""


@dataclass
class _Missing:
    """Hidden states that recipes need and a cache does not hold."""

    layers: dict[str, set[int]] = field(default_factory=dict)
    """Of encoders that the cache holds, by key."""
    encoders: dict[tuple[Modality, str], set[int]] = field(default_factory=dict)
    """Of encoders that it does not hold, by modality and the recipes' name; empty where a recipe names no layers."""
    run_on: set[tuple[Modality, str]] = field(default_factory=set)
    """Encoders not in the cache whose blocks a fusion runs, from the first of these layers to the last."""

    def __bool__(self) -> bool:
        return bool(self.layers or self.encoders)


def check_cache(cache: Cache, configs: Iterable[TrainConfig]) -> None:
    """
    Raises:
        CacheError: layers or encoders are missing; the message names all, with the commands that add them.
    """
    missing = _Missing()
    for config in configs:
        for modality in (name for name in MODALITIES if name in config.layers or name in config.encoder):
            _add(missing, cache, config, modality)
    if not missing:
        return
    problems = [f"{key} lacks layers {_joined(layers)}" for key, layers in missing.layers.items()]
    problems += [f"it holds no {modality} encoder {name!r}" for modality, name in missing.encoders]
    hints = [
        f" The fusion runs blocks of {name}: let --layers {modality} name all from its first to its last but one."
        for modality, name in sorted(missing.run_on)
    ]
    if any("/" not in name for _, name in missing.encoders):
        hints.append(" --encoder takes a hub id or a folder: write it in full if the recipe names a part of it.")
    commands = "\n".join(_commands(cache, missing))
    raise CacheError(
        f"{cache.storage.root}: {'; '.join(problems)}. Add them as follows, then run this again.{''.join(hints)}\n"
        f"{commands}"
    )


def _add(missing: _Missing, cache: Cache, config: TrainConfig, modality: Modality) -> None:
    """Add what one run needs of one modality.

    Raises:
        CacheError: the encoder has no such layer, or several encoders fit.
    """
    requested = _requested(config, modality)
    runs_on = modality == "text" and config.entry.continues_text
    name = config.encoder.get(modality)
    if name is not None and not cache.encoders_named(modality, name):
        missing.encoders.setdefault((modality, name), set()).update(requested)
        if runs_on and requested:
            missing.run_on.add((modality, name))
        return
    encoder = cache.encoder(modality, name)
    depth = encoder.manifest.num_layers
    beyond = sorted(layer for layer in requested if not 0 <= layer <= depth)
    if beyond:
        raise CacheError(
            f"{encoder.key}: found hidden_states 0 to {depth}, the recipe needs {beyond[0]}. Change the recipe's "
            "layers."
        )
    if runs_on and requested:
        requested = set(range(min(requested), depth))
    elif requested and config.entry.blocks == "both":
        requested |= set(range(min(requested), min(depth, min(requested) + _blocks_of_text(cache, config))))
    uncached = requested - set(encoder.layers)
    if uncached:
        missing.layers.setdefault(encoder.key, set()).update(uncached)


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


def _commands(cache: Cache, missing: _Missing) -> Iterator[str]:
    """As few as possible: a command takes one encoder of each modality, with the data and options of one extraction."""
    commands: list[_Command] = []
    for key, layers in missing.layers.items():
        encoder = cache.encoders[key]
        config = replace(_last_config(encoder), layers={})
        same = next((one for one in commands if _line(one.config, cache) == _line(config, cache)), None)
        if same is None:
            commands.append(same := _Command(config, {}))
        same.layers[encoder.manifest.modality] = layers
    for (modality, name), layers in missing.encoders.items():
        like = sorted(cache.encoders.values(), key=lambda one: (one.manifest.modality != modality, one.key))
        source = _last_config(like[0])
        free = (one for one in commands if modality not in one.layers and _data(one.config) == _data(source))
        into = next(free, None)
        if into is None:
            commands.append(into := _Command(source, {}))
        others = into.config.encoder if into.layers else {}
        into.config = _with_encoder(into.config, {**others, modality: name}, modality)
        into.layers[modality] = layers
    for command in commands:
        parts = [f"--layers {modality}={_joined(layers)}" for modality, layers in command.layers.items() if layers]
        yield " ".join([_line(command.config, cache), *parts])


def _data(config: ExtractConfig) -> tuple[object, ...]:
    """The options that say what an extraction reads."""
    return config.data, config.column, config.splits, config.max_items, config.class_prompt


def _with_encoder(config: ExtractConfig, encoder: Mapping[str, str], changed: Modality) -> ExtractConfig:
    """The same data with these encoders; that of modality `changed` is new to the cache."""
    kept = encoder.keys() - {changed}
    default = ExtractConfig(data="", cache="", encoder=encoder)
    idle = [option for modality, own in _OF_MODALITY.items() if modality not in kept for option in own]
    revision = {modality: commit for modality, commit in config.revision.items() if modality in kept}
    options = {option: getattr(default, option) for option in idle}
    return replace(config, encoder=encoder, layers={}, revision=revision, **options)


def _last_config(encoder: EncoderCache) -> ExtractConfig:
    extractions = encoder.manifest.extractions
    if not extractions:
        raise CacheError(f"{encoder.key}: its manifest does not say how it was extracted. Extract into a new cache.")
    return config_from_json(extractions[-1]["config"])


def _line(config: ExtractConfig, cache: Cache) -> str:
    """The command line of an extraction without --layers and without options at their default."""
    parts = ["saffe", "extract", "--data", config.data]
    for option, mapping in (
        ("encoder", config.encoder),
        ("revision", config.revision),
        ("column", config.column),
        ("max-items", config.max_items),
    ):
        for key, value in mapping.items():
            parts += [f"--{option}", f"{key}={value}"]
    default = ExtractConfig(data="", cache="", encoder=config.encoder)
    for option in ("image_size", "max_length", "prompt", "position_offset", "dtype", "attention"):
        if getattr(config, option) != getattr(default, option):
            parts += ["--" + option.replace("_", "-"), str(getattr(config, option))]
    for option in ("splits", "class_prompt"):
        if getattr(config, option) != getattr(default, option):
            for value in getattr(config, option):
                parts += ["--" + option.replace("_", "-"), value]
    return shlex.join([*parts, "--cache", str(cache.storage.root)])


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
