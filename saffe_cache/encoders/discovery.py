"""Find the parts of a model of any family: the tower of a modality and the lists that may be its layers.

Nothing here knows a family. Transformers declares the class of a model's layers, and models of two modalities have
`get_image_features` and the like; where nothing is declared, the layers are the largest list of equal modules. What no
declaration says is measured by `probing`.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.image_transforms import to_pil_image
from transformers.utils.output_capturing import OutputRecorder

from saffe_cache.core.features import Modality
from saffe_cache.encoders.families import Family, masked_mean

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
FEATURES = {
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
"""Placeholder of a pooling that the probe chooses."""
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
    """Describe a loaded model; its pooling is chosen by `probe`.

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
    has_features = hasattr(model, FEATURES[modality]) and tower is not model and not generates
    return Family(
        modality=modality,
        model_class=type(model).__name__,
        load_options={},
        layers=lists[0],
        layer_lists=tuple(lists[:_MOST_LISTS]),
        core=FEATURES[modality] if has_features else path,
        tower=path,
        block={},
        pool=masked_mean,
        pooling=OWN_POOLING,
        norm_first=True,
        is_language_model=generates,
        is_discovered=True,
    )


@dataclass(frozen=True, kw_only=True)
class OwnEncoder:
    """An encoder of photos or sounds of your own, for `extract(encoder={"image": OwnEncoder(...)}, ...)`.

    Its hidden states and its vector work with every fusion that needs no blocks. Blocks are refused, because nothing
    can rebuild your class from the cache.
    """

    model: nn.Module
    """Called with a batch of prepared inputs. It is put into evaluation mode, and its weights are frozen."""
    prepare: Callable[[Any], torch.Tensor]
    """A picture of PIL, or a sound as float32 [samples], to a tensor of one shape, without an axis for the batch."""
    layers: str
    """Path of the ModuleList or Sequential of the layers, such as "blocks". Each takes hidden states first."""
    pool: Callable[[Any], torch.Tensor] | None = None
    """Makes the vector of each input, [batch, d], of what the model returns. None: the mean over the tokens of what it
    returns, or of the first of its results."""
    sampling_rate: int | None = None
    """Rate in Hz of the sounds that it takes."""
    name: str = ""
    """Name in the cache. Default: the model's class."""

    def adapted(self, modality: Modality) -> tuple[OwnModel, Family]:
        """The model and its description, in the form of discovered ones.

        Raises:
            ValueError: it has no such layers, or takes texts.
        """
        where = f"{modality} encoder of class {type(self.model).__name__}"
        if modality == "text":
            raise ValueError(f"{where}: found an own encoder of texts, expected one of images or audio. Omit it.")
        if not isinstance(dict(self.model.named_modules()).get(self.layers), (nn.ModuleList, nn.Sequential)):
            lists = [path for path, part in self.model.named_modules() if path and isinstance(part, nn.ModuleList)]
            raise ValueError(
                f"{where}: found no list of modules {self.layers!r}, expected the path of its layers, such as one of "
                f"{lists}. Correct `layers`."
            )
        layers = f"module.{self.layers}"
        return OwnModel(self.model), Family(
            modality=modality,
            model_class=type(self.model).__name__,
            load_options={},
            layers=layers,
            layer_lists=(layers,),
            core="",
            block={},
            pool=self._vector,
            pooling=f"own: {getattr(self.pool, '__qualname__', 'pool')}" if self.pool else "mean of tokens",
            norm_first=True,
            is_discovered=True,
            is_own=True,
        )

    def _vector(self, output: Any, mask: torch.Tensor | None) -> torch.Tensor:
        if self.pool:
            return self.pool(output)
        tokens: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        return tokens.flatten(1, -2).mean(dim=1) if tokens.ndim > 2 else tokens


class OwnModel(nn.Module):
    """A module with what is asked of a transformers model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.config = SimpleNamespace(model_type="own", _attn_implementation=None)

    @property
    def dtype(self) -> torch.dtype:
        return next((one.dtype for one in self.parameters()), torch.float32)

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.module(inputs)


class OwnProcessor:
    """A callable with what is asked of a transformers processor."""

    def __init__(self, own: OwnEncoder) -> None:
        self._prepare, self.sampling_rate = own.prepare, own.sampling_rate

    def __call__(self, sounds: Any = (), images: Any = (), **_: Any) -> Mapping[str, torch.Tensor]:
        pictures = [to_pil_image(one) if isinstance(one, np.ndarray) else one for one in images]
        return {"inputs": torch.stack([self._prepare(one) for one in (*sounds, *pictures)])}

    def to_dict(self) -> dict[str, Any]:
        """For the fingerprint; what the callable does cannot be seen, so its name stands for it."""
        return {"prepare": getattr(self._prepare, "__qualname__", type(self._prepare).__name__)}


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
    if not own:
        if any(value is not None for value in said.values()):
            raise ValueError(f"found a {type(model).__name__} without a part for {modality}s. Choose another encoder.")
        if not getattr(config, "is_encoder_decoder", False):
            return "", model
        encoder = model.get_encoder()
        return next(path for path, part in model.named_modules() if part is encoder), encoder
    towers = [
        (path, part)
        for path, part in model.named_modules()
        if path and _is_same(getattr(part, "config", None), own[0]) and any(True for _ in part.children())
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


def input_embeddings(model: Any) -> Any:
    """The table of a text model's tokens: what the model says, or its largest one."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return max(
            (one for one in model.modules() if isinstance(one, nn.Embedding)), key=lambda one: one.num_embeddings
        )


def first_position(model: Any) -> int | None:
    """Position of a text's first token in models that count positions from their padding token (RoBERTa), else None."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            return int(part.padding_idx) + 1
    return None
