"""Named byte strings below a root: creation and replacement have one winner."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from s3_server import BUCKET, S3Proxy, url

from saffe_cache.core.features import CacheError
from saffe_cache.store.storage import Storage

CLAIMANTS, ROUNDS = 8, 5


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        request.getfixturevalue("s3")
    return Storage({"local": tmp_path, "memory": f"memory://{tmp_path.name}/x", "s3": url(tmp_path)}[request.param])


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


def test_one_of_eight_clients_wins_on_s3(s3: S3Proxy, tmp_path: Path) -> None:
    """While a fifth of all requests fail, half of them with only their answer lost."""
    s3.share_failing = 0.2
    storage = Storage(url(tmp_path))
    storage.write("r", WAS)
    won: list[tuple[str, int]] = []

    def race(number: int, data: bytes) -> None:
        mine = Storage(url(tmp_path))
        won.extend([("create", number)] if mine.create("c", data) else [])
        won.extend([("replace", number)] if mine.replace("r", data, WAS) else [])

    threads = [threading.Thread(target=race, args=(number, b"equal bytes")) for number in range(CLAIMANTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(action for action, _ in won) == ["create", "replace"]


def test_large_objects_and_failing_requests(s3: S3Proxy, tmp_path: Path) -> None:
    s3.share_failing = 0.05
    storage, data = Storage(url(tmp_path)), os.urandom(40 * 2**20)
    storage.write("large", data)
    assert storage.read("large") == data
    assert storage.read_range("large", 2**20, 7) == data[2**20 : 2**20 + 7]
    assert [path for method, path in s3.requests if method == "POST" and "uploads" in path]  # it went in parts
    storage.remove_folder("large")
    storage.remove_folder("nothing")


def test_lists_are_whole_while_answers_are_cut(s3: S3Proxy, tmp_path: Path) -> None:
    storage = Storage(url(tmp_path))
    names = [f"log/{number}" for number in range(5)]
    for name in names:
        storage.write(name, b"")
    s3.share_failing = 0.5
    for _ in range(10):
        assert storage.list("log") == names


def test_object_is_read_while_it_is_replaced_and_answers_cut(s3: S3Proxy, tmp_path: Path) -> None:
    """The client cannot go on with the rest of another object."""
    storage, ended = Storage(url(tmp_path)), threading.Event()
    contents = [bytes([number]) * 1000 for number in range(10)]
    storage.write("a", contents[0])

    def replace() -> None:
        while not ended.is_set():
            for content in contents:
                Storage(url(tmp_path)).write("a", content)

    thread = threading.Thread(target=replace)
    thread.start()
    s3.share_failing = 0.5
    try:
        found = [storage.read("a") for _ in range(20)]
    finally:
        ended.set()
        thread.join()
    assert set(found) <= set(contents)


def test_environment_without_numbers_is_refused(s3: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFFE_RETRY_SECONDS", "soon")
    with pytest.raises(ValueError, match=r"SAFFE_RETRY_SECONDS: found 'soon', expected a number of 0 or more"):
        Storage(f"s3://{BUCKET}/x")


def test_a_client_waits_for_a_server_that_comes_back(s3: S3Proxy, tmp_path: Path) -> None:
    storage = Storage(url(tmp_path))
    s3.stop()
    threading.Timer(1.5, s3.start).start()
    storage.write("a", b"1")
    assert storage.read("a") == b"1"


def test_what_is_wrong_with_a_store_is_told(s3: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFFE_RETRY_SECONDS", "1")
    with pytest.raises(OSError, match="there is no such bucket"):
        Storage("s3://other/cache").write("a", b"")
    with pytest.raises(OSError, match="there is no such bucket"):
        Storage("s3://other/cache").list("a")
    storage = Storage(url(tmp_path))
    s3.refuses = True
    for action in (storage.read, storage.write, storage.create):
        with pytest.raises(OSError, match=r"the store refuses access .InvalidAccessKeyId.*Check the credentials"):
            action("a")
    s3.stop()
    with pytest.raises(OSError, match=r"nothing listens at the server's address.*Run the same command again"):
        storage.read("a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no.such.host.invalid")
    with pytest.raises(OSError, match="the server's name cannot be resolved"):
        Storage(url(tmp_path)).create("a", b"")
