"""Tensors in safetensors files, never unpickled, and hidden states among what the layers of a model take and return."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.features import Layout

ROUNDING = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest relative difference of a token's hidden state that rounding explains, by the type of the forward pass."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, complete or not at all."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(contiguous, dict(metadata) if metadata else None))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; ValueError if it is none."""
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not readable as safetensors ({error}). Run the stage that writes it again."
        ) from None


def entering(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[int | str, torch.Tensor]:
    """Where a layer's call has the hidden states, a position or a name, and the hidden states.

    Raises:
        TypeError: the call has none.
    """
    if "hidden_states" in keywords:
        return "hidden_states", keywords["hidden_states"]
    found: list[tuple[int | str, Any]] = [*enumerate(arguments), *keywords.items()]
    for place, value in found:
        if isinstance(value, torch.Tensor) and value.ndim >= 3 and value.is_floating_point():
            return place, value
    raise TypeError("a layer takes no hidden states of three or more axes")


def replacing(
    hidden: torch.Tensor, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keywords of a layer's call, with other hidden states."""
    place, _ = entering(arguments, keywords)
    if isinstance(place, int):
        return (*arguments[:place], hidden, *arguments[place + 1 :]), dict(keywords)
    return arguments, {**keywords, place: hidden}


def leaving(output: Any) -> torch.Tensor:
    """The hidden states among what a layer returns: the first of several results."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


def as_tokens(state: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Hidden states as [batch, tokens, d]; the positions of a map row by row."""
    if layout == "time_first":
        return state.transpose(0, 1)
    if layout == "channels_first":
        return state.flatten(2).transpose(1, 2).contiguous()
    return state.flatten(1, -2) if layout == "channels_last" else state


def layout_of(state: torch.Tensor, batch: int) -> Layout:
    """The axes of the hidden states of a batch of so many inputs.

    Raises:
        ValueError: there is no axis of inputs, or there are more than four.
    """
    shape = tuple(state.shape)
    if len(shape) == 3 and shape[0] == batch:
        return "tokens"
    if len(shape) == 3 and shape[1] == batch:
        return "time_first"
    if len(shape) == 4 and shape[0] == batch:
        return "channels_last" if shape[1] == shape[2] != shape[3] else "channels_first"
    raise ValueError(
        f"its layers take {batch} inputs as a tensor of shape {shape}, expected [batch, tokens, d] or maps, with an "
        "axis of inputs. Choose another encoder."
    )


def relative_difference(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Largest over vectors of |found - expected| / |expected|, of [..., d]; inf for NaN.

    `mask`: bool [...], which vectors count.
    """
    difference = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
    largest = float((difference if mask is None else difference[mask]).max())
    return largest if math.isfinite(largest) else math.inf
