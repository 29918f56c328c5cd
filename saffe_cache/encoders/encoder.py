"""A frozen encoder: preparation of inputs, truncated forward pass, fingerprint.

The forward pass stops after the deepest requested layer. Hidden states are captured by hooks on the layers themselves,
so `hidden_states[i]` is exactly what layer i receives.

Unless the device is a CPU, it also converts hidden states to their storage type: a GPU takes microseconds, where one
CPU thread would take longer than the encoder, and smaller types leave fewer bytes to copy back.

`launch` starts a batch and, on a GPU, returns at once; the caller decides when to wait for and convert its result.
`encode` does all three.

A batch that does not fit into memory is encoded in halves. How it is split depends only on its shape and the available
memory, not on earlier batches: it is tried as a whole, tried again with nothing else in flight, and then split in the
middle, each half in the same way. Shapes that failed are remembered, which only skips attempts that would fail. A
resumed extraction therefore splits the same batches as an uninterrupted one and produces the same bytes, as long as the
encoder has the same memory. If other programs take memory, numbers may differ by rounding, because a matrix product of
another height may add in another order.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import nn

from saffe_cache.core.devices import is_out_of_memory
from saffe_cache.core.features import (
    BlockWeights,
    CacheError,
    LanguageModelSpec,
    LanguageModelWeights,
    LibraryModelSpec,
)
from saffe_cache.core.tensors import entering, leaving
from saffe_cache.encoders.blocks import library_block, read_block, read_language_model
from saffe_cache.encoders.causal_tokens import CausalTokens, without_surrogates
from saffe_cache.encoders.checks import check_processor
from saffe_cache.encoders.discovery import OwnProcessor, clip_frames, layers_of
from saffe_cache.encoders.loading import (
    EncoderRequest,
    Loaded,
    fingerprint_of,
    load_model,
    load_processor,
    longest_text,
    quietly,
)
from saffe_cache.encoders.offloading import gathered, is_spread, present
from saffe_cache.encoders.pictures import quick_pictures, require_resizable
from saffe_cache.encoders.probing import Anatomy, Padding, Probe, Windows, tokens_of
from saffe_cache.encoders.selection import TokenSelection
from saffe_cache.encoders.sentence_transformers import SentenceVector, read_repository
from saffe_cache.encoders.transfers import Converter, Encoded, Launched, Transfers

logger = logging.getLogger(__name__)


_MIN_TEXT_TOKENS = 3
"""Fewest tokens of a language model's text: begin token, one token, end token."""


REAL_TOKENS = "real_tokens"
"""Name of the tensor of a batch of windows of sounds that says how many tokens of each are real, int64 [batch]."""


class _ForwardDone(Exception):  # noqa: N818 — ends a forward pass early, no error
    """All selected layers have been captured."""


