"""Kill an extraction at random moments, resume it each time, and compare with an uninterrupted one.

    python tests/benchmarks/kill_extraction.py --kills 20 -- --data PATH --encoder image=… --shard-mb 4

Everything behind `--` goes to saffe-extract. Moments are drawn from the whole life of the process, start-up
included. Compared are all files of all arrays, byte for byte; the manifest differs in its times alone.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-c", "import sys; from saffe_cache.cli import extract_command; sys.exit(extract_command())"]


def run(arguments: list[str], cache: Path, kill_after: float | None) -> bool:
    """Run to the end, or kill -9 after so many seconds; True where it ended by itself."""
    process = subprocess.Popen([*COMMAND, *arguments, "--cache", str(cache)], stderr=subprocess.DEVNULL)
    try:
        status = process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return False
    if status:
        raise SystemExit(f"the extraction failed with status {status}")
    return True


def array_files(cache: Path) -> dict[str, bytes]:
    """All files of all arrays: shards, and the metadata of arrays."""
    found = {}
    for path in sorted(cache.rglob("*")):
        name = path.relative_to(cache).as_posix()
        is_manifest = name == "zarr.json" or (name.startswith("encoders/") and name.count("/") == 2)
        if path.is_file() and not is_manifest and not path.name.startswith("."):
            found[name] = path.read_bytes()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    arguments = [argument for argument in options.arguments if argument != "--"]
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole.zarr", Path(folder) / "killed.zarr"
        started = time.perf_counter()
        run(arguments, whole, None)
        seconds = time.perf_counter() - started
        kills = early = 0
        longest = max(6.0, 3 * seconds / options.kills)
        while kills < options.kills:
            if run(arguments, killed, generator.uniform(0.5, longest)):
                early += 1  # it was done before the moment came: begin anew for the kills that are left
                subprocess.run(["rm", "-rf", str(killed)], check=True)
            else:
                kills += 1
        run(arguments, killed, None)
        expected, found = array_files(whole), array_files(killed)
        different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    print(
        f"{kills} kills over {early + 1} extractions of {seconds:.0f} s; {len(expected)} files of "
        f"{sum(map(len, expected.values())) / 1e6:.1f} MB compared, {len(different)} differ {different[:3]}"
    )
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
