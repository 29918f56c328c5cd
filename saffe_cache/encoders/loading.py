"""Load a model and its processor, and compute the fingerprint of what affects its output.

A checkpoint that lacks a weight of the forward pass raises an error, since transformers would initialise it at random.
Code in a repository is never run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from saffe_cache.core.features import Decoding, Fingerprint, Modality
from saffe_cache.encoders.checks import explained
from saffe_cache.encoders.discovery import discover, drop_other_towers, model_class
from saffe_cache.encoders.families import FAMILIES, Family, first_position
from saffe_cache.encoders.offloading import load_spread, require_accelerate, weights_of
from saffe_cache.encoders.own import OwnEncoder
from saffe_cache.encoders.videos import load_video_processor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncoderRequest:
    """Which encoder to load, and what to compute with it. None takes the model's own setting."""

    modality: Modality
    model_id: str
    """A hub id or a local folder."""
    revision: str | None = None
    layers: tuple[int, ...] | None = None
    """Indices i of `hidden_states[i]`; None takes the last two."""
    image_size: int | None = None
    """Side of the pictures in pixels."""
    decoding: Decoding | None = "full"
    """How JPEGs are decoded, where the processor's resize is known; None takes scaled for an encoder that a cache does
    not hold in full."""
    grey_bits: int | None = None
    """Bits of 16-bit grey pictures that are used, where a file does not say it; None for all."""
    max_length: int | None = None
    """Longest text in tokens."""
    prompt: str | None = None
    """Inserted around every text, which replaces the {}; None takes the repository's default prompt, if it has one."""
    prompt_name: str | None = None
    """Name of one of the repository's prompts."""
    subfolder: str = ""
    """Where in its repository the model is."""
    dtype: str = "float32"
    """Type of the forward pass."""
    attention: str | None = None
    """sdpa, eager or flash_attention_2."""
    language_model: bool = False
    """Keep it as a causal language model, with all that generation needs."""
    position_offset: int = 0
    """Position of a text's first token, for language models: this many positions before it stay free."""
    pooled: bool = True
    """Also compute the encoder's own vector, which needs all layers."""
    tokens: str = "all"
    """Which tokens of each layer are kept; `TokenSelection` reads it."""
    audio_seconds: float = 30.0
    """Longest window of a sound in seconds, for models that take sounds of any length."""
    video_frames: int | None = None
    """Frames of a clip; None takes the model's own number."""
    device: str = "cpu"
    device_map: str | None = None
    """How accelerate places a model that does not fit on the device: auto, balanced or sequential."""
    max_memory: Mapping[str, str] = field(default_factory=dict)
    """Most memory of each device for that, of GPUs by number, such as {"0": "20GiB", "cpu": "60GiB"}."""
    own: OwnEncoder | None = None
    """The user's own encoder, named by `model_id`; None to load one."""

    @property
    def where(self) -> str:
        """The encoder, for messages."""
        return f"{self.modality} encoder {self.model_id}"

    def explained(self, found: str, to_do: str) -> AbstractContextManager[None]:
        """Turn any failure to load a part of it into one line that says what to do."""
        return explained(self.where, self.model_id, found, to_do)

    @property
    def version(self) -> dict[str, Any]:
        """What the library's loaders take besides the model's id."""
        return {"revision": self.revision, "subfolder": self.subfolder}

    @property
    def text_template(self) -> str:
        """The prompt, with {} for the text."""
        return "{}" if self.prompt is None else self.prompt


SCALED = "JPEG at 1/2, 1/4 or 1/8, at least twice the resize"
"""How pictures were decoded, in a fingerprint."""
_OPTIONAL_WEIGHTS = ("position_ids", "num_batches_tracked")
"""Weights that checkpoints may lack: positions are computed, and a batch norm's number of training steps is unused."""


@dataclass(frozen=True)
class Loaded:
    """A model and where its parts are."""

    family: Family
    model: Any
    missing: tuple[str, ...] = ()
    """Weights that its checkpoint lacks and that no layer needs, such as those of a pooler; they are zeros."""


