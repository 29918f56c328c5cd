"""Every form of data yields the same items: a matrix of source forms, columns and splits."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from data_forms import FORMS, TorchPhotos, by_split, dataset_dict, drawn, write, write_tar
from PIL import Image

import saffe_cache
from saffe_cache.cli import main
from saffe_cache.extraction.config import ExtractConfig, encode_options
from saffe_cache.sources import huggingface
from saffe_cache.sources.decoding import decode, modality_of_content
from saffe_cache.sources.items import Columns
from saffe_cache.sources.registry import read_items

pytestmark = pytest.mark.usefixtures("own_datasets_cache")


SPLITS = (("train",), ("train", "test"))
MATRIX = [(form, roles, splits) for form, one in FORMS.items() for roles in one.roles for splits in SPLITS]


@pytest.mark.parametrize(
    ("form", "roles", "splits"),
    [one if len(one[2]) > 1 else pytest.param(*one, marks=pytest.mark.slow) for one in MATRIX],
)
def test_forms_have_equal_items(form: str, roles: str, splits: tuple[str, ...], tmp_path: Path) -> None:
    items = drawn(splits, roles.split(","))
    made = FORMS[form].make(tmp_path / "data", items)
    expected = {
        f"{split}/{FORMS[form].id_of(one, number)}": (
            split,
            one.captions,
            (one.label,) if one.label else (),
            {"image": hashlib.sha256(one.photo).digest()},
            "",
        )
        for split, of_split in by_split(items).items()
        for number, one in enumerate(of_split)
    }
    found = read_items(made, Columns(), (), streaming=FORMS[form].streaming)
    assert {item.id: (item.split, item.captions, item.labels, item.hashes, item.problem) for item in found} == expected
    assert [item.media["image"].read() for item in found] == [
        next(one.photo for one in items if hashlib.sha256(one.photo).digest() == item.hashes["image"]) for item in found
    ]
    last = read_items(made, Columns(), splits[-1:], {splits[-1]: 1}, streaming=FORMS[form].streaming)
    assert [item.split for item in last] == [splits[-1]]


# The hub and streams


def test_hub_names_may_have_a_config_and_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, **options: Any) -> datasets.DatasetDict:
        asked.append((path, options))
        return dataset_dict(drawn())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for data in ("o/n", "o/n:easy", "o/n@abc1", "o/n:easy@abc1"):
        assert len(read_items(data, Columns(), ())) == 6
    easy, revision = {"name": "easy"}, {"revision": "abc1"}
    assert asked == [("o/n", {}), ("o/n", easy), ("o/n", revision), ("o/n", easy | revision)]


@pytest.mark.parametrize("kept_bytes", [1, 2**29])
def test_streams_are_read_in_any_order(kept_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By several threads, also where nothing that is passed over is kept."""
    monkeypatch.setattr(huggingface, "_KEPT_BYTES", kept_bytes)
    made = FORMS["snapshot"].make(tmp_path / "data", drawn())
    items = read_items(made, Columns(), (), streaming=True)
    assert not list((tmp_path / "cache").rglob("*.arrow")), "no copy is made"
    with ThreadPoolExecutor(4) as pool:
        for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 1, 3] * 3):
            read = pool.map(lambda item: item.media["image"].read(), [items[number] for number in order])
            assert [hashlib.sha256(data).digest() for data in read] == [
                items[number].hashes["image"] for number in order
            ]


def test_stream_keeps_only_what_may_be_read(tmp_path: Path) -> None:
    made = FORMS["snapshot"].make(tmp_path / "data", drawn(("train",)))
    last = read_items(made, Columns(), (), streaming=True)[2]
    assert last.media["image"].read() == drawn()[2].photo
    assert list(last.media["image"].rows._kept) == [2]  # type: ignore[attr-defined]


def test_streamed_data_is_decoded_in_threads() -> None:
    config = ExtractConfig(data="o/n", cache="c.zarr", encoder={"image": "x"}, streaming=True)
    assert encode_options(config).decode_in == "threads"
    with pytest.raises(ValueError, match="--decode-in: found processes with --streaming, expected threads"):
        replace(config, decode_in="processes")


# Python objects


