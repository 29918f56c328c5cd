"""Commands in forked children: torch and transformers are imported once, and a process then starts in milliseconds.

What is forked has one thread and has not run torch, so that a child is what a fresh process would be.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import transformers

Action = Callable[[], object]
_numbers = itertools.count()
HUNG_AFTER = 120.0
"""Seconds for which no command of the torture may run."""


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    status: int
    """Negative: by that signal."""
    errors: str
    """What it wrote to standard error."""
    seconds: float

    @property
    def last_line(self) -> str:
        return (self.errors.strip().splitlines() or [""])[-1].rpartition("\r")[2]


class Child:
    """A function in a process of its own, in a process group of its own."""

    def __init__(self, action: Callable[[], int], folder: Path) -> None:
        """`folder`: where its standard error is kept until it is read."""
        errors = folder / f"{next(_numbers)}.errors"
        self._errors, self._started = errors, time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            _live(action, errors)

    def end(self, sent: int, *, group: bool = False) -> None:
        """Send a signal, unless the child has ended."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, sent)

    def wait(self) -> Outcome:
        """How it ended. One that hangs is killed, and the outcome says so."""
        hung = ""
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            if not hung and time.perf_counter() - self._started > HUNG_AFTER:
                hung = f"\nit hung for {HUNG_AFTER:.0f} s"
                self.end(signal.SIGKILL)
            time.sleep(0.002)
        status = os.waitstatus_to_exitcode(found[1])
        errors = self._errors.read_text(errors="replace") if self._errors.exists() else ""
        self._errors.unlink(missing_ok=True)
        return Outcome(status, errors + hung, time.perf_counter() - self._started)


def _live(action: Callable[[], int], errors: Path) -> None:
    """In the child: as the interpreter runs a script, and without the parent's way out."""
    status = 1
    try:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), 2)
        torch.set_num_threads(1)
        status = action()
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads that an interpreter waits for
            sys.stderr.flush()
        finally:
            os._exit(status)


def ask(question: Callable[[], Any], folder: Path) -> Any:
    """What a function gives in a child, as JSON."""
    answer = folder / "answer.json"

    def write() -> int:
        answer.write_text(json.dumps(question()))
        return 0

    outcome = Child(write, folder).wait()
    if outcome.status:
        raise RuntimeError(f"a question failed with status {outcome.status}: {outcome.errors}")
    return json.loads(answer.read_text())


def preload() -> None:
    """Import here what the commands import, so that no child has to."""
    for verb in ("extraction.extract", "extraction.workers", "training.train", "evaluation.evaluate"):
        importlib.import_module(f"saffe_cache.{verb}")
    importlib.import_module("torch._dynamo")
    for name in ("AutoTokenizer", "BitImageProcessorPil", "Dinov2Model", "BertModel"):
        getattr(transformers, name)
    PIL.Image.preinit()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads: what is forked now would lack them"


def at_call(
    name: str, number: int, action: Action, *, after: bool = False, onto: re.Pattern[str] | None = None
) -> Action:
    """For a child: do something at the n-th call of `os.replace` or `os.fsync`, before it or behind.

    `onto`: where only calls count whose last argument matches.
    """

    def arrange() -> None:
        real, counting, calls = getattr(os, name), threading.Lock(), 0

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            with counting:
                counts = onto is None or onto.search(str(arguments[-1])) is not None
                calls += counts
                mine = counts and calls == number
            if mine and not after:
                action()
            result = real(*arguments, **options)
            if mine and after:
                action()
            return result

        setattr(os, name, counted)

    return arrange


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
