"""A writer that dies at any moment leaves the old cache or the new one, and goes on where it stopped."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_cases import (
    Contents,
    forget_encoder,
    group_path,
    image_contents,
    memory_folder,
    shard_files,
    text_contents,
    verify,
    write_contents,
)

from saffe_cache.core import atomic_io
from saffe_cache.core.atomic_io import FolderInUseError
from saffe_cache.core.features import CacheError
from saffe_cache.core.items import ItemTable
from saffe_cache.store import parts, reader
from saffe_cache.store.layout import encoder_group
from saffe_cache.store.manifest import read_encoder
from saffe_cache.store.parts import read_table
from saffe_cache.store.reader import open_cache
from saffe_cache.store.root import RootManifest, read_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.writer import EncoderWriter

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("no_fsync")]


class Died(BaseException):
    """What the dying writer raises; no `except Exception` catches it."""


def write_until(path: Path, contents: tuple[Contents, ...], num_writes: int) -> int:
    """Write, and die at the write number `num_writes`. Returns how many were begun; others may still be under way."""
    done = 0
    counting = threading.Lock()

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any) -> Any:
            nonlocal done
            with counting:
                if done == num_writes:
                    raise Died
                done += 1
            return real(*args)

        return write

    with pytest.MonkeyPatch.context() as patch:
        for method in ("write", "create", "replace", "remove"):
            patch.setattr(Storage, method, counted(getattr(Storage, method)))
        try:
            write_contents(path, *contents)
        except Died:
            assert done == num_writes
    return done


def check_readable(path: Path, contents: tuple[Contents, ...]) -> None:
    """All of the contents is there, and the extraction that wrote it is finished."""
    cache = open_cache(path)
    assert len(cache.table) >= max(one.num_inputs for one in contents)
    for one in contents:
        encoder = cache.encoder(one.modality)
        assert encoder.manifest.finished_rows >= one.num_inputs
        for name, (_, rows) in one.arrays.items():
            np.testing.assert_array_equal(encoder.array(name).read_stored(np.arange(len(rows))), rows)


def first(path: Path) -> tuple[Contents, ...]:
    return ()


def growth(path: Path) -> tuple[Contents, ...]:
    """7 inputs: every array has a tail shard, of 3 or of 1 row."""
    before = (image_contents(7), text_contents(7))
    write_contents(path, *before)
    return before


def addition(path: Path) -> tuple[Contents, ...]:
    """A layer and a vector are asked for later, for inputs that are there already."""
    before = (image_contents(13).without("hidden_states/3"), text_contents(13).without("projected"))
    write_contents(path, *before)
    return before


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [first, growth, addition])
def test_death_at_every_single_write(prepare: Callable[[Path], tuple[Contents, ...]]) -> None:
    after = (image_contents(13), text_contents(13))
    with memory_folder() as memory_path:
        before = prepare(memory_path / "before")
        whole = memory_path / "whole"
        if before:
            shutil.copytree(memory_path / "before", whole)
        total = write_until(whole, after, 10**9)
        check_readable(whole, after)
        expected = shard_files(whole)
        assert total > 10
        for num_writes in range(total + 1):
            path = memory_path / "cache"
            if before:
                shutil.copytree(memory_path / "before", path)
            assert write_until(path, after, num_writes) == num_writes
            if before or read_root(Storage(path)) is not None:
                assert verify(path)[1] == []
            if before:
                check_readable(path, before)
            write_contents(path, *after)
            assert verify(path)[1] == []
            check_readable(path, after)
            assert shard_files(path) == expected, f"after death at write {num_writes} of {total}"
            shutil.rmtree(path)


def test_resuming_keeps_what_is_committed(tmp_path: Path) -> None:
    """Half of the shards are there before the resumed writer begins; it writes none of them again."""
    after = (image_contents(60),)
    total = write_until(tmp_path / "whole", after, 10**9)
    done = write_until(tmp_path / "cache", after, total - 20)
    rows = {n: a.rows for n, a in read_encoder(Storage(tmp_path / "cache"), after[0].key).arrays.items()}
    assert min(rows.values()) > 20
    resumed = write_until(tmp_path / "cache", after, 10**9)
    assert resumed < 40 < done
    assert shard_files(tmp_path / "cache") == shard_files(tmp_path / "whole")


def test_error_reaches_the_caller_and_ends_committing(tmp_path: Path) -> None:
    """A full disk: a thread that writes a shard raises, `put` or `finish` passes the error on."""
    contents = image_contents(13)
    real = Storage.write

    def full(self: Storage, name: str, *parts: bytes) -> None:
        if name.endswith("hidden_states/3/c/1/0/0"):
            raise OSError(28, "No space left on device")
        real(self, name, *parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "write", full)
        with pytest.raises(OSError, match="No space left"):
            write_contents(tmp_path, contents)
    assert read_encoder(Storage(tmp_path), contents.key).arrays["hidden_states/3"].rows == 4
    with pytest.raises(CacheError, match="unfinished"):
        open_cache(tmp_path).encoder("image")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shard-helper")]
    write_contents(tmp_path, contents)
    check_readable(tmp_path, (contents,))


def test_damaged_tail_shard_is_not_extended(tmp_path: Path) -> None:
    write_contents(tmp_path, image_contents(7))
    shard = group_path(tmp_path, image_contents(7)) / "pooled" / "c" / "1" / "0"
    shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    with pytest.raises(CacheError, match=r"pooled/c/1/0: its rows differ"):
        write_contents(tmp_path, image_contents(13))


def test_temporary_files_are_ignored_and_removed(tmp_path: Path) -> None:
    contents = image_contents(7)
    write_contents(tmp_path, contents)
    left = group_path(tmp_path, contents) / "pooled" / "c" / "1" / ".0.123.partial"
    left.write_bytes(b"half a shard")
    assert verify(tmp_path)[1] == []
    write_contents(tmp_path, contents)
    assert not left.exists()


def test_an_array_that_was_never_committed_is_written_again(tmp_path: Path) -> None:
    contents = image_contents(13)
    write_contents(tmp_path, contents)
    forget_encoder(tmp_path, contents, "pooled")
    write_contents(tmp_path, contents)
    check_readable(tmp_path, (contents,))


def test_a_file_is_durable_under_its_name_when_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    replace = Path.replace

    def sync(descriptor: int) -> None:
        events.append("sync " + os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))

    def rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    Storage(tmp_path).write("a/b/file", b"bytes")
    events = [re.sub(r"\.file\..*\.partial", "TEMPORARY", event) for event in events]
    assert events == ["sync .", "sync a", "sync a/b/TEMPORARY", "rename", "sync a/b"]
    assert (tmp_path / "a/b/file").read_bytes() == b"bytes"


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(tmp_path)
    storage.write("file", b"old")

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        storage.write("file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert storage.read("file") == b"old"


HOLDER = """
import sys, time
from saffe_cache.store.storage import Storage
with Storage(sys.argv[1]).writer_lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.locks
def test_a_second_writer_is_refused_until_the_first_is_dead(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    storage = Storage(tmp_path)
    expected = f"another process is writing to it .host {re.escape(os.uname().nodename)}, process {holder.pid}."
    with pytest.raises(FolderInUseError, match=expected), storage.writer_lock():
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with storage.writer_lock():
        assert f"process {os.getpid()}" in storage.read(".saffe-lock").decode()
        with pytest.raises(FolderInUseError, match="another process"), storage.writer_lock():
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.locks
def test_lock_file_removed_by_its_holder_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """We open the file, the holder ends and removes it, we lock what has no name any more: another could too."""
    storage, real = Storage(tmp_path), atomic_io.lock_descriptor
    calls = []

    def lock(descriptor: int, blocking: bool, **options: float) -> bool:
        if not calls:
            (tmp_path / ".saffe-lock").unlink()
        calls.append(descriptor)
        return real(descriptor, blocking=blocking, **options)

    monkeypatch.setattr(atomic_io, "lock_descriptor", lock)
    with storage.writer_lock():
        assert len(calls) == 2
        with pytest.raises(FolderInUseError, match="another process"), storage.writer_lock():
            pass
    assert not list(tmp_path.iterdir())


def test_the_committed_rows_do_not_depend_on_the_portions(tmp_path: Path) -> None:
    contents = text_contents(40)
    for portion in (1, 7, 40):
        write_contents(tmp_path / str(portion), contents, portion=portion)
    found = [read_encoder(Storage(tmp_path / str(portion)), contents.key).to_json() for portion in (1, 7, 40)]
    assert found[0] == found[1] == found[2]
    assert shard_files(tmp_path / "1") == shard_files(tmp_path / "7") == shard_files(tmp_path / "40")
    assert (tmp_path / "1" / encoder_group(contents.key) / "pooled" / "c" / "6" / "0").exists()


def test_layer_that_is_being_added_is_hidden_from_readers(tmp_path: Path) -> None:
    """The manifest names it before its block and its first shard are written."""
    contents = image_contents(13)
    write_contents(tmp_path, contents.without("hidden_states/1"))
    storage, spec = Storage(tmp_path), contents.arrays["hidden_states/1"][0]
    EncoderWriter(storage, read_encoder(storage, contents.key), {"hidden_states/1": (spec, 13)})
    assert verify(tmp_path)[1] == []
    encoder = open_cache(tmp_path).encoder("image")
    assert (encoder.layers, encoder.block_layers) == ([3], [])
    shutil.copytree(tmp_path, tmp_path / "copy")
    write_until(tmp_path, (contents,), write_until(tmp_path / "copy", (contents,), 10**9) - 2)
    encoder = open_cache(tmp_path).encoder("image")  # the record of the tail and the manifest are missing
    assert (len(encoder.array("hidden_states/1")), encoder.layers, encoder.block_layers) == (12, [3], [1])
    write_contents(tmp_path, contents)
    assert open_cache(tmp_path).encoder("image").layers == [1, 3]


@pytest.mark.parametrize("read", [open_cache, verify])
def test_readers_follow_a_replaced_table(
    tmp_path: Path, read: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, each time between the root's reading and the table's."""
    write_contents(tmp_path, image_contents(3))
    grow, tables = iter((7, 13)), []

    def late(storage: Storage, root: RootManifest) -> ItemTable:
        tables.append([name.partition("-")[0] for name in root.tables])
        for count in grow:
            with monkeypatch.context() as patch:
                for module in (reader, parts):
                    patch.setattr(module, "read_table", read_table)
                write_contents(tmp_path, image_contents(count))
            break
        return read_table(storage, root)

    for module in (reader, parts):
        monkeypatch.setattr(module, "read_table", late)
    result = read(tmp_path)
    assert tables == [["1"], ["2"], ["3"]]
    assert not isinstance(result, tuple) or result[1] == []
