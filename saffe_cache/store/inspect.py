"""What a cache holds, for people."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from saffe_cache.core.features import ItemTable, printable
from saffe_cache.store.reader import Cache, EncoderCache, open_cache

_NUM_EXAMPLES = 3
_NUM_CLASSES = 10


def describe_cache(path: str | Path) -> str:
    """Items, splits, classes, encoders with their arrays, and a few items, as text."""
    cache = open_cache(path)
    table = cache.table
    lines = [f"{path}: {len(table)} items"]
    for split, count in sorted(Counter(table.splits).items()):
        unusable = sum(bool(table.problems[i]) for i in table.in_split(split))
        lines.append(f"  split {split}: {count} items, {unusable} unreadable")
    if table.class_names:
        shown = [*table.class_names[:_NUM_CLASSES], *(["…"] if len(table.class_names) > _NUM_CLASSES else [])]
        lines.append(f"  {len(table.class_names)} classes: {', '.join(shown)}")
    for modality, inputs in table.inputs.items():
        lines.append(f"  {len(inputs)} distinct {modality} inputs")
    for encoder in cache.encoders.values():
        lines += _describe_encoder(encoder)
    return "\n".join(map(printable, [*lines, *_describe_items(cache)]))


def _describe_encoder(encoder: EncoderCache) -> list[str]:
    manifest = encoder.manifest
    fields = manifest.fingerprint.fields
    state = f"{manifest.finished_rows} inputs" if manifest.finished_rows else "UNFINISHED"
    lines = [
        f"{manifest.key}: {manifest.num_layers} layers of width {manifest.hidden_size}, {state}, "
        f"{len(manifest.invalid)} unreadable",
        f"  model {fields.get('model_id')}, revision {fields.get('revision')}, {fields.get('dtype')}",
    ]
    if manifest.has_feature_maps:
        lines.append("  feature maps: tokens are places, row by row, and there are no blocks")
    if manifest.is_language_model:
        lines.append(f"  a language model, texts from position {fields.get('position_offset')} on, all blocks")
    for name, array in sorted(manifest.arrays.items()):
        shape = " x ".join(map(str, (array.rows, *array.spec.row_shape)))
        megabytes = array.rows * array.spec.row_bytes / 1e6
        line = f"  {name}: {shape} {array.spec.described}, {len(array.shards)} shards, {megabytes:.1f} MB"
        if array.spec.dtype != "int64":
            found = encoder.statistics(name)
            line += f", mean {found.mean:.4g}, std {found.std:.4g}, max |x| {found.max_magnitude:.4g}"
        lines.append(line)
    for row, reason in list(manifest.invalid.items())[:_NUM_EXAMPLES]:
        lines.append(f"  unreadable input {row}: {reason}")
    return lines


def _describe_items(cache: Cache) -> list[str]:
    table: ItemTable = cache.table
    texts = table.inputs["text"].texts if "text" in table.inputs else ()
    lines = []
    for item in np.linspace(0, len(table) - 1, min(_NUM_EXAMPLES, len(table)), dtype=int):
        problem = f": {table.problems[item]}" if table.problems[item] else ""
        lines.append(f"item {table.ids[item]!r} ({table.splits[item]}){problem}")
        lines += [f"  class {table.class_names[int(label)]!r}" for label in table.labels[int(item)]]
        lines += [f"  caption {texts[int(row)]!r}" for row in table.captions[int(item)]] if texts else []
    return lines
