"""A zoo of tiny random checkpoints, one for each family that the installed transformers can load as an encoder.

Each checkpoint is a folder as a user would have it: weights, config, and the tokenizer, image processor or feature
extractor of the family. The library's default config is shrunk by a table of attribute names; a family adds only what
the table cannot know. Two image processors and all video processors exist for torchvision alone: their files are
written as on the hub, and no class can load them without it.

    python tests/zoo.py OUT [--only NAME ...] [--list]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

IMAGE_SIZE, PATCH_SIZE, NUM_LAYERS, MAX_TOKENS, SAMPLE_RATE = 32, 8, 3, 128, 16_000

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

    def save(self, folder: Path) -> None:
        """Write the checkpoint."""
        ids: dict[str, Any] = {}
        if "text" in self.modalities:
            kind = self.tokenizer or TOKENIZER_MAPPING_NAMES[self.model_type]
            ids = save_tokenizer(kind, self.padding_side, folder)
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
    trained.model_max_length, trained.padding_side = MAX_TOKENS, padding_side
    trained.save_pretrained(folder)
    ids = {f"{name}_token_id": getattr(trained, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    return {"vocab_size": len(trained)} | ids


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


def _entries(modalities: str, **families: dict[str, Any]) -> list[Entry]:
    """Entries named by their model type, which a family may set apart from its name."""
    found = []
    for name, more in families.items():
        options = {key: more[key] for key in ("saved_as", "tokenizer", "padding_side", "processor") if key in more}
        config = {key: value for key, value in more.items() if key not in {*options, "model_type"}}
        model_type = more.get("model_type", name if name in CONFIG_MAPPING else name.replace("_", "-"))
        kinds = tuple(modalities.split("+"))
        found.append(Entry(name=name, modalities=kinds, model_type=model_type, config=config, **options))
    return found


_STAGES = {"depths": [1, 2, 1], "hidden_sizes": [16, 24, 32]}
_SWIN = {"patch_size": 4, "embed_dim": 16, "depths": [2, 1, 1], "num_heads": [2, 2, 4], "window_size": 2}
_BLOCKS = {
    "kernel_sizes": [3, 3, 5],
    "in_channels": [32, 8, 16],
    "out_channels": [8, 16, 24],
    "strides": [1, 2, 2],
    "num_block_repeats": [1, 1, 1],
    "expand_ratios": [1, 6, 6],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 32,
}
_DINOV3 = {"image_processor_type": "DINOv3ViTImageProcessorFast"}

IMAGES = _entries(
    "image",
    vit={},
    deit={},
    beit={"use_relative_position_bias": True},
    data2vec_vision={"use_relative_position_bias": True, "out_indices": [1, 2]},
    dinov2={},
    dinov2_with_registers={"processor": {"of": "dinov2"}},
    dinov3_vit={"num_register_tokens": 4, "processor": _DINOV3},
    dinov3_convnext={**_STAGES, "depths": [1, 1, 2, 1], "hidden_sizes": [16, 16, 24, 32], "processor": _DINOV3},
    swin=_SWIN,
    swinv2=_SWIN,
    convnext={**_STAGES, "patch_size": 4, "num_stages": 3},
    convnextv2={**_STAGES, "patch_size": 4, "num_stages": 3},
    resnet={**_STAGES, "embedding_size": 12},
    regnet={**_STAGES, "embedding_size": 8, "groups_width": 8},
    bit={**_STAGES, "embedding_size": 8, "num_groups": 4},
    vit_mae={"saved_as": "ViTMAEForPreTraining"},
    vit_msn={},
    ijepa={},
    pixio={},
    pvt={
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 2],
        "sequence_reduction_ratios": [4, 2, 1, 1],
    },
    pvt_v2={
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 2],
        "sr_ratios": [4, 2, 1, 1],
    },
    levit={
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "processor": {"edge": 64},
    },
    mobilevit={
        "image_size": 64,
        "patch_size": 2,
        "hidden_sizes": [24, 32, 40],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 40],
        "processor": {"edge": 64},
    },
    efficientnet={**_BLOCKS, "hidden_dim": 1280},
    focalnet={
        "patch_size": 4,
        "embed_dim": 16,
        "hidden_sizes": [16, 32, 32],
        "depths": [1, 2, 1],
        "focal_levels": [2, 2, 2],
        "focal_windows": [3, 3, 3],
        "layerscale_value": 0.5,
    },
    hiera={
        "image_size": [IMAGE_SIZE, IMAGE_SIZE],
        "patch_size": [7, 7],
        "embed_dim": 16,
        "depths": [1, 2, 1],
        "num_heads": [1, 2, 4],
        "num_query_pool": 2,
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, True, False],
    },
    segformer={
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 2],
        "sr_ratios": [4, 2, 1, 1],
    },
    poolformer={"hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1], "patch_size": 4},
    yolos={"image_size": [IMAGE_SIZE, IMAGE_SIZE], "num_detection_tokens": 5},
    dpt={"is_hybrid": False},
    sam_vision_model={
        "window_size": 2,
        "global_attn_indexes": [1],
        "output_channels": 16,
        "num_pos_feats": 8,
        "processor": {"of": "sam"},
    },
    aimv2_vision_model={"processor": {"of": "clip"}},
    siglip_vision_model={"processor": {"of": "siglip"}},
)

_VISION_32 = {"vision_config": {"hidden_size": 32}}
PAIRS = _entries(
    "image+text",
    clip={"projection_dim": 20, "text_config": {"hidden_size": 24}},
    siglip={"tokenizer": "T5Tokenizer", "text_config": {"max_position_embeddings": 64}},
    siglip2={"model_type": "siglip", "tokenizer": "Siglip2Tokenizer", "text_config": {"max_position_embeddings": 64}},
    siglip2_naflex={
        "model_type": "siglip2",
        "text_config": {"max_position_embeddings": 64},
        "vision_config": {"num_patches": 16},
        "processor": {"patch_size": PATCH_SIZE, "max_num_patches": 16},
    },
    altclip={"tokenizer": "XLMRobertaTokenizer"},
    chinese_clip={},
    metaclip_2={"tokenizer": "XLMRobertaTokenizer", "processor": {"of": "clip"}},
    blip={"image_text_hidden_size": 20},
    align={"vision_config": _BLOCKS},
    groupvit={
        "projection_intermediate_dim": 32,
        "vision_config": {"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]},
    },
    aimv2={},
    flava={},
)

_GQA = {"num_key_value_heads": 1}
_T5 = {"feed_forward_proj": "gated-gelu"}
TEXTS = _entries(
    "text",
    bert={},
    roberta={},
    xlm_roberta={"model_type": "xlm-roberta"},
    distilbert={"dim": 32, "hidden_dim": 48, "n_layers": NUM_LAYERS, "n_heads": 2},
    albert={"embedding_size": 16},
    electra={"embedding_size": 16},
    mpnet={},
    deberta={"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    deberta_v2={
        "relative_attention": True,
        "position_buckets": 16,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
    },
    modernbert={"tokenizer": "GPTNeoXTokenizer", "saved_as": "ModernBertForMaskedLM"},
    nomic_bert={},
    eurobert={"tokenizer": "GPTNeoXTokenizer"},
    gte={},
    jina_embeddings_v3={},
    longformer={"attention_window": 8},
    big_bird={},
    funnel={"saved_as": "FunnelModel", "block_sizes": [1, 1, 1], "num_decoder_layers": 1},
    xlnet={},
    mobilebert={"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
    squeezebert={"q_groups": 2, "k_groups": 2, "v_groups": 2, "intermediate_groups": 2, "output_groups": 2},
    convbert={"tokenizer": "BertTokenizer"},
    nystromformer={"tokenizer": "AlbertTokenizer"},
    fnet={},
    roformer={"tokenizer": "BertTokenizer"},
    rembert={"tokenizer": "AlbertTokenizer", "input_embedding_size": 16, "output_embedding_size": 16},
    camembert={},
    ernie={},
    layoutlm={},
    megatron_bert={"tokenizer": "BertTokenizer"},
    esm={"tokenizer": "BertTokenizer", "position_embedding_type": "rotary"},
    t5={"saved_as": "T5ForConditionalGeneration"},
    t5_gated={"model_type": "t5", "saved_as": "T5EncoderModel", **_T5},
    mt5={"saved_as": "MT5EncoderModel", **_T5},
    umt5={"saved_as": "UMT5EncoderModel", "tokenizer": "T5Tokenizer", **_T5},
    bart={"saved_as": "BartForConditionalGeneration"},
    gpt2={"saved_as": "GPT2LMHeadModel", "n_positions": MAX_TOKENS},
    gpt_neo={"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 8},
    gpt_neox={"saved_as": "GPTNeoXForCausalLM"},
    gptj={"tokenizer": "GPT2Tokenizer", "rotary_dim": 8},
    opt={"saved_as": "OPTForCausalLM"},
    bloom={"tokenizer": "GPTNeoXTokenizer"},
    falcon={"tokenizer": "GPTNeoXTokenizer", "multi_query": True},
    llama={"tokenizer": "LlamaTokenizer", "saved_as": "LlamaForCausalLM"},
    mistral={"tokenizer": "LlamaTokenizer", **_GQA},
    mixtral={"tokenizer": "LlamaTokenizer", "num_local_experts": 3, **_GQA},
    qwen2=_GQA,
    qwen3={"saved_as": "Qwen3ForCausalLM", **_GQA},
    qwen3_left={"model_type": "qwen3", "padding_side": "left", **_GQA},
    gemma=_GQA,
    gemma2=_GQA,
    gemma3_text={"saved_as": "Gemma3ForCausalLM", "query_pre_attn_scalar": 16, **_GQA},
    embedding_gemma={
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 16,
        "use_bidirectional_attention": True,
        **_GQA,
    },
    phi={"tokenizer": "CodeGenTokenizer"},
    phi3={"tokenizer": "LlamaTokenizer"},
    smollm3={"tokenizer": "GPTNeoXTokenizer", "no_rope_layers": [1, 0, 1], **_GQA},
    olmo2={"tokenizer": "GPTNeoXTokenizer"},
    cohere={"tokenizer": "CohereTokenizer", **_GQA},
    stablelm={"tokenizer": "GPTNeoXTokenizer"},
    starcoder2={"tokenizer": "GPT2Tokenizer", **_GQA},
    granite={"tokenizer": "GPT2Tokenizer"},
    mamba={"state_size": 4},
)

_WAVE = {"processor": {}}
_MASKED = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
_MASK = {"processor": {"return_attention_mask": True}}
AUDIO = _entries(
    "audio",
    wav2vec2=_WAVE,
    wav2vec2_large={"model_type": "wav2vec2", "saved_as": "Wav2Vec2ForPreTraining", **_MASKED, **_MASK},
    wav2vec2_conformer={"model_type": "wav2vec2-conformer", **_MASK},
    wav2vec2_bert={
        "model_type": "wav2vec2-bert",
        "feature_projection_input_dim": 32,
        "conv_depthwise_kernel_size": 5,
        "processor": {"kind": "SeamlessM4TFeatureExtractor", "feature_size": 16, "num_mel_bins": 16},
    },
    hubert=_WAVE,
    hubert_large={"model_type": "hubert", **_MASKED, **_MASK},
    wavlm=_WAVE,
    data2vec_audio=_MASK,
    unispeech=_WAVE,
    unispeech_sat={"model_type": "unispeech-sat", **_MASK},
    sew={"conv_stride": [5, 2, 2, 2, 2, 2, 2], "conv_kernel": [10, 3, 3, 3, 3, 2, 2]},
    whisper={
        "max_source_positions": 50,
        "max_target_positions": 20,
        "vocab_size": 50,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
        "begin_suppress_tokens": None,
        "processor": {"feature_size": 16, "chunk_length": 1},
    },
    moonshine={"vocab_size": 50, **_MASK},
    ast={
        "model_type": "audio-spectrogram-transformer",
        "frequency_stride": 4,
        "time_stride": 6,
        "max_length": 32,
        "processor": {"num_mel_bins": 16, "max_length": 32},
    },
    parakeet_encoder={"subsampling_conv_channels": 8, "processor": {"feature_size": 16}},
)
AUDIO_PAIRS = _entries(
    "audio+text",
    clap={
        "tokenizer": "RobertaTokenizer",
        "audio_config": {
            "spec_size": 64,
            "window_size": 4,
            "patch_size": 4,
            "patch_embeds_hidden_size": 16,
            "hidden_size": 64,
            "depths": [2, 1, 1],
            "num_attention_heads": [2, 2, 4],
        },
        "processor": {"feature_size": 16, "max_length_s": 1, "truncation": "rand_trunc", "padding": "repeatpad"},
    },
)

_CLIP = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
VIDEOS = _entries(
    "video",
    videomae={"saved_as": "VideoMAEForPreTraining"},
    timesformer={},
    vivit={"tubelet_size": [2, 8, 8], "processor": {"image_processor_type": "VivitImageProcessor", **_CLIP}},
    vjepa2={
        "crop_size": IMAGE_SIZE,
        "frames_per_clip": 4,
        "processor": {"video_processor_type": "VJEPA2VideoProcessor", "do_center_crop": True, **_CLIP},
    },
)

ENTRIES = {entry.name: entry for entry in [*IMAGES, *PAIRS, *TEXTS, *AUDIO, *AUDIO_PAIRS, *VIDEOS]}


def main(arguments: list[str] | None = None) -> None:
    """Write the checkpoints, all or those named, each to a folder of its name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the checkpoints")
    parser.add_argument("--only", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="NAME")
    options = parser.parse_args(arguments)
    for name in options.only:
        ENTRIES[name].save(options.out / name)


if __name__ == "__main__":
    main()
