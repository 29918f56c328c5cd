"""A loaded model with its processor: preparation of inputs, the forward pass, and capture of its layers' states.

The forward pass stops after the deepest requested layer. Hidden states are captured by hooks on the layers themselves,
so `hidden_states[i]` is exactly what layer i receives.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import nn

from saffe_cache.core.devices import is_out_of_memory
from saffe_cache.core.features import LanguageModelSpec, LanguageModelWeights, Layout, LibraryModelSpec
from saffe_cache.core.tensors import as_tokens, entering, leaving
from saffe_cache.core.views import PLAIN, edge_of_photo
from saffe_cache.encoders.blocks import read_language_model
from saffe_cache.encoders.causal_tokens import CausalTokens, without_surrogates
from saffe_cache.encoders.checks import prepared
from saffe_cache.encoders.discovery import clip_frames, layers_of
from saffe_cache.encoders.families import Anatomy
from saffe_cache.encoders.loading import EncoderRequest, Loaded, longest_text, quietly
from saffe_cache.encoders.offloading import gathered, is_spread, present
from saffe_cache.encoders.pictures import quick_pictures, require_resizable
from saffe_cache.encoders.transfers import Transfers

_MIN_TEXT_TOKENS = 3
"""Fewest tokens of a language model's text: begin token, one token, end token."""
REAL_TOKENS = "real_tokens"
"""Name of the tensor of a batch of windows of sounds that says how many tokens of each are real, int64 [batch]."""
Padding = Literal["longest", "max_length", "equal_length"]
"""How the texts of a batch get one length: to the longest of them; to the model's full length; not at all."""


class _ForwardDone(Exception):  # noqa: N818 — ends a forward pass early, no error
    """All selected layers have been captured."""


