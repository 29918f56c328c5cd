"""The commands. Thin: read a config, set logging up, call the verb, end with the path that it wrote."""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, get_args

from saffe_cache.core.features import CacheError, printable

_GONE = "Bring the disk back"
_TO_DO = {
    errno.ENOSPC: "Make room on the disk",
    errno.EDQUOT: "Make room within the quota",
    errno.EFBIG: "Allow larger files (ulimit -f)",
    errno.EROFS: "Make the disk writable",
    errno.EACCES: "Allow this user to write there",
    errno.EMFILE: "Allow more open files (ulimit -n 4096)",
    errno.ENFILE: "Close other programs: the system has too many files open",
    errno.ENOMEM: "Free some memory",
    errno.ENOENT: "Bring the file or its disk back",
    errno.EIO: _GONE,
    errno.ESTALE: _GONE,
    errno.ENOTCONN: _GONE,
}
"""What to do about errors of the system."""


def extract_command(arguments: Sequence[str] | None = None) -> int:
    from saffe_cache.extraction.extract import ExtractConfig, extract

    return _run_stage("saffe-extract", ExtractConfig, extract, arguments)


def train_command(arguments: Sequence[str] | None = None) -> int:
    from saffe_cache.training.train import TrainConfig, train

    return _run_stage("saffe-train-fam", TrainConfig, train, arguments)


def evaluate_command(arguments: Sequence[str] | None = None) -> int:
    from saffe_cache.evaluation.evaluate import EvaluateConfig, evaluate, exit_status, read_table

    return _run_stage(
        "saffe-index-eval", EvaluateConfig, _shown(evaluate, read_table), arguments, lambda _, out: exit_status(out)
    )


def ablate_command(arguments: Sequence[str] | None = None) -> int:
    from saffe_cache.studies.sweep.ablate import AblateConfig, ablate, exit_status, read_tables

    def ablate_and_show(config: AblateConfig) -> str:
        out = ablate(config)
        print(read_tables(config))
        return out

    return _run_stage("saffe-ablate", AblateConfig, ablate_and_show, arguments, lambda config, _: exit_status(config))


def bind_command(arguments: Sequence[str] | None = None) -> int:
    from saffe_cache.core.results import exit_status, read_report
    from saffe_cache.studies.binding.bind import bind
    from saffe_cache.studies.binding.config import BindConfig

    return _run_stage("saffe-bind", BindConfig, _shown(bind, read_report), arguments, lambda _, out: exit_status(out))


def match_command(arguments: Sequence[str] | None = None) -> int:
    from saffe_cache.studies.matching.match import MatchConfig, exit_status, match, read_table

    return _run_stage("saffe-match", MatchConfig, _shown(match, read_table), arguments, lambda _, out: exit_status(out))


def align_command(arguments: Sequence[str] | None = None) -> int:
    from saffe_cache.studies.alignment.align import AlignConfig, align, read_table

    return _run_stage("saffe-align", AlignConfig, _shown(align, read_table), arguments)


def caption_command(arguments: Sequence[str] | None = None) -> int:
    from saffe_cache.core.results import exit_status, read_report
    from saffe_cache.studies.captioning.caption import caption
    from saffe_cache.studies.captioning.config import CaptionConfig

    return _run_stage(
        "saffe-caption", CaptionConfig, _shown(caption, read_report), arguments, lambda _, out: exit_status(out)
    )


def report_command(arguments: Sequence[str] | None = None) -> int:
    from saffe_cache.report.report import ReportConfig, report

    return _run_stage("saffe-report", ReportConfig, report, arguments)


