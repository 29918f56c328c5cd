"""Making and updating an index: read the data, embed what is new, write what `search_index` opens.

Vectors are known by what they are of: a content hash, and the text where items are paired. So moved, renamed and
duplicate files are embedded once. An updated index equals one that is made at once. Vectors are kept in pending-… every
few hundred items, where a killed indexing resumes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from saffe_cache.core.atomic_io import hold_folder, remove_partial_files, whole_file, write_whole
from saffe_cache.core.features import nouns, printable
from saffe_cache.core.options import refuse
from saffe_cache.core.outputs import write_json
from saffe_cache.inference.config import IndexConfig
from saffe_cache.inference.correcting import IndexBank, index_bank
from saffe_cache.inference.search_index import (
    BANK,
    FAISS,
    ITEMS,
    MANIFEST,
    RIDGE,
    VECTORS,
    VERSION,
    IndexManifest,
    ItemColumns,
    SearchIndex,
    describe_file,
    read_manifest,
)
from saffe_cache.retrieval.index import build_index, require_size, serialized, with_biases
from saffe_cache.sources.items import EMPTY_TEXT, Columns, MediaFile, SourceItem
from saffe_cache.sources.objects import described
from saffe_cache.sources.registry import read_items

if TYPE_CHECKING:
    from saffe_cache.inference.model import TrainedFusion

logger = logging.getLogger(__name__)

_BLOCK = 512
"""Items that are embedded at a time, and the most that a kill costs."""
_SHOWN = 5
"""Items that a message names."""
_OURS = re.compile(r"g-[0-9a-f]+|pending-.+|index\.json|\..+")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What an indexing has done; it prints itself."""

    out: str
    added: int
    changed: int
    removed: int
    kept: int
    problems: Mapping[str, str]
    """Items that could not be embedded, and why."""

    def __str__(self) -> str:
        lines = [f"{self.added} added, {self.changed} changed, {self.removed} removed, {self.kept} kept"]
        if self.problems:
            lines.append(f"{len(self.problems)} could not be embedded:")
            lines += [f"  {name}: {reason}" for name, reason in list(self.problems.items())[:_SHOWN]]
            if len(self.problems) > _SHOWN:
                lines.append(f"  … all of them are in {Path(self.out) / MANIFEST}")
        return "\n".join(map(printable, [*lines, self.out]))


def index(config: IndexConfig) -> Changes:
    """Make or update an index; what was done prints itself.

    Raises:
        ValueError: the data, the run or an encoder is not found, or --out holds the index of another run or other
            options, or something else.
        OSError: another process writes to it, or the disk is full or gone.
    """
    from saffe_cache.inference.model import load_run

    fusion = load_run(config.run, encoder=config.encoder, device=config.device, index_views=config.index_views)
    return update_index(fusion, config)


def update_index(fusion: TrainedFusion, config: IndexConfig) -> Changes:
    """Make or update an index with a loaded run; the config's run, encoder and device are not read.

    Raises:
        ValueError, OSError: as of `index`.
    """
    out, views = Path(config.out), config.index_views
    if views != fusion.index_views:
        refuse("index_views", f"{views} for a run that was loaded with {fusion.index_views}", "the same in load_run")
    _check_place(out, config.data)
    _check_export(config)
    before = read_manifest(out) if (out / MANIFEST).exists() else None
    manifest = _manifest(fusion, config, out)
    if before is not None:
        _check_same(out, before, manifest)
    bank = index_bank(fusion, config, out, before)
    if bank is not None:
        manifest = replace(manifest, correction=bank.correction, bank_texts=len(bank.vectors))
    items = [
        replace(item, problem="") if item.problem == EMPTY_TEXT else item  # its photo can be found all the same
        for item in read_items(config.data, Columns(**config.column), config.splits, every=True)
        if item.query is None
    ]
    with hold_folder(out):
        remove_partial_files(out)
        old = SearchIndex.open(out) if (out / MANIFEST).exists() else None
        if old is not None:
            _check_same(out, old.manifest, manifest)
            _check_overlap(old, items)
        written, changes = _update(fusion, items, old, manifest, bank, out)
        _remove_all_but(out, written.generation)
        if config.export is not None:
            SearchIndex.open(out).to_parquet(config.export)
    return changes


