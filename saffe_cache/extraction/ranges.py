"""Cut an encoder's work into ranges of inputs that different processes take.

A range owns whole shards: of every array those whose first row belongs to one of its inputs, so each shard has one
owner, whatever the lengths of texts and sounds. Its last shards may end behind the range, and inputs are encoded in the
blocks of the whole job, so a few blocks at its edges are encoded twice. Ranges are so long that this costs at most 5 %,
unless there would then be less than two of them for each worker.
"""

from __future__ import annotations

from collections.abc import Mapping

from saffe_cache.extraction.planning import Job, cut_blocks
from saffe_cache.store.manifest import ArrayManifest

_MOST_TWICE = 0.05
"""Fraction of the inputs that may be encoded twice."""
_RANGES_PER_WORKER = 2


def cut_ranges(job: Job, num_workers: int) -> tuple[int, ...]:
    """The edges of the ranges of a job, from 0 to its number of inputs.

    An edge between two ranges is an input at which a shard begins of the array whose shards have the most inputs.
    """
    widths = {name: _width(job, name) for name in job.missing if name != "offsets"}
    if not widths:
        return (0, job.num_inputs)
    widest = max(sorted(widths), key=widths.__getitem__)
    spec, num_rows = job.arrays[widest]
    first = job.first_row(widest, job.start) // spec.shard_rows + 1
    num_shards = max(1, -(-num_rows // spec.shard_rows) - first + 1)
    needed = -(-_encoded_twice(job, widths) // max(1, int(_MOST_TWICE * widths[widest])))
    step = max(1, min(needed, num_shards // (_RANGES_PER_WORKER * num_workers)))
    starts = range(first * spec.shard_rows, num_rows, spec.shard_rows)[step - 1 :: step]
    inner = {job.input_of(widest, row) for row in starts}
    return tuple(sorted({0, job.num_inputs} | {edge for edge in inner if job.start < edge}))


def _width(job: Job, name: str) -> float:
    """Inputs of a shard, on average."""
    spec, rows = job.arrays[name]
    return spec.shard_rows * job.num_inputs / max(1, rows)


def _encoded_twice(job: Job, widths: Mapping[str, float]) -> int:
    """About how many inputs are encoded twice at each edge."""
    specs = {job.arrays[name][0].shard_rows for name in widths}
    is_aligned = len(specs) == 1 and not any(job.is_flat(name) for name in widths)
    blocks = 0 if is_aligned and specs.pop() % job.block_rows == 0 else 2 * job.block_rows
    return blocks if is_aligned else blocks + int(sorted(widths.values())[-2] if len(widths) > 1 else 0)


def owned_rows(job: Job, name: str, inputs: range) -> range:
    """The rows of an array that a range owns: whole shards, but for the array's tail."""
    spec, num_rows = job.arrays[name]
    first, stop = (
        num_rows if number == job.num_inputs else -(-job.first_row(name, number) // spec.shard_rows) * spec.shard_rows
        for number in (inputs.start, inputs.stop)
    )
    return range(min(first, num_rows), min(stop, num_rows))


def missing_rows(job: Job, inputs: range) -> dict[str, range]:
    """The owned rows of each array that are not committed; empty ranges for arrays that lack none."""
    found = {}
    for name in job.arrays:
        rows = owned_rows(job, name, inputs)
        first = _first_missing(job.manifest.arrays[name], rows) if name != "offsets" else rows.stop
        found[name] = range(first, rows.stop) if first < rows.stop else range(0)
    return found


def _first_missing(array: ArrayManifest, rows: range) -> int:
    """The first row that is not committed, among rows that begin with a shard."""
    for start in range(rows.start, rows.stop, array.spec.shard_rows):
        held = _committed(array, start // array.spec.shard_rows)
        if start + held < min(start + array.spec.shard_rows, rows.stop):
            return start + held
    return rows.stop


def _committed(array: ArrayManifest, index: int) -> int:
    """Committed rows of a shard."""
    entry = array.entry(index)
    return entry.rows if entry else 0


def blocks_for(job: Job, start: int, rows: Mapping[str, range]) -> list[range]:
    """The blocks, of all those from input `start` on, that hold some rows."""
    needed = [
        (job.input_of(name, one.start), job.input_of(name, one.stop - 1)) for name, one in rows.items() if len(one)
    ]
    if not needed:
        return []
    first, last = min(one for one, _ in needed), max(one for _, one in needed)
    return [
        block
        for block in cut_blocks(start, job.num_inputs, job.block_rows)
        if block.stop > first and block.start <= last
    ]
