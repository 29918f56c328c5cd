"""From a request to a model and its processor: what must be there, and what the repository prescribes.

A checkpoint that lacks a weight of the forward pass is refused, since transformers would fill it at random.
A text repository that says how it pools (sentence-transformers) is obeyed. Code in a repository is never run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from saffe_cache.core.features import Modality
from saffe_cache.encoders.families import Family, find_family, first_token, masked_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncoderRequest:
    """Which encoder, and what of it. None takes what the model itself prescribes."""

    modality: Modality
    model_id: str
    """A hub id or a local folder."""
    revision: str | None = None
    layers: tuple[int, ...] | None = None
    """Indices i of `hidden_states[i]`; None takes the last two."""
    image_size: int | None = None
    """Pixels of a side."""
    max_length: int | None = None
    """Tokens of a text."""
    prompt: str = "{}"
    """Every text is put into this."""
    dtype: str = "float32"
    """Of the forward pass."""
    attention: str | None = None
    """sdpa, eager or flash_attention_2."""
    position_offset: int = 0
    """Position of a text's first token, for language models: so many places in front of it are left free."""
    pooled: bool = True
    """Also keep the encoder's own vector, which needs all layers."""
    device: str = "cpu"


_NOT_OF_THE_PASS = ("position_ids", "num_batches_tracked")
"""What checkpoints may lack: positions are counted, and a batch norm's number of training steps is not read."""


def load_model(request: EncoderRequest) -> tuple[Family, Any]:
    """The frozen model, and how to find one's way in it.

    Raises:
        ValueError: the model cannot be had, its family has no adapter, or weights that the forward pass needs
            are missing.
    """
    where = f"{request.modality} encoder {request.model_id}"
    options = {"revision": request.revision}
    try:
        config = transformers.AutoConfig.from_pretrained(request.model_id, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{where}: no model there ({str(error).splitlines()[0]}). Give a hub id or a folder with config.json."
        ) from error
    family = find_family(config.model_type, request.modality)
    _check_config(where, family, config, request)
    if request.attention:
        options["attn_implementation"] = request.attention
    with _quietly():
        model, info = getattr(transformers, family.model_class).from_pretrained(
            request.model_id,
            dtype=getattr(torch, request.dtype),
            output_loading_info=True,
            use_safetensors=True,  # other checkpoints would be unpickled
            **family.load_options,
            **options,
        )
    missing = sorted(name for name in info["missing_keys"] if not name.endswith(_NOT_OF_THE_PASS))
    if family.projection and missing == [f"{family.projection}.weight"]:
        # a tower that was saved without its projection; the one that transformers made up would enter the fingerprint
        model.set_submodule(family.projection, torch.nn.Identity())
        family = replace(family, projection=None)
    elif missing:
        raise ValueError(f"{where}: its checkpoint lacks {', '.join(missing[:3])}. Use a checkpoint of this model.")
    return (_with_repository_pooling(request, family) if request.modality == "text" else family), model


def _check_config(where: str, family: Family, config: Any, request: EncoderRequest) -> None:
    """
    Raises:
        ValueError: the model computes something else than its family, or places are asked for that it cannot leave.
    """
    for name, expected in family.expects.items():
        found = getattr(config, name, expected)
        if found != expected:
            raise ValueError(f"{where}: its config has {name} {found}, expected {expected}. Choose another model.")
    if request.position_offset and not family.language_model:
        raise ValueError(
            f"{where}: found --position-offset {request.position_offset}, expected 0: only language models (gpt2) "
            "leave places free in front of a text. Leave it out."
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """No list of weights left out, no bar for weights being read: what matters of it is checked above."""
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


def load_processor(request: EncoderRequest) -> Any:
    """The processor, feature extractor or tokenizer."""
    options = {"revision": request.revision, "trust_remote_code": False}
    if request.modality == "text":
        return transformers.AutoTokenizer.from_pretrained(request.model_id, **options)
    if request.modality == "audio":
        return transformers.AutoFeatureExtractor.from_pretrained(request.model_id, **options)
    # With torchvision installed, transformers would take classes that resize otherwise, and far more slowly.
    processor = transformers.AutoImageProcessor.from_pretrained(request.model_id, backend="pil", **options)
    if request.image_size:
        _resize(processor, request.image_size)
    return processor


def _resize(processor: Any, pixels: int) -> None:
    """Make the processor's pictures `pixels` a side, keeping the ratio of its resize to its crop."""
    crop = dict(processor.crop_size or {}) if getattr(processor, "do_center_crop", False) else {}
    size = dict(processor.size)
    scale = pixels / (crop.get("height") or size.get("height") or size["shortest_edge"])
    processor.size = type(processor.size)(**{name: round(value * scale) for name, value in size.items() if value})
    if crop:
        processor.crop_size = type(processor.crop_size)(height=pixels, width=pixels)


_SENTENCE_TRANSFORMER_POOLS = {
    "pooling_mode_mean_tokens": ("mean of tokens", masked_mean),
    "pooling_mode_cls_token": ("first token", first_token),
}


def _with_repository_pooling(request: EncoderRequest, family: Family) -> Family:
    """The family, pooling as its sentence-transformers repository says, where it is one.

    Raises:
        ValueError: the repository pools, or goes on after pooling, in a way that is not supported.
    """
    modules = _repository_file(request, "modules.json")
    if modules is None:
        return family
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in json.loads(modules)]
    text = _repository_file(request, "1_Pooling/config.json") or "{}"
    modes = [name for name, value in json.loads(text).items() if name.startswith("pooling_mode_") and value is True]
    if (
        set(kinds) - {"Transformer", "Pooling", "Normalize"}
        or len(modes) != 1
        or modes[0] not in _SENTENCE_TRANSFORMER_POOLS
    ):
        raise ValueError(
            f"text encoder {request.model_id}: its modules {kinds} with {modes} are not supported; expected a "
            f"Transformer and a Pooling by one of {list(_SENTENCE_TRANSFORMER_POOLS)}. Choose another encoder."
        )
    pooling, pool = _SENTENCE_TRANSFORMER_POOLS[modes[0]]
    return replace(family, pool=pool, pooling=pooling)


def _repository_file(request: EncoderRequest, name: str) -> str | None:
    """A file beside the model, local or on the hub; None where it has none."""
    folder = Path(request.model_id).expanduser()
    if folder.is_dir():
        return (folder / name).read_text() if (folder / name).exists() else None
    try:
        return Path(hf_hub_download(request.model_id, name, revision=request.revision)).read_text()
    except LocalEntryNotFoundError:
        if try_to_load_from_cache(request.model_id, name, revision=request.revision) is not _CACHED_NO_EXIST:
            logger.warning(
                "text encoder %s: the hub cannot be asked whether it has %s; taken as if it had none. If it pools "
                "its vectors in a way of its own, load it once with the hub in reach.",
                request.model_id,
                name,
            )
        return None
    except EntryNotFoundError:
        return None


def longest_text(request: EncoderRequest, tokenizer: Any, config: Any) -> int:
    """Tokens: the smallest of what was asked, what the repository says, and the positions there are."""
    said = _repository_file(request, "sentence_bert_config.json")
    limits = [request.max_length, tokenizer.model_max_length, json.loads(said).get("max_seq_length") if said else None]
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        taken = 2 if config.model_type in ("roberta", "xlm-roberta", "mpnet") else request.position_offset
        limits.append(max(1, positions - taken))
    return min(int(limit) for limit in limits if limit)
