"""A trained run on new inputs, without the cache that it was trained on.

New inputs pass the run's own frozen encoders as in an extraction (the same batches, windows, token selection and
storage type), but stay in memory; from there on the code is that of evaluation, and so are the numbers.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from saffe_cache.core.devices import choose_device
from saffe_cache.core.features import NOUNS, Modality, StorageType, nouns, short_hash
from saffe_cache.core.items import ItemTable
from saffe_cache.core.views import IndexViews, indexed_views
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.encoders.own import OwnEncoder
from saffe_cache.fusion.base import Fusion, Texts
from saffe_cache.fusion.layers import Mask, States
from saffe_cache.inference import sharing
from saffe_cache.inference.config import IndexConfig
from saffe_cache.inference.encoding import RunEncoders
from saffe_cache.inputs.feature_loader import encode_gallery, encode_queries, encode_texts, summaries
from saffe_cache.inputs.pairs import class_vectors
from saffe_cache.inputs.spec import RunSpec
from saffe_cache.retrieval.baselines import LinearMap, unit_rows
from saffe_cache.sources.decoding import media_bytes
from saffe_cache.sources.items import Columns, SourceItem
from saffe_cache.sources.registry import read_items
from saffe_cache.store.joined import JOINED
from saffe_cache.store.manifest import EncoderManifest
from saffe_cache.store.table import TableBuilder
from saffe_cache.training.result import TrainResult
from saffe_cache.training.runs import kept_encoders, kept_ridge, open_run, weights_hash

if TYPE_CHECKING:
    from saffe_cache.inference.search_index import SearchIndex

logger = logging.getLogger(__name__)

_ITEMS_AT_ONCE = 512
"""Items whose hidden states are in memory at once."""


class Embedded(NamedTuple):
    """Vectors of the items of a dataset. Items that cannot be embedded have none."""

    items: tuple[SourceItem, ...]
    vectors: np.ndarray
    """Unit vectors, float32 [items, d]."""
    problems: Mapping[str, str]
    """Why an item could not be embedded, by id."""

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(item.id for item in self.items)


@dataclass(frozen=True)
class _Bytes:
    """Media in memory."""

    data: bytes

    def read(self) -> bytes:
        return self.data


class TrainedFusion:
    """A trained run that embeds new inputs; made by `load_run`. Threads may share it."""

    def __init__(
        self,
        folder: Path,
        *,
        encoder: Mapping[str, str | OwnEncoder] | None = None,
        device: str = "auto",
        storage: StorageType | None = None,
        index_views: IndexViews = "plain",
    ) -> None:
        """As `load_run`, for a local folder."""
        self.folder, self.device, self.storage = folder, choose_device(device), storage
        kept, past = kept_encoders(folder)
        spec, model, result = open_run(folder, kept)
        self.spec: RunSpec = spec
        self.model: Fusion = model.to(self.device)
        self.result: TrainResult = result
        self.index_views = index_views
        self.gallery_manifest: EncoderManifest = kept.encoders[spec.gallery_key].manifest
        """What the encoder of photos or sounds is."""
        self._views = indexed_views(index_views, self.gallery_manifest.views_of(spec.gallery_layers), f"run {folder}")
        self._weights = weights_hash(folder)  # before the run is trained again
        places, is_auto = dict(encoder or {}), device == "auto"
        self._own = RunEncoders(folder, spec, kept, past, places, self.device, is_auto, storage, self._views)
        self._lock = self._own.lock
        unknown = places.keys() - {*self.media, "text"}
        if unknown:
            media = ", ".join(self.media)
            raise ValueError(f"--encoder {sorted(unknown)[0]}=…: the run has encoders of {media} and text.")

    def __repr__(self) -> str:
        return f"<TrainedFusion {self.spec.shape.fusion}: {self.spec.gallery_key} and {self.spec.text_key}>"

    @property
    def modality(self) -> Modality:
        """What is searched: image, audio or video; media where several of an item are fused."""
        return self.gallery_manifest.modality

    @property
    def media(self) -> tuple[Modality, ...]:
        """The media of an item: one, or several that are fused."""
        return tuple(self._own.media)

    @cached_property
    def size(self) -> int:
        """Width of the vectors."""
        shape, is_token = self.spec.shape, torch.ones(1, 1, dtype=torch.bool)
        token, vector = torch.zeros(1, 1, shape.text_hidden_size), torch.ones(1, shape.text_size)
        with torch.inference_mode():
            blank = Texts((token.to(self.device),), is_token.to(self.device), vector.to(self.device))
            return int(self.model.encode_texts(blank).shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """What vectors depend on: weights, encoders, storage type and views, as a short hash."""
        views = self._views[1:]
        return short_hash([self._weights, self.spec.gallery_key, self.spec.text_key, self.storage, *views])

    @property
    def why_not_alone(self) -> str | None:
        """Why a photo without a text has no trained vector; None where it has."""
        spec = self.spec
        if spec.trains_only_pairs or (spec.gallery_text == "first_caption" and not spec.sees_null):
            return "the run was trained on pairs alone, never without a text. Train with --text-dropout 0.3 for both"
        return None

    @property
    def why_not_paired(self) -> str | None:
        """Why a text that is paired with a photo has no trained effect; None where it has."""
        spec = self.spec
        if spec.media:
            return "no text enters a fusion of several media"
        remedy = "Train with --gallery-text first_caption, or on composed queries with --pairs composed"
        if not spec.shape.takes_text:
            return f"no text enters fusion {spec.shape.fusion} as it was trained. {remedy}, for instance fusion concat"
        if not spec.fuses_text:
            return f"the run was trained without paired texts. {remedy}"
        return None

    def why_no_gallery(self, *, paired: bool) -> str | None:
        """Why items, alone or paired with their texts, are not what the run searches; None where they are."""
        if paired and self.composes:
            return "the run was trained on composed queries, which search photos alone"
        return self.why_not_paired if paired else self.why_not_alone

    @property
    def composes(self) -> bool:
        """Whether a photo and a text are a query, which searches photos alone: it was trained on composed queries."""
        return self.spec.pairs == "composed"

    # Vectors

    def embed_images(self, images: Sequence[Any], *, progress: bool = False) -> np.ndarray:
        """Unit vectors of photos alone, float32 [n, d].

        Args:
            images: paths, pictures of PIL, bytes of files, or uint8 pixels [height, width, 3].
            progress: whether to show a progress bar.

        Raises:
            ValueError: one cannot be read, or the run has no vectors of photos alone.
            CacheError: an encoder is another one than the run's.
        """
        return self._embed_inputs("embed_images", "image", images, None, progress)

    def embed_audio(self, sounds: Sequence[Any], *, progress: bool = False) -> np.ndarray:
        """As `embed_images`, of sounds: paths, bytes, or dicts of array and sampling_rate."""
        return self._embed_inputs("embed_audio", "audio", sounds, None, progress)

    def embed_videos(self, videos: Sequence[Any], *, progress: bool = False) -> np.ndarray:
        """As `embed_images`, of videos: paths or bytes of films, or of animated pictures."""
        return self._embed_inputs("embed_videos", "video", videos, None, progress)

    def embed_media(self, items: Sequence[Mapping[Modality, Any]], *, progress: bool = False) -> np.ndarray:
        """As `embed_images`, of items of several media: mappings such as {"image": PATH, "audio": PATH}, of which some
        may be missing; for a run that fuses several.

        Raises:
            ValueError: as `embed_images`; one of the files that are named cannot be read.
        """
        return self._embed_inputs("embed_media", JOINED, items, None, progress)

    def embed_pairs(self, inputs: Sequence[Any], texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
        """Unit vectors of photos or sounds, each fused with a text: float32 [n, d].

        Raises:
            ValueError: as `embed_images`; no text enters the fusion; inputs and texts differ in number.
        """
        _require_several("embed_pairs", inputs)
        _require_several("embed_pairs", texts)
        if len(inputs) != len(texts):
            raise ValueError(f"embed_pairs: {len(inputs)} inputs, {len(texts)} texts. Give one text for each.")
        return self._embed_inputs("embed_pairs", self.modality, inputs, texts, progress)

    def embed_queries(self, inputs: Sequence[Any], texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
        """As `embed_pairs`, of composed queries: photos, each with a text that says what to change.

        They search vectors of photos alone, by `similarities`.

        Raises:
            ValueError: as `embed_pairs`; the run was not trained on composed queries.
        """
        if not self.composes:
            raise ValueError(
                f"embed_queries: the run was trained with --pairs {self.spec.pairs}, it has not learned to compose "
                "queries. Train with --pairs composed, or use embed_pairs."
            )
        return self.embed_pairs(inputs, texts, progress=progress)

    @property
    def scores_itself(self) -> bool:
        """Whether composed queries have scores that are no inner products, and vectors of another width."""
        return self.composes and self.spec.shape.entry.scores == "own"

    def similarities(self, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        """Scores of composed queries with vectors of photos, float32 [queries, gallery]."""
        with self._lock, torch.inference_mode():
            asked, photos = (torch.from_numpy(np.array(of, np.float32)).to(self.device) for of in (queries, gallery))
            return self.model.similarities(asked, photos).cpu().numpy()

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts that search, float32 [n, d].

        Raises:
            ValueError: one is no text.
            CacheError: the text encoder is another one than the run's.
        """
        table = _table_of_texts("embed_texts", texts)
        if not len(texts):
            return np.zeros((0, self.size), np.float32)
        with self._lock:
            if self.spec.shape.entry.query_tokens:
                return encode_texts(self.model, self._own.with_texts(table), table.captions)
            return encode_queries(self.model, self._own.text_vectors(table).vectors(table.captions.values), self.device)

    def text_vectors(self, texts: Sequence[str]) -> np.ndarray:
        """The text encoder's own vectors, float32 [n, k] of any length, which `embed_texts` maps.

        Raises:
            ValueError, CacheError: as of `embed_texts`.
        """
        table = _table_of_texts("embed_texts", texts)
        if not len(texts):
            return np.zeros((0, self.spec.shape.text_size), np.float32)
        with self._lock:
            return self._own.text_vectors(table).vectors(table.captions.values)

    @cached_property
    def ridge(self) -> LinearMap | None:
        """The ridge regression of the run's training pairs; None if the run is older than it.

        It maps a photo's summary to the text encoder's vectors: the baseline that a fusion should beat.
        """
        return kept_ridge(self.folder)

    def require_ridge(self) -> LinearMap:
        """The ridge regression; ValueError if the run holds none."""
        if self.ridge is None:
            raise ValueError(f"--run {self.folder}: it holds no ridge regression. Train it again with this version.")
        return self.ridge

    def embed_with_ridge(
        self, inputs: Sequence[Any], texts: Sequence[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors of photos or sounds, fused with texts if there are any, and those of the ridge regression, which
        sees no texts: float32 [n, d] and [n, k]. Each input is encoded once.

        Raises:
            ValueError: as of `embed_images` or `embed_pairs`; the run has no ridge regression.
        """
        ridge = self.require_ridge()
        both = self._embed_inputs("embed_with_ridge", self.modality, inputs, texts, False, ridge)
        of_fusion, of_ridge = np.split(both, [both.shape[1] - len(ridge.bias)], axis=1)
        return of_fusion, of_ridge

    def embed_query(
        self, text: str | None, media: Mapping[Modality, Any], *, with_ridge: bool = False
    ) -> dict[str, np.ndarray]:
        """Unit vectors of one query, of a text, of media, or of both fused: "fusion", float32 [1, d], and `with_ridge`
        "ridge", float32 [1, k], which adds the text's vector to that of the media.

        Args:
            media: by name, as of `embed_images` and so on; several only for a run that fuses them.

        Raises:
            ValueError: as of `embed_texts`, `embed_images`, `embed_pairs`, `embed_media`; the run has no ridge
                regression.
        """
        ridge, texts = self.require_ridge() if with_ridge else None, [] if text is None else [text]
        of_text = unit_rows(self.text_vectors(texts)) if ridge is not None and texts else None
        if not media:
            return {"fusion": self.embed_texts(texts)} | ({} if of_text is None else {"ridge": of_text})
        modality, value = (JOINED, media) if self.spec.media else next(iter(media.items()))
        name = "The query" if self.spec.media else f"The {NOUNS[modality]}"
        both = self._embed_inputs(name, modality, [value], texts or None, False, ridge, is_query=True)
        if ridge is None:
            return {"fusion": both}
        of_fusion, of_media = np.split(both, [both.shape[1] - len(ridge.bias)], axis=1)
        return {"fusion": of_fusion, "ridge": of_media if of_text is None else unit_rows(of_media + of_text)}

    def features(self, value: Any, text: str | None = None) -> tuple[States, Mask, Texts | None]:
        """What the fusion sees of one photo or sound, and of a text that is fused with it: what `Fusion.forward` takes.

        Raises:
            ValueError: the input cannot be read.
        """
        item = _item("features", self.media, value, text)
        with self._lock:
            inputs, rows, paired, invalid = self._own.load([item], paired=text is not None)
            for reason in invalid.values():
                raise ValueError(f"features: {reason}. Give a file that can be read.")
            return *inputs.photos(rows), None if paired is None else inputs.texts(paired)

    def embed_classes(self, names: Sequence[str]) -> np.ndarray:
        """Unit vectors of class names that search, float32 [n, d]: means over the prompts of the extraction."""
        _require_several("embed_classes", names)
        if not len(names):
            return np.zeros((0, self.size), np.float32)
        prompts = self._own.recorded(self.spec.text_key).class_prompt
        builder = TableBuilder(None, prompts)
        for number, name in enumerate(names):
            builder.add(SourceItem(id=str(number), split="", media={}, labels=(name,)))
        table = builder.build()
        with self._lock:
            if self.spec.shape.entry.query_tokens:
                of_class = encode_texts(self.model, self._own.with_texts(table), table.class_texts)
            else:
                of_class = encode_queries(self.model, class_vectors(table, self._own.text_vectors(table)), self.device)
        return np.asarray(of_class[table.labels.values])

    def embed_items(
        self,
        data: Any,
        *,
        paired: bool | None = None,
        column: Mapping[str, str] | None = None,
        splits: tuple[str, ...] = (),
        progress: bool = False,
    ) -> Embedded:
        """Vectors of all items of a dataset, in any form that `extract` takes.

        Args:
            paired: whether to fuse each with its first caption; None does so if the run was trained on such pairs.
            column, splits: as of `ExtractConfig`.

        Raises:
            ValueError: there is no usable dataset, or the run has no such vectors.
        """
        items = [item for item in read_items(data, Columns(**(column or {})), splits) if item.query is None]
        return self.embed_read_items(items, paired=paired, progress=progress)

    def embed_read_items(
        self,
        items: Sequence[SourceItem],
        *,
        paired: bool | None = None,
        progress: bool = False,
        with_ridge: bool = False,
    ) -> Embedded:
        """As `embed_items`, of items that `sources.registry.read_items` has read.

        An item without a caption is embedded alone, if the run has learned that too. `with_ridge`: the unit vectors of
        the ridge regression follow in the same rows, [items, d + k].
        """
        ridge = self.require_ridge() if with_ridge else None
        paired = self.spec.gallery_text == "first_caption" if paired is None else paired
        why = self.why_no_gallery(paired=paired)
        if why:
            raise ValueError(f"--run {self.folder}: {why}.")
        found: list[SourceItem] = []
        vectors, problems = [np.zeros((0, self._width(ridge)), np.float32)], dict[str, str]()
        parts = [items[start : start + _ITEMS_AT_ONCE] for start in range(0, len(items), _ITEMS_AT_ONCE)]
        with tqdm(total=len(items), unit=f" {nouns([self.modality])}", disable=not progress) as bar, self._lock:
            for part in parts:
                problems |= {item.id: reason for item in part if (reason := self._problem(item, paired))}
                usable = [item for item in part if item.id not in problems]
                for texts in (True, False):
                    these = [item for item in usable if (paired and bool(item.captions)) is texts]
                    own, invalid = self._encode(these, paired=texts, ridge=ridge)
                    problems |= invalid
                    vectors.append(own)
                    found += [item for item in these if item.id not in invalid]
                bar.update(len(part))
        places = {item.id: place for place, item in enumerate(items)}
        order = np.argsort([places[item.id] for item in found], kind="stable")
        return Embedded(tuple(found[i] for i in order), np.concatenate(vectors)[order], problems)

    def index(self, data: Any, out: str | Path, **options: Any) -> SearchIndex:
        """Make or update a searchable index of a dataset, as `saffe index` does, and open it.

        Args:
            options: as of `IndexConfig`.

        Raises:
            ValueError, OSError: as `saffe_cache.index`.
        """
        from saffe_cache.inference.indexing import update_index
        from saffe_cache.inference.search_index import SearchIndex

        options = {"index_views": self.index_views, **options}
        update_index(self, IndexConfig(data=data, run=str(self.folder), out=str(out), **options))
        return SearchIndex.open(out, self)

    # Exchange

    def save_pretrained(self, folder: str | Path, *, encoders: Mapping[str, str] | None = None) -> None:
        """Write what `load_run` needs to a new folder, with the results of evaluations and a model card (README.md).

        It names no place on this machine.

        Args:
            encoders: hub ids of encoders that were local folders at extraction, by modality.

        Raises:
            ValueError: the folder is not empty.
            OSError: the disk is full or gone.
        """
        sharing.save_run(self, Path(folder), encoders or {}, Path(folder).name)

    def push_to_hub(
        self,
        repository: str,
        *,
        encoders: Mapping[str, str] | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the same to a repository OWNER/NAME on the Hugging Face hub, and return its address.

        Raises:
            HfHubHTTPError: the hub refuses it.
        """
        options = {"encoders": encoders, "private": private, "token": token, "commit_message": commit_message}
        with tempfile.TemporaryDirectory() as work:
            return sharing.push_run(self, repository, Path(work), **options)

    def to_onnx(self, path: str | Path) -> Path:
        """Write f(x, null) of the encoder's hidden states as an ONNX file; see `inference.exporting`.

        Raises:
            ValueError: the fusion cannot be exported, or the run has no vectors of photos alone.
            ImportError: a package of the extra `onnx` is missing.
        """
        from saffe_cache.inference.exporting import export_onnx

        if self.why_not_alone:
            raise ValueError(f"to_onnx: {self.why_not_alone}.")
        return export_onnx(self.model, self.spec.gallery_layers, path)

    @classmethod
    def from_pretrained(cls, run: str | Path, **options: Any) -> TrainedFusion:
        """`load_run`, by the name that users of the hub know."""
        return load_run(run, **options)

    # From inputs to vectors

    def _problem(self, item: SourceItem, paired: bool) -> str:
        """Why an item cannot be embedded; nothing where it can."""
        if item.problem or not any(medium in item.hashes for medium in self.media):
            return item.problem or f"it has no {' or '.join(self.media)}"
        if paired and not item.captions and self.why_not_alone:
            return f"it has no caption, and {self.why_not_alone}"
        return ""

    def _embed_inputs(
        self,
        name: str,
        modality: Modality,
        inputs: Sequence[Any],
        texts: Sequence[str] | None,
        progress: bool,
        ridge: LinearMap | None = None,
        is_query: bool = False,
    ) -> np.ndarray:
        """With a ridge regression, its unit vectors follow those of the fusion in each row.

        `name`: of the method, or of the only input if `is_query`, for messages.
        """
        if modality not in (self.modality, *self.media):
            raise ValueError(f"{name}: the run {self.folder} is of {'+'.join(self.media)}. Use the method for these.")
        why = self.why_not_alone if texts is None else self.why_not_paired
        if why:
            raise ValueError(f"{name}: {why}.")
        _require_several(name, inputs)
        for number, text in enumerate(texts or ()):
            _require_text(name, number, text)
        vectors = list[np.ndarray]()
        starts = range(0, len(inputs), _ITEMS_AT_ONCE)
        for start in tqdm(starts, unit=f" {_ITEMS_AT_ONCE} {nouns([modality])}", disable=not progress):
            chosen = range(start, min(start + _ITEMS_AT_ONCE, len(inputs)))
            media = self.media if modality == JOINED else (modality,)
            where = {i: name if is_query else f"{name}: input {i}" for i in chosen}
            items = [_item(where[i], media, inputs[i], None if texts is None else texts[i]) for i in chosen]
            with self._lock:
                own, invalid = self._encode(items, paired=texts is not None, ridge=ridge, needs_all=True)
            for one, reason in invalid.items():
                raise ValueError(f"{one}: {reason}. Give a file that can be read.")
            vectors.append(own)
        return np.concatenate(vectors) if vectors else np.zeros((0, self._width(ridge)), np.float32)

    def _encode(
        self, items: Sequence[SourceItem], *, paired: bool, ridge: LinearMap | None = None, needs_all: bool = False
    ) -> tuple[np.ndarray, dict[str, str]]:
        """Vectors of the items that could be encoded, in order, and why the others could not."""
        nothing = np.zeros((0, self._width(ridge)), np.float32)
        if not items:
            return nothing, {}
        inputs, rows, texts, invalid = self._own.load(items, paired=paired, needs_all=needs_all)
        if not len(rows):
            return nothing, invalid
        vectors = encode_gallery(self.model, inputs, rows, texts)
        if ridge is not None:
            seen = summaries(inputs.gallery, rows, self.spec.gallery_layers)
            vectors = np.concatenate([vectors, unit_rows(ridge(seen))], axis=1)
        return vectors, invalid

    def _width(self, ridge: LinearMap | None) -> int:
        return self.size + (0 if ridge is None else len(ridge.bias))

    def encoder(self, key: str) -> FrozenEncoder:
        """One of the run's encoders, loaded when it is first needed and compared with its fingerprint.

        Raises:
            ValueError: it is unavailable.
            CacheError: another one is there.
        """
        return self._own.encoder(key)


def load_run(
    run: str | Path,
    *,
    encoder: Mapping[str, str | OwnEncoder] | None = None,
    device: str = "auto",
    storage: StorageType | None = None,
    index_views: IndexViews = "plain",
    revision: str | None = None,
) -> TrainedFusion:
    """A trained run, to embed and search new inputs.

    Its encoders are loaded when they are first needed.

    Args:
        run: the folder of a run, or its repository on the Hugging Face hub, OWNER/NAME.
        encoder: where an encoder is now, by modality; a hub id, a folder or an OwnEncoder. None: where the extraction
            found it.
        device: auto, cpu, cuda or cuda:1.
        storage: type in which hidden states are rounded before they are fused. None takes that of the cache, so that
            vectors are those of evaluation; float32 does not round.
        index_views: plain, or mean: the vector of a photo is the mean of those of all views that the run's cache had,
            which are encoded of each photo.
        revision: of the repository on the hub.

    Raises:
        ValueError: there is no finished run, or it is damaged, or its cache had no views to average.
    """
    folder = sharing.fetched_run(run, revision)
    return TrainedFusion(folder, encoder=encoder, device=device, storage=storage, index_views=index_views)


def _item(where: str, media: Sequence[Modality], value: Any, text: str | None) -> SourceItem:
    """An input in memory as an item, whose id says where it is from; a mapping from these media if they are several."""
    try:
        data = {medium: media_bytes(one) for medium, one in _media_of(where, media, value).items()}
    except OSError as error:
        raise ValueError(f"{where}: {error}. Give a path, a picture, pixels or bytes.") from None
    return SourceItem(
        id=where,
        split="",
        media={medium: _Bytes(one) for medium, one in data.items()},
        hashes={medium: hashlib.sha256(one).digest() for medium, one in data.items()},
        captions=() if text is None else (text,),
    )


def _media_of(where: str, media: Sequence[Modality], value: Any) -> Mapping[Modality, Any]:
    """The media of an input that is one, or a mapping of several."""
    if len(media) == 1:
        return {media[0]: value}
    if not isinstance(value, Mapping) or not value or any(medium not in media for medium in value):
        found = f"the keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        expected = f"{', '.join(media[:-1])} or {media[-1]}"
        raise ValueError(f"{where}: found {found}, expected a mapping from {expected}.")
    return value


def _require_several(name: str, inputs: Any) -> None:
    is_picture = getattr(inputs, "ndim", 0) == 3 and inputs.shape[2] in (1, 3, 4)
    if is_picture or isinstance(inputs, (str, bytes, os.PathLike, Mapping)) or not hasattr(inputs, "__len__"):
        raise ValueError(f"{name}: found one {type(inputs).__name__}, expected a list of inputs. Pass [input].")


def _table_of_texts(name: str, texts: Sequence[str]) -> ItemTable:
    """A table with one item for each text."""
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
        found = "one text" if isinstance(texts, str) else f"a {type(texts).__name__}"
        raise ValueError(f"{name}: found {found}, expected a list of texts. Pass [text].")
    builder = TableBuilder(None, ())
    for number, text in enumerate(texts):
        _require_text(name, number, text)
        builder.add(SourceItem(id=str(number), split="", media={}, captions=(text,)))
    return builder.build()


def _require_text(name: str, number: int, text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name}: text {number} is a {type(text).__name__}, expected str.")
