"""How far the encoders of a cache agree, layer by layer, and which fusion that speaks for. Nothing is trained but maps.

alignment.json     measures of all pairs of layers, maps of the chosen ones, the advice; written last
pairs.csv          one line for each pair and measure
table.txt          for people
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from saffe_cache.core.atomic_io import hold_folder, remove_partial_files, write_whole
from saffe_cache.core.features import MODALITIES, CacheError, Ragged
from saffe_cache.core.options import require, require_keys, require_seed
from saffe_cache.core.outputs import provenance, write_json
from saffe_cache.fusion.pooling import NormedTokens, mean_weights
from saffe_cache.inputs.pairs import gallery_modality, pair_kind, select_pairs
from saffe_cache.inputs.spec import PairKind
from saffe_cache.retrieval.baselines import unit_rows
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.studies.alignment.advice import STANDING, advise
from saffe_cache.studies.alignment.best_layer import TokenStates, best_layer, look_closer
from saffe_cache.studies.alignment.measuring import OWN, Options, Vectors, measure
from saffe_cache.studies.alignment.table import format_alignment
from saffe_cache.studies.alignment.tokens import normed

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Measure how far a cache's encoders agree, for every pair of layers, and advise a fusion.

    No FAM is trained: it takes a minute or two on a processor.
    """

    cache: str
    """The cache, as saffe-extract wrote it."""
    out: str
    """Folder for alignment.json, pairs.csv and table.txt."""
    split: str = "train"
    """Split whose photos are used; those that stand in another split too are left out."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers to compare, as image=11,12. Default: all. The encoders' own vectors are always compared."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder, as image=PART-OF-KEY, where the cache has several of a modality."""
    pairs: Literal["auto", "captions", "classes"] = "auto"
    """What describes an item: one of its captions, drawn at random, or its class. auto: captions where
    there are any."""
    max_photos: int = 1000
    """Photos that are judged, at most half of those there are. Shared neighbours shrink as they grow: compare results
    of equal numbers alone."""
    map_photos: int = 4000
    """Other photos, at most, that the maps of the layer that is looked at closer are fitted on; all other fits take as
    many of them as are judged."""
    neighbours: int = 10
    """Nearest photos that are compared; an even number."""
    components: int = 20
    """Principal components that SVCCA keeps, at most."""
    permutations: int = 20
    """Of pairs, for the null."""
    half_samples: int = 40
    """Random halves of the photos, for the intervals of CKA and shared neighbours."""
    seed: int = 0
    """Of photos, captions, permutations, halves and the MLP."""

    def __post_init__(self) -> None:
        require_keys("layers", self.layers, MODALITIES)
        require_keys("encoder", self.encoder, MODALITIES)
        require(self.neighbours > 0 and self.neighbours % 2 == 0, "neighbours", self.neighbours, "an even number")
        least = 4 * self.neighbours
        for option in ("max_photos", "map_photos"):
            require(
                getattr(self, option) >= least, option, getattr(self, option), f"{least} or more: 4 times --neighbours"
            )
        require(self.components > 0, "components", self.components, "a number above 0")
        for option in ("permutations", "half_samples"):
            require(getattr(self, option) > 1, option, getattr(self, option), "2 or more")
        require_seed("seed", self.seed)


def align(config: AlignConfig) -> str:
    """Measure, and return the output folder.

    Raises:
        CacheError, ValueError: cache, split and options do not go together, or there are too few photos.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    started = time.perf_counter()
    cache = open_cache(config.cache)
    modality = gallery_modality(cache)
    encoders = cache.encoder(modality, config.encoder.get(modality)), cache.encoder("text", config.encoder.get("text"))
    kind: PairKind = pair_kind(cache.table) if config.pairs == "auto" else config.pairs
    layers = _layers(config, encoders[0]), _layers(config, encoders[1])
    sample = _draw(config, cache, *encoders, kind)
    out = Path(config.out)
    with hold_folder(out):
        remove_partial_files(out)
        result = _result(config, encoders, layers, sample) | {
            "seconds": round(time.perf_counter() - started, 1),
            **provenance(config),
        }
        write_whole(out / "pairs.csv", _as_csv(result))
        write_whole(out / "table.txt", f"{format_alignment(result)}\n".encode())
        write_json(out / "alignment.json", result)
    return str(out)


def read_table(out: str) -> str:
    """The result for people."""
    return (Path(out) / "table.txt").read_text()


@dataclass(frozen=True)
class _Sample:
    """Which photos, and the text of each: those that are judged first."""

    kind: PairKind
    photos: np.ndarray
    """int64 [photos]: rows in their encoder's arrays."""
    texts: Ragged
    """Text rows of each distinct text: one caption, or the prompts of a class."""
    text_of: np.ndarray
    """int64 [photos]: which of the texts."""
    num_judged: int


def _result(
    config: AlignConfig,
    encoders: tuple[EncoderCache, EncoderCache],
    layers: tuple[list[int], list[int]],
    sample: _Sample,
) -> dict[str, Any]:
    vectors = _vectors(encoders, layers, sample)
    options = Options(**{one.name: getattr(config, one.name) for one in fields(Options)})
    measures, absent = measure(vectors, options)
    tokens = _tokens(encoders, (int(best_layer(vectors)), layers[1][-1]), sample, vectors.num_texts)
    closer, evidence = look_closer(vectors, tokens, options)
    return {
        "title": Path(config.cache).stem,
        "split": config.split,
        "pairs": sample.kind,
        "encoders": {"gallery": encoders[0].key, "text": encoders[1].key},
        "photos": {"judged": sample.num_judged, "fitted": len(vectors.fitted), "fitted_closer": len(vectors.others)},
        "num_texts": len(sample.texts),
        "gallery_layers": list(vectors.photos),
        "text_layers": list(vectors.texts),
        "measures": measures,
        "absent": absent,
        "closer": closer,
        "advice": [asdict(one) for one in advise(evidence, has_texts_beside=vectors.has_captions)],
        "standing": STANDING,
        "evidence": asdict(evidence),
    }


