"""What only a GPU shows: one command, one table.

    python tests/benchmarks/gpu.py --out runs/gpu            (make gpu-bench; under 8 minutes on an H100 with 16 cores)
    python tests/benchmarks/gpu.py --out … --tiny --device cpu       (a dry run of all of it, in seconds)

Nothing is downloaded: weights are random and photos are drawn. gpu_wheels.txt lists packages that a machine may lack.
Each row is printed as soon as it is measured; `--out`.md and `--out`.json hold the table, written after each section.

A section is a module beside this one, named in SECTIONS with the seconds that it may take, and has

    def parts(setting: Setting) -> Iterator[Callable[[], Iterator[Figure]]]

It runs in a process of its own, which is killed at its limit. An error becomes a row, and the next part follows. So an
error of the card ends one section at most. Ratios compare rates that were measured in turns, see timing.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):  # before the libraries are imported, in every process
    os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from bench import cells, describe_machine
from gpu_setup import TINY, Setting, Sizes
from timing import Figure

SECTIONS = {"extraction": 190, "decoding": 40, "training": 115, "search": 60, "correctness": 60}
"""Seconds that each may take, start included."""
_TINY_LIMIT = 600.0
"""Seconds of a section at tiny sizes, on a machine that may be busy."""
_NEEDED_BYTES = {True: 2**28, False: 24 * 2**30}
"""Free in /dev/shm, at tiny sizes or real ones, for caches to be written there: a disk would be what is measured."""


def run(setting: Setting, sections: Sequence[str], out: Path) -> dict[str, list[Figure]]:
    """Measure section by section, print each row at once, and write the table after each section."""
    machine = {**describe_machine(), "device": setting.device, "caches_in": str(setting.work.parent)}
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    report: dict[str, list[Figure]] = {}
    seconds: dict[str, float] = {}
    for section in sections:
        print(f"\n{section}", flush=True)
        started, report[section] = time.monotonic(), []
        for figure in section_figures(setting, section, _TINY_LIMIT if setting.is_tiny else SECTIONS[section]):
            report[section].append(figure)
            print("  ".join(cell for cell in (*cells(figure), figure.note if figure.value is not None else "") if cell))
            sys.stdout.flush()
        seconds[section] = round(time.monotonic() - started, 1)
        print(f"  {seconds[section]} s", flush=True)
        write_report(out, machine, seconds, report)
    return report


def section_figures(setting: Setting, section: str, limit: float) -> Iterator[Figure]:
    """The rows of a section as they come, and one more where it ended before its time."""
    # A fork of a process that has seen the card cannot use it; but forks start at once.
    context = multiprocessing.get_context("spawn" if setting.on_gpu else "fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run_section, args=(setting, section, theirs), name=section)
    process.start()
    theirs.close()
    ends, note = time.monotonic() + limit, ""
    try:
        while ours.poll(max(0.0, ends - time.monotonic())):
            yield ours.recv()
        note = f"stopped at its limit of {limit:g} s"
    except EOFError:
        process.join(5)
        note = "" if process.exitcode == 0 else f"failed: its process ended with {process.exitcode}"
    finally:
        _kill(process)
        ours.close()
    if note:
        yield Figure(name=f"{section}: the rest", unit="", note=note)


def _run_section(setting: Setting, section: str, rows: Connection) -> None:
    """In the section's process."""
    os.setsid()  # so that what it starts is killed with it
    torch.manual_seed(0)
    for part in importlib.import_module(f"gpu_{section}").parts(setting):
        try:
            for figure in part():
                rows.send(figure)
        except Exception as error:
            traceback.print_exc()
            rows.send(Figure(name=f"{section}: a part", unit="", note=f"failed: {type(error).__name__}: {error}"))


def _kill(process: Any) -> None:
    """It and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def has_failed(figure: Figure) -> bool:
    """Whether a row stands for what could not be measured, though it should have been."""
    return figure.value is None and figure.note.startswith(("failed", "stopped"))


def write_report(
    out: Path, machine: Mapping[str, Any], seconds: Mapping[str, float], report: Mapping[str, Sequence[Figure]]
) -> None:
    """`out`.json and `out`.md."""
    figures = [{"section": section, **figure.to_json()} for section, found in report.items() for figure in found]
    content = {"machine": machine, "seconds": seconds, "figures": figures}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(_without_nan(content), indent=1) + "\n")
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += ["| figure | value | 95 % interval | goal | | |", "|---|---|---|---|---|---|"]
    for section, found in report.items():
        lines.append(f"| **{section}**, {seconds[section]:.0f} s | | | | | |")
        for figure in found:
            row = (*(cell.strip() for cell in cells(figure)), figure.note if figure.value is not None else "")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _without_nan(content: Any) -> Any:
    """JSON has no NaN; null takes its place."""
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextmanager
def work_folder(given: Path | None, *, tiny: bool) -> Iterator[Path]:
    """An empty folder, removed afterwards: in memory where that has room, so that no disk is measured."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > _NEEDED_BYTES[tiny]
    parent = given or (memory if has_room else Path(tempfile.gettempdir()))
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="gpu-bench-") as folder:
        yield Path(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="the table's files, without their suffixes")
    parser.add_argument("--work", type=Path, help="where caches are written; default: in memory, if it has room")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that all of it runs")
    options = parser.parse_args()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with work_folder(options.work, tiny=options.tiny) as work:
        setting = Setting(device=device, work=work, sizes=TINY if options.tiny else Sizes())
        report = run(setting, options.sections, options.out)
    print(f"\nwritten to {options.out.with_suffix('.md')} and {options.out.with_suffix('.json')}")
    return int(any(has_failed(figure) for found in report.values() for figure in found))


if __name__ == "__main__":
    sys.exit(main())
