"""Every kind of dataset into items, what is refused or recorded, and the decoding of odd files."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import struct
import subprocess
import warnings
import wave
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from saffe_cache.sources.decoding import decode, sound_excerpt
from saffe_cache.sources.items import Columns, MediaFile, SourceItem
from saffe_cache.sources.registry import list_items, read_items

RED, BLUE = (200, 30, 40), (20, 60, 220)
NO_COLUMNS = Columns()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(colour: tuple[int, int, int] = RED, size: tuple[int, int] = (8, 6)) -> bytes:
    return encoded(Image.new("RGB", size, colour))


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def list_files(split_dir: Path, *entries: object, photos: Sequence[str] = ("1.png", "2.png")) -> None:
    """Write photos, each with bytes of its own, and a metadata.jsonl; a text is a line as it stands."""
    for number, name in enumerate(photos):
        write(split_dir / name, photo((number, 0, 0)))
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    write(split_dir / "metadata.jsonl", ("\n".join(lines) + "\n").encode())


def read(data: Path | str, *splits: str, columns: Columns = NO_COLUMNS) -> list[SourceItem]:
    return read_items(str(data), columns, splits)


# ---- folders ----


def test_class_folders(tmp_path: Path) -> None:
    write(tmp_path / "train" / "dog" / "b.JPG", b"one")
    write(tmp_path / "train" / "dog" / "more" / "a.png", b"two")
    write(tmp_path / "train" / "cat" / "c.webp", b"three")
    write(tmp_path / "test" / "cat" / "c.wav", b"four")
    items = read(tmp_path)
    assert [(item.id, item.split, item.labels, item.problem) for item in items] == [
        ("test/cat/c.wav", "test", ("cat",), ""),
        ("train/cat/c.webp", "train", ("cat",), ""),
        ("train/dog/b.JPG", "train", ("dog",), ""),
        ("train/dog/more/a.png", "train", ("dog",), ""),
    ]
    assert [list(item.media) for item in items] == [["audio"], ["image"], ["image"], ["image"]]
    assert items[2].hashes == {"image": hashlib.sha256(b"one").digest()}
    assert items[2].media["image"].read() == b"one"


def test_ids_of_class_folders_are_portable(tmp_path: Path) -> None:
    names = [f"{label}/{number}.png" for label in "cab" for number in np.random.default_rng(0).permutation(20)]
    for folder, order in (("here", names), ("there/deep", names[::-1])):
        for name in order:
            write(tmp_path / folder / "train" / name, b"")
    first, second = read(tmp_path / "here"), read(tmp_path / "there" / "deep")
    assert [item.id for item in first] == [item.id for item in second] == sorted(f"train/{name}" for name in names)


def test_other_files_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train" / "cat" / "1.png", photo())
    write(tmp_path / "train" / "cat" / "notes.txt", b"")
    write(tmp_path / "train" / "loose.png", photo())
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path)) == 1
    assert "2 files are skipped: no photo or sound in a class folder; for instance train/cat/notes.txt" in caplog.text


def test_metadata_lists_captions_and_labels(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(6)]
    list_files(
        tmp_path / "train",
        {"file_name": "0.png", "captions": [" one ", "two"]},
        {"file_name": "1.png", "caption": "one"},
        {"file_name": "2.png", "text": "one"},
        "",
        {"file_name": "3.png", "label": "cat"},
        {"file_name": "4.png", "labels": ["cat", 7], "captions": ["both"], "else": 1.5},
        {"file_name": "./5.png"},
        photos=names,
    )
    items = read(tmp_path)
    assert [item.id for item in items] == [f"train/{name}" for name in names]
    assert [item.captions for item in items] == [("one", "two"), ("one",), ("one",), (), ("both",), ()]
    assert [item.labels for item in items] == [(), (), (), ("cat",), ("cat", "7"), ()]
    assert not any(item.problem for item in items)
    assert items[5].media["image"].read() == photo((5, 0, 0))


def test_metadata_fields_can_be_chosen(tmp_path: Path) -> None:
    entry = {"path": "1.png", "file_name": "2.png", "title": "one", "caption": "two", "kind": "cat", "key": 7}
    list_files(tmp_path / "train", entry, {"path": "2.png", "key": 8})
    items = read(tmp_path, columns=Columns(image="path", caption="title", label="kind", id="key"))
    assert [(item.id, item.captions, item.labels) for item in items] == [
        ("train/7", ("one",), ("cat",)),
        ("train/8", (), ()),
    ]
    assert items[0].media["image"].read() == photo((0, 0, 0))


def test_metadata_with_a_byte_order_mark_and_odd_bytes(tmp_path: Path) -> None:
    """A file that Windows wrote; a caption that is no UTF-8; U+2028, which ends no line."""
    write(tmp_path / "train" / "1.png", photo())
    write(tmp_path / "train" / "2.png", photo())
    lines = b'\xef\xbb\xbf{"file_name": "1.png", "text": "caf\xe9"}\r\n{"file_name": "2.png", "text": "a\xe2\x80\xa8b"}'
    write(tmp_path / "train" / "metadata.jsonl", lines)
    assert [item.captions for item in read(tmp_path)] == [("caf\udce9",), ("a\u2028b",)]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"file_name": "gone.png", "text": "a"}, "unreadable image: No such file or directory"),
        ({"file_name": "empty.png", "text": "a"}, "unreadable image: the file is empty"),
        ({"file_name": "folder.png", "text": "a"}, "unreadable image: Is a directory"),
        ({"file_name": "1.png", "text": "  "}, "empty caption or label"),
        ({"file_name": "1.png", "captions": ["a", ""]}, "empty caption or label"),
        ({"file_name": "1.png", "captions": ["a", None]}, "empty caption or label"),
        ({"file_name": "1.png", "captions": {"raw": " "}}, "empty caption or label"),
        (
            {"file_name": "1.png", "captions": {"x": 1, "y": "a"}},
            "caption or label is a struct with the fields x, y, expected a text",
        ),
        ({"file_name": "1.png", "captions": [0.25]}, "caption or label is a float (0.25), expected a text"),
        ({"file_name": "1.png", "captions": [["a"]]}, "caption or label is a list in a list (['a']), expected a text"),
        ({"file_name": "1.png", "labels": ["a", ""]}, "empty caption or label"),
        ({"file_name": "1.xyz", "text": "a"}, "unknown kind of file '.xyz'"),
        ({"file_name": "", "text": "a"}, "unknown kind of file ''"),
    ],
)
def test_unusable_items_are_kept_with_their_problem(entry: dict[str, Any], problem: str, tmp_path: Path) -> None:
    list_files(tmp_path / "train", {"file_name": "2.png", "text": "good"}, entry)
    write(tmp_path / "train" / "empty.png", b"")
    (tmp_path / "train" / "folder.png").mkdir()
    good, bad = read(tmp_path)
    assert bad.problem == problem
    assert not good.problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission_is_a_problem(tmp_path: Path) -> None:
    list_files(tmp_path / "train", {"file_name": "1.png", "text": "a"})
    (tmp_path / "train" / "1.png").chmod(0)
    assert read(tmp_path)[0].problem == "unreadable image: Permission denied"


@pytest.mark.parametrize("line", ["{", "[1]", "7", '"text"', "null", '{"caption": "x"}', "[" * 100_000])
def test_unreadable_line_is_named(line: str, tmp_path: Path) -> None:
    list_files(tmp_path / "train", {"file_name": "1.png", "text": "a"}, "", line)
    with pytest.raises(ValueError, match=r"train/metadata\.jsonl:3: expected a JSON object with file_name"):
        read(tmp_path)


@pytest.mark.parametrize("again", ["1.png", "./1.png"])
def test_file_listed_twice_raises(again: str, tmp_path: Path) -> None:
    list_files(tmp_path / "train", {"file_name": "1.png", "text": "a"}, {"file_name": again, "text": "b"})
    with pytest.raises(ValueError, match=r"metadata\.jsonl:2: train/1\.png is listed twice"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["../outside.png", "a/../../outside.png", "a/..", "ABSOLUTE", "INSIDE", "\0.png"])
def test_file_names_outside_their_folder_raise(name: str, tmp_path: Path) -> None:
    split_dir = tmp_path / "train"
    outside = write(tmp_path / "outside.png", photo())
    write(split_dir / "1.png", photo())
    name = {"ABSOLUTE": str(outside), "INSIDE": str(split_dir / "1.png")}.get(name, name)
    list_files(split_dir, {"file_name": name, "text": "a"})
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1: file_name .* is outside its folder"):
        read(tmp_path)


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    """As in class folders: photos are often linked to where they lie. A loop is an unreadable photo."""
    outside = write(tmp_path / "elsewhere" / "1.png", photo(BLUE))
    names = ("inside.png", "outside.png", "folder/1.png", "loop.png")
    list_files(tmp_path / "data" / "train", *({"file_name": name, "text": "a"} for name in names))
    write(tmp_path / "data" / "test" / "cat" / "1.png", photo())
    for link, target in (
        ("train/inside.png", "1.png"),
        ("train/outside.png", outside),
        ("train/folder", outside.parent),
        ("train/loop.png", "loop.png"),
        ("test/cat/2.png", outside),
        ("test/dog", outside.parent),
    ):
        (tmp_path / "data" / link).symlink_to(target)
    items = {item.id: item for item in read(tmp_path / "data")}
    assert items.pop("train/loop.png").problem == "unreadable image: Too many levels of symbolic links"
    found = {name: item.media["image"].read() for name, item in items.items()}
    blue = ("test/cat/2.png", "test/dog/1.png", "train/outside.png", "train/folder/1.png")
    assert found == {
        **dict.fromkeys(blue, photo(BLUE)),
        "test/cat/1.png": photo(),
        "train/inside.png": photo((0, 0, 0)),
    }


def test_splits_are_chosen(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        list_files(tmp_path / split, {"file_name": "1.png", "text": "a"})
    assert [item.id for item in read(tmp_path)] == ["dev/1.png", "test/1.png", "train/1.png"]
    assert [item.id for item in read(tmp_path, "train", "dev")] == ["dev/1.png", "train/1.png"]
    with pytest.raises(ValueError, match="no items in split tset; its splits are dev, test, train"):
        read(tmp_path, "train", "tset")


def test_listing_reads_no_media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("1.png", "2.png"):
        write(tmp_path / "train" / "cat" / name, photo())
    expected = [(item.id, item.labels) for item in read(tmp_path)]
    monkeypatch.setattr(MediaFile, "read", None)
    items = list_items(str(tmp_path), NO_COLUMNS, (), {"train": 2})
    assert [(item.id, item.labels) for item in items] == expected
    assert all(not item.hashes and item.media for item in items)


def test_folder_without_items_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    write(tmp_path / "cat" / "1.png", photo())  # classes, but no splits above them
    with pytest.raises(ValueError, match=r"found no items, expected folders SPLIT/CLASS/file"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["missing", "file.txt", "gone.csv", "gone.tar", "{000..009}.tar"])
def test_other_paths_are_not_looked_up_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "file.txt", b"")
    monkeypatch.chdir(tmp_path)
    if name.startswith("gone"):
        with pytest.raises(ValueError, match="found no dataset"):
            read(name)
    with pytest.raises(ValueError, match=r"found no dataset, expected a folder saved by .*; or folders SPLIT"):
        read(tmp_path / name)


# ---- datasets ----


def dataset(**changes: Any) -> datasets.Dataset:
    columns: dict[str, Any] = {
        "image": [{"bytes": photo((i, 0, 0)), "path": None} for i in range(3)],
        "label": [1, 0, 1],
        "captions": [["a", "b"], ["c"], ["d"]],
        "name": ["x", "y", "z"],
    }
    features: dict[str, Any] = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "captions": datasets.List(datasets.Value("string")),
        "name": datasets.Value("string"),
    }
    for name, (feature, values) in changes.items():
        columns[name], features[name] = values, feature
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def read_dataset(
    monkeypatch: pytest.MonkeyPatch, made: datasets.Dataset, columns: Columns = NO_COLUMNS
) -> list[SourceItem]:
    """As if it came from the hub."""
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"train": made}))
    return read("somebody/something", columns=columns)


def test_saved_dataset(tmp_path: Path) -> None:
    lying = write(tmp_path / "files" / "lying.png", photo(BLUE))
    rows = [{"bytes": photo(), "path": "ignored.png"}, {"bytes": None, "path": str(lying)}, None]
    made = datasets.DatasetDict(train=dataset(image=(datasets.Image(), rows)), test=dataset())
    made.save_to_disk(tmp_path / "saved")
    items = read(tmp_path / "saved")
    assert [item.id for item in items] == [f"{split}/{row}" for split in ("train", "test") for row in range(3)]
    assert [item.labels for item in items[:3]] == [("dog",), ("cat",), ("dog",)]
    assert [item.captions for item in items[:3]] == [("a", "b"), ("c",), ("d",)]
    assert [item.media["image"].read() for item in items[:2]] == [photo(), photo(BLUE)]
    assert items[1].hashes["image"] == hashlib.sha256(photo(BLUE)).digest()
    assert [item.problem for item in items] == ["", "", "unreadable image: row 2 has no image", "", "", ""]
    assert [item.id for item in read(tmp_path / "saved", "test")] == ["test/0", "test/1", "test/2"]


def test_dataset_of_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [
        {"bytes": None, "path": str(write(tmp_path / "there.png", photo(BLUE)))},
        {"bytes": None, "path": str(tmp_path / "gone.png")},
        {"bytes": b"", "path": None},
    ]
    items = read_dataset(monkeypatch, dataset(image=(datasets.Image(), rows)))
    assert [item.problem for item in items] == [
        "",
        "unreadable image: No such file or directory",
        "unreadable image: the file is empty",
    ]
    assert items[0].media["image"].read() == photo(BLUE)


@pytest.mark.parametrize(("split", "expected"), [(None, "train"), ("test", "test"), ("val[:10%]", "val")])
def test_saved_dataset_without_splits_keeps_its_split(split: str | None, expected: str, tmp_path: Path) -> None:
    made = dataset()
    made._split = datasets.NamedSplit(split) if split else None
    made.save_to_disk(tmp_path / "saved")
    assert {item.split for item in read(tmp_path / "saved")} == {expected}


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load_dataset(name: str) -> datasets.DatasetDict:
        asked.append(name)
        return datasets.DatasetDict({"train": dataset(), "test": dataset()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    items = read("somebody/something", "test")
    assert asked == ["somebody/something"]
    assert [item.id for item in items] == ["test/0", "test/1", "test/2"]
    assert [decode("image", item.media["image"].read()).getpixel((0, 0)) for item in items] == [
        (i, 0, 0) for i in range(3)
    ]


def test_unreachable_hub_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"provided no dataset with this id \(ConnectionError: no route to host\)"):
        read("somebody/something")


def test_columns_named_explicitly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", photo(BLUE))
    made = dataset(
        where=(datasets.Value("string"), [str(path)] * 3),
        raw=(datasets.Value("string"), ["one", "two", "three"]),
        kind=(datasets.ClassLabel(names=["in", "out"]), [0, 1, 1]),
    )
    columns = Columns(image="where", caption="raw", label="kind", id="name")
    items = read_dataset(monkeypatch, made, columns)
    assert [(item.id, item.captions, item.labels) for item in items] == [
        ("train/x", ("one",), ("in",)),
        ("train/y", ("two",), ("out",)),
        ("train/z", ("three",), ("out",)),
    ]
    assert items[0].media["image"].read() == photo(BLUE)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(caption="nonsense"), "no column nonsense; the columns are image, label, captions, name"),
        (Columns(image="nonsense"), "no column nonsense"),
        (Columns(id="nonsense"), "no column nonsense"),
        (Columns(image="label"), r"column label has ClassLabel.*, expected image, bytes or paths"),
        (Columns(image="captions"), "column captions has List.*, expected image, bytes or paths"),
        (Columns(audio="image"), "column image has Image.*, expected audio, bytes or paths"),
    ],
)
def test_wrong_columns_raise(columns: Columns, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=message):
        read_dataset(monkeypatch, dataset(), columns)


def test_dataset_without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no image, audio or video column found; .* Choose them with --column"):
        read_dataset(monkeypatch, dataset().remove_columns(["image"]))


def test_duplicate_ids_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    made = dataset(name=(datasets.Value("string"), ["x", "y", "x"]))
    with pytest.raises(ValueError, match="two items have the id train/x"):
        read_dataset(monkeypatch, made, Columns(id="name"))


def test_class_numbers_become_names(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = datasets.ClassLabel(names=["cat", "dog"])
    items = read_dataset(monkeypatch, dataset(label=(numbers, [1, -1, None])))
    assert [(item.labels, item.problem) for item in items] == [(("dog",), ""), ((), "no label"), ((), "")]
    made = dataset(label=(datasets.List(numbers), [[0, 1], [], [1]]))
    assert [item.labels for item in read_dataset(monkeypatch, made)] == [("cat", "dog"), (), ("dog",)]
    made = dataset(label=(datasets.Value("int64"), [3, 4, 5]))
    assert [item.labels for item in read_dataset(monkeypatch, made)] == [("3",), ("4",), ("5",)]


def test_only_requested_columns_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second column of photos, all broken, disturbs nobody; neither does having photos alone."""
    made = dataset(mask=(datasets.Image(), [{"bytes": b"broken", "path": None}] * 3))
    assert len(read_dataset(monkeypatch, made)) == 3
    alone = read_dataset(monkeypatch, made.select_columns(["image"]))
    assert [(item.id, item.captions, item.labels) for item in alone] == [(f"train/{row}", (), ()) for row in range(3)]


