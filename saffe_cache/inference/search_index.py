"""A folder of photos or sounds as an index on disk, and what a search finds in it.

index.json           what the index is of and made by; the size and checksum of each file; written last
g-…/items.parquet    ids, captions, classes, splits, files, content hashes, and the row of each item's vector
g-…/index.faiss      the FAISS index, memory-mapped
g-…/vectors.npy      the vectors by row, memory-mapped; absent for a flat index, which holds them itself
g-…/ridge.faiss      the vectors of the run's ridge regression in the same rows; only with --ridge
g-…/bank.npy         unit vectors of training texts, by which a search correction was made; only with one
pending-…/           vectors that an interrupted indexing has embedded; the next one uses them

With a search correction, rows of vectors end with what it subtracts: see `retrieval.index.with_biases`. It applies
where a text searches, not where a photo does: the bank is of texts.

An update writes a new folder g-… and then index.json, so that a crash leaves the old index or the new one. Opening
compares every file with its checksum. Searching by vectors needs no run; searching by a text or a photo loads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saffe_cache.core.atomic_io import whole_file
from saffe_cache.core.features import NOUNS, IndexKind, Modality, StorageType, nouns, printable
from saffe_cache.core.items import Item
from saffe_cache.core.json_schema import made_of
from saffe_cache.core.outputs import read_json
from saffe_cache.core.views import IndexViews
from saffe_cache.inference.config import SearchConfig
from saffe_cache.retrieval.correction import SearchCorrection
from saffe_cache.retrieval.index import RetrievalIndex, flat_rows, map_index

if TYPE_CHECKING:
    from saffe_cache.inference.model import TrainedFusion

MANIFEST, ITEMS, VECTORS, FAISS, RIDGE = "index.json", "items.parquet", "vectors.npy", "index.faiss", "ridge.faiss"
BANK = "bank.npy"
VERSION = 1
_BLOCK = 2**22
"""Bytes of a file that are read at a time."""
_EXPORT_ROWS = 2**14
"""Rows that are exported, or scored by the run, at a time."""
_LONGEST_TEXT = 70
"""Characters of a caption in a terminal."""


class Hit(NamedTuple):
    """One result of a search."""

    id: str
    score: float
    """Inner product of unit vectors, from -1 to 1; for a text, minus what a search correction subtracts."""
    text: str
    """The item's first caption or class name; empty if it has none."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file of the index must be."""

    bytes: int
    crc32c: int


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """The content of index.json."""

    version: int
    generation: str
    """The folder of the files."""
    kind: IndexKind
    paired: bool
    """Whether each item is fused with its first caption."""
    splits: tuple[str, ...]
    column: Mapping[str, str]
    data: str
    """Where the data were; absolute if they were a folder or a file."""
    run: str
    """Where the run was, absolute."""
    run_relative: str
    """Where it was, from the index's folder; empty if no such path leads there."""
    fingerprint: str
    """Of the run."""
    storage: StorageType | None = None
    """Type in which the run's hidden states were rounded; None for that of its cache."""
    index_views: IndexViews = "plain"
    """Whether a photo's vector is its own, or the mean of those of its views."""
    modality: Modality
    media: tuple[Modality, ...] = ()
    """Where several media of an item are fused: these, of which it may lack some."""
    width: int
    ridge: int = 0
    """Width of the ridge regression's vectors; 0 without them."""
    correction: SearchCorrection | None = None
    """The search correction of texts that search."""
    bank_texts: int = 0
    """Training texts in its bank."""
    num_items: int
    problems: Mapping[str, str] = field(default_factory=dict)
    """Items that could not be embedded, and why."""
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @property
    def searched(self) -> tuple[Modality, ...]:
        """The media of an item, the one that a page shows first."""
        return self.media or (self.modality,)

    def medium_of(self, item: Item) -> Modality | None:
        """The medium of an item that is shown; None where it has none of them."""
        return next((medium for medium in self.searched if medium in item.hashes), None)


