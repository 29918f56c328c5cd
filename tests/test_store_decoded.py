"""A cache's numbers for other programs: read with zarr, h5py and safetensors alone, and compared with the cache."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from extraction_cases import tiny_config
from safetensors.numpy import load_file
from store_cases import image_contents, memory_folder, text_contents, write_contents
from synthetic_cache import make_cache

from saffe_cache.cli import main
from saffe_cache.core.features import CacheError
from saffe_cache.extraction.exporting import export_cache
from saffe_cache.extraction.extract import extract
from saffe_cache.store import decoded
from saffe_cache.store.config import ExportConfig, ImportConfig
from saffe_cache.store.exchange import import_cache
from saffe_cache.store.manifest import read_encoder, write_encoder
from saffe_cache.store.reader import Cache, EncoderCache, open_cache
from saffe_cache.store.storage import Storage

Models = Callable[[str], Path]
FORMATS = ("zarr", "hdf5", "safetensors")

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture(scope="module", params=["float16", "bfloat16", "int8", "float8", "float32"])
def cache(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Photos in every storage type, and texts of different lengths; the fourth photo is unusable."""
    images = image_contents(13, request.param)
    with memory_folder() as folder:
        write_contents(folder, images, text_contents(13))
        manifest = read_encoder(Storage(folder), images.key)
        manifest.invalid[3] = "OSError: broken"
        write_encoder(Storage(folder), manifest)
        yield folder


def export(cache: str | Path, target: Path, kind: str) -> Path:
    return Path(export_cache(ExportConfig(cache=str(cache), file=str(target), decoded=True, format=kind)))  # type: ignore[arg-type]


def states_of(encoder: EncoderCache, row: int, layer: int) -> np.ndarray:
    """What the cache says of one input, without padding."""
    tokens = encoder.tokens(np.array([row]), (layer,))
    return tokens.states[0][0] if tokens.mask is None else tokens.states[0][0][tokens.mask[0]]


def usable_rows(encoder: EncoderCache) -> list[int]:
    return [row for row in range(encoder.manifest.finished_rows) if encoder.usable(np.array([row]))[0]]


@pytest.mark.parametrize("kind", ["zarr", "hdf5"])
def test_arrays_equal_the_caches_numbers(cache: Path, tmp_path: Path, kind: str) -> None:
    path = export(cache, tmp_path / "out", kind)
    found = zarr.open_group(path, mode="r") if kind == "zarr" else h5py.File(path)
    for key, encoder in open_cache(cache).encoders.items():
        group = found[f"encoders/{key}"]
        usable = np.asarray(group["usable"][...])
        assert np.flatnonzero(usable).tolist() == usable_rows(encoder)
        for layer in encoder.layers:
            states = group[f"hidden_states/{layer}"]
            assert states.dtype == np.float16
            for row in usable_rows(encoder):
                of_row = slice(*group["offsets"][row : row + 2]) if "offsets" in group else row
                np.testing.assert_array_equal(states[of_row], states_of(encoder, row, layer).astype(np.float16))
        vectors = group[encoder.manifest.vector][...]
        assert vectors.dtype == np.float32
        np.testing.assert_array_equal(vectors, encoder.vectors(np.arange(13)))
    offsets, characters = (found[f"items/ids/{part}"][...] for part in ("offsets", "utf8"))
    ids = [characters[start:stop].tobytes().decode() for start, stop in pairwise(offsets)]
    assert tuple(ids) == open_cache(cache).table.ids


def test_files_equal_the_caches_numbers(cache: Path, tmp_path: Path) -> None:
    path = export(cache, tmp_path / "out", "safetensors")
    about = json.loads((path / "export.json").read_text())
    for key, encoder in open_cache(cache).encoders.items():
        assert about["encoders"][key]["modality"] == encoder.manifest.modality
        names = sorted(file.stem for file in (path / key).iterdir())
        assert names == [f"{row:08d}" for row in usable_rows(encoder)]
        for row in usable_rows(encoder):
            tensors = load_file(path / key / f"{row:08d}.safetensors")
            for layer in encoder.layers:
                states = tensors[f"hidden_states.{layer}"]
                assert states.dtype == np.float16
                np.testing.assert_array_equal(states, states_of(encoder, row, layer).astype(np.float16))
            assert ("attention_mask" in tensors) == encoder.manifest.is_ragged
            assert "input_ids" not in tensors
            vector = encoder.vectors(np.array([row]))[0]
            np.testing.assert_array_equal(tensors[encoder.manifest.vector], vector)
    assert about["encoders"][open_cache(cache).encoder("image").key]["unusable"] == {"3": "OSError: broken"}


def test_items_say_which_inputs_are_theirs(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 5, "test": 3})
    path = export(cache, tmp_path / "out", "safetensors")
    items = [json.loads(line) for line in (path / "items.jsonl").read_text().splitlines()]
    texts = [json.loads(line) for line in (path / "texts.jsonl").read_text().splitlines()]
    table = open_cache(cache).table
    assert [(item["id"], item["split"]) for item in items] == list(zip(table.ids, table.splits, strict=True))
    assert [item["image"] for item in items] == table.rows["image"].tolist()
    assert [item["captions"] for item in items] == [rows.tolist() for rows in table.captions]
    assert tuple(text["text"] for text in texts) == table.inputs["text"].texts


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_language_model_has_its_token_ids(tmp_path: Path, tiny_model: Models, kind: str) -> None:
    config = tiny_config(tmp_path, tiny_model, train=4)
    models = {"image": config.encoder["image"], "text": str(tiny_model("gpt2"))}
    cache = extract(replace(config, encoder=models, layers={"image": (3,), "text": (1, 2)}))
    encoder = open_cache(cache).encoder("text")
    path = export(cache, tmp_path / "out", kind)
    if kind == "safetensors":
        for row in usable_rows(encoder):
            tensors = load_file(path / encoder.key / f"{row:08d}.safetensors")
            assert tensors["input_ids"].dtype == np.int64
            assert len(tensors["input_ids"]) == len(tensors["hidden_states.1"]) == len(tensors["attention_mask"])
            assert tensors["input_ids"].tolist() == token_ids_of(open_cache(cache), encoder, row)
        return
    found = zarr.open_group(path, mode="r") if kind == "zarr" else h5py.File(path)
    group = found[f"encoders/{encoder.key}"]
    for row in usable_rows(encoder):
        of_row = slice(*group["offsets"][row : row + 2])
        assert group["input_ids"][of_row].tolist() == token_ids_of(open_cache(cache), encoder, row)


