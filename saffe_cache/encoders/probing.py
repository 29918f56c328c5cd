"""Run a model on a few inputs, to find out what no declaration says.

The axes and widths of hidden states, how often each layer is called, the model's own vector, whether an input's states
depend on the others in its batch, and how a sound of any length is cut into windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from saffe_cache.core.features import Modality
from saffe_cache.core.tensors import ROUNDING, Layout, as_tokens, entering, leaving, relative_difference
from saffe_cache.encoders.discovery import FEATURES, OWN_POOLING
from saffe_cache.encoders.families import Family, Pool, first_token, masked_mean

if TYPE_CHECKING:
    from saffe_cache.encoders.encoder import FrozenEncoder

_EMBEDS = {"image": "image_embeds", "text": "text_embeds", "audio": "audio_embeds", "video": "video_embeds"}
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
_TEXTS = (
    "A dog sleeps on a red sofa near the window.",
    "a",
    "Two people walk along the beach, and along the pier, and then back along the beach to rest in the shade.",
)
"""Texts of three lengths."""
_CHANGED = 1e-3
"""Relative difference of a token's embedding from which it has changed."""
_MOST_PADDING = 128
"""Longest full length to which all texts are padded."""
_SHORTEST_SOUND = 0.025
"""Seconds of one window of a spectrogram, in all supported models; a shorter sound has no frames, only padding."""
_LONGEST_WINDOW = 60
"""Seconds of the longest window that is looked for where a processor does not say its own."""
_STEPS = 8
"""Tokens over which the samples of one token are measured."""

