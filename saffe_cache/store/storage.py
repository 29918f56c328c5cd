"""Files under a cache's root, on a local disk or behind a URL.

Locally a write is: temporary name, fsync, rename, fsync of the folder, so that after a crash a file is
the old one or the new one, whole. Behind a URL one PUT of an object store has that property by itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from saffe_cache.durable import Buffer, make_folder, write_whole
from saffe_cache.features import CacheError

_LOCK_NAME = ".saffe-lock"


class Storage:
    """Named byte strings under a root. Names use `/` and never start with it."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self._local = None if "://" in self.root else Path(self.root).expanduser().absolute()
        if self._local is None:
            self._filesystem, self._prefix = fsspec.core.url_to_fs(self.root)
            if isinstance(self._filesystem, LocalFileSystem):  # file:///folder
                self._local = Path(self._prefix)

    def local_path(self, name: str) -> Path | None:
        """Where a name lies on the local disk; None behind a URL.

        Raises:
            CacheError: the name leads out of the cache.
        """
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise CacheError(f"{self.root}: {name!r} is no name inside a cache.")
        return self._local / name if self._local is not None else None

    def exists(self, name: str) -> bool:
        path = self.local_path(name)
        return path.exists() if path is not None else bool(self._filesystem.exists(f"{self._prefix}/{name}"))

    def read(self, name: str) -> bytes:
        """
        Raises:
            CacheError: there is no such file.
        """
        path = self.local_path(name)
        try:
            if path is not None:
                return path.read_bytes()
            return bytes(self._filesystem.cat_file(f"{self._prefix}/{name}"))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise CacheError(
                f"{self.root}: {name} is missing. Restore it from a copy, or extract into a new cache."
            ) from None

    def write(self, name: str, *parts: Buffer) -> None:
        """Durable and whole when this returns."""
        path = self.local_path(name)
        if path is None:
            self._filesystem.pipe_file(f"{self._prefix}/{name}", b"".join(parts))
        else:
            write_whole(path, *parts)

    def remove_folder(self, name: str) -> None:
        """Remove a folder and all in it; nothing happens where it does not exist."""
        path = self.local_path(name)
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
        elif self.exists(name):
            self._filesystem.rm(f"{self._prefix}/{name}", recursive=True)

    def remove_partial_files(self) -> None:
        """Remove what a killed writer left under temporary names. Only the writer may call this."""
        if self._local is not None:
            for path in self._local.rglob(".*.partial"):
                path.unlink(missing_ok=True)

    def read_json(self, name: str) -> dict[str, Any]:
        """
        Raises:
            CacheError: the file is missing, or is not a JSON object.
        """
        try:
            value = json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise CacheError(f"{self.root}: {name} is not JSON ({error}). Restore it from a copy.") from None
        if not isinstance(value, dict):
            raise CacheError(f"{self.root}: {name} is not a JSON object. Restore it from a copy.")
        return value

    @contextmanager
    def writer_lock(self) -> Iterator[None]:
        """Hold the cache for one writer. The lock goes with its process, however that ends.

        Raises:
            CacheError: another process writes to this cache.
        """
        if self._local is None:  # object stores have no lock that every one of them honours
            yield
            return
        make_folder(self._local)
        with _locked(self._local / _LOCK_NAME) as file:
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, process {os.getpid()}")
            file.flush()
            yield


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """A lock file, which is removed at the end: other programs take it for a foreign body in a Zarr group."""
    is_ours = False
    while not is_ours:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise CacheError(
                    f"{path.parent}: another process is writing to it ({file.read().strip()}). "
                    "Wait for it to end, or stop it, and run this again."
                ) from None
            is_ours = _is_at(path, file)
            if is_ours:  # else its last holder removed it after we had opened it
                try:
                    yield file
                finally:
                    path.unlink(missing_ok=True)


def _is_at(path: Path, file: IO[str]) -> bool:
    """Is this open file still the one of that name?"""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
