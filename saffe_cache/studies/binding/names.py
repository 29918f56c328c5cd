"""Made-up names that can be pronounced, and their vectors.

A name is two or three syllables, each an onset, a vowel and perhaps a coda, drawn by a seeded generator: "blorbin",
"skaduz". No list of English words is consulted, so that a short English word may come up by chance; none equals a
class's name, or a word of one.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.retrieval.baselines import unit_rows

_ONSETS = [
    *("b", "bl", "br", "d", "dr", "f", "fl", "fr", "g", "gl", "gr", "j", "k", "kl", "kr", "l", "m", "n", "p", "pl"),
    *("pr", "r", "s", "sk", "sl", "sm", "sn", "sp", "st", "t", "tr", "v", "w", "z"),
]
_VOWELS = list("aeiou")
_CODAS = ["", "", "b", "d", "g", "k", "l", "m", "n", "p", "r", "s", "t", "x", "z"]
_TEXTS_AT_ONCE = 64


def make_names(count: int, avoid: Iterable[str], seed: int) -> list[str]:
    """So many names, none equal to one of `avoid` or to a word of it, whatever the case."""
    generator = np.random.default_rng(seed)
    avoided = {part.lower() for name in avoid for part in (name, *name.replace("_", " ").split())}
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [
            generator.choice(_ONSETS) + generator.choice(_VOWELS) + generator.choice(_CODAS)
            for _ in range(generator.integers(2, 4))
        ]
        if (name := "".join(syllables)) not in avoided:
            names[name] = None
    return list(names)


@dataclass(frozen=True)
class NamePool:
    """Names, and where a text encoder puts them."""

    names: tuple[str, ...]
    vectors: np.ndarray
    """float32 [names, d]: mean over the class prompts of the encoder's unit vectors, as for classes."""
    encoder: str
    """Its key."""

    def save(self, path: Path) -> None:
        file = io.BytesIO()
        np.savez(file, names=np.array(self.names), vectors=self.vectors, encoder=np.array(self.encoder))
        write_whole(path, file.getvalue())

    @staticmethod
    def load(path: Path) -> NamePool:
        """
        Raises:
            ValueError: it is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                pool = NamePool(tuple(file["names"].tolist()), file["vectors"], str(file["encoder"]))
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise ValueError(f"{path}: not a pool of names ({error}). Delete it, it is then made again.") from None
        if pool.vectors.dtype != np.float32 or pool.vectors.ndim != 2 or len(pool.vectors) != len(pool.names):
            found = f"{len(pool.names)} names and {pool.vectors.dtype} {pool.vectors.shape}"
            raise ValueError(f"{path}: {found}, expected a float32 vector for each. Delete it, it is then made again.")
        return pool


def encode_names(encoder: FrozenEncoder, vector: str, names: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """Mean over the prompts of each name's unit vectors, float32 [names, d].

    Args:
        encoder: of the texts.
        vector: which of its vectors, "pooled" or "projected".
        names: at least one.
        prompts: sentences, each with one {} where the name goes.
    """
    encoder.select((encoder.num_layers,), vectors=True)
    of_prompts = []
    for prompt in prompts:
        ids = encoder.tokenize([prompt.replace("{}", name) for name in names])
        parts = [
            encoder.encode(encoder.pad(ids[start : start + _TEXTS_AT_ONCE])).vectors[vector]
            for start in range(0, len(ids), _TEXTS_AT_ONCE)
        ]
        of_prompts.append(unit_rows(np.concatenate(parts)))
    return np.asarray(np.mean(of_prompts, axis=0), np.float32)