class ItemColumns:
    """items.parquet. Names of files may be no UTF-8, so that all texts are stored as bytes."""

    def __init__(self, table: Any) -> None:
        self.table = table

    @staticmethod
    def of(
        ids: Sequence[str],
        captions: Sequence[Sequence[str]],
        labels: Sequence[Sequence[str]],
        splits: Sequence[str],
        files: Sequence[str],
        hashes: Sequence[bytes],
        shown: Sequence[tuple[str, bytes]] | None = None,
    ) -> ItemColumns:
        """Columns in the order of the items; a file is empty where an item has none of its own.

        `shown`: of items of several media, the medium of that file and the hash of its content.
        """
        of_shown = {}
        if shown is not None:
            of_shown["medium"] = pa.array([_bytes(medium) for medium, _ in shown], pa.binary())
            of_shown["file_hash"] = pa.array([content for _, content in shown], pa.binary(32))
        return ItemColumns(
            pa.table(
                {
                    "id": pa.array(map(_bytes, ids), pa.binary()),
                    "captions": pa.array([list(map(_bytes, texts)) for texts in captions], pa.list_(pa.binary())),
                    "labels": pa.array([list(map(_bytes, texts)) for texts in labels], pa.list_(pa.binary())),
                    "split": pa.array(map(_bytes, splits), pa.binary()),
                    "file": pa.array(map(_bytes, files), pa.binary()),
                    "content_hash": pa.array(hashes, pa.binary(32)),
                    **of_shown,
                }
            )
        )

    def texts(self, column: str) -> tuple[str, ...]:
        """All values of a column."""
        return tuple(map(_text, self.table[column].to_pylist()))

    def text_lists(self, column: str) -> tuple[tuple[str, ...], ...]:
        """All values of a column of lists."""
        return tuple(tuple(map(_text, values)) for values in self.table[column].to_pylist())

    def one(self, column: str, position: int) -> Any:
        """A text, or a tuple of texts."""
        value = self.table[column][position].as_py()
        return tuple(map(_text, value)) if isinstance(value, list) else _text(value)


