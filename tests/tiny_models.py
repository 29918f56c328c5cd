"""Tiny checkpoints of every supported family: random weights large enough that a wrong one shows.

Each builder writes a folder as a user would have it: weights, config, and a real tokenizer, image processor or
feature extractor. Three layers, 32 wide, 4 heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from saffe_cache.encoders.encoder import FrozenEncoder, load_encoder
from saffe_cache.encoders.loading import EncoderRequest

NUM_LAYERS = 3
SHAPE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": NUM_LAYERS,
    "intermediate_size": 48,
    "layer_norm_eps": 0.01,  # large enough to be missed
}
WORDS = [f"word{i}" for i in range(40)]
TEXTS = [
    "word1 word2 word3",
    " ".join(WORDS[i * 7 % 40] for i in range(60)),
    "word9",
    " ".join(WORDS[i * 11 % 40] for i in range(21)),
]
"""Lengths on both sides of 16 tokens, from where MPNet's buckets of positions are shared."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family: how to build a tiny model of it, and what the tests must know of it by themselves."""

    modality: str
    build: Callable[[], Any]
    reference: str
    """Class in transformers that runs the model whole."""
    save_processor: Callable[[Path], None]
    layer: str
    """Class name of its layers."""
    layers: str
    """Path of the list of layers below the reference."""
    core: str = ""
    """Path of the encoder below the reference."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """To load the reference with."""
    is_convolutional: bool = False
    """Its layers are stages, of 16, 24 and 32 channels."""


def randomize(model: nn.Module, seed: int) -> None:
    """Weights that matter: attention far from uniform, norms and layer scales far from 1, biases far from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "relative_attention_bias" in name:
                parameter.copy_(2 * noise)
            elif parameter.ndim >= 2:
                embeds = any(part in name for part in ("embed", "token", "wte", "wpe")) and "patch" not in name
                parameter.copy_(noise * (0.5 if embeds else 1.2 * parameter[0].numel() ** -0.5))
            elif parameter.ndim == 1:
                centre = (
                    1.0
                    if name.endswith(("norm.weight", "Norm.weight", "lambda1")) or ".norm" in name or "ln_" in name
                    else 0.0
                )
                parameter.copy_((centre if not name.endswith("bias") else 0.0) + 0.3 * noise)
        for name, values in sorted(model.named_buffers()):
            if name.endswith(("running_mean", "running_var")):  # of a batch norm
                noise = 0.3 * torch.randn(values.shape, generator=generator)
                values.copy_(noise.exp() if name.endswith("var") else noise)


def _tokenizer(folder: Path, specials: list[str], begin: str, end: str, pad: str, *, specials_last: bool) -> None:
    names = WORDS + specials if specials_last else specials + WORDS
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[-1] if not specials_last else specials[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(begin, vocabulary[begin]), (end, vocabulary[end])]
    backend.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}", special_tokens=ends)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=end, bos_token=begin, unk_token=backend.model.unk_token
    )
    tokenizer.save_pretrained(folder)


def bert_tokenizer(folder: Path) -> None:
    _tokenizer(folder, ["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[CLS]", "[SEP]", "[PAD]", specials_last=False)


def _roberta_tokenizer(folder: Path) -> None:
    """Padding is token 1, from which these families count their positions."""
    _tokenizer(folder, ["<s>", "<pad>", "</s>", "<unk>"], "<s>", "</s>", "<pad>", specials_last=False)


def _clip_tokenizer(folder: Path) -> None:
    """End of text is the highest id, and pads."""
    _tokenizer(folder, ["<unk>", "<|start|>", "<|end|>"], "<|start|>", "<|end|>", "<|end|>", specials_last=True)


def gpt2_tokenizer(folder: Path) -> None:
    """One token begins and ends, as GPT-2's does."""
    vocabulary = {name: i for i, name in enumerate([*WORDS, "<unk>", "<|endoftext|>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = "<|endoftext|>"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, bos_token=end, unk_token="<unk>"
    ).save_pretrained(folder)


NORMALIZED = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def image_processor(kind: str, size: dict[str, int], crop: int | None = None) -> Callable[[Path], None]:
    """Writes preprocessor_config.json."""
    settings: dict[str, Any] = {"image_processor_type": kind, "do_resize": True, "size": size, "resample": 3}
    settings |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True, **NORMALIZED}
    if crop:
        settings |= {"do_center_crop": True, "crop_size": {"height": crop, "width": crop}}

    def save(folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))

    return save


def _whisper_extractor(folder: Path) -> None:
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)


