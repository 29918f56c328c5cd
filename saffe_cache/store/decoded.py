"""A cache's numbers as plain float16 or float32, for programs that know neither the cache nor its storage types.

| format | what is written |
|---|---|
| `zarr` | a Zarr v3 group of uncompressed arrays |
| `hdf5` | the same arrays in one HDF5 file |
| `safetensors` | a folder with one file for each input of each encoder, as trainers of draft models read it |

Hidden states are float16. A layer with a magnitude beyond float16's 65,504 is float32, and a message names it. Vectors
are float32 as in the cache. Weights of blocks are not written. No cache can be made from such an export.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from safetensors.numpy import save_file
from tqdm import tqdm

from saffe_cache.core.features import CacheError
from saffe_cache.store.config import ExportConfig
from saffe_cache.store.layout import encoder_group
from saffe_cache.store.parts import table_to_arrays
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.store.rows import RowReader

logger = logging.getLogger(__name__)

VERSION = 1
_LARGEST = float(np.finfo(np.float16).max)
_BLOCK_BYTES = 2**24
"""Bytes that are read at once, and of a Zarr chunk."""

TokenIds = Callable[[Cache, EncoderCache], Sequence[Sequence[int]] | None]
"""Token ids of each finished text of an encoder; None where they are unknown."""


@dataclass(frozen=True)
class _Side:
    """What is written of one encoder."""

    encoder: EncoderCache
    num_inputs: int
    types: Mapping[str, str]
    """The type of each array, by its name."""
    token_ids: Sequence[Sequence[int]] | None

    @property
    def num_rows(self) -> int:
        """Rows of the arrays of hidden states."""
        return int(self.encoder.offsets[self.num_inputs]) if self.encoder.manifest.is_ragged else self.num_inputs

    @property
    def num_bytes(self) -> int:
        arrays = ((self.encoder.array(name), dtype) for name, dtype in self.types.items())
        return sum(len(array) * int(np.prod(array.spec.row_shape)) * np.dtype(of).itemsize for array, of in arrays)

    def attributes(self) -> dict[str, Any]:
        """What a reader needs to know."""
        manifest = self.encoder.manifest
        return {
            "modality": manifest.modality,
            "model_id": str(manifest.fingerprint.fields["model_id"]),
            "num_layers": manifest.num_layers,
            "hidden_size": manifest.hidden_size,
            "vector": manifest.vector,
            "types": dict(self.types),
            "unusable": {str(row): why for row, why in manifest.invalid.items() if row < self.num_inputs},
        }


def export_decoded(config: ExportConfig, token_ids: TokenIds) -> str:
    """Write the export, complete or not at all, and return its path.

    Raises:
        CacheError: a part of the cache is missing, unfinished or damaged.
        OSError: the target exists, or cannot be written.
    """
    cache, target, partial = open_cache(config.cache), Path(config.file), Path(f"{config.file}.partial")
    if target.exists():
        raise FileExistsError(f"{target}: this exists. Choose another name.")
    unfinished = [key for key, encoder in cache.encoders.items() if not encoder.manifest.finished_rows]
    if unfinished:
        raise CacheError(f"{config.cache}: {unfinished[0]} is unfinished. Run saffe extract again, then export.")
    for key, encoder in cache.encoders.items():
        finished, total = encoder.manifest.finished_rows, len(cache.table.inputs[encoder.manifest.modality])
        if finished < total:
            logger.warning("%s: %d of %d inputs are encoded; the others are left out.", key, finished, total)
    sides = [_side(cache, encoder, token_ids) for encoder in cache.encoders.values()]
    logger.info("%s: %.1f MB of hidden states and vectors.", target, sum(side.num_bytes for side in sides) / 1e6)
    _remove(partial)
    try:
        with tqdm(total=sum(side.num_bytes for side in sides), unit="B", unit_scale=True, desc=target.name) as progress:
            if config.format == "safetensors":
                _write_files(cache, sides, partial, progress)
            else:
                _write_arrays(cache, sides, partial, progress, is_zarr=config.format == "zarr")
        _sync(partial)
        partial.rename(target)
    finally:
        _remove(partial)
    return str(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Bring all files to the disk: at once where the system can, which is quicker for many small ones."""
    if hasattr(os, "sync"):
        os.sync()
        return
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            with file.open("r+b") as written:
                os.fsync(written.fileno())


def _side(cache: Cache, encoder: EncoderCache, token_ids: TokenIds) -> _Side:
    names = [f"hidden_states/{layer}" for layer in encoder.layers]
    types = {name: _type_of(encoder, name) for name in names}
    vectors = [name for name in ("pooled", "projected") if name in encoder.manifest.arrays]
    types |= dict.fromkeys(vectors, "float32")
    return _Side(encoder, encoder.manifest.finished_rows, types, token_ids(cache, encoder))


def _type_of(encoder: EncoderCache, name: str) -> str:
    """float16, or float32 if a finite number is beyond its range, which is reported."""
    array = encoder.array(name)
    if array.spec.dtype == "float16":
        return "float16"
    largest = 0.0
    for start, stop in _blocks(array, len(array)):
        rows = array.read_range(start, stop)
        largest = max(largest, float(np.abs(rows, where=np.isfinite(rows), out=np.zeros_like(rows)).max(initial=0)))
    if largest <= _LARGEST:
        return "float16"
    logger.warning("%s: %s is written as float32: %.6g exceeds float16's 65,504.", encoder.key, name, largest)
    return "float32"


