"""A zoo of tiny random checkpoints, one for each family that the installed transformers can load as an encoder.

Each checkpoint is a folder as a user would have it: weights, config, and the tokenizer, image processor or feature
extractor of the family. The library's default config is shrunk by a table of attribute names; a family adds only what
the table cannot know. Two image processors and all video processors exist for torchvision alone: their files are
written as on the hub, and no class can load them without it.

    python tests/zoo.py OUT [--only NAME ...] [--more]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from zoo_families import FAMILIES, IMAGE_SIZE, MAX_TOKENS, MORE, NUM_LAYERS, PATCH_SIZE, Families

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("decoder_hidden_size", "pred_hidden_size", "output_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "d_inner", "n_inner", "ffn_dim", "mlp_dim"), 48),
    **dict.fromkeys(("decoder_intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "encoder_layers"), NUM_LAYERS),
    **dict.fromkeys(("encoder_num_hidden_layers",), NUM_LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers"), 1),
    **dict.fromkeys(("pred_num_hidden_layers", "num_pooler_layers", "num_adapter_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "decoder_num_attention_heads"), 2),
    **dict.fromkeys(("encoder_num_attention_heads", "encoder_num_key_value_heads", "pred_num_attention_heads"), 2),
    **dict.fromkeys(("decoder_num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 16),
    **dict.fromkeys(("projection_dim", "project_dim", "projection_size"), 20),
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "max_position_embeddings": MAX_TOKENS + 2,  # RoBERTa counts positions from its padding token on
    "layer_norm_eps": 0.01,  # large enough to be missed
    "layer_scale_init_value": 0.5,
    "sliding_window": 8,
    "local_attention": 8,
    "num_mel_bins": 16,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_frames": 4,
}
"""What each attribute of a config becomes wherever a family's default config has it."""

CORPUS = [
    *(f"word{i} word{i + 1} word{i * 7 % 40}" for i in range(40)),
    "a photo of a dog on the grass",
    "two birds fly over a lake while a man rides a red bicycle",
    "an old train station where people wait with their bags",
    "the sound of rain on a roof and thunder far away",
]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One checkpoint: what it is for, and what its family needs beyond the shrunk default config."""

    name: str
    modalities: tuple[str, ...]
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """Attributes set over the shrunk ones; a mapping reaches into the sub-config of that name."""
    saved_as: str = ""
    """Class of the published checkpoints where it is not AutoModel's: their weights carry its prefix."""
    tokenizer: str = ""
    """Class of the tokenizer where transformers names none for the model type."""
    padding_side: str = "right"
    processor: Mapping[str, Any] = field(default_factory=dict)
    """Settings over the shrunk ones; `image_processor_type` writes the file without the class."""

    @property
    def tokenizer_class(self) -> str:
        """Name of the class in transformers."""
        return self.tokenizer or str(TOKENIZER_MAPPING_NAMES[self.model_type])

    def save(self, folder: Path) -> None:
        """Write the checkpoint."""
        ids: dict[str, Any] = {}
        if "text" in self.modalities:
            ids = save_tokenizer(self.tokenizer_class, self.padding_side, folder)
        if "image" in self.modalities or "video" in self.modalities:
            save_image_processor(self.model_type, self.processor, folder)
        if "audio" in self.modalities:
            save_feature_extractor(self.model_type, self.processor, folder)
        config = shrunk_config(CONFIG_MAPPING[self.model_type], self.config, ids)
        kind = getattr(transformers, self.saved_as) if self.saved_as else transformers.AutoModel
        torch.manual_seed(0)
        model = kind(config) if self.saved_as else kind.from_config(config)
        randomize(model, seed=sum(self.name.encode()))
        model.save_pretrained(folder)


def shrunk_config(config_class: Any, changes: Mapping[str, Any], ids: Mapping[str, Any]) -> Any:
    """The family's default config with tiny sizes, then with the family's own changes."""
    default = config_class()
    present = default.to_dict()
    subs = {name: type(getattr(default, name)) for name in getattr(config_class, "sub_configs", {}) or {}}
    aliases = getattr(config_class, "attribute_map", None) or {}
    values = {name: size for name, size in {**SIZES, **ids}.items() if name in present and name not in aliases}
    for name, sub_class in subs.items():
        if sub_class is not type(None):
            values[name] = shrunk_config(sub_class, changes.get(name, {}), ids).to_dict()
    return config_class(**values | {name: value for name, value in changes.items() if name not in subs})


