"""Run a model on a few inputs, to find out what no declaration says.

The axes and widths of hidden states, how often each layer is called, the model's own vector, and whether an input's
states depend on the others in its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from saffe_cache.core.features import Layout, Modality
from saffe_cache.core.tensors import ROUNDING, layout_of, leaving, relative_difference
from saffe_cache.encoders.discovery import OWN_POOLING, own_pool
from saffe_cache.encoders.families import Anatomy
from saffe_cache.encoders.running import Padding, RunnableModel, tokens_of, watched

_TEXTS = (
    "A dog sleeps on a red sofa near the window.",
    "a",
    "Two people walk along the beach, and along the pier, and then back along the beach to rest in the shade.",
)
"""Texts of three lengths."""
_MOST_PADDING = 128
"""Longest full length to which all texts are padded."""


class Probe:
    """Runs an encoder on a few inputs, at all its layers."""

    def __init__(self, encoder: RunnableModel) -> None:
        self._encoder, self._modality = encoder, encoder.request.modality
        self._where = encoder.request.where

    def inputs(self, num_samples: int | None = None) -> dict[str, torch.Tensor]:
        """One batch: texts of three lengths, pictures or clips of three shapes, or sounds, of one second by default."""
        encoder = self._encoder
        if self._modality == "text":
            ids = encoder.tokenize(_TEXTS)
            if encoder.padding == "equal_length":
                ids = [one[: min(map(len, ids))] for one in ids]
            return encoder.pad(ids)
        size = encoder.num_frames or num_samples or encoder.sampling_rate or 16_000
        prepared = [encoder.prepare(raw) for raw in _media(self._modality, size)]
        shapes = {name: {tuple(one[name].shape) for one in prepared} for name in prepared[0]}
        if ragged := [name for name, found in shapes.items() if len(found) > 1]:
            raise ValueError(
                f"{self._where}: its processor makes {ragged[0]} of several shapes {sorted(shapes[ragged[0]])}, "
                "expected one for all inputs. Choose --image-size, or another encoder."
            )
        batch = {name: torch.cat([one[name] for one in prepared]) for name in prepared[0]}
        if self._modality in ("image", "video"):
            _require_unpadded(batch)
        return batch

    @torch.inference_mode()
    def record(self, batch: Mapping[str, torch.Tensor]) -> Recorded:
        """Run the whole model on a batch.

        Raises:
            ValueError: its layers are not called, or take something else than hidden states.
        """
        encoder = self._encoder
        calls, received, returned = list[int](), list[torch.Tensor](), list[Any]()

        def before(layer: int, state: torch.Tensor) -> None:
            calls.append(layer)
            received.append(state)

        def after(layer: int, output: Any) -> None:
            returned[:] = [output]

        with watched(encoder.layer_list, before, after):
            output = encoder.run(batch)
        if not returned:
            raise ValueError(
                f"{self._where}: its layers ({encoder.family.layers}) are not called in a forward pass. Choose another "
                "encoder."
            )
        received.append(leaving(returned[0]))
        layouts = tuple(layout_of(state, len(next(iter(batch.values())))) for state in received)
        mask = batch["attention_mask"].bool() if self._modality == "text" and "attention_mask" in batch else None
        return Recorded(
            states=[tokens_of(state, layout, batch) for state, layout in zip(received, layouts, strict=True)],
            mask=mask,
            output=output,
            calls=tuple(calls),
            layouts=layouts,
            num_outputs=len(returned[0]) if isinstance(returned[0], (tuple, list)) else 0,
        )

    def states(self) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """`hidden_states[i]` of all layers, float32 on the CPU, and the mask of padded texts.

        Texts that share a batch only with others of equal length run alone and are padded afterwards, as in training.
        """
        encoder = self._encoder
        if encoder.padding != "equal_length":
            found = self.record(self.inputs())
            return [state.float().cpu() for state in found.states], None if found.mask is None else found.mask.cpu()
        alone = [self.record(encoder.pad([ids])) for ids in encoder.tokenize(_TEXTS)]
        rows = zip(*(one.states for one in alone), strict=True)
        states = [pad_sequence([state[0].float().cpu() for state in row], batch_first=True) for row in rows]
        lengths = torch.tensor([one.states[0].shape[1] for one in alone])
        return states, torch.arange(int(lengths.max())) < lengths[:, None]

    def anatomy(self, missing: Sequence[str]) -> Anatomy:
        """Find out what a discovered model does; chooses the encoder's layers, pooling and padding.

        Args:
            missing: weights that the checkpoint lacks.

        Raises:
            ValueError: it does not run on its own preprocessed inputs, or its layers take no hidden states.
        """
        problems: list[str] = []
        for path in self._encoder.family.layer_lists:
            self._encoder.family = replace(self._encoder.family, layers=path)
            try:
                return self._anatomy(missing)
            except ValueError as error:
                problems.append(str(error))
            except (TypeError, AttributeError, RuntimeError, LookupError, AssertionError, NotImplementedError) as error:
                line = next(iter(str(error).strip().splitlines()), "")
                problems.append(
                    f"its model does not run on its own preprocessed inputs ({type(error).__name__}: {line:.200}). "
                    "Choose another encoder."
                )
        first = problems[0].removeprefix(f"{self._where}: ")
        raise ValueError(f"{self._where}: {first}")

    def _anatomy(self, missing: Sequence[str]) -> Anatomy:
        encoder, batch = self._encoder, self.inputs()
        found = self.record(batch)
        if encoder.family.pooling == OWN_POOLING:
            pool, pooling = own_pool(encoder.family, encoder.tower, found.output, missing)
            encoder.family = replace(encoder.family, pool=pool, pooling=pooling)
        vectors = encoder.vectors_of(found.output, found.mask)
        is_map = len({tuple(state.shape[1:]) for state in found.states}) > 1 or any(
            layout.startswith("channels") for layout in found.layouts
        )
        if self._modality == "text":
            if is_map:
                raise ValueError("its layers change the number or width of tokens. Choose another text encoder.")
            encoder.padding = self._choose_padding(found)
        return Anatomy(
            calls=found.calls,
            widths=tuple(state.shape[-1] for state in found.states),
            vectors={name: int(values.shape[-1]) for name, values in vectors.items()},
            layouts=found.layouts,
            num_outputs=found.num_outputs,
            class_tokens=0 if is_map else self._class_tokens(batch, found.states[0].shape[1]),
            has_feature_maps=is_map,
        )

    def _class_tokens(self, batch: Mapping[str, torch.Tensor], tokens: int) -> int:
        """Tokens of a picture that are no patches: class tokens and registers. Of texts, the first counts as one."""
        patch = getattr(self._encoder.tower.config, "patch_size", None)
        if self._modality == "text":
            return 1
        for part in self._encoder.tower.modules():
            if isinstance(getattr(part, "num_prefix_tokens", None), int):  # as timm's models say
                return int(part.num_prefix_tokens)
        tubelet = getattr(self._encoder.tower.config, "tubelet_size", 1)
        if isinstance(tubelet, (list, tuple)):
            tubelet, *patch = tubelet
        pixels = batch.get("pixel_values_videos", batch.get("pixel_values"))
        if self._modality == "audio" or patch is None or pixels is None:
            return 0
        height, width = (patch, patch) if isinstance(patch, int) else patch
        steps = pixels.shape[1] // tubelet if self._modality == "video" else 1
        return max(0, tokens - steps * (pixels.shape[-2] // height) * (pixels.shape[-1] // width))

    def _choose_padding(self, among: Recorded) -> Padding:
        """How texts are padded so that a text's states do not depend on others in its batch.

        If padding to the longest changes them, and not with eager attention either (Aimv2's sdpa forgets its causal
        mask where no text is padded): to the model's full length, without a mask, if it is one of two towers, whose
        processors prescribe that (SigLIP); otherwise texts share a batch only with others of equal length.

        Raises:
            ValueError: they depend on others even then.
        """
        encoder = self._encoder
        ids = encoder.tokenize(_TEXTS)
        shortest = min(range(len(ids)), key=lambda row: len(ids[row]))
        alone = self.record(encoder.pad([ids[shortest]]))
        if not self._differs(alone, among, shortest):
            return "longest"
        if encoder.request.attention is None and encoder.attention == "sdpa":
            encoder.set_attention("eager")
            if not self._differs(self.record(encoder.pad([ids[shortest]])), self.record(encoder.pad(ids)), shortest):
                return "longest"
            encoder.set_attention("sdpa")
        if encoder.family.core.startswith("get_") and encoder.max_length and encoder.max_length <= _MOST_PADDING:
            return "max_length"
        twice = self.record(encoder.pad([ids[shortest]] * 2))
        if self._differs(alone, twice, 0):
            raise ValueError("its states of a text depend on the other texts of a batch. Choose another encoder.")
        return "equal_length"

    def _differs(self, alone: Recorded, others: Recorded, row: int) -> bool:
        """Whether the states or the vector of a text alone differ from a row of a batch."""
        length, limit = alone.states[0].shape[1], ROUNDING[self._encoder.request.dtype]
        pairs = [(one[0], other[row, :length]) for one, other in zip(alone.states, others.states, strict=True)]
        own, batch = (self._encoder.vectors_of(one.output, one.mask)["pooled"] for one in (alone, others))
        pairs.append((own, batch[row : row + 1]))
        return any(relative_difference(one.float(), other.float()) > limit for one, other in pairs)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One forward pass over a batch."""

    states: list[torch.Tensor]
    """`hidden_states[i]` of all layers, [inputs, tokens, d]."""
    mask: torch.Tensor | None
    """bool [inputs, tokens] of texts that are padded."""
    output: Any
    """What the model returned."""
    calls: tuple[int, ...]
    layouts: tuple[Layout, ...]
    num_outputs: int


def _require_unpadded(batch: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        ValueError: a processor pads pictures, so that some of their tokens are none.
    """
    for name, values in batch.items():
        if name.endswith("mask") and not bool(values.all()):
            raise ValueError(
                f"its processor pads pictures to one size and marks this in {name}; padded tokens would be stored as "
                "if they were of the picture. Choose an encoder that resizes pictures to one size."
            )


def _media(modality: Modality, size: int) -> list[Any]:
    """Three random pictures of several shapes, clips of `size` frames, or sounds of `size` samples."""
    rng = np.random.default_rng(0)
    if modality == "audio":
        return [rng.normal(0, 0.1, size).astype(np.float32) for _ in range(3)]
    frames = (size,) if modality == "video" else ()
    return [rng.integers(0, 256, (*frames, *shape, 3), dtype=np.uint8) for shape in ((64, 64), (48, 80), (90, 60))]
