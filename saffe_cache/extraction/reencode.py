"""Encode rows of a cache again, with the same encoder, files and blocks as the extractions in its history.

The last bits of a row can depend on the other inputs of its batch, because a matrix product of another height may add
in another order. To produce the same bytes, inputs must therefore be cut into the same blocks as before.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import takewhile

import numpy as np

from saffe_cache.core.features import CacheError
from saffe_cache.core.items import ItemTable
from saffe_cache.encoders.encoder import FrozenEncoder, load_encoder
from saffe_cache.encoders.own import OwnEncoder
from saffe_cache.extraction.config import ExtractConfig, config_from_json, encode_options
from saffe_cache.extraction.encoding import encode_portions
from saffe_cache.extraction.planning import Job, begin_blocks, block_rows, cut_blocks, encoder_request
from saffe_cache.sources.items import Columns, Media, SourceItem
from saffe_cache.sources.registry import read_named_items
from saffe_cache.store.dtypes import to_storage
from saffe_cache.store.inspect import Damage
from saffe_cache.store.layout import ArraySpec, ShardEntry, array_of_view, describe_shard, layers_among
from saffe_cache.store.manifest import EncoderManifest

logger = logging.getLogger(__name__)

_OF_ANY_VERSION = ("library_versions", "model_id", "revision")
"""Fields of a fingerprint that say where an encoder and its code are from; its weights are compared besides."""


@dataclass(frozen=True, kw_only=True)
class PastExtraction:
    """A finished extraction; interrupted runs before it encoded the same blocks."""

    config: ExtractConfig
    first_new: Mapping[str, int]
    """For each array that it added rows to: the first input of these rows. Earlier rows were not changed."""
    start: int
    stop: int
    """It encoded the inputs from `start` up to, but not including, `stop`."""
    block_rows: int

    def inputs_of(self, shard: LostShard) -> range:
        """The inputs whose rows in a shard come from this extraction."""
        first = max(shard.inputs.start, self.first_new.get(shard.array, self.stop))
        return range(first, max(first, min(shard.inputs.stop, self.stop)))

    def blocks_of(self, shard: LostShard) -> Iterator[range]:
        """The blocks in which these inputs' rows were encoded."""
        mine = self.inputs_of(shard)
        begin = max(self.start, mine.start // self.block_rows * self.block_rows)
        blocks = cut_blocks(begin, self.stop, self.block_rows) if mine else iter(())
        return takewhile(lambda block: block.start < mine.stop, blocks)


def past_extractions(manifest: EncoderManifest, device: str | None = None) -> list[PastExtraction]:
    """The finished extractions in a manifest's history, oldest first; `device` replaces the one in their configs.

    Raises:
        ValueError, TypeError: this release cannot read a config in the history, or its device is unavailable.
    """
    inputs_in: dict[str, int] = {}
    finished = 0
    found = []
    for entry in manifest.extractions:
        config, stop = config_from_json(entry["config"]), int(entry["inputs"][1])
        config = replace(config, device=device, device_map=None, max_memory={}) if device else config
        names = (inputs_in.keys() | _requested(config, manifest)) & manifest.arrays.keys()
        first_new = {name: inputs_in.get(name, 0) for name in names if inputs_in.get(name, 0) < stop}
        states = [manifest.arrays[f"hidden_states/{layer}"].spec for layer in layers_among(names)]
        rows = block_rows(encode_options(config), states, manifest.fingerprint.fields.get("encoded_tokens"))
        encoded = [first for name, first in first_new.items() if name != "offsets"]
        start = begin_blocks(min(encoded, default=stop), finished, rows)
        found.append(PastExtraction(config=config, first_new=first_new, start=start, stop=stop, block_rows=rows))
        inputs_in |= dict.fromkeys(first_new, stop)
        finished = stop
    return found


def _requested(config: ExtractConfig, manifest: EncoderManifest) -> set[str]:
    """The arrays that a config requests."""
    layers = config.layers.get(manifest.modality, (manifest.num_layers - 1, manifest.num_layers))
    vectors = {"pooled", "projected"} if config.pooled else set()
    plain = {f"hidden_states/{layer}" for layer in layers} | vectors
    return plain | {array_of_view(view, name) for view in config.view_names for name in plain} | {"offsets"}


def reload_encoder(
    manifest: EncoderManifest,
    recorded: ExtractConfig,
    moved: str | OwnEncoder | None,
    option: str,
    *,
    any_version: bool = False,
) -> FrozenEncoder:
    """Load the encoder of a manifest, from where an extraction found it or where it has moved.

    Args:
        recorded: the options of its latest extraction.
        moved: a hub id or a folder, or the module that was given as an OwnEncoder.
        option: the option for `moved`, for the error message.
        any_version: whether versions of libraries may differ, which is logged; numbers then may by rounding.

    Raises:
        ValueError: the encoder is unavailable.
        CacheError: it is another encoder.
    """
    made_with = manifest.fingerprint
    place = recorded.encoder[manifest.modality] if moved is None or isinstance(moved, OwnEncoder) else moved
    request = replace(
        encoder_request(recorded, manifest.modality),
        model_id=place,
        revision=made_with.fields.get("revision"),
        dtype=str(made_with.fields.get("dtype", "float32")),
        layers=None,
        decoding="scaled" if "decoding" in made_with.fields else "full",
        own=moved if isinstance(moved, OwnEncoder) else None,
    )
    encoder = load_encoder(request)
    differences = encoder.fingerprint.differences(made_with)
    if any_version:
        versions = [one for one in differences if one.startswith("library_versions")]
        if versions:
            logger.warning("%s: %s; vectors may differ by rounding.", manifest.key, versions[0])
        differences = [one for one in differences if one.partition(":")[0] not in _OF_ANY_VERSION]
    if differences:
        whose, other = ("run", "train again") if any_version else ("cache", "extract into a new cache")
        raise CacheError(
            f"{place} is not the encoder of the {whose} ({'; '.join(differences)}). Name that with {option}, "
            f"use the same library versions, or {other}."
        )
    return encoder


@dataclass(kw_only=True, eq=False)
class LostShard:
    """A damaged shard of hidden states or vectors, and its rows that were encoded again."""

    damage: Damage
    spec: ArraySpec
    entry: ShardEntry
    inputs: range
    """Inputs with a row in it."""
    rows: np.ndarray | None = None
    num_added: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)
    """Reason for each input that could not be encoded."""

    @property
    def array(self) -> str:
        return self.damage.name

    @property
    def is_complete(self) -> bool:
        return self.num_added == self.entry.rows

    def add(self, first: int, rows: np.ndarray) -> None:
        """Add rows of the array, starting with row `first`; rows of other shards are ignored."""
        begin = self.damage.index * self.spec.shard_rows
        start, stop = max(first, begin), min(first + len(rows), begin + self.entry.rows)
        if start < stop:
            if self.rows is None:
                self.rows = np.empty((self.entry.rows, *self.spec.stored_shape), self.spec.numpy_dtype)
            self.rows[start - begin : stop - begin] = rows[start - first : stop - first]
            self.num_added += stop - start


