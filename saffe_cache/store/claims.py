"""Claims: which process does a piece of work. The store decides between claimants, by exclusive creation.

A claim is a file `PIECE.G` with the name of its holder, which writes it again every few seconds with a higher counter.
A claim is dead if its holder's process is gone from this machine, if the holder gave up, or if the counter stood still
for a minute by the clock of whoever looks: no clocks are compared. Taking a dead claim over creates `PIECE.(G + 1)`, so
of two that take it over one wins. A holder that was only slow sees the new file and stops; what it writes until then
equals what its successor writes.

A lease is a claim on a whole cache behind a URL, where a file lock reaches no further than one machine: one writer, or
any number of workers of one plan.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from saffe_cache.core.atomic_io import FolderInUseError
from saffe_cache.core.features import CacheError
from saffe_cache.core.json_schema import made_of
from saffe_cache.store.storage import Storage

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
DEAD_AFTER_SECONDS = 60.0
_LEASES = "writers"
_beating: set[str] = set()
"""Tokens of the claims that this process holds; its others are left from a store that was away when they ended."""
_LEASE_ATTEMPTS = 4
"""Two writers that begin at the same instant see each other, withdraw and try again after a random time."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a claim."""

    owner: str
    """Its name for people, such as "rank 3"."""
    token: str
    """Its name for programs, which no other process has."""
    host: str
    pid: int
    machine: str = ""
    """The running system and its process namespace; empty where they are unknown, and nobody judges by `pid`."""
    started: str = ""
    """When the process started, in the system's own unit: another process may get the same `pid` later."""
    counter: int = 0
    at: float = 0.0
    """When it was written, in seconds since 1970 by the holder's clock: for people alone."""
    failed: str | None = None
    """Why the holder gave up; empty if it was interrupted or has finished."""
    crew: str = ""
    """Shared by processes whose driver decides which of them works on what; empty without a driver."""

    @staticmethod
    def current(owner: str) -> Holder:
        """This process."""
        pid = os.getpid()
        return Holder(
            owner=owner,
            token=uuid.uuid4().hex[:12],
            host=socket.gethostname(),
            pid=pid,
            machine=_machine(),
            started=_process_start(pid) or "",
        )

    @staticmethod
    def from_bytes(data: bytes) -> Holder | None:
        """None if the bytes are no claim."""
        try:
            return made_of(Holder, json.loads(data))
        except (ValueError, TypeError, KeyError):
            return None

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @property
    def has_ended(self) -> bool:
        """Whether it gave up, or was a process of this machine that is gone, or this one, which holds it no more."""
        is_here = bool(self.machine) and self.machine == _machine()
        is_left = self.pid == os.getpid() and self.token not in _beating
        return self.failed is not None or (is_here and (_process_start(self.pid) != self.started or is_left))

    def __str__(self) -> str:
        return f"{self.owner}, host {self.host}, process {self.pid}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """When a process of this machine started, in ticks since its boot; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def seconds_since(holder: Holder) -> float:
    """Since the last heartbeat, by the clocks of two machines that may differ: for people alone."""
    return max(0.0, time.time() - holder.at)


class Watch:
    """Remembers when each claim last changed, by this process's clock."""

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage, self._clock = storage, clock
        self._seen: dict[str, tuple[bytes, float]] = {}

    def look(self, name: str) -> tuple[Holder | None, float]:
        """The holder of a claim, and for how many seconds it has not changed: infinite if it has ended.

        The holder is None if there is no such claim, or it is damaged.
        """
        try:
            data = self._storage.read(name)
        except CacheError:
            return None, float("inf")
        content, since = self._seen.get(name, (b"", 0.0))
        if content != data:
            since = self._clock()
            self._seen[name] = data, since
        holder = Holder.from_bytes(data)
        return holder, float("inf") if holder and holder.has_ended else self._clock() - since

    def is_dead(self, name: str) -> bool:
        return self.look(name)[1] >= DEAD_AFTER_SECONDS

    def has_changed(self, name: str, before: Holder | None) -> bool:
        """Whether a claim's counter has moved since it was read: its holder lives."""
        holder, _ = self.look(name)
        return holder is not None and before is not None and holder.counter != before.counter


class Claim:
    """A claim that this process holds, and has noted in `_beating` before it made the file; a thread writes it again
    every few seconds until it is released."""

    def __init__(self, storage: Storage, name: str, holder: Holder, successor: str | None = None) -> None:
        """`successor`: the file that another process creates if it takes this claim over."""
        self.name, self.is_lost = name, False
        self._storage, self._holder, self._successor = storage, holder, successor
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"heartbeat of {name}", daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                self.is_lost = self._successor is not None and self._storage.exists(self._successor)
                if self.is_lost:
                    return
                self._holder = replace(self._holder, counter=self._holder.counter + 1, at=time.time())
                self._storage.write(self.name, self._holder.to_bytes())
            except (OSError, CacheError) as error:  # what this process writes besides will fail too, or go on
                logger.debug("%s: no heartbeat: %s", self.name, error)

    def release(self) -> None:
        """End the heartbeat; the file stays as it is."""
        self._ended.set()
        self._heart.join()
        _beating.discard(self._holder.token)

    def give_up(self, reason: str) -> None:
        """Let another process take the claim over at once. `reason` is empty if nothing is wrong with the work."""
        self.release()
        if not self.is_lost:
            self._storage.write(self.name, replace(self._holder, failed=reason, at=time.time()).to_bytes())

    @contextmanager
    def given_up_on_errors(self) -> Iterator[None]:
        """Give up if the work fails, and say why, or if it is interrupted. A lost claim only ends."""
        try:
            yield
        except Exception as error:
            self.give_up(str(error) or type(error).__name__)
            raise
        except BaseException:
            self.give_up("")
            raise

    def remove(self) -> None:
        """End the claim and remove its file, and those of the dead holders before."""
        self.release()
        piece, _, generation = self.name.rpartition(".")
        for number in range(int(generation) if piece else 0):
            self._storage.remove(f"{piece}.{number}")
        self._storage.remove(self.name)