class FrozenEncoder:
    """Made by `load_encoder`."""

    def __init__(self, request: EncoderRequest, loaded: Loaded, processor: Any) -> None:
        self.request, self.family = request, loaded.family
        self._model, self._processor = loaded.model, processor
        self._config = _config_of(loaded)
        self._forward = attrgetter(self.family.core)(self._model) if self.family.core else self._model
        self.max_length = longest_text(request, processor, self._model, self._config)
        self._with_vectors = request.pooled
        self._converters: Mapping[int, Converter] = {}
        self._quick = quick_pictures(processor) if request.modality == "image" else None
        self.transfers = Transfers(request.device)
        chain = self.family.pool if isinstance(self.family.pool, SentenceVector) else None
        self._is_spread = is_spread(self._model)
        for part in (self._model, *([chain] if chain else [])):
            part.requires_grad_(False).eval()
            if part is not self._model or not self._is_spread:
                self._move(part)
        self.padding: Padding = "longest"
        self.anatomy = Probe(self).anatomy(loaded.missing) if self.family.is_discovered else self._known_anatomy()
        self.num_layers, self.hidden_size = len(self.anatomy.calls), self.anatomy.widths[-1]
        self.layers = self._check_layers(request.layers)
        self.selection, self.num_tokens = TokenSelection.parse(request.tokens), None
        self._returns_tokens = True
        """Whether the model returns one vector per token of its last layer; SEW makes two of each."""
        self.windows = self._measured_windows() if request.modality == "audio" else None
        if self.windows and self.windows.is_sequence:
            self.anatomy = replace(self.anatomy, class_tokens=0)
        if self.selection:
            self.num_tokens = self._count_tokens(self.selection)
        self.fingerprint = fingerprint_of(
            *(request, self._model, processor),
            pooling=self.family.pooling,
            pooling_weights=chain,
            max_length=self.max_length,
            is_language_model=self.family.generates,
            padding=self.padding,
            num_tokens=self.num_tokens,
            windows=self.windows.described if self.windows else None,
        )

    def _move(self, part: nn.Module) -> None:
        """Move the model, or another part of the encoder, to the device.

        Raises:
            ValueError: it does not fit into the device's memory.
        """
        request = self.request
        try:
            part.to(request.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"{request.modality} encoder {request.model_id}: its weights do not fit into the memory of "
                f"{request.device}. Use --device-map auto, which adds other GPUs, this machine's memory and its disk."
            ) from None

    def _measured_windows(self) -> Windows:
        """How sounds are cut; tokens that are steps in time have no class token among them.

        Raises:
            ValueError: they cannot be cut, or the windows would differ in the number of their selected tokens.
        """
        windows = Probe(self).windows()
        if windows.is_sequence and self.family.is_discovered:
            found = Probe(self).record(Probe(self).inputs())
            self._returns_tokens = found.states[-1].shape[:2] == found.output[0].shape[:2]
        if not self.selection:
            return windows
        if windows.is_sequence and self.selection.top:
            raise ValueError(
                f"--tokens audio={self.selection.text}: sounds have windows of any number of tokens. Use mean, or all."
            )
        return replace(windows, is_stored_whole=True)

    def seen_part(self, width: int, height: int) -> tuple[float, float, float, float] | None:
        """Left, top, right and bottom of what the model sees of a picture, as fractions of its size; None if how its
        processor crops is unknown."""
        return None if self._quick is None else self._quick.seen_part(width, height)

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
    def converts(self) -> bool:
        """Whether the device converts hidden states. On a CPU this would delay the thread that launches batches."""
        return torch.device(self.request.device).type != "cpu"

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

    @property
    def vector_widths(self) -> Mapping[str, int]:
        """Width of each of the model's vectors."""
        return self.anatomy.vectors

    @property
    def block_layers(self) -> list[int]:
        """The layers whose consuming block is cached; no block consumes the last layer's output.

        Of language models all, which generation needs. Feature maps have none, and those of selected tokens would lack
        the others.
        """
        if self.anatomy.has_feature_maps or self.selection:
            return []
        layers = range(self.num_layers) if self.family.generates else self.layers
        return [layer for layer in layers if layer < self.num_layers]

    @property
    def blocks(self) -> Mapping[int, BlockWeights]:
        """The blocks of these layers; of a discovered family with more weights than they turn out to need."""
        if self.family.is_own:
            return {}
        read = self.block if self.family.block else self.library_block
        return {layer: read(layer) for layer in self.block_layers}

    def block(self, layer: int) -> BlockWeights:
        """The block that consumes `hidden_states[layer]`, of a family with known roles of weights."""
        with self._present(layer):
            return read_block(self.family, self._model, self._config, self.layer_list[layer])

    def library_block(self, layer: int, *, with_first: bool = False) -> BlockWeights:
        """As `block`, to be rebuilt by the library's own code.

        Args:
            with_first: whether the first layer's weights are among the further ones.
        """
        with self._present(self.anatomy.calls[layer], *([self.anatomy.calls[0]] if with_first else [])):
            return library_block(
                *(self._model, self.family, self.anatomy, layer, Probe(self).inputs()),
                with_first=with_first,
                has_equal_lengths=self.padding == "equal_length",
            )

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
                f"text encoder {self.request.model_id}: {self.max_length} tokens remain for a text after "
                f"--position-offset {self.request.position_offset}, expected {_MIN_TEXT_TOKENS} or more. Choose a "
                "larger --max-length or a smaller offset."
            )
        backend, end = getattr(self._processor, "backend_tokenizer", None), self._processor.eos_token_id
        begin = self._processor.bos_token_id
        begin = end if begin is None and self.family.is_language_model else begin  # as of GPT-2: one token for both
        if backend is None or end is None or begin is None:
            raise ValueError(
                f"text encoder {self.request.model_id}: its tokenizer is a {type(self._processor).__name__} with begin "
                f"token {begin} and end token {end}, expected a fast tokenizer with both. Choose another model."
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

    def select(
        self, layers: Sequence[int], *, vectors: bool, converters: Mapping[int, Converter] | None = None
    ) -> None:
        """Choose what `encode` returns; without vectors, the forward pass stops at the deepest layer.

        Args:
            layers: layers whose hidden states are returned.
            vectors: whether the encoder's own vectors are returned as well.
            converters: for layers whose hidden states may be converted on the device.

        Raises:
            ValueError: the model has no such layer.
        """
        self.layers = self._check_layers(tuple(layers))
        self._with_vectors = vectors
        self._converters = converters or {}

    def prepare(self, raw: Any) -> dict[str, torch.Tensor]:
        """Turn one picture, clip [frames, height, width, 3], or window of a sound, into the model's input, each tensor
        [1, …]. Threads may call this."""
        if self.request.modality == "image":
            return dict(self._processor(images=[raw], return_tensors="pt"))
        if self.request.modality == "video":
            return dict(self._processor(videos=[raw], do_sample_frames=False, return_tensors="pt"))
        return dict(self._processor([raw], sampling_rate=self.sampling_rate, return_tensors="pt"))

    def cut(self, num_samples: int) -> list[range]:
        """The windows of a sound.

        Raises:
            ValueError: it is too short for one token.
        """
        assert self.windows is not None
        cut = self.windows.cut(num_samples)
        if not cut:
            raise ValueError(
                f"the sound has {num_samples} samples, expected {self.windows.shortest} or more, one window of a "
                "spectrum"
            )
        return cut

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

    def encode(self, inputs: Mapping[str, torch.Tensor]) -> Encoded:
        """Run the encoder on one batch."""
        return self.launch(inputs).encoded()

    @torch.inference_mode()
    def launch(self, inputs: Mapping[str, torch.Tensor]) -> Launched:
        """Start the encoder on one batch; `inputs` must not change until the batch has been waited for."""
        mask = inputs.get("attention_mask") if self.request.modality == "text" else None
        states: dict[int, torch.Tensor] = {}
        vectors: dict[str, torch.Tensor] = {}
        with self.captured(states, inputs, vectors=self._with_vectors):
            output = self.run(inputs)
            if self._with_vectors:
                real = mask if mask is not None else self._real_tokens(output, inputs)
                vectors = self.vectors_of(output, None if real is None else real.to(self.request.device))
        lengths = None if mask is None else mask.sum(dim=1)
        if self.selection:
            chosen = {}
            for i, state in states.items():
                real = mask if mask is not None else self._real_tokens(state, inputs)
                real = None if real is None else real.bool().to(self.request.device)
                chosen[i] = self.selection.apply(state, self.anatomy.class_tokens, real)
            states = {i: state for i, (state, _) in chosen.items()}
            lengths = next((counts.cpu() for _, counts in chosen.values() if counts is not None), lengths)
        batch, tokens = next(iter(states.values())).shape[:2] if states else (len(next(iter(inputs.values()))), 0)
        if REAL_TOKENS in inputs:
            lengths = self._rows_of(inputs[REAL_TOKENS], tokens)
        lengths = torch.full((batch,), tokens) if lengths is None else lengths
        converted = {i: self._converters[i](states[i]) for i in self.layers if self.converts and i in self._converters}
        states = {i: states[i] for i in self.layers if i not in converted}
        parts = chain(states.values(), vectors.values(), *converted.values())
        hosted, event = self.transfers.to_host(list(parts))
        back = iter(hosted)
        states, vectors = {i: next(back) for i in states}, {name: next(back) for name in vectors}
        converted = {i: tuple(islice(back, len(parts))) for i, parts in converted.items()}
        return Launched(states, vectors, lengths.numpy().astype(np.int64), event, converted)

    def set_attention(self, implementation: str) -> None:
        """Change the implementation of the model's attention."""
        with quietly():
            self._model.set_attn_implementation(implementation)

    def _real_tokens(self, output: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Mask of the real tokens of windows of sounds, bool [batch, tokens]; None if all are."""
        state = output if isinstance(output, torch.Tensor) else output[0]
        if REAL_TOKENS not in inputs or not self.windows or not self.windows.is_sequence or state.ndim != 3:
            return None
        if state is not output and not self._returns_tokens:
            return None
        mask = torch.arange(state.shape[1]) < inputs[REAL_TOKENS][:, None]
        return None if bool(mask.all()) else mask

    def _rows_of(self, real: torch.Tensor, tokens: int) -> torch.Tensor:
        """Rows stored of windows of sounds with so many real tokens, of the `tokens` that the model made.

        Raises:
            CacheError: the model has made fewer.
        """
        assert self.windows is not None
        if self.windows.is_stored_whole:
            return torch.ones_like(real)
        if tokens and int(real.max()) > tokens:
            raise CacheError(
                f"{self.fingerprint.key}: the encoder made {tokens} tokens of a window of a sound, expected "
                f"{int(real.max())}. Use another encoder; this one is irregular."
            )
        return real

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """What the model itself returns for a batch."""
        return self._gathered(self._forward(**self._arguments(inputs)))

    def _gathered(self, output: Any) -> Any:
        """What the model's parts return, on the device."""
        return gathered(output, self.request.device) if self._is_spread else output

    def _arguments(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Arguments of the forward pass: the inputs on its device and in its type, and those of its family."""
        own = {name: value for name, value in inputs.items() if name != REAL_TOKENS}
        arguments: dict[str, Any] = self.transfers.to_device(own, self.dtype)
        if self.family.is_discovered:
            arguments = self._accepted_arguments(arguments)
        if self.family.interpolates:
            arguments["interpolate_pos_encoding"] = True
        if self.family.generates:
            length, offset = inputs["input_ids"].shape[1], self.request.position_offset
            positions = torch.arange(offset, offset + length, device=self.request.device)
            if "position_ids" in self._accepted:
                arguments["position_ids"] = positions[None]
            arguments["use_cache"] = False
        if self.family.shuffles:
            batch, _, height, width = inputs["pixel_values"].shape
            patches = (height // self._config.patch_size) * (width // self._config.patch_size)
            arguments["noise"] = torch.arange(float(patches), device=self.request.device).expand(batch, -1)
        return arguments

    def _accepted_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The inputs that a discovered model takes, and the settings that it needs where it has them."""
        names = self._accepted
        settings = {"use_cache": False, "return_dict": True, "skip_predictor": True}
        if self.request.image_size:
            settings["interpolate_pos_encoding"] = True
        return {name: value for name, value in arguments.items() if name in names} | {
            name: value for name, value in settings.items() if name in names
        }

    @cached_property
    def _accepted(self) -> frozenset[str]:
        """Names of the arguments of the forward pass."""
        return frozenset(inspect.signature(getattr(self._forward, "forward", self._forward)).parameters)

    def _count_tokens(self, selection: TokenSelection) -> int:
        """Tokens of an input before the selection; of texts, of the longest.

        Raises:
            ValueError: there are none to select.
        """
        if self.request.modality == "text":
            assert self.max_length is not None
            selection.check(self.max_length, self.anatomy.class_tokens, is_text=True)
            return self.max_length
        probe = Probe(self)
        states = probe.record(probe.inputs()).states
        for layer in self.layers:
            selection.check(states[layer].shape[1], self.anatomy.class_tokens, is_text=False)
        return max(states[layer].shape[1] for layer in self.layers)

    def _known_anatomy(self) -> Anatomy:
        """Of a model with an entry among the families."""
        steps, width = len(self.layer_list), _hidden_size(self._config)
        pool = self.family.pool
        vectors = {"pooled": pool.size if isinstance(pool, SentenceVector) else width}
        if self.family.projection:
            vectors["projected"] = int(self._config.projection_dim)
        is_map = self.family.is_convolutional
        return Anatomy(
            calls=tuple(range(steps)),
            widths=(width,) * (steps + 1),
            vectors=vectors,
            layouts=(("channels_first" if is_map else "tokens"),) * (steps + 1),
            class_tokens=0 if is_map else 1,
            has_feature_maps=is_map,
        )

    @contextmanager
    def captured(
        self, states: dict[int, torch.Tensor], inputs: Mapping[str, torch.Tensor], *, vectors: bool
    ) -> Iterator[None]:
        """Capture `hidden_states[i]` of the selected layers, and end the forward pass when all are captured, unless
        vectors are needed too."""
        deepest = self.num_layers if vectors else max(self.layers)
        calls, layouts, layers = iter(range(self.num_layers)), self.anatomy.layouts, self.layer_list

        def keep_input(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            step = next(calls)
            if step in self.layers:
                states[step] = self._gathered(tokens_of(entering(arguments, keywords)[1], layouts[step], inputs))
            if step == deepest:
                raise _ForwardDone

        def keep_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            states[self.num_layers] = self._gathered(tokens_of(leaving(output), layouts[-1], inputs))

        handles = [layer.register_forward_pre_hook(keep_input, with_kwargs=True) for layer in layers]
        handles.append(layers[self.anatomy.calls[-1]].register_forward_hook(keep_output))
        try:
            yield
        except _ForwardDone:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def vectors_of(self, output: Any, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The encoder's own vectors, [batch, d] each, of what `run` returned and the mask of padded texts."""
        vectors = {"pooled": self.family.pool(output, mask)}
        if self.family.projection:
            projected = self._model.get_submodule(self.family.projection)(vectors["pooled"])
            vectors["projected"] = self._gathered(projected)
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


def _config_of(loaded: Loaded) -> Any:
    """The config of the part of a model that encodes the modality."""
    if loaded.family.is_discovered:
        return loaded.model.get_submodule(loaded.family.tower).config
    config = loaded.model.config
    config = config.get_text_config() if loaded.family.modality == "text" else config
    return getattr(config, "vision_config", config)


def _hidden_size(config: Any) -> int:
    """Width of the encoder's vector and of its last layer."""
    if hasattr(config, "hidden_sizes"):  # one for each stage
        return int(config.hidden_sizes[-1])
    return int(getattr(config, "hidden_size", 0) or config.d_model)


def load_encoder(request: EncoderRequest) -> FrozenEncoder:
    """Load a model and its processor or tokenizer.

    Raises:
        ValueError: the model is unavailable, its family has no adapter, weights of the forward pass are missing, the
            tokenizer or processor is not the model's, its repository's own vector is not supported, or the layers do
            not exist.
    """
    if request.own:
        model, family = request.own.adapted(request.modality)
        model.to(getattr(torch, request.dtype))
        return FrozenEncoder(request, Loaded(family, model), OwnProcessor(request.own))
    repository = read_repository(request) if request.modality == "text" else None
    request = repository.request if repository else request
    loaded = load_model(request)
    processor = load_processor(request)
    if repository:
        loaded = replace(loaded, family=repository.apply(loaded.family, loaded.model, processor))
    where = f"{request.modality} encoder {request.model_id}"
    check_processor(
        *(where, request.modality, loaded.family, loaded.model, processor), sized=request.image_size is not None
    )
    encoder = FrozenEncoder(request, loaded, processor)
    if loaded.family.is_discovered:
        layer = type(encoder.layer_list[0]).__name__
        logger.info(
            "%s: found %d layers (%s), width %d, %s; own vector: %s.",
            *(where, encoder.num_layers, layer, encoder.hidden_size, _PADDING[encoder.padding], encoder.family.pooling),
        )
    return encoder


_PADDING = {
    "longest": "inputs independent of their batch",
    "max_length": "texts padded to the full length",
    "equal_length": "texts encoded with others of equal length, since padding changes them",
}


class HalvingEncoder:
    """Launches the batches of one encoder, in halves where they do not fit into memory."""

    def __init__(self, encoder: FrozenEncoder) -> None:
        self._encoder = encoder
        self.too_large: list[tuple[int, ...]] = []
        """Shapes that did not fit: the number of inputs, then the shape of one."""

    def launch(self, tensors: Mapping[str, torch.Tensor]) -> list[Launched]:
        """Launch a batch in as many parts as needed, in order.

        Raises:
            CacheError: a single input does not fit into memory.
        """
        shape = tuple(next(iter(tensors.values())).shape)
        if not self._is_too_large(shape):
            launched = self._try(tensors)
            if launched is None:
                self._encoder.transfers.free_memory()
                launched = self._try(tensors)
            if launched is not None:
                return [launched]
            self._remember(shape)
        middle = shape[0] // 2
        return [
            part
            for rows in (slice(middle), slice(middle, None))
            for part in self.launch({name: values[rows] for name, values in tensors.items()})
        ]

    def _try(self, tensors: Mapping[str, torch.Tensor]) -> Launched | None:
        try:
            return self._encoder.launch(tensors)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None  # the error is dropped, and with it the tensors that its traceback holds

    def _is_too_large(self, shape: tuple[int, ...]) -> bool:
        return any(all(a >= b for a, b in zip(shape, failed, strict=True)) for failed in self.too_large)

    def _remember(self, shape: tuple[int, ...]) -> None:
        if shape[0] == 1:
            raise CacheError(
                f"{self._encoder.fingerprint.key}: a single input of shape {shape[1:]} does not fit into the memory of "
                f"{self._encoder.request.device}. Choose a smaller --image-size or --max-length, or --device cpu."
            )
        self.too_large.append(shape)
        logger.warning(
            "%s: a batch of shape %s does not fit into the memory of %s; batches of this size are encoded in halves.",
            *(self._encoder.fingerprint.key, shape, self._encoder.request.device),
        )
