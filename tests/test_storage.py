"""Named byte strings below a root: creation and replacement have one winner."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from saffe_cache.core.features import CacheError
from saffe_cache.store.storage import Storage

CLAIMANTS, ROUNDS = 8, 5


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(tmp_path if request.param == "local" else f"memory://{tmp_path.name}/storage")


def test_a_file_is_created_once(storage: Storage) -> None:
    assert storage.create("a/b", b"first ", memoryview(b"bytes"))
    assert not storage.create("a/b", b"second")
    assert storage.read("a/b") == b"first bytes"
    assert storage.list("a") == ["a/b"]  # and no temporary file


def test_a_file_is_replaced_if_it_is_as_expected(storage: Storage) -> None:
    assert not storage.replace("a/b", b"2", b"1")
    assert storage.replace("a/b", b"1", None)
    assert not storage.replace("a/b", b"2", None)
    assert not storage.replace("a/b", b"2", b"other")
    assert storage.replace("a/b", b"2", b"1")
    assert storage.read("a/b") == b"2"
    assert storage.list("a") == ["a/b"]


def test_files_are_listed_and_removed(storage: Storage) -> None:
    assert storage.list("log") == []
    for name in ("log/b", "log/a/x", "log-book"):
        storage.write(name, b"")
    assert storage.list("log") == ["log/a/x", "log/b"]
    storage.remove("log/b")
    storage.remove("log/b")
    assert storage.list("log") == ["log/a/x"]


def test_a_part_of_a_file_is_read(storage: Storage) -> None:
    storage.write("a", b"0123456789")
    assert storage.read_range("a", 3, 4) == b"3456"
    assert storage.read_range("a", 6, 4) == b"6789"
    with pytest.raises(CacheError, match="a ends before byte 11"):
        storage.read_range("a", 7, 4)
    with pytest.raises(CacheError, match="b is missing"):
        storage.read_range("b", 0, 1)


def claim(root: str, barrier: Barrier, number: int, action: str) -> None:
    """Try to be the one who wrote each of some files; who won leaves a note."""
    storage = Storage(root)
    for turn in range(ROUNDS):
        barrier.wait()
        data = b"%d" % number
        won = storage.create(f"c{turn}", data) if action == "create" else storage.replace("r", b"%d" % turn + data, WAS)
        if won:
            storage.write(f"won/{turn}-{number}", data)
        barrier.wait()
        if action == "replace" and number == 0:
            storage.write("r", WAS)
        barrier.wait()


WAS = b"as expected"


@pytest.mark.locks
@pytest.mark.parametrize("action", ["create", "replace"])
def test_one_of_eight_processes_wins(tmp_path: Path, action: str) -> None:
    storage = Storage(tmp_path)
    storage.write("r", WAS)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(CLAIMANTS)
    processes = [
        context.Process(target=claim, args=(str(tmp_path), barrier, number, action)) for number in range(CLAIMANTS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    winners = [name.removeprefix("won/").split("-") for name in storage.list("won")]
    assert [turn for turn, _ in winners] == [str(turn) for turn in range(ROUNDS)]
    if action == "create":
        assert [storage.read(f"c{turn}").decode() for turn in range(ROUNDS)] == [number for _, number in winners]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_file_system_without_links_has_one_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, faster = Storage(tmp_path), [False]

    def refuse(_: object, path: Path) -> None:
        if faster[0]:
            path.write_bytes(b"another's")
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert storage.create("a/b", b"ours")
    faster[0] = True
    assert not storage.create("a/c", b"ours")
    assert (storage.read("a/b"), storage.read("a/c")) == (b"ours", b"another's")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b", "c"]
