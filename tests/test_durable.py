"""Files that are whole or absent, in folders that one process holds and that may vanish."""

from __future__ import annotations

from pathlib import Path

import pytest

from saffe_cache.core.atomic_io import LOCK_NAME, FolderInUseError, append_line, hold_folder, make_folder, write_whole


def write(folder: Path) -> None:
    write_whole(folder / "below" / "file", b"bytes")


def append(folder: Path) -> None:
    append_line(folder / "log", "line")


def make(folder: Path) -> None:
    make_folder(folder / "below")


@pytest.mark.parametrize("action", [write, append, make])
def test_nothing_is_written_where_a_held_folder_has_vanished(tmp_path: Path, action: object) -> None:
    """As after `umount --lazy`: an empty folder has the name of the one that was held."""
    folder = tmp_path / "mount" / "cache"
    with hold_folder(folder):
        action(folder)  # type: ignore[operator]
        (tmp_path / "mount").rename(tmp_path / "elsewhere")
        (tmp_path / "mount").mkdir()
        with pytest.raises(OSError, match=r"it vanished while it was written to.*run the same command again"):
            action(folder)  # type: ignore[operator]
    assert not list((tmp_path / "mount").iterdir())


def test_the_lock_of_another_is_left_alone(tmp_path: Path) -> None:
    with hold_folder(tmp_path / "cache"):
        (tmp_path / "cache").rename(tmp_path / "elsewhere")
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / LOCK_NAME).write_text("another's")
    assert (tmp_path / "cache" / LOCK_NAME).read_text() == "another's"


@pytest.mark.locks
def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    with hold_folder(tmp_path):
        second = pytest.raises(FolderInUseError, match=r"another process is writing to it \(host .*, process \d+\)")
        with second, hold_folder(tmp_path):
            pass
        write_whole(tmp_path / "file", b"bytes")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_errors_of_the_system_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_whole(tmp_path / "file", b"bytes")
    assert caught.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())
