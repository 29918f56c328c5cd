"""The commands. Thin: read a config, set logging up, call the verb, end with the path that it wrote."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from saffe_cache.features import CacheError, printable


def extract_command(arguments: Sequence[str] | None = None) -> int:
    from saffe_cache.extract import ExtractConfig, extract

    return _run_stage("saffe-extract", ExtractConfig, extract, arguments)


def train_command(arguments: Sequence[str] | None = None) -> int:
    from saffe_cache.train import TrainConfig, train

    return _run_stage("saffe-train-fam", TrainConfig, train, arguments)


def evaluate_command(arguments: Sequence[str] | None = None) -> int:
    from saffe_cache.evaluate import EvaluateConfig, evaluate, exit_status

    return _run_stage("saffe-index-eval", EvaluateConfig, evaluate, arguments, exit_status)


def cache_command(arguments: Sequence[str] | None = None) -> int:
    """`saffe-cache inspect | verify | convert | export | import`."""
    from saffe_cache.store.compression import COMPRESSIONS
    from saffe_cache.store.dtypes import STORAGE_DTYPES

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
    converting.add_argument("--storage", choices=STORAGE_DTYPES, help="type of hidden states; default: as it is")
    converting.add_argument("--compression", choices=COMPRESSIONS, help="of hidden states; default: as it is")
    converting.add_argument("--shard-mb", type=int, default=64, help="size of a shard; default: 64")
    exporting = commands.add_parser("export", help="write a cache as one HDF5 file")
    exporting.add_argument("cache", help="the cache")
    exporting.add_argument("file", help="the HDF5 file to write")
    importing = commands.add_parser("import", help="make a cache from an HDF5 file that export wrote")
    importing.add_argument("file", help="the HDF5 file")
    importing.add_argument("cache", help="the cache to write")
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
    elif options.command == "import":
        print(import_hdf5(options.file, options.cache))
    else:
        count, problems = verify_cache(options.cache)
        print("\n".join([*map(printable, problems), f"{count} shards read, {len(problems)} damaged"]))
        return 1 if problems else 0
    return 0


def _run_stage(
    prog: str,
    config_class: type[Any],
    stage: Callable[[Any], str],
    arguments: Sequence[str] | None,
    status: Callable[[str], int] = lambda _: 0,
) -> int:
    """`status` gives the exit status from the path that the stage wrote."""
    from saffe_cache.options import parse_config

    config = parse_config(config_class, arguments, prog)

    def run() -> int:
        path = stage(config)
        print(path)
        return status(path)

    return _guarded(prog, run)


class _PlainText(logging.Formatter):
    """Messages may quote file names and captions: nothing in them moves a terminal's cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return _plain(super().format(record))


def _plain(text: str) -> str:
    """Lines stay lines."""
    return "\n".join(map(printable, text.split("\n")))


def _guarded(prog: str, action: Callable[[], int]) -> int:
    """Run with logging to standard error; what a user can act on becomes one line and status 1."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainText())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx", "httpcore", "fsspec", "faiss", "faiss.loader"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return action()
    except (CacheError, ValueError, ImportError, OSError) as error:
        print(f"{prog}: {_plain(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
