"""Cached features as tensors on one device, wherever they are kept.

| residency | where the hidden states are kept | use it |
|---|---|---|
| `device` | all in the accelerator's memory | if they fit: no batch is copied again |
| `memory` | all in main memory, pinned for an accelerator | if that is too small, or shards cannot be mapped |
| `mapped` | in their files, memory-mapped; the system keeps in memory what fits | on a CPU, and for larger caches |
| `streamed` | compressed or behind a URL; the shards of two windows of photos are in memory | if all are too large |

A fusion that reads summaries has them in the place of hidden states with `device` and `memory`: each photo's tokens are
read once.

A window is what a streamed training shuffles at a time: a few random shards of photos. While training uses one window,
the next one is fetched and decompressed. Hidden states are kept and copied in their storage type, half or a quarter of
a float32's bytes, and become float32 on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np
import torch
from torch.nn.functional import normalize

from saffe_cache.core import ranks
from saffe_cache.core.devices import available_memory
from saffe_cache.core.items import Ragged
from saffe_cache.core.options import refuse
from saffe_cache.core.views import PLAIN
from saffe_cache.fusion.base import Fusion, Texts, shape_summaries
from saffe_cache.fusion.layers import Mask, summarize
from saffe_cache.inputs.spec import Residency, RunSpec
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.store.dtypes import numbers_of
from saffe_cache.store.layout import array_of_view
from saffe_cache.store.reader import Cache, EncoderCache

if TYPE_CHECKING:
    from saffe_cache.store.joined import JoinedEncoder

_DEVICE_PART, _MEMORY_PART = 0.6, 0.5
"""Fractions of the free memory that hidden states may use."""
_WINDOW_BYTES = 2**29
"""Approximate size of one window of a streamed training."""


class _Kept(NamedTuple):
    """Summaries of gallery inputs that are kept."""

    rows: np.ndarray
    """Ascending."""
    summaries: torch.Tensor
    """[views, rows, summary_size]"""

    def of(self, rows: np.ndarray, views: np.ndarray | None) -> torch.Tensor:
        views = np.zeros_like(rows) if views is None else views
        places = (torch.from_numpy(one).to(self.summaries.device) for one in (views, np.searchsorted(self.rows, rows)))
        return self.summaries[tuple(places)]


class FeatureLoader:
    """Reads the features of one run from a cache."""

    def __init__(
        self,
        cache: Cache,
        spec: RunSpec,
        device: str = "cpu",
        residency: Residency = "mapped",
        index_views: Sequence[str] = (PLAIN,),
    ) -> None:
        """`index_views`: the views of a photo whose vectors are averaged where photos are searched."""
        self.cache, self.spec, self.device, self.residency = cache, spec, device, residency
        self.gallery, self.text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
        self.views = tuple(dict.fromkeys((PLAIN, *spec.views, *index_views)))
        """The views that can be read; the first is the plain one."""
        self.index_views = tuple(map(self.views.index, index_views))
        """The numbers of those that `encode_gallery` averages."""
        self._held: dict[tuple[str, str], torch.Tensor] = {}
        self._kept: _Kept | None = None
        if residency in ("device", "memory") and spec.shape.entry.reads == "tokens":
            for encoder, name in _arrays(cache, spec):
                self._held[encoder.key, name] = self._load(encoder, name)

    def photos(self, rows: np.ndarray, views: np.ndarray | None = None) -> tuple[list[torch.Tensor], Mask]:
        """What the fusion sees of gallery inputs.

        Hidden states, float32 [n, tokens, d] for each layer, and their mask, bool [n, tokens]; or, for a fusion that
        reads summaries, these as one token each, [n, 1, summary_size].

        Args:
            rows: of the inputs, int64 [n].
            views: the number of each one's view among `views`, int64 [n]; None for the plain ones.
        """
        if self.spec.shape.entry.reads == "summary":
            return [self.summaries(rows, views).unsqueeze(1)], None
        return self._states(rows, views)

    def media(self, parts: np.ndarray) -> tuple[list[torch.Tensor], Mask]:
        """As `photos`, of items of several media: int64 [n, media], the input of each medium, -1 where it is missing.

        Hidden states of a missing medium are zeros; the mask is that of all media side by side.
        """
        states, masks = list[torch.Tensor](), list[torch.Tensor]()
        for encoder, own, layers in cast("JoinedEncoder", self.gallery).members_of(parts, self.spec.gallery_layers):
            present = torch.from_numpy(np.flatnonzero(own >= 0)).to(self.device)
            found, mask = self._tokens(encoder, own[own >= 0], layers)
            count = max(1, found[0].shape[1])
            for state in found:
                whole = state.new_zeros(len(parts), count, state.shape[2])
                whole[present, : state.shape[1]] = state
                states.append(whole)
            is_real = torch.zeros(len(parts), count, dtype=torch.bool, device=self.device)
            is_real[present, : found[0].shape[1]] = True if mask is None else mask
            masks.append(is_real)
        return states, torch.cat(masks, dim=1)

    def _states(self, rows: np.ndarray, views: np.ndarray | None) -> tuple[list[torch.Tensor], Mask]:
        if self.spec.media:
            return self.media(cast("JoinedEncoder", self.gallery).parts[rows])
        if views is None:
            return self._tokens(self.gallery, rows, self.spec.gallery_layers)
        return [self._of_views(f"hidden_states/{layer}", rows, views) for layer in self.spec.gallery_layers], None

    def _of_views(self, name: str, rows: np.ndarray, views: np.ndarray) -> torch.Tensor:
        """Rows of an array, each in its own view."""
        order = np.argsort(views, kind="stable")
        numbers, starts = np.unique(views[order], return_index=True)
        parts = [
            self._numbers(self.gallery, array_of_view(self.views[number], name), rows[places])
            for number, places in zip(numbers, np.split(order, starts[1:]), strict=True)
        ]
        return torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(self.device)]

    def summaries(self, rows: np.ndarray, views: np.ndarray | None = None) -> torch.Tensor:
        """Of gallery inputs, float32 [n, summary_size]: what `layers.summarize` makes of their hidden states, of their
        views as of `photos`."""
        if self._kept is not None:
            return self._kept.of(rows, views)
        states, mask = self._states(rows, views)
        return shape_summaries(self.spec.shape, states, mask)

    def keep_summaries(self, rows: np.ndarray) -> None:
        """For a fusion that reads summaries, compute those of these inputs and keep them where the residency says.

        Their tokens are not read again; with `mapped` and `streamed`, they are read for every batch.
        """
        if self.spec.shape.entry.reads == "summary" and self.residency in ("device", "memory"):
            distinct = np.unique(rows)
            found = np.stack([self._summaries_of_view(distinct, number) for number in range(len(self.views))])
            self._kept = _Kept(distinct, torch.from_numpy(found).to(self.device))

    def _summaries_of_view(self, rows: np.ndarray, number: int) -> np.ndarray:
        views = np.full(len(rows), number) if number else None
        return in_blocks(lambda these: self.summaries(rows[these], None if views is None else views[these]), len(rows))

    def texts(self, rows: np.ndarray) -> Texts:
        """Texts to pair with gallery inputs; for a fusion without text layers, only their own vectors."""
        vectors = self.vectors(rows)
        if not self.spec.token_layers:
            return Texts.of_vectors(vectors)
        states, mask = self._tokens(self.text, rows, self.spec.token_layers)
        assert mask is not None
        return Texts(tuple(states), mask, vectors)

    def queries(self, rows: np.ndarray) -> Texts:
        """Texts that search: with tokens for a fusion that reads them, otherwise their own vectors alone."""
        return self.texts(rows) if self.spec.shape.entry.query_tokens else Texts.of_vectors(self.vectors(rows))

    def hold(self, photos: np.ndarray, texts: np.ndarray) -> None:
        """Prefetch these inputs, which are needed next, and release all others."""
        for encoder, name in _arrays(self.cache, self.spec):
            encoder.array(name).hold(encoder.token_rows(photos if encoder is self.gallery else texts)[0])
        self.text.array(self.text.manifest.vector).hold(texts)

    def will_need(self, photos: np.ndarray, views: np.ndarray | None = None) -> None:
        """Have the system read these photos ahead, in their views, which are needed next, if they are memory-mapped."""
        if self.residency != "mapped":
            return
        for number in [0] if views is None else np.unique(views).tolist():
            these = photos if views is None else photos[views == number]
            for encoder, own, layers in self.gallery.members(these, self.spec.gallery_layers):
                rows, _ = encoder.token_rows(own[own >= 0])
                for layer in layers:
                    encoder.array(array_of_view(self.views[number], f"hidden_states/{layer}")).hold(rows)

    def vectors(self, rows: np.ndarray) -> torch.Tensor:
        """The text encoder's own vectors, float32 [n, d]."""
        return torch.from_numpy(self.text.vectors(rows)).to(self.device)

    def _tokens(
        self, encoder: EncoderCache, rows: np.ndarray, layers: Sequence[int]
    ) -> tuple[list[torch.Tensor], Mask]:
        flat, mask = encoder.token_rows(rows)
        states = [self._numbers(encoder, f"hidden_states/{layer}", flat) for layer in layers]
        if mask is None:
            return states, None
        on_device = torch.from_numpy(mask).to(self.device)
        padded = [state.new_zeros(*mask.shape, *state.shape[1:]) for state in states]
        for zeros, state in zip(padded, states, strict=True):
            zeros[on_device] = state
        num_tokens = math.prod(states[-1].shape[1:-1])  # of a window; 1 where a row is a token
        padded = [state.flatten(1, -2) for state in padded]
        if encoder is self.gallery and self._has_equal_lengths:
            return padded, None
        return padded, on_device.repeat_interleave(num_tokens, dim=1)

    @cached_property
    def _has_equal_lengths(self) -> bool:
        """Whether all gallery inputs have equally many tokens.

        A batch alone does not decide: a fusion may treat padded tokens differently.
        """
        return self.gallery.num_tokens(self.spec.gallery_layers[0]) > 0

    def _numbers(self, encoder: EncoderCache, name: str, rows: np.ndarray) -> torch.Tensor:
        """float32 [n, …] on the device."""
        held = self._held.get((encoder.key, name))
        if held is None:
            stored = _as_tensor(encoder.array(name).read_stored(rows))
        else:
            stored = held.index_select(0, torch.from_numpy(rows).to(held.device))
        return numbers_of(stored.to(self.device), encoder.array(name).spec.dtype)

    def _load(self, encoder: EncoderCache, name: str) -> torch.Tensor:
        """All rows of an array, as they are stored."""
        array = encoder.array(name)
        stored = _as_tensor(array.read_stored(np.arange(len(array))))
        if self.residency == "device":
            return stored.to(self.device)
        return stored if self.device == "cpu" else stored.pin_memory()


