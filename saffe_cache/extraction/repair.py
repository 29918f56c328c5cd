"""Repair a damaged cache: recompute the parts that `saffe cache verify` finds damaged from the encoder and the data.

The manifest keeps the config of each extraction: where the data and the encoder are, and which inputs were encoded
together. On the same machine, a shard is therefore restored byte for byte; elsewhere it may differ by rounding, and its
entry in the manifest is replaced, after the shard: if the process is killed in between, the next repair restores it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from saffe_cache.core.features import MODALITIES, CacheError, Weights
from saffe_cache.core.items import ItemTable
from saffe_cache.core.options import require
from saffe_cache.core.outputs import provenance
from saffe_cache.extraction.blocks import checked_blocks
from saffe_cache.extraction.config import RepairConfig, encode_options
from saffe_cache.extraction.planning import Job, find_offsets, new_job, stored_offsets
from saffe_cache.extraction.reencode import (
    LostShard,
    PastExtraction,
    SourceFiles,
    check_tokens,
    encode_lost,
    lost_shard,
    offset_rows,
    past_extractions,
    reload_encoder,
)
from saffe_cache.sources.items import Columns
from saffe_cache.store.arrays import ArrayFiles
from saffe_cache.store.claims import held_cache
from saffe_cache.store.inspect import Damage, find_damage
from saffe_cache.store.layout import describe_shard, rows_without_index
from saffe_cache.store.manifest import read_encoder, write_encoder
from saffe_cache.store.parts import read_table
from saffe_cache.store.root import existing_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.writer import write_weights

_NUM_NAMED = 3
_NO_ROWS = "no data tell the rows of its inputs. Restore tables/ from a copy, or extract into a new cache."
_NO_TABLE = "the item table, which lists its inputs, is damaged. Restore the table first."
_NO_MANIFEST = (
    "only the manifest lists the valid rows. Restore its zarr.json from a copy, or extract this encoder into a new "
    "cache."
)
_UNFINISHED = (
    "its extraction is unfinished, so the manifest does not say where data and encoder are. Finish it with saffe "
    "extract, then repair again."
)


@dataclass(kw_only=True)
class RepairReport:
    """The result for each damaged part, in one line."""

    num_shards: int
    """Shards that were read."""
    restored: list[str] = field(default_factory=list)
    """Parts restored byte for byte."""
    rounded: list[str] = field(default_factory=list)
    """Parts restored with rounding differences."""
    left: list[str] = field(default_factory=list)
    """Parts that are still damaged."""

    def restore(self, place: str) -> None:
        self.restored.append(f"{place}: restored, byte for byte")

    def leave(self, damage: Damage, why: str) -> None:
        self.left.append(f"{damage.place}: damaged and not repaired: {why}")

    @property
    def exit_status(self) -> int:
        return 1 if self.left else 0

    def __str__(self) -> str:
        num_damaged = len(self.restored) + len(self.rounded) + len(self.left)
        rounded = f" ({len(self.rounded)} of them within rounding)" if self.rounded else ""
        total = (
            f"{self.num_shards} shards read, {num_damaged} damaged, {num_damaged - len(self.left)} repaired"
            f"{rounded}, {len(self.left)} not"
        )
        return "\n".join([*self.restored, *self.rounded, *self.left, total])


def repair(config: RepairConfig) -> RepairReport:
    """Repair a cache; the report lists what was repaired and what was not, and why.

    Raises:
        ValueError: `encoder` names no encoder of the cache.
        CacheError: there is no cache, or a number overflows.
        OSError: the disk is full or gone, or another process writes to the cache; the repair can be run again.
    """
    storage = Storage(config.cache)
    root = existing_root(storage)
    for name in config.encoder:
        known = (*MODALITIES, *root.encoders)
        require(name in known, "encoder", f"{name}=…", " or ".join(f"{one}=…" for one in known))
    with held_cache(storage):
        num_shards, damage = find_damage(storage)
        report = RepairReport(num_shards=num_shards)
        if any(one.part == "table" for one in damage):
            for one in damage:
                report.leave(one, _NO_ROWS if one.part == "table" else _NO_TABLE)
            return report
        table = read_table(storage, existing_root(storage))
        for key in dict.fromkeys(one.encoder for one in damage):
            _EncoderRepair(storage, table, config, report, [one for one in damage if one.encoder == key]).run()
    return report


class _EncoderRepair:
    """Repairs the damaged parts of one encoder."""

    def __init__(
        self, storage: Storage, table: ItemTable, config: RepairConfig, report: RepairReport, damage: Sequence[Damage]
    ) -> None:
        self._storage, self._table, self._config, self._report = storage, table, config, report
        self._damage, self._key = damage, damage[0].encoder
        self._rounded: list[str] = []
        """Shards whose checksum differs from that of the extraction, for the manifest's history."""

    def run(self) -> None:
        """Repair each part from the manifest, its own bytes, the encoder, or the encoder and the data."""
        if self._damage[0].part == "manifest":
            self._report.leave(self._damage[0], _NO_MANIFEST)
            return
        self._manifest = read_encoder(self._storage, self._key)
        harder = [one for one in self._damage if not self._repair_from_cache(one)]
        if not harder:
            return
        try:
            past = past_extractions(self._manifest, self._config.device)
            self._job = self._plan(past)
        except (CacheError, ValueError, TypeError, ImportError, OSError) as error:
            for one in harder:
                self._report.leave(one, str(error))
            return
        self._repair_weights([one for one in harder if one.part == "weights"])
        self._repair_shards([one for one in harder if one.part == "shard"], past)

    def _repair_from_cache(self, damage: Damage) -> bool:
        """Repair an array's `zarr.json`, or a shard of which only the index is damaged; False if more is needed."""
        if damage.part == "metadata":
            self._files(damage).write_metadata(self._manifest.arrays[damage.name].rows)
        elif damage.part == "shard":
            files, entry = self._files(damage), self._manifest.arrays[damage.name].shards[damage.index]
            try:
                data = self._storage.read(files.shard(damage.index))
            except (CacheError, OSError):
                return False
            rows = rows_without_index(files.spec, entry, data)
            if rows is None:
                return False
            files.write(damage.index, rows)
        else:
            return False
        self._report.restore(damage.place)
        return True

    def _files(self, damage: Damage) -> ArrayFiles:
        return ArrayFiles(self._storage, self._key, damage.name, self._manifest.arrays[damage.name].spec)

    def _plan(self, past: Sequence[PastExtraction]) -> Job:
        """A job with the encoder that the cache was made with.

        Raises:
            ValueError: the encoder is unavailable.
            CacheError: it is another encoder, the manifest does not name it, or its tokenizer gives other tokens.
        """
        manifest, modality = self._manifest, self._manifest.modality
        if not past:
            raise CacheError(_UNFINISHED)
        moved = self._config.encoder.get(self._key) or self._config.encoder.get(modality)
        encoder = reload_encoder(manifest, past[-1].config, moved, f"--encoder {modality}=…")
        job = new_job(encoder, manifest, encode_options(past[-1].config), self._table)
        job.arrays = {name: (array.spec, array.rows) for name, array in manifest.arrays.items()}
        self._find_offsets(job, past)
        if job.offsets is not None:
            check_tokens(job)
        return job

    def _find_offsets(self, job: Job, past: Sequence[PastExtraction]) -> None:
        """Those of texts by their tokens; of sounds those in the cache, or by their lengths if these are damaged."""
        is_damaged = any(one.name == "offsets" and one.part == "shard" for one in self._damage)
        if job.encoder.windows and not is_damaged:
            job.offsets = stored_offsets(self._storage, self._manifest)
            return
        places = _places(self._config, past) if job.encoder.windows else ()
        find_offsets(job, np.zeros(1, np.int64), SourceFiles(job, self._table, places, range(job.num_inputs)).media)

    def _repair_weights(self, damage: Sequence[Damage]) -> None:
        layers = [int(one.name.removeprefix("blocks/")) for one in damage if one.name != "language_model"]
        encoder = self._job.encoder
        if layers:
            encoder.select(layers, vectors=False)
        blocks, _ = checked_blocks(encoder, layers, self._job.cut_kinds)
        weights: dict[str, Weights] = {f"blocks/{layer}": block for layer, block in blocks.items()}
        if encoder.language_model:
            weights["language_model"] = encoder.language_model
        for one in damage:
            write_weights(self._storage, self._key, one.name, weights[one.name])
            self._report.restore(one.place)

    def _repair_shards(self, damage: Sequence[Damage], past: Sequence[PastExtraction]) -> None:
        job, shards = self._job, []
        for one in damage:
            if one.name == "offsets":
                self._files(one).write(one.index, offset_rows(job, one.index))
                self._report.restore(one.place)
            else:
                shards.append(lost_shard(job, one))
        needed = {row for shard in shards for one in past for block in one.blocks_of(shard) for row in block}
        sources = SourceFiles(job, self._table, _places(self._config, past), needed)
        lost = []
        for shard in shards:
            if sum(len(one.inputs_of(shard)) for one in past) < len(shard.inputs):
                self._report.leave(shard.damage, _UNFINISHED)
            elif absent := sources.absent(shard.inputs):
                self._report.leave(shard.damage, f"{_some(absent)}. Name the data that it was made from with --data.")
            else:
                lost.append(shard)
        for shard in encode_lost(job, lost, past, sources.media):
            self._store(shard)

    def _store(self, shard: LostShard) -> None:
        manifest, damage, rows, shard.rows = self._manifest, shard.damage, shard.rows, None
        assert rows is not None
        invalid = {row: why for row, why in shard.unreadable.items() if row not in manifest.invalid}
        broken = [f"input {row}: {why}" for row, why in invalid.items() if self._job.is_wanted[row]]
        if broken:
            self._report.leave(
                damage, f"{_some(broken)}. It was readable during extraction: use the same library versions."
            )
            return
        self._files(damage).write(damage.index, rows)
        entry = describe_shard(shard.spec, rows)
        if entry.crc32c == shard.entry.crc32c:
            self._report.restore(damage.place)
            return
        manifest.arrays[shard.array].shards[damage.index] = entry
        manifest.invalid |= invalid
        if not self._rounded:
            manifest.history.append({**provenance(self._config), "repaired": self._rounded})
        self._rounded.append(damage.place)
        write_encoder(self._storage, manifest)
        gone = f"; {len(invalid)} unused inputs were lost with their files" if invalid else ""
        self._report.rounded.append(
            f"{damage.place}: restored within rounding, not byte for byte: its checksum is now {entry.crc32c}, "
            f"was {shard.entry.crc32c}{gone}"
        )


def _places(config: RepairConfig, past: Sequence[PastExtraction]) -> list[tuple[str, Columns, bool]]:
    """Where the data are and how to read them, without duplicates."""
    recorded = [(one.config.data, Columns(**one.config.column), one.config.streaming) for one in past]
    if config.data:
        recorded = [(data, columns, streaming) for data in config.data for _, columns, streaming in recorded]
    return list(dict.fromkeys(recorded))


def _some(reasons: Sequence[str]) -> str:
    more = len(reasons) - _NUM_NAMED
    return "; ".join(reasons[:_NUM_NAMED]) + (f"; and {more} more" if more > 0 else "")
