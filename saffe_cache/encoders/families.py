"""Where each model family keeps its layers, its blocks' weights and its vector, with one entry per family.

Names are those of transformers 5. A test rebuilds a block of every family from these weights and compares its output
with the model's own next hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from saffe_cache.core.features import Layout, Modality

Pool = Callable[[Any, torch.Tensor | None], torch.Tensor]
"""(model output, mask of real tokens) -> [batch, d]."""


def _block(attention: str, norms: str, mlp: str) -> Mapping[str, str]:
    """Paths of a block's weights by role, from those of queries, keys, values and output, of both norms, and of the
    MLP's two layers."""
    roles = ("query", "key", "value", "output", "attention_norm", "mlp_norm", "mlp_in", "mlp_out")
    return dict(zip(roles, f"{attention} {norms} {mlp}".split(), strict=True))


_VIT_ATTENTION = "attention.q_proj attention.k_proj attention.v_proj attention.o_proj"
_CLIP_ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj"
_VIT_BLOCK = _block(_VIT_ATTENTION, "layernorm_before layernorm_after", "mlp.fc1 mlp.fc2")
_LAYER_SCALES = {"attention_layer_scale": "layer_scale1.lambda1", "mlp_layer_scale": "layer_scale2.lambda1"}
_DINOV2_BLOCK = {**_block(_VIT_ATTENTION, "norm1 norm2", "mlp.fc1 mlp.fc2"), **_LAYER_SCALES}
DINOV2_SWIGLU_BLOCK = {
    **_block(_VIT_ATTENTION, "norm1 norm2", "mlp.up_proj mlp.down_proj"),
    "mlp_gate": "mlp.gate_proj",
    **_LAYER_SCALES,
}
_CLIP_BLOCK = _block(_CLIP_ATTENTION, "layer_norm1 layer_norm2", "mlp.fc1 mlp.fc2")
_WHISPER_BLOCK = _block(_CLIP_ATTENTION, "self_attn_layer_norm final_layer_norm", "fc1 fc2")
_BERT_BLOCK = _block(
    "attention.self.query attention.self.key attention.self.value attention.output.dense",
    "attention.output.LayerNorm output.LayerNorm",
    "intermediate.dense output.dense",
)
_MPNET_BLOCK = _block(
    "attention.attn.q attention.attn.k attention.attn.v attention.attn.o",
    "attention.LayerNorm output.LayerNorm",
    "intermediate.dense output.dense",
)
_GPT2_BLOCK = {
    "query_key_value": "attn.c_attn",
    "output": "attn.c_proj",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "mlp_in": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
}


