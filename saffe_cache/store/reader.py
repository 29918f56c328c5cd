"""Read a cache: its item table, and what it holds of each encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from saffe_cache.core.features import (
    REPAIR_ADVICE,
    BlockSpec,
    BlockWeights,
    CacheError,
    LanguageModelSpec,
    LanguageModelWeights,
    LibraryBlockSpec,
    LibraryModelSpec,
    Modality,
    Tokens,
    Weights,
)
from saffe_cache.core.items import ItemTable
from saffe_cache.core.json_schema import made_of
from saffe_cache.store.arrays import ArrayFiles
from saffe_cache.store.dtypes import Moments, combine_moments
from saffe_cache.store.layout import array_of_view, encoder_group
from saffe_cache.store.manifest import EncoderManifest, read_encoder, weights_type
from saffe_cache.store.parts import read_table
from saffe_cache.store.root import RootManifest, existing_root, read_root
from saffe_cache.store.rows import RowReader
from saffe_cache.store.storage import Storage, read_group

Read = TypeVar("Read")


class EncoderCache:
    """What the cache holds of one encoder. `manifest` describes it."""

    def __init__(self, storage: Storage, manifest: EncoderManifest) -> None:
        self._storage, self.manifest = storage, manifest
        self._readers: dict[str, RowReader] = {}

    @property
    def key(self) -> str:
        return self.manifest.key

    def array(self, name: str) -> RowReader:
        """
        Raises:
            CacheError: the encoder has no such array.
        """
        if name not in self.manifest.arrays:
            raise CacheError(
                f"{self._storage.root}: {self.key} has no {name}; it has {', '.join(sorted(self.manifest.arrays))}. "
                "Add it with saffe extract."
            )
        if name not in self._readers:
            array = self.manifest.arrays[name]
            self._readers[name] = RowReader(ArrayFiles(self._storage, self.key, name, array.spec), array.shards)
        return self._readers[name]

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The encoder's own vector of each input, float32 [n, d]: projected where the model has a projection."""
        return self.array(self.manifest.vector).read(rows).astype(np.float32)

    def tokens(self, rows: np.ndarray, layers: tuple[int, ...]) -> Tokens:
        """Hidden states of one or more inputs; texts and sounds are padded with zeros to the longest of them."""
        if not self.manifest.is_ragged:
            return Tokens(tuple(self.array(f"hidden_states/{layer}").read(rows) for layer in layers))
        flat, mask = self.token_rows(rows)
        assert mask is not None
        states, num_tokens = [], 1
        for layer in layers:
            values = self.array(f"hidden_states/{layer}").read(flat)
            padded = np.zeros((*mask.shape, *values.shape[1:]), values.dtype)
            padded[mask] = values
            num_tokens = math.prod(values.shape[1:-1])
            states.append(padded.reshape(len(mask), mask.shape[1] * num_tokens, values.shape[-1]))
        return Tokens(tuple(states), np.repeat(mask, num_tokens, axis=1))

    def num_tokens(self, layer: int) -> int:
        """Tokens of each finished input in a layer; 0 if their number differs."""
        within, finished = self.array(f"hidden_states/{layer}").spec.row_shape[:-1], self.manifest.finished_rows
        if not self.manifest.is_ragged:
            return within[0]
        usable = self.usable(np.arange(finished))
        numbers = np.unique(np.diff(self.offsets[: finished + 1])[usable])
        return int(numbers[0]) * math.prod(within) if len(numbers) == 1 else 0

    def require_equal_lengths(self, rows: np.ndarray, what: str) -> None:
        """
        Raises:
            CacheError: some inputs have more tokens than others.
        """
        numbers = np.diff(self.offsets)[rows] if self.manifest.is_ragged else np.zeros(1)
        if numbers.min() < numbers.max():
            raise CacheError(
                f"{self.key}: {what} needs inputs of equal length, found sounds of {numbers.min()} to {numbers.max()} "
                "stored rows. Extract sounds that were cut to one length, or use saffe train."
            )

    def first_rows(self, rows: np.ndarray) -> np.ndarray:
        """Where each input begins in the arrays of hidden states."""
        return self.offsets[rows] if self.manifest.is_ragged else rows

    def token_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows of the inputs' tokens in the arrays of hidden states, int64.

        Photos have one row per input and no mask. Texts and sounds have one row per real token (sounds whose tokens are
        no steps in time, one per window), and a mask, bool [inputs, longest], that says where these rows belong.
        """
        if not self.manifest.is_ragged:
            return rows, None
        lengths = (self.offsets[rows + 1] - self.offsets[rows]).astype(np.int64)
        mask = np.arange(lengths.max(initial=1)) < lengths[:, None]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(self.offsets[rows], lengths) + within, mask

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [inputs + 1]: where each text's or sound's rows begin in the arrays of hidden states.

        Raises:
            CacheError: there are fewer than finished inputs, or they decrease.
        """
        array = self.array("offsets")
        offsets = array.read_range(0, len(array))
        ascends = offsets.ndim == 1 and len(offsets) and offsets[0] == 0 and (np.diff(offsets) >= 0).all()
        if not ascends or len(offsets) <= self.manifest.finished_rows:
            raise CacheError(
                f"{self._storage.root}: {self.key}: its offsets do not ascend from 0 for {self.manifest.finished_rows} "
                "inputs. Restore the cache from a copy, or extract into a new one."
            )
        return offsets

    @property
    def layers(self) -> list[int]:
        """Cached layers that have the hidden states of all finished inputs.

        Raises:
            CacheError: the offsets of texts are missing or damaged.
        """
        finished, arrays = self.manifest.finished_rows, self.manifest.arrays
        num_rows = int(self.offsets[finished]) if finished and self.manifest.is_ragged else finished
        return [layer for layer in self.manifest.layers if arrays[f"hidden_states/{layer}"].rows >= num_rows]

    def views(self, layers: Sequence[int]) -> tuple[str, ...]:
        """The views, besides the plain photos, of which there are these layers of all finished inputs, in order."""
        arrays, finished = self.manifest.arrays, self.manifest.finished_rows
        names = [f"hidden_states/{layer}" for layer in layers]
        return tuple(
            view
            for view in self.manifest.views_of(layers)
            if all(arrays[array_of_view(view, name)].rows >= finished for name in names)
        )

    @property
    def block_layers(self) -> list[int]:
        """Layers whose consuming block is cached: all cached layers except the output of the last one.

        Language models have all their blocks, feature maps have none. A layer without committed rows may still lack
        its block.
        """
        if self.manifest.has_feature_maps or self.manifest.selected_tokens != "all":
            return []
        arrays = self.manifest.arrays
        present = [layer for layer in self.manifest.layers if arrays[f"hidden_states/{layer}"].shards]
        if present and self.manifest.is_language_model:
            return list(range(self.manifest.num_layers))
        unusable = self.manifest.unusable_blocks
        return [layer for layer in present if layer < self.manifest.num_layers and layer not in unusable]

    def block(self, layer: int) -> BlockWeights:
        """The block that consumes `hidden_states[layer]`.

        Raises:
            CacheError: the block is damaged or not cached; no block consumes the output of the last layer.
        """
        if layer in self.manifest.unusable_blocks:
            raise CacheError(
                f"{self._storage.root}: block {layer} of {self.key} cannot be used: "
                f"{self.manifest.unusable_blocks[layer]}. Use a fusion without blocks, or another encoder."
            )
        if layer not in self.block_layers:
            raise CacheError(
                f"{self._storage.root}: {self.key} has no block {layer}; blocks are cached for {self.block_layers} "
                f"(hidden_states[{self.manifest.num_layers}] is the last layer's output, which no block consumes)."
            )
        weights = self.read_weights(f"blocks/{layer}")
        assert isinstance(weights, BlockWeights)
        return weights

    def language_model(self) -> LanguageModelWeights:
        """The parts of a language model that are not blocks.

        Raises:
            CacheError: the encoder is no language model, or these parts are damaged.
        """
        if not self.manifest.is_language_model:
            raise CacheError(
                f"{self._storage.root}: {self.key} is no language model. Add one: saffe extract --encoder text=gpt2"
            )
        weights = self.read_weights("language_model")
        assert isinstance(weights, LanguageModelWeights)
        return weights

    @property
    def weights(self) -> list[str]:
        """Names of the groups of weights, `blocks/I` and `language_model`."""
        blocks = [f"blocks/{layer}" for layer in self.block_layers]
        return [*blocks, "language_model"] if blocks and self.manifest.is_language_model else blocks

    def read_weights(self, name: str) -> Weights:
        """The weights of a group. Raises CacheError if they are missing or damaged."""
        group = f"{encoder_group(self.key)}/{name}"
        attributes, tensors = read_group(self._storage, group, weights_type(name))
        return weights_from(attributes, tensors, f"{self._storage.root}: {group}")

    def statistics(self, name: str) -> Moments:
        """Mean, standard deviation and largest magnitude of an array, from a sample of its rows if it is large."""
        return combine_moments(self.manifest.arrays[name].shards)

    def members(
        self, rows: np.ndarray, layers: Sequence[int]
    ) -> list[tuple[EncoderCache, np.ndarray, tuple[int, ...]]]:
        """The encoders that hold these layers, each with its own rows and layers: this one, except where media are
        joined. A row is -1 where an input lacks the medium."""
        return [(self, rows, tuple(layers))]

    def usable(self, rows: np.ndarray) -> np.ndarray:
        """bool [n]: which inputs were encoded. Row -1 (no such input) was not."""
        broken = np.fromiter(self.manifest.invalid, np.int64)
        return (rows >= 0) & (rows < self.manifest.finished_rows) & ~np.isin(rows, broken)


