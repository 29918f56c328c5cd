"""What the libraries themselves make of the zoo, kept in `golden/zoo.npz` for tests that run without them.

Vectors of sentence-transformers for each layout and prompt, and pixels of image processors that exist for torchvision
alone. To be run again only when the zoo changes, in an environment with sentence-transformers and torchvision:

    python tests/zoo_reference.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

PATH = Path(__file__).parent / "golden" / "zoo.npz"
TEXTS = [
    "word1 word2 word3 a photo of a dog",
    "word9",
    " ".join(f"word{index * 7 % 40}" for index in range(25)),
    "Two Birds fly over a LAKE",
]
"""Of different lengths, one of them beyond 16 tokens, one with capitals."""
PICTURE = np.random.default_rng(3).integers(0, 256, (45, 60, 3), dtype=np.uint8)


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
    for name in ("dinov3_vit", "dinov3_convnext"):
        zoo.ENTRIES[name].save(folder / name)
        inputs = transformers.AutoImageProcessor.from_pretrained(folder / name)(PICTURE, return_tensors="np")
        found[f"pixels/{name}"] = inputs["pixel_values"]
    return found


def main() -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = sentence_vectors(folder / "sentences")
        found |= torchvision_pixels(folder / "pixels")
    np.savez_compressed(PATH, **{key: value.astype(np.float32) for key, value in found.items()})
    sys.stdout.write(f"{PATH.name}: {len(found)} arrays\n")


if __name__ == "__main__":
    main()
