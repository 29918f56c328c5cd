"""Several media of one cache as if they were one encoder: what a fusion of items with photo, sound and video reads.

An input of the joined encoder is a distinct tuple of inputs, one of each medium, of which any may be missing but not
all. Its hidden states are those of the media's encoders as they are cached, one array for each medium and layer, each
with its own width and number of tokens; its mask covers the tokens of all media side by side and is False where an item
lacks a medium. The layers of the first medium keep their numbers, those of the second count from 1000 on, and so forth.

It exists in memory alone: the cache's files know nothing of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace

import numpy as np

from saffe_cache.core.features import CacheError, Fingerprint, Modality, Tokens
from saffe_cache.core.items import Inputs
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.reader import Cache, EncoderCache

JOINED: Modality = "media"
MEDIA: tuple[Modality, ...] = ("image", "audio", "video")
"""The media of an item, in the order in which they are joined."""
_STRIDE = 1000
"""More than any encoder has layers."""


def layers_of_media(media: Sequence[Modality], layers: Sequence[int]) -> dict[Modality, tuple[int, ...]]:
    """The layers of each medium's own encoder among those of a joined one, in their order."""
    return {
        name: tuple(layer % _STRIDE for layer in layers if layer // _STRIDE == place)
        for place, name in enumerate(media)
    }


class JoinedEncoder(EncoderCache):
    """The encoders of several media, read together."""

    def __init__(self, encoders: Mapping[Modality, EncoderCache], parts: np.ndarray) -> None:
        """`parts`, int64 [inputs, media]: the row of each input in the encoder of each medium, -1 where it has none."""
        first, *_ = encoders.values()
        manifests = [one.manifest for one in encoders.values()]
        manifest = EncoderManifest(
            fingerprint=_fingerprint({name: one.key for name, one in encoders.items()}),
            modality=JOINED,
            num_layers=0,
            hidden_size=max(one.hidden_size for one in manifests),
            vector="",
            finished_rows=len(parts),
            class_tokens=min(one.class_tokens for one in manifests),
        )
        super().__init__(first._storage, manifest)
        self.encoders, self.parts = encoders, parts

    @property
    def layers(self) -> list[int]:
        return [self.layer(name, layer) for name, one in self.encoders.items() for layer in one.layers]

    def layer(self, medium: Modality, layer: int) -> int:
        """The number here of a layer of a medium's encoder."""
        return _STRIDE * list(self.encoders).index(medium) + layer

    def layers_of(self, layers: Sequence[int]) -> dict[Modality, tuple[int, ...]]:
        """The layers of each medium's own encoder among these, in their order."""
        return layers_of_media(tuple(self.encoders), layers)

    def num_tokens(self, layer: int) -> int:
        """0: items that lack a medium have fewer."""
        return 0

    def members(
        self, rows: np.ndarray, layers: Sequence[int]
    ) -> list[tuple[EncoderCache, np.ndarray, tuple[int, ...]]]:
        return self.members_of(self.parts[rows], layers)

    def members_of(
        self, parts: np.ndarray, layers: Sequence[int]
    ) -> list[tuple[EncoderCache, np.ndarray, tuple[int, ...]]]:
        """As `members`, of tuples of inputs, int64 [n, media], which need not be those of an item."""
        own = self.layers_of(layers)
        found = zip(self.encoders.items(), parts.T, strict=True)
        return [(encoder, of_medium, own[name]) for (name, encoder), of_medium in found if own[name]]

    def tokens(self, rows: np.ndarray, layers: tuple[int, ...]) -> Tokens:
        """Hidden states of the media that these layers belong to, zeros where an item lacks one, and their mask."""
        states, masks = [], []
        for encoder, own, of_medium in self.members(rows, layers):
            present = np.flatnonzero(own >= 0)
            found = encoder.tokens(own[present], of_medium)
            for state in found.states:
                whole = np.zeros((len(rows), max(1, state.shape[1]), state.shape[2]), state.dtype)
                whole[present, : state.shape[1]] = state
                states.append(whole)
            mask = np.zeros(states[-1].shape[:2], bool)
            mask[present, : found.states[0].shape[1]] = True if found.mask is None else found.mask
            masks.append(mask)
        return Tokens(tuple(states), np.concatenate(masks, axis=1))

    def showing(self, shown: Sequence[Modality]) -> JoinedEncoder:
        """The same inputs, of which only some media are shown."""
        is_shown = np.array([name in shown for name in self.encoders])
        return JoinedEncoder(self.encoders, np.where(is_shown, self.parts, -1))

    def shuffled(self, medium: Modality, rows: np.ndarray, seed: int) -> JoinedEncoder:
        """The same inputs, of which some, `rows`, have one medium of another of them."""
        parts, place = self.parts.copy(), list(self.encoders).index(medium)
        order = np.random.default_rng(seed).permutation(rows)
        parts[order, place] = self.parts[np.roll(order, 1), place]
        return JoinedEncoder(self.encoders, parts)


def joined_key(keys: Mapping[Modality, str]) -> str:
    """The key of the joined encoder of some media, from those of their encoders."""
    return _fingerprint(keys).key


def _fingerprint(keys: Mapping[Modality, str]) -> Fingerprint:
    ordered = {name: keys[name] for name in MEDIA if name in keys}
    return Fingerprint({"modality": JOINED, "model_id": "+".join(ordered), "encoders": ordered})


def join_media(cache: Cache, keys: Mapping[Modality, str]) -> Cache:
    """The cache with one more encoder, which joins those of these keys, and with its inputs in the item table.

    An input that could not be encoded is missing; an item that lacks all media has no input there, and neither has a
    composed query.

    Raises:
        CacheError: the extraction of a medium is unfinished: what is not encoded yet is not missing.
    """
    encoders = {name: cache.encoders[keys[name]] for name in MEDIA if name in keys}
    table, columns = cache.table, []
    for name, encoder in encoders.items():
        finished, count = encoder.manifest.finished_rows, len(table.inputs.get(name, ()))
        if finished < count:
            raise CacheError(
                f"{cache.storage.root}: {encoder.key} holds {finished} of {count} inputs: its extraction is "
                "unfinished. Run saffe extract again."
            )
        rows = table.rows.get(name, np.full(len(table), -1))
        columns.append(np.where(encoder.usable(rows) & ~table.are_queries, rows, -1))
    of_items = np.stack(columns, axis=1).astype(np.int64)
    has_any = (of_items >= 0).any(axis=1)
    parts, places = np.unique(of_items[has_any], axis=0, return_inverse=True)
    joined = np.full(len(table), -1)
    joined[has_any] = places.reshape(-1)
    view, encoder = copy(cache), JoinedEncoder(encoders, parts.reshape(-1, len(encoders)))
    inputs = Inputs(_content_hashes(table.inputs, encoders, encoder.parts), of_media=encoder.parts)
    view.table = replace(table, rows={**table.rows, JOINED: joined}, inputs={**table.inputs, JOINED: inputs})
    view.encoders = {**cache.encoders, encoder.key: encoder}
    return view


def _content_hashes(inputs: Mapping[Modality, Inputs], media: Iterable[Modality], parts: np.ndarray) -> np.ndarray:
    """uint8 [n, 32]: SHA-256 over the hashes of each input's media, with zeros for a missing one."""
    nothing = np.zeros((1, 32), np.uint8)
    columns = [
        np.concatenate([inputs[name].content_hash, nothing])[rows] if name in inputs else nothing[rows * 0]
        for name, rows in zip(media, parts.T, strict=True)
    ]
    digests = [hashlib.sha256(row.tobytes()).digest() for row in np.concatenate(columns, axis=1)]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