class Noise(TorchPhotos):
    """With a random transform."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return np.random.default_rng().integers(0, 255, (4, 4, 3)).astype(np.uint8), 0


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK", "P", "1"])
def test_pictures_in_memory_keep_their_pixels(mode: str) -> None:
    picture = Image.open(io.BytesIO(drawn()[0].photo)).convert(mode)
    [item] = read_items([(picture, "a cat")], Columns(), ())
    expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode("image", item.media["image"].read())), expected)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3), (3, 5, 6), (1, 5, 6), (5, 6, 1)])
def test_pixels_in_memory_are_pictures(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    [item] = read_items([(torch.from_numpy(pixels), ["a", "b"])], Columns(), ())
    assert item.captions == ("a", "b")
    found = np.asarray(decode("image", item.media["image"].read()))
    assert found.shape == (5, 6, 3)
    last = pixels.reshape(5, 6) if pixels.size == 30 else None
    channel = last if last is not None else pixels[..., 0] if shape[2] == 3 else pixels[0]
    np.testing.assert_array_equal(found[..., 0], channel)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "data: found int in memory, expected a datasets.Dataset, a pandas frame"),
        ([], "list of 0 rows in memory: found no items, expected a datasets.Dataset"),
        ([(b"", "a", "b")], "data: row 0 has 3 values, expected .image, captions.. Use dicts"),
        ({"image": [b""], "caption": ["a"]}, "found a dict with a column image, expected splits. Use pandas"),
        ([{"text": "a"}], "list of 1 rows in memory: no column with photos or sounds; the columns are text"),
        (Noise(drawn()), "row 0 differs each time it is read. Remove random transforms"),
    ],
)
def test_objects_that_are_no_data_raise(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_items(data, Columns(), ())


def test_values_that_are_no_photos_are_problems() -> None:
    rows = [(np.zeros((3, 4, 4), np.float32), "a"), (None, "b"), ("gone.png", "c"), (drawn()[0].photo, "d")]
    problems = [item.problem for item in read_items(rows, Columns(), ())]
    assert problems[0].startswith("unreadable image: found ndarray of float32 and shape (3, 4, 4), expected a picture")
    assert problems[1:] == ["unreadable image: there is none", "unreadable image: No such file or directory", ""]


def test_waveforms_in_memory_are_sounds() -> None:
    wave = np.sin(np.arange(8000) / 9).astype(np.float32)
    [item] = read_items([{"audio": {"array": wave, "sampling_rate": 16_000}, "label": "sine"}], Columns(), ())
    assert item.labels == ("sine",)
    np.testing.assert_allclose(decode("audio", item.media["audio"].read(), 16_000), wave, atol=1e-6)


@pytest.mark.parametrize(
    "form", ["frames", *(pytest.param(name, marks=pytest.mark.slow) for name in ("DatasetDict", "lists of pairs"))]
)
def test_objects_are_extracted_as_files_are(form: str, tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    items = drawn(("train",), ("caption",))
    encoder = {"image": str(tiny_model("dinov2")), "text": str(tiny_model("bert"))}
    made, expected = (
        saffe_cache.open_cache(
            saffe_cache.extract(
                data=FORMS[name].make(tmp_path / "data", items), encoder=encoder, cache=str(tmp_path / name)
            )
        )
        for name in (form, "metadata.jsonl")
    )
    for modality in encoder:
        rows = np.arange(len(expected.table.inputs[modality]))
        np.testing.assert_array_equal(made.encoder(modality).vectors(rows), expected.encoder(modality).vectors(rows))
    config = made.encoder("image").manifest.extractions[0]["config"]
    assert "of 3 rows in memory" in config["data"]


# Formats of files


@pytest.mark.parametrize("suffix", ["aiff", "caf", "w64", "opus", "ogg", "flac", "au", "rf64"])
def test_sounds_of_each_suffix_are_found_and_decoded(suffix: str, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "train" / "sine" / f"1.{suffix}"
    path.parent.mkdir(parents=True)
    wave = 0.5 * np.sin(np.arange(48_000) / 9)
    kind = {"opus": ("OGG", "OPUS")}.get(suffix, (suffix.upper(), None))
    soundfile.write(path, wave, 48_000, format=kind[0], subtype=kind[1])
    [item] = read_items(str(tmp_path), Columns(), ())
    assert decode("audio", item.media["audio"].read(), 48_000).std() == pytest.approx(wave.std(), rel=0.05)
    assert modality_of_content(path.read_bytes()) == "audio"


@pytest.mark.parametrize("suffix", ["avif", "jp2", "ppm", "apng", "jfif", "bmp", "gif", "webp", "heic"])
def test_photos_of_each_suffix_are_found_and_decoded(suffix: str, tmp_path: Path) -> None:
    if suffix == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    kind = {"jp2": "JPEG2000", "apng": "PNG", "jfif": "JPEG", "heic": "HEIF"}.get(suffix, suffix.upper())
    path = tmp_path / "train" / "red" / f"1.{suffix.upper()}"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (32, 32), (200, 30, 40)).save(path, kind)
    [item] = read_items(str(tmp_path), Columns(), ())
    assert np.abs(np.asarray(decode("image", item.media["image"].read())).mean((0, 1)) - (200, 30, 40)).max() < 12
    assert modality_of_content(path.read_bytes()) == "image"


def test_loggers_of_downloads_are_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["extract"])
    main(["extract", "--data", "/nowhere", "--cache", "c.zarr", "--encoder", "image=x"])
    assert not [name for name in ("httpx", "httpx2") if logging.getLogger(name).isEnabledFor(logging.INFO)]


def test_columns_of_ids_and_splits_hold_for_every_form(tmp_path: Path) -> None:
    rows = [{"uid": f"u{number}", "fold": ("a", "b")[number % 2]} for number in range(3)]
    items = drawn(("train",), ("caption",))
    lines, files = [], {}
    for one, row in zip(items, rows, strict=True):
        write(tmp_path / "beside" / f"{one.name}.png", one.photo)
        write(tmp_path / "beside" / f"{one.name}.json", json.dumps(row))
        write(tmp_path / "listed" / "train" / f"{one.name}.png", one.photo)
        lines.append(json.dumps({"file_name": f"{one.name}.png", **row}))
        files |= {f"{one.name}.png": one.photo, f"{one.name}.json": json.dumps(row).encode()}
    write(tmp_path / "listed" / "train" / "metadata.jsonl", "\n".join(lines))
    cells = [{"image": {"bytes": one.photo, "path": None}} for one in items]
    table = datasets.Dataset.from_list([cell | row for cell, row in zip(cells, rows, strict=True)])
    for data in (
        str(tmp_path / "beside"),
        str(tmp_path / "listed"),
        str(write_tar(tmp_path / "set.tar", files)),
        table.cast_column("image", datasets.Image()),
        [{"image": one.photo} | row for one, row in zip(items, rows, strict=True)],
    ):
        found = read_items(data, Columns(id="uid", split="fold"), ())
        assert sorted(item.id for item in found) == ["a/u0", "a/u2", "b/u1"]


def test_rows_may_lack_a_chosen_column_of_media(tmp_path: Path) -> None:
    photo, sound = drawn()[0].photo, b"a sound"
    write(tmp_path / "train" / "1.png", photo)
    for name in ("1.wav", "2.wav"):
        write(tmp_path / "train" / name, sound)
    columns = Columns(image="left", audio="right")
    rows = [{"right": "2.wav"}, {"left": "1.png", "right": "1.wav"}, {"left": "1.png"}, {"left": "", "right": "2.wav"}]
    expected = [["audio"], ["audio", "image"], ["image"], ["audio"]]
    (tmp_path / "list.jsonl").write_text(
        "\n".join(json.dumps({"id": n} | {k: v and f"train/{v}" for k, v in r.items()}) for n, r in enumerate(rows))
    )
    contents = {"1.png": photo, "1.wav": sound, "2.wav": sound, "": ""}
    objects = [{name: contents[file] for name, file in row.items()} for row in rows]
    for data in (str(tmp_path / "list.jsonl"), objects):
        found = read_items(data, replace(columns, id="id") if isinstance(data, str) else columns, ())
        assert [sorted(item.media) for item in found] == expected
    with pytest.raises(ValueError, match=r"list.jsonl: no column top; the columns are id, right, left"):
        read_items(str(tmp_path / "list.jsonl"), replace(columns, video="top"), ())
    with pytest.raises(ValueError, match=r"no column top; the columns are right, left"):
        read_items(objects, replace(columns, video="top"), ())
    write(tmp_path / "other" / "metadata.jsonl", '{"left": "1.png"}\n{"caption": "neither"}')
    with pytest.raises(ValueError, match=r"metadata.jsonl:2: expected a JSON object with left or right, found the f"):
        read_items(str(tmp_path / "other"), columns, ())


def test_a_split_without_the_chosen_column_takes_no_other() -> None:
    photo = {"bytes": drawn()[0].photo, "path": None}
    sound = {"bytes": b"a sound", "path": None}
    one = datasets.Dataset.from_list([{"left": photo, "audio": sound}])
    other = datasets.Dataset.from_list([{"thumbnail": photo, "audio": sound}])
    made = {
        "train": one.cast_column("left", datasets.Image()),
        "test": other.cast_column("thumbnail", datasets.Image()),
    }
    found = read_items(made, Columns(image="left"), ())
    assert {item.split: sorted(item.media) for item in found} == {"train": ["audio", "image"], "test": ["audio"]}


def test_row_without_the_chosen_id_raises(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.png", drawn()[number].photo)
    write(tmp_path / "1.json", '{"uid": 7}')
    with pytest.raises(ValueError, match=r"train/0\.png: found no uid, which --column id=uid names"):
        read_items(str(tmp_path), Columns(id="uid"), ())


def test_parquet_beside_linked_photos_is_no_snapshot(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "cat" / "1.png", drawn()[0].photo)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    pandas.DataFrame([{"x": 1}]).to_parquet(tmp_path / "data" / "vectors.parquet")
    assert [item.id for item in read_items(str(tmp_path / "data"), Columns(), ())] == ["train/cat/1.png"]