def randomize(model: nn.Module, seed: int) -> None:
    """Move every weight far from its first value, so that a mistake in any of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            scale = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter += scale * torch.randn(parameter.shape, generator=generator)
        for name, values in sorted(model.named_buffers()):
            if name.endswith(("running_mean", "running_var")):  # of a batch norm
                noise = 0.3 * torch.randn(values.shape, generator=generator)
                values.copy_(noise.exp() if name.endswith("var") else noise)


def save_tokenizer(kind: str, padding_side: str, folder: Path) -> dict[str, Any]:
    """A tokenizer of this class trained on a few sentences; returns what a config must know of it."""
    trained = getattr(transformers, kind)().train_new_from_iterator(CORPUS, 320)
    state = json.loads(trained.backend_tokenizer.to_str())
    settle(state["model"], [token["content"] for token in state["added_tokens"]])
    trained._tokenizer = Tokenizer.from_str(json.dumps(state))
    trained.model_max_length, trained.padding_side = MAX_TOKENS, padding_side
    trained.save_pretrained(folder)
    ids = {f"{name}_token_id": getattr(trained, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    return {"vocab_size": len(trained)} | ids


def settle(model: dict[str, Any], specials: list[str]) -> None:
    """Give a trained tokenizer pieces that are the same in every run: training breaks ties in the order of hashes."""
    words = sorted({word for line in CORPUS for word in line.lower().split()})
    letters = sorted(set("".join(words)))
    if model["type"] == "WordPiece":
        pieces = [
            *specials,
            *letters,
            *(f"##{letter}" for letter in letters),
            *(word for word in words if len(word) > 1),
        ]
        model["vocab"] = {piece: index for index, piece in enumerate(pieces)}
    elif model["type"] == "Unigram":
        words_and_letters = [*([f"▁{word}", -5.0] for word in words), *([letter, -9.0] for letter in letters)]
        model["vocab"] = [*model["vocab"][: len(specials)], ["▁", -3.0], *words_and_letters]
    elif model.get("end_of_word_suffix"):
        end = model["end_of_word_suffix"]
        merges = {}  # letter by letter from the start of a word, which these tokenizers split at digits
        for word in sorted(set(re.findall("[a-z]+", " ".join(words)))):
            parts = [*word[:-1], word[-1] + end]
            for index in range(1, len(parts)):
                merges["".join(parts[:index]), parts[index]] = None
        model["merges"] = [list(pair) for pair in merges]
        alphabet = sorted(piece for piece in model["vocab"] if len(piece.removesuffix(end)) == 1)
        pieces = dict.fromkeys([*specials, *alphabet, *map("".join, merges)])
        model["vocab"] = {piece: index for index, piece in enumerate(pieces)}


def _shrunk_size(size: Any, edge: int) -> Any:
    return dict.fromkeys(size, edge) if isinstance(size, Mapping) else edge


def save_image_processor(model_type: str, changes: Mapping[str, Any], folder: Path) -> None:
    """The family's processor with images of the tiny model's size; its file alone where no class can be loaded."""
    if "image_processor_type" in changes or "video_processor_type" in changes:
        name = "preprocessor_config.json"
        if "video_processor_type" in changes:
            name = "video_preprocessor_config.json"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({**BY_HAND, **changes}))
        return
    kind = getattr(transformers, IMAGE_PROCESSOR_MAPPING_NAMES[changes.get("of", model_type)]["pil"])
    edge = changes.get("edge", IMAGE_SIZE)
    default = kind().to_dict()
    sizes = {name: _shrunk_size(default[name], edge) for name in ("size", "crop_size", "pad_size") if default.get(name)}
    more = {name: value for name, value in changes.items() if name not in ("of", "edge")}
    kind(**sizes | more).save_pretrained(folder)


BY_HAND = {
    "do_resize": True,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def save_feature_extractor(model_type: str, changes: Mapping[str, Any], folder: Path) -> None:
    """The family's extractor; its settings are few, and each family gives its own."""
    kind = changes.get("kind", FEATURE_EXTRACTOR_MAPPING_NAMES.get(model_type))
    settings = {name: value for name, value in changes.items() if name != "kind"}
    getattr(transformers, kind)(**settings).save_pretrained(folder)


def _entry(name: str, modalities: tuple[str, ...], settings: Mapping[str, Any]) -> Entry:
    """An entry from its line in the table of families; a model type is the name unless one is given."""
    own = ("saved_as", "tokenizer", "padding_side", "processor")
    options = {key: settings[key] for key in own if key in settings}
    config = {key: value for key, value in settings.items() if key not in {*own, "model_type"}}
    model_type = settings.get("model_type", name if name in CONFIG_MAPPING else name.replace("_", "-"))
    return Entry(name=name, modalities=modalities, model_type=model_type, config=config, **options)


def _entries(table: Mapping[tuple[str, ...], Families]) -> dict[str, Entry]:
    return {
        name: _entry(name, modalities, settings)
        for modalities, families in table.items()
        for name, settings in families.items()
    }


ENTRIES = _entries(FAMILIES)
MORE_ENTRIES = _entries(MORE)


def main(arguments: list[str] | None = None) -> None:
    """Write the checkpoints, all or those named, each to a folder of its name."""
    known = ENTRIES | MORE_ENTRIES
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the checkpoints")
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help="these instead of all")
    parser.add_argument("--more", action="store_true", help="the further families, too")
    options = parser.parse_args(arguments)
    for name in options.only or (known if options.more else ENTRIES):
        known[name].save(options.out / name)


if __name__ == "__main__":
    main()
