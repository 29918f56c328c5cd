"""What a cache holds, described for people, and whether all of it is intact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import numpy as np

from saffe_cache.core.features import CacheError, printable
from saffe_cache.core.items import ItemTable
from saffe_cache.store.arrays import ArrayFiles
from saffe_cache.store.config import InspectConfig, VerifyConfig
from saffe_cache.store.manifest import read_encoder
from saffe_cache.store.parts import check_whole
from saffe_cache.store.reader import Cache, EncoderCache, open_cache, read_current
from saffe_cache.store.root import existing_root
from saffe_cache.store.storage import Storage

Read = TypeVar("Read")

_NUM_EXAMPLES = 3
_NUM_CLASSES = 10


def inspect_cache(config: InspectConfig) -> str:
    """Describe a cache: items, splits, classes, encoders with their arrays, and a few items.

    Raises:
        CacheError: there is no cache, or it is damaged.
    """
    cache = open_cache(config.cache)
    table = cache.table
    lines = [f"{config.cache}: {len(table)} items"]
    lines += [f"  split {split}: {_describe_split(table, split)}" for split in table.splits.counts()]
    if table.class_names:
        shown = [*table.class_names[:_NUM_CLASSES], *(["…"] if len(table.class_names) > _NUM_CLASSES else [])]
        lines.append(f"  {len(table.class_names)} classes: {', '.join(shown)}")
    for modality, inputs in table.inputs.items():
        lines.append(f"  {len(inputs)} distinct {modality} inputs")
    for encoder in cache.encoders.values():
        lines += _describe_encoder(encoder, table)
    return "\n".join(map(printable, [*lines, *_describe_items(cache)]))


def _media_of(table: ItemTable, split: str) -> str:
    """How many items have which media, where the cache has several kinds; empty otherwise."""
    kinds = [name for name, rows in table.rows.items() if (rows >= 0).any()]
    items = np.flatnonzero(table.splits.are(split) & ~table.are_queries)
    items = items[table.problems.lengths[items] == 0]
    if len(kinds) < 2 or not len(items):
        return ""
    subsets, counts = np.unique(np.stack([table.rows[name][items] >= 0 for name in kinds]), axis=1, return_counts=True)
    named = (" + ".join(name for name, has in zip(kinds, of, strict=True) if has) or "no file" for of in subsets.T)
    return "; " + ", ".join(f"{count} with {subset}" for subset, count in zip(named, counts, strict=True))


def _describe_split(table: ItemTable, split: str) -> str:
    is_there, are_queries = table.splits.are(split), table.are_queries
    has_problem = table.problems.lengths > 0
    counts = [
        (np.count_nonzero(found), np.count_nonzero(found & has_problem))
        for found in (is_there & ~are_queries, is_there & are_queries)
    ]
    (items, unreadable), (queries, unusable) = counts
    of_queries = f"; {queries} composed queries, {unusable} unusable" if queries else ""
    return f"{items} items, {unreadable} unreadable{_media_of(table, split)}{of_queries}"


def _describe_encoder(encoder: EncoderCache, table: ItemTable) -> list[str]:
    manifest = encoder.manifest
    fields = manifest.fingerprint.fields
    state = f"{manifest.finished_rows} inputs" if manifest.finished_rows else "UNFINISHED"
    lines = [
        f"{manifest.key}: {manifest.num_layers} layers of width {manifest.hidden_size}, {state}, "
        f"{len(manifest.invalid)} unreadable",
        f"  model {fields.get('model_id')}, revision {fields.get('revision') or 'unknown'}, {fields.get('dtype')}",
    ]
    own = f"  own vector: {fields.get('pooling')}"
    lines.append(own + (f"; prompt {fields['prompt']!r}" if fields.get("prompt") not in (None, "{}") else ""))
    if manifest.selected_tokens != "all":
        lines.append(f"  tokens: {manifest.selected_tokens}; there are no blocks, which need all")
    elif manifest.has_feature_maps:
        lines.append("  feature maps: tokens are spatial positions, row by row; there are no blocks")
    for layer, reason in sorted(manifest.unusable_blocks.items()):
        lines.append(f"  block {layer} cannot be used: {reason}")
    if manifest.is_language_model:
        lines.append(f"  a language model: texts start at position {fields.get('position_offset')}, all blocks kept")
    truncated = [count for entry in manifest.extractions if isinstance(count := entry.get("truncated"), int)]
    if any(truncated):
        lines.append(f"  {max(truncated)} texts are longer than {fields.get('max_length')} tokens and were truncated")
    for name, array in sorted(manifest.arrays.items()):
        shape = " x ".join(map(str, (array.rows, *array.spec.row_shape)))
        megabytes = array.rows * array.spec.row_bytes / 1e6
        line = f"  {name}: {shape} {array.spec.described}, {len(array.shards)} shards, {megabytes:.1f} MB"
        if array.spec.dtype != "int64":
            found = encoder.statistics(name)
            line += f", mean {found.mean:.4g}, std {found.std:.4g}, max |x| {found.max_magnitude:.4g}"
        lines.append(line)
    for row, reason in list(manifest.invalid.items())[:_NUM_EXAMPLES]:
        lines.append(f"  unreadable input {table.name_of(manifest.modality, row)}: {reason}")
    return lines


def _describe_items(cache: Cache) -> list[str]:
    table: ItemTable = cache.table
    texts = table.inputs["text"].texts if "text" in table.inputs else ()
    lines, references = [], table.references.tolist()
    for item in np.linspace(0, len(table) - 1, min(_NUM_EXAMPLES, len(table)), dtype=int):
        problem = f": {table.problems[item]}" if table.problems[item] else ""
        lines.append(f"item {table.ids[item]!r} ({table.splits[item]}){problem}")
        lines += [f"  class {table.class_names[int(label)]!r}" for label in table.labels[int(item)]]
        what = "text" if references[item] >= 0 else "caption"
        lines += [f"  reference {table.ids[references[item]]!r}"] if references[item] >= 0 else []
        lines += [f"  {what} {texts[int(row)]!r}" for row in table.captions[int(item)]] if texts else []
        targets = table.targets[int(item)]
        lines += [f"  {len(targets)} targets, such as {table.ids[int(targets[0])]!r}"] if len(targets) else []
    return lines


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One damaged part of a cache."""

    part: Literal["table", "manifest", "weights", "metadata", "shard"]
    message: str = ""
    """Where it is, and what is wrong with it."""
    encoder: str = ""
    """Key of its encoder; empty for the item table."""
    name: str = ""
    """The array, or the group of weights, below the encoder's group."""
    index: int = -1
    """Number of the shard."""

    @property
    def place(self) -> str:
        """A name of the part for people."""
        within = {
            "weights": self.name.replace("blocks/", "block "),
            "metadata": f"{self.name}/zarr.json",
            "shard": f"{self.name}, shard {self.index}",
        }
        return f"{self.encoder}: {within.get(self.part, self.part)}" if self.encoder else "item table"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The result of a check."""

    num_shards: int
    """Shards that were read."""
    problems: list[str]
    """Damaged parts, one line each."""

    @property
    def exit_status(self) -> int:
        return 1 if self.problems else 0

    def __str__(self) -> str:
        total = f"{self.num_shards} shards read, {len(self.problems)} damaged"
        return "\n".join([*map(printable, self.problems), total])


def verify_cache(config: VerifyConfig) -> Verified:
    """Read all committed data of a cache and compare it with its checksums.

    Raises:
        CacheError: there is no cache, or one of another format version.
    """
    num_shards, found = find_damage(Storage(config.cache))
    return Verified(num_shards=num_shards, problems=[one.message for one in found])


def find_damage(storage: Storage) -> tuple[int, list[Damage]]:
    """The number of shards read, and the damaged parts of a cache.

    Raises CacheError if there is no cache, or one of another format version.
    """
    root = existing_root(storage)
    damage: list[Damage] = []
    num_shards = 0

    def check(part: Damage, read: Callable[[], Read]) -> Read | None:
        try:
            return read()
        except (CacheError, OSError) as error:
            damage.append(replace(part, message=str(error)))
            return None

    table = partial(read_current, storage, root, lambda root: check_whole(storage, root))
    check(Damage(part="table"), table)
    for key in root.encoders:
        manifest = check(Damage(part="manifest", encoder=key), partial(read_encoder, storage, key))
        if manifest is None:
            continue
        encoder = EncoderCache(storage, manifest)
        for name in encoder.weights:
            check(Damage(part="weights", encoder=key, name=name), partial(encoder.read_weights, name))
        for name, array in manifest.arrays.items():
            files = ArrayFiles(storage, key, name, array.spec)
            metadata = Damage(part="metadata", encoder=key, name=name)
            check(metadata, partial(files.check_metadata, array.rows))
            for index, entry in enumerate(array.shards):
                check(replace(metadata, part="shard", index=index), partial(files.read, index, entry))
            num_shards += len(array.shards)
    return num_shards, damage
