"""Several at once: writers of one folder, readers beside a writer, and locks of the dead."""

from __future__ import annotations

import random
import re
import shutil
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

from cases import Case
from forked import Child
from table import Table, not_clean, not_recovered

from saffe_cache.cli import main
from saffe_cache.core.atomic_io import LOCK_NAME


def write_twice(case: Case, table: Table, times: int, generator: random.Random) -> None:
    """Two of one command into one folder: the second is refused with the first one's host and process."""
    fault = f"two writers of one folder, {case.name}"
    for _ in range(times):
        case.reset()
        first = case.start()
        time.sleep(generator.uniform(0, 0.4 * case.seconds))
        second = case.start()
        ends = {child.pid: child.wait() for child in (first, second)}
        refused = {pid: end for pid, end in ends.items() if end.status != case.status}
        problems, outcome = [], "both in turn, equal to an uninterrupted run"
        for pid, end in refused.items():
            other = next(iter(ends.keys() - {pid}))
            outcome = "one refused by the other's name, equal to an uninterrupted run"
            problems += not_clean(end, case, 1)
            named = rf"another process is writing to it \(host {re.escape(socket.gethostname())}, process {other}\)"
            if not re.search(named, end.errors):
                problems.append(f"it does not name process {other}: {end.last_line}")
        if len(refused) == 2:
            problems.append("both were refused")
        different = case.differences()
        problems += [f"these differ from an uninterrupted run: {different[:5]}"] if different else []
        table.add(fault, outcome, *problems)


def train_side_by_side(case: Case, table: Table, times: int) -> None:
    """Two trainings from one cache, into folders of their own."""
    for _ in range(times):
        pair = []
        for name in ("one", "two"):
            folder = case.folder.with_name(f"{case.folder.name}-{name}")
            arguments = [str(folder) if part == str(case.folder) else part for part in case.arguments]
            pair.append(replace(case, folder=folder, arguments=arguments))
            pair[-1].reset()
        children = [one.start() for one in pair]
        for one, child in zip(pair, children, strict=True):
            outcome = child.wait()
            problems = [] if outcome.status == case.status else [outcome.errors[-1500:]]
            different = [name for name in one.differences() if name != "config.json"]  # which names the folder
            problems += [f"these differ from a run alone: {different[:5]}"] if different else []
            table.add(f"two at once from one cache, {case.name}", "equal to a run alone", *problems)
            shutil.rmtree(one.folder, ignore_errors=True)


def read_beside_a_writer(growth: Case, training: Case, table: Table, times: int) -> None:
    """verify and training, again and again, while items and a layer are added to the cache that they read."""
    run = training.folder.with_name("run-beside")
    moved = {str(training.folder): str(run)}
    index = list(training.arguments).index("--cache") + 1
    arguments = [moved.get(part, part) for part in training.arguments]
    arguments[index] = str(growth.folder)
    reader = replace(training, folder=run, arguments=[*arguments, "--epochs", "1", "--fusion", "linear"])
    for _ in range(times):
        growth.reset()
        writer = growth.start()
        writing = Watched(writer)
        while writing.is_alive():
            reader.reset()
            verify = Child(lambda: main(["cache", "verify", str(growth.folder)]), growth.work)
            trained = reader.run()
            for name, outcome in (("verify", verify.wait()), ("training", trained)):
                problems = [] if outcome.status == 0 else [f"status {outcome.status}: {outcome.errors[-1500:]}"]
                table.add(f"{name} beside a writer", "nothing wrong", *problems)
        outcome = writer.wait()
        different = growth.differences()
        problems = [f"these differ from an uninterrupted run: {different[:5]}"] if different else []
        problems += [outcome.errors[-1500:]] if outcome.status else []
        table.add("a writer beside readers", "equal to an uninterrupted run", *problems)


class Watched:
    """Whether a child is still under way, without waiting for it."""

    def __init__(self, child: Child) -> None:
        self._stat = Path(f"/proc/{child.pid}/stat")

    def is_alive(self) -> bool:
        return self._stat.read_text().rpartition(")")[2].split()[0] != "Z"


def leave_locks(case: Case, table: Table, times: int) -> None:
    """The lock file of a process that was killed, and one that names a process that lives and does not hold it."""
    for number in range(times):
        case.reset()
        lock = case.folder / LOCK_NAME
        if number % 2:
            case.folder.mkdir(exist_ok=True)
            lock.write_text(f"host {socket.gethostname()}, process 1")
        else:
            child = case.start()
            while not lock.exists() and Watched(child).is_alive():
                time.sleep(0.001)
            child.end(signal.SIGKILL)
            child.wait()
        table.add(f"stale lock, {case.name}", "taken over, equal to an uninterrupted run", *not_recovered(case))
