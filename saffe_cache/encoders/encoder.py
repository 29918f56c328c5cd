"""A frozen encoder: which layers and tokens of a model are kept, how its batches run, and its fingerprint.

Unless the device is a CPU, it also converts hidden states to their storage type: a GPU takes microseconds, where one
CPU thread would take longer than the encoder, and smaller types leave fewer bytes to copy back.

`launch` starts a batch and, on a GPU, returns at once; the caller decides when to wait for and convert its result.
`encode` does all three.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from saffe_cache.core.features import BlockWeights, CacheError, Fingerprint
from saffe_cache.encoders.blocks import library_block, read_block
from saffe_cache.encoders.checks import check_processor
from saffe_cache.encoders.families import Anatomy
from saffe_cache.encoders.loading import EncoderRequest, Loaded, fingerprint_of, load_model, load_processor
from saffe_cache.encoders.own import OwnProcessor
from saffe_cache.encoders.probing import Probe
from saffe_cache.encoders.running import REAL_TOKENS, RunnableModel
from saffe_cache.encoders.selection import TokenSelection
from saffe_cache.encoders.sentence_transformers import read_repository
from saffe_cache.encoders.transfers import Converter, Encoded, Launched
from saffe_cache.encoders.windows import Windows, measured_windows

logger = logging.getLogger(__name__)


class FrozenEncoder(RunnableModel):
    """Made by `load_encoder`."""

    def __init__(self, request: EncoderRequest, loaded: Loaded, processor: Any) -> None:
        super().__init__(request, loaded, processor)
        self._with_vectors = request.pooled
        self._converters: Mapping[int, Converter] = {}
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
            *(request, self._model, processor, self.family),
            max_length=self.max_length,
            padding=self.padding,
            num_tokens=self.num_tokens,
            windows=self.windows.described if self.windows else None,
            is_scaled=self.decoded_edge() is not None,
        )

    def decode_as(self, keys: Collection[str]) -> None:
        """Decode all pixels if the request leaves the decoding open and a cache with these encoders does so."""
        fields = {name: value for name, value in self.fingerprint.fields.items() if name != "decoding"}
        full = Fingerprint(fields)
        if self.request.decoding is None and self.fingerprint.key not in keys and full.key in keys:
            self.request, self.fingerprint = replace(self.request, decoding="full"), full

    def _measured_windows(self) -> Windows:
        """How sounds are cut; tokens that are steps in time have no class token among them.

        Raises:
            ValueError: they cannot be cut, or the windows would differ in the number of their selected tokens.
        """
        windows = measured_windows(self, self.anatomy)
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

    @property
    def converts(self) -> bool:
        """Whether the device converts hidden states. On a CPU this would delay the thread that launches batches."""
        return torch.device(self.request.device).type != "cpu"

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

    def encode(self, inputs: Mapping[str, torch.Tensor]) -> Encoded:
        """Run the encoder on one batch."""
        return self.launch(inputs).encoded()

    @torch.inference_mode()
    def launch(self, inputs: Mapping[str, torch.Tensor]) -> Launched:
        """Start the encoder on one batch; `inputs` must not change until the batch has been waited for."""
        mask = inputs.get("attention_mask") if self.request.modality == "text" else None
        states: dict[int, torch.Tensor] = {}
        vectors: dict[str, torch.Tensor] = {}
        with self.captured(states, inputs, self.anatomy, self.layers, vectors=self._with_vectors):
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
        vectors = {"pooled": int(getattr(self.family.pool, "size", width))}
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

    def _check_layers(self, asked: tuple[int, ...] | None) -> tuple[int, ...]:
        layers = (self.num_layers - 1, self.num_layers) if asked is None else asked
        wrong = [i for i in layers if not 0 <= i <= self.num_layers]
        if wrong:
            raise ValueError(
                f"{self.request.where}: no hidden_states[{wrong[0]}]; it has 0 (embeddings) to {self.num_layers} "
                f"(output of the last layer). Choose --layers {self.request.modality}=… among these."
            )
        return tuple(sorted(set(layers)))


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
    check_processor(request.where, loaded.family, loaded.model, processor, sized=request.image_size is not None)
    encoder = FrozenEncoder(request, loaded, processor)
    if loaded.family.is_discovered:
        layer = type(encoder.layer_list[0]).__name__
        logger.info(
            "%s: found %d layers (%s), width %d, %s; own vector: %s.",
            *(request.where, encoder.num_layers, layer, encoder.hidden_size),
            *(_PADDING[encoder.padding], encoder.family.pooling),
        )
    return encoder


_PADDING = {
    "longest": "inputs independent of their batch",
    "max_length": "texts padded to the full length",
    "equal_length": "texts encoded with others of equal length, since padding changes them",
}
