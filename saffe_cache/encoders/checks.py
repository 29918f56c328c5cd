"""Refuse a model folder that is incomplete, or a tokenizer or processor that is not the model's.

Transformers replaces missing files by defaults without a message: a tokenizer without a vocabulary maps every word to
the unknown token, and the extraction would succeed with wrong numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from saffe_cache.core.features import Modality
from saffe_cache.encoders.families import Family, first_position, input_embeddings

_PROBE = "A photo of two dogs: ein Hund, un chien, два, ένα, 二匹, 两只, 개, كلب, 42."
"""Words in several scripts; every tokenizer of natural language knows a part of them."""
_FEWEST_KNOWN = 0.5
_FEWEST_WORDS = 1000
"""A smaller vocabulary may be limited to words of its own; the probe does not apply to it."""
_FEWEST_TOKENS = 0.8
"""Smallest vocabulary, as a fraction of the embeddings. Padding for speed adds a few embeddings, never a fifth."""
_SAMPLING_RATE = 16_000
"""Rate in Hz of the sounds that all supported audio models were trained with; their configs do not state it."""
_INPUT_NAMES = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
_SPAN = (0.2, 20.0)
"""Smallest distance of prepared white from black, and largest number in either: usual means and deviations give 1 to 5.
"""


@contextmanager
def explained(where: str, model_id: str, found: str, to_do: str) -> Iterator[None]:
    """Turn any failure to load a part of a model into one line that says what to do.

    Raises:
        ValueError: the part cannot be loaded.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise many kinds, also bare Exception
        line = next(iter(str(error).strip().splitlines()), type(error).__name__).split(". ")[0]
        problem = _folder_problem(Path(model_id).expanduser()) or f"{found} ({line}). {to_do}"
        raise ValueError(f"{where}: {problem}") from error


def _folder_problem(folder: Path) -> str | None:
    """What is wrong with the files of a local model, and what to do; None if nothing is known."""
    files = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            if file.read(64).startswith(b"version https://git-lfs"):
                return (
                    f"{path.name} is a pointer of Git LFS, expected the file itself. Run git lfs pull in the model's "
                    "folder, or download it again."
                )
    for path in files:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError as error:
                return f"{path.name} is damaged or incomplete ({error}). Download it again."
    pickled = [path.name for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickled and not any(path.suffix == ".safetensors" for path in files):
        return (
            f"found {pickled[0]}, expected model.safetensors: pickled weights can run code and are not read. If you "
            "trust them, convert them: transformers.AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    return None


def check_processor(where: str, family: Family, model: Any, processor: Any, *, sized: bool) -> None:
    """
    Args:
        sized: whether the side of the pictures was requested, so it may differ from the model's.

    Raises:
        ValueError: the tokenizer or processor contradicts the model.
    """
    if family.modality == "text":
        problem = _tokenizer_problem(processor, model.get_submodule(family.tower))
        advice = "Add the model's own tokenizer files (tokenizer.json, tokenizer_config.json), or download it again."
    else:
        problem = _input_problem(family, model, processor, sized=sized)
        advice = "Use the model's own preprocessor_config.json."
    if problem:
        raise ValueError(f"{where}: {problem}. {advice}")


def prepared(processor: Any, modality: Modality, raw: Sequence[Any]) -> dict[str, torch.Tensor]:
    """A model's inputs for pictures, clips or sounds."""
    if modality == "audio":
        inputs = processor(raw, sampling_rate=getattr(processor, "sampling_rate", None), return_tensors="pt")
    elif modality == "video":
        inputs = processor(videos=raw, do_sample_frames=False, return_tensors="pt")
    else:
        inputs = processor(images=raw, return_tensors="pt")
    return dict(inputs)


def _tokenizer_problem(tokenizer: Any, model: Any) -> str | None:
    num_tokens, num_embeddings = len(tokenizer), len(input_embeddings(model).weight)
    if not _FEWEST_TOKENS * num_embeddings <= num_tokens <= num_embeddings:
        return f"its tokenizer has {num_tokens} tokens, expected those of the model's {num_embeddings} embeddings"
    config = model.config.get_text_config()
    if first_position(model) is not None and tokenizer.pad_token_id != config.pad_token_id:
        return (
            f"its tokenizer pads with token {tokenizer.pad_token_id}, expected {config.pad_token_id}, from which the "
            "model counts positions"
        )
    if num_tokens >= _FEWEST_WORDS and tokenizer.unk_token_id is not None:
        ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        unknown = ids.count(tokenizer.unk_token_id)
        if not ids or unknown > _FEWEST_KNOWN * len(ids):
            return f"its tokenizer knows {len(ids) - unknown} of {len(ids)} tokens of a sentence, expected half or more"
    return None


def _input_problem(family: Family, model: Any, processor: Any, *, sized: bool) -> str | None:
    modality = family.modality
    config = getattr(model.config, "vision_config", model.config)
    rate = getattr(processor, "sampling_rate", None)
    expected_rate = getattr(config, "sampling_rate", None) or (rate if family.is_discovered else _SAMPLING_RATE)
    if modality == "audio" and rate != expected_rate:
        return f"its feature extractor expects sounds of {rate} Hz, the model {expected_rate} Hz"
    try:
        shape = (1, 64, 64, 3) if modality == "video" else (64, 64, 3)
        blank = [np.full(shape, value, np.uint8) for value in (0, 255)]
        silence = [np.zeros(expected_rate or _SAMPLING_RATE, np.float32)]
        inputs = prepared(processor, modality, silence if modality == "audio" else blank)
    except Exception as error:  # whatever their code meets in a wrong config
        return f"its processor fails on a blank input ({type(error).__name__}: {error})"
    values: torch.Tensor = inputs[next(name for name in inputs if name in _INPUT_NAMES)]
    found = tuple(values.shape[1:])
    expected = (None,) * len(found) if family.is_discovered else family.input_shape(config)
    if any(
        size is not None and size != shown and not (sized and axis)
        for axis, (size, shown) in enumerate(zip(expected, found, strict=True))
    ):
        return f"its processor prepares inputs of shape {found}, the model's config says {expected}"
    if modality != "audio" and len(values) == 2:
        black, white = values
        span, largest = float((white - black).abs().min()), float(values.abs().max())
        if not (span >= _SPAN[0] and largest <= _SPAN[1]):
            return (
                f"its processor maps black and white to numbers {span:.3g} apart and up to {largest:.3g}, expected at "
                f"least {_SPAN[0]} apart and at most {_SPAN[1]:g}: its rescale_factor, image_mean or image_std is wrong"
            )
    return None
