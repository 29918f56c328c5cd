"""Read a layer's weights from a model: by their roles where the family is known, else all under their own names."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from saffe_cache.core.features import BlockSpec, BlockWeights, LibraryBlockSpec
from saffe_cache.encoders.discovery import layers_of
from saffe_cache.encoders.families import DINOV2_SWIGLU_BLOCK, Anatomy, Family, input_embeddings


def read_block(family: Family, model: Any, config: Any, layer: Any) -> BlockWeights:
    """All weights of one layer, as float32."""
    names = family.block
    if "attention_layer_scale" in names and getattr(config, "use_swiglu_ffn", False):
        names = DINOV2_SWIGLU_BLOCK
    tensors: dict[str, np.ndarray] = {}
    for role, path in names.items():
        if role.endswith("layer_scale"):
            tensors[role] = _to_numpy(layer.get_parameter(path))
            continue
        for part, parameter in layer.get_submodule(path).named_parameters(recurse=False):
            values = _to_numpy(parameter)
            tensors[f"{role}_{part}"] = np.ascontiguousarray(values.T) if family.is_transposed else values
    for part in ("weight", "bias"):
        if f"query_key_value_{part}" in tensors:
            thirds = np.split(tensors.pop(f"query_key_value_{part}"), 3)
            tensors |= {f"{role}_{part}": third for role, third in zip(("query", "key", "value"), thirds, strict=True)}
    buckets = 0
    if "encoder.relative_attention_bias.weight" in dict(model.named_parameters()):
        table = model.get_parameter("encoder.relative_attention_bias.weight")
        tensors["relative_position_bias"] = _to_numpy(table)
        buckets = len(table)
    norm = layer.get_submodule(names["attention_norm"])
    spec = BlockSpec(
        num_attention_heads=_first(config, "num_attention_heads", "encoder_attention_heads"),
        norm_first=family.norm_first,
        activation="silu" if "mlp_gate" in names else _first(config, "hidden_act", "activation_function"),
        layer_norm_eps=float(norm.eps),
        is_causal=family.is_causal,
        relative_attention_num_buckets=buckets,
    )
    return BlockWeights(spec, tensors)


def read_language_model(family: Family, model: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The parts of a causal language model that are not blocks, as float32, and fields of its spec."""
    if family.is_language_model:
        inside = {id(one) for one in model.get_submodule(family.layers).parameters()}
        tensors = {name: _to_numpy(one) for name, one in model.named_parameters() if id(one) not in inside}
        return tensors, {
            "model_class": f"{type(model).__module__}:{type(model).__name__}",
            "config": _content(model.config),
            "layers": family.layers,
        }
    parts = {name: model.get_submodule(path) for name, path in family.language_model.items()}
    tensors = {name: _to_numpy(parts[name].weight) for name in ("token_embedding", "position_embedding")}
    tensors |= {f"final_norm_{part}": _to_numpy(getattr(parts["final_norm"], part)) for part in ("weight", "bias")}
    if parts["head"].weight is not parts["token_embedding"].weight:
        tensors["head_weight"] = _to_numpy(parts["head"].weight)
    return tensors, {"layer_norm_eps": float(parts["final_norm"].eps)}


def _first(config: Any, *names: str) -> Any:
    """The first of these fields in the config; for encoder-decoder models, the last."""
    if getattr(config, "is_encoder_decoder", False):
        names = names[::-1]
    return next(getattr(config, name) for name in names if hasattr(config, name))


def _to_numpy(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().to("cpu", torch.float32).numpy()


def library_block(
    model: Any,
    family: Family,
    anatomy: Anatomy,
    layer: int,
    probe: Mapping[str, torch.Tensor],
    *,
    with_first: bool,
    has_equal_lengths: bool,
) -> BlockWeights:
    """A layer with its own weights, and those of the rest of the model that it may depend on, as float32.

    Args:
        with_first: whether the first layer's weights are among those.
        has_equal_lengths: whether texts of different lengths run apart.
    """
    owner, layers = model.get_submodule(family.tower), family.layers.removeprefix(f"{family.tower}.")
    parts, config = owner.get_submodule(layers), owner.config
    listed = layers_of(parts)
    own = listed[anatomy.calls[layer]]
    accepted = inspect.signature(owner.forward).parameters
    if family.modality == "text":
        name = "inputs_embeds" if "inputs_embeds" in accepted else "input_ids"
        embedding = input_embeddings(owner)
        shape: tuple[int, ...] = (int(embedding.weight.shape[-1]),)
    else:
        name = next(one for one in probe if one in accepted)
        embedding, shape = None, tuple(probe[name].shape[1:])
    skipped = {id(one) for one in [*parts.parameters(), *(embedding.parameters() if embedding else ())]}
    if with_first:
        skipped -= {id(one) for one in listed[0].parameters()}
    tensors = {key: value for key, value in own.state_dict().items() if value.is_floating_point()}
    tensors |= {f"model.{key}": value for key, value in owner.named_parameters() if id(value) not in skipped}
    spec = LibraryBlockSpec(
        model_class=f"{type(owner).__module__}:{type(owner).__name__}",
        config=_content(config),
        layers=layers,
        calls=anatomy.calls,
        index=layer,
        input_name=name,
        input_shape=shape,
        hidden_size=anatomy.widths[layer],
        num_attention_heads=_heads(config),
        is_causal=bool(getattr(config, "is_decoder", False)) or _is_causal(own),
        is_time_first=anatomy.layouts[layer] == "time_first",
        num_outputs=anatomy.num_outputs,
        runs_first_layer=with_first,
        has_equal_lengths=has_equal_lengths,
    )
    return BlockWeights(spec, {key: _to_numpy(value) for key, value in tensors.items()})


def _content(config: Any) -> dict[str, Any]:
    """A config as plain values, with its implementation of attention unless that is the usual one, and without the
    folder that it was loaded from."""
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    content.pop("_name_or_path", None)
    attention = config._attn_implementation
    return content if attention in (None, "sdpa") else {**content, "attn_implementation": attention}


def _heads(config: Any) -> int:
    names = ("num_attention_heads", "num_heads", "encoder_attention_heads", "n_head", "n_heads")
    return next((int(getattr(config, name)) for name in names if isinstance(getattr(config, name, None), int)), 1)


def _is_causal(layer: nn.Module) -> bool:
    """Whether one of the layer's attentions says so."""
    return any(getattr(part, "is_causal", False) is True for part in layer.modules())
