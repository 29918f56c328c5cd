"""Peak memory of an extraction at 1 and 8 times the items.

    python tests/benchmarks/extraction_memory.py --items 200 -- --data PATH --encoder image=… --image-size 112

Everything behind `--` goes to saffe extract, with `--max-items train=N`. Prints the largest resident size of
each process; the table of items and their hashes is the one thing that may grow, by less than 1 KB an item.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

MEASURE = """
import resource, sys
from saffe_cache.cli import extract_command
status = extract_command()
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


def peak_megabytes(arguments: list[str], items: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        options = ["--cache", str(Path(folder) / "cache.zarr"), "--max-items", f"train={items}", "--splits", "train"]
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *arguments, *options], check=True, stdout=subprocess.PIPE, text=True
        )
    return int(done.stdout.split("PEAK")[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    arguments = [argument for argument in options.arguments if argument != "--"]
    for factor in (1, 8):
        print(f"{factor * options.items} items: {peak_megabytes(arguments, factor * options.items):.0f} MB")


if __name__ == "__main__":
    main()
