"""Files that are there whole or not at all, also after a crash."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

Buffer = bytes | memoryview


def write_whole(path: Path, *parts: Buffer) -> None:
    """Write a file under a temporary name, fsync, rename, and fsync its folder.

    A crash leaves the old file or the new one, and perhaps a hidden `.NAME.….partial` beside it.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each durable: else a crash may lose the folder of a durable file."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _fsync_folder(folder.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