class SearchIndex:
    """An index on disk; `ids`, `texts`, `labels`, `splits` and `vectors` are in the order of the data."""

    def __init__(
        self,
        folder: Path,
        manifest: IndexManifest,
        columns: ItemColumns,
        retrieval: RetrievalIndex,
        rows: np.ndarray,
        ridge: RetrievalIndex | None = None,
        fusion: TrainedFusion | str | Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Use `open`."""
        self.folder, self.manifest, self.columns = folder, manifest, columns
        self._retrieval, self._rows, self._ridge = retrieval, rows, ridge
        self._given, self._options = fusion, options or {}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        run: TrainedFusion | str | Path | None = None,
        *,
        encoder: Mapping[str, str] | None = None,
        device: str = "auto",
    ) -> SearchIndex:
        """Open an index; its files stay on disk, memory-mapped.

        Args:
            run: where the run is now, or the loaded run. Default: where it was when the index was made.
            encoder: where an encoder of the run is now, as {"text": PLACE}.

        Raises:
            ValueError: there is no index, or it is damaged or of another version.
        """
        folder = Path(folder)
        for attempt in (1, 2, 3):
            manifest = read_manifest(folder)
            try:
                files = _read_files(folder, manifest)
            except FileNotFoundError as error:
                if attempt < 3 and read_manifest(folder).generation != manifest.generation:  # it was updated meanwhile
                    continue
                raise ValueError(
                    f"{error.filename}: missing. Restore it, or delete {folder} and index again."
                ) from None
            break
        return cls(folder, manifest, *files, run, {"encoder": encoder or {}, "device": device})

    def __len__(self) -> int:
        return self.manifest.num_items

    def __repr__(self) -> str:
        return f"<SearchIndex of {len(self)} {self.manifest.modality} items in {self.folder}>"

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the items, as in the data."""
        return self._retrieval.ids

    @cached_property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """Captions of each item, or its class names where it has none."""
        pairs = zip(self.columns.text_lists("captions"), self.labels, strict=True)
        return tuple(captions or labels for captions, labels in pairs)

    @cached_property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """Class names of each item."""
        return self.columns.text_lists("labels")

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The split of each item."""
        return self.columns.texts("split")

    @property
    def vectors(self) -> np.ndarray:
        """Unit vectors, float32 [items, width]; a copy in memory."""
        return self.vectors_at(slice(None))

    def vectors_at(self, positions: np.ndarray | slice) -> np.ndarray:
        """Vectors of some items."""
        return np.asarray(self._rows[self._row_of[positions], : self.size])

    def ridge_vectors_at(self, positions: np.ndarray | slice) -> np.ndarray:
        """Unit vectors of some items by the ridge regression, float32; ValueError if the index keeps none."""
        index = self._ridge_index
        return np.asarray(flat_rows(index)[self._row_of[positions], : index.width])

    def biases_at(self, positions: np.ndarray | slice) -> np.ndarray:
        """What a search correction subtracts from the scores of some items, float32 [items, 1]; zeros without one. With
        a ridge regression [items, 2]: for its vectors, too."""
        rows = self._row_of[positions]
        kinds = [(self._rows, self.size)]
        if self._ridge is not None:
            kinds.append((flat_rows(self._ridge), self._ridge.width))
        if self.manifest.correction is None:
            return np.zeros((len(rows), len(kinds)), np.float32)
        return -np.stack([of[rows, width] for of, width in kinds], axis=1)

    @property
    def _ridge_index(self) -> RetrievalIndex:
        if self._ridge is None:
            raise ValueError(f"{self.folder}: it keeps no vectors of a ridge regression. Index again with --ridge.")
        return self._ridge

    @property
    def size(self) -> int:
        """Width of the vectors."""
        return self.manifest.width

    @property
    def problems(self) -> Mapping[str, str]:
        """Items of the data that could not be embedded, and why."""
        return self.manifest.problems

    @cached_property
    def _row_of(self) -> np.ndarray:
        return np.argsort(self._retrieval.order)

    @cached_property
    def position_of(self) -> Mapping[str, int]:
        """Where each item stands among `ids` and `vectors`."""
        return {name: position for position, name in enumerate(self.ids)}

    @cached_property
    def fusion(self) -> TrainedFusion:
        """The run that the index was made with.

        Raises:
            ValueError: it is not found, or it is another run.
        """
        found = self._given if self._given is not None else find_run(self.folder, self.manifest)
        if isinstance(found, (str, Path)):
            from saffe_cache.inference.model import load_run

            one = self.manifest
            found = load_run(found, storage=one.storage, index_views=one.index_views, **self._options)
        if found.fingerprint != self.manifest.fingerprint:
            raise ValueError(
                f"--run {found.folder}: run {found.fingerprint}, but {self.folder} was made with run "
                f"{self.manifest.fingerprint}. Give that run, or make another index with this one."
            )
        return found

    def search(
        self, text: str | None = None, image: Any = None, k: int = 10, *, audio: Any = None, video: Any = None
    ) -> list[Hit]:
        """The k best items, or all if there are fewer, best first.

        Args:
            text: alone, it is encoded as a query; with a photo or sound, both are fused. If the run was trained on
                composed queries, it says what to change in the photo.
            image: a path, a PIL picture, uint8 [height, width, 3] or a file's bytes.
            audio: a path or a file's bytes, in an index of sounds. Where items have several media, several may be
                given: they are one query.
            video: the same, in an index of videos.

        Raises:
            ValueError: nothing is given, the photo cannot be read or is of the wrong kind, the fusion takes no text
                with a photo, or the run is not found.
        """
        media: dict[Modality, Any] = {"image": image, "audio": audio, "video": video}
        return self.search_by(text, {name: one for name, one in media.items() if one is not None}, k)["fusion"]

    def search_by(
        self, text: str | None, media: Mapping[Modality, Any], k: int = 10, systems: Sequence[str] = ("fusion",)
    ) -> dict[str, list[Hit]]:
        """As `search`, of media by name; also by the ridge regression, which adds the text's vector to theirs.

        Raises:
            ValueError: as `search`; the index keeps no vectors of a ridge regression.
        """
        self._check_query(text, media)
        found = self.fusion.embed_query(text, media, with_ridge="ridge" in systems)
        return {one: self.hits(found[one], k, ridge=one == "ridge", corrected=not media) for one in systems}

    def like(self, id: str, k: int = 10) -> list[Hit]:
        """The items whose vectors are nearest to that of an item, itself included; ValueError if there is none."""
        if id not in self.position_of:
            raise ValueError(
                f"{self.folder}: no item {id!r}; the first one is {self.ids[0]!r}. Give an id of the index."
            )
        return self.hits(self.vectors_at(np.array([self.position_of[id]])), k, corrected=False)

    def search_vectors(
        self, vectors: np.ndarray, k: int = 10, *, corrected: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores, float32 [queries, k], and ids of the k best items of each query, as `RetrievalIndex.search`.

        `corrected`: whether the index's search correction applies, as for vectors of texts.
        """
        return self._retrieval.search(np.asarray(vectors), k, corrected=corrected)

    def content_hash(self, id: str) -> bytes:
        """SHA-256 of the file of an item's photo or sound when it was indexed."""
        column = "file_hash" if self.manifest.media else "content_hash"
        return bytes(self.columns.table[column][self.position_of[id]].as_py())

    def medium_of(self, id: str) -> Modality:
        """The medium of an item's file."""
        if not self.manifest.media:
            return self.manifest.modality
        return self.columns.one("medium", self.position_of[id])  # type: ignore[no-any-return]

    def file_of(self, id: str) -> Path | None:
        """An item's file; None if it has none of its own, as in a Parquet file."""
        name = self.columns.one("file", self.position_of[id])
        return Path(self.manifest.data) / name if name else None

    def to_parquet(self, path: str | Path) -> None:
        """Write ids, vectors, captions, labels and splits as a Parquet file, whole or not at all.

        Columns: `id`, `vector` (float32, a list of fixed size), `caption` and `label` (the first ones, or null),
        `captions` and `labels` (all), `split`, and `bias` where there is a search correction, which subtracts it from
        the inner product with a text. What is no Unicode in the name of a file is written as an escape.
        """
        schema = pa.schema(
            {
                "id": pa.string(),
                "vector": pa.list_(pa.float32(), self.size),
                "caption": pa.string(),
                "label": pa.string(),
                "split": pa.string(),
                "captions": pa.list_(pa.string()),
                "labels": pa.list_(pa.string()),
            }
        )
        if self.manifest.correction is not None:
            schema = schema.append(pa.field("bias", pa.float32()))
        captions = self.columns.text_lists("captions")
        with whole_file(Path(path)) as file, pq.ParquetWriter(file, schema) as writer:
            for start in range(0, len(self), _EXPORT_ROWS):
                part = slice(start, start + _EXPORT_ROWS)
                of_part = [[list(map(_unicode, texts)) for texts in column[part]] for column in (captions, self.labels)]
                flat = pa.array(np.asarray(self.vectors_at(part), np.float32).reshape(-1))
                columns = [
                    pa.array(map(_unicode, self.ids[part]), pa.string()),
                    pa.FixedSizeListArray.from_arrays(flat, self.size),
                    *(pa.array([texts[0] if texts else None for texts in one], pa.string()) for one in of_part),
                    pa.array(map(_unicode, self.splits[part]), pa.string()),
                    *(pa.array(one, pa.list_(pa.string())) for one in of_part),
                ]
                columns += [] if self.manifest.correction is None else [pa.array(self.biases_at(part)[:, 0])]
                writer.write_table(pa.table(columns, schema=schema))

    def _check_query(self, text: str | None, media: Mapping[Modality, Any]) -> None:
        """
        Raises:
            ValueError: the index, or the fusion of its run, takes no such query.
        """
        where, searched = self.folder.name, self.manifest.searched
        *first, last = ("a text", *(f"a {NOUNS[one]}" for one in searched))
        expected = f"{', '.join(first)} or {last}"
        if text is None and not media:
            raise ValueError(f"{where}: found nothing to search by, expected {expected}.")
        if text is not None and not text.strip():
            raise ValueError(f"{where}: the text to search by is empty. Give one.")
        for one in media:
            if one not in searched:
                raise ValueError(
                    f"{where}: found a {NOUNS[one]} to search by, but it is an index of {nouns(searched)}. Search by "
                    f"{expected}."
                )
        given = " and a ".join(NOUNS[one] for one in media)
        if media and text is not None and (why := self.fusion.why_not_paired):
            raise ValueError(f"{where}: a text and a {given} cannot be fused: {why}. Or search by one of them.")
        if media and text is None and (why := self.fusion.why_not_alone):
            raise ValueError(f"{where}: a {given} alone finds nothing: {why}. Or add a text.")

    def hits(self, query: np.ndarray, k: int, *, ridge: bool = False, corrected: bool = True) -> list[Hit]:
        """The k best items for the vector of a query, [1, width]; of the ridge regression's vectors if `ridge`.

        `corrected`: whether the index's search correction applies, as for a text.

        Raises:
            ValueError: the index keeps no such vectors, or the query is of another width.
        """
        if not ridge and query.shape[1] != self.size and self.fusion.scores_itself:
            scores, positions = self._scored(query, k)
        else:
            index = self._ridge_index if ridge else self._retrieval
            scores, positions = index.nearest(query, k, corrected=corrected)
        found = zip(positions[0].tolist(), scores[0].tolist(), strict=True)
        return [Hit(self.ids[position], score, self._text(position)) for position, score in found if position >= 0]

    def _scored(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `RetrievalIndex.nearest`, by the run's own scores of all items."""
        parts = [slice(start, start + _EXPORT_ROWS) for start in range(0, len(self), _EXPORT_ROWS)]
        scores = np.concatenate([self.fusion.similarities(query, self.vectors_at(part)) for part in parts], axis=1)
        positions = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, positions, axis=1), positions

    def _text(self, position: int) -> str:
        texts = self.columns.one("captions", position) or self.columns.one("labels", position)
        return texts[0] if texts else ""


@dataclass(frozen=True)
class FoundHits:
    """What `saffe search` prints."""

    index: SearchIndex
    hits: Sequence[Hit]
    as_json: bool

    def __str__(self) -> str:
        if self.as_json:
            files = [self.index.file_of(hit.id) for hit in self.hits]
            pairs = zip(self.hits, files, strict=True)
            return "\n".join(json.dumps({**hit._asdict(), "file": file and str(file)}) for hit, file in pairs)
        manifest = self.index.manifest
        width = max((len(printable(hit.id)) for hit in self.hits), default=0)
        lines = [f"{len(self.hits)} of {len(self.index)} items; the data are in {printable(manifest.data)}"]
        for hit in self.hits:
            text = printable(" ".join(hit.text.split()))
            shown = text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
            lines.append(f"{hit.score:6.3f}  {printable(hit.id):{width}}  {shown}".rstrip())
        return "\n".join(lines)


def search(config: SearchConfig) -> FoundHits:
    """Search an index; what is found prints itself.

    Raises:
        ValueError: there is no index, its run is not found or takes no such query, or the photo cannot be read.
    """
    for name in ("image", "audio", "video"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise ValueError(f"--{name} {path}: there is no such file. Give the path of a file to search with.")
    index = SearchIndex.open(config.index, config.run, encoder=config.encoder, device=config.device)
    hits = index.search(config.text, config.image, config.k, audio=config.audio, video=config.video)
    return FoundHits(index, hits, config.json)


def read_manifest(folder: Path) -> IndexManifest:
    """
    Raises:
        ValueError: there is no index, or it is damaged or of another version.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder}: no index there ({MANIFEST} is missing). Make one with saffe index --out {folder}.")
    content = read_json(path)
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: version {content.get('version')!r:.20}, expected {VERSION}. Index again.")
    try:
        return made_of(IndexManifest, content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}). Delete {folder} and index again.") from None


def find_run(folder: Path, manifest: IndexManifest) -> Path:
    """Where the run of an index is now: as before from the index, or where it was; ValueError if at neither place."""
    places = [folder / manifest.run_relative] if manifest.run_relative else []
    for place in (*places, Path(manifest.run)):
        if place.exists():
            return place
    raise ValueError(f"{folder}: its run is no longer in {manifest.run}. Say where it is with --run.")


def describe_file(path: Path) -> FileEntry:
    """The size and checksum of a file."""
    size, checksum = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, checksum = size + len(block), google_crc32c.extend(checksum, block)
    return FileEntry(bytes=size, crc32c=checksum)


def _read_files(
    folder: Path, manifest: IndexManifest
) -> tuple[ItemColumns, RetrievalIndex, np.ndarray, RetrievalIndex | None]:
    where = folder / manifest.generation
    for name, entry in manifest.files.items():
        found = describe_file(where / name)
        if found != entry:
            raise ValueError(
                f"{where / name}: {found.bytes} bytes with the checksum {found.crc32c}, expected {entry.bytes} with "
                f"{entry.crc32c}. Restore it, or delete {folder} and index again."
            )
    table = pq.read_table(where / ITEMS, memory_map=True, partitioning=None)
    order = np.argsort(table["row"].to_numpy())
    columns = ItemColumns(table.drop_columns(["row"]))
    has_biases = manifest.correction is not None
    retrieval = map_index(where / FAISS, columns.texts("id"), order, has_biases)
    rows = (
        np.load(where / VECTORS, mmap_mode="r", allow_pickle=False)
        if VECTORS in manifest.files
        else flat_rows(retrieval)
    )
    ridge = map_index(where / RIDGE, retrieval.ids, order, has_biases) if RIDGE in manifest.files else None
    return columns, retrieval, rows, ridge


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _unicode(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
