"""What users really bring: each kind is taken as it is meant, or reported by name."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from extraction_cases import draw, tiny_config
from PIL import Image
from quick_runs import quick_train, report_of
from synthetic_cache import make_cache

from saffe_cache.core.features import CacheError
from saffe_cache.core.options import parse_config
from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.sources.decoding import decode
from saffe_cache.sources.items import Columns, SourceItem
from saffe_cache.sources.registry import read_items
from saffe_cache.store.config import InspectConfig
from saffe_cache.store.inspect import inspect_cache

NO_COLUMNS = Columns()
ROWS = [
    {
        "file_name": "0.png",
        "text": "words in the photo",
        "blip_caption": "a dog",
        "caption_0": "one",
        "caption_1": "two",
    },
    {"file_name": "1.png", "text": "more words", "blip_caption": "a cat", "caption_0": "three", "caption_1": None},
]


def write_photos(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        draw(root / name, number)
    return root


def write_table(path: Path, rows: Sequence[Mapping[str, Any]] = ROWS) -> None:
    frame = pandas.DataFrame(rows)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)


def read(data: Path, columns: Columns = NO_COLUMNS) -> list[SourceItem]:
    return read_items(str(data), columns, ())


def captions(items: Sequence[SourceItem]) -> dict[str, tuple[str, ...]]:
    return {item.id: item.captions for item in items}


# ---- hidden and helper files ----


HELPERS = (".ipynb_checkpoints/2.png", "__MACOSX/2.png", "@eaDir/2.png", ".git/2.png", "lost+found/2.png", "._0.png")


@pytest.mark.parametrize("name", [*HELPERS, "Thumbs.db", "desktop.ini"])
def test_helpers_are_no_classes(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_photos(tmp_path, "train/cat/0.png", "train/dog/1.png")
    clean = [item.id for item in read(tmp_path)]
    assert not caplog.text
    for folder in ("train", "train/cat"):
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no photo")
    assert [item.id for item in read(tmp_path)] == clean
    assert caplog.text.count("2 hidden files and helper folders are skipped; for instance train/") == 1


# ---- columns ----


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_captions_of_a_table_follow_column(suffix: str, tmp_path: Path) -> None:
    write_photos(tmp_path, "train/0.png", "train/1.png")
    write_table(tmp_path / "train" / f"metadata{suffix}")
    assert captions(read(tmp_path)) == {"train/0.png": ("words in the photo",), "train/1.png": ("more words",)}
    chosen = read(tmp_path, Columns(caption="blip_caption"))
    assert captions(chosen) == {"train/0.png": ("a dog",), "train/1.png": ("a cat",)}
    several = read(tmp_path, Columns(caption="caption_0, caption_1"))
    assert captions(several) == {"train/0.png": ("one", "two"), "train/1.png": ("three",)}
    with pytest.raises(
        ValueError, match="no column nonsense; the columns are file_name, text, blip_caption, caption_0"
    ):
        read(tmp_path, Columns(caption="nonsense"))


def test_captions_of_a_saved_dataset_follow_column(tmp_path: Path) -> None:
    write_photos(tmp_path, "0.png", "1.png")
    rows = [{**row, "image": {"bytes": (tmp_path / row["file_name"]).read_bytes(), "path": None}} for row in ROWS]
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=made, test=made.remove_columns("caption_1")).save_to_disk(tmp_path / "saved")
    found = captions(read(tmp_path / "saved", Columns(caption="caption_0,caption_1")))
    assert found == {"train/0": ("one", "two"), "train/1": ("three",), "test/0": ("one",), "test/1": ("three",)}
    with pytest.raises(ValueError, match="no column caption_2; the columns are file_name, text"):
        read(tmp_path / "saved", Columns(caption="caption_0,caption_2"))
    with pytest.raises(ValueError, match="found 2 columns, expected one"):
        read(tmp_path / "saved", Columns(id="caption_0,caption_1"))


def test_column_of_class_folders_is_refused(tmp_path: Path) -> None:
    write_photos(tmp_path, "train/cat/0.png")
    with pytest.raises(ValueError, match="no column title; the columns are png, label"):
        read(tmp_path, Columns(caption="title"))


def test_option_names_several_columns() -> None:
    given = ["--data", "d", "--cache", "c", "--encoder", "image=m", "--column", "caption=caption_0,caption_1"]
    assert parse_config(ExtractConfig, given, "saffe extract").column == {"caption": "caption_0,caption_1"}


# ---- links, and tables beside class folders ----


def test_links_to_folders_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_photos(tmp_path, "data/train/cat/0.png", "elsewhere/1.png", "elsewhere/deep/2.png")
    (tmp_path / "data" / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data" / "train" / "cat")
    found = [item.id for item in read(tmp_path / "data")]
    assert found == ["train/cat/0.png", "train/cat/more/1.png", "train/cat/more/deep/2.png"]
    assert "1 links are skipped: they lead back to a folder above them; for instance train/cat/more/loop" in caplog.text


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ("metadata.jsonl", ("train/cat/0.png", "train/dog/1.png")),
        ("train/metadata.csv", ("cat/0.png", "dog/1.png")),
        ("train/metadata.parquet", ("cat/0.png", "dog/1.png")),
        ("train/metadata.json", ("cat/0.png", "dog/1.png")),
        ("train/cat/metadata.jsonl", ("0.png", "1.png")),
    ],
)
def test_table_beside_class_folders_is_read(
    table: str, names: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = (tmp_path / table).parent
    write_photos(folder, *names)
    write_photos(tmp_path, "train/cat/unlisted.png")
    write_table(tmp_path / table, [{"file_name": name, "text": f"caption {name}"} for name in names])
    prefix = table.rpartition("/")[0] + "/" if "/" in table else ""
    assert captions(read(tmp_path)) == {f"{prefix}{name}": (f"caption {name}",) for name in names}
    assert (
        "1 photos or sounds are left out: the metadata does not list them; for instance train/cat/unli" in caplog.text
    )
    assert ("whose names are not taken as classes" in caplog.text) == (names[0] != "0.png")


def test_columns_of_files_may_have_a_prefix(tmp_path: Path) -> None:
    write_photos(tmp_path, "train/0.png")
    (tmp_path / "train" / "0.wav").write_bytes(b"x")
    write_table(tmp_path / "train" / "metadata.csv", [{"image_file_name": "0.png", "audio_file_name": "0.wav"}])
    (item,) = read(tmp_path)
    assert sorted(item.media) == ["audio", "image"]


def test_table_without_files_is_refused_by_name(tmp_path: Path) -> None:
    write_photos(tmp_path, "train/cat/0.png")
    (tmp_path / "metadata.csv").write_text("species,size\ncat,4\n")
    with pytest.raises(ValueError, match=r"metadata\.csv:2: expected a JSON object with file_name.*species, size"):
        read(tmp_path)


# ---- splits that do not fit together ----


@pytest.mark.parametrize(
    ("split", "names", "message"),
    [
        ("val", ("images",), r"split val: 1 of its 1 classes are not in split train: images\. Check"),
        ("val", ("cat",), "split val: its only class is cat, and split train has 2"),
        (
            "kag",
            ("train", "test"),
            "split kag: its classes test, train are usual names of splits. Perhaps --data should",
        ),
    ],
)
def test_odd_splits_are_reported(
    split: str, names: Sequence[str], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_photos(tmp_path, "train/cat/0.png", "train/dog/1.png", "dev/cat/2.png", "dev/dog/3.png")
    read(tmp_path)
    assert not caplog.text
    write_photos(tmp_path, *(f"{split}/{name}/{number}.png" for number, name in enumerate(names)))
    read(tmp_path)
    assert re.search(message, caplog.text)


def test_split_of_one_class_chooses_and_reports_nothing(tmp_path: Path) -> None:
    def labels(split: str, number: int) -> list[int]:
        return [0] if split == "val" else [number % 3]

    cache = make_cache(tmp_path / "cache.zarr", {"train": 40, "dev": 12, "val": 12}, classes=3, labels=labels)
    with pytest.raises(ValueError, match="split 'val': all of its 12 items have the class 'class0', one of 3: every"):
        quick_train(cache, tmp_path / "run", fusion="linear", validation="val")
    run = quick_train(cache, tmp_path / "run", fusion="linear", epochs=1, control_epochs=0, validation="dev")
    with pytest.raises(ValueError, match="split 'val': all of its 12 items have the class"):
        report_of(cache, run, split="val")


@pytest.mark.parametrize("num_odd", [1, 40])
def test_one_odd_photo_takes_no_baseline_away(num_odd: int, tmp_path: Path) -> None:
    def labels(split: str, number: int) -> list[int]:
        return [0, 1] if split == "train" and number < num_odd else [number % 3]

    cache = make_cache(tmp_path / "cache.zarr", {"train": 60, "dev": 20, "test": 20}, classes=3, labels=labels)
    run = quick_train(cache, tmp_path / "run", fusion="linear", epochs=1, control_epochs=0)
    report = report_of(cache, run, baselines="linear")
    if num_odd == 1:
        assert {"linear_probe", "class_means"} <= report["systems"].keys()
        assert "linear_probe, class_means: 1 of 60 training photos are left out" in report["text"]
    else:
        assert report["absent"]["linear_probe"] == "most photos have several classes"


# ---- damaged photos, and photos with damaged metadata ----


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    found = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", found)


LARGE = zlib.compress(bytes(3_000_000))
METADATA = {
    "zTXt of 3 MB": chunk(b"zTXt", b"note\0\0" + LARGE),
    "iTXt of 3 MB": chunk(b"iTXt", b"note\0\1\0\0\0" + LARGE),
    "ICC profile of 3 MB": chunk(b"iCCP", b"profile\0\0" + LARGE),
    "bad CRC": chunk(b"tEXt", b"note\0text", crc=1),
    "broken EXIF": chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff broken"),
    "no EXIF at all": chunk(b"eXIf", b"nonsense"),
    "bad CRC of EXIF": chunk(b"eXIf", b"nonsense", crc=1),
}


@pytest.mark.filterwarnings("ignore")  # of corrupt EXIF data
@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA.keys())
def test_broken_metadata_does_not_matter(metadata: bytes, tmp_path: Path) -> None:
    data = (write_photos(tmp_path, "0.png") / "0.png").read_bytes()
    found = decode("image", data[:33] + metadata + data[33:])
    assert np.array_equal(np.asarray(found), np.asarray(decode("image", data)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_broken_exif_does_not_matter(kind: str) -> None:
    picture, made = Image.new("RGB", (8, 6), (200, 30, 40)), io.BytesIO()
    picture.save(made, kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    assert decode("image", made.getvalue()).size == (8, 6)


def test_rotation_survives_other_broken_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    made = io.BytesIO()
    Image.new("RGB", (8, 6)).save(made, "PNG", exif=exif)
    data = made.getvalue()
    assert decode("image", data[:33] + METADATA["bad CRC"] + data[33:]).size == (6, 8)


def test_undecodable_photos_are_named_by_file(
    tmp_path: Path, tiny_model: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tmp_path, tiny_model, train=3)
    config = replace(config, encoder={"image": config.encoder["image"]}, layers={})
    (Path(config.data) / "train" / "001.png").write_bytes(b"no photo")
    with pytest.raises(CacheError, match=r"for instance train/001\.png: OSError: cannot identify image file: it is no"):
        extract(config)
    with caplog.at_level("INFO"):
        extract(replace(config, max_invalid=0.5))
    assert "1 inputs are unreadable: train/001.png: OSError" in caplog.text
    assert "unreadable input train/001.png: OSError" in inspect_cache(InspectConfig(cache=config.cache))


@pytest.mark.slow
def test_inspect_ends_quietly_where_nobody_reads(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.zarr", {"train": 4})
    program = "import sys; from saffe_cache.cli import main; sys.exit(main())"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", program, "cache", "inspect", cache]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("size", [(1, 65_000), (8_000, 1)])
def test_narrow_strips_are_invalid_by_name(
    size: tuple[int, int], tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    config = tiny_config(tmp_path, tiny_model, train=3)
    path = Path(config.data) / "train" / "001.png"
    Image.new("RGB", size).save(path)
    encoder = load_encoder(EncoderRequest(modality="image", model_id=config.encoder["image"]))
    encoder._processor.size = {"shortest_edge": 256}
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels would be resized to 256 x {max(size) * 256}"):
        encoder.prepare_into(decode("image", path.read_bytes()), {})


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_low_bit_grey_is_scaled_by_its_stated_range(kind: str) -> None:
    values, made = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8), io.BytesIO()
    Image.fromarray(values).save(made, kind, **({"tiffinfo": {281: 4095}} if kind == "TIFF" else {}))
    data = made.getvalue()
    if kind == "PNG":
        data = data[:33] + chunk(b"sBIT", b"\x0c") + data[33:]
    np.testing.assert_allclose(np.asarray(decode("image", data))[..., 0], values / 4095 * 255, atol=0.51)