def choose_residency(requested: Residency | Literal["auto"], cache: Cache, spec: RunSpec, device: str) -> Residency:
    """Where to keep the hidden states of a training; "auto" takes the fastest place that has room for them.

    Of a fusion that reads summaries, these are kept, which also `memory` has room for as a rule.

    Raises:
        ValueError: device is requested on a CPU, or mapped for shards that are compressed or behind a URL.
    """
    arrays = [encoder.array(name) for encoder, name in _arrays(cache, spec)]
    can_map = all(array.is_mapped for array in arrays)
    if requested == "device" and device == "cpu":
        refuse("residency", "device on a CPU", "memory or mapped")
    if requested == "mapped" and not can_map:
        refuse("residency", "mapped, of shards that are compressed or behind a URL", "memory or streamed")
    if requested != "auto":
        return requested
    reads_summaries = spec.shape.entry.reads == "summary"
    needed = sum(len(array) * array.spec.row_bytes for array in arrays)
    if reads_summaries:
        needed = len(cache.table) * (1 + len(spec.views)) * spec.shape.summary_size * 4
    if device != "cpu" and needed < _DEVICE_PART * torch.cuda.mem_get_info()[0]:
        return "device"
    if (reads_summaries or device != "cpu" or not can_map) and needed < _MEMORY_PART * available_memory():
        return "memory"
    return "mapped" if can_map else "streamed"


