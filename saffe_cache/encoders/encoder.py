"""A frozen encoder: its inputs prepared, its truncated forward pass, its fingerprint.

The forward pass runs no layer behind the deepest one that is asked for. Hidden states are taken by hooks
on the layers themselves, so that `hidden_states[i]` is what layer i really receives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from saffe_cache.encoders.families import Family, find_family, first_token, masked_mean, read_block
from saffe_cache.features import BlockWeights, Fingerprint, Modality


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
    pooled: bool = True
    """Also keep the encoder's own vector, which needs all layers."""
    device: str = "cpu"


@dataclass(frozen=True)
class Encoded:
    """Output for one batch, float32 on the CPU."""

    states: Mapping[int, np.ndarray]
    """`hidden_states[i]`, each [batch, tokens, hidden_size]."""
    vectors: Mapping[str, np.ndarray]
    """"pooled" and, where the model projects, "projected", each [batch, d]."""
    lengths: np.ndarray
    """int64 [batch]: real tokens."""


class _ForwardDone(Exception):  # noqa: N818 — a way out, not an error
    """Every selected layer has been seen."""


class FrozenEncoder:
    """Made by `load_encoder`."""

    def __init__(self, request: EncoderRequest, family: Family, model: nn.Module, processor: Any) -> None:
        self.request, self.family = request, family
        self._model, self._processor = model, processor
        self._config = model.config.get_text_config() if request.modality == "text" else model.config
        self._config = getattr(self._config, "vision_config", self._config)
        self._core = model.get_submodule(family.core) if family.core else model
        self._layers: nn.ModuleList = model.get_submodule(family.layers)  # type: ignore[assignment]
        self.num_layers = len(self._layers)
        self.hidden_size = int(getattr(self._config, "hidden_size", 0) or self._config.d_model)
        self.layers = self._check_layers(request.layers)
        self.max_length = _max_length(request, processor, self._config) if request.modality == "text" else None
        self.fingerprint = self._fingerprint()
        self._with_vectors = request.pooled
        model.requires_grad_(False).eval().to(request.device)

    @property
    def sampling_rate(self) -> int | None:
        """Hz that sounds must have."""
        return getattr(self._processor, "sampling_rate", None)

    @property
    def vector_widths(self) -> dict[str, int]:
        """Width of each vector that the model has."""
        widths = {"pooled": self.hidden_size}
        if self.family.projection:
            widths["projected"] = int(self._config.projection_dim)
        return widths

    @property
    def blocks(self) -> Mapping[int, BlockWeights]:
        """The block that consumes each selected layer; none consumes the last layer's output."""
        return {
            i: read_block(self.family, self._model, self._config, self._layers[i])
            for i in self.layers
            if i < self.num_layers
        }

    def select(self, layers: Sequence[int], *, vectors: bool) -> None:
        """Choose what `encode` returns; without vectors it runs no layer behind the deepest one.

        Raises:
            ValueError: the model has no such layer.
        """
        self.layers = self._check_layers(tuple(layers))
        self._with_vectors = vectors

    def prepare(self, raw: Any) -> dict[str, torch.Tensor]:
        """One picture or waveform into the model's input, each tensor [1, …]. Threads may call this."""
        if self.request.modality == "image":
            return dict(self._processor(images=[raw], return_tensors="pt"))
        return dict(self._processor([raw], sampling_rate=self.sampling_rate, return_tensors="pt"))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, its prompt and special tokens included, cut at `max_length`."""
        prompted = [self.request.prompt.format(text) for text in texts]
        return list(self._processor(prompted, truncation=True, max_length=self.max_length)["input_ids"])

    def pad(self, token_ids: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """A batch of texts, padded on the right, with its mask."""
        lengths = torch.tensor([len(ids) for ids in token_ids])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        padding = getattr(self._processor, "pad_token_id", None) or 0
        padded = torch.full(mask.shape, padding)
        padded[mask] = torch.tensor([token for ids in token_ids for token in ids])
        return {"input_ids": padded, "attention_mask": mask.long()}

    @torch.inference_mode()
    def encode(self, inputs: Mapping[str, torch.Tensor]) -> Encoded:
        """Run the encoder on one batch."""
        mask = inputs.get("attention_mask") if self.request.modality == "text" else None
        moved = {
            name: value.to(self.request.device, self._model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        if self.family.interpolates:
            moved["interpolate_pos_encoding"] = True  # type: ignore[assignment]
        states: dict[int, torch.Tensor] = {}
        vectors: dict[str, np.ndarray] = {}
        with self._captured(states):
            output = self._core(**moved)
            if self._with_vectors:
                vectors = self._vectors(output, moved.get("attention_mask") if mask is not None else None)
        batch, tokens = next(iter(states.values())).shape[:2] if states else (len(next(iter(inputs.values()))), 0)
        lengths = mask.sum(dim=1).numpy() if mask is not None else np.full(batch, tokens)
        return Encoded({i: _to_numpy(states[i]) for i in self.layers}, vectors, lengths.astype(np.int64))

    @contextmanager
    def _captured(self, states: dict[int, torch.Tensor]) -> Iterator[None]:
        """Collect `hidden_states[i]` of the selected layers, and leave the forward pass when no more is needed."""
        deepest = self.num_layers if self._with_vectors else max(self.layers)

        def keep_input(index: int) -> Any:
            def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                states[index] = arguments[0] if arguments else keywords["hidden_states"]
                if index == deepest:
                    raise _ForwardDone

            return hook

        def keep_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            states[self.num_layers] = output[0] if isinstance(output, tuple) else output

        handles = [
            self._layers[i].register_forward_pre_hook(keep_input(i), with_kwargs=True)
            for i in self.layers
            if i < self.num_layers
        ]
        handles.append(self._layers[-1].register_forward_hook(keep_output))
        try:
            yield
        except _ForwardDone:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def _vectors(self, output: Any, mask: torch.Tensor | None) -> dict[str, np.ndarray]:
        pooled = self.family.pool(output, mask)
        vectors = {"pooled": _to_numpy(pooled)}
        if self.family.projection:
            vectors["projected"] = _to_numpy(self._model.get_submodule(self.family.projection)(pooled))
        return vectors

    def _check_layers(self, asked: tuple[int, ...] | None) -> tuple[int, ...]:
        layers = (self.num_layers - 1, self.num_layers) if asked is None else asked
        wrong = [i for i in layers if not 0 <= i <= self.num_layers]
        if wrong:
            raise ValueError(
                f"{self.request.modality} encoder {self.request.model_id}: no hidden_states[{wrong[0]}]; it has "
                f"0 (embeddings) to {self.num_layers} (output of the last layer). "
                f"Choose --layers {self.request.modality}=… among these."
            )
        return tuple(sorted(set(layers)))

    def _fingerprint(self) -> Fingerprint:
        request = self.request
        return Fingerprint(
            {
                "modality": request.modality,
                "model_id": request.model_id if not Path(request.model_id).exists() else Path(request.model_id).name,
                "revision": getattr(self._model.config, "_commit_hash", None) or request.revision,
                "weights_sha256": _weights_hash(self._model),
                "processor": json.loads(_processor_text(self._processor, request.modality)),
                "max_length": self.max_length,
                "prompt": request.prompt if request.modality == "text" else None,
                "image_size": request.image_size,
                "dtype": request.dtype,
                "attention": self._model.config._attn_implementation,
                "pooling": self.family.pooling,
                "layer_convention": "hidden_states[i] is the input of layer i",
                "library_versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
                "format_version": 1,
            }
        )


def load_encoder(request: EncoderRequest) -> FrozenEncoder:
    """Load a model and its processor or tokenizer.

    Raises:
        ValueError: the model cannot be had, its family has no adapter, weights that the forward pass needs
            are missing, or the layers do not exist.
    """
    where = f"{request.modality} encoder {request.model_id}"
    options = {"revision": request.revision}
    try:
        config = transformers.AutoConfig.from_pretrained(request.model_id, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{where}: no model there ({str(error).splitlines()[0]}). Give a hub id or a folder with config.json."
        ) from error
    family = find_family(config.model_type, request.modality)
    if request.attention:
        options["attn_implementation"] = request.attention
    model_class = getattr(transformers, family.model_class)
    model, info = model_class.from_pretrained(
        request.model_id,
        dtype=getattr(torch, request.dtype),
        output_loading_info=True,
        **family.load_options,
        **(family.config_changes or {}),
        **options,
    )
    missing = sorted(name for name in info["missing_keys"] if "position_ids" not in name)
    if family.projection and missing == [f"{family.projection}.weight"]:
        family = replace(family, projection=None)  # a tower that was saved without its projection
    elif missing:
        raise ValueError(f"{where}: its checkpoint lacks {', '.join(missing[:3])}. Use a checkpoint of this model.")
    if request.modality == "text":
        family = _with_repository_pooling(request, family)
    return FrozenEncoder(request, family, model, _load_processor(request))


def _load_processor(request: EncoderRequest) -> Any:
    """The processor, feature extractor or tokenizer."""
    if request.modality == "text":
        return transformers.AutoTokenizer.from_pretrained(request.model_id, revision=request.revision)
    if request.modality == "audio":
        return transformers.AutoFeatureExtractor.from_pretrained(request.model_id, revision=request.revision)
    processor = transformers.AutoImageProcessor.from_pretrained(request.model_id, revision=request.revision)
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
    if set(kinds) - {"Transformer", "Pooling", "Normalize"} or len(modes) != 1 or modes[0] not in _SENTENCE_TRANSFORMER_POOLS:
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
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(request.model_id, name, revision=request.revision)).read_text()
    except (EntryNotFoundError, OSError):
        return None


def _max_length(request: EncoderRequest, tokenizer: Any, config: Any) -> int:
    """Tokens: the smallest of what was asked, what the repository says, and the positions there are."""
    said = _repository_file(request, "sentence_bert_config.json")
    limits = [request.max_length, tokenizer.model_max_length, json.loads(said).get("max_seq_length") if said else None]
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        limits.append(positions - (2 if config.model_type in ("roberta", "xlm-roberta", "mpnet") else 0))
    return min(int(limit) for limit in limits if limit)


def _weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"")
    return digest.hexdigest()


def _processor_text(processor: Any, modality: Modality) -> str:
    """A processor as JSON: its class (backends differ in their pixels) and settings; a tokenizer as a hash."""
    if modality != "text":
        settings = processor.to_dict()
        settings.pop("processor_class", None)
        return json.dumps({"class": type(processor).__name__, **settings}, default=str, sort_keys=True)
    backend = getattr(processor, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(processor.get_vocab(), sort_keys=True)
    return json.dumps({"class": type(processor).__name__, "sha256": hashlib.sha256(content.encode()).hexdigest()})


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to("cpu", torch.float32).numpy()
