"""What the fuzzer calls: each parser of what comes from outside, and the use of what it lets in.

A target takes bytes and may raise only what the package promises for bad input. It keeps its files in memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import google_crc32c
import numpy as np
from fuzz_inputs import changed_bytes, changed_json
from served_index import BOUNDARY, form
from store_cases import (
    export_hdf5,
    image_contents,
    import_hdf5,
    make_spec,
    random_rows,
    text_contents,
    without_fsync,
    write_contents,
)
from synthetic_cache import make_cache

from saffe_cache.core import options
from saffe_cache.core.features import CacheError
from saffe_cache.core.items import ItemTable
from saffe_cache.inference.uploads import form_files
from saffe_cache.sources.folders import folder_items
from saffe_cache.sources.items import Columns
from saffe_cache.sources.queries import checked_queries, usable_queries
from saffe_cache.store import inspect
from saffe_cache.store.arrays import ArrayFiles
from saffe_cache.store.layout import ShardEntry, compress, decode_shard, describe_shard, encode_shard
from saffe_cache.store.manifest import read_encoder
from saffe_cache.store.parts import check_whole, read_table, table_to_arrays
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.store.root import RootManifest, read_root
from saffe_cache.store.storage import Storage, describe_group, group_metadata, read_group
from saffe_cache.store.table import TableBuilder

PROMISED = (CacheError, ValueError, OSError)
Change = Callable[[bytes, Random], bytes]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One parser."""

    call: Callable[[bytes], None]
    examples: Sequence[bytes]
    """Good inputs, to begin with."""
    change: Change