def load_model(request: EncoderRequest) -> Loaded:
    """The model and where its parts are.

    Raises:
        ValueError: the model is unavailable or quantised, transformers has no plain model of its type, or weights of
            the forward pass are missing.
    """
    where = request.where
    with request.explained("found no model", "Use a hub id or a folder with config.json."):
        config = transformers.AutoConfig.from_pretrained(request.model_id, trust_remote_code=False, **request.version)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{where}: its weights are quantised, expected float32, float16 or bfloat16: rounded weights would not be "
            "those of the model. Use the checkpoint that it was made from."
        )
    family = FAMILIES.get((config.model_type, request.modality))
    _check_config(where, family, config, request)
    try:
        generates = request.language_model and family is None
        kind = (
            getattr(transformers, family.model_class)
            if family
            else model_class(config, request.modality, generates=generates)
        )
        model, missing = _from_pretrained(where, kind, request, family.load_options if family else {})
        if family is None:
            family = discover(model, request.modality, generates=generates)
            if family.tower:
                drop_other_towers(model, family.tower)
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from error
    if family.projection and missing == [f"{family.projection}.weight"]:
        # a tower saved without its projection; the random one of transformers would enter the fingerprint
        model.set_submodule(family.projection, torch.nn.Identity())
        family, missing = replace(family, projection=None), []
    if family.is_discovered:
        missing = [name for name in missing if _parameter(model, name) is not None]
    unneeded = [name for name in missing if family.is_discovered and "pooler" in name.split(".")]
    needed = sorted({*missing} - {*unneeded})
    if needed:
        raise ValueError(f"{where}: its checkpoint lacks {', '.join(needed[:3])}. Use a checkpoint of this model.")
    _fill_with_zeros(where, model, unneeded)
    return Loaded(family, model, tuple(unneeded))


def _fill_with_zeros(where: str, model: Any, names: Iterable[str]) -> None:
    """Replace the random values of weights that no layer needs; they are a part of the fingerprint.

    Raises:
        ValueError: accelerate has placed one of them on the disk.
    """
    for name in names:
        weight = model.get_parameter(name)
        if weight.is_meta:
            raise ValueError(
                f"{where}: its checkpoint lacks {name}, and --device-map placed it on the disk. Omit --device-map, or "
                "allow more memory with --max-memory."
            )
        weight.data.zero_()


