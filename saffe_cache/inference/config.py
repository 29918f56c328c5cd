"""The options of the commands that use a trained run on other data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from saffe_cache.core.features import MODALITIES, IndexKind
from saffe_cache.core.options import positional, require, require_keys, require_seed
from saffe_cache.core.views import IndexViews
from saffe_cache.retrieval.correction import CorrectionOptions
from saffe_cache.sources.items import Columns


@dataclass(frozen=True, kw_only=True)
class IndexConfig(CorrectionOptions):
    """Embed a folder or dataset with a run and write an index that `saffe search` searches.

    Running it again embeds only what is new or has changed, and removes what has vanished.
    """

    data: str = positional()
    """Photos or sounds: any folder, table or dataset that saffe extract --data takes."""
    run: str
    """The run's folder, as saffe train wrote it, or its repository on the Hugging Face hub, OWNER/NAME."""
    out: str
    """Folder of the index."""
    index: IndexKind = "flat"
    """Kind of the index. flat: compares with every item, exact. ivf: with those of the nearest clusters (at least 624
    items). ivf_pq: the same on codes of a sixteenth of the size (at least 9984 items). hnsw: follows a graph, the
    fastest."""
    paired: bool | None = None
    """Fuse each item with its first caption, or with none. Default: as the run was trained."""
    index_views: IndexViews = "plain"
    """Views of each photo. plain: the photo itself. mean: the mean of the vectors of all views that the run's cache
    has, which are made of each new photo, and of a photo to search with."""
    ridge: bool = False
    """Also keep the vectors of the run's ridge regression, so that `saffe serve` can compare the fusion with it. This
    doubles the size of a flat index."""
    splits: tuple[str, ...] = ()
    """Index only this split. Repeat the option for several. Default: all."""
    column: Mapping[str, str] = field(default_factory=dict)
    """Columns of a dataset or fields of metadata.jsonl, as image=NAME, caption=NAME, label=NAME, id=NAME, split=NAME.
    Default: found by type and usual names."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Where an encoder of the run is now, if it has moved, as image=PLACE."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: a GPU if there is one."""
    export: str | None = None
    """Also write ids, vectors, captions, labels and splits to this Parquet file."""
    cache: str | None = None
    """The cache that the run was trained on, from which a search correction takes its bank of training texts. Default:
    where it was then. An index keeps its bank: updates need no cache."""

    def check(self) -> None:
        """Raise ValueError if a key is unknown."""
        require_keys("column", self.column, [one.name for one in fields(Columns)])
        require_keys("encoder", self.encoder, MODALITIES)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Search an index by a text, by a photo or sound, or by both fused."""

    index: str = positional()
    """The index's folder, as saffe index wrote it."""
    text: str | None = positional(None)
    """What to search for."""
    image: str | None = None
    """A photo to search with; with a text, both are fused into one query."""
    audio: str | None = None
    """A sound to search with, in an index of sounds. In one of items of several media, several files are one query."""
    video: str | None = None
    """A video to search with, in an index of videos."""
    k: int = 10
    """Number of results; fewer if the index has fewer items."""
    json: bool = False
    """Print the results as JSON, one object a line."""
    run: str | None = None
    """Where the run is now, if it has moved."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Where an encoder of the run is now, if it has moved, as text=PLACE."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: a GPU if there is one."""

    def __post_init__(self) -> None:
        require(self.k > 0, "k", self.k, "a number above 0")
        require_keys("encoder", self.encoder, MODALITIES)
        if self.text is None and self.image is self.audio is self.video is None:
            raise ValueError("found nothing to search for, expected a text, --image, --audio or --video.")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve a page that searches an index by text, photo, sound or video, until Ctrl-C.

    Only this machine can reach it unless --host says otherwise; there are no accounts and no encryption.
    """

    index: str = positional()
    """The index's folder, as saffe index wrote it."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address lets other machines search the index and see its items."""
    port: int = 8000
    """Port to listen on; 0 takes any free one."""
    allowed_host: tuple[str, ...] = ()
    """Name by which browsers reach this machine, besides localhost and IP addresses; repeat it for several."""
    upload_mb: float = 20.0
    """Largest upload, in MB: all files of a query together."""
    run: str | None = None
    """Where the run is now, if it has moved."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Where an encoder of the run is now, if it has moved, as text=PLACE."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: a GPU if there is one."""

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "port", self.port, "0 to 65535")
        require(0 < self.upload_mb <= 1000, "upload_mb", self.upload_mb, "above 0 and at most 1000")
        require_keys("encoder", self.encoder, MODALITIES)


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measure a run on standard benchmarks, with intervals, and compare it with another run.

    The library downloads the data of its tasks, usually from the Hugging Face hub.
    """

    run: str = positional()
    """The run's folder, as saffe train wrote it, or its repository on the hub, OWNER/NAME."""
    tasks: tuple[str, ...]
    """Name of a task, such as Flickr30kT2IRetrieval (mteb) or cifar10 (clip_benchmark). Repeat the option for
    several."""
    out: str
    """Folder for the result, the report and the scores of single queries."""
    library: Literal["mteb", "clip_benchmark"] = "mteb"
    """The library whose tasks and metrics are used. clip_benchmark: zero-shot retrieval and classification."""
    against: str | None = None
    """Another run to measure on the same tasks; differences get intervals by paired bootstrap over queries."""
    split: str = "test"
    """Split of clip_benchmark's datasets; mteb's tasks have their own."""
    root: str = "benchmarks"
    """Folder where clip_benchmark finds its datasets, or downloads them to."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Where an encoder of the runs is now, if it has moved, as image=PLACE."""
    seed: int = 0
    """Seed of the bootstrap."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: a GPU if there is one."""

    def __post_init__(self) -> None:
        require(bool(self.tasks), "tasks", "none", "at least one")
        require_keys("encoder", self.encoder, MODALITIES)
        require_seed("seed", self.seed)