def cache_command(arguments: Sequence[str] | None = None) -> int:
    """`saffe-cache inspect | verify | repair | convert | export | import`."""
    from saffe_cache.core.features import Compression, StorageType
    from saffe_cache.core.options import pair_of

    parser = argparse.ArgumentParser(prog="saffe-cache", description="Look into a cache, check it, exchange it.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("inspect", "show encoders, layers, shapes, splits, sizes, ranges and a few items"),
        ("verify", "read every shard and compare it with its checksum"),
    ):
        commands.add_parser(name, help=help_text).add_argument("cache", help="the cache")
    converting = commands.add_parser("convert", help="write a cache anew, its hidden states stored otherwise")
    converting.add_argument("cache", help="the cache")
    converting.add_argument("new", help="the cache to write")
    converting.add_argument("--storage", choices=get_args(StorageType), help="type of hidden states; default: as it is")
    converting.add_argument("--compression", choices=get_args(Compression), help="of hidden states; default: as it is")
    converting.add_argument("--shard-mb", type=int, default=64, help="size of a shard; default: 64")
    exporting = commands.add_parser("export", help="write a cache as one HDF5 file")
    exporting.add_argument("cache", help="the cache")
    exporting.add_argument("file", help="the HDF5 file to write")
    importing = commands.add_parser("import", help="make a cache from an HDF5 file that export wrote")
    importing.add_argument("file", help="the HDF5 file")
    importing.add_argument("cache", help="the cache to write")
    repairing = commands.add_parser("repair", help="make again what verify finds damaged, from data and encoder")
    repairing.add_argument("cache", help="the cache")
    repairing.add_argument("--data", action="append", help="where the data are now; default: where they were")
    repairing.add_argument(
        "--encoder",
        action="append",
        type=pair_of(str),
        metavar="KEY=TEXT",
        help="where an encoder is now, as image=…, or with its key; default: where it was",
    )
    repairing.add_argument("--device", help="auto, cpu, cuda, cuda:1; default: the extraction's")
    options = parser.parse_args(arguments)
    return _guarded("saffe-cache", lambda: _cache_action(options))


def _cache_action(options: argparse.Namespace) -> int:
    from saffe_cache.store.convert import convert_cache
    from saffe_cache.store.exchange import export_hdf5, import_hdf5
    from saffe_cache.store.inspect import describe_cache
    from saffe_cache.store.reader import verify_cache

    if options.command == "inspect":
        print(describe_cache(options.cache))
    elif options.command == "convert":
        stored = {"storage_type": options.storage, "compression": options.compression, "shard_mb": options.shard_mb}
        print(convert_cache(options.cache, options.new, **stored))
    elif options.command == "export":
        print(export_hdf5(options.cache, options.file))
    elif options.command == "repair":
        return _repair(options)
    elif options.command == "import":
        print(import_hdf5(options.file, options.cache))
    else:
        count, problems = verify_cache(options.cache)
        print("\n".join([*map(printable, problems), f"{count} shards read, {len(problems)} damaged"]))
        return 1 if problems else 0
    return 0


def _repair(options: argparse.Namespace) -> int:
    from saffe_cache.extraction.config import RepairConfig
    from saffe_cache.extraction.repair import repair

    data, encoder = tuple(options.data or ()), dict(options.encoder or ())
    report = repair(RepairConfig(cache=options.cache, data=data, encoder=encoder, device=options.device))
    print(report)
    return 1 if report.left else 0


def _shown(verb: Callable[[Any], str], read_table: Callable[[str], str]) -> Callable[[Any], str]:
    """A verb whose result is also shown."""

    def show(config: Any) -> str:
        out = verb(config)
        print(read_table(out), end="")
        return out

    return show


def _run_stage(
    prog: str,
    config_class: type[Any],
    stage: Callable[[Any], str],
    arguments: Sequence[str] | None,
    status: Callable[[Any, str], int] = lambda config, path: 0,
) -> int:
    """`status` gives the exit status from the config and the path that the stage wrote."""
    from saffe_cache.core.options import parse_config

    config = parse_config(config_class, arguments, prog)

    def run() -> int:
        path = stage(config)
        print(path)
        return status(config, path)

    return _guarded(prog, run)


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
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx", "httpcore", "fsspec", "faiss", "faiss.loader"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with _sigterm_raised():
            return action()
    except OSError as error:
        print(f"{prog}: {_plain(_explained(error))}", file=sys.stderr)
        return 1
    except (CacheError, ValueError, ImportError) as error:
        print(f"{prog}: {_plain(str(error))}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{prog}: out of memory: {what}. Free some, and run the same command again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        warnings.simplefilter("ignore")  # coroutines of zarr that were cut off complain as they go
        print(f"{prog}: stopped; the same command goes on from here.", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130


class _Terminated(KeyboardInterrupt):
    """By SIGTERM."""


@contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Only the main thread may set handlers; a SIGTERM that is ignored stays so."""

    def terminate(*_: object) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _lacks_memory(error: MemoryError | RuntimeError) -> bool:
    from saffe_cache.extraction.oom_retry import is_out_of_memory

    return isinstance(error, MemoryError) or is_out_of_memory(error) or "can't start new thread" in str(error)


def _explained(error: OSError) -> str:
    """Where, what, and what to do; errors of our own say so themselves."""
    if error.errno is None or error.errno not in _TO_DO:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    what = " ".join(str(error.strerror).split())  # h5py's has line breaks
    return f"{where}{what}. {_TO_DO[error.errno]}, and run the same command again."
