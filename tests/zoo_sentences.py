"""Tiny sentence-transformers repositories of every layout in use, written without the library.

A repository is a transformers checkpoint plus `modules.json`, which lists the steps from tokens to a vector, and one
folder of settings for each step. Two forms of the pooling settings exist: one flag for each mode until version 5.3,
and the names of the modes from 5.4 on, together with new dotted names of the steps' classes.

    python tests/zoo_sentences.py OUT [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from zoo import CORPUS, ENTRIES

OLD_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""Flag of each mode in the old form; several modes are concatenated in this order, whatever their order in the file."""
OLD_NAMES, BASE, MODULES = (
    "sentence_transformers.models",
    "sentence_transformers.base.modules",
    "sentence_transformers.sentence_transformer.modules",
)
NEW_NAMES = {
    "Transformer": f"{BASE}.transformer.Transformer",
    "Pooling": f"{MODULES}.pooling.Pooling",
    "Dense": f"{BASE}.dense.Dense",
    "Normalize": f"{BASE}.normalize.Normalize",
    "LayerNorm": f"{MODULES}.layer_norm.LayerNorm",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One repository: the checkpoint it starts from and the steps behind it."""

    name: str
    steps: tuple[tuple[str, Mapping[str, Any]], ...]
    """Class and settings of each step behind the first."""
    base: str = "bert"
    """Checkpoint of the first step, or the class of one that is not a transformer."""
    is_old: bool = True
    """Dotted names as before version 5.4."""
    first_folder: str = ""
    """Where the transformer lies; at the root unless the repository is one of the oldest."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """`sentence_bert_config.json`: the longest text in tokens, and whether texts are lowered."""
    prompts: Mapping[str, Any] = field(default_factory=dict)
    """`config_sentence_transformers.json`: prompts by name, and the name of the default one."""

    def save(self, folder: Path) -> None:
        """Write the repository."""
        first = folder / self.first_folder
        first.mkdir(parents=True, exist_ok=True)
        kind = _FIRST[self.base](first) if self.base in _FIRST else _save_transformer(self.base, self.settings, first)
        steps = [{"idx": 0, "name": "0", "path": self.first_folder, "type": self._class_name(kind)}]
        for index, (step, settings) in enumerate(self.steps, start=1):
            path = f"{index}_{step}"
            save_step(step, settings, folder / path, seed=index)
            steps.append({"idx": index, "name": str(index), "path": path, "type": self._class_name(step)})
        _write(folder / "modules.json", steps)
        versions = {"sentence_transformers": "2.2.2" if self.is_old else "6.2.0"}
        _write(folder / "config_sentence_transformers.json", {"__version__": versions, **self.prompts})

    def _class_name(self, step: str) -> str:
        return f"{OLD_NAMES}.{step}" if self.is_old else NEW_NAMES[step]


def _write(path: Path, settings: Any) -> None:
    path.write_text(json.dumps(settings, indent=2))


def _save_transformer(base: str, settings: Mapping[str, Any], folder: Path) -> str:
    ENTRIES[base].save(folder)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False, **settings})
    return "Transformer"


def _save_word_embeddings(folder: Path) -> str:
    """Vectors of single words, looked up by a tokenizer that drops stop words and words it does not know."""
    words = sorted({word for line in CORPUS for word in line.split()})
    vectors = torch.randn(len(words) + 1, 32, generator=torch.Generator().manual_seed(0))
    vectors[0] = 0
    save_file({"emb_layer.weight": vectors}, folder / "model.safetensors")
    tokenizer_class = f"{OLD_NAMES}.tokenizer.WhitespaceTokenizer.WhitespaceTokenizer"
    settings = {"tokenizer_class": tokenizer_class, "update_embeddings": False, "max_seq_length": 20}
    _write(folder / "wordembedding_config.json", settings)
    vocabulary = {"vocab": ["PADDING_TOKEN", *words], "stop_words": ["a", "of", "the", "on"], "do_lower_case": True}
    _write(folder / "whitespacetokenizer_config.json", vocabulary)
    return "WordEmbeddings"


def _save_static_embedding(folder: Path) -> str:
    """The mean of token vectors, with no transformer."""
    ENTRIES["bert"].save(folder)
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    vectors = torch.randn(ENTRIES_VOCABULARY, 32, generator=torch.Generator().manual_seed(0))
    save_file({"embedding.weight": vectors}, folder / "model.safetensors")
    return "StaticEmbedding"


def _save_clip(folder: Path) -> str:
    ENTRIES["clip"].save(folder)
    return "CLIPModel"


ENTRIES_VOCABULARY = 320
_FIRST = {"WordEmbeddings": _save_word_embeddings, "StaticEmbedding": _save_static_embedding, "CLIPModel": _save_clip}


def save_step(step: str, settings: Mapping[str, Any], folder: Path, seed: int) -> None:
    """Settings of one step, and its weights where it has some."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    if step == "Dense":
        width, out = settings["in_features"], settings["out_features"]
        weights = {"linear.weight": torch.randn(out, width, generator=generator) / width**0.5}
        if settings["bias"]:
            weights["linear.bias"] = torch.randn(out, generator=generator)
        save_file(weights, folder / "model.safetensors")
    if step == "LayerNorm":
        draw = 1 + 0.3 * torch.randn(2, settings["dimension"], generator=generator)
        save_file({"norm.weight": draw[0], "norm.bias": draw[1].clone()}, folder / "model.safetensors")
    if settings:
        _write(folder / "config.json", settings)


def pooling(*modes: str, old: bool = True, width: int = 32, **more: Any) -> tuple[str, dict[str, Any]]:
    """A pooling step in either form."""
    if old:
        flags = {flag: mode in modes for mode, flag in OLD_FLAGS.items()}
        return "Pooling", {"word_embedding_dimension": width, **flags, **more}
    return "Pooling", {
        "embedding_dimension": width,
        "pooling_mode": modes[0] if len(modes) == 1 else list(modes),
        "include_prompt": True,
        **more,
    }


def dense(width: int, out: int, *, activation: str = "activation.Tanh", bias: bool = True) -> tuple[str, Any]:
    """A linear layer behind the pooling."""
    name = f"torch.nn.modules.{activation}"
    return "Dense", {"in_features": width, "out_features": out, "bias": bias, "activation_function": name}


NORMALIZE: tuple[str, Mapping[str, Any]] = ("Normalize", {})
LINEAR = {"activation": "linear.Identity", "bias": False}
RETRIEVAL = {"query": "word1 query word2: ", "document": "word3 passage: "}

_LAYOUTS = [
    *(Layout(name=f"{mode}_old", steps=(pooling(mode),)) for mode in OLD_FLAGS),
    *(Layout(name=f"{mode}_new", steps=(pooling(mode, old=False),), is_old=False) for mode in OLD_FLAGS),
    Layout(name="several_old", steps=(pooling("mean", "cls", "max"),)),
    Layout(name="several_new", steps=(pooling("mean", "cls", "weightedmean", old=False),), is_old=False),
    Layout(name="minilm", steps=(pooling("mean"), NORMALIZE), settings={"max_seq_length": 16}),
    Layout(name="lowered", base="roberta", steps=(pooling("cls"), NORMALIZE), settings={"do_lower_case": True}),
    Layout(name="dense", steps=(pooling("mean"), dense(32, 20))),
    Layout(name="dense_normalized", steps=(pooling("mean"), dense(32, 20, **LINEAR), NORMALIZE)),
    Layout(name="layer_norm", steps=(pooling("mean"), ("LayerNorm", {"dimension": 32}))),
    Layout(name="oldest", steps=(pooling("mean"),), first_folder="0_Transformer"),
    Layout(name="mpnet", base="mpnet", steps=(pooling("mean"), NORMALIZE)),
    Layout(
        name="default_prompt", steps=(pooling("mean"),), prompts={"prompts": RETRIEVAL, "default_prompt_name": "query"}
    ),
    Layout(name="named_prompts", steps=(pooling("cls"), NORMALIZE), prompts={"prompts": RETRIEVAL}),
    Layout(
        name="prompt_excluded",
        steps=(pooling("mean", include_prompt=False),),
        prompts={"prompts": RETRIEVAL, "default_prompt_name": "document"},
    ),
    Layout(name="gtr_t5", base="t5_gated", steps=(pooling("mean"), dense(32, 20, **LINEAR), NORMALIZE)),
    Layout(
        name="qwen3_embedding",
        base="qwen3_left",
        steps=(pooling("lasttoken"), NORMALIZE),
        prompts={"prompts": RETRIEVAL},
    ),
    Layout(
        name="embedding_gemma",
        base="embedding_gemma",
        steps=(pooling("mean"), dense(32, 48, **LINEAR), dense(48, 32, **LINEAR), NORMALIZE),
        prompts={"prompts": RETRIEVAL, "default_prompt_name": "document"},
    ),
    Layout(name="modernbert", base="modernbert", is_old=False, steps=(pooling("cls", old=False), NORMALIZE)),
    Layout(name="word_embeddings", base="WordEmbeddings", first_folder="0_WordEmbeddings", steps=(pooling("mean"),)),
    Layout(name="static_embedding", base="StaticEmbedding", first_folder="0_StaticEmbedding", steps=(NORMALIZE,)),
    Layout(name="clip", base="CLIPModel", first_folder="0_CLIPModel", steps=()),
]
LAYOUTS = {layout.name: layout for layout in _LAYOUTS}


def main(arguments: list[str] | None = None) -> None:
    """Write the repositories, all or those named, each to a folder of its name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the repositories")
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME")
    options = parser.parse_args(arguments)
    for name in options.only:
        LAYOUTS[name].save(options.out / name)


if __name__ == "__main__":
    main()
