"""Repair a damaged cache: recompute the parts that `saffe cache verify` finds damaged from the encoder and the data.

The manifest keeps the config of each extraction: where the data and the encoder are, and which inputs were encoded
together. On the same machine, a shard is therefore restored byte for byte; elsewhere it may differ by rounding, and its
entry in the manifest is replaced.

A shard is written before its entry. If the process is killed in between, the shard differs from its entry: it is still
damaged, and the next repair restores it. All earlier repairs are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from saffe_cache.core.features import MODALITIES, CacheError, ItemTable
from saffe_cache.core.options import require
from saffe_cache.core.outputs import provenance
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.extraction.config import RepairConfig, encode_options
from saffe_cache.extraction.planning import Job, table_parts, tokenize
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
from saffe_cache.store.inspect import Damage, find_damage
from saffe_cache.store.layout import describe_shard, rows_without_index
from saffe_cache.store.manifest import ArrayFiles, existing_root, read_encoder, write_encoder
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import read_table
from saffe_cache.store.writer import write_weights

_NUM_NAMED = 3


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
    with storage.writer_lock():
        storage.remove_partial_files()
        num_shards, damage = find_damage(storage)
        report = RepairReport(num_shards=num_shards)
        if any(one.part == "table" for one in damage):
            report.left += [f"{one.place}: damaged and not repaired: {_why_left(one)}" for one in damage]
            return report
        table = read_table(storage, f"tables/{existing_root(storage).table}")
        for key in dict.fromkeys(one.encoder for one in damage):
            _EncoderRepair(storage, table, config, report, [one for one in damage if one.encoder == key]).run()
    return report


def _why_left(damage: Damage) -> str:
    if damage.part == "table":
        return "no data tell the rows of its inputs. Restore tables/ from a copy, or extract into a new cache."
    return "the item table, which lists its inputs, is damaged. Restore the table first."


class _EncoderRepair:
    """Repairs the damaged parts of one encoder."""

    def __init__(
        self, storage: Storage, table: ItemTable, config: RepairConfig, report: RepairReport, damage: Sequence[Damage]
    ) -> None:
        self._storage, self._table, self._config, self._report = storage, table, config, report
        self._damage, self._key = damage, damage[0].encoder
        self._rounded: list[str] = []

    def run(self) -> None:
        """Repair each part from the manifest, its own bytes, the encoder, or the encoder and the data."""
        if self._damage[0].part == "manifest":
            self._leave(
                self._damage[0],
                "only the manifest lists the valid rows. Restore its zarr.json from a copy, or extract this encoder "
                "into a new cache.",
            )
            return
        self._manifest = read_encoder(self._storage, self._key)
        harder = [one for one in self._damage if not self._repair_from_cache(one)]
        if not harder:
            return
        try:
            past = past_extractions(self._manifest, self._config.device)
            encoder = self._load_encoder(past)
            self._job = self._plan(encoder, past)
        except (CacheError, ValueError, TypeError, ImportError, OSError) as error:
            for one in harder:
                self._leave(one, str(error))
            return
        if any(one.part == "language_model" for one in harder):
            assert encoder.language_model is not None
            write_weights(self._storage, self._key, "language_model", encoder.language_model)
            self._restored(f"{self._key}: language_model")
        self._repair_blocks([one.index for one in harder if one.part == "block"])
        self._repair_shards([one for one in harder if one.part == "shard"], past)

    def _leave(self, damage: Damage, why: str) -> None:
        self._report.left.append(f"{damage.place}: damaged and not repaired: {why}")

    def _restored(self, place: str) -> None:
        self._report.restored.append(f"{place}: restored, byte for byte")

    def _repair_from_cache(self, damage: Damage) -> bool:
        """Repair an array's `zarr.json`, or a shard of which only the index is damaged; False if more is needed."""
        if damage.part == "metadata":
            self._files(damage).write_metadata(self._manifest.arrays[damage.array].rows)
        elif damage.part == "shard":
            files, entry = self._files(damage), self._manifest.arrays[damage.array].shards[damage.index]
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
        self._restored(damage.place)
        return True

    def _files(self, damage: Damage) -> ArrayFiles:
        return ArrayFiles(self._storage, self._key, damage.array, self._manifest.arrays[damage.array].spec)

    def _load_encoder(self, past: Sequence[PastExtraction]) -> FrozenEncoder:
        """Load the encoder that the cache was made with.

        Raises:
            ValueError: it is unavailable.
            CacheError: it is another encoder, or the manifest does not name it.
        """
        manifest, modality = self._manifest, self._manifest.modality
        if not past:
            raise CacheError(
                "its extraction is unfinished, so the manifest does not say where data and encoder are. Finish it with "
                "saffe extract, then repair again."
            )
        moved = self._config.encoder.get(self._key) or self._config.encoder.get(modality)
        return reload_encoder(manifest, past, moved, f"--encoder {modality}=…")

    def _plan(self, encoder: FrozenEncoder, past: Sequence[PastExtraction]) -> Job:
        """
        Raises:
            CacheError: the tokenizer gives other tokens than before.
        """
        modality = self._manifest.modality
        job = Job(
            encoder=encoder,
            manifest=self._manifest,
            options=encode_options(past[-1].config),
            **table_parts(self._table, modality),
            arrays={name: (array.spec, array.rows) for name, array in self._manifest.arrays.items()},
        )
        if modality == "text":
            tokenize(job)
            check_tokens(job)
        return job

    def _repair_blocks(self, layers: Sequence[int]) -> None:
        if layers:
            self._job.encoder.select(layers, vectors=False)
            blocks = self._job.encoder.blocks
            for layer in layers:
                write_weights(self._storage, self._key, f"blocks/{layer}", blocks[layer])
                self._restored(f"{self._key}: block {layer}")

    def _repair_shards(self, damage: Sequence[Damage], past: Sequence[PastExtraction]) -> None:
        job = self._job
        places: dict[LostShard, Damage] = {}
        for one in damage:
            if one.array == "offsets":
                self._files(one).write(one.index, offset_rows(job, one.index))
                self._restored(one.place)
            else:
                places[lost_shard(job, one.array, one.index)] = one
        needed = {
            row
            for shard in places
            for extraction in past
            for block in extraction.blocks_of(shard.array, shard.inputs)
            for row in block
        }
        sources = SourceFiles(job, self._table, _places(self._config, past), needed)
        lost = []
        for shard, one in places.items():
            if sum(len(extraction.inputs_of(shard.array, shard.inputs)) for extraction in past) < len(shard.inputs):
                self._leave(
                    one,
                    "its extraction is unfinished, so the manifest does not say where its data are. Finish it with "
                    "saffe extract, then repair again.",
                )
            elif absent := sources.absent(shard.inputs):
                self._leave(one, f"{_some(absent)}. Name the data that it was made from with --data.")
            else:
                lost.append(shard)
        for shard in encode_lost(job, lost, past, sources.media):
            self._store(shard, places[shard])

    def _store(self, shard: LostShard, damage: Damage) -> None:
        manifest, rows, shard.rows = self._manifest, shard.rows, None
        assert rows is not None
        invalid = {row: why for row, why in shard.unreadable.items() if row not in manifest.invalid}
        broken = [f"input {row}: {why}" for row, why in invalid.items() if self._job.is_wanted[row]]
        if broken:
            self._leave(damage, f"{_some(broken)}. It was readable during extraction: use the same library versions.")
            return
        self._files(damage).write(shard.index, rows)
        entry = describe_shard(shard.spec, rows)
        if entry.crc32c == shard.entry.crc32c:
            self._restored(damage.place)
        else:
            manifest.arrays[shard.array].shards[shard.index] = entry
            manifest.invalid |= invalid
            self._note(damage.place)
            write_encoder(self._storage, manifest)
            gone = f"; {len(invalid)} unused inputs were lost with their files" if invalid else ""
            self._report.rounded.append(
                f"{damage.place}: restored within rounding, not byte for byte: its checksum is now {entry.crc32c}, "
                f"was {shard.entry.crc32c}{gone}"
            )

    def _note(self, place: str) -> None:
        """Record in the manifest's history that a checksum differs from that of the extraction."""
        if not self._rounded:
            self._manifest.history.append({**provenance(self._config), "repaired": self._rounded})
        self._rounded.append(place)


def _places(config: RepairConfig, past: Sequence[PastExtraction]) -> list[tuple[str, Columns]]:
    """Where the data are, without duplicates."""
    recorded = [(one.config.data, Columns(**one.config.column)) for one in past]
    if config.data:
        recorded = [(data, columns) for data in config.data for _, columns in recorded]
    return list(dict.fromkeys(recorded))


def _some(reasons: Sequence[str]) -> str:
    more = len(reasons) - _NUM_NAMED
    return "; ".join(reasons[:_NUM_NAMED]) + (f"; and {more} more" if more > 0 else "")
