"""A frozen encoder: its inputs prepared, its truncated forward pass, its fingerprint.

The forward pass runs no layer behind the deepest one that is asked for. Hidden states are taken by hooks
on the layers themselves, so that `hidden_states[i]` is what layer i really receives.

What hidden states are stored as is computed on the device, unless that is a CPU: a GPU takes microseconds where one CPU
thread would be slower than the encoder, and a smaller type leaves fewer bytes to copy back.

`launch` starts a batch, and on a GPU returns at once; what it returns is waited for, and converted, where and when the
caller likes. `encode` does all three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import nn

from saffe_cache.core.features import BlockWeights, LanguageModelSpec, LanguageModelWeights
from saffe_cache.encoders.causal_tokens import CausalTokens, without_surrogates
from saffe_cache.encoders.families import Family, read_block, read_language_model
from saffe_cache.encoders.fingerprint import fingerprint_of
from saffe_cache.encoders.loading import EncoderRequest, load_model, load_processor, longest_text
from saffe_cache.encoders.pictures import quick_pictures
from saffe_cache.encoders.transfers import Transfers

Converted = tuple[torch.Tensor, ...]
"""Hidden states as they are stored, [batch, tokens, …], and what else came of their conversion, [batch, tokens]."""
Converter = Callable[[torch.Tensor], Converted]
"""Takes hidden states [batch, tokens, hidden_size], on any device, and leaves there what it makes of them."""

_LEAST_OF_TEXT = 3
"""Tokens of a language model's text: begin, end, and one between."""

__all__ = ["Converter", "Encoded", "EncoderRequest", "FrozenEncoder", "Launched", "load_encoder"]


@dataclass(frozen=True)
class Encoded:
    """Output for one batch on the CPU."""

    states: Mapping[int, np.ndarray]
    """`hidden_states[i]`, float32 [batch, tokens, hidden_size]; of a convolutional stage [batch, places, channels]."""
    vectors: Mapping[str, np.ndarray]
    """"pooled" and, where the model projects, "projected", float32 [batch, d]."""
    lengths: np.ndarray
    """int64 [batch]: real tokens; of feature maps, which have more or fewer by layer, places of the first."""
    converted: Mapping[int, Converted] = field(default_factory=dict)
    """The hidden states that the device converted; `states` does not hold them."""


class Launched:
    """A batch that the device has been given, in the type of the forward pass or of the storage."""

    def __init__(
        self,
        states: Mapping[int, torch.Tensor],
        vectors: Mapping[str, torch.Tensor],
        lengths: np.ndarray,
        event: Any,
        converted: Mapping[int, Converted] | None = None,
    ) -> None:
        self._states, self._vectors, self._lengths, self._event = states, vectors, lengths, event
        self._converted = converted or {}
        parts = [*states.values(), *vectors.values(), *chain.from_iterable(self._converted.values())]
        self.num_bytes = sum(tensor.nbytes for tensor in parts)

    def wait(self) -> None:
        """Until the device is through with it, and its inputs may be overwritten."""
        if self._event is not None:
            self._event.synchronize()

    def encoded(self) -> Encoded:
        """Waits, and converts. A float32 pass on a CPU is not copied."""
        self.wait()
        return Encoded(
            {i: values.float().numpy() for i, values in self._states.items()},
            {name: values.float().numpy() for name, values in self._vectors.items()},
            self._lengths,
            self._converted,
        )


class _ForwardDone(Exception):  # noqa: N818 — a way out, not an error
    """Every selected layer has been seen."""


