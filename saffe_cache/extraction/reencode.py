"""Rows of lost shards encoded again, in the blocks in which they were encoded first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from saffe_cache.core.features import CacheError
from saffe_cache.extraction.config import encode_options
from saffe_cache.extraction.encoding import encode_portions
from saffe_cache.extraction.history import PastExtraction
from saffe_cache.extraction.planning import Job, converters_of
from saffe_cache.sources import Media
from saffe_cache.store.dtypes import to_storage
from saffe_cache.store.layout import ArraySpec, ShardEntry, describe_shard
from saffe_cache.store.manifest import layers_among


@dataclass(kw_only=True, eq=False)
class LostShard:
    """A shard of hidden states or vectors, and what of it was encoded again."""

    array: str
    index: int
    spec: ArraySpec
    entry: ShardEntry
    inputs: range
    """Those that have a row in it."""
    rows: np.ndarray | None = None
    num_taken: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)
    """Inputs that could not be encoded, with the reason."""

    @property
    def is_whole(self) -> bool:
        return self.num_taken == self.entry.rows

    def take(self, first: int, rows: np.ndarray) -> None:
        """Rows of the array from number `first` on; those of other shards are passed over."""
        begin = self.index * self.spec.shard_rows
        start, stop = max(first, begin), min(first + len(rows), begin + self.entry.rows)
        if start < stop:
            if self.rows is None:
                self.rows = np.empty((self.entry.rows, *self.spec.stored_shape), self.spec.numpy_dtype)
            self.rows[start - begin : stop - begin] = rows[start - first : stop - first]
            self.num_taken += stop - start


def lost_shard(job: Job, name: str, index: int) -> LostShard:
    """A shard of a job's array, with nothing encoded yet."""
    array = job.manifest.arrays[name]
    entry, begin = array.shards[index], index * array.spec.shard_rows
    inputs = range(begin, begin + entry.rows)
    if job.offsets is not None and job.is_flat(name):
        first = int(np.searchsorted(job.offsets, begin, side="right")) - 1
        inputs = range(first, int(np.searchsorted(job.offsets, inputs.stop, side="left")))
    return LostShard(array=name, index=index, spec=array.spec, entry=entry, inputs=inputs)


def offset_rows(job: Job, index: int) -> np.ndarray:
    """The rows of a shard of `offsets`, from the tokens."""
    assert job.offsets is not None
    array = job.manifest.arrays["offsets"]
    begin = index * array.spec.shard_rows
    return to_storage(job.offsets[begin : begin + array.shards[index].rows], "int64")


def check_tokens(job: Job) -> None:
    """
    Raises:
        CacheError: the texts come out in other tokens than those whose places the cache keeps.
    """
    array = job.manifest.arrays["offsets"]
    for index, entry in enumerate(array.shards):
        if describe_shard(array.spec, offset_rows(job, index)).crc32c != entry.crc32c:
            raise CacheError(
                f"the tokenizer cuts texts otherwise than before (offsets, shard {index}). Install the versions that "
                "the manifest's history names, or extract into a new cache."
            )


def encode_lost(
    job: Job, lost: Sequence[LostShard], past: Sequence[PastExtraction], media: Mapping[bytes, Media]
) -> Iterator[LostShard]:
    """Encode again what the shards hold, and give each when it is whole.

    Raises:
        CacheError: a number overflows, or a single input does not fit into memory.
        OSError: a file that could be read for its hash cannot be read any more.
    """
    for extraction in past:
        pending = [shard for shard in lost if extraction.inputs_of(shard.array, shard.inputs)]
        names = {shard.array for shard in pending}
        blocks = {block for shard in pending for block in extraction.blocks_of(shard.array, shard.inputs)}
        if not pending:
            continue
        job.options, job.chosen = encode_options(extraction.config), sorted(blocks, key=lambda block: block.start)
        job.encoder.select(
            layers_among(names),
            vectors=any(name in job.encoder.vector_widths for name in names),
            converters=converters_of({name: job.arrays[name] for name in names}),
        )
        specs = {name: job.manifest.arrays[name].spec for name in names}
        with closing(encode_portions(job, media, specs)) as portions:
            for portion in portions:
                for shard in pending:
                    first, rows = portion.rows[shard.array]
                    mine = extraction.inputs_of(shard.array, shard.inputs)
                    start, stop = (job.first_row(shard.array, number) for number in (mine.start, mine.stop))
                    shard.unreadable |= {row: why for row, why in portion.invalid.items() if row in mine}
                    shard.take(max(first, start), rows[max(0, start - first) : max(0, stop - first)])
                yield from (shard for shard in pending if shard.is_whole)
                pending = [shard for shard in pending if not shard.is_whole]
