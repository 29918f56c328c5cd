"""Extraction on a Ray cluster of two nodes: workers, nodes and drivers that die."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from cases import Case
from table import Table, not_clean

_LONGEST_CHAIN = 4
"""Deaths of one extraction, before it may go on to its end."""


def die_on_ray(case: Case, deaths: int, table: Table, generator: random.Random) -> None:
    """kill -9 at random moments of workers, nodes and drivers; SIGTERM of drivers too. A driver is started again."""
    if find_spec("ray") is None:
        table.add("deaths on a Ray cluster", "left out: Ray is not installed")
        return
    with _two_nodes() as nodes:
        on_ray = replace(case, arguments=[*case.arguments, "--workers-on", "ray", "--ray-address", nodes.address])
        case.reset()
        whole = on_ray.run()
        different = case.differences()
        problems = [f"status {whole.status}: {whole.errors[-500:]}"] if whole.status else []
        table.add("on a Ray cluster, no death", "equal to one process", *problems, *different[:5])
        while deaths > 0:
            deaths -= _die(replace(on_ray, seconds=whole.seconds), min(deaths, _LONGEST_CHAIN), nodes, table, generator)


def _die(case: Case, deaths: int, nodes: _Nodes, table: Table, generator: random.Random) -> int:
    """One extraction with some deaths; returns how many there were."""
    case.reset()
    driver, problems, counted = case.start(), list[str](), 0
    for _ in range(deaths):
        time.sleep(generator.uniform(0.1, 0.6) * case.seconds)
        what = generator.choice(["worker", "worker", "node", "driver"])
        if what == "node":
            nodes.lose_one()
        elif what == "worker":
            workers = nodes.workers()
            if not workers:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(generator.choice(workers), signal.SIGKILL)
        else:
            sent = generator.choice([signal.SIGKILL, signal.SIGTERM])
            driver.end(sent)
            outcome = driver.wait()
            if sent == signal.SIGTERM and outcome.status not in (0, -signal.SIGTERM):
                problems += not_clean(outcome, case, 128 + signal.SIGTERM)
            what = f"driver by {sent.name}" if outcome.status else "driver, which had ended"
            problems += case.damage()
            driver = case.start()
        counted += 1
        table.add(f"death of a {what}, {case.name} on a Ray cluster", "gone on")
    end = driver.wait()
    problems += [f"status {end.status}: {end.errors[-1500:]}"] if end.status else []
    different = case.differences()
    problems += [f"these differ from an uninterrupted run: {different[:5]}"] if different else []
    table.add(f"end after these deaths, {case.name} on a Ray cluster", "equal to one process", *problems)
    return counted


class _Nodes:
    """A process that holds two nodes."""

    def __init__(self) -> None:
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, str(Path(__file__).with_name("nodes.py"))]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def lose_one(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("lose one\n")
        self.process.stdin.flush()

    def workers(self) -> list[int]:
        """The processes of actors: grandchildren of the process that holds the nodes."""
        parents, names = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                before, _, behind = stat.read_text().rpartition(")")
                parents[int(stat.parent.name)] = int(behind.split()[1])
                names[int(stat.parent.name)] = before.partition("(")[2]
        return [
            process
            for process, parent in parents.items()
            if parents.get(parent) == self.process.pid and names[process].startswith("ray::_Actor")
        ]


@contextmanager
def _two_nodes() -> Iterator[_Nodes]:
    nodes = _Nodes()
    try:
        yield nodes
    finally:
        nodes.process.communicate(timeout=60)