def test_dataset_of_sounds(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    made = dataset(audio=(stored, [{"bytes": bytes([i]), "path": None} for i in range(3)]))
    made = made.cast_column("audio", datasets.Audio())  # given at once, it would need torchcodec to encode
    items = read_dataset(monkeypatch, made.remove_columns(["image"]))
    assert [item.media["audio"].read() for item in items] == [b"\0", b"\1", b"\2"]
    both = read_dataset(monkeypatch, made)
    assert [sorted(item.hashes) for item in both] == [["audio", "image"]] * 3


# ---- pictures ----


def pixels(data: bytes) -> np.ndarray:
    image = decode("image", data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_rotated_upright(orientation: int) -> None:
    generator = np.random.default_rng(0)
    upright = Image.fromarray(generator.integers(256, size=(2, 3, 3), dtype=np.uint8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposition that the camera has applied
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(pixels(encoded(stored, exif=exif)), np.asarray(upright))
    if orientation in (6, 8):
        assert stored.size == (2, 3)


def test_cmyk() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # neither cyan nor black: red
    found = pixels(encoded(image, "JPEG", quality=95))
    np.testing.assert_allclose(found.reshape(-1, 3), [[255, 0, 0]] * 256, atol=6)


def test_transparent_palette_keeps_colours_without_warning() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    data = encoded(image, transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(data).tolist() == [[list(RED), list(BLUE)]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
    np.testing.assert_array_equal(pixels(encoded(image)), np.full((4, 4, 3), 255))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled(kind: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = pixels(encoded(Image.fromarray(values), kind))
    np.testing.assert_allclose(found[..., 0], values / 257, atol=0.5)
    np.testing.assert_array_equal(found[..., 0], found[..., 2])


def test_pixels_without_known_scale_raise() -> None:
    for values in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32), np.full((4, 4), -1, np.int32)):
        with pytest.raises(ValueError, match="have no known scale"):
            pixels(encoded(Image.fromarray(values), "TIFF"))


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == list(RED)


@pytest.mark.filterwarnings("ignore")  # of corrupt EXIF data
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_pictures_raise_documented_errors(kind: str) -> None:
    noise = np.random.default_rng(0).integers(256, size=(24, 24, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for size in (0, 1, 10, len(data) // 2):
        with pytest.raises((OSError, ValueError)):
            decode("image", data[:size])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8))
@pytest.mark.filterwarnings("ignore")
def test_changed_pictures_decode_or_raise_documented_errors(kind: str, changes: list[tuple[int, int]]) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    data = bytearray(
        encoded(Image.new("RGB", (16, 12), RED), kind, **({} if kind in ("GIF", "BMP") else {"exif": exif}))
    )
    for place, value in changes:
        data[place % len(data)] = value
    try:
        image = decode("image", bytes(data))
    except (OSError, ValueError):
        return
    assert image.mode == "RGB"


def test_parser_errors_become_value_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_type_error(image: Image.Image) -> None:
        raise TypeError("broken tag")

    monkeypatch.setattr(ImageFile.ImageFile, "load", raise_type_error)
    with pytest.raises(ValueError, match="TypeError: broken tag"):
        decode("image", photo())


def png_that_claims(width: int, height: int) -> bytes:
    """70 bytes of a PNG: a header of one bit a pixel, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_huge_picture_raises_before_memory_is_allocated() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"DecompressionBombError: Image size \(2500000000 pixels\) exceeds limit"):
        decode("image", png_that_claims(50_000, 50_000))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB; the pixels would be 7.5 GB


@pytest.mark.parametrize("data", [b"no picture at all", b"<html>404</html>", b"\xff\xd8\xff\xe0 JFIF", bytes(1000)])
def test_other_files_raise_as_pictures(data: bytes) -> None:
    with pytest.raises((OSError, ValueError), match=r"cannot identify image file|Truncated|broken"):
        decode("image", data)


def test_formats_that_run_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL gives EPS to Ghostscript; whoever names such a file 1.jpg must not choose what is run."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    data = encoded(Image.new("RGB", (4, 4), RED), "EPS")
    assert Image.open(io.BytesIO(data)).format == "EPS"
    with pytest.raises(OSError, match="cannot identify image file"):
        decode("image", data)


def test_one_pixel() -> None:
    assert pixels(photo(size=(1, 1))).tolist() == [[list(RED)]]


# ---- texts ----


def test_captions_of_any_length_and_script_are_kept(tmp_path: Path) -> None:
    long = " ".join(["word"] * 10_000)
    texts = [long, "שלום", "日本語の説明", "👩🏽‍🚀", "e\u0301", "a\0b\x1b[2J", "\ud800 alone", "\u202ertl"]
    list_files(tmp_path / "train", {"file_name": "1.png", "captions": texts})
    assert read(tmp_path)[0].captions == tuple(texts)


def test_empty_class_folders_have_no_items(tmp_path: Path) -> None:
    write(tmp_path / "train" / "cat" / "1.png", photo())
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "dev").mkdir()
    assert [item.labels for item in read(tmp_path)] == [("cat",)]
    with pytest.raises(ValueError, match="no items in split dev; its splits are train"):
        read(tmp_path, "dev")


# ---- sounds ----

soundfile = pytest.importorskip("soundfile")


def tone(rate: int, frequency: float = 440.0, seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    pure = 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)
    return np.stack([pure] * channels, axis=1)


def sound(waveform: np.ndarray, rate: int, kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format=kind)
    return buffer.getvalue()


def loudest_frequency(waveform: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(spectrum.argmax() * rate / len(waveform))


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_sounds_are_resampled(kind: str) -> None:
    found = decode("audio", sound(tone(44_100), 44_100, kind), 16_000)
    assert found.dtype == np.float32
    assert found.shape == (16_000,)
    assert loudest_frequency(found, 16_000) == pytest.approx(440, abs=1)
    inside = slice(1000, -1000)
    error = found[inside] - tone(16_000)[inside, 0]
    assert np.sqrt(np.square(error).mean()) < (0.03 if kind == "OGG" else 1e-3)


def test_frequencies_above_nyquist_are_removed() -> None:
    found = decode("audio", sound(tone(44_100, frequency=12_000), 44_100), 16_000)
    assert np.abs(found[500:-500]).max() < 1e-3


def test_sounds_at_the_right_rate_are_unchanged() -> None:
    waveform = tone(16_000, seconds=0.1)
    np.testing.assert_allclose(decode("audio", sound(waveform, 16_000), 16_000), waveform[:, 0], atol=1e-4)


def test_stereo_becomes_the_mean() -> None:
    waveform = tone(16_000, seconds=0.1, channels=2) * [1.0, 0.5]
    found = decode("audio", sound(waveform, 16_000), 16_000)
    np.testing.assert_allclose(found, waveform.mean(axis=1), atol=1e-4)


@pytest.mark.parametrize(("rate", "expected"), [(44_100, 8000), (6000, 6000)])
def test_excerpt_is_short_mono_and_at_most_at_a_rate(rate: int, expected: int) -> None:
    waveform = tone(rate, seconds=3, channels=2) * [1.0, 0.5]
    with wave.open(io.BytesIO(sound_excerpt(sound(waveform, rate), 2, 8000))) as stored:
        assert stored.getparams()[:4] == (1, 2, expected, 2 * expected)
        found = np.frombuffer(stored.readframes(2 * expected), "<i2") / 2**15
    inside = slice(200, -200)
    wanted = tone(expected, seconds=2)[:, 0] * 0.75
    np.testing.assert_allclose(found[inside], wanted[inside], atol=2e-3)


def test_excerpt_of_odd_values_is_silent_or_loudest() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.array([np.nan, np.inf, -np.inf, 0.5]), 8000, format="WAV", subtype="FLOAT")
    with wave.open(io.BytesIO(sound_excerpt(buffer.getvalue(), 1, 8000))) as stored:
        assert np.frombuffer(stored.readframes(4), "<i2").tolist() == [0, 32767, -32768, 16384]


@pytest.mark.parametrize("samples", [0, 1])
def test_sounds_without_samples_raise(samples: int) -> None:
    with pytest.raises(ValueError, match="the sound has no samples"):
        decode("audio", sound(tone(44_100)[:samples], 44_100), 16_000)


@pytest.mark.parametrize("data", [b"", b"RIFF", b"no sound at all", photo()])
def test_other_files_raise_as_sounds(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"libsndfile cannot read it: [\w ]+$"):
        decode("audio", data, 16_000)


def test_truncated_sounds_give_their_start_or_raise() -> None:
    for kind in ("WAV", "FLAC", "OGG"):
        data = sound(tone(16_000), 16_000, kind)
        for size in (20, 60, len(data) // 2):
            try:
                assert len(decode("audio", data[:size], 16_000)) < 16_000
            except ValueError:
                continue
