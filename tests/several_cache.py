"""A small cache of photos, sounds and texts without any encoder, where each photo and sound tells some of its text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from synthetic_cache import TEXT_WIDTH, write_encoder

from saffe_cache.core.features import Modality
from saffe_cache.core.items import Item
from saffe_cache.store.parts import write_table
from saffe_cache.store.root import RootManifest, write_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import TableBuilder

TOKENS: dict[Modality, int] = {"image": 5, "audio": 4}
WIDTHS: dict[Modality, int] = {"image": 16, "audio": 20}


def make_several_cache(
    path: Path,
    splits: dict[str, int],
    *,
    classes: int = 0,
    lacks: int = 0,
    strength: tuple[float, float] = (2.0, 0.2),
    seed: int = 0,
) -> str:
    """Write a cache, finished, with layers 2 and 3 of a photo, a sound and a text encoder.

    Args:
        splits: number of items of each.
        classes: > 0 gives each item one class instead of two captions.
        lacks: every so many items, one lacks its photo and the next one its sound; 0 for none.
        strength: how much the tokens tell of the text: the first of the photos of half of the items and the sounds of
            the other half, the second of the others.
    """
    generator = np.random.default_rng(seed)
    builder = TableBuilder(None, ("a {}",))
    for split, count in splits.items():
        for number in range(count):
            name = f"{split}/{number}"
            has = {"image": not lacks or number % lacks != 0, "audio": not lacks or number % lacks != 1}
            hashes: dict[Modality, bytes] = {
                kind: hashlib.sha256(f"{kind} of {name}".encode()).digest() for kind in TOKENS if has[kind]
            }
            captions = () if classes else (f"caption 0 of {name}", f"caption 1 of {name}")
            labels = (f"class{number % classes}",) if classes else ()
            builder.add(Item(id=name, split=split, hashes=hashes, captions=captions, labels=labels))
    table = builder.build()
    texts = generator.normal(size=(len(table.inputs["text"]), TEXT_WIDTH))
    if not classes:
        firsts = table.captions.values[table.captions.offsets[:-1]]
        texts[table.captions.values] = texts[firsts][table.captions.owners]
        texts = texts + 0.1 * generator.normal(size=texts.shape)
    described = [
        table.class_texts[int(table.labels[i][0])][0] if classes else table.captions[i][0] for i in range(len(table))
    ]
    storage = Storage(path)
    keys, is_first = [], generator.random(len(table)) < 0.5
    for place, modality in enumerate(TOKENS):
        width, count = WIDTHS[modality], len(table.inputs[modality])
        hidden = generator.normal(size=(TEXT_WIDTH, width))
        tokens = generator.normal(size=(count, TOKENS[modality], width))
        items = np.flatnonzero(table.rows[modality] >= 0)
        strengths = np.where(is_first == (place == 0), *strength)[items]
        tokens[table.rows[modality][items], 1] += strengths[:, None] * texts[np.array(described)[items]] @ hidden
        arrays = {"hidden_states/2": tokens, "hidden_states/3": tokens * 1.1, "pooled": tokens.mean(axis=1)}
        if modality == "audio":
            flat = {name: value.reshape(-1, width) for name, value in arrays.items() if name != "pooled"}
            arrays = {**flat, "pooled": arrays["pooled"], "offsets": np.arange(count + 1) * TOKENS[modality]}
        keys.append(write_encoder(storage, modality, arrays, count, width, generator, 32))
    offsets = np.arange(len(texts) + 1) * 2
    words = {"hidden_states/2": texts.repeat(2, axis=0), "hidden_states/3": texts.repeat(2, axis=0), "pooled": texts}
    keys.append(write_encoder(storage, "text", words | {"offsets": offsets}, len(texts), TEXT_WIDTH, generator, 32))
    write_root(storage, RootManifest(write_table(storage, table), tuple(keys)))
    return str(path)