def token_ids_of(cache: Cache, encoder: EncoderCache, row: int) -> list[int]:
    """From the words of the tiny tokenizer, between the begin and the end token."""
    from tokenizers import Tokenizer

    weights, texts = encoder.language_model(), cache.table.inputs["text"].texts
    assert texts is not None
    ids = Tokenizer.from_str(weights.tokenizer).encode(texts[row], add_special_tokens=False).ids
    return [weights.spec.begin_token, *ids, weights.spec.end_token]


@pytest.mark.parametrize("kind", FORMATS)
def test_layer_beyond_float16_is_float32_and_named(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    images = image_contents(5, "float32")
    spec, rows = images.arrays["hidden_states/3"]
    rows = rows.copy()
    rows[2, 0, 0] = 70000.0
    write_contents(tmp_path / "cache", replace(images, arrays=images.arrays | {"hidden_states/3": (spec, rows)}))
    with caplog.at_level(logging.WARNING):
        path = export(tmp_path / "cache", tmp_path / "out", kind)
    assert f"{images.key}: hidden_states/3 is written as float32: 70000 exceeds float16's 65,504" in caplog.text
    assert "hidden_states/1" not in caplog.text
    if kind == "safetensors":
        tensors = load_file(path / images.key / "00000002.safetensors")
        found = {name: tensors[f"hidden_states.{name}"] for name in "13"}
    else:
        group = zarr.open_group(path, mode="r") if kind == "zarr" else h5py.File(path)
        found = {name: group[f"encoders/{images.key}/hidden_states/{name}"][2] for name in "13"}
    assert (found["1"].dtype, found["3"].dtype) == (np.float16, np.float32)
    np.testing.assert_array_equal(found["3"], rows[2])


def test_inputs_that_are_not_encoded_yet_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 6})
    key = open_cache(cache).encoder("image").key
    manifest = read_encoder(Storage(cache), key)
    manifest.finished_rows = 4
    write_encoder(Storage(cache), manifest)
    path = export(cache, tmp_path / "out", "safetensors")
    assert f"{key}: 4 of 6 inputs are encoded; the others are left out" in caplog.text
    assert len(list((path / key).iterdir())) == 4


@pytest.mark.parametrize("kind", FORMATS)
def test_readers_need_nothing_of_this_package(tmp_path: Path, kind: str) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 6})
    path, key = export(cache, tmp_path / "out", kind), open_cache(cache).encoder("image").key
    opened = {
        "zarr": f"import zarr; found = zarr.open_group({str(path)!r}, mode='r')['encoders/{key}/hidden_states/3'][:]",
        "hdf5": f"import h5py; found = h5py.File({str(path)!r})['encoders/{key}/hidden_states/3'][:]",
        "safetensors": "from safetensors.numpy import load_file\n"
        f"found = load_file({str(path / key / '00000000.safetensors')!r})['hidden_states.3'][None]",
    }[kind]
    code = f"{opened}\nimport sys; assert not [one for one in sys.modules if one.startswith('saffe_cache')]"
    code += "\nprint(found.dtype, float(found[0].astype('f8').sum()))"
    shown = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    dtype, total = shown.stdout.split()
    expected = states_of(open_cache(cache).encoder("image"), 0, 3).astype(np.float16).astype(np.float64).sum()
    assert (dtype, float(total)) == ("float16", pytest.approx(expected))


@pytest.mark.parametrize("kind", FORMATS)
def test_export_is_whole_or_absent(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 6})
    target, calls = tmp_path / "out", []

    def failing(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) > 3:
            raise OSError("no space left")
        return copied(*arguments)

    name = "_tensors" if kind == "safetensors" else "_copy"
    copied = getattr(decoded, name)
    with monkeypatch.context() as patch:
        patch.setattr(decoded, name, failing)
        with pytest.raises(OSError, match="no space left"):
            export(cache, target, kind)
    assert {path.name for path in tmp_path.iterdir()} == {"cache.zarr"}
    partial = tmp_path / "out.partial"  # of an exporter that was killed
    partial.mkdir()
    (partial / "rest").write_text("half")
    path = export(cache, target, kind)
    assert not partial.exists()
    assert path.is_file() or not (path / "rest").exists()
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=r"out: this exists\. Choose another name"):
        export(cache, target, kind)
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


def test_command_refuses_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 6})
    with pytest.raises(ValueError, match="--format: found zarr, expected hdf5, or --decoded with it"):
        ExportConfig(cache=cache, file="out", format="zarr")
    target = str(tmp_path / "out.zarr")
    assert main(["cache", "export", cache, target, "--decoded", "--format", "zarr"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    whole = str(tmp_path / "out.h5")
    assert main(["cache", "export", cache, whole, "--decoded"]) == 0
    with pytest.raises(CacheError, match="found no complete exported cache"):
        import_cache(ImportConfig(file=whole, cache=str(tmp_path / "again.zarr")))
