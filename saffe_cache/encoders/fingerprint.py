"""What of an encoder changes its output, as plain JSON values. Their text is hashed into a cache's keys.

Layers, device and batch are left out: they choose what is computed and where, not the numbers' meaning.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from saffe_cache.core.features import Fingerprint, Modality
from saffe_cache.encoders.loading import EncoderRequest


def fingerprint_of(
    request: EncoderRequest,
    model: Any,
    processor: Any,
    *,
    pooling: str,
    max_length: int | None,
    is_language_model: bool = False,
) -> Fingerprint:
    """The fingerprint of a loaded encoder."""
    of_language_model = {"position_offset": request.position_offset, "text_tokens": "begin, text, end"}
    return Fingerprint(
        {
            **(of_language_model if is_language_model else {}),
            "modality": request.modality,
            "model_id": request.model_id if not Path(request.model_id).exists() else Path(request.model_id).name,
            "revision": getattr(model.config, "_commit_hash", None) or request.revision,
            "weights_sha256": _weights_hash(model),
            "processor": json.loads(_processor_text(processor, request.modality)),
            "max_length": max_length,
            "prompt": request.prompt if request.modality == "text" else None,
            "image_size": request.image_size,
            "dtype": request.dtype,
            "attention": model.config._attn_implementation,
            "pooling": pooling,
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
