"""A run for tests of the index: its vectors are mean colours, and its texts are names of colours."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from saffe_cache.sources.items import SourceItem

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
    "purple": (255, 0, 255),
}


class Vectors(NamedTuple):
    """As the `Embedded` of a TrainedFusion."""

    items: tuple[SourceItem, ...]
    vectors: np.ndarray
    problems: Mapping[str, str]


class ColourFusion:
    """Has the part of a TrainedFusion's interface that an index uses; counts what it embeds."""

    modality = "image"
    media = ("image",)
    size = 3
    storage = None
    index_views = "plain"
    why_not_alone: str | None = None
    composes = scores_itself = False

    def __init__(self, folder: Path, fingerprint: str = "0123456789ab", why_not_paired: str | None = None) -> None:
        self.folder, self.fingerprint, self.why_not_paired = folder, fingerprint, why_not_paired
        self.spec = SimpleNamespace(gallery_text="null")
        self.num_embedded = 0

    def why_no_gallery(self, *, paired: bool) -> str | None:
        return self.why_not_paired if paired else self.why_not_alone

    def embed_images(self, images: Sequence[Any]) -> np.ndarray:
        return unit([self._colour(image) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return unit([_named(text) for text in texts])

    def embed_pairs(self, inputs: Sequence[Any], texts: Sequence[str]) -> np.ndarray:
        return unit([self._colour(one) + 3 * _named(text) for one, text in zip(inputs, texts, strict=True)])

    def embed_query(self, text: str | None, media: Mapping[str, Any], *, with_ridge: bool) -> dict[str, np.ndarray]:
        assert not with_ridge
        texts, images = [text] if text else [], [*media.values()]
        if not images:
            return {"fusion": self.embed_texts(texts)}
        return {"fusion": self.embed_pairs(images, texts) if texts else self.embed_images(images)}

    def embed_read_items(self, items: Sequence[SourceItem], *, paired: bool, with_ridge: bool) -> Vectors:
        assert not with_ridge
        vectors, problems = {}, {}
        for item in items:
            data = item.media["image"].read()
            try:
                is_pair = paired and item.captions
                vectors[item.id] = self.embed_pairs([data], item.captions[:1]) if is_pair else self.embed_images([data])
            except ValueError as error:
                problems[item.id] = str(error)
        found = tuple(item for item in items if item.id in vectors)
        return Vectors(found, np.concatenate([np.zeros((0, 3), np.float32), *vectors.values()]), problems)

    def _colour(self, image: Any) -> np.ndarray:
        self.num_embedded += 1
        try:
            picture = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        except UnidentifiedImageError:
            raise ValueError("cannot be read: it is no picture") from None
        return np.asarray(picture.convert("RGB"), np.float64).mean(axis=(0, 1)) / 255 + 1e-3


def unit(vectors: Sequence[np.ndarray]) -> np.ndarray:
    stacked = np.stack(vectors)
    return (stacked / np.linalg.norm(stacked, axis=1, keepdims=True)).astype(np.float32)


def paint(path: Path, colour: str | tuple[int, int, int], size: int = 4) -> None:
    """Draw a picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), COLOURS[colour] if isinstance(colour, str) else colour).save(path)


def _named(text: str) -> np.ndarray:
    found = [np.array(rgb) / 255 for name, rgb in COLOURS.items() if name in text]
    return np.asarray(found[0] if found else np.ones(3)) + 1e-3