class FrozenEncoder:
    """Made by `load_encoder`."""

    def __init__(self, request: EncoderRequest, family: Family, model: Any, processor: Any) -> None:
        self.request, self.family = request, family
        self._model, self._processor = model, processor
        self._config = model.config.get_text_config() if request.modality == "text" else model.config
        self._config = getattr(self._config, "vision_config", self._config)
        self._core = model.get_submodule(family.core) if family.core else model
        self._layers: nn.ModuleList = model.get_submodule(family.layers)
        self.num_layers = len(self._layers)
        self.hidden_size = _hidden_size(self._config)
        self.layers = self._check_layers(request.layers)
        self.max_length = longest_text(request, processor, self._config) if request.modality == "text" else None
        self.fingerprint = fingerprint_of(
            *(request, model, processor),
            pooling=family.pooling,
            max_length=self.max_length,
            is_language_model=bool(family.language_model),
        )
        self._with_vectors = request.pooled
        self._converters: Mapping[int, Converter] = {}
        self._quick = quick_pictures(processor) if request.modality == "image" else None
        self.transfers = Transfers(request.device)
        model.requires_grad_(False).eval().to(request.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the forward pass."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def converts(self) -> bool:
        """Does the device convert hidden states? On a CPU that would hold up the thread that launches batches."""
        return torch.device(self.request.device).type != "cpu"

    @property
    def sampling_rate(self) -> int | None:
        """Hz that sounds must have."""
        return getattr(self._processor, "sampling_rate", None)

    @property
    def vector_widths(self) -> dict[str, int]:
        """Width of each vector that the model has."""
        widths = {"pooled": self.hidden_size}
        if self.family.projection:
            widths["projected"] = int(self._config.projection_dim)
        return widths

    @property
    def blocks(self) -> Mapping[int, BlockWeights]:
        """The block that consumes each selected layer; none consumes the last layer's output.

        All blocks of a language model: to generate takes them all. None of a convolutional encoder: it has none.
        """
        if self.family.is_convolutional:
            return {}
        return {
            i: read_block(self.family, self._model, self._config, self._layers[i])
            for i in (range(self.num_layers) if self.family.language_model else self.layers)
            if i < self.num_layers
        }

    @cached_property
    def language_model(self) -> LanguageModelWeights | None:
        """What a causal language model has besides its blocks; None for other encoders.

        Raises:
            ValueError: its tokenizer has no begin or end token, or none of the library `tokenizers` is in it; texts
                have no room.
        """
        if not self.family.language_model:
            return None
        assert self.max_length is not None
        if self.max_length < _LEAST_OF_TEXT:
            raise ValueError(
                f"text encoder {self.request.model_id}: {self.max_length} tokens are left to a text behind "
                f"--position-offset {self.request.position_offset}, expected {_LEAST_OF_TEXT} or more. Choose a larger "
                "--max-length or a smaller offset."
            )
        backend, end = getattr(self._processor, "backend_tokenizer", None), self._processor.eos_token_id
        begin = self._processor.bos_token_id
        if backend is None or end is None or begin is None:
            raise ValueError(
                f"text encoder {self.request.model_id}: its tokenizer has begin token {begin} and end token {end}, and "
                f"is a {type(self._processor).__name__}; expected both, and a fast tokenizer. Choose another model."
            )
        tensors, eps = read_language_model(self.family, self._model)
        spec = LanguageModelSpec(
            begin_token=int(begin),
            end_token=int(end),
            prompt=self.request.prompt,
            max_length=self.max_length,
            position_offset=self.request.position_offset,
            layer_norm_eps=eps,
        )
        return LanguageModelWeights(spec, tensors, backend.to_str())

    def select(
        self, layers: Sequence[int], *, vectors: bool, converters: Mapping[int, Converter] | None = None
    ) -> None:
        """Choose what `encode` returns; without vectors it runs no layer behind the deepest one.

        Args:
            layers: whose hidden states.
            vectors: also the encoder's own?
            converters: of layers whose hidden states may be converted on the device.

        Raises:
            ValueError: the model has no such layer.
        """
        self.layers = self._check_layers(tuple(layers))
        self._with_vectors = vectors
        self._converters = converters or {}

    def prepare(self, raw: Any) -> dict[str, torch.Tensor]:
        """One picture or waveform into the model's input, each tensor [1, …]. Threads may call this."""
        if self.request.modality == "image":
            return dict(self._processor(images=[raw], return_tensors="pt"))
        return dict(self._processor([raw], sampling_rate=self.sampling_rate, return_tensors="pt"))

    def prepare_into(self, raw: Any, out: Mapping[str, torch.Tensor]) -> None:
        """The same numbers, written to the input's row of a batch, in its types. Threads and forks may call this.

        Raises:
            ValueError: the input comes out in another shape than the batch's.
        """
        if self._quick is not None and self._quick.fill(raw, out["pixel_values"]):
            return
        for name, value in self.prepare(raw).items():
            if value.shape[1:] != out[name].shape:
                raise ValueError(f"prepared, its {name} is {tuple(value.shape[1:])}, expected {tuple(out[name].shape)}")
            out[name].copy_(value[0])

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, its prompt and special tokens included, cut at `max_length`.

        A lone surrogate, which no tokenizer takes, becomes U+FFFD.
        """
        if self.language_model:
            return CausalTokens(self.language_model.tokenizer, self.language_model.spec).encode(texts)
        prompted = [without_surrogates(self.request.prompt.replace("{}", text)) for text in texts]
        return list(self._processor(prompted, truncation=True, max_length=self.max_length)["input_ids"])

    def pad(self, token_ids: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """A batch of texts, padded on the right, with its mask."""
        lengths = torch.tensor([len(ids) for ids in token_ids])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        padding = getattr(self._processor, "pad_token_id", None) or 0
        padded = torch.full(mask.shape, padding)
        padded[mask] = torch.tensor([token for ids in token_ids for token in ids])
        return {"input_ids": padded, "attention_mask": mask.long()}

    def encode(self, inputs: Mapping[str, torch.Tensor]) -> Encoded:
        """Run the encoder on one batch."""
        return self.launch(inputs).encoded()

    @torch.inference_mode()
    def launch(self, inputs: Mapping[str, torch.Tensor]) -> Launched:
        """Start the encoder on one batch; `inputs` must stay as they are until it has been waited for."""
        mask = inputs.get("attention_mask") if self.request.modality == "text" else None
        moved = self._arguments(inputs)
        states: dict[int, torch.Tensor] = {}
        vectors: dict[str, torch.Tensor] = {}
        with self._captured(states):
            output = self._core(**moved)
            if self._with_vectors:
                vectors = self._vectors(output, moved.get("attention_mask") if mask is not None else None)
        batch, tokens = next(iter(states.values())).shape[:2] if states else (len(next(iter(inputs.values()))), 0)
        lengths = mask.sum(dim=1).numpy() if mask is not None else np.full(batch, tokens)
        converted = {i: self._converters[i](states[i]) for i in self.layers if self.converts and i in self._converters}
        states = {i: states[i] for i in self.layers if i not in converted}
        parts = chain(states.values(), vectors.values(), *converted.values())
        hosted, event = self.transfers.to_host(list(parts))
        back = iter(hosted)
        states, vectors = {i: next(back) for i in states}, {name: next(back) for name in vectors}
        converted = {i: tuple(islice(back, len(parts))) for i, parts in converted.items()}
        return Launched(states, vectors, lengths.astype(np.int64), event, converted)

    def _arguments(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Of the model's forward: the inputs on its device and in its type, and what the family wants besides."""
        arguments: dict[str, Any] = self.transfers.to_device(inputs, self.dtype)
        if self.family.interpolates:
            arguments["interpolate_pos_encoding"] = True
        if self.family.language_model:
            length, offset = inputs["input_ids"].shape[1], self.request.position_offset
            positions = torch.arange(offset, offset + length, device=self.request.device)
            arguments |= {"position_ids": positions[None], "use_cache": False}
        if self.family.shuffles:
            batch, _, height, width = inputs["pixel_values"].shape
            patches = (height // self._config.patch_size) * (width // self._config.patch_size)
            arguments["noise"] = torch.arange(float(patches), device=self.request.device).expand(batch, -1)
        return arguments

    @contextmanager
    def _captured(self, states: dict[int, torch.Tensor]) -> Iterator[None]:
        """Collect `hidden_states[i]` of the selected layers, and leave the forward pass when no more is needed."""
        deepest = self.num_layers if self._with_vectors else max(self.layers)

        def keep_input(index: int) -> Any:
            def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                states[index] = self._as_tokens(arguments[0] if arguments else keywords["hidden_states"])
                if index == deepest:
                    raise _ForwardDone

            return hook

        def keep_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            states[self.num_layers] = self._as_tokens(output[0] if isinstance(output, tuple) else output)

        handles = [
            self._layers[i].register_forward_pre_hook(keep_input(i), with_kwargs=True)
            for i in self.layers
            if i < self.num_layers
        ]
        handles.append(self._layers[-1].register_forward_hook(keep_output))
        try:
            yield
        except _ForwardDone:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def _as_tokens(self, state: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width]: the places of a feature map [batch, width, height, width of the map] row by row."""
        return state.flatten(2).transpose(1, 2).contiguous() if self.family.is_convolutional else state

    def _vectors(self, output: Any, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        vectors = {"pooled": self.family.pool(output, mask)}
        if self.family.projection:
            vectors["projected"] = self._model.get_submodule(self.family.projection)(vectors["pooled"])
        return vectors

    def _check_layers(self, asked: tuple[int, ...] | None) -> tuple[int, ...]:
        layers = (self.num_layers - 1, self.num_layers) if asked is None else asked
        wrong = [i for i in layers if not 0 <= i <= self.num_layers]
        if wrong:
            raise ValueError(
                f"{self.request.modality} encoder {self.request.model_id}: no hidden_states[{wrong[0]}]; it has "
                f"0 (embeddings) to {self.num_layers} (output of the last layer). "
                f"Choose --layers {self.request.modality}=… among these."
            )
        return tuple(sorted(set(layers)))


def _hidden_size(config: Any) -> int:
    """Width of the encoder's own vector and of its last layer."""
    if hasattr(config, "hidden_sizes"):  # one for each stage
        return int(config.hidden_sizes[-1])
    return int(getattr(config, "hidden_size", 0) or config.d_model)


def load_encoder(request: EncoderRequest) -> FrozenEncoder:
    """Load a model and its processor or tokenizer.

    Raises:
        ValueError: the model cannot be had, its family has no adapter, weights that the forward pass needs
            are missing, or the layers do not exist.
    """
    family, model = load_model(request)
    return FrozenEncoder(request, family, model, load_processor(request))
