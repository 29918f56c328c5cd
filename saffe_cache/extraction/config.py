"""Options of extraction and repair. A manifest's history keeps those of each extraction, which repairs read again."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from saffe_cache.core.devices import choose_device, num_cores
from saffe_cache.core.features import MODALITIES, Compression, Decoding, StorageType
from saffe_cache.core.json_schema import made_of
from saffe_cache.core.options import positional, require, require_keys
from saffe_cache.core.views import parse_views
from saffe_cache.sources.items import Columns

_SIZE = re.compile(r"\d+([KMG]i?B)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Run frozen encoders once and write their hidden states, vectors and block weights to a cache.

    Running it again changes nothing; with more layers, encoders, splits or items, it adds the new ones.
    """

    data: str | Any
    """Dataset: a folder of splits with class folders, with SPLIT/metadata.jsonl (file_name, captions or label) or with
    texts beside photos, and SPLIT/queries.jsonl for composed queries; FashionIQ, CIRR or CIRCO with their own files; a
    table of file names; tar archives of samples, also as {000..099}.tar; Parquet files; a folder saved by
    datasets.save_to_disk; or a dataset of the Hugging Face hub as OWNER/NAME:CONFIG@REVISION."""
    cache: str
    """The cache to write: a folder name such as data.zarr, or a URL: s3://, gs:// or az:// (with credentials from
    AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME and so on, and AWS_ENDPOINT_URL for
    another server), or one that fsspec opens."""
    encoder: Mapping[str, str]
    """Frozen encoder of a modality, as image=ID, text=ID, audio=ID or video=ID, where ID is a hub id or a local folder.
    Repeat the option for several."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Hidden states to keep, as image=11,12; hidden_states[i] is the input of layer i. Default: the last two."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Tokens to keep of a modality, as image=cls+grid=4: all, or some of cls (class token), mean (of the others),
    grid=K (means over K x K places) and top=N (largest norms), joined by +. Fusions that run an encoder's blocks need
    all. Default: all."""
    image_size: int | None = None
    """Side of the pictures in pixels. Default: the setting of the model's processor."""
    decoding: Decoding | None = None
    """How JPEGs are decoded. scaled: a large one at 1/2, 1/4 or 1/8 of its size, at least twice that of the model's
    resize; several times as fast, and pixels differ a little. full: all pixels, as in earlier releases.
    Default: that of the cache's encoder, or scaled for a new one."""
    grey_bits: int | None = None
    """Bits that grey pictures with 16 bits use, 8 to 16, where their files do not say it. Default: all 16."""
    views: str | None = None
    """Views of each photo to encode besides the photo itself, of one decoding, for training to draw from: flip (its
    mirror image), crop=N (N random crops of half of it or more) or flip,crop=N. Each takes the time and the bytes that
    the photo itself takes. Default: none; views that the cache has grow with it."""
    max_length: int | None = None
    """Longest text in tokens. Default: the model's limit."""
    audio_seconds: float = 30.0
    """Longest window of a sound in seconds, for encoders that take sounds of any length (wav2vec 2.0, HuBERT). A longer
    sound is encoded window by window. Encoders with a window of their own (Whisper, AST, CLAP) use that."""
    video_frames: int | None = None
    """Frames of a video that are encoded, evenly spaced. Default: as many as the encoder was made for. Encoders with
    learned positions take no other number."""
    prompt: str | None = None
    """Inserted around every text, for models that need a prompt, such as 'query: {}'; '{}' for none. Default: the
    default prompt of the text encoder's repository, if it has one."""
    prompt_name: str | None = None
    """Name of a prompt of the text encoder's repository (sentence-transformers), such as query."""
    language_model: bool = False
    """Keep the text encoder as a causal language model that `saffe caption` can use: texts get its begin and end
    tokens, and all of its blocks are kept. GPT-2 always is one."""
    position_offset: int = 0
    """For language models: position of a text's first token. The positions before it stay free for photo tokens that
    `saffe caption` inserts at a later layer."""
    class_prompt: tuple[str, ...] = ("a photo of a {}.",)
    """Sentence for a class name. Repeat the option for several; their vectors are averaged."""
    splits: tuple[str, ...] = ()
    """Use only this split. Repeat the option for several. Default: all."""
    max_items: Mapping[str, int] = field(default_factory=dict)
    """Maximum number of items of a split, as train=5000: a fixed random choice by item id."""
    column: Mapping[str, str] = field(default_factory=dict)
    """Columns of a dataset or fields of metadata.jsonl, as image=NAME, audio=NAME, video=NAME, caption=NAME,
    label=NAME, id=NAME, split=NAME. Default: found by type and usual names."""
    streaming: bool = False
    """Read Parquet files and datasets of the hub in order, without a copy on this machine's disk: once for the table,
    and once for each encoder of photos or sounds."""
    revision: Mapping[str, str] = field(default_factory=dict)
    """Revision of a hub model, as image=COMMIT."""
    storage: StorageType | None = None
    """Type of hidden states on disk; int8 and float8 have a scale per token. Default: the type of the encoder's other
    layers, or float8 for a new encoder. Vectors are always float32."""
    compression: Compression = "none"
    """Compression of hidden states on disk. zstd saves 5 to 25 %, for slow networks and full disks, but compressed
    shards cannot be memory-mapped and are decompressed into memory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the forward pass. auto: float32 on a CPU, bfloat16 on a GPU. A CPU with AVX-512 BF16 or AMX encodes two
    to three times as fast with bfloat16."""
    attention: str | None = None
    """Attention implementation: sdpa, eager or flash_attention_2. Default: the model's."""
    pooled: bool = True
    """Also keep each encoder's own vector; without it, the forward pass stops at the deepest kept layer."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1. auto uses a GPU if there is one."""
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    """For encoders that do not fit on one device: accelerate places their layers on the GPUs, then in this machine's
    memory, then on its disk. auto and balanced: the same share of each GPU. sequential: one GPU after the other.
    Default: the encoder is on one device."""
    max_memory: Mapping[str, str] = field(default_factory=dict)
    """Most memory for --device-map, of a GPU by its number, as 0=20GiB, or of this machine, as cpu=60GiB. A device that
    is not named is not used. Default: the free memory of all."""
    batch_tokens: int | None = None
    """Tokens per batch, including padding; a batch that does not fit into memory is halved. Default: 2048 on a CPU,
    which fit into its caches, 32768 on a GPU."""
    batch_size: int | None = None
    """Photos or sounds per batch. Default: as many as --batch-tokens allows."""
    workers: int | None = None
    """Workers that read, decode and prepare photos and sounds. Default: one per processor core, at least 4."""
    decode_in: Literal["auto", "threads", "processes"] = "auto"
    """Kind of workers. auto: threads with a CPU; forked processes with a GPU, which threads would slow down."""
    shard_mb: int = 64
    """Size of a shard in MB: the unit of writing and resuming."""
    max_invalid: float = 0.01
    """Largest fraction of unreadable items, 0 to 1; above it, the run stops."""
    changed: Literal["error", "reencode"] = "error"
    """What to do if an item's file, captions or labels have changed since extraction. error: stop and name it.
    reencode: encode the new content; the old rows stay in the cache unused. Runs trained on changed items must be
    trained again."""
    rehash: bool = False
    """Read all files again. Default: a file of an earlier run that has the same path, size, times and inode is taken to
    be unchanged."""
    plan: bool = False
    """Print the number of items, bytes and files and the estimated time, and write nothing."""

    rank: int | None = None
    """Number of this process among those that extract together, from 0, such as $SLURM_PROCID. They share one plan and
    take ranges of it; one that starts late, or again, does what others have left."""
    world_size: int | None = None
    """Number of processes that extract together, such as $SLURM_NTASKS. All are started with the same other options."""

    workers_on: Literal["ray"] | None = None
    """Encode on all GPUs of a Ray cluster, or on its processor cores if it has no GPU. Its nodes need this package, and
    the same paths to data, encoders and cache, or URLs; a run grows and shrinks with the cluster."""
    ray_address: str | None = None
    """Address of the cluster's head, such as 10.0.0.1:6379; auto: the one that runs on this machine. Default:
    $RAY_ADDRESS, or else a cluster of this machine alone, which ends with the command."""
    gpus_per_worker: float = 1.0
    """GPUs of each worker on the cluster; 0 to use processor cores alone."""

    def __post_init__(self) -> None:
        self._check_ranks()
        self._check_cluster()
        for option, mapping in (
            ("encoder", self.encoder),
            ("layers", self.layers),
            ("tokens", self.tokens),
            ("revision", self.revision),
        ):
            require_keys(option, mapping, MODALITIES)
        require_keys("column", self.column, [one.name for one in fields(Columns)])
        require(bool(self.encoder), "encoder", "none", "at least one, such as image=facebook/dinov2-small")
        idle = [name for name in self.layers if name not in self.encoder]
        require(not idle, "layers", f"{idle}=…", "modalities that --encoder names")
        require(
            not self.view_names or "image" in self.encoder,
            *("views", f"{self.views} with --encoder {'=…, '.join(self.encoder)}=…", "an --encoder image=…"),
        )
        named = self.prompt_name is not None
        require(not named or "text" in self.encoder, "prompt_name", self.prompt_name, "an --encoder text=…")
        require(not named or self.prompt is None, "prompt_name", self.prompt_name, "no --prompt besides it")
        for prompt in (*([] if self.prompt is None else [self.prompt]), *self.class_prompt):
            require(prompt.count("{}") == 1, "prompt or --class-prompt", repr(prompt), "exactly one {} for the text")
        for option in ("image_size", "max_length", "video_frames", "batch_size", "batch_tokens", "workers"):
            value = getattr(self, option)
            require(value is None or value > 0, option, value, "a number above 0")
        require(
            not (self.streaming and self.decode_in == "processes"),
            "decode_in",
            "processes with --streaming",
            "threads, which share one stream",
        )
        require(
            self.device_map is None or self.device == "auto",
            *("device", f"{self.device} with --device-map", "auto, and --max-memory to choose devices"),
        )
        require(
            not self.max_memory or self.device_map is not None, "max_memory", "no --device-map", "one, such as auto"
        )
        for name, size in self.max_memory.items():
            shown = f"{name}={size}"
            require(name == "cpu" or name.isdecimal(), "max_memory", shown, "cpu=… or the number of a GPU")
            require(bool(_SIZE.fullmatch(size)), "max_memory", shown, "a size such as 20GiB or 500MB")
        require(self.grey_bits is None or 8 <= self.grey_bits <= 16, "grey_bits", self.grey_bits, "8 to 16")
        require(self.position_offset >= 0, "position_offset", self.position_offset, "0 or more")
        require(0.1 <= self.audio_seconds < math.inf, "audio_seconds", self.audio_seconds, "0.1 or more")
        require(self.shard_mb >= 0, "shard_mb", self.shard_mb, "0 (the smallest) or more")
        require(0 <= self.max_invalid <= 1, "max_invalid", self.max_invalid, "a fraction from 0 to 1")
        require(min(self.max_items.values(), default=1) > 0, "max_items", dict(self.max_items), "numbers above 0")

    @property
    def view_names(self) -> tuple[str, ...]:
        """Names of the views that are encoded besides the plain photos."""
        return parse_views(self.views or "")

    def _check_ranks(self) -> None:
        given = (self.rank is None) == (self.world_size is None)
        require(given, "rank", f"{self.rank} with --world-size {self.world_size}", "both or neither")
        if self.rank is not None and self.world_size is not None:
            require(
                0 <= self.rank < self.world_size, "rank", self.rank, f"0 to --world-size - 1, {self.world_size - 1}"
            )
            require(not self.plan, "plan", "it with --rank", "it without --rank")
            require(not self.streaming, "streaming", "it with --rank", "a copy of the data that all ranks can read")

    def _check_cluster(self) -> None:
        require(
            self.ray_address is None or self.workers_on is not None,
            *("ray_address", "no --workers-on", "--workers-on ray besides it"),
        )
        address = self.ray_address or "auto"
        require("://" not in address, "ray_address", address, "HOST:PORT of the cluster's head, or auto")
        require(0 <= self.gpus_per_worker < math.inf, "gpus_per_worker", self.gpus_per_worker, "0 or more")
        if self.workers_on is None:
            return
        where = f"it with --workers-on {self.workers_on}"
        require(self.rank is None, "rank", where, "one of both")
        require(not self.plan, "plan", where, "it alone")
        require(not self.streaming, "streaming", where, "a copy of the data that all nodes can read")
        device = f"{self.device} with --workers-on {self.workers_on}"
        require(self.device in ("auto", "cpu", "cuda"), "device", device, "auto, cpu or cuda: Ray chooses which GPU")


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """Recompute the damaged parts of a cache from the data and the encoders."""

    cache: str = positional()
    """The cache."""
    data: tuple[str, ...] = ()
    """Where the data are now. Default: where each extraction found them."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Where an encoder is now, as MODALITY=ID or, if there are several, KEY=ID. Default: where extraction found it."""
    device: str | None = None
    """Where encoders run: auto, cpu, cuda or cuda:1. Default: as in the extraction."""


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(ExtractConfig):
    """A config whose defaults are resolved for a machine."""

    batch_tokens: int
    workers: int


def encode_options(config: ExtractConfig) -> EncodeOptions:
    """Resolve the defaults that depend on the machine."""
    tokens = 2048 if choose_device(config.device) == "cpu" else 32768
    resolved = {
        "batch_tokens": config.batch_tokens or tokens,
        "workers": config.workers or max(4, num_cores()),
        "decode_in": "threads" if config.streaming else config.decode_in,
    }
    return EncodeOptions(**vars(config) | resolved)


def config_from_json(content: Mapping[str, Any]) -> ExtractConfig:
    """A config from a manifest's history; fields that this release does not know are ignored.

    Raises:
        ValueError, TypeError: it is no valid config.
    """
    known = {one.name: content[one.name] for one in fields(ExtractConfig) if one.name in content}
    if "prompt_name" not in content and known.get("prompt") == "{}":
        known["prompt"] = None  # of a release whose "{}" was the default prompt
    return made_of(ExtractConfig, known)