def _ast_extractor(folder: Path) -> None:
    transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=32).save_pretrained(folder)


def _text_model(kind: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=len(WORDS) + 4, max_position_embeddings=202, **SHAPE, **options
        )
        return getattr(transformers, f"{kind}Model")(config, add_pooling_layer=False)

    return build


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=len(WORDS) + 2,
        n_positions=202,
        n_embd=32,
        n_head=4,
        n_layer=NUM_LAYERS,
        n_inner=48,
        layer_norm_epsilon=0.01,
        bos_token_id=len(WORDS) + 1,
        eos_token_id=len(WORDS) + 1,
    )
    return transformers.GPT2LMHeadModel(config)


def _clip() -> Any:
    vision = {**SHAPE, "image_size": 32, "patch_size": 8, "projection_dim": 20}
    text = {**SHAPE, "hidden_size": 24, "vocab_size": 43, "max_position_embeddings": 77, "projection_dim": 20}
    text |= {"eos_token_id": 42, "bos_token_id": 41, "pad_token_id": 42}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=20)
    return transformers.CLIPModel(config)


def _image_model(kind: str, *, model: Mapping[str, Any] | None = None, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(transformers, f"{kind}Config")(**SHAPE, image_size=32, patch_size=8, **options)
        return getattr(transformers, f"{kind}Model")(config, **(model or {}))

    return build


STAGES = {"hidden_sizes": [16, 24, 32], "depths": [1, 2, 1]}
"""The tiny models of 3 stages: 8 x 8, 4 x 4 and 2 x 2 places of 32 pixels a side."""


def _resnet() -> Any:
    return transformers.ResNetModel(transformers.ResNetConfig(**STAGES, embedding_size=12))


def _convnext() -> Any:
    config = transformers.ConvNextConfig(**STAGES, num_stages=3, layer_scale_init_value=1.0, layer_norm_eps=0.01)
    return transformers.ConvNextModel(config)


def _whisper() -> Any:
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _WHISPER_SIDE.items()}
    config = transformers.WhisperConfig(
        d_model=32, num_mel_bins=16, max_source_positions=50, vocab_size=50, pad_token_id=0, **sizes
    )
    return transformers.WhisperModel(config)


_WHISPER_SIDE = {"layers": NUM_LAYERS, "attention_heads": 4, "ffn_dim": 48}


def _ast() -> Any:
    config = transformers.ASTConfig(
        **SHAPE, patch_size=8, frequency_stride=4, time_stride=6, max_length=32, num_mel_bins=16
    )
    return transformers.ASTModel(config)


def _clip_processors(folder: Path) -> None:
    _clip_tokenizer(folder)
    image_processor("CLIPImageProcessor", {"shortest_edge": 36}, 32)(folder)


_SQUARE = image_processor("ViTImageProcessor", {"height": 32, "width": 32})
_CROPPED = image_processor("BitImageProcessor", {"shortest_edge": 36}, 32)
_CONVNEXT = image_processor("ConvNextImageProcessor", {"shortest_edge": 32})
"""The one of ResNets, too: it resizes to 8 / 7 of the size, and crops."""


def _image_case(kind: str, save_processor: Callable[[Path], None], layers: str, **more: Any) -> Case:
    names = {"reference": f"{kind}Model", "layer": f"{kind}Layer", "layers": layers}
    return Case(modality="image", save_processor=save_processor, **names, **more)