def _update(
    fusion: TrainedFusion,
    items: Sequence[SourceItem],
    old: SearchIndex | None,
    manifest: IndexManifest,
    bank: IndexBank | None,
    out: Path,
) -> tuple[IndexManifest, Changes]:
    """Embed what is new and write the index, if anything differs from the old one."""
    problems = {item.id: why for item in items if (why := _why_unusable(item, manifest))}
    usable = [item for item in items if item.id not in problems]
    require_size(manifest.kind, len(usable))
    vectors = _Vectors(out, old, manifest)
    problems |= vectors.embed(fusion, usable)
    indexed = [item for item in usable if item.id not in problems]
    if not indexed:
        name, reason = next(iter(problems.items()))
        raise ValueError(
            f"--data {manifest.data}: none of its {len(problems)} items could be embedded; {name}: "
            f"{reason.rstrip('.')}."
        )
    manifest = replace(manifest, problems=problems, num_items=len(indexed))
    columns = _columns(indexed, manifest)
    if old is not None and old.columns.table.equals(columns.table):
        manifest = replace(manifest, generation=old.manifest.generation, files=old.manifest.files)
    else:
        rows, biases = vectors.of(indexed, bank)
        manifest = _write_files(columns, rows, manifest, out, bank, biases)
    if old is None or old.manifest != manifest:
        write_json(out / MANIFEST, asdict(manifest))
    return manifest, _changes(indexed, old, manifest, out)


def _why_unusable(item: SourceItem, manifest: IndexManifest) -> str:
    """Why an item has nothing to embed; nothing where it has one of the media at least."""
    if item.problem or manifest.medium_of(item) is not None:
        return item.problem
    return f"it has no {' or '.join(manifest.searched)}"


def _changes(indexed: Sequence[SourceItem], old: SearchIndex | None, manifest: IndexManifest, out: Path) -> Changes:
    before = {} if old is None else dict(zip(old.ids, _keys_of(old), strict=True))
    now = {item.id: _key(item, manifest) for item in indexed}
    changed = sum(name in before and before[name] != key for name, key in now.items())
    added = sum(name not in before for name in now)
    return Changes(
        out=str(out),
        added=added,
        changed=changed,
        removed=sum(name not in now for name in before),
        kept=len(now) - added - changed,
        problems=manifest.problems,
    )


