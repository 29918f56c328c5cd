"""Find the parts of a model of any family: a modality's tower, the lists that may be its layers, and its own vector.

Nothing here knows a family. Transformers declares the class of a model's layers, and models of two modalities have
`get_image_features` and the like; where nothing is declared, the layers are the largest list of equal modules. What no
declaration says is measured by `probing`.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils.output_capturing import OutputRecorder

from saffe_cache.core.features import Modality
from saffe_cache.core.tensors import as_tokens, layout_of
from saffe_cache.encoders.families import Family, Pool, first_token, masked_mean, model_pooler

_CONFIGS = {
    "image": ("vision_config", "image_config"),
    "text": ("text_config",),
    "audio": ("audio_config",),
    "video": ("video_config", "vision_config"),
}
"""A modality's part of the config of a model of several."""
_TAKES = {
    "pixel_values": "image",
    "pixel_values_videos": "video",
    "input_ids": "text",
    "input_values": "audio",
    "input_features": "audio",
}
"""Modality of each input of a model that has one; `pixel_values` of a model of clips are clips."""
_FEATURES = {
    "image": "get_image_features",
    "text": "get_text_features",
    "audio": "get_audio_features",
    "video": "get_video_features",
}
_OTHER_MODELS = re.compile("PreTrained|Head")
"""In the names of classes that are no plain model."""
_POSITIONS = re.compile("position|wpe$")
"""In the names of tables of learned positions."""
OWN_POOLING = "own"
"""Placeholder of a pooling that is chosen once the model has run."""
_EMBEDS = {"image": "image_embeds", "text": "text_embeds", "audio": "audio_embeds", "video": "video_embeds"}
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
_MOST_LISTS = 6
"""Lists of modules that are tried as the layers."""


def model_class(config: Any, modality: Modality, *, generates: bool = False) -> Any:
    """The class that loads a checkpoint for a modality, or as a causal language model.

    Raises:
        ValueError: transformers has none.
    """
    if generates:
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"a {config.model_type} is no causal language model. Omit --language-model.")
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if modality == "text" and type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        encoder = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)]
        if not config.is_encoder_decoder or _can_be_made(encoder, config):
            return encoder
    if type(config) in transformers.MODEL_MAPPING:
        found = transformers.MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, (tuple, list)) else found
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    parts = vars(importlib.import_module(name)) if importlib.util.find_spec(name) else {}
    for kind in parts.values():  # a tower that was saved alone, such as AlignVisionModel
        is_plain = str(getattr(kind, "__name__", "")).endswith("Model") and not _OTHER_MODELS.search(kind.__name__)
        if is_plain and getattr(kind, "config_class", None) is type(config):
            return kind
    raise ValueError(
        f"found a model of type {config.model_type!r}, for which transformers {transformers.__version__} has no plain "
        "model. Choose another encoder, or a newer transformers."
    )


def clip_frames(config: Any) -> int | None:
    """Frames of the clips that a model takes; None for one of single pictures, texts or sounds."""
    return getattr(config, "frames_per_clip", None) or getattr(config, "num_frames", None)


def _can_be_made(kind: Any, config: Any) -> bool:
    """Whether a class takes a config; T5Gemma's encoder refuses that of a whole model."""
    try:
        with torch.device("meta"):
            kind(config)
    except ValueError:
        return False
    return True


def discover(model: Any, modality: Modality, *, generates: bool = False) -> Family:
    """Describe a loaded model; its pooling is chosen by `own_pool`.

    Raises:
        ValueError: it has no tower of the modality, or no list of layers.
    """
    path, tower = (model.base_model_prefix, model.base_model) if generates else _tower(model, modality)
    embeddings = [name for name, part in tower.named_modules() if isinstance(part, nn.Embedding)]
    if generates and any(_POSITIONS.search(name) for name in embeddings):
        raise ValueError("its positions are learned; photos would have none. Choose a model with rotary positions.")
    takes = [_TAKES[name] for name in inspect.signature(tower.forward).parameters if name in _TAKES]
    if clip_frames(tower.config):
        takes = ["video" if one == "image" else one for one in takes]
    if takes and modality not in takes:
        article = "an" if modality in ("image", "audio") else "a"
        raise ValueError(
            f"found a {type(tower).__name__}, which takes {takes[0]}s. Choose {article} {modality} encoder, or use it "
            f"as --encoder {takes[0]}=…."
        )
    lists = [f"{path}.{name}" if path else name for name in _layer_lists(tower)]
    if not lists:
        raise ValueError(f"found a {type(tower).__name__} without a list of equal layers. Choose another encoder.")
    has_features = hasattr(model, _FEATURES[modality]) and tower is not model and not generates
    return Family(
        modality=modality,
        model_class=type(model).__name__,
        load_options={},
        layers=lists[0],
        layer_lists=tuple(lists[:_MOST_LISTS]),
        core=_FEATURES[modality] if has_features else path,
        tower=path,
        block={},
        pool=masked_mean,
        pooling=OWN_POOLING,
        norm_first=True,
        is_language_model=generates,
        is_discovered=True,
    )