def window_shards(cache: Cache, spec: RunSpec) -> int:
    """Shards of photos in a window of a streamed training; depends only on the cache."""
    arrays = [encoder.array(name) for encoder, name in _arrays(cache, spec)]
    photos = cache.encoders[spec.gallery_key].array(f"hidden_states/{spec.gallery_layers[0]}")
    of_photo = sum(len(array) * array.spec.row_bytes for array in arrays) / max(1, len(photos))
    return max(1, round(_WINDOW_BYTES / of_photo / photos.spec.shard_rows))


def summaries(
    encoder: EncoderCache, rows: np.ndarray, layers: Sequence[int], batch: int = 256, *, splits_first: bool = True
) -> np.ndarray:
    """First token and mean of the others, of each layer: float32 [n, 2 P d]. Linear baselines see this.

    For feature maps, or where the first is not split off, the mean of all positions: [n, P d].
    """
    has_class_token = splits_first and encoder.manifest.class_tokens > 0

    def summarized(these: slice, layer: int) -> torch.Tensor:
        tokens = encoder.tokens(rows[these], (layer,))
        mask = None if tokens.mask is None else torch.from_numpy(tokens.mask)
        return summarize([torch.from_numpy(tokens.states[0]).float()], mask, has_class_token=has_class_token)

    def of_all_layers(these: slice) -> torch.Tensor:
        """Layer by layer, since their number of tokens may differ."""
        return torch.cat([summarized(these, layer) for layer in layers], dim=1)

    return in_blocks(of_all_layers, len(rows), batch)


