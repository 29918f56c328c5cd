"""Where a fusion looked in a photo: the weights of its attention over the patches.

What attends is the fusion's own (`Fusion.attending`): the learned queries of an attention head, or the text's tokens in
a cross-attention to the photo's. The map is the mean over all these queries, heads and layers, with class tokens and
registers left out and the rest scaled to a sum of 1. A linear path from the summary, such as the head's, attends to
nothing, and the map says nothing of it; nor of how the encoder mixed the patches before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from saffe_cache.core.features import nouns
from saffe_cache.encoders.selection import TokenSelection
from saffe_cache.fusion.base import Fusion, Texts
from saffe_cache.fusion.layers import Mask, States
from saffe_cache.sources.decoding import decode

if TYPE_CHECKING:
    from saffe_cache.inference.model import TrainedFusion

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as fractions of a photo."""


class HeatMap(NamedTuple):
    """Where a fusion looked."""

    weights: np.ndarray
    """float32 [rows, columns], which sum to 1."""
    box: Box
    """The part of the photo that the encoder saw."""


def heat_map(fusion: TrainedFusion, photo: bytes, text: str | None = None) -> HeatMap:
    """Where a run looked in a photo, which is fused with a text if there is one.

    Raises:
        ValueError: there is no heat map; the message says why. Or the photo cannot be read.
    """
    if why := why_no_map(fusion):
        raise ValueError(why)
    states, mask, texts = fusion.features(photo, text)
    weights = token_weights(fusion.model, states, mask, texts)
    manifest = fusion.gallery_manifest
    grid = grid_of(weights.shape[1], manifest.class_tokens, manifest.selected_tokens)
    box = fusion.encoder(fusion.spec.gallery_key).seen_part(*decode("image", photo).size)
    if box is None:
        raise ValueError("How the encoder's processor crops photos is unknown: there is no heat map.")
    return HeatMap(on_grid(weights[0], *grid), box)


def why_no_map(fusion: TrainedFusion) -> str:
    """Why no photo of a run has a heat map; empty if photos may have one."""
    if fusion.spec.media:
        return "A fusion of several media looks at no patches: there is no heat map."
    if fusion.modality != "image":
        return f"{nouns([fusion.modality]).capitalize()} have no grid of patches: there is no heat map."
    if not fusion.model.attending:
        return no_attention(fusion.model)
    try:
        manifest = fusion.gallery_manifest
        grid_of(fusion.spec.shape.num_tokens, manifest.class_tokens, manifest.selected_tokens)
    except ValueError as error:
        return str(error)
    return ""


def no_attention(model: Fusion) -> str:
    what = "no attention to the photo's tokens" + (" without a text" if model.attending else "")
    return f"Fusion {model.shape.fusion} with head {model.shape.head} has {what}: there is no heat map."


@torch.no_grad()
def token_weights(model: Fusion, states: States, mask: Mask = None, texts: Texts | None = None) -> torch.Tensor:
    """The mean attention to each gallery token, float32 [inputs, tokens]; rows sum to 1.

    Same arguments as `Fusion.forward`.

    Raises:
        ValueError: nothing attends to them.
    """
    found: list[torch.Tensor] = []

    def record(module: Any, arguments: tuple[Any, ...]) -> None:
        found.append(module.attention_weights(*arguments)[:, :, : states[0].shape[1]])

    hooks = [module.register_forward_pre_hook(record) for module in model.attending]
    try:
        model(states, mask, texts)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError(no_attention(model))
    means = torch.stack([weights.float().mean(dim=1) for weights in found]).mean(dim=0)
    return means / means.sum(dim=1, keepdim=True)


def grid_of(num_tokens: int, class_tokens: int, selected: str = "all") -> tuple[int, int]:
    """How many tokens precede those of the grid, and the grid's side.

    Args:
        class_tokens: of the encoder, before those of places.
        selected: the extraction's --tokens.

    Raises:
        ValueError: the tokens are no square grid.
    """
    chosen = TokenSelection.parse(selected)
    if chosen is None:
        before, side = class_tokens, round(max(0, num_tokens - class_tokens) ** 0.5)
    else:
        before, side = chosen.has_cls + chosen.has_mean, chosen.grid
    if side < 2 or before + side * side != num_tokens:
        raise ValueError(
            f"The run's {num_tokens} tokens of a photo ({selected}, {before} of them without a place) are no square "
            "grid: there is no heat map."
        )
    return before, side


def on_grid(weights: torch.Tensor, before: int, side: int) -> np.ndarray:
    """Weights of one photo's tokens [tokens] as float32 [side, side], which sum to 1."""
    places = weights[before:].reshape(side, side).double()
    return np.asarray((places / places.sum()).cpu(), np.float32)
