"""caption.json: a frozen language model that photos join at a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from saffe_cache.core.json_schema import known_part, made_of
from saffe_cache.core.outputs import read_json

NEEDED_LOSSES = ("photo", "photos_shuffled", "no_photo", "plain_model")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % bootstrap interval over photos."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Nats a token."""

    loss: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Said:
    """A photo's greedy caption, and people's."""

    id: str
    caption: str
    own: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CaptionCost:
    """Of a training step."""

    trainable_parameters: int
    seconds_per_step: float
    training_step_flops: float


@dataclass(frozen=True, kw_only=True)
class Captions:
    """What caption.json says."""

    title: str
    split: str
    layer: int
    num_layers: int
    photos: int
    chance: float
    losses: Mapping[str, Loss]
    differences: Mapping[str, Interval]
    """Of the loss beside the photo, less that of each other."""
    own_caption: Mapping[str, Interval]
    """How often a photo's own caption is the likeliest."""
    cost: CaptionCost
    examples: tuple[Said, ...]
    failures: tuple[str, ...] = ()


def read_captions(path: Path) -> Captions:
    """
    Raises:
        ValueError: a field is missing or of another kind.
    """
    try:
        captions = made_of(Captions, known_part(Captions, read_json(path)))
        lacking = [name for name in NEEDED_LOSSES if name not in captions.losses]
        if lacking:
            raise ValueError(f"losses: it lacks {lacking[0]}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}. Run what writes it again.") from None
    return captions
