"""An encoder's own layer of any transformers family, rebuilt from cached weights by the library's code.

What a layer takes besides hidden states (masks, rotary tables, position biases) differs by family. So the library's
model is run on blank inputs of the same number and length, up to the layer; what arrives there is kept, and the layer
is called with it and the real hidden states. Layers before it are skipped.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPast

from saffe_cache.core.features import BlockSpec, BlockWeights, CacheError, LibraryBlockSpec
from saffe_cache.core.tensors import ROUNDING, entering, leaving, relative_difference, replacing
from saffe_cache.fusion.block import EncoderBlock

TOLERANCE = ROUNDING["float32"]
"""Largest relative difference of a token between a rebuilt block and the model's own, both in float32."""
_MODEL, _CHECK = "model.", "check."
_LIBRARY = "transformers.models."


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keywords of a layer's call."""


class _Reached(Exception):  # noqa: N818 — ends a forward pass early, no error
    """The layer is about to run."""


class Skipped(nn.Module):
    """Returns the hidden states that it receives, in the form of the layer that it stands for."""

    def __init__(self, layer: nn.Module, num_outputs: int) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        for name, value in vars(layer).items():  # models read settings of their layers, such as attention_type
            if isinstance(value, (str, int, float, bool)) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        hidden = entering(arguments, keywords)[1]
        return (hidden, *[None] * (self.num_outputs - 1)) if self.num_outputs else hidden