Padding = Literal["longest", "max_length", "equal_length"]
"""How the texts of a batch get one length: to the longest of them; to the model's full length; not at all."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What a forward pass does, as far as it must be known."""

    calls: tuple[int, ...]
    """Which layer of the list each step calls; ALBERT calls one layer several times."""
    widths: tuple[int, ...]
    """Width of `hidden_states[i]`: one more than steps."""
    vectors: dict[str, int]
    """Width of each of the encoder's vectors."""
    layouts: tuple[Layout, ...]
    """Axes of each of them in the model."""
    num_outputs: int = 0
    """Results of a layer that returns a tuple; 0 if it returns hidden states alone."""
    class_tokens: int = 1
    """Tokens before those of places: class tokens and registers."""
    has_feature_maps: bool = False
    """Whether tokens are places whose number or width changes with the layer."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How sounds of any length are cut, and how many tokens are stored of a window. Lengths are in samples."""

    size: int
    """Longest window. The next one begins where it ends."""
    is_fixed: bool
    """Whether the processor pads a shorter window to this one, so that all have equally many tokens."""
    is_sequence: bool
    """Whether tokens are steps in time, of which only some are real."""
    is_stored_whole: bool = False
    """Whether a row of hidden states is a window with all its tokens, or those selected; otherwise a real token."""
    shortest: int
    """A shorter sound is refused; a shorter end of a longer one is left out."""
    step: int = 0
    """Samples of a token, of windows of any length: n samples have (n + margin) // step tokens."""
    margin: int = 0
    num_tokens: int = 0
    """Of a whole window, if windows are fixed."""

    def cut(self, num_samples: int) -> list[range]:
        """The windows of a sound; none if it is too short."""
        cut = [range(first, min(first + self.size, num_samples)) for first in range(0, num_samples, self.size)]
        return [one for one in cut if len(one) >= self.shortest]

    def rows(self, num_samples: int) -> int:
        """Rows stored of a window in arrays of hidden states: its real tokens, or one of all tokens."""
        return 1 if self.is_stored_whole else self.real_tokens(num_samples)

    def real_tokens(self, num_samples: int) -> int:
        """Tokens of a window that are not padding."""
        if self.is_fixed and self.is_sequence:
            return -(-num_samples * self.num_tokens // self.size)
        return self.num_states(num_samples)

    def num_states(self, num_samples: int) -> int:
        """Tokens that the model makes of a window."""
        return self.num_tokens if self.is_fixed else max(0, (num_samples + self.margin) // self.step)

    def weight(self, num_samples: int) -> int:
        """What a window's vector counts for in the mean over windows."""
        return self.real_tokens(num_samples) if self.is_sequence else num_samples

    @property
    def described(self) -> dict[str, Any]:
        """For the fingerprint."""
        stored = "whole windows" if self.is_stored_whole else "real tokens"
        return {"samples": self.size, "hop": self.size, "stored": stored}


class Probe:
    """Runs an encoder on a few inputs, at all its layers."""

    def __init__(self, encoder: FrozenEncoder) -> None:
        self._encoder, self._modality = encoder, encoder.request.modality
        self._where = f"{self._modality} encoder {encoder.request.model_id}"

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
        with _recording(encoder.layer_list) as calls:
            output = encoder.run(batch)
        if not calls.layers or calls.output is None:
            raise ValueError(
                f"{self._where}: its layers ({encoder.family.layers}) are not called in a forward pass. Choose another "
                "encoder."
            )
        received = [*calls.inputs, calls.output]
        layouts = tuple(layout_of(state, len(next(iter(batch.values())))) for state in received)
        mask = batch["attention_mask"].bool() if self._modality == "text" and "attention_mask" in batch else None
        return Recorded(
            states=[tokens_of(state, layout, batch) for state, layout in zip(received, layouts, strict=True)],
            mask=mask,
            output=output,
            calls=tuple(calls.layers),
            layouts=layouts,
            num_outputs=calls.num_outputs,
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
            pool, pooling = own_pool(encoder.tower, encoder.family, found.output, missing)
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

    @torch.inference_mode()
    def windows(self) -> Windows:
        """How the encoder's sounds are cut: by its processor's own window, or where there is none, as requested.

        Raises:
            ValueError: its window, or the number of its tokens, cannot be found out.
        """
        encoder = self._encoder
        rate = encoder.sampling_rate or 16_000
        shortest, noise = round(_SHORTEST_SOUND * rate), np.random.default_rng(0).normal(0, 0.1, 4 * rate)
        shapes = [
            {name: value.shape for name, value in encoder.prepare(noise[:size].astype(np.float32)).items()}
            for size in (rate, 3 * rate)
        ]
        if shapes[0] != shapes[1]:
            if encoder.anatomy.has_feature_maps:
                raise ValueError(
                    f"{self._where}: its layers change the number or width of tokens of sounds of any length. Choose "
                    "another audio encoder."
                )
            step, margin = self._step(rate // 2)
            size = max(round(encoder.request.audio_seconds * rate), step - margin)
            shortest = max(shortest, step - margin)
            return Windows(size=size, is_fixed=False, is_sequence=True, shortest=shortest, step=step, margin=margin)
        size = encoder.stated_window or _window_of(encoder.prepare, rate)
        tokens = self._first_states(np.zeros(size)).shape[0]
        is_sequence = not encoder.anatomy.has_feature_maps and self._is_sequence(size)
        return Windows(
            size=size,
            is_fixed=True,
            is_sequence=is_sequence,
            is_stored_whole=not is_sequence,
            shortest=shortest,
            num_tokens=tokens,
        )

    def _first_states(self, sound: np.ndarray) -> torch.Tensor:
        """`hidden_states[0]` of a sound, [tokens, d]; without tokens that its processor masks."""
        encoder = self._encoder
        layers = encoder.layers
        encoder.layers = (0,)
        states: dict[int, torch.Tensor] = {}
        batch = encoder.prepare(sound.astype(np.float32))
        try:
            with encoder.captured(states, batch, vectors=False):
                encoder.run(batch)
        finally:
            encoder.layers = layers
        found, mask = states[0][0].float(), batch.get("attention_mask")
        is_masked = mask is not None and mask.shape[1] == len(found) and bool(mask.any())
        return found[: int(mask.sum())] if mask is not None and is_masked else found

    def _step(self, base: int) -> tuple[int, int]:
        """Samples of a token, and those that n samples must be increased by: n have (n + margin) // step tokens.

        Raises:
            ValueError: no such numbers fit.
        """

        def count(num_samples: int) -> int:
            return len(self._first_states(np.zeros(num_samples)))

        start, far = count(base), count(4 * base)
        rough = 3 * base / max(1, far - start)
        first = _least(lambda size: count(size) > start, base, base + round(1.5 * rough) + 2)
        expected = first + _STEPS * rough
        last = _least(
            lambda size: count(size) > start + _STEPS, round(expected - rough - 2), round(expected + rough + 2)
        )
        step = round((last - first) / _STEPS)
        margin = (start + 1) * step - first
        if any(
            count(size) != (size + margin) // step for size in (base, first - 1, first, last, 2 * base + 77, 4 * base)
        ):
            raise ValueError(
                f"{self._where}: {base} to {4 * base} samples have {start} to {far} tokens in no regular step, so the "
                "tokens of a sound are unknown before it is encoded. Choose another audio encoder."
            )
        return step, margin

    def _is_sequence(self, size: int) -> bool:
        """Whether the tokens of a window are steps in time: a change of one half of it changes that half's tokens."""
        rng = np.random.default_rng(0)
        half = size // 2
        loud, other, soft, softer = (
            rng.normal(0, scale, length)
            for scale, length in ((0.1, half), (0.1, half), (0.01, size - half), (0.01, size - half))
        )
        states = self._first_states(np.concatenate([loud, soft]))
        changed = [self._first_states(np.concatenate(parts)) for parts in ((loud, softer), (other, soft))]
        by_second, by_first = (
            (states - one).norm(dim=-1) > _CHANGED * states.norm(dim=-1).clamp(min=1e-6) for one in changed
        )
        edge = len(states) * 9 // 20
        return not by_second[:edge].any() and bool(by_second[-edge:].all() and by_first[:edge].all())

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


@dataclass
class _Calls:
    """What the layers of a list received and returned."""

    layers: list[int] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    output: torch.Tensor | None = None
    num_outputs: int = 0


@contextmanager
def _recording(layers: Sequence[nn.Module]) -> Iterator[_Calls]:
    """Record all calls of some layers."""
    found = _Calls()

    def before(number: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            found.layers.append(number)
            found.inputs.append(entering(arguments, keywords)[1])

        return hook

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        found.output = leaving(output)
        found.num_outputs = len(output) if isinstance(output, (tuple, list)) else 0

    handles = [one.register_forward_pre_hook(before(i), with_kwargs=True) for i, one in enumerate(layers)]
    handles += [one.register_forward_hook(after) for one in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def tokens_of(state: torch.Tensor, layout: Layout, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[batch, tokens, d]; without what a model adds to texts to reach a length that it needs (Longformer)."""
    tokens = as_tokens(state, layout)
    return tokens[:, : inputs["input_ids"].shape[1]] if "input_ids" in inputs else tokens


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


def own_pool(tower: Any, family: Family, output: Any, missing: Sequence[str]) -> tuple[Pool, str]:
    """How the model's authors make one vector of an input, and its name for the fingerprint.

    Args:
        missing: weights that the checkpoint lacks, such as those of an untrained pooler.
    """
    modality = family.modality
    if family.core == FEATURES[modality]:
        return _features, f"the model's own {modality} features"
    if getattr(output, _EMBEDS[modality], None) is not None:
        return _embeds(_EMBEDS[modality]), f"the model's {_EMBEDS[modality]}"
    if modality == "text" and getattr(output, "last_hidden_state", None) is not None:  # DPR returns a vector alone
        return masked_mean, "mean of tokens"
    if getattr(output, "pooler_output", None) is not None and not missing and not _is_dense_pooler(tower):
        return _pooled, "the model's own pooled output"
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


def _pooled(output: Any, mask: torch.Tensor | None) -> torch.Tensor:
    pooled: torch.Tensor = output.pooler_output
    return pooled.flatten(1)


def _embeds(name: str) -> Pool:
    def pool(output: Any, mask: torch.Tensor | None) -> torch.Tensor:
        vectors: torch.Tensor = getattr(output, name)
        return vectors

    return pool


def _mean_of_places(output: Any, mask: torch.Tensor | None) -> torch.Tensor:
    state = output[0]
    if state.ndim == 3:
        return masked_mean(output, mask if mask is not None and mask.shape == state.shape[:2] else None)
    return as_tokens(state, layout_of(state, len(state))).mean(dim=1)


def _media(modality: Modality, size: int) -> list[Any]:
    """Three random pictures of several shapes, clips of `size` frames, or sounds of `size` samples."""
    rng = np.random.default_rng(0)
    if modality == "audio":
        return [rng.normal(0, 0.1, size).astype(np.float32) for _ in range(3)]
    frames = (size,) if modality == "video" else ()
    return [rng.integers(0, 256, (*frames, *shape, 3), dtype=np.uint8) for shape in ((64, 64), (48, 80), (90, 60))]


def _window_of(prepare: Callable[[np.ndarray], Mapping[str, torch.Tensor]], rate: int) -> int:
    """Samples of the window to which a processor cuts and pads all sounds: the fewest from which more do not change its
    output."""
    noise = np.random.default_rng(0).normal(0, 0.1, 4 * _LONGEST_WINDOW * rate).astype(np.float32)

    def is_whole(size: int, longer: Mapping[str, torch.Tensor]) -> bool:
        return all(torch.equal(value, longer[name]) for name, value in prepare(noise[:size]).items())

    high = rate // 4
    while not is_whole(high, longer := prepare(noise[: 2 * high])):
        high *= 2
        if high > _LONGEST_WINDOW * rate:
            raise ValueError("its processor makes all sounds equally long, and does not say how long. Choose another.")
    return _least(lambda size: is_whole(size, longer), high // 2, high)


def _least(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The least number above `low` and at most `high` for which a condition holds that holds from there on."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
