"""Files that are complete or absent, also after a crash, in folders that one process at a time writes to."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

Buffer = bytes | memoryview

LOCK_NAME = ".saffe-lock"
COMMIT_NAME = ".saffe-commit"

_HOLDER_START = 1
"""The first byte of the lock file that others can read: Windows locks the byte before it."""

_POLL_SECONDS = 0.005
"""How often a lock is tried that is held for the time of one small write."""

_SHARED_PATIENCE = 2.0
"""Seconds for which a shared lock is tried: one of its holders has the folder for itself for a moment as it leaves."""

_held: dict[Path, IO[bytes]] = {}
"""The folders that this process holds, and their open lock files."""


class FolderInUseError(OSError):
    """Another process writes to the folder."""


def write_whole(path: Path, *parts: Buffer) -> None:
    """Write a file under a temporary name, fsync, rename, and fsync its folder.

    A crash leaves the old file or the new one, and perhaps a hidden `.NAME.….partial` beside it.

    Raises:
        OSError: with the file's name: the disk is full or gone.
    """
    with whole_file(path) as file:
        for part in parts:
            file.write(part)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which `write_whole` would write in one piece; an error in the block leaves the old file."""
    with _errors_named(path), _temporary_file(path) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()  # Windows renames no open file
        Path(file.name).replace(path)
        _fsync_folder(path.parent)


def create_whole(path: Path, *parts: Buffer) -> bool:
    """Write a file only if there is none of that name; of several claimants exactly one gets True.

    It is complete and durable when True is returned. Errors as of `write_whole`.
    """
    if path.exists():
        return False
    with _errors_named(path), _temporary_file(path) as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        file.close()
        if not _link(Path(file.name), path):
            return False
        _fsync_folder(path.parent)
    return True


def replace_whole(folder: Path, path: Path, data: bytes, was: bytes | None) -> bool:
    """Write a file below a folder only if its content is `was` (None: there is no file); otherwise return False.

    All who replace files of that folder in this way wait for one another. Errors as of `write_whole`.
    """
    with _commit_lock(folder):
        if (path.read_bytes() if path.exists() else None) != was:
            return False
        write_whole(path, data)
        return True


@contextmanager
def _temporary_file(path: Path) -> Iterator[IO[bytes]]:
    """An open file beside a path, which is removed at the end unless it was renamed."""
    _check_held(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> bool:
    """Give a file a second name; False if another file has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS repeats a request whose answer was lost, and then refuses what it has done itself
        return temporary.stat().st_nlink > 1
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        with _commit_lock(path.parent):  # a file system without links
            if path.exists():
                return False
            temporary.replace(path)
    return True


@contextmanager
def _commit_lock(folder: Path) -> Iterator[None]:
    """Wait for all others that hold this lock of a folder; it is held for the time of one small write."""
    make_folder(folder)
    path = folder.absolute() / COMMIT_NAME
    file = _lock(path, blocking=True)
    try:
        yield
    finally:
        _unlock(path, file)


def append_line(path: Path, line: str) -> None:
    """Append to a log; a crash may leave a part of the line. Errors as of `write_whole`."""
    _check_held(path)
    with _errors_named(path), path.open("ab") as file:
        file.write(f"{line}\n".encode())


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each durable; otherwise a crash could lose the folder of a durable file."""
    if not folder.is_dir():
        _check_held(folder)
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _fsync_folder(folder.parent)


def remove_partial_files(folder: Path) -> None:
    """Remove temporary files that a killed writer left in a folder. Only the process that holds it may call this."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def remove_partial_files_below(folder: Path) -> None:
    """As `remove_partial_files`, in all folders below too."""
    for path in folder.rglob(".*.partial"):
        path.unlink(missing_ok=True)


@contextmanager
def hold_folder(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Make a folder and hold it for one writer. The lock ends with its process, however that ends.

    The lock file is removed at the end: other programs take it for a foreign body in a Zarr group. While the folder is
    held, writing below it fails if the folder has vanished or been replaced.

    Args:
        shared: hold it with others that share it. The last of them removes temporary files that killed ones left.

    Raises:
        FolderInUseError: another process holds it.
    """
    make_folder(folder)
    path = folder.absolute() / LOCK_NAME
    file = _lock(path, shared=shared)
    _held[path.parent] = file
    try:
        with suppress(OSError):  # on a full disk nobody is named
            os.truncate(file.fileno(), 0)
            holder = f"host {socket.gethostname()}, process {os.getpid()}"
            os.write(file.fileno(), b"\n" * _HOLDER_START + holder.encode())
        yield
    finally:
        _held.pop(path.parent, None)
        if shared:
            _unlock_shared(path, file)
        else:
            _unlock(path, file)


def _lock(path: Path, *, shared: bool = False, blocking: bool = False) -> IO[bytes]:
    """The open lock file, which this process has locked; where the system has no locks, a warning says so."""
    patience = time.monotonic() + (_SHARED_PATIENCE if shared else 0)
    while True:
        file = path.open("a+b")
        try:
            is_locked = _lock_descriptor(file, shared=shared, blocking=blocking)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                file.close()
                raise
            logger.warning("%s: this system has no file locks. Do not write to it from two processes.", path.parent)
            return file
        if is_locked and _is_at(path, file):
            return file
        with file:
            if not is_locked and time.monotonic() >= patience:
                file.seek(_HOLDER_START)
                raise FolderInUseError(
                    f"{path.parent}: another process is writing to it ({file.read().decode().strip()}). "
                    "Wait for it to end, or stop it, and run this again."
                )
        # else its last holder removed the file after we had opened it, or one of those who share it is leaving
        if not is_locked:
            time.sleep(_POLL_SECONDS)


def _lock_descriptor(file: IO[bytes], *, shared: bool, blocking: bool = False) -> bool:
    """Lock an open file, or change its lock; False if another process has a lock that excludes this one.

    Raises OSError (ENOSYS) where the system has no such lock.
    """
    if not shared:
        return lock_descriptor(file.fileno(), blocking=blocking, poll_interval=_POLL_SECONDS)
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no shared locks")
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(path: Path, file: IO[bytes]) -> None:
    """Remove the lock file and release the lock, in the order in which the file cannot be another's yet."""
    with file, suppress(OSError):
        if os.name == "nt":  # where an open file cannot be removed, ours no more than another's
            file.close()
            path.unlink()
        elif _is_at(path, file):
            path.unlink()


def _unlock_shared(path: Path, file: IO[bytes]) -> None:
    """Release a shared lock. The last of its holders also removes what killed ones left."""
    with file, suppress(OSError):
        if _lock_descriptor(file, shared=False):
            remove_partial_files_below(path.parent)
            _unlock(path, file)


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Errors of the system name no file, or the temporary one; say which file, or that its folder has vanished."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        _check_held(path)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _check_held(path: Path) -> None:
    """Raise OSError if a held folder has vanished: a mount that is gone leaves an empty folder of the same name."""
    parents = path.absolute().parents
    for folder, file in list(_held.items()):
        if folder in parents and not _is_at(folder / LOCK_NAME, file):
            raise OSError(
                f"{folder}: it vanished while it was written to: its disk was unmounted, it was moved, or its "
                f"{LOCK_NAME} was removed. Bring it back and run the same command again to resume."
            )


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Whether this open file is still the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def _fsync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