def lost_shard(job: Job, damage: Damage) -> LostShard:
    """A damaged shard of a job's array, without rows."""
    array = job.manifest.arrays[damage.name]
    entry, begin = array.shards[damage.index], damage.index * array.spec.shard_rows
    first, last = (job.input_of(damage.name, row) for row in (begin, begin + entry.rows - 1))
    return LostShard(damage=damage, spec=array.spec, entry=entry, inputs=range(first, last + 1))


def offset_rows(job: Job, index: int) -> np.ndarray:
    """The rows of a shard of `offsets`, computed from the tokens of texts or the lengths of sounds."""
    assert job.offsets is not None
    array = job.manifest.arrays["offsets"]
    begin = index * array.spec.shard_rows
    return to_storage(job.offsets[begin : begin + array.shards[index].rows], "int64")


def check_tokens(job: Job) -> None:
    """Raises CacheError if there are other numbers of tokens than in the cache."""
    array = job.manifest.arrays["offsets"]
    for index, entry in enumerate(array.shards):
        if describe_shard(array.spec, offset_rows(job, index)).crc32c != entry.crc32c:
            if job.is_of_texts:
                raise CacheError(
                    f"the tokenizer gives other tokens than before (offsets, shard {index}). Install the library "
                    "versions in the manifest's history, or extract into a new cache."
                )
            raise CacheError(
                f"the sounds have other lengths than before, or some are missing (offsets, shard {index}). Name the "
                "data that the cache was made from with --data, or restore offsets/ from a copy."
            )