class MemoryStorage(Storage):
    """Files of a cache in a dictionary, whose names are checked as those on a disk are."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__("/fuzzed")
        self.files = dict(files)

    def exists(self, name: str) -> bool:
        self.local_path(name)
        return name in self.files

    def read(self, name: str) -> bytes:
        self.local_path(name)
        if name not in self.files:
            raise CacheError(f"{name} is missing")
        return self.files[name]

    read_buffer = read

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        self.local_path(name)
        self.files[name] = b"".join(parts)


def make_target(name: str, work: Path) -> Target:
    """`work` is an empty folder in memory."""
    with without_fsync():
        return _MAKERS[name](work)[name]


# ---- the store ----


def _store_targets(work: Path) -> dict[str, Target]:
    images, texts = image_contents(13), text_contents(13)
    write_contents(work / "cache", images, texts)
    files = {
        path.relative_to(work / "cache").as_posix(): path.read_bytes()
        for path in (work / "cache").rglob("*")
        if path.is_file()
    }
    keys = [f"encoders/{one.key}/zarr.json" for one in (images, texts)]
    pooled = f"encoders/{images.key}/pooled/zarr.json"
    block = f"encoders/{images.key}/blocks/1/zarr.json"
    table = open_cache(work / "cache").table

    def with_file(name: str, data: bytes) -> MemoryStorage:
        return MemoryStorage({**files, name: data})

    def root(data: bytes) -> None:
        storage = with_file("zarr.json", data)
        found = read_root(storage)
        assert found is not None
        for key in found.encoders[:3]:
            read_encoder(storage, key)
        for name in found.tables[:3]:
            storage.exists(f"tables/{name}/zarr.json")

    def manifest(data: bytes) -> None:
        one, name = (images, keys[0]) if b"tiny image" in data else (texts, keys[1])
        storage = with_file(name, data)
        encoder = EncoderCache(storage, read_encoder(storage, one.key))
        inspect._describe_encoder(encoder, table)
        encoder.manifest.to_json()
        encoder.usable(np.arange(-1, 20))
        for layer in encoder.block_layers:
            encoder.block(layer)
        if encoder.manifest.is_ragged:
            encoder.token_rows(np.arange(min(3, encoder.manifest.finished_rows)))

    def array(data: bytes) -> None:
        ArrayFiles(with_file(pooled, data), images.key, "pooled", images.arrays["pooled"][0]).check_metadata(13)

    def plain_group(data: bytes) -> None:
        EncoderCache(with_file(block, data), read_encoder(MemoryStorage(files), images.key)).block(1)

    return {
        "root": Target(call=root, examples=[files["zarr.json"]], change=changed_json),
        "manifest": Target(call=manifest, examples=[files[name] for name in keys], change=changed_json),
        "array zarr.json": Target(call=array, examples=[files[pooled]], change=changed_json),
        "block": Target(call=plain_group, examples=[files[block]], change=changed_json),
        "shard": _shard_target(),
        "item table": _table_target(table),
        "part of a table": _part_target(files),
    }


def _shard_target() -> Target:
    """The first byte chooses an array, and what is made good after the change: nothing, the index, or headers."""
    specs = [
        make_spec("float16", (2, 4), 2, 3),
        make_spec("float16", (2, 4), 2, 3, compression="zstd"),
        make_spec("int8", (5,), 4, 1, compression="zstd"),
    ]
    rows = [random_rows(spec, spec.shard_rows - 1, 0) for spec in specs]
    entries = [describe_shard(spec, of_spec) for spec, of_spec in zip(specs, rows, strict=True)]
    shards = [b"".join(encode_shard(spec, of_spec)) for spec, of_spec in zip(specs, rows, strict=True)]
    chunks = [compress(of_spec[: spec.chunk_rows]) for spec, of_spec in zip(specs, rows, strict=True)]

    def shard(data: bytes) -> None:
        kind, body = data[0] if data else 0, data[1:]
        spec, entry = specs[kind % 3], entries[kind % 3]
        if kind // 3 % 3 == 1 and len(body) >= spec.index_bytes:
            body = body[:-4] + struct.pack("<I", google_crc32c.value(body[-spec.index_bytes : -4]))
        elif kind // 3 % 3 == 2:
            size = struct.pack("<I", spec.chunk_bytes), struct.pack("<I", len(body))
            chunk = body[:4] + size[0] + body[8:12] + size[1] + body[16:]
            index = struct.pack("<QQ", 0, len(chunk)) + b"\xff" * 16 * (spec.shard_rows // spec.chunk_rows - 1)
            body = chunk + index + struct.pack("<I", google_crc32c.value(index))
            entry = ShardEntry(rows=1, crc32c=entry.crc32c)
        decode_shard(spec, entry, body, "shard")

    examples = [bytes([kind]) + data for kind, data in enumerate(shards)]
    examples += [bytes([3 + kind]) + data for kind, data in enumerate(shards)]
    examples += [bytes([6 + kind]) + data for kind, data in enumerate(chunks)]
    return Target(call=shard, examples=examples, change=changed_bytes)


def _use_table(storage: Storage, root: RootManifest) -> None:
    found = read_table(storage, root)
    check_whole(storage, root)
    TableBuilder(found, ("a {}",)).build()
    for split in found.splits.counts():
        found.in_split(split)
    cache = Cache.__new__(Cache)
    cache.table = found
    inspect._describe_items(cache)


def _part_target(files: Mapping[str, bytes]) -> Target:
    """Arrow files, the first byte chooses which; their checksums are true."""
    root = read_root(MemoryStorage(files))
    assert root is not None
    group, kinds = f"tables/{root.tables[0]}", ("items", "text", "image")
    attributes, arrays = read_group(MemoryStorage(files), group, "saffe-items", (2,))
    fields = {name: attributes[name] for name in ("encoding-version", "rows")}

    def part(data: bytes) -> None:
        kind = kinds[data[0] % 3 if data else 0]
        changed = {**arrays, kind: np.frombuffer(data[1:], np.uint8)}
        described = group_metadata({"saffe_cache": describe_group("saffe-items", changed, fields)})
        names = {f"{group}/zarr.json": described, f"{group}/{kind}/c/0": data[1:]}
        _use_table(MemoryStorage({**files, **names}), root)

    examples = [bytes([number]) + arrays[kind].tobytes() for number, kind in enumerate(kinds)]
    return Target(call=part, examples=examples, change=changed_bytes)


def _table_target(table: ItemTable) -> Target:
    """Columns as JSON; their checksums are true, so that what they say is looked at."""
    good = {
        name: {"dtype": values.dtype.name, "shape": list(values.shape), "values": values.reshape(-1).tolist()}
        for name, values in table_to_arrays(table).items()
    }

    def item_table(data: bytes) -> None:
        try:
            arrays = {
                name: np.array(one["values"], one["dtype"]).reshape(one["shape"])
                for name, one in json.loads(data).items()
            }
            names = [name for name, values in arrays.items() if values.dtype.name in ("float32", "int64", "uint8")]
            arrays = {name: arrays[name] for name in names}
        except Exception:  # no arrays that could be stored
            return
        stored = {
            f"tables/1/{name}/c" + "/0" * values.ndim: values.astype(values.dtype.newbyteorder("<")).tobytes()
            for name, values in arrays.items()
        }
        attributes = describe_group("saffe-items", arrays, {})
        storage = MemoryStorage({**stored, "tables/1/zarr.json": group_metadata({"saffe_cache": attributes})})
        _use_table(storage, RootManifest(("1",), (), 1))

    return Target(call=item_table, examples=[json.dumps(good).encode()], change=changed_json)


# ---- datasets ----


def _source_targets(work: Path) -> dict[str, Target]:
    split_dir, folders = work / "data" / "train", work / "classes"
    split_dir.mkdir(parents=True)
    (split_dir / "1.png").write_bytes(b"")
    entries = [
        {"file_name": "1.png", "captions": ["one", "two"]},
        {"file_name": "a/2.JPG", "label": "cat", "caption": "x"},
        {"file_name": "3.wav", "labels": ["a", 3]},
    ]
    lines = [json.dumps(entry).encode() for entry in entries]

    def metadata(data: bytes) -> None:
        (split_dir / "metadata.jsonl").write_bytes(data)
        for item in folder_items(str(split_dir.parent), Columns()):
            item.id.encode("utf-8", "surrogatepass")
            for media in item.media.values():
                with contextlib.suppress(OSError):
                    media.read()

    def class_folders(data: bytes) -> None:
        """File names, one a line: those of a disk may be any bytes but NUL and the slash."""
        made = []
        for name in data.split(b"\n")[:4]:
            path = os.fsencode(folders) + b"/train/" + b"/".join(name.replace(b"\0", b"").split(b"/")[-2:])
            with contextlib.suppress(OSError):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                made.append(path)
                with open(path, "xb"):
                    pass
        try:
            for item in folder_items(str(folders), Columns()):
                item.id.encode("utf-8", "surrogatepass")
        finally:
            for path in made:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                with contextlib.suppress(OSError):
                    os.removedirs(os.path.dirname(path))
            folders.mkdir(exist_ok=True)

    shop = work / "shop" / "train"
    shop.mkdir(parents=True)
    for name in ("1.png", "2.png", "3.png"):
        (shop / name).write_bytes(b"")
    queries = [
        {"reference": "1.png", "text": "in red", "targets": ["2.png", "train/3.png"], "id": "a"},
        {"reference": "2.png", "texts": ["x", "y"], "targets": "1.png", "members": ["3.png"], "group": "cat"},
    ]

    def composed(data: bytes) -> None:
        (shop / "queries.jsonl").write_bytes(data)
        builder = TableBuilder(None, ("{}",))
        for item in usable_queries(checked_queries(list(folder_items(str(shop.parent), Columns())))):
            builder.add(item)
        assert len(builder.build().in_split("train")) == 3

    folders.mkdir()
    return {
        "queries.jsonl": Target(
            call=composed, examples=[b"\n".join(json.dumps(query).encode() for query in queries)], change=_changed_line
        ),
        "metadata.jsonl": Target(call=metadata, examples=[*lines, b"\n".join(lines)], change=_changed_line),
        "class folders": Target(call=class_folders, examples=[b"cat/1.png\ndog/2.wav"], change=changed_bytes),
    }


def _changed_line(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    lines[place] = changed_json(lines[place], random)
    return b"\n".join(lines)


# ---- runs and options ----


def _run_targets(work: Path) -> dict[str, Target]:
    import torch

    from saffe_cache.core.outputs import provenance, write_json
    from saffe_cache.core.tensors import write_tensors
    from saffe_cache.training import runs
    from saffe_cache.training.config import TrainConfig
    from saffe_cache.training.loop import TrainingState, resume, save_state
    from saffe_cache.training.resolve import resolve_run
    from saffe_cache.training.result import TrainResult

    path = make_cache(work / "run.zarr", {"train": 12, "test": 6})
    opened, run = open_cache(path), work / "run"
    config = TrainConfig(cache=path, out=str(run), fusion="linear")
    spec = resolve_run(config, opened)
    model = runs.build_fusion(spec, opened)
    write_json(
        run / "config.json", {"stage": "train", "run": vars(spec) | {"shape": vars(spec.shape)}, **provenance(config)}
    )
    write_tensors(run / "model.safetensors", model.state_dict())
    counts = dict.fromkeys(("train_photos", "validation_photos", "unusable_items"), 5)
    counts |= dict.fromkeys(("steps", "photos_seen", "texts_seen", "photos_shared_with_other_splits"), 5)
    scores: dict[str, Any] = {"best_epoch": 1, "best_validation_score": 0.5, "validation_score": "mrr"}
    costs: dict[str, Any] = {"trainable_parameters": 5, "seconds": 1.0, "control_seconds": 0.0, "peak_memory_mb": 10}
    TrainResult(**counts, **scores, **costs, residency="memory").save(run)
    whole = {name: (run / name).read_bytes() for name in ("config.json", "model.safetensors", "result.json")}

    def with_file(name: str, build: Callable[..., Any] = runs.build_fusion) -> Callable[[bytes], None]:
        def load(data: bytes) -> None:
            (run / name).write_bytes(data)
            try:
                with patch.object(runs, "build_fusion", build):
                    runs.open_run(run, opened)
            finally:
                (run / name).write_bytes(whole[name])

        return load

    optimizer = torch.optim.AdamW(model.parameters())
    objective: Any = torch.nn.Linear(1, 1)
    save_state(run, TrainingState(model=model, objective=objective, optimizer=optimizer))
    state = (run / "state.safetensors").read_bytes()

    def resumed(data: bytes) -> None:
        (run / "state.safetensors").write_bytes(data)
        again = TrainingState(model=model, objective=objective, optimizer=optimizer)
        resume(run, again)

    return {
        "run config.json": Target(call=with_file("config.json"), examples=[whole["config.json"]], change=changed_json),
        "run result.json": Target(
            call=with_file("result.json", lambda *_: model), examples=[whole["result.json"]], change=changed_json
        ),
        "model.safetensors": Target(
            call=with_file("model.safetensors", lambda *_: model),
            examples=[whole["model.safetensors"]],
            change=_changed_header,
        ),
        "state.safetensors": Target(call=resumed, examples=[state], change=_changed_header),
    }


def _option_targets(work: Path) -> dict[str, Target]:
    from saffe_cache.evaluation.config import EvaluateConfig
    from saffe_cache.extraction.config import ExtractConfig
    from saffe_cache.training.config import TrainConfig

    read_once = cache(options.attribute_docstrings)

    def parse(config_class: type[Any], arguments: list[str]) -> None:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.suppress(SystemExit),
            patch.object(options, "attribute_docstrings", read_once),
        ):
            options.parse_config(config_class, arguments, "prog")

    def command_line(data: bytes) -> None:
        kind, *arguments = data.decode("utf-8", "surrogateescape").split("\n")
        parse({"e": ExtractConfig, "t": TrainConfig}.get(kind[:1], EvaluateConfig), arguments)

    def config_file(data: bytes) -> None:
        (work / "options.toml").write_bytes(data)
        parse(TrainConfig, ["--config", str(work / "options.toml"), "--print-config"])

    lines = [
        "extract\n--data\nd\n--cache\nc\n--encoder\nimage=x\n--layers\nimage=11,12\n--max-items\ntrain=5\n--max-invalid\n0.5",
        "train\n--cache\nc\n--out\no\n--fusion\nlinear\n--objective\ninfo_nce=1\n--seed\n3\n--log\nnone",
        "v\n--cache\nc\n--run\nr\n--rerank-k\n7\n--index\nivf\n--baselines\nlinear\n--seed\n1",
    ]
    examples = [line.encode() for line in lines]
    file = (
        b'cache = "c"\nout = "o"\nlayers = {image = [11, 12]}\nobjective = {info_nce = 1}\n'
        b"learning_rate = 1e-3\npooled_text = true"
    )
    return {
        "options": Target(call=command_line, examples=examples, change=changed_bytes),
        "options file": Target(call=config_file, examples=[file], change=changed_bytes),
    }


def _changed_header(data: bytes, random: Random) -> bytes:
    """safetensors: 8 bytes of length, a JSON header, the numbers."""
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.5 or length > len(data) - 8:
        return changed_bytes(data, random)
    header = changed_json(data[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


# ---- HDF5 ----


def _exchange_targets(work: Path) -> dict[str, Target]:
    write_contents(work / "exported", image_contents(3))
    file = Path(export_hdf5(work / "exported", work / "file.h5"))
    data = file.read_bytes()

    def imported(changed: bytes) -> None:
        file.write_bytes(changed)
        import_hdf5(file, f"memory://fuzz/{os.getpid()}")

    def call(changed: bytes) -> None:
        import fsspec

        try:
            imported(changed)
        finally:
            with contextlib.suppress(FileNotFoundError):
                fsspec.filesystem("memory").rm(f"/fuzz/{os.getpid()}", recursive=True)

    return {"HDF5 import": Target(call=call, examples=[data], change=changed_bytes)}


def _request_targets(work: Path) -> dict[str, Target]:
    """The form in which a search sends its files."""
    kind = f"multipart/form-data; boundary={BOUNDARY}"

    def call(data: bytes) -> None:
        found = form_files(kind, data)
        assert {*found} <= {"image", "audio", "video"}
        assert sum(map(len, found.values())) < len(data)

    examples = [form({"image": b"a photo"}), form({"audio": b"a sound", "image": b"a photo"})]
    return {"form": Target(call=call, examples=examples, change=changed_bytes)}


_MAKERS = {
    **dict.fromkeys(
        ("root", "manifest", "array zarr.json", "block", "shard", "item table", "part of a table"), _store_targets
    ),
    **dict.fromkeys(("metadata.jsonl", "queries.jsonl", "class folders"), _source_targets),
    **dict.fromkeys(("run config.json", "run result.json", "model.safetensors", "state.safetensors"), _run_targets),
    **dict.fromkeys(("options", "options file"), _option_targets),
    "HDF5 import": _exchange_targets,
    "form": _request_targets,
}
