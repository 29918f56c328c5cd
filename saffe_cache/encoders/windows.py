"""How sounds of any length are cut into windows, which is measured with a model's own processor and first layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from saffe_cache.encoders.families import Anatomy
from saffe_cache.encoders.running import RunnableModel

_CHANGED = 1e-3
"""Relative difference of a token's embedding from which it has changed."""
_SHORTEST_SOUND = 0.025
"""Seconds of one window of a spectrogram, in all supported models; a shorter sound has no frames, only padding."""
_LONGEST_WINDOW = 60
"""Seconds of the longest window that is looked for where a processor does not say its own."""
_STEPS = 8
"""Tokens over which the samples of one token are measured."""

_States = Callable[[np.ndarray], torch.Tensor]
"""`hidden_states[0]` of a sound, [tokens, d]."""


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
        """The windows of a sound.

        Raises:
            ValueError: it is too short for one token.
        """
        cut = [range(first, min(first + self.size, num_samples)) for first in range(0, num_samples, self.size)]
        cut = [one for one in cut if len(one) >= self.shortest]
        if not cut:
            raise ValueError(
                f"the sound has {num_samples} samples, expected {self.shortest} or more, one window of a spectrum"
            )
        return cut

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


class CutKinds(NamedTuple):
    """Kinds of sounds whose stored tokens are not those that one run of the model saw."""

    has_partial: bool = False
    """Some are shorter than a window that is padded, and only their real tokens are stored."""
    has_several: bool = False
    """Some have several windows, each of which the model saw alone."""
    has_lengths: bool = False
    """They have any length, and differ in it, so that training pads them."""
    num_tokens: int = 0
    """Tokens of each, if they may have any length and all have the same; otherwise 0."""


@torch.inference_mode()
def measured_windows(model: RunnableModel, anatomy: Anatomy) -> Windows:
    """How a model's sounds are cut: by its processor's own window, or where there is none, as requested.

    Raises:
        ValueError: its window, or the number of its tokens, cannot be found out.
    """
    where, rate, states = model.request.where, model.sampling_rate or 16_000, partial(_first_states, model, anatomy)
    shortest, noise = round(_SHORTEST_SOUND * rate), np.random.default_rng(0).normal(0, 0.1, 4 * rate)
    shapes = [
        {name: value.shape for name, value in model.prepare(noise[:size].astype(np.float32)).items()}
        for size in (rate, 3 * rate)
    ]
    if shapes[0] != shapes[1]:
        if anatomy.has_feature_maps:
            raise ValueError(
                f"{where}: its layers change the number or width of tokens of sounds of any length. Choose another "
                "audio encoder."
            )
        step, margin = _step(where, states, rate // 2)
        size = max(round(model.request.audio_seconds * rate), step - margin)
        shortest = max(shortest, step - margin)
        return Windows(size=size, is_fixed=False, is_sequence=True, shortest=shortest, step=step, margin=margin)
    size = model.stated_window or _window_of(model.prepare, rate)
    is_sequence = not anatomy.has_feature_maps and _is_sequence(states, size)
    return Windows(
        size=size,
        is_fixed=True,
        is_sequence=is_sequence,
        is_stored_whole=not is_sequence,
        shortest=shortest,
        num_tokens=len(states(np.zeros(size))),
    )


def _first_states(model: RunnableModel, anatomy: Anatomy, sound: np.ndarray) -> torch.Tensor:
    """`hidden_states[0]` of a sound, [tokens, d]; without tokens that its processor masks."""
    states: dict[int, torch.Tensor] = {}
    batch = model.prepare(sound.astype(np.float32))
    with model.captured(states, batch, anatomy, (0,), vectors=False):
        model.run(batch)
    found, mask = states[0][0].float(), batch.get("attention_mask")
    is_masked = mask is not None and mask.shape[1] == len(found) and bool(mask.any())
    return found[: int(mask.sum())] if mask is not None and is_masked else found


def _step(where: str, states: _States, base: int) -> tuple[int, int]:
    """Samples of a token, and those that n samples must be increased by: n have (n + margin) // step tokens.

    Raises:
        ValueError: no such numbers fit.
    """

    def count(num_samples: int) -> int:
        return len(states(np.zeros(num_samples)))

    start, far = count(base), count(4 * base)
    rough = 3 * base / max(1, far - start)
    first = _least(lambda size: count(size) > start, base, base + round(1.5 * rough) + 2)
    expected = first + _STEPS * rough
    last = _least(lambda size: count(size) > start + _STEPS, round(expected - rough - 2), round(expected + rough + 2))
    step = round((last - first) / _STEPS)
    margin = (start + 1) * step - first
    if any(count(size) != (size + margin) // step for size in (base, first - 1, first, last, 2 * base + 77, 4 * base)):
        raise ValueError(
            f"{where}: {base} to {4 * base} samples have {start} to {far} tokens in no regular step, so the "
            "tokens of a sound are unknown before it is encoded. Choose another audio encoder."
        )
    return step, margin


def _is_sequence(states: _States, size: int) -> bool:
    """Whether the tokens of a window are steps in time: a change of one half of it changes that half's tokens."""
    rng = np.random.default_rng(0)
    half = size // 2
    loud, other, soft, softer = (
        rng.normal(0, scale, length)
        for scale, length in ((0.1, half), (0.1, half), (0.01, size - half), (0.01, size - half))
    )
    before = states(np.concatenate([loud, soft]))
    changed = [states(np.concatenate(parts)) for parts in ((loud, softer), (other, soft))]
    by_second, by_first = (
        (before - one).norm(dim=-1) > _CHANGED * before.norm(dim=-1).clamp(min=1e-6) for one in changed
    )
    edge = len(before) * 9 // 20
    return not by_second[:edge].any() and bool(by_second[-edge:].all() and by_first[:edge].all())


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
