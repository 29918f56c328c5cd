"""What a cache lacks of a recipe, said before anything is run, with the one command that adds it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from saffe_cache.extraction.config import ExtractConfig, config_from_json
from saffe_cache.features import MODALITIES, CacheError, Modality, hidden_states_index
from saffe_cache.fusion.family import FUSIONS
from saffe_cache.store.reader import Cache, EncoderCache
from saffe_cache.train import TrainConfig


def check_layers(cache: Cache, configs: Iterable[TrainConfig]) -> None:
    """
    Raises:
        CacheError: layers are missing; names all, and the command that adds them.
    """
    missing: dict[str, set[int]] = {}
    for config in configs:
        for modality in (name for name in MODALITIES if name in config.layers):
            layers = config.layers[modality]
            encoder = cache.encoder(modality, config.encoder.get(modality))
            asked = {hidden_states_index(layer, config.index_convention) for layer in layers}
            beyond = sorted(layer for layer in asked if not 0 <= layer <= encoder.manifest.num_layers)
            if beyond:
                raise CacheError(
                    f"{encoder.key}: there are hidden_states 0 to {encoder.manifest.num_layers}, the recipe asks for "
                    f"{beyond[0]}. Change the recipe's layers."
                )
            if modality == "text" and FUSIONS[config.fusion].blocks in ("text", "both"):
                asked = set(range(min(asked), encoder.manifest.num_layers))  # whose blocks run
            missing.setdefault(encoder.key, set()).update(asked - set(encoder.layers))
    missing = {key: layers for key, layers in missing.items() if layers}
    if missing:
        told = "; ".join(f"{key} lacks layers {_listed(layers)}" for key, layers in missing.items())
        commands = "\n".join(_command(cache, missing))
        raise CacheError(f"{cache.storage.root}: {told}. Add them, then run this again:\n{commands}")


def _command(cache: Cache, missing: dict[str, set[int]]) -> list[str]:
    """One for each extraction that the encoders came from: usually one."""
    commands: dict[str, dict[Modality, set[int]]] = {}
    for key, layers in missing.items():
        encoder = cache.encoders[key]
        command = _without_layers(_last_config(encoder), str(cache.storage.root))
        commands.setdefault(command, {})[encoder.manifest.modality] = layers
    return [
        " ".join([command, *(f"--layers {name}={_listed(layers)}" for name, layers in of_encoders.items())])
        for command, of_encoders in commands.items()
    ]


def _last_config(encoder: EncoderCache) -> ExtractConfig:
    extractions = encoder.manifest.extractions
    if not extractions:
        raise CacheError(f"{encoder.key}: its manifest does not say how it was extracted. Extract into a new cache.")
    return config_from_json(extractions[-1]["config"])


def _without_layers(config: ExtractConfig, cache: str) -> str:
    """The command line of an extraction, but for its layers; options that were left at their default are left out."""
    parts = ["saffe-extract", "--data", config.data]
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
    return shlex.join([*parts, "--cache", cache])


def _listed(layers: Iterable[int]) -> str:
    return ",".join(map(str, sorted(layers)))
