"""`saffe serve`: an index and its run behind the search page.

A photo, sound or video is read where the index found it, and shown only if its content is still what was indexed, so
that whatever replaced a file is never shown in its place. Of an item of several media, the first one is shown.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from saffe_cache.core.features import NOUNS, Modality, nouns
from saffe_cache.inference.config import ServeConfig
from saffe_cache.inference.heatmap import heat_map, why_no_map
from saffe_cache.inference.search_index import Hit, SearchIndex
from saffe_cache.inference.server import is_loopback, listen, make_app, make_server
from saffe_cache.sources.items import Columns, Media
from saffe_cache.sources.registry import read_named_items

logger = logging.getLogger(__name__)


def serve(config: ServeConfig) -> str:
    """Answer until Ctrl-C or SIGTERM; returns the address that was served.

    Raises:
        ValueError: there is no index, its run is not found, or the port is in use.
    """
    index = SearchIndex.open(config.index, config.run, encoder=config.encoder, device=config.device)
    served = ServedIndex(index)
    app = make_app(served, most_bytes=round(config.upload_mb * 1e6), names=config.allowed_host)
    with listen(config.host, config.port) as listening:
        host, port = listening.getsockname()[:2]
        if not is_loopback(config.host):
            logger.warning(
                "--host %s: other machines can search this index and see its %s; there are no accounts and no "
                "encryption.",
                config.host,
                nouns(index.manifest.searched),
            )
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        served.warm_up()
        logger.info("%d items. Open %s in a browser; Ctrl-C stops.", len(index), address)
        try:
            make_server(app).run(sockets=[listening])
        except KeyboardInterrupt:  # how this command usually ends
            logger.info("Stopped.")
    return address


class ServedIndex:
    """What the page needs of an index."""

    def __init__(self, index: SearchIndex) -> None:
        self._index, self._lock = index, threading.Lock()

    def warm_up(self) -> None:
        """Load the encoders, so that the first query does not wait for them.

        Raises:
            ValueError: one is not found.
        """
        fusion = self._index.fusion
        fusion.embed_texts(["a photo"])
        for key in fusion.spec.media.values() or [fusion.spec.gallery_key]:
            fusion.encoder(key)

    @property
    def about(self) -> dict[str, Any]:
        manifest, fusion = self._index.manifest, self._index.fusion
        searched = manifest.searched
        items = f"{len(self._index):,} {'items of ' if manifest.media else ''}{nouns(searched)}"
        takes_files = None in (fusion.why_not_alone, fusion.why_not_paired)
        return {
            "name": Path(manifest.data).name or manifest.data,
            "about": f"{items}, searched by a {fusion.spec.shape.fusion} fusion of frozen encoders",
            "fusion": fusion.spec.shape.fusion,
            "noun": NOUNS[manifest.modality],
            "version": manifest.generation,
            "takes": searched if takes_files else (),
            "takes_both": fusion.why_not_paired is None,
            "composes": fusion.composes,
            "no_ridge": self._no_ridge,
            "no_heat_map": why_no_map(fusion),
        }

    def __contains__(self, name: object) -> bool:
        return name in self._index.position_of

    def search(
        self, text: str | None, media: Mapping[Modality, bytes], k: int, systems: Sequence[str]
    ) -> dict[str, list[Hit]]:
        self._require(systems)
        return self._index.search_by(text, media, k, systems)

    def like(self, name: str, k: int, systems: Sequence[str]) -> dict[str, list[Hit]]:
        self._require(systems)
        position = np.array([self._index.position_of[name]])
        found = {}
        if "fusion" in systems:
            found["fusion"] = self._index.hits(self._index.vectors_at(position), k, corrected=False)
        if "ridge" in systems:
            found["ridge"] = self._index.hits(self._index.ridge_vectors_at(position), k, ridge=True, corrected=False)
        return found

    def medium_of(self, name: str) -> Modality:
        return self._index.medium_of(name)

    def file(self, name: str) -> bytes:
        path = self._index.file_of(name)
        data = path.read_bytes() if path else self._medium(name).read()
        if hashlib.sha256(data).digest() != self._index.content_hash(name):
            raise OSError("its file has changed since it was indexed")
        return data

    def heat_map(self, name: str, text: str | None) -> dict[str, Any]:
        fusion, manifest = self._index.fusion, self._index.manifest
        if manifest.paired:
            own = self._index.columns.one("captions", self._index.position_of[name])
            text = own[0] if own else None
        text = None if fusion.why_not_paired or fusion.composes else text
        found = heat_map(fusion, self.file(name), text)
        with_text = "" if text is None else ", with the photo's own text" if manifest.paired else ", with your text"
        size = found.weights.shape
        about = f"The fusion's mean attention to {size[0]} x {size[1]} patches{with_text}: yellow is most."
        return {"weights": found.weights.tolist(), "box": found.box, "about": about}

    @property
    def _no_ridge(self) -> str:
        if self._index.manifest.ridge:
            return ""
        if self._index.fusion.ridge is None:
            return "No comparison: the run keeps no ridge regression. Train it again with this version."
        return "No comparison: the index was made without --ridge."

    def _require(self, systems: Sequence[str]) -> None:
        if "ridge" in systems and self._no_ridge:
            raise ValueError(self._no_ridge)

    def _medium(self, name: str) -> Media:
        """What is shown of an item that has no file of its own."""
        with self._lock:
            found = self._media.get(name)
        if found is None:
            raise OSError(f"it is no longer in {self._index.manifest.data}")
        return found

    @cached_property
    def _media(self) -> Mapping[str, Media]:
        """Those of all items, found when the first one is shown."""
        manifest = self._index.manifest
        items = read_named_items(manifest.data, Columns(**manifest.column), self._index.position_of.keys())
        return {item.id: item.media[medium] for item in items if (medium := self.medium_of(item.id)) in item.media}