def weights_from(attributes: Mapping[str, Any], tensors: dict[str, np.ndarray], where: str) -> Weights:
    """Weights from the attributes and the arrays of their group.

    Raises CacheError if a field of their spec is missing or unknown to this release, or the tokenizer is damaged.
    """
    try:
        spec = attributes["spec"]
        if attributes["encoding-type"] == weights_type("blocks/"):
            kind: type[BlockSpec | LibraryBlockSpec] = LibraryBlockSpec if "model_class" in spec else BlockSpec
            return BlockWeights(made_of(kind, spec), tensors)
        of_model: type[LanguageModelSpec | LibraryModelSpec]
        of_model = LibraryModelSpec if "model_class" in spec else LanguageModelSpec
        model = made_of(of_model, spec)
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{where}: its spec lacks or misstates {error}. Restore zarr.json from a copy.") from None
    try:
        tokenizer = tensors.pop("tokenizer").tobytes().decode()
    except (KeyError, ValueError) as error:
        raise CacheError(f"{where}: its tokenizer is missing or damaged ({error}). {REPAIR_ADVICE}") from None
    return LanguageModelWeights(model, tensors, tokenizer)


class Cache:
    """An open cache: its item table and its encoders."""

    def __init__(self, storage: Storage, root: RootManifest) -> None:
        self.storage, self.root = storage, root
        self.table: ItemTable = read_table(storage, root)
        self.encoders: Mapping[str, EncoderCache] = {
            key: EncoderCache(storage, read_encoder(storage, key)) for key in root.encoders
        }

    def encoder(self, modality: Modality, name: str | None = None) -> EncoderCache:
        """The encoder of a modality; where there are several, the one that `encoders_named` finds by this name.

        Raises:
            CacheError: there is none, there are several to choose from, or its extraction is unfinished.
        """
        of_modality = self.encoders_named(modality)
        if not of_modality:
            raise CacheError(
                f"{self.storage.root}: it holds no {modality} encoder. Add one: saffe extract --encoder {modality}=…"
            )
        named = self.encoders_named(modality, name)
        chosen = [key for key in named if self.encoders[key].manifest.finished_rows] or named
        if len(chosen) != 1:
            asked = f" named {name!r}" if name else ""
            raise CacheError(
                f"{self.storage.root}: {len(chosen)} {modality} encoders{asked}; it holds {', '.join(of_modality)}. "
                f"Choose one with --encoder {modality}=PART-OF-ITS-KEY."
            )
        encoder = self.encoders[chosen[0]]
        if not encoder.manifest.finished_rows:
            raise CacheError(
                f"{self.storage.root}: the extraction of {encoder.key} is unfinished. Run saffe extract again."
            )
        return encoder

    def encoders_named(self, modality: Modality, name: str | None = None) -> list[str]:
        """Keys of a modality's encoders: those that contain the name or whose model has it, or all without a name."""
        model_id = Path(name).name if name and Path(name).exists() else name  # as a fingerprint has it
        return [
            key
            for key, one in self.encoders.items()
            if one.manifest.modality == modality
            and (name is None or name in key or one.manifest.fingerprint.fields["model_id"] == model_id)
        ]


def open_cache(path: str | Path) -> Cache:
    """
    Raises:
        CacheError: there is no cache, or one of another format version.
    """
    storage = Storage(path)
    return read_current(storage, existing_root(storage), partial(Cache, storage))


def read_current(storage: Storage, root: RootManifest, read: Callable[[RootManifest], Read]) -> Read:
    """Read something below a root; read again if a writer has replaced the item table in the meantime.

    Raises:
        CacheError: as `read`.
    """
    while True:
        try:
            return read(root)
        except CacheError:
            newer = read_root(storage)
            if newer is None or newer == root:
                raise
            root = newer
