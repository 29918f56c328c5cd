"""A small cache of composed queries without any encoder: photos show a shape in a colour, a text names a new colour."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from synthetic_cache import TEXT_WIDTH, TOKENS, WIDTH, write_encoder

from saffe_cache.core.items import Item, QueryOf
from saffe_cache.store.parts import write_table
from saffe_cache.store.root import RootManifest, write_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import TableBuilder

SHAPES, COLOURS = 4, 5


def make_composed(
    path: Path,
    splits: dict[str, int],
    *,
    captions: bool = False,
    members: bool = False,
    groups: bool = False,
    deep: bool = True,
    seed: int = 0,
) -> str:
    """Write a cache, finished, with layers 1 to 3 of a photo encoder and of a text encoder.

    A query is a photo and "in colour K"; its targets are the photos of the same shape in that colour.

    Args:
        splits: photos of each; each has one query, which asks for another colour.
        captions: each photo has one, which names its shape and colour.
        members: each query has a subset of six photos: its reference, a target and others.
        groups: each query searches the photos of its own shape alone.
    """
    generator = np.random.default_rng(seed)
    shapes, colours = generator.normal(size=(SHAPES, TEXT_WIDTH)), generator.normal(size=(COLOURS, TEXT_WIDTH))
    builder, shown, told = TableBuilder(None, ("a {}",)), [], {}
    for split, count in splits.items():
        codes = [(number % SHAPES, number // SHAPES % COLOURS) for number in range(count)]
        for number, (shape, colour) in enumerate(codes):
            text = f"shape {shape} in colour {colour}"
            told[text] = shapes[shape] + colours[colour]
            shown.append(shapes[shape] + colours[colour])
            builder.add(
                Item(
                    id=f"{split}/{number}",
                    split=split,
                    hashes={"image": hashlib.sha256(f"{split}/{number}".encode()).digest()},
                    captions=(text,) if captions else (),
                    labels=(f"shape {shape}",) if groups else (),
                )
            )
        for number, (shape, colour) in enumerate(codes):
            asked = (colour + 1 + number % (COLOURS - 1)) % COLOURS
            targets = [other for other, code in enumerate(codes) if code == (shape, asked)]
            others = [other for other in range(count) if other not in (*targets, number)][:4]
            texts = f"in colour {asked}", f"with colour {asked}"
            told |= {text: colours[asked] + 0.05 * generator.normal(size=TEXT_WIDTH) for text in texts}
            query = QueryOf(
                f"{split}/{number}",
                tuple(f"{split}/{other}" for other in targets),
                tuple(f"{split}/{other}" for other in (number, targets[0], *others)) if members else (),
            )
            labels = (f"shape {shape}",) if groups else ()
            builder.add(Item(id=f"{split}/q{number}", split=split, captions=texts, labels=labels, query=query))
    table = builder.build()
    known = table.inputs["text"].texts
    assert known is not None
    plain = np.zeros(TEXT_WIDTH)
    vectors = np.stack([told.get(text, plain) for text in known]) + 0.05 * generator.normal(
        size=(len(known), TEXT_WIDTH)
    )
    tokens = generator.normal(size=(len(shown), TOKENS, WIDTH))
    tokens[:, 1] += 3 * np.stack(shown) @ generator.normal(size=(TEXT_WIDTH, WIDTH))
    storage = Storage(path)
    layers = (1, 2, 3) if deep else (2, 3)
    images = {f"hidden_states/{layer}": tokens * (1 + layer / 10) for layer in layers}
    words = {f"hidden_states/{layer}": np.repeat(vectors, 2, axis=0) for layer in layers}
    offsets = 2 * np.arange(len(known) + 1)
    keys = [
        write_encoder(storage, "image", images | {"pooled": tokens.mean(axis=1)}, len(tokens), WIDTH, generator, 32),
        write_encoder(
            storage, "text", words | {"pooled": vectors, "offsets": offsets}, len(known), TEXT_WIDTH, generator, 32
        ),
    ]
    write_root(storage, RootManifest(write_table(storage, table), tuple(keys)))
    return str(path)
