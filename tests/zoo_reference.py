"""What the libraries themselves make of the zoo, kept in `golden/zoo.npz` for tests that run without them.

Vectors of sentence-transformers for each layout and prompt, pixels of the image and video processors that exist for
torchvision alone, and pixels, layers' outputs and vectors of timm. To be run again only when the zoo changes, in an
environment with sentence-transformers, timm and at least the Python part of torchvision:

    python tests/zoo_reference.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo_timm
from PIL import Image

PATH = Path(__file__).parent / "golden" / "zoo.npz"
TEXTS = [
    "word1 word2 word3 a photo of a dog",
    "word9",
    " ".join(f"word{index * 7 % 40}" for index in range(25)),
    "Two Birds fly over a LAKE",
]
"""Of different lengths, one of them beyond 16 tokens, one with capitals."""
FRAMES = [np.random.default_rng(3 + index).integers(0, 256, (45, 60, 3), dtype=np.uint8) for index in range(4)]
"""Frames of one clip; the first is the picture."""


def sentence_vectors(folder: Path) -> dict[str, np.ndarray]:
    """By `sentences/LAYOUT/PROMPT`; the prompt is empty where none is asked for by name."""
    import zoo_sentences
    from sentence_transformers import SentenceTransformer

    found = {}
    for name, layout in zoo_sentences.LAYOUTS.items():
        layout.save(folder / name)
        model = SentenceTransformer(str(folder / name), device="cpu")
        for prompt in ("", *layout.prompts.get("prompts", {})):
            found[f"sentences/{name}/{prompt}"] = model.encode(TEXTS, prompt_name=prompt or None)
    return found


def torchvision_pixels(folder: Path) -> dict[str, np.ndarray]:
    """By `pixels/CHECKPOINT`, from the processors that need torchvision."""
    import transformers
    import zoo

    found = {}
    for name in ("dinov3_vit", "dinov3_convnext", "vivit", "vjepa2"):
        zoo.ENTRIES[name].save(folder / name)
        if "video" in zoo.ENTRIES[name].modalities:
            inputs = transformers.AutoVideoProcessor.from_pretrained(folder / name)([FRAMES], return_tensors="np")
        else:
            inputs = transformers.AutoImageProcessor.from_pretrained(folder / name)(FRAMES[0], return_tensors="np")
        (found[f"pixels/{name}"],) = (value for key, value in inputs.items() if key.startswith("pixel_values"))
    return found


@torch.no_grad()
def timm_states(folder: Path) -> dict[str, np.ndarray]:
    """By `timm/CHECKPOINT/WHAT`: the pixels of the picture, each layer's output, and the features and vector."""
    timm = zoo_timm.import_timm()
    found: dict[str, np.ndarray] = {}
    for name in zoo_timm.MODELS:
        zoo_timm.save(name, folder / name)
        model = timm.create_model(f"local-dir:{folder / name}", pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        pixels: Any = transform(Image.fromarray(FRAMES[0]))[None]
        found[f"timm/{name}/pixels"] = pixels.numpy()
        _, layers = model.forward_intermediates(pixels, norm=False)
        found |= {f"timm/{name}/layer_{index}": layer.numpy() for index, layer in enumerate(layers)}
        found[f"timm/{name}/features"] = model.forward_features(pixels).numpy()
        found[f"timm/{name}/vector"] = model(pixels).numpy()
    return found


def main() -> None:
    """Write the file."""
    zoo_timm.declare_operators()  # before transformers, which is imported by all that follows, looks for torchvision
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = sentence_vectors(folder / "sentences")
        found |= timm_states(folder / "timm")
        found |= torchvision_pixels(folder / "pixels")
    np.savez_compressed(PATH, **{key: value.astype(np.float32) for key, value in found.items()})
    sys.stdout.write(f"{PATH.name}: {len(found)} arrays\n")


if __name__ == "__main__":
    main()
