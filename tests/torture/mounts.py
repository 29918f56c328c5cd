"""Disks that are full, read-only or gone: mounts that only this process and its children see.

They live in a mount namespace of this process, and so end with it, however it ends.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_NEW_NAMESPACE, _NEW_USER = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18
_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def can_mount() -> bool:
    """Enter a namespace of our own, if a child can. Before any thread is started."""
    child = os.fork()
    if child == 0:
        entered = False
        try:
            entered = _enter()
        finally:
            os._exit(0 if entered else 1)
    return os.waitpid(child, 0)[1] == 0 and _enter()


def _enter() -> bool:
    """Without root, the namespace is one in which this user is root."""
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_NEW_NAMESPACE):
        if _libc.unshare(_NEW_USER | _NEW_NAMESPACE):
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return not _libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None)


def small_disk(folder: Path, num_bytes: int) -> None:
    """An empty disk in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("tmpfs", folder, "tmpfs", 0, f"size={num_bytes}")


def resize(folder: Path, num_bytes: int) -> None:
    _mount("tmpfs", folder, "tmpfs", _REMOUNT, f"size={num_bytes}")


def show(real: Path, folder: Path) -> None:
    """The folder now shows what is in another one."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount(str(real), folder, "", _BIND, "")


def make_read_only(folder: Path) -> None:
    """From now on, for files that are opened from now on."""
    show(folder, folder)
    _mount("", folder, "", _BIND | _REMOUNT | _READ_ONLY, "")


def vanish(folder: Path) -> None:
    """As `umount --lazy`: the name leads nowhere at once, and files that are open stay so."""
    _check(_libc.umount2(os.fsencode(folder), _DETACH), f"umount {folder}")


def is_mounted(folder: Path) -> bool:
    """Also where the same disk is mounted upon itself."""
    return any(line.split()[4] == str(folder) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def _mount(source: str, folder: Path, kind: str, flags: int, data: str) -> None:
    status = _libc.mount(source.encode(), os.fsencode(folder), kind.encode(), flags, data.encode())
    _check(status, f"mount {kind} at {folder}")


def _check(status: int, what: str) -> None:
    if status:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: {what}")
