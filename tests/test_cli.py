"""How the commands end: stopped by a signal, out of memory, or at an error of the system."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable

import pytest

from saffe_cache.cli import _guarded


def ending(action: Callable[[], object]) -> int:
    def act() -> int:
        action()
        return 0

    return _guarded("saffe-test", act)


def fail(error: BaseException) -> Callable[[], object]:
    def action() -> None:
        raise error

    return action


def send(sent: int) -> Callable[[], object]:
    def action() -> None:
        os.kill(os.getpid(), sent)
        time.sleep(10)

    return action


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_a_command_in_one_line(sent: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        assert ending(send(sent)) == 128 + sent
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "saffe-test: stopped; the same command goes on from here.\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_sigterm_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert ending(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left\n on device", "a/file"),
            "a/file: No space left on device. Make room on the disk, and run the same command again.",
        ),
        (OSError("words of our own"), "words of our own"),
        (
            MemoryError("Unable to allocate 8 GiB\nfor an array"),
            "out of memory: Unable to allocate 8 GiB. Free some, and run the same command again.",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory. Free some, and run the same "
            "command again.",
        ),
    ],
)
def test_errors_become_one_line(error: BaseException, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(fail(error)) == 1
    assert capsys.readouterr().err == f"saffe-test: {line}\n"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        ending(fail(RuntimeError("a mistake of ours")))