def _from_pretrained(
    where: str, kind: Any, request: EncoderRequest, options: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """A model, and the weights that its checkpoint lacks."""
    if request.attention:
        options = {**options, "attn_implementation": request.attention}
    if request.device_map:
        require_accelerate(where)
    load = partial(
        kind.from_pretrained,
        request.model_id,
        dtype=getattr(torch, request.dtype),
        output_loading_info=True,
        use_safetensors=True,  # other formats would be unpickled
        **request.version,
        **options,
    )
    with quietly(), request.explained("its weights cannot be loaded", "Download it again."):
        spread = request.device_map
        model, info = load_spread(load, spread, request.max_memory) if spread else load()
    return model, sorted(name for name in info["missing_keys"] if not name.endswith(_OPTIONAL_WEIGHTS))


def _parameter(model: Any, name: str) -> Any:
    """A weight; None if the part that it belonged to was dropped."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None


def _check_config(where: str, family: Family | None, config: Any, request: EncoderRequest) -> None:
    """
    Raises:
        ValueError: the model differs from its family, or does not support the position offset.
    """
    for name, expected in family.expects.items() if family else ():
        found = getattr(config, name, expected)
        if found != expected:
            raise ValueError(f"{where}: its config has {name} {found}, expected {expected}. Choose another model.")
    is_language_model = family.language_model if family else request.language_model
    if request.position_offset and not is_language_model:
        raise ValueError(
            f"{where}: found --position-offset {request.position_offset}, expected 0: only language models support an "
            "offset. Omit it, or add --language-model."
        )
    if request.language_model and not is_language_model:
        raise ValueError(f"{where}: a {config.model_type} is no causal language model. Omit --language-model.")


@contextmanager
def quietly() -> Iterator[None]:
    """Hide the list of unused weights and the progress bar; missing weights are checked above."""
    logs = transformers.utils.logging
    verbosity, had_bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if had_bars:
            logs.enable_progress_bar()


_AUTO = {"text": "AutoTokenizer", "audio": "AutoFeatureExtractor", "image": "AutoImageProcessor"}
"""Classes that load a processor."""


def load_processor(request: EncoderRequest) -> Any:
    """The processor, feature extractor or tokenizer.

    Raises:
        ValueError: its files are missing or damaged.
    """
    options: dict[str, Any] = {"trust_remote_code": False, **request.version}
    load = (
        load_video_processor
        if request.modality == "video"
        else getattr(transformers, _AUTO[request.modality]).from_pretrained
    )
    name = "tokenizer" if request.modality == "text" else "preprocessor_config.json"
    if request.modality == "image":
        # With torchvision installed, transformers would take classes that resize otherwise, and far more slowly.
        options["backend"] = "pil"
    with request.explained(f"its {name} cannot be loaded", "Add the model's own, or download again."):
        try:
            processor = load(request.model_id, **options)
        except ImportError:
            if request.modality != "image":
                raise
            processor = _plain_pictures(request)
    if request.image_size:
        _resize(request.where, processor, request.image_size)
    return processor


def _plain_pictures(request: EncoderRequest) -> Any:
    """For a model whose image processor needs torchvision (DINOv3): PIL's, with the same settings.

    Both resize with antialiasing; their pixels differ by rounding to whole numbers.

    Raises:
        ValueError: the settings have steps besides resize, crop, rescale and normalize.
    """
    settings = json.loads(repository_text(request, "preprocessor_config.json") or "{}")
    unknown = [name for name in ("do_pad", "do_flip_channel_order", "do_reduce_labels") if settings.get(name)]
    if unknown:
        raise ValueError(f"{settings.get('image_processor_type')} with {unknown[0]} needs torchvision")
    kept = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
    chosen = {name: settings[name] for name in (*kept, *steps) if settings.get(name) is not None}
    logger.info(
        "%s: pictures are resized by PIL; its %s needs torchvision.",
        *(request.where, settings.get("image_processor_type")),
    )
    return transformers.BitImageProcessorPil(**{"do_center_crop": False, **chosen})


def _resize(where: str, processor: Any, pixels: int) -> None:
    """Set the side of the processor's pictures, keeping the ratio of resize to crop.

    Raises:
        ValueError: it resizes pictures in another way.
    """
    crop = dict(processor.crop_size or {}) if getattr(processor, "do_center_crop", False) else {}
    size = dict(getattr(processor, "size", None) or {})
    side = crop.get("height") or size.get("height") or size.get("shortest_edge")
    if not side:
        raise ValueError(
            f"{where}: found --image-size {pixels}, expected none: its {type(processor).__name__} has neither height "
            "and width nor a shortest edge to set. Omit it."
        )
    scale = pixels / side
    processor.size = type(processor.size)(**{name: round(value * scale) for name, value in size.items() if value})
    if crop:
        processor.crop_size = type(processor.crop_size)(height=pixels, width=pixels)


def repository_file(request: EncoderRequest, name: str) -> Path | None:
    """A file of the model's repository, local or on the hub; None if it does not exist."""
    folder = Path(request.model_id).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).exists() else None
    try:
        return Path(hf_hub_download(request.model_id, name, revision=request.revision))
    except LocalEntryNotFoundError:
        if try_to_load_from_cache(request.model_id, name, revision=request.revision) is not _CACHED_NO_EXIST:
            logger.warning(
                "%s: the hub is unreachable, so it is assumed to have no %s. If it defines its own pooling, load it "
                "once with the hub available.",
                *(request.where, name),
            )
        return None
    except EntryNotFoundError:
        return None


