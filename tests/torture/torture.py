"""Faults that people's jobs die of, each really caused: kills, full and vanishing disks, limits, several at once.

    python tests/torture/torture.py --work runs/torture            (make torture; under 20 minutes on two cores)
    python tests/torture/torture.py --work runs/torture --quick    (a part of it, in seconds; the tests run this)

Writes torture.txt and torture.json to the work folder: a table of faults, what came of them, how often. Promised is:
a kill costs the time since the last commit and nothing else; any other fault is survived, or ends the command in one
line that says what to do; what is committed is whole; and the same command, run again without the fault, leaves what
an uninterrupted run leaves, byte for byte but for times. Ends with status 1 where anything else came of a fault.

The commands run on tiny encoders, in forked children (forked.py). Disks need a mount namespace, which root has, and
elsewhere users where the system lets them; without one these faults are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's allocator; what forks has one thread
sys.path.append(str(Path(__file__).parents[1]))

import cluster
import faults
import kills
import mounts
import together
from cases import Case, make_cases
from table import Table


def torture(cases: dict[str, Case], table: Table, generator: random.Random, has_mounts: bool) -> None:
    extraction, growth, training, evaluation = (
        cases[name] for name in ("extraction", "growth", "training", "evaluation")
    )
    for case in cases.values():
        kills.kill_at_random(case, 30, table, generator)
    for case in (extraction, growth):
        kills.kill_ranks(case, 20, table, generator)
        cluster.die_on_ray(case, 10, table, generator)
        kills.kill_at_commits(case, table)
        kills.kill_at_calls(case, "replace", table, step=8)
        kills.kill_at_calls(case, "fsync", table, step=24)
    for case in (training, evaluation):
        kills.kill_at_calls(case, "replace", table)
        kills.kill_at_calls(case, "replace", table, after=True)
        kills.kill_at_calls(case, "fsync", table, step=2)
    for case in (extraction, training, evaluation):
        faults.limit_file_sizes(case, table, 6)
        faults.limit_handles(case, table, range(10, 34, 4))
        faults.limit_memory(case, table, range(0, 400, 80))
    faults.kill_workers(extraction, table, range(1, 80, 8))
    faults.stop_groups(extraction, table, range(1, 150, 15))
    if has_mounts:
        for case, calls in ((extraction, 150), (growth, 150), (training, 18), (evaluation, 4)):
            disk = faults.on_disk(case)
            faults.fill_disks(disk, table, 6)
            faults.turn_read_only(disk, table, range(0, calls, max(1, calls // 10)))
            faults.take_mounts_away(disk, table, range(1, calls, max(1, calls // 10)))
    for case in (extraction, growth, training, evaluation):
        together.write_twice(case, table, 8, generator)
        together.leave_locks(case, table, 2)
    together.train_side_by_side(training, table, 4)
    together.read_beside_a_writer(growth, training, table, 3)


def quick(cases: dict[str, Case], table: Table, generator: random.Random, has_mounts: bool) -> None:
    """One of each kind, or two."""
    extraction, training, evaluation = (cases[name] for name in ("extraction", "training", "evaluation"))
    for case in (extraction, training, evaluation):
        kills.kill_at_random(case, 1, table, generator)
    kills.kill_ranks(extraction, 1, table, generator)
    kills.kill_at_calls(training, "replace", table, step=12, after=True)
    faults.limit_handles(extraction, table, range(12, 13))
    faults.kill_workers(extraction, table, range(9, 10))
    if has_mounts:
        disk = faults.on_disk(training)
        faults.fill_disks(disk, table, 1)
        faults.turn_read_only(disk, table, range(3, 4))
        faults.take_mounts_away(disk, table, range(2, 3))
    together.write_twice(training, table, 1, generator)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is written; it is emptied first")
    parser.add_argument("--quick", action="store_true", help="a part of it, in seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    work: Path = options.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    has_mounts = mounts.can_mount()
    table = Table()
    (quick if options.quick else torture)(
        make_cases(work, grows=not options.quick), table, random.Random(options.seed), has_mounts
    )
    if not has_mounts:
        table.add("faults of disks", "left out: no mounts for this user")
    table.write(work)
    print(table.to_text())
    return 1 if table.broken else 0


if __name__ == "__main__":
    sys.exit(main())