class Claims:
    """The claims of one folder, as one process sees them."""

    def __init__(
        self,
        storage: Storage,
        folder: str,
        owner: str,
        clock: Callable[[], float] = time.monotonic,
        crew: str = "",
    ) -> None:
        self._storage, self._folder, self._owner, self._crew = storage, folder, owner, crew
        self._watch = Watch(storage, clock)

    def generations(self) -> dict[str, int]:
        """The last generation of each claimed piece."""
        return generations(self._storage, self._folder)

    def look(self, piece: str, generation: int) -> tuple[Holder | None, float]:
        """As of `Watch.look`."""
        return self._watch.look(f"{self._folder}/{piece}.{generation}")

    def take(self, piece: str, known: Mapping[str, int] | None = None) -> Claim | None:
        """Claim a piece that nobody holds, or whose holder is dead or of the same crew; None if another process has it.

        `known`: what `generations` returned.
        """
        last = (self.generations() if known is None else known).get(piece)
        if last is not None:
            holder, silent = self.look(piece, last)
            if silent < DEAD_AFTER_SECONDS and not (holder and self._crew and holder.crew == self._crew):
                return None
        number = 0 if last is None else last + 1
        name = f"{self._folder}/{piece}.{number}"
        holder = replace(Holder.current(self._owner), at=time.time(), crew=self._crew)
        _beating.add(holder.token)
        if not self._storage.create(name, holder.to_bytes()):
            _beating.discard(holder.token)
            return None
        return Claim(self._storage, name, holder, f"{self._folder}/{piece}.{number + 1}")


def generations(storage: Storage, folder: str) -> dict[str, int]:
    """The last generation of each claimed piece of a folder."""
    found: dict[str, int] = {}
    for name in storage.list(folder):
        piece, _, generation = name.removeprefix(f"{folder}/").rpartition(".")
        if piece and generation.isdecimal():
            found[piece] = max(found.get(piece, 0), int(generation))
    return found


@contextmanager
def held_cache(storage: Storage, *, shared: bool = False, owner: str = "a writer") -> Iterator[None]:
    """Hold a cache for one writer, or with other workers of one plan. It ends with this process.

    A local folder is locked by the system; behind a URL, a lease says who writes.

    Raises:
        FolderInUseError: another process writes to it.
    """
    with storage.writer_lock(shared=shared):
        if storage.is_local:
            yield
            return
        lease = _lease(storage, "worker" if shared else "writer", owner)
        try:
            yield
        finally:
            lease.remove()
            _remove_ended(storage)


def _remove_ended(storage: Storage) -> None:
    """Remove the leases of processes of this machine that are gone."""
    for name in storage.list(_LEASES):
        holder, _ = Watch(storage).look(name)
        if holder is not None and holder.has_ended:
            storage.remove(name)


def _lease(storage: Storage, kind: str, owner: str) -> Claim:
    """Claim first, look for others then: of two that begin at once, at least one sees the other."""
    for attempt in range(_LEASE_ATTEMPTS):
        holder = replace(Holder.current(owner), at=time.time())
        mine = f"{_LEASES}/{kind}-{holder.token}"
        _beating.add(holder.token)
        storage.create(mine, holder.to_bytes())
        lease = Claim(storage, mine, holder)
        try:
            other = _living_other(storage, mine, kind)
        except BaseException:
            lease.remove()
            raise
        if other is None:
            return lease
        lease.remove()
        if attempt + 1 < _LEASE_ATTEMPTS and other.counter == 0:  # it has just begun, and may withdraw as well
            time.sleep(random.uniform(0.2, 2.0))
    raise FolderInUseError(
        f"{storage.root}: another process is writing to it ({other}). Wait for it to end, or stop it, and run this "
        "again."
    )


def _living_other(storage: Storage, mine: str, kind: str) -> Holder | None:
    """The holder of a lease that excludes mine; leases of dead processes are removed, which may take a minute."""
    watch = Watch(storage)
    for name in storage.list(_LEASES):
        if name == mine or (kind == "worker" and name.startswith(f"{_LEASES}/worker-")):
            continue
        first, _ = watch.look(name)
        started = time.monotonic()
        while not watch.is_dead(name):
            if watch.has_changed(name, first) or (first and first.machine == _machine() != ""):
                return first
            if time.monotonic() - started < 1:
                logger.info("%s: waiting to see whether %s still writes to it.", storage.root, first or name)
            time.sleep(1)
        storage.remove(name)
    return None
