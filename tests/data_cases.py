"""Kinds of data and what becomes of each: the cases of tests/test_data_cases.py, and the table in docs/data.md.

    python tests/data_cases.py          writes the table

Every row of the table is a case: its data are made, read and decoded, and the result and the message are compared.
"""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
from data_forms import FORMS, dataset_dict, drawn, png, write, write_tar
from PIL import Image

from saffe_cache.sources.items import Columns

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
BEGIN = "| what is found |"

Files = Mapping[str, bytes | str]
Make = Callable[[Path], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of data."""

    found: str
    """What is found, for the table."""
    result: str
    """What happens, for the table."""
    message: str = ""
    """Part of what is said, with DATA for the data's folder; empty if nothing is."""
    make: Make
    """Write the data below a folder, and return what `--data` says."""
    usable: tuple[str, ...] = ()
    """Ids of the items that can be used, in order."""
    unusable: tuple[str, ...] = ()
    columns: Columns = field(default_factory=Columns)
    encodes: bool = False
    """Whether what happens, happens at extraction with tiny encoders."""


def files(contents: Files, data: str = "") -> Make:
    def make(folder: Path) -> str:
        for name, content in contents.items():
            write(folder / name, content)
        return str(folder / data) if data else str(folder)

    return make


def form(name: str, *, roles: tuple[str, ...] = ("caption",)) -> Make:
    return lambda folder: FORMS[name].make(folder, drawn(("train",), roles))


def lines(*entries: Mapping[str, Any]) -> str:
    return "\n".join(map(json.dumps, entries))


def tar(contents: Mapping[str, bytes], change: Callable[[bytes], bytes] = lambda data: data) -> Make:
    def make(folder: Path) -> str:
        path = write_tar(folder / "photos.tar", contents)
        path.write_bytes(change(path.read_bytes()))
        return str(path)

    return make


def classes(**splits: tuple[str, ...]) -> Make:
    """Two photos of each class of each split."""
    names = [(split, label, number) for split, labels in splits.items() for label in labels for number in range(2)]
    return files({f"{split}/{label}/{n}.png": png(hash_of(split, label, n)) for split, label, n in names})


def hash_of(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def hub(**columns: list[Any]) -> Make:
    """A dataset of the library with two photos and these columns."""
    photos = [{"bytes": png(number), "path": None} for number in range(2)]
    return lambda _: datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"image": photos, **columns}).cast_column("image", datasets.Image())
    )


def two_configs(folder: Path) -> str:
    for name in ("easy", "hard"):
        path = folder / name / "train.parquet"
        path.parent.mkdir(parents=True)
        dataset_dict(drawn(("train",)))["train"].to_parquet(path)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("easy", "hard"))
    write(folder / "README.md", f"---\nconfigs:\n{configs}---\n")
    return str(folder)


def unlabelled(_: Path) -> Any:
    made = dataset_dict(drawn(("train",)))["train"].remove_columns("sentences")
    return datasets.DatasetDict(train=made, test=made.map(lambda _: {"label": -1}))


def linked(folder: Path) -> str:
    write(folder / "train" / "cat" / "1.png", png(1))
    write(folder.parent / "elsewhere" / "2.png", png(2))
    (folder / "train" / "cat" / "more").symlink_to(folder.parent / "elsewhere")
    (folder / "train" / "cat" / "loop").symlink_to(folder / "train")
    return str(folder)


def with_damaged_exif(_: bytes = b"") -> bytes:
    data = png(1)
    chunk = b"eXIf" + b"broken"
    place = data.index(b"IDAT") - 4
    return data[:place] + (6).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[place:]


def strip() -> bytes:
    file = io.BytesIO()
    Image.new("L", (1, 65000)).save(file, "PNG")
    return file.getvalue()


