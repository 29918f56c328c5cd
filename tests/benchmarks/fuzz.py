"""Coverage-guided fuzzing of every parser of what comes from outside: nothing but the promised errors may come out.

    pip install atheris
    python tests/benchmarks/fuzz.py --inputs 1000000 [--seed 0] [--target shard …] [--out FOLDER]

The inputs are dealt to the targets of tests/fuzz_targets.py, each in a process of its own, one after the other, with a
limit on memory and on the time of an input. A finding is any other error, an input that takes too long, or the end of
the process; of equal ones (by type and place) the first input is kept in the folder. Exits with 1 where there are any.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))  # fuzz_targets.py

EXTRA_BYTES = 2 * 2**30
"""Address space that a target may take beyond what it has before the first input."""
SLOW_SECONDS, HANG_SECONDS = 2.0, 20
MAX_ENDS = 8
"""Of one target's processes before their inputs are done."""
SHARES = {
    "root": 200,
    "manifest": 220,
    "array zarr.json": 160,
    "block": 60,
    "shard": 350,
    "item table": 25,
    "part of a table": 100,
    "metadata.jsonl": 90,
    "queries.jsonl": 60,
    "class folders": 2,
    "run config.json": 20,
    "run result.json": 6,
    "model.safetensors": 15,
    "state.safetensors": 4,
    "options": 12,
    "options file": 12,
    "HDF5 import": 4,
    "form": 60,
}
"""Of the inputs, in parts of their sum: fewer where one takes long."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="in all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=SHARES, help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, help="folder for the inputs of findings; default: a new one")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work_off(options.worker, options.inputs, options.seed, options.out, options.work)
        return 0
    if importlib.util.find_spec("atheris") is None:
        sys.exit("The fuzzer needs atheris: pip install atheris")
    out = options.out or Path(tempfile.mkdtemp(prefix="fuzz-"))
    chosen = options.target or list(SHARES)
    total = sum(SHARES[name] for name in chosen)
    num_findings = 0
    print(f"{'target':18} {'inputs':>9} {'seconds':>8} {'per s':>8} {'findings':>8}")
    for name in chosen:
        started = time.perf_counter()
        done, findings = fuzz(name, round(options.inputs * SHARES[name] / total), options.seed, out)
        seconds = time.perf_counter() - started
        print(f"{name:18} {done:9} {seconds:8.0f} {done / seconds:8.0f} {len(findings):8}", flush=True)
        for finding in findings:
            print(f"    {finding}")
        num_findings += len(findings)
    print(f"{num_findings} findings in {out}")
    return 1 if num_findings else 0


def fuzz(name: str, inputs: int, seed: int, out: Path) -> tuple[int, list[str]]:
    """Inputs that were tried, and what was found; a process that ends is one finding, and another goes on."""
    done, ends = 0, {}
    for restart in range(MAX_ENDS):
        process = run_worker(name, inputs - done, seed + 1000 * restart, out)
        counted = re.findall(r"stat::number_of_executed_units: (\d+)|^#(\d+)\b", process.stderr, re.MULTILINE)
        done += max((int(first or second) for first, second in counted), default=0)
        if process.returncode == 0:
            break
        told = re.findall(r"^.*(?:ERROR: |Fatal Python error|SUMMARY: ).*$", process.stderr, re.MULTILINE)
        ends.setdefault(told[0] if told else process.stderr[-300:], None)
        if done >= inputs:
            break
    found = [path.read_text().splitlines()[0] for path in sorted(out.glob(f"{slug(name)}-*.txt"))]
    return done, found + [f"the process ended: {told}" for told in ends]


def run_worker(name: str, inputs: int, seed: int, out: Path) -> subprocess.CompletedProcess[str]:
    """libFuzzer ends the process as it likes, so that its folder is ours to remove."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as work:
        arguments = ["--worker", name, "--inputs", str(inputs), "--seed", str(seed), "--out", str(out), "--work", work]
        return subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, errors="replace")


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def work_off(name: str, inputs: int, seed: int, out: Path, work: Path) -> None:
    """In a process of its own: one target."""
    out.mkdir(parents=True, exist_ok=True)
    import atheris

    with atheris.instrument_imports(include=["saffe_cache"]):
        from fuzz_targets import PROMISED, make_target
    target = make_target(name, work)
    limit_memory()
    corpus = work / "corpus"
    corpus.mkdir()
    for number, example in enumerate(target.examples):
        (corpus / str(number)).write_bytes(example)

    def mutate(data: bytes, max_size: int, mutation_seed: int) -> bytes:
        return target.change(bytes(data), Random(mutation_seed))[:max_size]

    longest = 4 * max(map(len, target.examples)) + 1000
    flags = [f"-runs={inputs}", f"-seed={seed + 1}", f"-max_len={longest}", f"-timeout={HANG_SECONDS}"]
    flags += ["-print_final_stats=1", "-len_control=0", f"-artifact_prefix={out}/{slug(name)}-end-", "-rss_limit_mb=0"]
    once = observed(target.call, PROMISED, out / f"{slug(name)}-{seed}")
    atheris.Setup([sys.argv[0], *flags, str(corpus)], once, custom_mutator=mutate)
    atheris.Fuzz()


def limit_memory() -> None:
    import resource

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + EXTRA_BYTES, resource.RLIM_INFINITY))


def observed(call: Callable[[bytes], None], promised: tuple[type[Exception], ...], prefix: Path) -> Callable[..., None]:
    """The call; what it should not do is written down once for each place."""
    seen: set[str] = set()

    def note(kind: str, place: str, data: bytes, told: str) -> None:
        if f"{kind} {place}" not in seen:
            seen.add(f"{kind} {place}")
            path = Path(f"{prefix}-{len(seen):03}")
            path.with_suffix(".txt").write_text(f"{kind} at {place}\n{told}", errors="backslashreplace")
            path.with_suffix(".input").write_bytes(data)

    def once(data: bytes) -> None:
        started = time.perf_counter()
        try:
            call(data)
        except promised:
            pass
        except Exception as error:
            frames = [one for one in traceback.extract_tb(error.__traceback__) if "saffe_cache/" in one.filename]
            place = f"{frames[-1].filename.rsplit('saffe_cache/')[-1]}:{frames[-1].name}" if frames else "the target"
            note(
                f"{type(error).__name__}: {str(error)[:80]!r}" if not frames else type(error).__name__,
                place,
                data,
                traceback.format_exc(),
            )
        seconds = time.perf_counter() - started
        if seconds > SLOW_SECONDS:
            note("slow", "input", data, f"{seconds:.1f} s")

    return once


if __name__ == "__main__":
    sys.exit(main())