def _draw(config: AlignConfig, cache: Cache, gallery: EncoderCache, text: EncoderCache, kind: PairKind) -> _Sample:
    """Photos in random order, each once, with a caption that no other of them has, or with their one class.

    Raises:
        ValueError: there are too few.
    """
    pairs = select_pairs(cache.table, gallery, text, config.split, kind)
    rows = cache.table.rows[gallery.manifest.modality]
    elsewhere = rows[np.array(cache.table.splits) != config.split]
    generator = np.random.default_rng(config.seed)
    order = generator.permutation(np.flatnonzero(~np.isin(pairs.rows, elsewhere)))
    if kind == "captions":
        texts = np.array([generator.choice(pairs.texts[int(i)]) for i in order], np.int64)
        _, first = np.unique(texts, return_index=True)
        order, texts = order[np.sort(first)], texts[np.sort(first)]
    else:
        order = order[np.diff(pairs.labels.offsets)[order] == 1]
    num_judged, least = min(config.max_photos, len(order) // 2), 4 * config.neighbours
    if num_judged < least:
        raise ValueError(
            f"{config.cache}, split {config.split!r}: {len(order)} photos with {kind} of their own, expected "
            f"{2 * least} or more: as many to fit on as to judge, and 4 times --neighbours. Use more data."
        )
    order = order[: num_judged + config.map_photos]
    if kind == "captions":
        distinct, text_of = Ragged.from_rows([row] for row in texts[: len(order)]), np.arange(len(order))
    else:
        classes, text_of = np.unique(pairs.labels.values[pairs.labels.offsets[order]], return_inverse=True)
        require(len(classes) > 1, "pairs", f"photos of {len(classes)} class", "two or more")
        distinct = Ragged.from_rows(cache.table.class_texts[int(label)] for label in classes)
    return _Sample(kind, pairs.rows[order], distinct, text_of, num_judged)


def _vectors(
    encoders: tuple[EncoderCache, EncoderCache], layers: tuple[list[int], list[int]], sample: _Sample
) -> Vectors:
    gallery, text = encoders
    photos = {str(layer): _means(gallery, sample.photos, layer) for layer in layers[0]}
    if gallery.manifest.vector in gallery.manifest.arrays:
        photos[OWN] = gallery.vectors(sample.photos)
    flat, starts = sample.texts.values, sample.texts.offsets[:-1]
    read = {str(layer): _means(text, flat, layer) for layer in layers[1]} | {OWN: text.vectors(flat)}
    return Vectors(
        photos=photos,
        texts={name: unit_rows(np.add.reduceat(unit_rows(of), starts, axis=0)) for name, of in read.items()},
        text_of=sample.text_of,
        num_judged=sample.num_judged,
        has_captions=sample.kind == "captions",
    )


def _layers(config: AlignConfig, encoder: EncoderCache) -> list[int]:
    """
    Raises:
        CacheError: the cache lacks one that is asked for.
    """
    modality = encoder.manifest.modality
    wanted = config.layers.get(modality, tuple(encoder.layers))
    missing = [layer for layer in wanted if layer not in encoder.layers]
    if missing or not wanted:
        raise CacheError(
            f"{encoder.key}: it has layers {encoder.layers}, asked for {list(wanted)}. Add layers with saffe-extract "
            f"--layers {modality}=…."
        )
    return sorted(set(wanted))


def _means(encoder: EncoderCache, rows: np.ndarray, layer: int) -> np.ndarray:
    """Mean over all tokens, each normed, float32 [n, d]."""
    parts = []
    for start in range(0, len(rows), _BATCH):
        tokens = encoder.tokens(rows[start : start + _BATCH], (layer,))
        state = torch.from_numpy(tokens.states[0]).float()
        mask = None if tokens.mask is None else torch.from_numpy(tokens.mask)
        parts.append(NormedTokens(state).sums(mean_weights(state, mask))[:, 0].numpy())
    return np.concatenate(parts)


def _tokens(
    encoders: tuple[EncoderCache, EncoderCache], layers: tuple[int, int], sample: _Sample, num_texts: int
) -> TokenStates:
    """Of a class those of its first prompt."""
    gallery, text = encoders

    def photos() -> Iterator[torch.Tensor]:
        for start in range(0, sample.num_judged, _BATCH):
            rows = sample.photos[start : min(start + _BATCH, sample.num_judged)]
            yield normed(torch.from_numpy(gallery.tokens(rows, layers[:1]).states[0]))

    texts = text.tokens(sample.texts.values[sample.texts.offsets[:num_texts]], layers[1:])
    assert texts.mask is not None
    return TokenStates(
        gallery_layer=str(layers[0]),
        photos=photos(),
        text_layer=str(layers[1]),
        texts=[normed(torch.from_numpy(one[mask])) for one, mask in zip(texts.states[0], texts.mask, strict=True)],
    )


def _as_csv(result: Mapping[str, Any]) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = ("value", "low", "high", "null_mean", "null_high")
    writer.writerow(["gallery_layer", "text_layer", "measure", *columns, "chance"])
    for name, of in result["measures"].items():
        for row, layer in enumerate(result["gallery_layers"]):
            for column, text_layer in enumerate(result["text_layers"]):
                values = [of[one][row][column] for one in columns]
                if values[0] is not None:
                    writer.writerow([layer, text_layer, name, *values, of["chance"]])
    return file.getvalue().encode()
