"""The cache's manifests: attributes of each encoder's group, and what its log adds.

An encoder's manifest and, while an extraction runs, the records of its log are the only authority on what is complete.
Both are written in one atomic step, after the shards that they list are durable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from saffe_cache.core.features import MODALITIES, CacheError, Fingerprint, Modality, short_hash
from saffe_cache.core.json_schema import made_of, whole_number
from saffe_cache.core.views import PLAIN, place_of
from saffe_cache.store.layout import LAYER_PREFIX, ArraySpec, ShardEntry, encoder_group, layers_among, split_view
from saffe_cache.store.log import read_log, reasons_from_json, reasons_to_json
from saffe_cache.store.root import existing_root
from saffe_cache.store.storage import (
    FORMAT_VERSION,
    Storage,
    check_encoding,
    group_metadata,
    own_attributes,
    read_attributes,
)

_COMPRESSED = 2
"""Version of an encoder's manifest with a compressed array, which older releases would misread."""


@dataclass
class ArrayManifest:
    """One growing array: its spec and its shards so far."""

    spec: ArraySpec
    shards: list[ShardEntry] = field(default_factory=list)
    later: dict[int, ShardEntry] = field(default_factory=dict)
    """Committed shards behind a gap, by number: parallel writers do not commit in order."""

    @property
    def rows(self) -> int:
        """Committed rows before the first gap."""
        return sum(entry.rows for entry in self.shards)

    def entry(self, index: int) -> ShardEntry | None:
        """A committed shard, also behind a gap."""
        return self.shards[index] if index < len(self.shards) else self.later.get(index)

    def commit(self, index: int, entry: ShardEntry) -> None:
        """Take a durable shard, or the longer version of a tail shard; a shorter version is older and ignored."""
        if index < len(self.shards):
            if entry.rows >= self.shards[index].rows:
                self.shards[index] = entry
        elif index not in self.later or entry.rows >= self.later[index].rows:
            self.later[index] = entry
        while len(self.shards) in self.later and (not self.shards or self.shards[-1].rows == self.spec.shard_rows):
            self.shards.append(self.later.pop(len(self.shards)))

    def to_json(self) -> dict[str, Any]:
        """Without the shards behind a gap, which only the log lists."""
        spec = {name: value for name, value in vars(self.spec).items() if (name, value) != ("compression", "none")}
        return {**spec, "shards": [asdict(entry) for entry in self.shards]}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> ArrayManifest:
        """Raises KeyError, TypeError or ValueError if a field is missing or has another type."""
        content = {"compression": "none", **content}
        spec = made_of(ArraySpec, {one.name: content[one.name] for one in fields(ArraySpec)})
        shards = [ShardEntry.from_json(entry) for entry in content["shards"]]
        full, last = shards[:-1], shards[-1:]
        if any(entry.rows != spec.shard_rows for entry in full) or any(not 0 < e.rows <= spec.shard_rows for e in last):
            raise ValueError(f"the rows of the shards: {[entry.rows for entry in shards]}")
        return ArrayManifest(spec, shards)