class RunnableModel:
    """A model and its processor on the device, which run inputs of one modality."""

    def __init__(self, request: EncoderRequest, loaded: Loaded, processor: Any) -> None:
        self.request, self.family = request, loaded.family
        self._model, self._processor = loaded.model, processor
        self._config = _config_of(loaded)
        self._forward = attrgetter(self.family.core)(self._model) if self.family.core else self._model
        self.max_length = longest_text(request, processor, self._model, self._config)
        self.padding: Padding = "longest"
        self._quick = quick_pictures(processor) if request.modality == "image" else None
        self.transfers = Transfers(request.device)
        self._is_spread = is_spread(self._model)
        for part in (self._model, self.family.pool):
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
                if part is not self._model or not self._is_spread:
                    self._move(part)

    def _move(self, part: nn.Module) -> None:
        """Move the model, or another part of the encoder, to the device.

        Raises:
            ValueError: it does not fit into the device's memory.
        """
        try:
            part.to(self.request.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"{self.request.where}: its weights do not fit into the memory of {self.request.device}. Use "
                "--device-map auto, which adds other GPUs, this machine's memory and its disk."
            ) from None

    def seen_part(self, width: int, height: int) -> tuple[float, float, float, float] | None:
        """Left, top, right and bottom of what the model sees of a picture, as fractions of its size; None if how its
        processor crops is unknown."""
        return None if self._quick is None else self._quick.seen_part(width, height)

    def decoded_edge(self, view: str = PLAIN) -> int | None:
        """Pixels that are enough for the shorter edge of a decoded picture; None if all are needed.

        Twice those of the resize, whose filter then sees about the same picture; of a crop, in the crop itself.
        """
        edge = self._quick.edge if self._quick and self.request.decoding != "full" else None
        return None if edge is None else edge_of_photo(view, 2 * edge)

    @property
    def tower(self) -> Any:
        """The model that owns the layers."""
        return self._model.get_submodule(self.family.tower)

    @property
    def layer_list(self) -> list[nn.Module]:
        """The layers; each may be called several times."""
        return layers_of(self._model.get_submodule(self.family.layers))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the forward pass."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def attention(self) -> str:
        """Implementation of the model's attention."""
        return str(self._config._attn_implementation)

    @property
    def sampling_rate(self) -> int | None:
        """Sampling rate in Hz that sounds must have."""
        return getattr(self._processor, "sampling_rate", None)

    @property
    def num_frames(self) -> int | None:
        """Frames of a clip; None where inputs are no clips."""
        if self.request.modality != "video":
            return None
        return self.request.video_frames or clip_frames(self.tower.config)

    @property
    def stated_window(self) -> int | None:
        """Samples to which the processor cuts and pads all sounds, where it says so."""
        return getattr(self._processor, "n_samples", None) or getattr(self._processor, "nb_max_samples", None)

    def set_attention(self, implementation: str) -> None:
        """Change the implementation of the model's attention."""
        with quietly():
            self._model.set_attn_implementation(implementation)

    def _present(self, *layers: int) -> AbstractContextManager[None]:
        """Keep the weights of some layers, and all outside the layers, in this machine's memory, to be read."""
        listed = self.layer_list
        kept = [listed[layer] for layer in layers]
        return present(self._model, [one for one in listed if not any(one is other for other in kept)])

    @cached_property
    def language_model(self) -> LanguageModelWeights | None:
        """The parts of a causal language model that are not blocks; None for other encoders.

        Raises:
            ValueError: its tokenizer has no begin or end token or is no fast tokenizer, or no tokens remain for texts.
        """
        if not self.family.generates:
            return None
        assert self.max_length is not None
        if self.max_length < _MIN_TEXT_TOKENS:
            raise ValueError(
                f"{self.request.where}: {self.max_length} tokens remain for a text after --position-offset "
                f"{self.request.position_offset}, expected {_MIN_TEXT_TOKENS} or more. Choose a larger --max-length or "
                "a smaller offset."
            )
        backend, end = getattr(self._processor, "backend_tokenizer", None), self._processor.eos_token_id
        begin = self._processor.bos_token_id
        begin = end if begin is None and self.family.is_language_model else begin  # as of GPT-2: one token for both
        if backend is None or end is None or begin is None:
            raise ValueError(
                f"{self.request.where}: its tokenizer is a {type(self._processor).__name__} with begin token {begin} "
                f"and end token {end}, expected a fast tokenizer with both. Choose another model."
            )
        with self._present():
            tensors, more = read_language_model(self.family, self._model)
        spec = (LibraryModelSpec if self.family.is_language_model else LanguageModelSpec)(
            begin_token=int(begin),
            end_token=int(end),
            prompt=self.request.text_template,
            max_length=self.max_length,
            position_offset=self.request.position_offset,
            **more,
        )
        return LanguageModelWeights(spec, tensors, backend.to_str())

    def prepare(self, raw: Any) -> dict[str, torch.Tensor]:
        """Turn one picture, clip [frames, height, width, 3], or window of a sound, into the model's input, each tensor
        [1, …]. Threads may call this."""
        return prepared(self._processor, self.request.modality, [raw])

    def prepare_into(self, raw: Any, out: Mapping[str, torch.Tensor]) -> None:
        """As `prepare`, but write to the input's row of a batch, in its types. Threads and forks may call this.

        Raises:
            ValueError: the prepared input has another shape than the batch, or its picture is too narrow.
        """
        if self.request.modality == "image":
            require_resizable(raw, self._processor)
        if self._quick is not None and self._quick.fill(raw, out["pixel_values"]):
            return
        for name, value in self.prepare(raw).items():
            if value.shape[1:] != out[name].shape:
                raise ValueError(f"its prepared {name} is {tuple(value.shape[1:])}, expected {tuple(out[name].shape)}")
            out[name].copy_(value[0])

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with its prompt and special tokens, truncated at `max_length`.

        Lone surrogates, which tokenizers do not accept, become U+FFFD.
        """
        return self._tokenize(texts, self.max_length)

    def count_truncated(self, texts: Sequence[str], token_ids: Sequence[Sequence[int]]) -> int:
        """How many texts are longer than `max_length`; `token_ids` are theirs from `tokenize`."""
        limit = self.max_length or sys.maxsize
        candidates = [text for text, ids in zip(texts, token_ids, strict=True) if len(ids) >= limit]
        return sum(len(ids) > limit for ids in self._tokenize(candidates, None)) if candidates else 0

    def _tokenize(self, texts: Sequence[str], max_length: int | None) -> list[list[int]]:
        if self.language_model:
            spec = replace(self.language_model.spec, max_length=max_length or sys.maxsize)
            return CausalTokens(self.language_model.tokenizer, spec).encode(texts)
        prompted = [without_surrogates(self.request.text_template.replace("{}", text)) for text in texts]
        cut = {"truncation": True, "max_length": max_length} if max_length else {"verbose": False}
        found = list(self._processor(prompted, **cut)["input_ids"])
        if self.padding == "max_length":
            return [self._filled(ids, max_length or len(ids)) for ids in found]
        return found

    def _filled(self, ids: list[int], length: int) -> list[int]:
        """Token ids with padding up to a length, on the side of the tokenizer."""
        padding = [self._pad_token] * (length - len(ids))
        return padding + ids if self._processor.padding_side == "left" else ids + padding

    @property
    def _pad_token(self) -> int:
        return getattr(self._processor, "pad_token_id", None) or 0

    def pad(self, token_ids: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """A batch of texts, padded on the right, with its mask; without one if the model pads all texts alike."""
        lengths = torch.tensor([len(ids) for ids in token_ids])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        padded = torch.full(mask.shape, self._pad_token)
        padded[mask] = torch.tensor([token for ids in token_ids for token in ids])
        return {"input_ids": padded} | ({} if self.padding == "max_length" else {"attention_mask": mask.long()})

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """What the model itself returns for a batch."""
        return self._gathered(self._forward(**self._arguments(inputs)))

    def _gathered(self, output: Any) -> Any:
        """What the model's parts return, on the device."""
        return gathered(output, self.request.device) if self._is_spread else output

    def _arguments(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Arguments of the forward pass: the inputs on its device and in its type, and those of its family; of a
        discovered one, the inputs that it takes, and the settings that it needs where it has them."""
        own = {name: value for name, value in inputs.items() if name != REAL_TOKENS}
        arguments: dict[str, Any] = self.transfers.to_device(own, self.dtype)
        if self.family.is_discovered:
            settings = {"use_cache": False, "return_dict": True, "skip_predictor": True}
            settings |= {"interpolate_pos_encoding": True} if self.request.image_size else {}
            arguments = {name: value for name, value in {**arguments, **settings}.items() if name in self._accepted}
        if self.family.interpolates:
            arguments["interpolate_pos_encoding"] = True
        if self.family.generates:
            length, offset = inputs["input_ids"].shape[1], self.request.position_offset
            if "position_ids" in self._accepted:
                positions = torch.arange(offset, offset + length, device=self.request.device)
                arguments["position_ids"] = positions[None]
            arguments["use_cache"] = False
        if self.family.shuffles:
            batch, _, height, width = inputs["pixel_values"].shape
            patches = (height // self._config.patch_size) * (width // self._config.patch_size)
            arguments["noise"] = torch.arange(float(patches), device=self.request.device).expand(batch, -1)
        return arguments

    @cached_property
    def _accepted(self) -> frozenset[str]:
        """Names of the arguments of the forward pass."""
        return frozenset(inspect.signature(getattr(self._forward, "forward", self._forward)).parameters)

    @contextmanager
    def captured(
        self,
        states: dict[int, torch.Tensor],
        inputs: Mapping[str, torch.Tensor],
        anatomy: Anatomy,
        layers: Collection[int],
        *,
        vectors: bool,
    ) -> Iterator[None]:
        """Capture `hidden_states[i]` of some layers, and end the forward pass when all are captured, unless vectors are
        needed too."""
        count = len(anatomy.calls)
        steps, deepest = iter(range(count)), count if vectors else max(layers)

        def keep(step: int, state: torch.Tensor) -> None:
            states[step] = self._gathered(tokens_of(state, anatomy.layouts[step], inputs))

        def before(_: int, state: torch.Tensor) -> None:
            step = next(steps)
            if step in layers:
                keep(step, state)
            if step == deepest:
                raise _ForwardDone

        def after(layer: int, output: Any) -> None:
            if layer == anatomy.calls[-1]:
                keep(count, leaving(output))

        try:
            with watched(self.layer_list, before, after):
                yield
        except _ForwardDone:
            pass

    def vectors_of(self, output: Any, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The encoder's own vectors, [batch, d] each, of what `run` returned and the mask of padded texts."""
        vectors = {"pooled": self.family.pool(output, mask)}
        if self.family.projection:
            projected = self._model.get_submodule(self.family.projection)(vectors["pooled"])
            vectors["projected"] = self._gathered(projected)
        return vectors


def _config_of(loaded: Loaded) -> Any:
    """The config of the part of a model that encodes the modality."""
    if loaded.family.is_discovered:
        return loaded.model.get_submodule(loaded.family.tower).config
    config = loaded.model.config
    config = config.get_text_config() if loaded.family.modality == "text" else config
    return getattr(config, "vision_config", config)


def tokens_of(state: torch.Tensor, layout: Layout, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[batch, tokens, d]; without what a model adds to texts to reach a length that it needs (Longformer)."""
    tokens = as_tokens(state, layout)
    return tokens[:, : inputs["input_ids"].shape[1]] if "input_ids" in inputs else tokens


@contextmanager
def watched(
    layers: Sequence[nn.Module], before: Callable[[int, torch.Tensor], None], after: Callable[[int, Any], None]
) -> Iterator[None]:
    """At each call of some layers, call functions with the layer's number: with the hidden states that it takes, and
    with what it returns."""

    def take(layer: int, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        before(layer, entering(arguments, keywords)[1])

    def give(layer: int, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        after(layer, output)

    handles = [one.register_forward_pre_hook(partial(take, i), with_kwargs=True) for i, one in enumerate(layers)]
    handles += [one.register_forward_hook(partial(give, i)) for i, one in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