def grey(maximum: int) -> bytes:
    file = io.BytesIO()
    pixels = np.linspace(0, maximum, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(pixels).save(file, "TIFF", tiffinfo={281: maximum})
    return file.getvalue()


def two_named_equally(folder: Path) -> str:
    folder.mkdir()
    with tarfile.open(folder / "photos.tar", "w") as archive:
        for number in range(2):
            member = tarfile.TarInfo("1.png")
            member.size = len(png(number))
            archive.addfile(member, io.BytesIO(png(number)))
    return str(folder / "photos.tar")


def composed(folder: Path) -> str:
    """A name with é: as one letter in the table, as two on the disk; and a backslash."""
    write(folder / "train" / unicodedata.normalize("NFD", "é.png"), png(1))
    write(folder / "train" / "more" / "2.PNG", png(2))
    names = (unicodedata.normalize("NFC", "é.png"), "more\\2.png")
    write(folder / "train" / "metadata.jsonl", lines(*({"file_name": name, "label": "cat"} for name in names)))
    return str(folder)


def frame(_: Path) -> pandas.DataFrame:
    rows = [{"image": one.photo, "caption": one.captions[0], "split": one.split} for one in drawn()]
    return pandas.DataFrame(rows)


ONE = {"1.png": png(1)}
TWO = {"1.png": png(1), "2.png": png(2)}
HELLO = {"train/1.png": png(1), "train/metadata.jsonl": lines({"file_name": "1.png", "caption": "hello"})}
WAVE = b"RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x40\x1f\0\0\x80\x3e\0\0\x02\0\x10\0data\x08\0\0\0" + bytes(8)
THREE = ("train/0", "train/1", "train/2")

CASES: tuple[Case, ...] = (
    # Forms
    Case(
        found="`1.jpg` with `1.txt` or `1.caption` beside it",
        result="a caption per line",
        make=files({**ONE, "1.txt": "a cat\na grey cat\n"}),
        usable=("train/1.png",),
    ),
    Case(
        found="`1.jpg` with `1.json` beside it",
        result="its fields are columns",
        make=files({**ONE, "1.json": '{"caption": "a cat", "width": 30}'}),
        usable=("train/1.png",),
    ),
    Case(
        found="class folders with texts beside some photos",
        result="classes and captions are taken",
        message="split train: 1 of its 2 items have no captions; for instance train/cat/2.png",
        make=files({"train/cat/1.png": png(1), "train/cat/1.txt": "hello", "train/cat/2.png": png(2)}),
        usable=("train/cat/1.png", "train/cat/2.png"),
    ),
    Case(
        found="a text without a photo",
        result="skipped",
        message="1 files are skipped: no photo or sound has their name; for instance 9.txt",
        make=files({**ONE, "1.txt": "a", "9.txt": "b"}),
        usable=("train/1.png",),
    ),
    Case(
        found="a photo without a text, where others have one",
        result="taken without captions",
        message="split train: 1 of its 2 items have no captions; for instance train/2.png",
        make=files({**TWO, "1.txt": "a"}),
        usable=("train/1.png", "train/2.png"),
    ),
    Case(
        found="a damaged `1.json` beside a photo",
        result="the photo is left out, and named",
        message="train/1.png: its json cannot be read: Expecting",
        make=files({**TWO, "1.json": "{", "2.txt": "b"}),
        usable=("train/2.png",),
        unusable=("train/1.png",),
    ),
    Case(
        found="photos alone, in one folder or in one of each split",
        result="taken without captions",
        make=files({"train/1.png": png(1), "test/2.png": png(2)}),
        usable=("test/2.png", "train/1.png"),
    ),
    Case(
        found="photos in folders that are no usual names of splits",
        result="refused",
        message="2 files are skipped: no photo or sound in a class folder; for instance cat/1.png",
        make=files({"cat/1.png": png(1), "dog/2.png": png(2)}),
    ),
    Case(
        found="an output folder of img2dataset",
        result="its shards are no classes",
        message="1 of 4 downloads had failed, as img2dataset reports",
        make=form("img2dataset"),
        usable=tuple(f"train/00000/0000{number}.png" for number in range(3)),
    ),
    Case(
        found="tar archives of samples, as of webdataset",
        result="read in place",
        make=form("range of tars"),
        usable=("train/set-train-000/00000", "train/set-train-000/00001", "train/set-train-001/00002"),
    ),
    Case(
        found="several photos in a sample: `1.jpg`, `1.seg.png`",
        result="the simplest name is taken",
        message="the files seg.png are left out: another photo or sound of their samples is taken; for instance in "
        "photos/1",
        make=tar({"1.png": png(1), "1.seg.png": png(2), "1.txt": b"a"}),
        usable=("train/photos/1",),
    ),
    Case(
        found="a range with missing archives",
        result="refused",
        message="2 of 3 files do not exist; for instance DATA/001.tar. Fetch them, or narrow the range.",
        make=lambda folder: (write_tar(folder / "000.tar", ONE), str(folder / "{000..002}.tar"))[1],
    ),
    Case(
        found="a damaged archive",
        result="refused",
        message="DATA/photos.tar: no readable tar archive at byte 4608, after 1 files (no header of a file here)",
        make=tar({"1.png": bytes(4000), "2.png": png(2)}, lambda data: data.replace(b"2.png\0", b"2.pnj\0")),
    ),
    Case(
        found="an archive whose end is missing",
        result="refused",
        message="at byte 9216, after 2 files (unexpected end of data). Decompress it if",
        make=tar(TWO, lambda data: data[:6000]),
    ),
    Case(
        found="an archive of a folder with metadata",
        result="refused",
        message="found a folder in an archive, with data/metadata.jsonl, expected samples KEY.jpg with KEY.txt",
        make=tar({"data/1.png": png(1), "data/metadata.jsonl": b"{}"}),
    ),
    Case(
        found="an archive of class folders",
        result="photos without classes, with a warning",
        message="DATA/photos.tar: its 2 folders are not taken as classes. Unpack it to have classes.",
        make=tar({"cat/1.png": png(1), "dog/2.png": png(2)}),
        usable=("train/photos/cat/1", "train/photos/dog/2"),
    ),
    Case(
        found="two files of one name in an archive",
        result="refused",
        message="DATA/photos.tar: two files are named 1.png. Leave one out.",
        make=two_named_equally,
    ),
    Case(
        found="a table of file names and captions, as `--data photos.csv`",
        result="several rows of a file are joined",
        message="",
        make=files({**ONE, "photos.csv": "image,caption\n1.png,a cat\n1.png,a grey cat\n"}, "photos.csv"),
        usable=("train/1.png",),
    ),
    Case(
        found="tables with commas, tabs, semicolons or bars, in UTF-8 or UTF-16",
        result="recognised by the first line",
        make=form("tsv in UTF-16"),
        usable=("train/00000.png", "train/00001.png", "train/00002.png"),
    ),
    Case(
        found="files outside the folder of such a table",
        result="taken, with a warning",
        message="2 files are outside its folder; for instance ../1.png",
        make=files({**TWO, "tables/a.csv": "path,text\n../1.png,a\n../2.png,b\n"}, "tables/a.csv"),
        usable=("train/../1.png", "train/../2.png"),
    ),
    Case(
        found="URLs in a table",
        result="refused",
        message="a.csv:2: path is the URL 'https://example.org/1.png', expected a file. Download the files first",
        make=files({"a.csv": "path,text\nhttps://example.org/1.png,a\n"}, "a.csv"),
    ),
    Case(
        found="an empty table",
        result="refused",
        message="DATA/a.csv: the table has no rows, expected one for each file",
        make=files({"a.csv": "path,text\n"}, "a.csv"),
    ),
    Case(
        found="a row with more cells than columns",
        result="refused",
        message="DATA/a.csv:3: expected 2 cells as in its first line. Correct the line.",
        make=files({**ONE, "a.csv": "path,text\n1.png,a\n1.png,a,b\n"}, "a.csv"),
    ),
    Case(
        found="Parquet files with photos, and folders of them",
        result="as a dataset of the hub",
        make=form("snapshot"),
        usable=THREE,
    ),
    Case(
        found="a dataset with several configs",
        result="refused",
        message="found the configs easy, hard, expected one of them. Choose one, as in --data DATA:easy.",
        make=two_configs,
    ),
    Case(
        found="the same as `NAME:CONFIG`",
        result="the config is taken",
        make=lambda folder: f"{two_configs(folder)}:hard",
        usable=THREE,
    ),
    Case(
        found='columns `caption_0` to `caption_4`, `prompt`, `txt`, structs such as `[{"raw": …}]`',
        result="captions",
        make=hub(caption_0=["a", "b"], caption_1=["c", "d"]),
        usable=("train/0", "train/1"),
    ),
    Case(
        found="numbers or nested lists in a column of captions",
        result="left out, and named",
        message="train/0: caption or label is a float (0.25), expected a text",
        make=hub(caption=[0.25, 0.5]),
        unusable=("train/0", "train/1"),
    ),
    Case(
        found="a split without labels, whose class numbers are all -1",
        result="refused",
        message="No item of split test has a label: leave it out with --splits train.",
        make=unlabelled,
        usable=THREE,
        unusable=("test/0", "test/1", "test/2"),
        encodes=True,
    ),
    Case(
        found="a pandas frame, a list of `(image, captions)`, a torch Dataset, from Python",
        result="as a table",
        make=frame,
        usable=tuple(f"{split}/{row}" for row, split in enumerate(["train"] * 3 + ["test"] * 3)),
    ),
    # Files
    Case(
        found="hidden files and helpers: `.git`, `.ipynb_checkpoints`, `__MACOSX`, `@eaDir`, `Thumbs.db`, …",
        result="skipped",
        message="2 hidden files and helper folders are skipped; for instance train/.git, train/cat/Thumbs.db",
        make=files({"train/cat/1.png": png(1), "train/cat/Thumbs.db": "", "train/.git/2.png": png(2)}),
        usable=("train/cat/1.png",),
    ),
    Case(
        found="other files beside photos",
        result="skipped",
        message="2 files are skipped: no photo or sound in a class folder; for instance train/cat/notes.md",
        make=files({"train/cat/1.png": png(1), "train/cat/notes.md": "", "train/loose.png": png(2)}),
        usable=("train/cat/1.png",),
    ),
    Case(
        found="a table of another name in the folder of photos",
        result="skipped",
        message="1 tables are skipped: name one as --data, or metadata.csv, to read it; for instance captions.csv",
        make=files({"train/1.png": png(1), "captions.csv": "image,caption\ntrain/1.png,a\n"}),
        usable=("train/1.png",),
    ),
    Case(
        found="links to folders",
        result="followed, unless they lead back",
        message="1 links are skipped: they lead back to a folder above them; for instance train/cat/loop",
        make=linked,
        usable=("train/cat/1.png", "train/cat/more/2.png"),
    ),
    Case(
        found="a file without a suffix, or with a wrong one",
        result="its content decides",
        make=files({"train/cat/1": png(1), "train/cat/2.jpg": WAVE}),
        usable=("train/cat/1", "train/cat/2.jpg"),
    ),
    Case(
        found="a pointer of Git LFS",
        result="left out, and named",
        message="train/cat/1.png: unreadable image: a pointer of Git LFS, not the file. Run git lfs pull",
        make=files({"train/cat/1.png": "version https://git-lfs.github.com/spec/v1\n", "train/cat/2.png": png(2)}),
        usable=("train/cat/2.png",),
        unusable=("train/cat/1.png",),
    ),
    Case(
        found="listed names with another Unicode form, case, or backslashes",
        result="the one file that fits is taken",
        make=composed,
        usable=(unicodedata.normalize("NFC", "train/é.png"), "train/more/2.png"),
    ),
    Case(
        found="several files that fit such a name",
        result="left out, and named",
        message="train/A.png: 2 files fit the name 'A.png': A.PNG, a.png",
        make=files(
            {"train/A.PNG": png(1), "train/a.png": png(2), "train/metadata.jsonl": lines({"file_name": "A.png"})}
        ),
        unusable=("train/A.png",),
    ),
    Case(
        found="photos that the metadata does not list",
        result="left out",
        message="1 photos or sounds are left out: the metadata does not list them; for instance train/2.png",
        make=files({**HELLO, "train/2.png": png(2)}),
        usable=("train/1.png",),
    ),
    Case(
        found="metadata beside class folders",
        result="it replaces the classes",
        message="lists files in 2 folders, whose names are not taken as classes. Add a field label",
        make=files(
            {
                "metadata.jsonl": lines({"file_name": "train/cat/1.png"}, {"file_name": "train/dog/2.png"}),
                "train/cat/1.png": png(1),
                "train/dog/2.png": png(2),
            }
        ),
        usable=("train/cat/1.png", "train/dog/2.png"),
    ),
    Case(
        found="metadata without file names",
        result="refused",
        message="expected a JSON object with file_name, found the fields caption",
        make=files({"train/1.png": png(1), "train/metadata.jsonl": lines({"caption": "a"})}),
    ),
    Case(
        found="metadata that lists files outside its folder",
        result="refused",
        message="metadata.jsonl:1: file_name '../1.png' is outside its folder. Move the file, or a link to it, into",
        make=files({**ONE, "train/metadata.jsonl": lines({"file_name": "../1.png"})}),
    ),
    # Columns and splits
    Case(
        found="`--column` with an unknown name",
        result="refused",
        message="no column nonsense; the columns are file_name, caption",
        make=files(HELLO),
        columns=Columns(caption="nonsense"),
    ),
    Case(
        found="no texts for a text encoder",
        result="refused",
        message="the data has no text inputs; its columns are png. Name one with --column caption=NAME",
        make=files(ONE),
        usable=("train/1.png",),
        encodes=True,
    ),
    Case(
        found="classes in a split that `train` lacks",
        result="taken, with a warning",
        message="split val: 1 of its 1 classes are not in split train: images",
        make=classes(train=("cat", "dog"), val=("images",)),
        usable=tuple(f"{place}/{n}.png" for place in ("train/cat", "train/dog", "val/images") for n in range(2)),
    ),
    Case(
        found="a split with one class, `train` with several",
        result="a warning; refused where it would choose or report",
        message="split test: its only class is cat, and split train has 2. Every ranking",
        make=classes(train=("cat", "dog"), test=("cat",)),
        usable=tuple(f"{place}/{n}.png" for place in ("test/cat", "train/cat", "train/dog") for n in range(2)),
    ),
    Case(
        found="class folders nested twice",
        result="a warning",
        message="split kag: its classes test, train are usual names of splits. Perhaps --data should be DATA/kag",
        make=classes(kag=("test", "train")),
        usable=tuple(f"kag/{label}/{n}.png" for label in ("test", "train") for n in range(2)),
    ),
    # Media
    Case(
        found="a photo with damaged EXIF data, texts or colour profile",
        result="its pixels are used",
        make=files({"1.png": with_damaged_exif()}),
        usable=("train/1.png",),
    ),
    Case(
        found="a file that cannot be decoded",
        result="left out, and named",
        message="1 inputs are unreadable: train/2.png: OSError: cannot identify image file",
        make=files({**{f"{n}.png": png(n) for n in (1, 3)}, "2.png": "no picture"}),
        usable=("train/1.png", "train/2.png", "train/3.png"),
        encodes=True,
    ),
    Case(
        found="a HEIC file without `pip install 'saffe-cache[heic]'`",
        result="left out, and named",
        message="OSError: a HEIC file, which needs pillow-heif: pip install 'saffe-cache[heic]'",
        make=files({"1.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "2.png": png(2), "3.png": png(3)}),
        usable=("train/1.heic", "train/2.png", "train/3.png"),
        encodes=True,
    ),
    Case(
        found="a strip such as 1 x 65,000 pixels",
        result="left out, and named, before memory is taken",
        message="1 x 65000 pixels would be resized to",
        make=files({"1.png": strip(), "2.png": png(2), "3.png": png(3)}),
        usable=("train/1.png", "train/2.png", "train/3.png"),
        encodes=True,
    ),
    Case(
        found="16-bit grey of which the file says that fewer bits are used (PNG sBIT, TIFF MaxSampleValue)",
        result="the stated maximum becomes white",
        make=files({"1.tif": grey(4095)}),
        usable=("train/1.tif",),
    ),
)


def table() -> str:
    """The table of the page."""
    rows = [("what is found", "what happens", "message"), ("---", "---", "---")]
    for case in CASES:
        message = f"`{case.message} …`".replace("DATA", "photos").replace(". …", ".") if case.message else ""
        rows.append((case.found, case.result, message))
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


def written(page: str) -> str:
    """The page with the table as the cases say."""
    start = page.index(BEGIN)
    return page[:start] + table() + page[page.index("\n\n", start) + 1 :]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