@dataclass
class EncoderManifest:
    """The manifest of one encoder's group."""

    fingerprint: Fingerprint
    modality: Modality
    num_layers: int
    hidden_size: int
    vector: str
    """The array with the encoder's own vector of each input: "projected" where there is one, else "pooled"."""
    arrays: dict[str, ArrayManifest] = field(default_factory=dict)
    finished_rows: int = 0
    """Inputs whose rows are in every array; the next extraction starts after them."""
    invalid: dict[int, str] = field(default_factory=dict)
    """Reason for each input, by row, that could not be encoded."""
    has_feature_maps: bool = False
    """Whether tokens are spatial positions of feature maps: there is no class token, and no layer has a block."""
    is_language_model: bool = False
    """Whether it is a causal language model, kept with all its blocks and all else that generation needs."""
    class_tokens: int = -1
    """Tokens of a photo or sound before those of its places: class tokens and registers. Where it is not
    recorded (-1), 1; 0 with feature maps."""
    unusable_blocks: dict[int, str] = field(default_factory=dict)
    """Why a block, by layer, computes something else than the model, and is not cached."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry for each extraction that added something, with its config, versions and times, and for each conversion
    and repair."""
    log: str = ""
    """The folder of records of the extraction that runs or was interrupted; empty after its end."""
    stored: bytes = field(default=b"", init=False, compare=False, repr=False)
    """The file as it was read or written last; empty for a new one. It must still be that when it is replaced."""

    def __post_init__(self) -> None:
        if self.class_tokens < 0:
            self.class_tokens = int(not self.has_feature_maps)

    @property
    def key(self) -> str:
        return self.fingerprint.key

    @property
    def selected_tokens(self) -> str:
        """Which tokens of its inputs are cached."""
        return str(self.fingerprint.fields.get("tokens", "all"))

    @property
    def layers(self) -> list[int]:
        """Cached indices i of `hidden_states[i]`, ascending."""
        return layers_among(self.arrays)

    def views_of(self, layers: Iterable[int]) -> tuple[str, ...]:
        """The views, besides the plain photos, of which there are arrays of all these layers, in order."""
        held = [
            {split_view(name)[0] for name in self.arrays if split_view(name)[1] == f"{LAYER_PREFIX}{i}"} for i in layers
        ]
        return tuple(sorted(set.intersection(*held) - {PLAIN}, key=place_of)) if held else ()

    @property
    def extractions(self) -> list[dict[str, Any]]:
        """The extractions in the history."""
        return [entry for entry in self.history if {"inputs", "config"} <= entry.keys()]

    @property
    def is_ragged(self) -> bool:
        return "offsets" in self.arrays

    def to_json(self) -> dict[str, Any]:
        is_compressed = any(array.spec.compression != "none" for array in self.arrays.values())
        return {
            "encoding-type": "saffe-encoder",
            "encoding-version": _COMPRESSED if is_compressed else FORMAT_VERSION,
            "fingerprint": dict(self.fingerprint.fields),
            "modality": self.modality,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "vector": self.vector,
            **({"feature_maps": True} if self.has_feature_maps else {}),
            **({"language_model": True} if self.is_language_model else {}),
            **({"class_tokens": self.class_tokens} if self.class_tokens != 1 - self.has_feature_maps else {}),
            **({"unusable_blocks": reasons_to_json(self.unusable_blocks)} if self.unusable_blocks else {}),
            **({"log": self.log} if self.log else {}),
            "finished_rows": self.finished_rows,
            "invalid": reasons_to_json(self.invalid),
            "history": self.history,
            "arrays": {name: array.to_json() for name, array in sorted(self.arrays.items())},
        }

    @staticmethod
    def from_json(content: Mapping[str, Any], where: str) -> EncoderManifest:
        """Raises CacheError if a field is missing or has another type, or the format version is not supported."""
        check_encoding(content, "saffe-encoder", where, (FORMAT_VERSION, _COMPRESSED))
        try:
            if content["modality"] not in MODALITIES:
                raise ValueError(f"modality: {content['modality']!r}")
            fingerprint, is_map = _fingerprint(content), content.get("feature_maps") is True
            return EncoderManifest(
                fingerprint=fingerprint,
                modality=content["modality"],
                num_layers=whole_number(content, "num_layers"),
                hidden_size=whole_number(content, "hidden_size", least=1),
                vector=str(content["vector"]),
                has_feature_maps=is_map,
                is_language_model=content.get("language_model") is True,
                class_tokens=whole_number({"class_tokens": int(not is_map), **content}, "class_tokens"),
                unusable_blocks=reasons_from_json(content.get("unusable_blocks", {})),
                arrays={_array_name(name): ArrayManifest.from_json(one) for name, one in content["arrays"].items()},
                finished_rows=whole_number(content, "finished_rows"),
                history=[dict(entry) for entry in content["history"]],
                invalid=reasons_from_json(content["invalid"]),
                log=_log_name(content.get("log", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CacheError(
                f"{where}: its manifest lacks or misstates {error}. Restore zarr.json from a copy."
            ) from None


def _fingerprint(content: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint in a manifest's attributes."""
    fields = content["fingerprint"]
    if not isinstance(fields, dict) or "model_id" not in fields or fields.get("modality") != content["modality"]:
        raise ValueError(f"fingerprint: {fields!r:.200}, expected an object with model_id and the encoder's modality")
    fingerprint = Fingerprint(fields)
    assert fingerprint.key  # raises ValueError if a field is NaN or infinite
    return fingerprint


def _array_name(name: str) -> str:
    """Check an array's name, of any view: a layer's number has no leading zeros. (Storage checks for paths outside the
    cache.)"""
    own = split_view(name)[1]
    if own.startswith(LAYER_PREFIX) and not re.fullmatch(r"0|[1-9][0-9]{0,17}", own.removeprefix(LAYER_PREFIX)):
        raise ValueError(f"arrays: {name!r:.60}, expected {LAYER_PREFIX} followed by a layer's number")
    return name


def _log_name(value: Any) -> str:
    """The name of a log's folder; it has no way out of the encoder's group."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-z]{0,32}", value):
        raise ValueError(f"log: {value!r:.60}, expected small letters and digits")
    return value


def weights_type(name: str) -> str:
    """Encoding type of a group of weights: a block's (`blocks/I`), or a language model's other parts."""
    return "saffe-block" if name.startswith("blocks/") else "saffe-language-model"


def log_folder(manifest: EncoderManifest) -> str:
    """Name of the folder with the records of the extraction that runs."""
    return f"{encoder_group(manifest.key)}/log/{manifest.log}"


def read_encoder(storage: Storage, key: str) -> EncoderManifest:
    """An encoder's manifest, with what the log of a running or interrupted extraction adds.

    Raises CacheError if its group is missing, or its manifest or a record is damaged.
    """
    name = encoder_group(key)
    stored = b""
    while True:
        before, stored = stored, storage.read(f"{name}/zarr.json")
        manifest = EncoderManifest.from_json(own_attributes(storage, name, stored), f"{storage.root}: {name}")
        if manifest.key != key:
            raise CacheError(
                f"{storage.root}: {name} contains the fingerprint of {manifest.key}: the folder was renamed or its "
                "zarr.json was edited. Restore it from a copy."
            )
        manifest.stored = stored
        if not manifest.log:
            return manifest
        try:
            _add_log(manifest, storage)
        except CacheError:
            if stored == before:
                raise
            continue
        if stored == storage.read(f"{name}/zarr.json"):  # otherwise its end has moved the log into the manifest
            return manifest


def _add_log(manifest: EncoderManifest, storage: Storage) -> None:
    folder = log_folder(manifest)
    for record in read_log(storage, folder):
        manifest.invalid |= record.invalid
        for name, entries in record.shards.items():
            if name not in manifest.arrays:
                raise CacheError(
                    f"{storage.root}: {folder}: a record names {name!r:.60}, which the manifest does not. Remove the "
                    "folder, and run saffe extract again."
                )
            for index, entry in sorted(entries.items()):
                manifest.arrays[name].commit(index, entry)


def write_encoder(storage: Storage, manifest: EncoderManifest) -> None:
    """Commit a manifest; all shards that it lists must be durable before.

    Raises CacheError if another process has changed it since it was read.
    """
    name = f"{encoder_group(manifest.key)}/zarr.json"
    data = group_metadata({"saffe_cache": manifest.to_json()})
    if not manifest.stored:  # what a crashed writer left of an encoder that the root does not list
        storage.write(name, data)
    elif not storage.replace(name, data, manifest.stored):
        raise CacheError(
            f"{storage.root}: {name} was changed by another process while this one wrote. Nothing of the cache is "
            "lost; run the same command again when no other one writes to it."
        )
    manifest.stored = data


def content_hash(storage: Storage) -> str:
    """A hash of the item table and all rows, made from the checksums in their manifests; it ignores the history.

    Raises CacheError if there is no cache, or one of another format version.
    """
    root = existing_root(storage)
    encoders = [read_encoder(storage, key).to_json() | {"history": [], "log": ""} for key in root.encoders]
    tables = [read_attributes(storage, f"tables/{name}") for name in root.tables]
    return short_hash({"tables": tables, "encoders": encoders})
