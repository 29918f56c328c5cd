"""A small cache without any encoder: photos' tokens and texts' vectors drawn so that one tells of the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from saffe_cache.core.features import BlockSpec, BlockWeights, Fingerprint, Modality
from saffe_cache.core.items import Item
from saffe_cache.store.dtypes import to_storage
from saffe_cache.store.layout import ArraySpec
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.parts import write_table
from saffe_cache.store.root import RootManifest, write_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import TableBuilder
from saffe_cache.store.writer import EncoderWriter, Portion, write_blocks

TOKENS, WIDTH, TEXT_WIDTH, LAYERS = 5, 16, 12, 3


def make_cache(
    path: Path,
    splits: dict[str, int],
    *,
    classes: int = 0,
    captions: int = 2,
    signal: float = 1.0,
    seed: int = 0,
    shared: int = 0,
    text_width: int = TEXT_WIDTH,
    joint: bool = False,
    width: int = WIDTH,
    deep: bool = False,
    feature_maps: bool = False,
    labels: Callable[[str, int], Sequence[int]] | None = None,
    shard_rows: int = 32,
    views: Sequence[str] = (),
) -> str:
    """Write a cache, finished, with layers 2 and 3 of a photo encoder and of a text encoder.

    Args:
        splits: number of items of each.
        classes: > 0 gives each item one class instead of captions.
        captions: texts of each item.
        signal: how much of the tokens' second one tells of the text; 0 for none.
        shared: this many photos of the first split are in the last one too.
        joint: the captions after the first tell of it and of the photo, half each, and the photo nothing of the first:
            beside its first caption a photo is found by both together.
        width: of the photos' tokens.
        deep: with layer 1 and its block, too.
        labels: the classes of an item, by its split and number, if not one after another.
        feature_maps: photos' tokens are places of a CNN's feature maps, and have no blocks.
        shard_rows: of every array; more for a large cache.
        views: of the photos, besides the plain ones: their numbers times 1.1, 1.2 and so on.
    """
    generator = np.random.default_rng(seed)
    builder = TableBuilder(None, ("a {}",))
    for split, count in splits.items():
        for number in range(count):
            name = f"{split}/{number}"
            is_copy = split == list(splits)[-1] and number < shared
            photo = f"{next(iter(splits))}/{number}" if is_copy else name
            own = labels(split, number) if labels else [number % classes] if classes else []
            builder.add(
                Item(
                    id=name,
                    split=split,
                    hashes={"image": hashlib.sha256(photo.encode()).digest()},
                    captions=() if classes else tuple(f"caption {i} of {name}" for i in range(captions)),
                    labels=tuple(f"class{label}" for label in own),
                )
            )
    table = builder.build()
    hidden = generator.normal(size=(text_width, width))
    num_texts = len(table.inputs["text"])
    texts = generator.normal(size=(num_texts, text_width))
    of_photo = np.zeros((len(table.inputs["image"]), text_width))
    for item in range(len(table)):
        rows = table.captions[item] if not classes else table.class_texts[int(table.labels[item][0])]
        first = texts[rows[0]]
        told = generator.normal(size=text_width) if joint else first
        of_photo[table.rows["image"][item]] = told
        shown = (first + told) / np.sqrt(2) if joint else first
        texts[rows[1:]] = shown + 0.1 * generator.normal(size=(len(rows) - 1, text_width))
    tokens = generator.normal(size=(len(of_photo), TOKENS, width))
    tokens[:, 1] += signal * 2 * of_photo @ hidden
    storage = Storage(path)
    images = {"hidden_states/2": tokens, "hidden_states/3": tokens * 1.1, "pooled": tokens.mean(axis=1)}
    lengths = 2 + np.arange(num_texts) % 3
    flat = np.repeat(texts, lengths, axis=0) + 0.1 * generator.normal(size=(lengths.sum(), text_width))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    words = {"hidden_states/2": flat, "hidden_states/3": flat, "pooled": texts, "offsets": offsets}
    if deep:
        images, words = {"hidden_states/1": tokens * 0.9} | images, {"hidden_states/1": flat * 0.9} | words
    plain = list(images.items())
    images |= {
        f"views/{view}/{name}": values * (1 + number / 10)
        for number, view in enumerate(views, start=1)
        for name, values in plain
    }
    keys = [
        write_encoder(storage, "image", images, len(of_photo), width, generator, shard_rows, feature_maps),
        write_encoder(storage, "text", words, num_texts, text_width, generator, shard_rows),
    ]
    write_root(storage, RootManifest(write_table(storage, table), tuple(keys)))
    return str(path)


def write_encoder(
    storage: Storage,
    modality: Modality,
    arrays: dict[str, np.ndarray],
    count: int,
    width: int,
    generator: np.random.Generator,
    shard_rows: int,
    feature_maps: bool = False,
) -> str:
    manifest = EncoderManifest(
        fingerprint=Fingerprint({"modality": modality, "model_id": f"synthetic-{modality}"}),
        modality=modality,
        num_layers=LAYERS,
        hidden_size=width,
        vector="pooled",
        has_feature_maps=feature_maps,
    )
    targets, portion = {}, {}
    for name, values in arrays.items():
        dtype = "int64" if name == "offsets" else "float32"
        names = tuple(f"axis{axis}" for axis in range(values.ndim))
        spec = ArraySpec(
            row_shape=values.shape[1:], dtype=dtype, chunk_rows=4, shard_rows=shard_rows, dimension_names=names
        )
        targets[name] = (spec, len(values))
        portion[name] = (0, to_storage(values.astype(np.float32) if dtype == "float32" else values, dtype))
    with EncoderWriter(storage, manifest, targets) as writer:
        writer.put(Portion(portion))
        writer.finish(count)
    blocks = [layer for layer in (1, 2) if f"hidden_states/{layer}" in arrays and not feature_maps]
    write_blocks(storage, manifest.key, {layer: _block(width, generator) for layer in blocks})
    return manifest.key


def _block(width: int, generator: np.random.Generator) -> BlockWeights:
    def draw(*shape: int) -> np.ndarray:
        return (generator.normal(size=shape) / np.sqrt(width)).astype(np.float32)

    tensors = {}
    for role in ("query", "key", "value", "output"):
        tensors[f"{role}_weight"], tensors[f"{role}_bias"] = draw(width, width), draw(width)
    tensors["mlp_in_weight"], tensors["mlp_in_bias"] = draw(2 * width, width), draw(2 * width)
    tensors["mlp_out_weight"], tensors["mlp_out_bias"] = draw(width, 2 * width), draw(width)
    for norm in ("attention_norm", "mlp_norm"):
        tensors[f"{norm}_weight"], tensors[f"{norm}_bias"] = np.ones(width, np.float32), np.zeros(width, np.float32)
    spec = BlockSpec(num_attention_heads=4, norm_first=True, activation="gelu", layer_norm_eps=1e-6)
    return BlockWeights(spec, tensors)
