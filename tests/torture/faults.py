"""Faults of the machine: each ends a command in one line that says what to do, or is survived; then all goes on."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import mounts
from cases import Case, bytes_of, nothing
from forked import Action, Outcome, at_call
from table import Table, not_clean, not_recovered

from saffe_cache.sources.items import MediaFile

_ROOM = 2**30
_DISK_FULL = r"No space left on device\. Make room on the disk"
_TOO_LARGE = r"File too large\. Allow larger files \(ulimit -f\)"
_READ_ONLY = r"Read-only file system\. Make the disk writable"
_GONE = r"it vanished while it was written to.*Bring it back|No such file or directory|is missing"
_HANDLES = r"Too many open files|open files"
_MEMORY = r"memory|thread"
_WORKER = r"a decoding process was killed.*Run the same command again to resume"


def on_disk(case: Case) -> Case:
    """The case with its folder where disks are mounted."""
    place = case.work / "disk" / case.folder.name
    moved = [str(place) if part == str(case.folder) else part for part in case.arguments]
    moved_case = replace(case, folder=place, arguments=moved).with_reference()
    shutil.rmtree(place)
    return moved_case


def judge(case: Case, outcome: Outcome, words: str, fault: str, table: Table, mend: Callable[[], object]) -> bool:
    """One fault's end: survived, or an error in the promised words; whole behind it, and equal when run again.

    True where it was survived.
    """
    if outcome.status == case.status:
        mend()
        different = case.differences()
        problems = [f"these differ from an uninterrupted run: {different[:5]}"] if different else []
        table.add(fault, "survived, equal to an uninterrupted run", *problems)
        return True
    problems = not_clean(outcome, case, 1)
    if not re.search(words, outcome.last_line):
        problems.append(f"the error says {outcome.last_line!r}, expected {words!r}")
    mend()
    problems += case.damage()
    problems += not_recovered(case)
    table.add(fault, "error in one line, equal when run again", *problems)
    return False


def fill_disks(case: Case, table: Table, points: int) -> None:
    """Disks that hold a part of what the command writes, from nothing to nearly all."""
    needed = 1.2 * case.num_bytes
    for point in range(points):
        disk = case.folder.parent
        mounts.small_disk(disk, _ROOM)
        case.reset()
        mounts.resize(disk, max(4096, bytes_of(disk)) + int(needed * point / points))
        judge(case, case.run(), _DISK_FULL, f"disk full, {case.name}", table, partial(mounts.resize, disk, _ROOM))
        mounts.vanish(disk)


def limit_file_sizes(case: Case, table: Table, points: int) -> None:
    """A quota, which needs no mount: files beyond some size are refused; what a command says has room."""
    sizes = sorted({size for path in case.folder.rglob("*") if (size := path.stat().st_size) > 2**14})
    for size in sizes[:: max(1, len(sizes) // points)]:
        case.reset()
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size - 1, size - 1))
        judge(case, case.run(limit), _TOO_LARGE, f"file size limited, {case.name}", table, nothing)


def turn_read_only(case: Case, table: Table, calls: range) -> None:
    """The disk turns read-only: before the command, and at some of its writes."""
    for number in calls:
        case.reset()
        case.folder.mkdir(exist_ok=True)
        turn = partial(mounts.make_read_only, case.folder)
        arrange: Action = turn if number == 0 else at_call("replace", number, turn)
        outcome = case.run(arrange)
        judge(case, outcome, _READ_ONLY, f"folder read-only, {case.name}", table, partial(_unmount_all, case.folder))


def take_mounts_away(case: Case, table: Table, calls: range) -> None:
    """The disk that is written to is unmounted lazily, within a write or behind one; then it is mounted again."""
    disk, real = case.folder.parent, case.work / "real"
    for number in calls:
        for folder in (disk, real):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        mounts.show(real, disk)
        case.reset()
        outcome = case.run(at_call("replace", number, partial(mounts.vanish, disk), after=number % 2 == 0))
        fault = f"mount vanishes, {case.name}"
        strays = [path.relative_to(disk).as_posix() for path in disk.rglob("*") if path.is_file()]
        if outcome.status != case.status and strays:
            table.add(fault, "files in the empty folder below the mount", f"call {number}: {strays[:5]}")
        if not mounts.is_mounted(disk):
            shutil.rmtree(disk / case.folder.name, ignore_errors=True)
            mounts.show(real, disk)
        judge(case, outcome, _GONE, fault, table, nothing)
        mounts.vanish(disk)


def limit_handles(case: Case, table: Table, limits: range) -> None:
    for limit in limits:
        case.reset()
        arrange = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (limit, limit))
        judge(case, case.run(arrange), _HANDLES, f"few file handles, {case.name}", table, nothing)


def limit_memory(case: Case, table: Table, megabytes: range) -> None:
    """So much address space above what the process has at its start."""
    for more in megabytes:
        case.reset()
        judge(case, case.run(partial(_limit_memory, more)), _MEMORY, f"out of memory, {case.name}", table, nothing)


def _limit_memory(megabytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def kill_workers(case: Case, table: Table, photos: range) -> None:
    """A process that decodes is killed at its n-th photo."""
    processes = replace(case, arguments=[*case.arguments, "--decode-in", "processes"])
    for number in photos:
        case.reset()
        outcome = processes.run(partial(_die_at_photo, number))
        judge(processes, outcome, _WORKER, f"decoding process killed, {case.name}", table, nothing)


def _die_at_photo(number: int) -> None:
    read, parent, reads = MediaFile.read, os.getpid(), 0

    def dying(self: MediaFile) -> bytes:
        nonlocal reads
        reads += os.getpid() != parent
        if reads == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self)

    MediaFile.read = dying  # type: ignore[method-assign]


def stop_groups(case: Case, table: Table, calls: range) -> None:
    """SIGTERM to a job's every process, as schedulers send it."""
    processes = replace(case, arguments=[*case.arguments, "--decode-in", "processes"])
    for number in calls:
        case.reset()
        outcome = processes.run(at_call("replace", number, partial(os.killpg, 0, signal.SIGTERM)))
        problems = not_clean(outcome, case, 128 + signal.SIGTERM) + case.damage() + not_recovered(processes)
        table.add(f"SIGTERM to all processes, {case.name}", "stopped in one line, equal when run again", *problems)


def _unmount_all(folder: Path) -> None:
    while mounts.is_mounted(folder):
        mounts.vanish(folder)