class LibraryBlock(nn.Module):
    """One frozen layer. `forward(hidden_states[i])` equals the model's `hidden_states[i + 1]`.

    It has neither halves nor known roles of its weights: what attends to another modality goes before it.
    """

    def __init__(self, weights: BlockWeights) -> None:
        """
        Raises:
            CacheError: the installed transformers has no such layer, or one with other weights.
        """
        super().__init__()
        assert isinstance(weights.spec, LibraryBlockSpec)
        self.spec = spec = weights.spec
        try:
            model = blank_model(spec.model_class, spec.config)
            self.layer = _only_layer(model, spec)
            load_own(self.layer, weights)
            further = {
                name.removeprefix(_MODEL): torch.tensor(value)
                for name, value in weights.tensors.items()
                if name.startswith(_MODEL)
            }
            model.load_state_dict(further, strict=False)
        except Exception as error:  # other versions of the library fail in many ways
            raise _not_rebuilt(spec, error) from error
        parameters = dict(model.named_parameters())
        self.further = nn.ParameterDict(
            {name.replace(".", "/"): parameters[name] for name in further if name in parameters}
        )
        self._model = [model.eval()]  # in a list, so that its unused weights are not among this module's
        self._extras: dict[tuple[Any, ...], Call] = {}
        self._has_order = True
        self.requires_grad_(False).eval()

    @property
    def hidden_size(self) -> int:
        return self.spec.hidden_size

    def train(self, mode: bool = True) -> LibraryBlock:
        """The layer always runs without dropout."""
        return super().train(False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LibraryBlock:
        self._model[0]._apply(fn)
        self._extras.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """[batch, tokens, d] of `hidden` [batch, tokens, d] and `mask` bool [batch, tokens], True on real tokens."""
        if mask is not None and self.spec.has_equal_lengths:
            return self._by_length(hidden, mask)
        taken = self._taken(hidden, mask)
        if not self._has_order:
            taken = _without_order(taken, hidden, mask)
        if self.spec.is_time_first:
            hidden = hidden.transpose(0, 1)
        arguments, keywords = replacing(hidden, *taken)
        output = leaving(self.layer(*arguments, **keywords))
        return output.transpose(0, 1) if self.spec.is_time_first else output

    def at(self, hidden: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """`forward` at one place of each row, int64 [batch]: [batch, d]."""
        output: torch.Tensor = self(hidden, mask)
        return output[torch.arange(len(hidden), device=hidden.device), places]

    def _by_length(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As `forward`, for inputs of each length apart; padding becomes zero."""
        output, lengths = torch.zeros_like(hidden), mask.sum(dim=1)
        for length in sorted({*lengths.tolist()} - {0}):
            real = mask & (lengths == length)[:, None]
            output[real] = self(hidden[real].view(-1, length, hidden.shape[-1])).flatten(0, 1)
        return output

    def check(self, tensors: Mapping[str, np.ndarray]) -> float:
        """Largest relative difference of a token to the output that the self-check has for its inputs."""
        inputs, expected = (torch.tensor(tensors[f"{_CHECK}{name}"]) for name in ("input", "output"))
        lengths = torch.tensor(tensors[f"{_CHECK}lengths"])
        mask = None if (lengths < 0).any() else torch.arange(inputs.shape[1]) < lengths[:, None]
        with torch.no_grad():
            return relative_difference(self(inputs, mask), expected, mask)

    def forget_order(self) -> None:
        """Let each token see all others, and none have a place: no causal mask, and rotary positions all zero.

        Other positions stay; `require_no_positions` finds them.
        """
        self._has_order = False

    @torch.no_grad()
    def require_no_positions(self, fusion: str) -> None:
        """
        Raises:
            ValueError: the layer depends on the order of its tokens, so that none can be added.
        """
        hidden = torch.randn(1, 7, self.hidden_size, generator=torch.Generator().manual_seed(0))
        order = torch.tensor([4, 2, 6, 0, 5, 1, 3])
        try:
            found = relative_difference(self(hidden[:, order]), self(hidden)[:, order])
        except (RuntimeError, ValueError, LookupError):
            found = math.inf
        if not found <= TOLERANCE:
            raise ValueError(
                f"--fusion {fusion}: the layers of {self.spec.model_class} place each token (rotary or relative "
                "positions), and added tokens have no place. Use an encoder whose layers do not, or another --fusion."
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _taken(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> Call:
        """What the layer takes besides these hidden states."""
        key = (*hidden.shape[:2], hidden.device, hidden.dtype)
        if mask is None and key in self._extras:
            return self._extras[key]
        taken = call_of(self.layer, self._model[0], _blank_inputs(self._model[0], self.spec, hidden, mask))
        if mask is None:
            self._extras = {key: taken}
        return taken


@dataclass
class _Given(BaseModelOutputWithPast):  # type: ignore[misc]
    def __getattr__(self, name: str) -> None:
        """Nothing else is returned, such as Mamba's `cache_params`."""


class GivenStates(nn.Module):
    """Stands for a model that has returned the final hidden states that it is given as `inputs_embeds`."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> BaseModelOutputWithPast:
        return _Given(last_hidden_state=inputs_embeds)


def call_of(layer: nn.Module, model: Any, inputs: Mapping[str, Any]) -> Call:
    """What a layer is called with in a forward pass of the model, which ends there."""
    found: list[Call] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append((arguments, keywords))
        raise _Reached

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model(**inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def _without_order(call: Call, hidden: torch.Tensor, mask: torch.Tensor | None) -> Call:
    """The same call, in which all real tokens see each other and are rotated by nothing."""
    batch, tokens = hidden.shape[:2]
    seen = hidden.new_ones(batch, tokens, dtype=torch.bool) if mask is None else mask
    changed: dict[str, Any] = {"attention_mask": seen[:, None, None, :].expand(-1, 1, tokens, -1)}
    rotary = call[1].get("position_embeddings")
    if rotary is not None:
        changed["position_embeddings"] = torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])
    return call[0], {name: changed.get(name, value) for name, value in call[1].items()}


def make_block(weights: BlockWeights) -> EncoderBlock | LibraryBlock:
    """An encoder's block of any family, checked against its output at extraction, which was the model's own.

    Raises:
        CacheError: it cannot be rebuilt, or computes something else than at extraction.
    """
    if isinstance(weights.spec, BlockSpec):
        return EncoderBlock(weights)
    block = LibraryBlock(weights)
    try:
        error = block.check(weights.tensors)
    except Exception as problem:  # a spec that was changed, or a self-check that is not there
        raise _not_rebuilt(weights.spec, problem) from problem
    if not error <= TOLERANCE:
        raise CacheError(
            f"block {weights.spec.index} of {weights.spec.model_class}: rebuilt by the installed transformers, its "
            f"output differs by {error:.2g} from that at extraction, expected at most {TOLERANCE:g}. Use the version "
            "in the encoder's fingerprint, or a fusion without blocks."
        )
    return block


def _not_rebuilt(spec: LibraryBlockSpec, error: Exception) -> CacheError:
    line = " ".join(str(error).split()) or type(error).__name__
    return CacheError(
        f"block {spec.index} of {spec.model_class}: the installed transformers cannot rebuild it ({line:.200}). Use "
        "the version in the encoder's fingerprint, or a fusion without blocks."
    )


def with_check(
    weights: BlockWeights, inputs: torch.Tensor, lengths: torch.Tensor, output: torch.Tensor
) -> BlockWeights:
    """The weights with a self-check: the block's output of some inputs when it was compared with the model's, [inputs,
    tokens, d]; `lengths` are -1 where it had no mask."""
    check = {"input": inputs, "lengths": lengths, "output": output}
    return BlockWeights(weights.spec, {**weights.tensors, **{f"{_CHECK}{n}": t.numpy() for n, t in check.items()}})


def without_unused(weights: BlockWeights) -> BlockWeights:
    """The weights without those of the rest of the model that the block's output does not depend on.

    Each is replaced by NaN in turn: if the output stays the same, it is not needed.
    """

    def differs_without(names: Sequence[str]) -> bool:
        blank = {name: np.full_like(tensors[name], np.nan) for name in names}
        return not LibraryBlock(BlockWeights(weights.spec, {**tensors, **blank})).check(tensors) <= TOLERANCE

    tensors = dict(weights.tensors)
    further = [name for name in tensors if name.startswith(_MODEL)]
    needed = [name for name in further if differs_without([name])] if further and differs_without(further) else []
    return BlockWeights(weights.spec, {name: tensors[name] for name in tensors if name not in {*further} - {*needed}})


def load_own(layer: nn.Module, weights: BlockWeights) -> None:
    """Load a layer's own weights; tables of whole numbers are made with the layer.

    Raises:
        ValueError: its weights are other ones.
    """
    own = {
        name: torch.tensor(value) for name, value in weights.tensors.items() if not name.startswith((_MODEL, _CHECK))
    }
    missing, unknown = layer.load_state_dict(own, strict=False)
    lacking = [name for name in missing if layer.state_dict()[name].is_floating_point()]
    if lacking or unknown:
        raise ValueError(f"its weights are other ones: {', '.join([*lacking, *unknown][:3])}")


def blank_model(model_class: str, config: Mapping[str, Any]) -> Any:
    """A model of transformers without its weights, whose memory stays untouched.

    Args:
        model_class: MODULE:CLASS, below transformers.models.
        config: as the model's `to_dict` gives it.

    Raises:
        ValueError: it is no model of transformers.
    """
    module_name, _, class_name = model_class.partition(":")
    if not module_name.startswith(_LIBRARY):
        raise ValueError(f"{module_name} is no module of {_LIBRARY}")
    kind: Any = getattr(importlib.import_module(module_name), class_name)
    if PreTrainedModel not in getattr(kind, "__mro__", ()):
        raise ValueError(f"{class_name} is no model")
    with no_init_weights():
        return kind(kind.config_class.from_dict(dict(config), attn_implementation=config.get("attn_implementation")))


def _only_layer(model: nn.Module, spec: LibraryBlockSpec) -> nn.Module:
    """Remove all layers but the spec's from the model, and return that one."""
    layers = model.get_submodule(spec.layers)
    assert isinstance(layers, (nn.ModuleList, nn.Sequential))
    listed = list(layers)
    layer = listed[spec.calls[spec.index]]
    if spec.runs_first_layer:
        kept = [listed[0], layer] if layer is not listed[0] else [layer]
    else:
        kept = [one if one is layer else Skipped(one, spec.num_outputs) for one in listed]
    parent, _, name = spec.layers.rpartition(".")
    replaced = nn.Sequential(*kept) if isinstance(layers, nn.Sequential) else nn.ModuleList(kept)
    setattr(model.get_submodule(parent), name, replaced)
    return layer


def _blank_inputs(
    model: nn.Module, spec: LibraryBlockSpec, hidden: torch.Tensor, mask: torch.Tensor | None
) -> dict[str, Any]:
    """Arguments of a forward pass over blank inputs: as many as there are hidden states, and as long."""
    batch, tokens = hidden.shape[:2]
    accepted = inspect.signature(model.forward).parameters
    blank: dict[str, Any] = {}
    if spec.input_name == "input_ids":
        blank["input_ids"] = torch.zeros(batch, tokens, dtype=torch.int64, device=hidden.device)
    elif spec.input_name == "inputs_embeds":
        blank["inputs_embeds"] = hidden.new_zeros(batch, tokens, *spec.input_shape)
    else:
        blank[spec.input_name] = hidden.new_zeros(batch, *spec.input_shape)
    if mask is None and spec.input_name in ("input_ids", "inputs_embeds"):
        mask = hidden.new_ones(batch, tokens)  # as encoders run; without one, Aimv2 forgets that it is causal
    if mask is not None and "attention_mask" in accepted:
        blank["attention_mask"] = mask.long()
    settings = {"use_cache": False, "interpolate_pos_encoding": True}
    return blank | {name: value for name, value in settings.items() if name in accepted}