class _Vectors:
    """Vectors by the keys of what they are of: those of the old index, of an interrupted indexing, and new ones."""

    def __init__(self, out: Path, old: SearchIndex | None, manifest: IndexManifest) -> None:
        self._manifest, self._old = manifest, old
        self._folder = (
            out / f"pending-{manifest.fingerprint}{'-paired' * manifest.paired}{'-ridge' * bool(manifest.ridge)}"
        )
        self._position = {} if old is None else {key: position for position, key in enumerate(_keys_of(old))}
        self._new: dict[bytes, np.ndarray] = {}
        for path in sorted(self._folder.glob("*.npz")):
            with np.load(path, allow_pickle=False) as block:
                self._new |= zip(map(bytes, block["keys"]), block["vectors"], strict=True)
        if self._new:
            logger.info("%d items were embedded by an indexing that was interrupted.", len(self._new))

    def embed(self, fusion: TrainedFusion, items: Sequence[SourceItem]) -> dict[str, str]:
        """Embed those that are not known yet; returns the ids of items for which this failed, and why."""
        keys = [_key(item, self._manifest) for item in items]
        missing = {key: item for key, item in zip(keys, items, strict=True) if not self._is_known(key)}
        reasons: dict[bytes, str] = {}
        with tqdm(
            total=len(missing),
            unit=f" {nouns([fusion.modality])}",
            desc="embedding",
            leave=False,
        ) as bar:
            for block in _blocks(list(missing.values())):
                found = fusion.embed_read_items(
                    block, paired=self._manifest.paired, with_ridge=bool(self._manifest.ridge)
                )
                reasons |= {_key(item, self._manifest): found.problems.get(item.id, "") for item in block}
                self._keep(
                    {_key(item, self._manifest): one for item, one in zip(found.items, found.vectors, strict=True)}
                )
                bar.update(len(block))
        return {item.id: reasons[key] for key, item in zip(keys, items, strict=True) if reasons.get(key)}

    def of(self, items: Sequence[SourceItem], bank: IndexBank | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Vectors of items, float32 [items, width], and what a search correction subtracts, as of `IndexBank.biases`.

        The vectors of the ridge regression, if any, follow in the same rows.
        """
        width = self._manifest.width
        vectors = np.empty((len(items), width + self._manifest.ridge), np.float32)
        positions = np.full(len(items), -1)
        for place, item in enumerate(items):
            key = _key(item, self._manifest)
            if key in self._new:
                vectors[place] = self._new[key]
            else:
                positions[place] = self._position[key]
        kept = np.flatnonzero(positions >= 0)
        if self._old is not None and len(kept):
            vectors[kept, :width] = self._old.vectors_at(positions[kept])
            if self._manifest.ridge:
                vectors[kept, width:] = self._old.ridge_vectors_at(positions[kept])
        if bank is None:
            return vectors, None
        biases = np.empty((len(items), 2 if self._manifest.ridge else 1), np.float32)
        if self._old is not None:
            biases[kept] = self._old.biases_at(positions[kept])
        new = np.flatnonzero(positions < 0)
        biases[new] = bank.biases(vectors[new], width)
        return vectors, biases

    def _is_known(self, key: bytes) -> bool:
        return key in self._new or key in self._position

    def _keep(self, vectors: Mapping[bytes, np.ndarray]) -> None:
        if not vectors:
            return
        self._new |= vectors
        keys = np.frombuffer(b"".join(vectors), np.uint8).reshape(-1, 32)
        with whole_file(self._folder / f"{uuid.uuid4().hex}.npz") as file:
            np.savez(file, keys=keys, vectors=np.stack(list(vectors.values())))


def _columns(items: Sequence[SourceItem], manifest: IndexManifest) -> ItemColumns:
    return ItemColumns.of(
        ids=[item.id for item in items],
        captions=[item.captions for item in items],
        labels=[item.labels for item in items],
        splits=[item.split for item in items],
        files=[_file_of(item, manifest) for item in items],
        hashes=[_content(item, manifest) for item in items],
        shown=[(medium, item.hashes[medium]) for item in items if (medium := manifest.medium_of(item))]
        if manifest.media
        else None,
    )


def _file_of(item: SourceItem, manifest: IndexManifest) -> str:
    """Relative to the data where it lies below them."""
    medium = manifest.medium_of(item)
    media = None if medium is None else item.media[medium]
    if not isinstance(media, MediaFile) or media.size is not None:
        return ""
    path = Path(media.path).absolute()
    return str(path.relative_to(manifest.data) if path.is_relative_to(manifest.data) else path)


def _key(item: SourceItem, manifest: IndexManifest) -> bytes:
    """What an item's vector depends on, besides the run."""
    return _key_of(_content(item, manifest), _text_of(item) if manifest.paired else None)


def _content(item: SourceItem, manifest: IndexManifest) -> bytes:
    """Hash of an item's photo or sound; of several media, over those of all, with zeros for a missing one."""
    if not manifest.media:
        return item.hashes[manifest.modality]
    return hashlib.sha256(b"".join(item.hashes.get(medium, bytes(32)) for medium in manifest.media)).digest()


def _key_of(content_hash: bytes, text: str | None) -> bytes:
    if text is None:
        return content_hash
    return hashlib.sha256(content_hash + text.encode("utf-8", "surrogatepass")).digest()


def _text_of(item: SourceItem) -> str | None:
    """The text that a paired index fuses an item with."""
    return next(iter(item.captions), None)


def _keys_of(old: SearchIndex) -> list[bytes]:
    texts: Sequence[Sequence[str]] = old.columns.text_lists("captions") if old.manifest.paired else [()] * len(old)
    hashes = old.columns.table["content_hash"].to_pylist()
    return [_key_of(one, of_item[0] if of_item else None) for one, of_item in zip(hashes, texts, strict=True)]


def _write_files(
    columns: ItemColumns,
    vectors: np.ndarray,
    manifest: IndexManifest,
    out: Path,
    bank: IndexBank | None = None,
    biases: np.ndarray | None = None,
) -> IndexManifest:
    """Write a new generation; returns the manifest that names its files."""
    ids = columns.texts("id")
    vectors, of_ridge = np.split(vectors, [manifest.width], axis=1)
    own = None if biases is None else biases[:, 0]
    built = build_index(vectors, ids, kind=manifest.kind, biases=own)
    folder = out / f"g-{uuid.uuid4().hex[:12]}"
    with whole_file(folder / ITEMS) as file:
        pq.write_table(columns.table.append_column("row", pa.array(np.argsort(built.order))), file)
    write_whole(folder / FAISS, serialized(built))
    names = [ITEMS, FAISS]
    if manifest.kind != "flat":
        with whole_file(folder / VECTORS) as file:
            np.save(file, (vectors if own is None else with_biases(vectors, own))[built.order])
        names.append(VECTORS)
    if manifest.ridge:  # whose random order is the same
        of_bank = None if biases is None else biases[:, 1]
        write_whole(folder / RIDGE, serialized(build_index(of_ridge, ids, biases=of_bank)))
        names.append(RIDGE)
    if bank is not None:
        with whole_file(folder / BANK) as file:
            np.save(file, bank.vectors)
        names.append(BANK)
    files = {name: describe_file(folder / name) for name in names}
    return replace(manifest, generation=folder.name, files=files)


def _manifest(fusion: TrainedFusion, config: IndexConfig, out: Path) -> IndexManifest:
    """What an index of this run and config says, without its files; ValueError if the run has no such vectors."""
    paired = fusion.spec.gallery_text == "first_caption" if config.paired is None else config.paired
    why = fusion.why_no_gallery(paired=paired)
    if why:
        raise ValueError(f"--{'' if paired else 'no-'}paired: {why}.")
    if config.ridge:
        fusion.require_ridge()
    run, data = Path(fusion.folder).absolute(), described(config.data)
    try:
        relative = os.path.relpath(run, out.absolute())
    except ValueError:  # on another drive
        relative = ""
    return IndexManifest(
        version=VERSION,
        generation="",
        kind=config.index,
        paired=paired,
        splits=config.splits,
        column=config.column,
        data=str(Path(data).absolute()) if isinstance(config.data, (str, Path)) and Path(data).exists() else data,
        run=str(run),
        run_relative=relative,
        fingerprint=fusion.fingerprint,
        storage=fusion.storage,
        index_views=fusion.index_views,
        modality=fusion.modality,
        media=fusion.media if len(fusion.media) > 1 else (),
        width=fusion.size,
        ridge=fusion.spec.shape.text_size if config.ridge else 0,
        num_items=0,
    )


def _check_place(out: Path, data: Any) -> None:
    """Raise ValueError if the index would lie among other files."""
    foreign = sorted(path.name for path in out.iterdir() if not _OURS.fullmatch(path.name)) if out.is_dir() else []
    found = f"it holds {foreign[0]}, which is no part of an index" if foreign else ""
    if isinstance(data, (str, Path)) and Path(data).is_dir() and out.resolve().is_relative_to(Path(data).resolve()):
        found = "it lies in the data, where its files would be read as data"
    if out.exists() and not out.is_dir():
        found = "it is a file"
    if found:
        raise ValueError(f"--out {out}: {found}. Choose another --out.")


def _check_export(config: IndexConfig) -> None:
    """Raise ValueError if the exported file would lie in the index or in the data."""
    if config.export is None:
        return
    folders = [config.out, *([config.data] if isinstance(config.data, (str, Path)) else [])]
    for folder in folders:
        if Path(config.export).resolve().is_relative_to(Path(folder).expanduser().resolve()):
            raise ValueError(
                f"--export {config.export}: it lies in {folder}, whose files are read. Choose another place."
            )
    if Path(config.export).is_dir():
        raise ValueError(f"--export {config.export}: it is a folder, expected the name of a file.")


def _check_same(out: Path, old: IndexManifest, new: IndexManifest) -> None:
    """Raise ValueError if an index is of another run or of other options."""
    names = {"fingerprint": "run", "kind": "--index", "paired": "--paired", "ridge": "--ridge"}
    names |= {"index_views": "--index-views"}
    names |= {"splits": "--splits", "column": "--column"}
    before, now = ({**vars(one), "ridge": one.ridge > 0} for one in (old, new))
    different = [
        f"{shown} {before[name]} there, {now[name]} now" for name, shown in names.items() if before[name] != now[name]
    ]
    if different:
        raise ValueError(
            f"--out {out}: it is another index ({'; '.join(different)}). Repeat its options, choose another --out, or "
            "delete it."
        )


def _check_overlap(old: SearchIndex, items: Sequence[SourceItem]) -> None:
    """Raise ValueError if all items would be replaced, as by a wrong path."""
    if not {item.id for item in items} & set(old.ids):
        raise ValueError(
            f"--out {old.folder}: none of its {len(old)} items is among the {len(items)} of the data, such as "
            f"{items[0].id!r}; they came from {old.manifest.data}. Give those data, or choose another --out."
        )


def _remove_all_but(out: Path, generation: str) -> None:
    """Remove older generations and what was kept for an interrupted indexing."""
    for path in out.iterdir():
        if path.name.startswith(("g-", "pending-")) and path.name != generation:
            shutil.rmtree(path, ignore_errors=True)


def _blocks(items: Sequence[SourceItem]) -> Iterator[Sequence[SourceItem]]:
    return (items[start : start + _BLOCK] for start in range(0, len(items), _BLOCK))