def own_pool(family: Family, tower: Any, output: Any, missing: Sequence[str]) -> tuple[Pool, str]:
    """How the model's authors make one vector of an input, and its name for the fingerprint.

    Args:
        missing: weights that the checkpoint lacks, such as those of an untrained pooler.
    """
    modality, embeds = family.modality, _EMBEDS[family.modality]
    if family.core == _FEATURES[modality]:
        return _features, f"the model's own {modality} features"
    if getattr(output, embeds, None) is not None:
        return lambda output, mask: getattr(output, embeds), f"the model's {embeds}"
    if modality == "text" and getattr(output, "last_hidden_state", None) is not None:  # DPR returns a vector alone
        return masked_mean, "mean of tokens"
    if getattr(output, "pooler_output", None) is not None and not missing and not _is_dense_pooler(tower):
        return model_pooler, "the model's own pooled output"
    if any(name.split(".")[-1] in _CLASS_TOKENS for name, _ in tower.named_parameters()):
        return first_token, "class token behind the final norm"
    return _mean_of_places, "mean of tokens behind the final norm"


def _is_dense_pooler(tower: nn.Module) -> bool:
    """Whether its pooler is BERT's: a linear layer and tanh, trained for another task or not at all."""
    return any(
        path.split(".")[-1] == "pooler" and hasattr(part, "dense") and hasattr(part, "activation")
        for path, part in tower.named_modules()
    )


def _features(output: Any, mask: torch.Tensor | None) -> torch.Tensor:
    vectors: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return vectors[:, 0] if vectors.ndim == 3 else vectors.flatten(1)  # FLAVA projects all tokens, the first is used


def _mean_of_places(output: Any, mask: torch.Tensor | None) -> torch.Tensor:
    state = output[0]
    if state.ndim == 3:
        return masked_mean(output, mask if mask is not None and mask.shape == state.shape[:2] else None)
    return as_tokens(state, layout_of(state, len(state))).mean(dim=1)


def drop_other_towers(model: Any, tower: str) -> None:
    """Drop the models of other modalities from one of several."""
    kept = model.get_submodule(tower)
    for name, part in list(model.named_children()):
        if isinstance(part, transformers.PreTrainedModel) and not any(one is kept for one in part.modules()):
            setattr(model, name, None)


def _tower(model: Any, modality: Modality) -> tuple[str, Any]:
    """Path and module of the part that encodes a modality: the model itself, if it has one modality."""
    config = model.config
    said = {name: getattr(config, name, None) for names in _CONFIGS.values() for name in names}
    own = [said[name] for name in _CONFIGS[modality] if said[name] is not None]
    if all(value is None for value in said.values()):
        if not getattr(config, "is_encoder_decoder", False):
            return "", model
        encoder = model.get_encoder()
        return next(path for path, part in model.named_modules() if part is encoder), encoder
    towers = [
        (path, part)
        for path, part in model.named_modules()
        if path and own and _is_same(getattr(part, "config", None), own[0]) and any(True for _ in part.children())
    ]
    if not towers:
        raise ValueError(f"found a {type(model).__name__} without a part for {modality}s. Choose another encoder.")
    return min(towers, key=lambda pair: pair[0].count("."))


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and one.to_dict() == other.to_dict())


def _layer_lists(tower: nn.Module) -> list[str]:
    """Paths of lists that may be the layers, the likeliest first.

    Lists of the class that transformers declares, then lists of equal modules, then any, each by their weights.
    """
    declared = tuple(_declared_classes(tower))

    def rank(pair: tuple[str, nn.Module]) -> tuple[bool, bool, int, int]:
        layers = layers_of(pair[1])
        weights = sum(one.numel() for one in pair[1].parameters())
        is_equal = len(layers) > 1 and len({type(one) for one in layers}) == 1
        return bool(declared) and isinstance(layers[0], declared), is_equal, weights, -pair[0].count(".")

    lists = [
        (path, part)
        for path, part in tower.named_modules()
        if isinstance(part, (nn.ModuleList, nn.Sequential))
        and any(True for one in layers_of(part) for _ in one.children())
    ]
    return [path for path, _ in sorted(lists, key=rank, reverse=True)]


def layers_of(part: nn.Module) -> list[nn.Module]:
    """The layers of a list; of a list of lists (Funnel), those of all of them."""
    if isinstance(part, nn.ModuleList):
        return [layer for one in part for layer in layers_of(one)]
    return list(part.children()) if isinstance(part, nn.Sequential) and len(part) > 1 else [part]


def _declared_classes(tower: nn.Module) -> Iterator[type]:
    """Classes of the layers whose hidden states transformers records."""
    for part in tower.modules():
        said = (getattr(part, "_can_record_outputs", None) or {}).get("hidden_states")
        for one in said if isinstance(said, (list, tuple)) else [said]:
            kind = one.target_class if isinstance(one, OutputRecorder) else one
            if inspect.isclass(kind):
                yield kind
