"""Files below a folder of the local disk, and below a URL that fsspec opens."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import weakref
from functools import cache
from pathlib import Path

import fsspec
import numpy as np

from saffe_cache.core.atomic_io import Buffer, create_whole, replace_whole, write_whole


class LocalFiles:
    """Files below a folder. What is written is complete and durable when the call returns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def read_buffer(self, name: str) -> Buffer:
        with (self.folder / name).open("rb") as file:
            found = np.empty(os.fstat(file.fileno()).st_size, np.uint8)  # in huge pages, unlike `bytes`
            return found.data[: file.readinto(found.data)].toreadonly()

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

    read_buffer = read

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


class MappedFile:
    """A file in memory, read-only. It is not kept open, because a process may have only 1,024 files open.

    (Python's own `mmap` keeps a descriptor of each; its `trackfd=False` is younger than Python 3.11.)
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError if there is no such file, or no more can be mapped."""
        self._address = 0
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if os.name == "nt":  # where open files are not few
                self.bytes = np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint8)
                return
            address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        self._address = address
        memory = (ctypes.c_ubyte * size).from_address(address)
        weakref.finalize(memory, _libc().munmap, address, size).atexit = False
        self.bytes = np.frombuffer(memoryview(memory), np.uint8)
        self.bytes.flags.writeable = False

    def will_need(self, start: int, stop: int) -> None:
        """Ask the operating system to read some bytes in advance, without waiting for them."""
        start = start // mmap.PAGESIZE * mmap.PAGESIZE
        if self._address:
            _libc().madvise(self._address + start, stop - start, mmap.MADV_WILLNEED)


_FAILED = ctypes.c_void_p(-1).value


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    size, whole = ctypes.c_size_t, ctypes.c_int
    library.mmap.argtypes = [ctypes.c_void_p, size, whole, whole, whole, ctypes.c_long]
    library.mmap.restype = ctypes.c_void_p
    library.munmap.argtypes = [ctypes.c_void_p, size]
    library.madvise.argtypes = [ctypes.c_void_p, size, whole]
    return library
