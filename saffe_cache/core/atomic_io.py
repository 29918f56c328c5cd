"""Files that are there whole or not at all, also after a crash, in folders that one process at a time writes to."""

from __future__ import annotations

import fcntl
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

Buffer = bytes | memoryview

LOCK_NAME = ".saffe-lock"

_held: dict[Path, IO[str]] = {}
"""The folders that this process holds, and their open lock files."""


class FolderInUseError(OSError):
    """Another process writes to the folder."""


def write_whole(path: Path, *parts: Buffer) -> None:
    """Write a file under a temporary name, fsync, rename, and fsync its folder.

    A crash leaves the old file or the new one, and perhaps a hidden `.NAME.….partial` beside it.

    Raises:
        OSError: with the file's name: the disk is full or gone.
    """
    _check_held(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with _errors_named(path):
        make_folder(path.parent)
        try:
            with temporary.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """To a log, for others to follow; a crash may leave a part of the line.

    Raises:
        OSError: with the file's name: the disk is full or gone.
    """
    _check_held(path)
    with _errors_named(path), path.open("ab") as file:
        file.write(f"{line}\n".encode())


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each durable: else a crash may lose the folder of a durable file."""
    if not folder.is_dir():
        _check_held(folder)
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _fsync_folder(folder.parent)


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed writer left in a folder under temporary names. Only who holds it may call this."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make a folder and hold it for one writer. The lock goes with its process, however that ends.

    The lock file is removed at the end: other programs take it for a foreign body in a Zarr group. What is written
    below the folder meanwhile is refused where the folder is another one than it was.

    Raises:
        FolderInUseError: another process holds it.
    """
    make_folder(folder)
    path, is_ours = folder.absolute() / LOCK_NAME, False
    while not is_ours:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise FolderInUseError(
                    f"{folder}: another process is writing to it ({file.read().strip()}). "
                    "Wait for it to end, or stop it, and run this again."
                ) from None
            is_ours = _is_at(path, file)
            if is_ours:  # else its last holder removed it after we had opened it
                try:
                    _held[path.parent] = file
                    _sign(file)
                    yield
                finally:
                    _held.pop(path.parent, None)
                    if _is_at(path, file):
                        with suppress(OSError):
                            path.unlink()


def _sign(file: IO[str]) -> None:
    """Who holds the lock, for others to read; on a full disk nobody is named."""
    holder = f"host {socket.gethostname()}, process {os.getpid()}".encode()
    with suppress(OSError):
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), holder)


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """What the system says of a write names no file, or the temporary one, of a folder that has gone perhaps."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        _check_held(path)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _check_held(path: Path) -> None:
    """A mount that vanishes leaves an empty folder of the same name, to which nothing may be written.

    Raises:
        OSError: the held folder that the path lies in has gone, or is another one.
    """
    parents = path.absolute().parents
    for folder, file in list(_held.items()):
        if folder in parents and not _is_at(folder / LOCK_NAME, file):
            raise OSError(
                f"{folder}: it has gone while it was written to: its disk was unmounted, it was moved, or its "
                f"{LOCK_NAME} removed. Bring it back, and run the same command again: it goes on from there."
            )


def _is_at(path: Path, file: IO[str]) -> bool:
    """Is this open file still the one of that name?"""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
