"""Find the photos that a page shows where the cache says that its data are, and make thumbnails of them.

A photo is known by the hash of its content: a file that has changed since, or lies under the same name elsewhere, is
never shown in its place. What cannot be found has a reason instead of a thumbnail.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from saffe_cache.core.features import CacheError
from saffe_cache.report.gallery import Gallery
from saffe_cache.sources.decoding import thumbnail
from saffe_cache.sources.items import Columns, Media
from saffe_cache.sources.registry import read_named_items
from saffe_cache.store.reader import open_cache

SIDE = 160
"""Pixels of a thumbnail's longer side."""
MOST_BYTES = 3_400_000
"""Of all thumbnails, which base64 makes 4.5 MB of."""


@dataclass
class Album:
    """Thumbnails by content hash, each once, however many evaluations show it."""

    data: Sequence[str]
    """Where the data are now; empty for where the extraction found them."""
    thumbnails: dict[bytes, bytes] = field(default_factory=dict)
    reasons: dict[bytes, str] = field(default_factory=dict)
    """Why a photo has none."""

    def add(self, gallery: Gallery) -> None:
        """Find the photos of a gallery."""
        wanted = {gallery.hash_of(place): gallery.details.photo_ids[place] for place in gallery.places}
        wanted = {content: name for content, name in wanted.items() if content not in self.thumbnails}
        if gallery.is_sound:
            self.reasons |= dict.fromkeys(wanted, "a sound")
            return
        found, failures = self._find(gallery, wanted)
        for content, name in wanted.items():
            media = found.get(content)
            if media is None:
                self.reasons[content] = failures or found.ids.get(name, "not found in the data")
                continue
            try:
                data = media.read()
                if hashlib.sha256(data).digest() != content:
                    raise ValueError("its file is changing")
                self.thumbnails[content] = thumbnail(data, SIDE)
            except (OSError, ValueError) as error:
                self.reasons[content] = str(error)

    def keep_first(self, wanted: Iterable[bytes]) -> None:
        """Keep as many as a page has room for, in the order in which they are wanted."""
        kept: dict[bytes, bytes] = {}
        size = 0
        for content in wanted:
            small = self.thumbnails.get(content)
            if small is None or content in kept:
                continue
            size += len(small)
            if size <= MOST_BYTES:
                kept[content] = small
            else:
                self.reasons[content] = "left out to keep the page small"
        self.thumbnails = kept

    def _find(self, gallery: Gallery, wanted: dict[bytes, str]) -> tuple[_Found, str]:
        """The files, and what kept some places from being read."""
        found, failures = _Found(), []
        try:
            places = _places(gallery, self.data)
        except (CacheError, ValueError, TypeError, KeyError, OSError) as error:
            return found, f"the cache does not say where its data are ({error})"
        for data, columns in places:
            left = {name for content, name in wanted.items() if content not in found.media}
            if not left:
                break
            try:
                items = read_named_items(data, columns, left)
            except (ValueError, OSError) as error:
                failures.append(str(error))
                continue
            for item in items:
                found.ids[item.id] = "its file has changed since it was extracted"
                if "image" not in item.hashes:
                    found.ids[item.id] = item.problem or "it has no photo now"
                else:
                    found.media[item.hashes["image"]] = item.media["image"]
        return found, " ".join(failures) if not found.ids else ""


@dataclass
class _Found:
    media: dict[bytes, Media] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    """Of the items that were read, with what is the matter where the photo is not there."""

    def get(self, content: bytes) -> Media | None:
        return self.media.get(content)


def _places(gallery: Gallery, data: Sequence[str]) -> list[tuple[str, Columns]]:
    """Where the data may be, each place once: folders that are there first, then what may be the hub's."""
    try:
        cache = open_cache(gallery.cache)
        configs = [one["config"] for one in cache.encoders[gallery.encoder].manifest.extractions]
        recorded = [(str(one["data"]), Columns(**one["column"])) for one in configs]
    except (CacheError, ValueError, TypeError, KeyError, OSError):
        if not data:
            raise
        recorded = []
    if data:
        columns = [of for _, of in recorded] or [Columns()]
        recorded = [(place, of) for place in data for of in columns]
    return sorted(dict.fromkeys(recorded), key=lambda place: not Path(place[0]).expanduser().is_dir())


def css_classes(hashes: Iterable[bytes]) -> dict[bytes, str]:
    """A class for each thumbnail, so that its bytes stand in the page once."""
    return {content: f"photo-{number}" for number, content in enumerate(hashes)}
