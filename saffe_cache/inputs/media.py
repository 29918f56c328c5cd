"""The media that a run fuses: the cache as it sees it, the shapes of their tokens, and which may take each other's
place. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from saffe_cache.core.features import Modality
from saffe_cache.core.items import Ragged
from saffe_cache.fusion.options import MediumShape
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.store.joined import MEDIA, JoinedEncoder, join_media, layers_of_media
from saffe_cache.store.reader import Cache, EncoderCache


def seen_by(cache: Cache, spec: RunSpec) -> Cache:
    """The cache with the media joined that a run fuses; the cache itself if it fuses none, or lacks one of them.

    Raises:
        CacheError: the extraction of a medium is unfinished.
    """
    is_complete = all(key in cache.encoders for key in spec.media.values())
    if not spec.media or not is_complete or spec.gallery_key in cache.encoders:
        return cache
    return join_media(cache, spec.media)


def media_shapes(gallery: EncoderCache, layers: Sequence[int]) -> tuple[MediumShape, ...]:
    """The tokens of each joined medium in some layers; nothing for an encoder of one medium."""
    if not isinstance(gallery, JoinedEncoder):
        return ()
    shapes = []
    for name, own in gallery.layers_of(layers).items():
        widths = {gallery.encoders[name].array(f"hidden_states/{layer}").spec.row_shape[-1] for layer in own}
        shapes.append(MediumShape(name=name, num_layers=len(own), hidden_size=max(widths, default=0)))
    return tuple(shapes)


class Groups:
    """Items with the same texts, such as those of one class, whose media may take each other's place."""

    def __init__(self, texts: Ragged, rows: Mapping[Modality, np.ndarray]) -> None:
        """`rows`, int64 [items]: the input of each item, by medium; -1 where it has none."""
        keys: dict[bytes, int] = {}
        group = np.array([keys.setdefault(np.sort(row).tobytes(), len(keys)) for row in texts])
        self._order, self._first, self._count = {}, {}, {}
        for name, of_medium in rows.items():
            has = np.flatnonzero(of_medium >= 0)
            order = has[np.argsort(group[has], kind="stable")]
            count = np.bincount(group[has], minlength=len(keys))
            self._order[name], self._count[name] = order, count[group]
            self._first[name] = (np.cumsum(count) - count)[group]
        self._rows = rows
        self.are_mixed = any((count > 1).any() for count in self._count.values())
        """Whether any two items have the same texts."""

    def draw(self, modality: Modality, items: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """An item of the same group that has the medium, for each item that has it; the others stay."""
        places = (generator.random(len(items)) * self._count[modality][items]).astype(np.int64)
        has = self._rows[modality][items] >= 0
        drawn = items.copy()
        drawn[has] = self._order[modality][(self._first[modality][items] + places)[has]]
        return drawn

    def draw_parts(self, items: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The inputs of the media of these items, each drawn within its group: int64 [items, media]."""
        drawn = {name: self.draw(name, items, generator) for name in self._rows}
        return np.stack([rows[drawn[name]] for name, rows in self._rows.items()], axis=1)


def named_layers(spec: RunSpec) -> str:
    """The gallery's layers in words, with the medium of each where several are fused."""
    if not spec.media:
        return ", ".join(map(str, spec.gallery_layers))
    media = [name for name in MEDIA if name in spec.media]
    of_media = layers_of_media(media, spec.gallery_layers)
    return "; ".join(f"{name} {', '.join(map(str, own))}" for name, own in of_media.items())
