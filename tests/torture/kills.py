"""Processes that are killed: at random moments, and at every replacement and sync of a file."""

from __future__ import annotations

import random
import re
import signal
import time
from dataclasses import replace

from cases import Case
from forked import at_call, kill_self
from table import Table, not_clean, not_recovered

_ANY = re.compile("")
_LONGEST_CHAIN = 4
"""Kills of one run, each behind a resumption, before it may go on to its end."""
_RANKS = 3


def kill_at_random(case: Case, kills: int, table: Table, generator: random.Random) -> None:
    """kill -9 and SIGTERM by turns, at moments drawn from the whole life of the command."""
    signals = [signal.SIGKILL, signal.SIGTERM]
    while kills > 0:
        case.reset()
        for _ in range(min(kills, generator.randint(1, _LONGEST_CHAIN))):
            kills -= 1
            sent = signals[kills % 2]
            problems = _kill(case, sent, generator.uniform(0, 0.9 * case.seconds))
            fault = f"{sent.name} at random moments, {case.name}"
            if problems is None:
                break
            table.add(fault, "stopped, nothing half-written counts", *problems)
        problems = not_recovered(case)
        table.add(f"run again after these, {case.name}", "equal to an uninterrupted run", *problems)


def _kill(case: Case, sent: signal.Signals, moment: float) -> list[str] | None:
    """What is wrong afterwards; None where the command had ended before."""
    before = set(case.folder.rglob(".*"))  # of an earlier kill -9
    child = case.start()
    time.sleep(moment)
    child.end(sent)
    outcome = child.wait()
    problems = []
    if outcome.status == case.status:
        return None
    if sent == signal.SIGTERM and outcome.status != -signal.SIGTERM:  # that is before the command began
        problems += not_clean(outcome, case, 128 + signal.SIGTERM)
        problems += [f"{path} is left" for path in case.folder.rglob(".*") if path not in before]
    elif outcome.status != -sent:
        problems.append(f"status {outcome.status}: {outcome.errors[-500:]}")
    return problems + case.damage()


def kill_ranks(case: Case, kills: int, table: Table, generator: random.Random) -> None:
    """kill -9 at random ranks of one extraction, which are started again, until all end by themselves."""
    ranks = [
        replace(case, arguments=[*case.arguments, "--rank", str(n), "--world-size", str(_RANKS)]) for n in range(_RANKS)
    ]
    fault = f"kill -9 at random of {_RANKS} ranks, each started again, {case.name}"
    while kills > 0:
        case.reset()
        children = [one.start() for one in ranks]
        problems = []
        for _ in range(min(kills, _LONGEST_CHAIN)):
            time.sleep(generator.uniform(0, 0.5 * case.seconds))
            number = generator.randrange(_RANKS)
            children[number].end(signal.SIGKILL)
            outcome = children[number].wait()
            if outcome.status not in (-signal.SIGKILL, 0):
                problems.append(f"rank {number}: status {outcome.status}: {outcome.errors[-500:]}")
            kills -= outcome.status == -signal.SIGKILL
            children[number] = ranks[number].start()
        ends = [child.wait() for child in children]
        problems += [f"status {end.status}: {end.errors[-500:]}" for end in ends if end.status]
        different = case.differences()
        problems += [f"these differ from an uninterrupted run: {different[:5]}"] if different else []
        table.add(fault, "equal to an uninterrupted run of one process", *problems)


def kill_at_calls(
    case: Case, name: str, table: Table, *, step: int = 1, after: bool = False, onto: re.Pattern[str] = _ANY
) -> None:
    """kill -9 at a call of `os.replace` or `os.fsync`, at one `step` further, … until the command gets to its end.

    `onto`: only replacements of such paths count.
    """
    what = name if onto is _ANY else "commit"
    which = f"every {what}" if step == 1 else f"one {what} in {step}"
    fault = f"kill -9 {'behind' if after else 'before'} {which}, {case.name}"
    number = 1
    while True:
        case.reset()
        outcome = case.run(at_call(name, number, kill_self, after=after, onto=onto))
        if outcome.status == case.status:
            break
        problems = (
            [] if outcome.status == -signal.SIGKILL else [f"call {number}: status {outcome.status}: {outcome.errors}"]
        )
        problems += case.damage()
        problems += not_recovered(case)
        table.add(fault, "whole, and equal when run again", *(f"call {number}: {one}" for one in problems))
        number += step


def kill_at_commits(case: Case, table: Table) -> None:
    """kill -9 before and after each replacement of a manifest, of the root or of an encoder: the commits."""
    for after in (False, True):
        kill_at_calls(case, "replace", table, after=after, onto=re.compile(r"(\.zarr|encoders/[^/]+)/zarr\.json$"))