def encode_lost(
    job: Job, lost: Sequence[LostShard], past: Sequence[PastExtraction], media: Mapping[bytes, Media]
) -> Iterator[LostShard]:
    """Encode the rows of lost shards again; yields each shard when it is complete.

    Raises:
        CacheError: a number overflows, or an input does not fit into memory.
        OSError: a file that was read for its hash cannot be read again.
    """
    for extraction in past:
        pending = [shard for shard in lost if extraction.inputs_of(shard)]
        blocks = {block for shard in pending for block in extraction.blocks_of(shard)}
        if not pending:
            continue
        job.options, job.chosen = encode_options(extraction.config), sorted(blocks, key=lambda block: block.start)
        specs = {shard.array: shard.spec for shard in pending}
        job.select(specs)
        with closing(encode_portions(job, media, specs)) as portions:
            for portion in portions:
                for shard in pending:
                    first, rows = portion.rows[shard.array]
                    mine = extraction.inputs_of(shard)
                    start, stop = (job.first_row(shard.array, number) for number in (mine.start, mine.stop))
                    shard.unreadable |= {row: why for row, why in portion.invalid.items() if row in mine}
                    shard.add(max(first, start), rows[max(0, start - first) : max(0, stop - first)])
                yield from (shard for shard in pending if shard.is_complete)
                pending = [shard for shard in pending if not shard.is_complete]


class SourceFiles:
    """The unchanged files of some inputs, found by item and content."""

    def __init__(
        self, job: Job, table: ItemTable, places: Iterable[tuple[str, Columns, bool]], inputs: Collection[int]
    ) -> None:
        """`places`: datasets that may contain the files, columns, whether to stream; other files are not read."""
        self._job, self._modality = job, job.manifest.modality
        self.media: dict[bytes, Media] = {}
        """By content hash."""
        self._found: dict[str, SourceItem] = {}
        self._failures: list[str] = []
        rows = table.rows.get(self._modality, np.zeros(0, np.int64))
        ids = set(table.ids.take(np.flatnonzero(np.isin(rows, np.fromiter(inputs, np.int64)))))
        for data, columns, streaming in places if ids else ():
            try:
                found = read_named_items(data, columns, ids, streaming=streaming)
            except (ValueError, OSError) as error:
                self._failures.append(str(error))
                continue
            self._found |= {item.id: item for item in found}
            self.media |= {
                one.hashes[self._modality]: one.media[self._modality] for one in found if self._modality in one.hashes
            }

    def absent(self, inputs: range) -> list[str]:
        """Which inputs cannot be encoded again, and why; unused and invalid inputs need not be."""
        job = self._job
        rows = [row for row in inputs if job.is_wanted[row] and row not in job.manifest.invalid]
        lost = [job.name_of(row) for row in rows if job.inputs.content_hash[row].tobytes() not in self.media]
        return [] if job.is_of_texts else [f"{item}: {self._why(item)}" for item in lost]

    def _why(self, item_id: str) -> str:
        item = self._found.get(item_id)
        if item is None:
            return " ".join(self._failures) or "it is no longer in the data"
        return "the file has changed since it was extracted" if self._modality in item.hashes else item.problem