def first_token(output: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """The class token after the final norm."""
    tokens: torch.Tensor = output.last_hidden_state
    return tokens[:, 0]


def model_pooler(output: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """The model's own pooled output, if it was trained with it: CLIP, AST, ResNet."""
    pooled: torch.Tensor = output.pooler_output
    return pooled.flatten(1)  # a ResNet's still has height 1 and width 1


def masked_mean(output: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over real tokens, as sentence-transformers pools by default."""
    tokens: torch.Tensor = output.last_hidden_state
    if mask is None:
        return tokens.mean(dim=1)
    weights = mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _any_size(config: Any) -> tuple[int | None, ...]:
    """Channels, height and width of the pictures of a model that takes any size."""
    return config.num_channels, None, None


def _square(config: Any) -> tuple[int | None, ...]:
    """Channels, height and width of the pictures that a model has positions for."""
    size = config.image_size
    return config.num_channels, *((size, size) if isinstance(size, int) else size)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family of models keeps its parts."""

    @property
    def generates(self) -> bool:
        """Whether it is kept as a causal language model."""
        return self.is_language_model or bool(self.language_model)

    modality: Modality
    model_class: str
    """Class in transformers; loads one tower from a checkpoint of the whole model."""
    load_options: Mapping[str, Any]
    """For from_pretrained: without a pooler, which many checkpoints lack and transformers would initialise at random;
    without masking."""
    layers: str
    """Path of the list of layers below the loaded model."""
    core: str
    """Path of the model or method that returns last_hidden_state; empty if it is the loaded model."""
    block: Mapping[str, str]
    """Paths of a block's weights by their role; empty if there are no queries, keys and values."""
    pool: Pool
    pooling: str
    """Name of the pooling, for the fingerprint."""
    norm_first: bool
    input_shape: Callable[[Any], tuple[int | None, ...]] = _any_size
    """Config -> shape of one prepared photo or sound; None where any size will do."""
    projection: str | None = None
    """Linear layer from the pooled vector into a space shared by two towers."""
    is_causal: bool = False
    is_convolutional: bool = False
    """Its layers are stages with outputs [batch, channels, height, width] of different shapes; it has no blocks."""
    interpolates: bool = False
    """Accepts `interpolate_pos_encoding` for picture sizes other than its own."""
    shuffles: bool = False
    """Sorts its patches by the input `noise`, which is random unless given; ascending noise keeps their order."""
    is_transposed: bool = False
    """Linear weights of a block are (in, out), as in GPT-2."""
    language_model: Mapping[str, str] = field(default_factory=dict)
    """Paths of a causal language model's embeddings, final norm and output layer."""
    is_language_model: bool = False
    """Whether a discovered model is kept as a causal language model."""
    expects: Mapping[str, Any] = field(default_factory=dict)
    """Settings of a model's config that the rebuilt block assumes."""
    tower: str = ""
    """Path of the model that owns the layers, if it was discovered; empty if it is the loaded model."""
    layer_lists: tuple[str, ...] = ()
    """Paths of lists that may be the layers, if it was discovered, the likeliest first."""
    is_discovered: bool = False
    """Whether there is no entry for the family: all was found out from the model."""
    is_own: bool = False
    """Whether it is the user's own module, which no library rebuilds."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What a forward pass does, as far as it must be known."""

    calls: tuple[int, ...]
    """Which layer of the list each step calls; ALBERT calls one layer several times."""
    widths: tuple[int, ...]
    """Width of `hidden_states[i]`: one more than steps."""
    vectors: dict[str, int]
    """Width of each of the encoder's vectors."""
    layouts: tuple[Layout, ...]
    """Axes of each of them in the model."""
    num_outputs: int = 0
    """Results of a layer that returns a tuple; 0 if it returns hidden states alone."""
    class_tokens: int = 1
    """Tokens before those of places: class tokens and registers."""
    has_feature_maps: bool = False
    """Whether tokens are places whose number or width changes with the layer."""


_VIT = Family(
    modality="image",
    model_class="ViTModel",
    load_options={"add_pooling_layer": False},
    layers="layers",
    core="",
    block=_VIT_BLOCK,
    pool=first_token,
    pooling="class token behind the final norm",
    norm_first=True,
    input_shape=_square,
    interpolates=True,
)
_BERT = Family(
    modality="text",
    model_class="BertModel",
    load_options={"add_pooling_layer": False},
    layers="encoder.layer",
    core="",
    block=_BERT_BLOCK,
    pool=masked_mean,
    pooling="mean of tokens",
    norm_first=False,
)


_CLIP_VISION = Family(
    modality="image",
    model_class="CLIPVisionModelWithProjection",
    load_options={},
    layers="vision_model.encoder.layers",
    core="vision_model",
    block=_CLIP_BLOCK,
    pool=model_pooler,
    pooling="class token behind the final norm",
    norm_first=True,
    input_shape=_square,
    projection="visual_projection",
    interpolates=True,
)
_RESNET = Family(
    modality="image",
    model_class="ResNetModel",
    load_options={},
    layers="encoder.stages",
    core="",
    block={},
    pool=model_pooler,
    pooling="mean of the last stage's places",
    norm_first=False,
    is_convolutional=True,
)
FAMILIES: Mapping[tuple[str, Modality], Family] = {
    ("vit", "image"): _VIT,
    ("vit_mae", "image"): replace(_VIT, model_class="ViTMAEModel", load_options={"mask_ratio": 0.0}, shuffles=True),
    ("dinov2", "image"): replace(
        _VIT,
        model_class="Dinov2Model",
        load_options={},
        layers="encoder.layer",
        block=_DINOV2_BLOCK,
        input_shape=_any_size,
        interpolates=False,
    ),
    ("resnet", "image"): _RESNET,
    ("convnext", "image"): replace(
        _RESNET, model_class="ConvNextModel", pooling="mean of the last stage's places behind the final norm"
    ),
    ("clip", "image"): _CLIP_VISION,
    ("clip_vision_model", "image"): _CLIP_VISION,
    **{
        (model_type, "text"): replace(
            _CLIP_VISION,
            modality="text",
            model_class="CLIPTextModelWithProjection",
            layers="text_model.encoder.layers",
            core="text_model",
            pooling="end-of-text token behind the final norm",
            projection="text_projection",
            is_causal=True,
            interpolates=False,
        )
        for model_type in ("clip", "clip_text_model")
    },
    ("bert", "text"): _BERT,
    ("roberta", "text"): replace(_BERT, model_class="RobertaModel"),
    ("xlm-roberta", "text"): replace(_BERT, model_class="XLMRobertaModel"),
    ("mpnet", "text"): replace(_BERT, model_class="MPNetModel", block=_MPNET_BLOCK),
    ("gpt2", "text"): Family(
        modality="text",
        model_class="GPT2LMHeadModel",
        load_options={},
        layers="transformer.h",
        core="transformer",
        block=_GPT2_BLOCK,
        pool=masked_mean,
        pooling="mean of tokens behind the final norm",
        norm_first=True,
        is_causal=True,
        is_transposed=True,
        language_model={
            "token_embedding": "transformer.wte",
            "position_embedding": "transformer.wpe",
            "final_norm": "transformer.ln_f",
            "head": "lm_head",
        },
        expects={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ),
    ("whisper", "audio"): Family(
        modality="audio",
        model_class="WhisperModel",
        load_options={},
        layers="encoder.layers",
        core="encoder",
        block=_WHISPER_BLOCK,
        pool=masked_mean,
        pooling="mean of frames behind the final norm",
        norm_first=True,
        input_shape=lambda config: (config.num_mel_bins, 2 * config.max_source_positions),
    ),
    ("audio-spectrogram-transformer", "audio"): replace(
        _VIT,
        modality="audio",
        model_class="ASTModel",
        load_options={},
        pool=model_pooler,
        pooling="mean of the class and distillation tokens behind the final norm",
        input_shape=lambda config: (config.max_length, config.num_mel_bins),
        interpolates=False,
    ),
}


def input_embeddings(model: Any) -> Any:
    """The table of a text model's tokens: what the model says, or its largest one."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return max(
            (one for one in model.modules() if isinstance(one, nn.Embedding)), key=lambda one: one.num_embeddings
        )


def first_position(model: Any) -> int | None:
    """Position of a text's first token in models that count positions from their padding token (RoBERTa), else None."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            return int(part.padding_idx) + 1
    return None