def _blocks(array: RowReader, num_rows: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK_BYTES // (4 * int(np.prod(array.spec.row_shape))))
    return ((start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _write_arrays(cache: Cache, sides: Sequence[_Side], path: Path, progress: Any, *, is_zarr: bool) -> None:
    """As arrays of a Zarr group or of an HDF5 file, which have the same methods."""
    with _opened(path, is_zarr) as root:
        about = {"version": VERSION, "encoders": [side.encoder.key for side in sides]}
        root.attrs["saffe_cache_decoded"] = about if is_zarr else json.dumps(about)
        for name, values in table_to_arrays(cache.table).items():
            _put(root, f"items/{name}", values, is_zarr)
        for side in sides:
            group = root.require_group(encoder_group(side.encoder.key))
            attributes = side.attributes()
            group.attrs["saffe_cache_decoded"] = attributes if is_zarr else json.dumps(attributes)
            _put(group, "usable", side.encoder.usable(np.arange(side.num_inputs)), is_zarr)
            if side.encoder.manifest.is_ragged:
                _put(group, "offsets", side.encoder.offsets[: side.num_inputs + 1], is_zarr)
            if side.token_ids is not None:
                _put(group, "input_ids", np.concatenate([[], *side.token_ids]).astype(np.int64), is_zarr)
            for name, dtype in side.types.items():
                _copy(group, side, name, dtype, progress, is_zarr)


@contextmanager
def _opened(path: Path, is_zarr: bool) -> Iterator[Any]:
    if is_zarr:
        yield zarr.create_group(path)
        return
    with h5py.File(path, "w") as file:
        yield file


def _put(group: Any, name: str, values: np.ndarray, is_zarr: bool) -> None:
    _create(group, name, values.shape, values.dtype.name, is_zarr)[...] = values


def _create(group: Any, name: str, shape: tuple[int, ...], dtype: str, is_zarr: bool) -> Any:
    if not is_zarr:
        return group.create_dataset(name, shape=shape, dtype=dtype)
    parent, _, last = name.rpartition("/")
    within = group.require_group(parent) if parent else group
    row_bytes = max(1, int(np.prod(shape[1:])) * np.dtype(dtype).itemsize)
    chunks = (max(1, min(shape[0], _BLOCK_BYTES // row_bytes)), *(max(1, length) for length in shape[1:]))
    return within.create_array(last, shape=shape, dtype=dtype, chunks=chunks, compressors=None)


def _copy(group: Any, side: _Side, name: str, dtype: str, progress: Any, is_zarr: bool) -> None:
    array = side.encoder.array(name)
    num_rows = side.num_rows if name.startswith("hidden_states/") else side.num_inputs
    target = _create(group, name, (num_rows, *array.spec.row_shape), dtype, is_zarr)
    for start, stop in _blocks(array, num_rows):
        rows = array.read_range(start, stop).astype(dtype)
        target[start:stop] = rows
        progress.update(rows.nbytes)


def _write_files(cache: Cache, sides: Sequence[_Side], path: Path, progress: Any) -> None:
    """One safetensors file for each usable input, and JSON Lines that say which item has which."""
    path.mkdir(parents=True)
    about = {"version": VERSION, "encoders": {side.encoder.key: side.attributes() for side in sides}}
    (path / "export.json").write_text(json.dumps(about, indent=2) + "\n")
    _write_lines(path / "items.jsonl", _items(cache))
    texts = cache.table.inputs["text"].texts if "text" in cache.table.inputs else None
    _write_lines(path / "texts.jsonl", ({"row": row, "text": text} for row, text in enumerate(texts or ())))
    for side in sides:
        folder = path / side.encoder.key
        folder.mkdir()
        for row in np.flatnonzero(side.encoder.usable(np.arange(side.num_inputs))):
            tensors = _tensors(side, int(row))
            metadata = {"encoder": side.encoder.key, "row": str(row)}
            save_file(tensors, folder / f"{row:08d}.safetensors", metadata)
            progress.update(sum(values.nbytes for values in tensors.values()))


def _tensors(side: _Side, row: int) -> dict[str, np.ndarray]:
    """Of one input; nothing is padded, so that the mask, of encoders whose inputs differ in length, is all ones."""
    encoder, rows, found = side.encoder, np.array([row]), {}
    for name, dtype in side.types.items():
        if name.startswith("hidden_states/"):
            tokens = encoder.tokens(rows, (int(name.partition("/")[2]),))
            states = tokens.states[0][0] if tokens.mask is None else tokens.states[0][0][tokens.mask[0]]
            found[name.replace("/", ".")] = np.ascontiguousarray(states, dtype)
            if tokens.mask is not None:
                found["attention_mask"] = np.ones(len(states), np.int64)
        else:
            found[name] = encoder.array(name).read(rows)[0].astype(dtype)
    if side.token_ids is not None:
        found["input_ids"] = np.array(side.token_ids[row], np.int64)
    return found


def _items(cache: Cache) -> Iterator[dict[str, Any]]:
    table = cache.table
    queries, ragged = table.queries, {"targets": table.targets, "members": table.members}
    for item, (name, split, problem) in enumerate(zip(table.ids, table.splits, table.problems, strict=True)):
        inputs: dict[str, int] = {modality: int(rows[item]) for modality, rows in table.rows.items() if rows[item] >= 0}
        classes = [table.class_names[label] for label in table.labels[item]]
        others: dict[str, Any] = {"captions": table.captions[item].tolist(), "classes": classes}
        if queries is not None and queries.references[item] >= 0:
            others["reference"] = table.ids[int(queries.references[item])]
            others |= {name: [*table.ids.take(rows[item])] for name, rows in ragged.items()}
        yield {"id": name, "split": split, **inputs, **others, **({"problem": problem} if problem else {})}


def _write_lines(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
