"""Files below a folder of the local disk, and below a URL that fsspec opens."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec

from saffe_cache.core.atomic_io import Buffer, create_whole, replace_whole, write_whole


class LocalFiles:
    """Files below a folder. What is written is complete and durable when the call returns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        with (self.folder / name).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def write(self, name: str, *parts: Buffer) -> None:
        write_whole(self.folder / name, *parts)

    def create(self, name: str, *parts: Buffer) -> bool:
        return create_whole(self.folder / name, *parts)

    def replace(self, name: str, data: bytes, was: bytes | None) -> bool:
        return replace_whole(self.folder, self.folder / name, data, was)

    def list(self, prefix: str) -> list[str]:
        found = (path for path in (self.folder / prefix).rglob("[!.]*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)


class ForeignFiles:
    """Files below a URL that fsspec opens. Two that create or replace a file at the same instant may both succeed."""

    def __init__(self, url: str) -> None:
        self._filesystem, self._prefix = fsspec.core.url_to_fs(url)

    def exists(self, name: str) -> bool:
        return bool(self._filesystem.exists(f"{self._prefix}/{name}"))

    def read(self, name: str) -> bytes:
        return bytes(self._filesystem.cat_file(f"{self._prefix}/{name}"))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        return bytes(self._filesystem.cat_file(f"{self._prefix}/{name}", start, stop))

    def write(self, name: str, *parts: Buffer) -> None:
        self._filesystem.pipe_file(f"{self._prefix}/{name}", b"".join(parts))

    def create(self, name: str, *parts: Buffer) -> bool:
        return self.replace(name, b"".join(parts), None)

    def replace(self, name: str, data: bytes, was: bytes | None) -> bool:
        if (self.read(name) if self.exists(name) else None) != was:
            return False
        self.write(name, data)
        return True

    def list(self, prefix: str) -> list[str]:
        start = len(self._prefix) + 1
        return sorted(path[start:] for path in self._filesystem.find(f"{self._prefix}/{prefix}"))

    def remove(self, name: str) -> None:
        if self.exists(name):
            self._filesystem.rm_file(f"{self._prefix}/{name}")

    def remove_folder(self, name: str) -> None:
        if self.exists(name):
            self._filesystem.rm(f"{self._prefix}/{name}", recursive=True)
