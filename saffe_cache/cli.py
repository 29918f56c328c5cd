"""The command `saffe`. Thin: read the verb's config, set up logging, call the verb, print its report and its path."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import saffe_cache
from saffe_cache.core import ranks
from saffe_cache.core.devices import is_out_of_memory, set_up_threads
from saffe_cache.core.features import CacheError, printable
from saffe_cache.core.options import add_options, parse_config
from saffe_cache.core.results import exit_status, read_report
from saffe_cache.verbs import GROUPS, VERBS, Verb

_GONE = "Bring the disk back"
_TO_DO = {
    errno.ENOSPC: "Make room on the disk",
    errno.EDQUOT: "Make room within the quota",
    errno.EFBIG: "Allow larger files (ulimit -f)",
    errno.EROFS: "Make the disk writable",
    errno.EACCES: "Give this user access to it",
    errno.EMFILE: "Allow more open files (ulimit -n 4096)",
    errno.ENFILE: "Close other programs: the system has too many files open",
    errno.ENOMEM: "Free some memory",
    errno.ENOENT: "Bring the file or its disk back",
    errno.EIO: _GONE,
    errno.ESTALE: _GONE,
    errno.ENOTCONN: _GONE,
}
"""What to do about errors of the operating system."""


_NAME = "saffe"
_DESCRIPTION = (
    "Run frozen encoders once, cache their hidden states, train and evaluate fusions from the cache, and search photos "
    "with them."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """`saffe VERB ...`; imports what the verb needs and nothing else."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for num_words in (1, 2):
        verb = " ".join(arguments[:num_words])
        if verb in VERBS:
            return _run_verb(verb, f"{_NAME} {verb}", arguments[num_words:])
    parser = _parser(with_options=False)
    parser.parse_args(arguments)  # usually ends with help, the version, completion or an error
    return parser.error("expected a verb first")


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, option: str | None = None) -> None:
        import shtab

        print(shtab.complete(_parser(with_options=True), shell))
        parser.exit()


def _parser(*, with_options: bool) -> argparse.ArgumentParser:
    """Of all verbs; with their options it is what completion is made of."""
    parser = argparse.ArgumentParser(prog=_NAME, description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"{_NAME} {saffe_cache.__version__}")
    shells, text = ("bash", "zsh", "tcsh"), "print a completion script for a shell"
    parser.add_argument("--print-completion", choices=shells, action=_PrintCompletion, help=text)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    groups: dict[str, Any] = {}
    for name, verb in VERBS.items():
        first, _, second = name.partition(" ")
        if second and first not in groups:
            group = verbs.add_parser(first, help=GROUPS[first], description=GROUPS[first])
            groups[first] = group.add_subparsers(title="verbs", metavar="VERB", required=True)
        child = (groups[first] if second else verbs).add_parser(second or first, help=verb.summary)
        if with_options:
            add_options(child, verb.load_config())
    return parser


def _run_verb(name: str, prog: str, arguments: Sequence[str] | None) -> int:
    set_up_threads()
    verb = VERBS[name]
    with ranks.only_first_is_heard():
        config = parse_config(verb.load_config(), arguments, prog)

    def run() -> int:
        with ranks.together():
            if ranks.size() > 1 and not verb.over_ranks:
                found = f"{ranks.size()} processes, started by torchrun"
                raise ValueError(f"{found}, expected one: {name} is not divided. Run it without torchrun.")
            found = verb.load_run()(config)
            return _report(verb, found) if ranks.is_first() else 0

    return _guarded(prog, run)


def _report(verb: Verb, found: Any) -> int:
    """Print what a verb returned; the exit status."""
    if verb.result is None:
        print(found)
        return getattr(found, "exit_status", 0)
    folders = (found,) if isinstance(found, str) else found
    print(*map(read_report, folders), sep="\n", end="")
    print(*folders, sep="\n")
    return max(map(exit_status, folders))


def extract_command(arguments: Sequence[str] | None = None) -> int:
    """`saffe-extract`, the same as `saffe extract`."""
    return _run_verb("extract", "saffe-extract", arguments)


def train_command(arguments: Sequence[str] | None = None) -> int:
    """`saffe-train-fam`, the same as `saffe train`."""
    return _run_verb("train", "saffe-train-fam", arguments)


def evaluate_command(arguments: Sequence[str] | None = None) -> int:
    """`saffe-index-eval`, the same as `saffe evaluate`."""
    return _run_verb("evaluate", "saffe-index-eval", arguments)


class _PlainText(logging.Formatter):
    """Messages may quote file names and captions: nothing in them moves a terminal's cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return _plain(super().format(record))


def _plain(text: str) -> str:
    """Lines stay lines."""
    return "\n".join(map(printable, text.split("\n")))


def _guarded(prog: str, action: Callable[[], int]) -> int:
    """Run with logging to standard error; what a user can act on becomes one line and status 1.

    SIGTERM, by which schedulers end jobs, ends it as Ctrl-C does.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainText())
    logging.basicConfig(level=logging.ERROR if ranks.started()[0] else logging.INFO, handlers=[handler])
    for noisy in ("httpx", "httpx2", "httpcore", "httpcore2", "fsspec", "faiss", "faiss.loader"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    received: list[int] = []
    try:
        with _sigterm_raised(received):
            status = action()
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # nobody reads the standard output any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to print at the end
        return 141  # as of a program that SIGPIPE ends
    except KeyboardInterrupt:
        return _interrupted(prog, terminated=bool(received))
    except Exception as error:
        if received:  # an import that was cut off, for one, raises what it likes
            return _interrupted(prog, terminated=True)
        return _failed(prog, error)


def _interrupted(prog: str, *, terminated: bool) -> int:
    warnings.simplefilter("ignore")  # coroutines of zarr that were cut off complain as they go
    if ranks.may_report():
        print(f"{prog}: interrupted. Run the same command again to resume.", file=sys.stderr)
    return 143 if terminated else 130


def _failed(prog: str, error: Exception) -> int:
    """Say in one line what a user can act on; other errors are raised again."""
    if isinstance(error, (OSError, CacheError, ValueError, ImportError)):
        what = _explained(error) if isinstance(error, OSError) else str(error)
    else:
        is_of_memory = isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and (is_out_of_memory(error) or "can't start new thread" in str(error))
        )
        if not is_of_memory:
            raise error
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = f"out of memory: {line}. Free some, and run the same command again."
    if ranks.may_report():
        print(f"{prog}: {_plain(what)}", file=sys.stderr)
    return 1


class _Terminated(KeyboardInterrupt):
    """By SIGTERM."""


@contextmanager
def _sigterm_raised(received: list[int]) -> Iterator[None]:
    """Note and raise a SIGTERM. Only the main thread may set handlers; a SIGTERM that is ignored stays so."""

    def terminate(number: int, _: object) -> NoReturn:
        received.append(number)
        raise _Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _explained(error: OSError) -> str:
    """Where, what, and what to do; errors of our own say so themselves."""
    if error.errno is None or error.errno not in _TO_DO:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    what = " ".join(str(error.strerror).split())  # h5py's has line breaks
    return f"{where}{what}. {_TO_DO[error.errno]}, and run the same command again."
