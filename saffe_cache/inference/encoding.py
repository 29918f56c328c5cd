"""New inputs in memory: what a run's frozen encoders make of them, as in an extraction.

The encoders are loaded when they are first needed. Inputs pass them with the same batches, windows, token selection and
storage type as in the extraction. Several media of an item are encoded one by one and joined as in a cache.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saffe_cache.core.features import NOUNS, CacheError, Modality, StorageType
from saffe_cache.core.items import ItemTable
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.encoders.own import OwnEncoder
from saffe_cache.extraction.config import ExtractConfig, config_from_json, encode_options
from saffe_cache.extraction.encoding import encode_in_memory
from saffe_cache.extraction.reencode import reload_encoder
from saffe_cache.inputs.feature_loader import FeatureLoader
from saffe_cache.inputs.media import seen_by
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.sources.items import Media, SourceItem
from saffe_cache.store.held import HeldCache, HeldEncoder
from saffe_cache.store.layout import array_of_view
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.reader import Cache, EncoderCache
from saffe_cache.store.table import TableBuilder

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """Features of items in memory."""

    inputs: FeatureLoader
    rows: np.ndarray
    """int64: of the items that could be encoded, in order."""
    texts: np.ndarray | None
    """int64: the rows of their paired texts; None for null text."""
    invalid: dict[str, str]
    """Why the others could not be encoded, by id."""


@dataclass(frozen=True, eq=False)
class RunEncoders:
    """The frozen encoders of a run. Threads may share it."""

    folder: Path
    """Of the run."""
    spec: RunSpec
    kept: Cache
    """What the run keeps of its encoders: a cache without rows."""
    past: Mapping[str, Mapping[str, Any] | None]
    """The options of the extraction that ran each; None where unknown."""
    places: Mapping[str, str | OwnEncoder]
    """Where encoders are now, by modality, if they have moved."""
    device: str
    is_auto: bool
    """Whether the device was chosen automatically."""
    storage: StorageType | None
    """Type in which hidden states are rounded; None for that of the cache."""
    views: tuple[str, ...]
    """Whose vectors are averaged."""
    lock: Any = field(default_factory=threading.RLock)
    _loaded: dict[str, FrozenEncoder] = field(default_factory=dict)

    @property
    def media(self) -> Mapping[Modality, str]:
        """The media of the gallery, with the keys of their encoders."""
        key = self.spec.gallery_key
        return self.spec.media or {self.kept.encoders[key].manifest.modality: key}

    def load(self, items: Sequence[SourceItem], *, paired: bool, needs_all: bool = False) -> Loaded:
        """Features of items, with their first captions if they are paired.

        An item of which a medium cannot be read lacks it, with a warning; if `needs_all`, it is not encoded.
        """
        builder, media = TableBuilder(None, ()), dict[bytes, Media]()
        for item in items:
            own = {name: content for name, content in item.hashes.items() if name in self.media}
            builder.add(replace(item, hashes=own, captions=item.captions[:1] if paired else (), labels=()))
            media |= {content: item.media[name] for name, content in own.items()}
        table, spec = builder.build(), self.spec
        gallery = {key: self._gallery(name, key, table, media) for name, key in self.media.items()}
        text: EncoderCache = self.texts(table) if paired else self.kept.encoders[spec.text_key]
        cache = seen_by(HeldCache(table, {**gallery, spec.text_key: text}), spec)
        joined = cache.encoders[spec.gallery_key]
        rows = cache.table.rows[joined.manifest.modality]
        usable, texts = joined.usable(rows), table.captions.values
        invalid = self._invalid(items, table, gallery)
        if needs_all:
            usable &= [item.id not in invalid for item in items]
        lacking = {item.id: invalid[item.id] for item, is_usable in zip(items, usable, strict=True) if not is_usable}
        if partly := {name: reason for name, reason in invalid.items() if name not in lacking}:
            name, reason = next(iter(partly.items()))
            logger.warning("%d items lack a medium that cannot be read, such as %s: %s.", len(partly), name, reason)
        inputs = FeatureLoader(cache, spec, self.device, index_views=self.views)
        return Loaded(inputs, rows[usable], texts[usable] if paired else None, lacking)

    def _gallery(self, medium: Modality, key: str, table: ItemTable, media: Mapping[bytes, Media]) -> HeldEncoder:
        """The inputs of one medium, in the layers and views that the run reads."""
        gallery, layers = self.kept.encoders[self.spec.gallery_key], self.spec.gallery_layers
        own = next(of for one, _, of in gallery.members(np.zeros(0, np.int64), layers) if one.key == key)
        names = [array_of_view(view, f"hidden_states/{layer}") for view in self.views for layer in own]
        if not len(table.inputs.get(medium, ())):  # no item has it
            manifest = self._manifest(key)
            return HeldEncoder(manifest, {"offsets": np.zeros(1, np.int64)} if manifest.is_ragged else {})
        held = self._held(key, table, media, names)
        self._require_tokens(held)
        return held

    @staticmethod
    def _invalid(items: Sequence[SourceItem], table: ItemTable, gallery: Mapping[str, HeldEncoder]) -> dict[str, str]:
        """Why a medium of an item could not be encoded, by id."""
        found: dict[str, str] = {}
        for held in gallery.values():
            which = f"its {NOUNS[held.manifest.modality]}: " if len(gallery) > 1 else ""
            rows = table.rows.get(held.manifest.modality, np.full(len(items), -1))
            reasons = {int(row): reason for row, reason in held.manifest.invalid.items()}
            pairs = zip(items, rows.tolist(), strict=True)
            found |= {item.id: f"{which}{reasons[row]}" for item, row in pairs if row in reasons}
        return found

    def _require_tokens(self, gallery: HeldEncoder) -> None:
        """Raise ValueError if a head that takes a fixed number of tokens has got another one."""
        shape = self.spec.shape
        if shape.head == "flatten" and gallery.num_tokens(self.spec.gallery_layers[0]) != shape.num_tokens:
            raise ValueError(
                f"--run {self.folder}: its head takes {shape.num_tokens} tokens of each input, found another number. "
                "Give sounds of the length that it was trained on."
            )

    def texts(self, table: ItemTable) -> HeldEncoder:
        """The texts of a table, with the tokens that the fusion reads."""
        key, names = self.spec.text_key, [f"hidden_states/{layer}" for layer in self.spec.token_layers]
        return self._held(key, table, {}, [*names, self.kept.encoders[key].manifest.vector])

    def with_texts(self, table: ItemTable) -> FeatureLoader:
        """What reads the texts of a table, token by token."""
        encoders = {**self.kept.encoders, self.spec.text_key: self.texts(table)}
        return FeatureLoader(HeldCache(table, encoders), self.spec, self.device)

    def text_vectors(self, table: ItemTable) -> HeldEncoder:
        """The texts of a table, with their own vectors alone."""
        key = self.spec.text_key
        return self._held(key, table, {}, [self.kept.encoders[key].manifest.vector])

    def _held(self, key: str, table: ItemTable, media: Mapping[bytes, Media], names: Collection[str]) -> HeldEncoder:
        """Arrays of one encoder for the inputs of a table."""
        options = encode_options(replace(self.recorded(key), decode_in="threads"))
        usual = self.spec.shape.num_tokens if key == self.spec.gallery_key else 0
        return encode_in_memory(
            self.encoder(key), self._manifest(key), options, table, media, names, usual_tokens=usual
        )

    def _manifest(self, key: str) -> EncoderManifest:
        """The encoder's manifest, with the storage type of hidden states that was asked for."""
        manifest = self.kept.encoders[key].manifest
        if self.storage is None:
            return manifest
        arrays = {
            name: replace(array, spec=replace(array.spec, dtype=self.storage)) if "hidden_states/" in name else array
            for name, array in manifest.arrays.items()
        }
        return replace(manifest, arrays=arrays)

    def encoder(self, key: str) -> FrozenEncoder:
        """One of the run's encoders, loaded when it is first needed and compared with its fingerprint.

        Raises:
            ValueError: it is unavailable.
            CacheError: another one is there.
        """
        with self.lock:
            if key not in self._loaded:
                manifest = self.kept.encoders[key].manifest
                moved, option = self.places.get(manifest.modality), f"--encoder {manifest.modality}=PLACE"
                recorded = self.recorded(key)
                try:
                    self._loaded[key] = reload_encoder(manifest, recorded, moved, option, any_version=True)
                except ValueError as error:
                    raise ValueError(
                        f"{error} The run {self.folder} needs it; name its place with {option}."
                    ) from error
            return self._loaded[key]

    def recorded(self, key: str) -> ExtractConfig:
        """The options of the extraction that ran an encoder, for this machine.

        Raises:
            CacheError: they are unknown.
        """
        recorded = self.past[key]
        if recorded is None:
            raise CacheError(
                f"--run {self.folder}: its cache does not say where {key} is from. Add something to the cache with "
                "saffe extract, which records it, and train again."
            )
        config = config_from_json(recorded)
        if self.is_auto and config.device_map:
            return config
        return replace(config, device=self.device, device_map=None, max_memory={})
