"""Which files are read again, by what is remembered of them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tarfile
import time
from pathlib import Path

import pytest

from saffe_cache.sources.items import Columns, MediaFile, SourceItem
from saffe_cache.sources.registry import read_items

JPEG = b"\xff\xd8\xff"
NAMES = ("1.jpg", "2.jpg", "3.jpg")


class Reads(list[str]):
    """The names of the files that were read, since it was last asked."""

    def taken(self) -> list[str]:
        names = sorted(self)
        self.clear()
        return names


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    found, read = Reads(), MediaFile.read

    def counted(media: MediaFile) -> bytes:
        found.append(os.path.basename(media.path))
        return read(media)

    monkeypatch.setattr(MediaFile, "read", counted)
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "train" / "cat"
    folder.mkdir(parents=True)
    for name in NAMES:
        write(folder / name, JPEG + name.encode())
    return tmp_path / "data"


def write(path: Path, content: bytes, *, age: float = 10.0) -> None:
    """A file that was last changed some seconds ago."""
    path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)


def read(data: Path | str, *, rehash: bool = False) -> list[SourceItem]:
    return read_items(str(data), Columns(), (), rehash=rehash)


def memory(user_folder: Path) -> Path:
    [path] = (user_folder / "saffe_cache" / "content").iterdir()
    return path


def test_unchanged_files_are_not_read_again(data: Path, reads: Reads) -> None:
    items = read(data)
    assert reads.taken() == list(NAMES)
    assert read(data) == items
    assert reads.taken() == []
    assert read(data, rehash=True) == items
    assert reads.taken() == list(NAMES)


def test_relative_paths_name_the_same_files(data: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [item.hashes for item in read(data)]
    reads.clear()
    monkeypatch.chdir(data.parent)
    assert [item.hashes for item in read(data.name)] == expected
    assert not reads


@pytest.mark.parametrize("how", ["size", "content", "touched", "replaced", "restored"])
def test_changed_file_is_read(how: str, data: Path, reads: Reads) -> None:
    before, path = read(data), data / "train" / "cat" / "2.jpg"
    reads.clear()
    old = path.stat()
    content = path.read_bytes()
    changed = {"size": content + b"!", "touched": content}.get(how, content[::-1])
    if how == "replaced":  # as rsync --times does: equal size and time of another file
        path.with_name("new").write_bytes(changed)
        path.with_name("new").replace(path)
    else:
        write(path, changed, age=5)
    if how in ("replaced", "restored"):
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    after = read(data)
    assert reads.taken() == ["2.jpg"]
    differs = [item.id for item, other in zip(before, after, strict=True) if item != other]
    assert differs == ([] if how == "touched" else ["train/cat/2.jpg"])
    assert read(data) == after
    assert not reads


@pytest.mark.parametrize("age", [0.0, 1.0, -3600.0])
def test_file_changed_just_now_is_not_trusted(age: float, data: Path, reads: Reads) -> None:
    """On a coarse clock, its next change could have the same time, and so could one by a clock that is ahead."""
    write(data / "train" / "cat" / "2.jpg", JPEG, age=age)
    read(data)
    reads.clear()
    read(data)
    assert reads.taken() == ["2.jpg"]


def test_file_changed_while_it_is_read_is_not_trusted(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, path = MediaFile.read, data / "train" / "cat" / "2.jpg"

    def read_late(media: MediaFile) -> bytes:
        content = plain(media)
        if media.path == str(path):
            write(path, JPEG + b"later", age=5)
        return content

    with monkeypatch.context() as patched:
        patched.setattr(MediaFile, "read", read_late)
        first = read(data)
    second = read(data)
    assert [item.id for item, other in zip(first, second, strict=True) if item != other] == ["train/cat/2.jpg"]


def test_kinds_and_problems_are_remembered(data: Path, reads: Reads) -> None:
    folder = data / "train" / "cat"
    write(folder / "2.jpg", b"")
    write(folder / "3.jpg", b"version https://git-lfs.github.com/spec/v1\n")
    write(folder / "4.jpg", b"RIFF....WAVEfmt ")
    (folder / "5.jpg").symlink_to("nowhere")
    first = read(data)
    reads.clear()
    assert read(data) == first
    assert reads.taken() == ["5.jpg"]
    assert [list(item.hashes) for item in first] == [["image"], ["image"], ["image"], ["audio"], []]
    problems = [item.problem for item in first]
    assert "the file is empty" in problems[1]
    assert "git lfs pull" in problems[2]
    assert "No such file" in problems[4]


def test_members_of_unchanged_archives_are_not_read_again(tmp_path: Path, reads: Reads) -> None:
    path = tmp_path / "train.tar"

    def pack(*contents: bytes) -> None:
        with tarfile.open(path, "w") as archive:
            for number, content in enumerate(contents):
                write(tmp_path / "member", content)
                archive.add(tmp_path / "member", f"{number}.jpg")
        os.utime(path, (time.time() - 10 + len(contents),) * 2)

    pack(JPEG + b"a", JPEG + b"b")
    first = read(path)
    reads.clear()
    assert read(path) == first
    assert not reads
    pack(JPEG + b"c", JPEG + b"b", JPEG + b"d")
    assert len(read(path)) == 3
    assert len(reads.taken()) == 3


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "unreadable"])
def test_damaged_memory_is_not_used(
    damage: str, data: Path, reads: Reads, user_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items, path = read(data), memory(user_folder)
    content = bytearray(path.read_bytes())
    content[content.index(items[0].hashes["image"])] ^= 1
    if damage == "unreadable":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"flipped": content, "truncated": content[:-100]}.get(damage, b""))
    reads.clear()
    with caplog.at_level(logging.DEBUG, "saffe_cache"):
        assert read(data) == items
    assert reads.taken() == list(NAMES)
    assert "files are read again" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    read(data)
    assert reads.taken() == (list(NAMES) if damage == "unreadable" else [])


def test_folder_that_cannot_be_written_does_no_harm(
    data: Path, user_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    user_folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.DEBUG, "saffe_cache"):
        assert len(read(data)) == 3
    assert "cannot be written" in caplog.text


def test_another_user_reads_all(
    data: Path, reads: Reads, user_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = read(data)
    reads.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert read(data) == items
    assert reads.taken() == list(NAMES)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/ignored")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    read(data)
    assert memory(tmp_path / "home" / ".cache").is_file()


def test_user_without_a_home_has_nothing_remembered(
    data: Path, reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", str)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        read(data)
        assert len(reads.taken()) == len(NAMES)
    assert not (tmp_path / "~").exists()


def test_processes_at_once_lose_nothing_but_time(data: Path, reads: Reads) -> None:
    """Each reads files of its own, over and over, and replaces what is remembered of all."""
    folders = [data / name / "cat" for name in ("train", "test")]
    folders[1].mkdir(parents=True)
    for number in range(20):
        write(folders[number % 2] / f"more-{number:02d}.jpg", JPEG + bytes([number]))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=read_often, args=(data, folder.parent.name)) for folder in folders]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    first = read(data)
    read(data)
    reads.clear()
    assert read(data) == first
    assert not reads
    assert first == read(data, rehash=True)


def read_often(data: Path, split: str) -> None:
    expected = read_items(str(data), Columns(), (split,), rehash=True)
    for _ in range(30):
        assert read_items(str(data), Columns(), (split,), rehash=True) == expected
        assert read_items(str(data), Columns(), (split,)) == expected
