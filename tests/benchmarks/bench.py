"""All benchmarks: one command, one table.

    python tests/benchmarks/bench.py --work runs/bench [--sections reading writing]

Writes `bench.json` and `bench.txt` into `--work`, and prints the latter. Reading and writing take 2 minutes on two idle
cores. Where there is an accelerator, the sections that can use it do.

A section is a module beside this one, named in SECTIONS, with

    def measure(work: Path) -> list[Figure]

`work` is an empty folder of its own, removed afterwards; what is worth keeping for the next run goes beside it. What is
compared takes turns (`timing.take_turns`), a competitor that is missing has a line all the same
(`timing.not_installed`), and wrong numbers raise. A target that is missed is a line of the table, not an error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from timing import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))  # data/, for sections that draw their photos

SECTIONS = (
    "reading",
    "readers",
    "streaming",
    "writing",
    "objects",
    "decoding",
    "extraction",
    "workers",
    "training",
    "crowded",
    "evaluation",
    "growth",
)


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""
    models = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "numpy": version("numpy"),
        "zarr": version("zarr"),
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Report:
    """What was measured, and where."""

    machine: Mapping[str, Any]
    figures: Mapping[str, Sequence[Figure]]
    """Of each section."""
    seconds: Mapping[str, float]
    """That each section took."""

    def to_json(self) -> dict[str, Any]:
        figures = [
            {"section": section, **figure.to_json()} for section, found in self.figures.items() for figure in found
        ]
        return {"machine": dict(self.machine), "seconds": dict(self.seconds), "figures": figures}

    def to_text(self) -> str:
        """The table; notes stand below it, once each."""
        notes: dict[str, int] = {}
        lines = [("figure", "value", "95 % interval", "target", "", "")]
        for section, found in self.figures.items():
            lines.append((f"{section} ({self.seconds[section]:.0f} s)", "", "", "", "", ""))
            for figure in found:
                number = notes.setdefault(figure.note, len(notes) + 1) if _is_footnote(figure) else 0
                lines.append((*cells(figure), f"[{number}]" if number else ""))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        footnotes = [f"[{number}] {note}" for note, number in notes.items()]
        return "\n".join([machine, "", *table, "", *footnotes])


def _is_footnote(figure: Figure) -> bool:
    return bool(figure.note) and figure.value is not None


def cells(figure: Figure) -> tuple[str, str, str, str, str]:
    """Name, value, interval, target and verdict, as text."""
    if figure.value is None:
        return f"  {figure.name}", figure.note, "", _target(figure), ""
    interval = "–".join(_short(bound) for bound in figure.interval) if figure.interval else ""
    unit = "" if figure.unit == "ratio" else f" {figure.unit}"
    verdict = {True: "met", False: "MISSED", None: ""}[figure.is_met]
    return f"  {figure.name}", f"{_short(figure.value)}{unit}", interval, _target(figure), verdict


def _target(figure: Figure) -> str:
    bounds = (("≥", figure.at_least), ("≤", figure.at_most))
    return ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


def _short(value: float) -> str:
    """At least three digits that count."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def run(work: Path, sections: Sequence[str]) -> Report:
    """Measure section by section; what is measured is written at once, should a later one fail."""
    work.mkdir(parents=True, exist_ok=True)
    report = Report(describe_machine(), {}, {})
    for section in sections:
        print(f"{section} …", file=sys.stderr, flush=True)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=work, prefix=f"{section}-") as folder:
            figures = importlib.import_module(section).measure(Path(folder))
        seconds = round(time.perf_counter() - started, 1)
        report = Report(report.machine, {**report.figures, section: figures}, {**report.seconds, section: seconds})
        (work / "bench.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
        (work / "bench.txt").write_text(report.to_text() + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    options = parser.parse_args()
    print(run(options.work, options.sections).to_text())


if __name__ == "__main__":
    main()
