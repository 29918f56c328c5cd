"""Files under a cache's root, on a local disk or behind a URL.

Locally a write is: temporary name, fsync, rename, fsync of the folder, so that after a crash a file is
the old one or the new one, whole. Behind a URL one PUT of an object store has that property by itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from saffe_cache.core.atomic_io import Buffer, hold_folder, write_whole
from saffe_cache.core.features import CacheError
from saffe_cache.store.layout import ADVICE


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
            raise CacheError(f"{self.root}: {name} is missing. {ADVICE}") from None

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
            FolderInUseError: another process writes to this cache.
        """
        if self._local is None:  # object stores have no lock that every one of them honours
            yield
            return
        with hold_folder(self._local):
            yield