CASES = {
    "vit": _image_case("ViT", _SQUARE, "layers", build=_image_model("ViT", model={"add_pooling_layer": False})),
    "vit-mae": _image_case("ViTMAE", _SQUARE, "layers", build=_image_model("ViTMAE"), options={"mask_ratio": 0.0}),
    "dinov2": _image_case("Dinov2", _CROPPED, "encoder.layer", build=_image_model("Dinov2", mlp_ratio=2)),
    "dinov2-swiglu": _image_case(
        "Dinov2", _CROPPED, "encoder.layer", build=_image_model("Dinov2", mlp_ratio=2, use_swiglu_ffn=True)
    ),
    **{
        name: Case(
            modality="image",
            build=build,
            reference=f"{kind}Model",
            save_processor=_CONVNEXT,
            layer=f"{kind}Stage",
            layers="encoder.stages",
            is_convolutional=True,
        )
        for name, kind, build in [("resnet", "ResNet", _resnet), ("convnext", "ConvNext", _convnext)]
    },
    "clip-vision": Case(
        modality="image",
        build=_clip,
        reference="CLIPModel",
        save_processor=_clip_processors,
        layer="CLIPEncoderLayer",
        layers="vision_model.encoder.layers",
        core="vision_model",
    ),
    "clip-text": Case(
        modality="text",
        build=_clip,
        reference="CLIPModel",
        save_processor=_clip_processors,
        layer="CLIPEncoderLayer",
        layers="text_model.encoder.layers",
        core="text_model",
    ),
    **{
        name: Case(
            modality="text",
            build=_text_model(kind),
            reference=f"{kind}Model",
            save_processor=save_processor,
            layer=f"{kind}Layer",
            layers="encoder.layer",
        )
        for name, kind, save_processor in [
            ("bert", "Bert", bert_tokenizer),
            ("roberta", "Roberta", _roberta_tokenizer),
            ("xlm-roberta", "XLMRoberta", _roberta_tokenizer),
            ("mpnet", "MPNet", _roberta_tokenizer),
        ]
    },
    "gpt2": Case(
        modality="text",
        build=_gpt2,
        reference="GPT2Model",
        save_processor=gpt2_tokenizer,
        layer="GPT2Block",
        layers="h",
    ),
    "whisper": Case(
        modality="audio",
        build=_whisper,
        reference="WhisperModel",
        save_processor=_whisper_extractor,
        layer="WhisperEncoderLayer",
        layers="encoder.layers",
        core="encoder",
    ),
    "ast": Case(
        modality="audio",
        build=_ast,
        reference="ASTModel",
        save_processor=_ast_extractor,
        layer="ASTLayer",
        layers="layers",
    ),
}
TEXT_FAMILIES = [name for name, case in CASES.items() if case.modality == "text"]
BLOCK_FAMILIES = [name for name, case in CASES.items() if not case.is_convolutional]


def save_tiny(name: str, folder: Path) -> Path:
    """Build a family's model with weights of their own, and save it with its processor."""
    case = CASES[name]
    model = case.build()
    randomize(model, seed=sum(name.encode()))
    model.save_pretrained(folder)
    case.save_processor(folder)
    return folder


def raw_inputs(name: str) -> list[np.ndarray]:
    """Two pictures or sounds."""
    generator = np.random.default_rng(3)
    if CASES[name].modality == "image":
        return [generator.integers(0, 256, (45, 60, 3), dtype=np.uint8) for _ in range(2)]
    return [generator.normal(0, 0.2, size).astype(np.float32) for size in (6_000, 16_000)]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, the same for a seed whatever was drawn before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_rounded(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for float32: at most 16 times its eps apart, of the largest number.

    Three layers of sums in another order were up to 9 times apart, on processors with and without wide registers.
    """
    atol = 16 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def load_tiny(name: str, folder: Path, **request: Any) -> FrozenEncoder:
    """The encoder under test, with all layers selected unless asked otherwise."""
    asked = {"modality": CASES[name].modality, "model_id": str(folder), "layers": range(NUM_LAYERS + 1), **request}
    return load_encoder(EncoderRequest(**asked))


def inputs_of(name: str, encoder: FrozenEncoder, texts: Sequence[str] = TEXTS) -> dict[str, torch.Tensor]:
    """A batch for the encoder; texts of it are padded."""
    if CASES[name].modality == "text":
        return encoder.pad(encoder.tokenize(texts))
    prepared = [encoder.prepare(raw) for raw in raw_inputs(name)]
    return {key: torch.cat([one[key] for one in prepared]) for key in prepared[0]}


def load_reference(name: str, folder: Path) -> Any:
    """The whole model as transformers has it, with its plainest attention."""
    case = CASES[name]
    model_class = getattr(transformers, case.reference)
    return model_class.from_pretrained(folder, attn_implementation="eager", **case.options).eval()


@torch.no_grad()
def run_reference(name: str, model: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Its output with hidden states. ViT-MAE sorts its patches by `noise`, here into the order they have."""
    core = model.get_submodule(CASES[name].core)
    more: dict[str, Any] = {}
    if name == "vit-mae":
        batch, _, height, width = inputs["pixel_values"].shape
        more["noise"] = torch.linspace(0, 1, height * width // 64).repeat(batch, 1)
    if name in ("vit", "vit-mae", "clip-vision"):
        more["interpolate_pos_encoding"] = True
    return core(**inputs, **more, output_hidden_states=True)