def repository_text(request: EncoderRequest, name: str) -> str | None:
    """The text of such a file."""
    path = repository_file(request, name)
    return path.read_text(encoding="utf-8") if path else None


_LONGEST = 32_768
"""Most tokens of a text where neither the tokenizer nor the model has a limit."""


def longest_text(request: EncoderRequest, tokenizer: Any, model: Any, config: Any) -> int | None:
    """Longest text in tokens: the smallest of the request, the tokenizer's limit, and the model's positions; None for
    other modalities.

    Rotary positions of the kind `longrope` (Phi-3) turn at other speeds for all texts of a batch as soon as one is
    longer than the original positions, so no text may be.
    """
    if request.modality != "text":
        return None
    limits = [request.max_length, tokenizer.model_max_length]
    positions = getattr(config, "max_position_embeddings", None)
    if positions and positions > 0:
        first = first_position(model)
        limits.append(max(1, positions - (request.position_offset if first is None else first)))
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limits.append(rope.get("original_max_position_embeddings"))
    return min(int(limit) for limit in [*limits, _LONGEST] if limit)


def fingerprint_of(
    request: EncoderRequest,
    model: Any,
    processor: Any,
    family: Family,
    *,
    max_length: int | None,
    padding: str,
    num_tokens: int | None,
    windows: Mapping[str, Any] | None,
    is_scaled: bool,
) -> Fingerprint:
    """The fingerprint of a loaded encoder: plain JSON values, whose hash is part of the encoder's key in a cache.

    Layers, device and batch size are excluded: they choose what is computed and where, not the meaning of the numbers.
    """
    of_language_model = {"position_offset": request.position_offset, "text_tokens": "begin, text, end"}
    return Fingerprint(
        {
            **(of_language_model if family.generates else {}),
            **({} if padding == "longest" else {"padding": padding}),
            **({"decoding": SCALED} if is_scaled else {}),
            **({} if request.grey_bits is None else {"grey_bits": request.grey_bits}),
            **({} if request.tokens == "all" else {"tokens": request.tokens, "encoded_tokens": num_tokens}),
            **({"pooling_sha256": _weights_hash(family.pool)} if isinstance(family.pool, torch.nn.Module) else {}),
            **({"audio_windows": dict(windows)} if windows else {}),
            "modality": request.modality,
            "model_id": request.model_id if not Path(request.model_id).exists() else Path(request.model_id).name,
            "revision": getattr(model.config, "_commit_hash", None) or request.revision,
            "weights_sha256": _weights_hash(model),
            "processor": json.loads(_processor_text(processor, request.modality)),
            "max_length": max_length,
            "prompt": request.text_template if request.modality == "text" else None,
            "image_size": request.image_size,
            **({"video_frames": request.video_frames} if request.video_frames else {}),
            "dtype": request.dtype,
            "attention": model.config._attn_implementation,
            "pooling": family.pooling,
            "layer_convention": "hidden_states[i] is the input of layer i",
            "library_versions": {
                "torch": torch.__version__.split("+")[0],
                "transformers": transformers.__version__,
            },
            "format_version": 1,
        }
    )


def _weights_hash(model: Any) -> str:
    """SHA-256 over names, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, value in weights_of(model):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"")
    return digest.hexdigest()


def _processor_text(processor: Any, modality: Modality) -> str:
    """A processor as JSON: its class (backends give different pixels) and settings; a tokenizer as a hash."""
    if modality != "text":
        settings = processor.to_dict()
        settings.pop("processor_class", None)
        return json.dumps({"class": type(processor).__name__, **settings}, default=str, sort_keys=True)
    backend = getattr(processor, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(processor.get_vocab(), sort_keys=True)
    return json.dumps({"class": type(processor).__name__, "sha256": hashlib.sha256(content.encode()).hexdigest()})