def encode_gallery(
    model: Fusion, inputs: FeatureLoader, rows: np.ndarray, paired_texts: np.ndarray | None = None, batch: int = 256
) -> np.ndarray:
    """f(x, text) of gallery inputs and the rows of their paired texts, or f(x, null): unit vectors, float32 [n, d].

    Of several views, the mean of their vectors, made unit.
    """

    def encode(these: slice) -> torch.Tensor:
        texts = None if paired_texts is None else inputs.texts(paired_texts[these])
        own = rows[these]
        found = [
            model(*inputs.photos(own, np.full(len(own), one) if one else None), texts) for one in inputs.index_views
        ]
        return found[0] if len(found) == 1 else normalize(torch.stack(found).float().mean(dim=0), dim=1)

    return in_blocks(encode, len(rows), batch)


def compose_queries(
    model: Fusion, inputs: FeatureLoader, photos: np.ndarray, texts: np.ndarray, batch: int = 1024
) -> np.ndarray:
    """f(x, text) of gallery vectors f(x, null), [n, d], and the rows of their texts: float32 [n, d]."""
    return in_blocks(
        lambda these: model.compose_queries(
            torch.from_numpy(photos[these]).to(inputs.device), inputs.texts(texts[these])
        ),
        len(texts),
        batch,
    )


def encode_queries(model: Fusion, vectors: np.ndarray, device: str = "cpu", batch: int = 1024) -> np.ndarray:
    """g(text) of the text encoder's own vectors: unit vectors, float32 [n, d]."""
    return in_blocks(
        lambda these: model.encode_queries(torch.from_numpy(vectors[these]).to(device)), len(vectors), batch
    )


def encode_texts(model: Fusion, inputs: FeatureLoader, prompts: Ragged, batch: int = 256) -> np.ndarray:
    """g of queries whose tokens the model reads: unit vectors, float32 [n, d].

    `prompts` are the text rows of each query; of several, a class's prompts, the unit vectors are averaged.
    """
    distinct, places = np.unique(prompts.values, return_inverse=True)
    vectors = in_blocks(lambda these: model.encode_texts(inputs.queries(distinct[these])), len(distinct), batch)
    if len(prompts.values) == len(prompts):
        return np.asarray(vectors[places])
    return unit_rows(np.add.reduceat(vectors[places], prompts.offsets[:-1]))


@torch.inference_mode()
def in_blocks(compute: Callable[[slice], torch.Tensor], count: int, batch: int = 256) -> np.ndarray:
    """What is computed of `count` rows, a block of rows at a time; float32. Each rank computes some of the blocks."""
    blocks = [slice(start, min(start + batch, count)) for start in range(0, count, batch)]
    return ranks.concatenated(blocks, lambda block: compute(block).float().cpu().numpy())


def _arrays(cache: Cache, spec: RunSpec) -> list[tuple[EncoderCache, str]]:
    """The arrays of hidden states that a run reads."""
    gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    members = gallery.members(np.zeros(0, np.int64), spec.gallery_layers)
    photos = [(encoder, f"hidden_states/{layer}") for encoder, _, layers in members for layer in layers]
    photos += [(encoder, array_of_view(view, name)) for view in spec.views for encoder, name in photos]
    return photos + [(text, f"hidden_states/{layer}") for layer in spec.token_layers]


def _as_tensor(stored: np.ndarray) -> torch.Tensor:
    """As int16 if it is uint16, which torch hardly supports."""
    return torch.from_numpy(stored.view(np.int16) if stored.dtype == np.uint16 else stored)
