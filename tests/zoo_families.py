"""What each family of the zoo needs beyond the shrunk default config of its model type.

One entry for each checkpoint, by its name. `model_type` stands where it is not the name; `saved_as` is the class of
published checkpoints where it is not AutoModel's; `tokenizer` a class where transformers names none for the model
type; `processor` settings of the image processor or feature extractor. All else goes into the config.
"""

from __future__ import annotations

from typing import Any

IMAGE_SIZE, PATCH_SIZE, NUM_LAYERS, MAX_TOKENS = 32, 8, 3, 128

Families = dict[str, dict[str, Any]]

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

IMAGES: Families = {
    "vit": {},
    "deit": {},
    "beit": {"use_relative_position_bias": True},
    "data2vec_vision": {"use_relative_position_bias": True, "out_indices": [1, 2]},
    "dinov2": {},
    "dinov2_with_registers": {"processor": {"of": "dinov2"}},
    "dinov3_vit": {"num_register_tokens": 4, "processor": _DINOV3},
    "dinov3_convnext": {**_STAGES, "depths": [1, 1, 2, 1], "hidden_sizes": [16, 16, 24, 32], "processor": _DINOV3},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "convnext": {**_STAGES, "patch_size": 4, "num_stages": 3},
    "convnextv2": {**_STAGES, "patch_size": 4, "num_stages": 3},
    "resnet": {**_STAGES, "embedding_size": 12},
    "regnet": {**_STAGES, "embedding_size": 8, "groups_width": 8},
    "bit": {**_STAGES, "embedding_size": 8, "num_groups": 4},
    "vit_mae": {"saved_as": "ViTMAEForPreTraining"},
    "vit_msn": {},
    "ijepa": {},
    "pixio": {},
    "pvt": {
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 2],
        "sequence_reduction_ratios": [4, 2, 1, 1],
    },
    "pvt_v2": {
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 2],
        "sr_ratios": [4, 2, 1, 1],
    },
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "processor": {"edge": 64},
    },
    "mobilevit": {
        "image_size": 64,
        "patch_size": 2,
        "hidden_sizes": [24, 32, 40],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 40],
        "processor": {"edge": 64},
    },
    "efficientnet": {**_BLOCKS, "hidden_dim": 1280},
    "focalnet": {
        "patch_size": 4,
        "embed_dim": 16,
        "hidden_sizes": [16, 32, 32],
        "depths": [1, 2, 1],
        "focal_levels": [2, 2, 2],
        "focal_windows": [3, 3, 3],
        "layerscale_value": 0.5,
    },
    "hiera": {
        "image_size": [IMAGE_SIZE, IMAGE_SIZE],
        "patch_size": [7, 7],
        "embed_dim": 16,
        "depths": [1, 2, 1],
        "num_heads": [1, 2, 4],
        "num_query_pool": 2,
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, True, False],
    },
    "segformer": {
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 2],
        "sr_ratios": [4, 2, 1, 1],
    },
    "poolformer": {"hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1], "patch_size": 4},
    "yolos": {"image_size": [IMAGE_SIZE, IMAGE_SIZE], "num_detection_tokens": 5},
    "dpt": {"is_hybrid": False},
    "sam_vision_model": {
        "window_size": 2,
        "global_attn_indexes": [1],
        "output_channels": 16,
        "num_pos_feats": 8,
        "processor": {"of": "sam"},
    },
    "aimv2_vision_model": {"processor": {"of": "clip"}},
    "siglip_vision_model": {"processor": {"of": "siglip"}},
}

PAIRS: Families = {
    "clip": {"projection_dim": 20, "text_config": {"hidden_size": 24}},
    "siglip": {"tokenizer": "T5Tokenizer", "text_config": {"max_position_embeddings": 64}},
    "siglip2": {
        "model_type": "siglip",
        "tokenizer": "Siglip2Tokenizer",
        "text_config": {"max_position_embeddings": 64},
    },
    "siglip2_naflex": {
        "model_type": "siglip2",
        "text_config": {"max_position_embeddings": 64},
        "vision_config": {"num_patches": 16},
        "processor": {"patch_size": PATCH_SIZE, "max_num_patches": 16},
    },
    "altclip": {"tokenizer": "XLMRobertaTokenizer"},
    "chinese_clip": {},
    "metaclip_2": {"tokenizer": "XLMRobertaTokenizer", "processor": {"of": "clip"}},
    "blip": {"image_text_hidden_size": 20},
    "align": {"vision_config": _BLOCKS},
    "groupvit": {
        "projection_intermediate_dim": 32,
        "vision_config": {"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]},
    },
    "aimv2": {},
    "flava": {},
}

_GQA = {"num_key_value_heads": 1}
_T5 = {"feed_forward_proj": "gated-gelu"}
TEXTS: Families = {
    "bert": {},
    "roberta": {},
    "xlm_roberta": {"model_type": "xlm-roberta"},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": NUM_LAYERS, "n_heads": 2},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "mpnet": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta_v2": {
        "relative_attention": True,
        "position_buckets": 16,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
    },
    "modernbert": {"tokenizer": "GPTNeoXTokenizer", "saved_as": "ModernBertForMaskedLM"},
    "nomic_bert": {},
    "eurobert": {"tokenizer": "GPTNeoXTokenizer"},
    "gte": {},
    "jina_embeddings_v3": {},
    "longformer": {"attention_window": 8},
    "big_bird": {},
    "funnel": {"saved_as": "FunnelModel", "block_sizes": [1, 1, 1], "num_decoder_layers": 1},
    "xlnet": {},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
    "squeezebert": {"q_groups": 2, "k_groups": 2, "v_groups": 2, "intermediate_groups": 2, "output_groups": 2},
    "convbert": {"tokenizer": "BertTokenizer"},
    "nystromformer": {"tokenizer": "AlbertTokenizer"},
    "fnet": {},
    "roformer": {"tokenizer": "BertTokenizer"},
    "rembert": {"tokenizer": "AlbertTokenizer", "input_embedding_size": 16, "output_embedding_size": 16},
    "camembert": {},
    "ernie": {},
    "layoutlm": {},
    "megatron_bert": {"tokenizer": "BertTokenizer"},
    "esm": {"tokenizer": "BertTokenizer", "position_embedding_type": "rotary"},
    "t5": {"saved_as": "T5ForConditionalGeneration"},
    "t5_gated": {"model_type": "t5", "saved_as": "T5EncoderModel", **_T5},
    "mt5": {"saved_as": "MT5EncoderModel", **_T5},
    "umt5": {"saved_as": "UMT5EncoderModel", "tokenizer": "T5Tokenizer", **_T5},
    "bart": {"saved_as": "BartForConditionalGeneration"},
    "gpt2": {"saved_as": "GPT2LMHeadModel", "n_positions": MAX_TOKENS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 8},
    "gpt_neox": {"saved_as": "GPTNeoXForCausalLM"},
    "gptj": {"tokenizer": "GPT2Tokenizer", "rotary_dim": 8},
    "opt": {"saved_as": "OPTForCausalLM"},
    "bloom": {"tokenizer": "GPTNeoXTokenizer"},
    "falcon": {"tokenizer": "GPTNeoXTokenizer", "multi_query": True},
    "llama": {"tokenizer": "LlamaTokenizer", "saved_as": "LlamaForCausalLM"},
    "mistral": {"tokenizer": "LlamaTokenizer", **_GQA},
    "mixtral": {"tokenizer": "LlamaTokenizer", "num_local_experts": 3, **_GQA},
    "qwen2": _GQA,
    "qwen3": {"saved_as": "Qwen3ForCausalLM", **_GQA},
    "qwen3_left": {"model_type": "qwen3", "padding_side": "left", **_GQA},
    "gemma": _GQA,
    "gemma2": _GQA,
    "gemma3_text": {"saved_as": "Gemma3ForCausalLM", "query_pre_attn_scalar": 16, **_GQA},
    "embedding_gemma": {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 16,
        "use_bidirectional_attention": True,
        **_GQA,
    },
    "phi": {"tokenizer": "CodeGenTokenizer"},
    "phi3": {"tokenizer": "LlamaTokenizer"},
    "smollm3": {"tokenizer": "GPTNeoXTokenizer", "no_rope_layers": [1, 0, 1], **_GQA},
    "olmo2": {"tokenizer": "GPTNeoXTokenizer"},
    "cohere": {"tokenizer": "CohereTokenizer", **_GQA},
    "stablelm": {"tokenizer": "GPTNeoXTokenizer"},
    "starcoder2": {"tokenizer": "GPT2Tokenizer", **_GQA},
    "granite": {"tokenizer": "GPT2Tokenizer"},
    "mamba": {"state_size": 4},
}

_WAVE = {"processor": {}}
_MASKED = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
_MASK = {"processor": {"return_attention_mask": True}}
AUDIO: Families = {
    "wav2vec2": _WAVE,
    "wav2vec2_large": {"model_type": "wav2vec2", "saved_as": "Wav2Vec2ForPreTraining", **_MASKED, **_MASK},
    "wav2vec2_conformer": {"model_type": "wav2vec2-conformer", **_MASK},
    "wav2vec2_bert": {
        "model_type": "wav2vec2-bert",
        "feature_projection_input_dim": 32,
        "conv_depthwise_kernel_size": 5,
        "processor": {"kind": "SeamlessM4TFeatureExtractor", "feature_size": 16, "num_mel_bins": 16},
    },
    "hubert": _WAVE,
    "hubert_large": {"model_type": "hubert", **_MASKED, **_MASK},
    "wavlm": _WAVE,
    "data2vec_audio": _MASK,
    "unispeech": _WAVE,
    "unispeech_sat": {"model_type": "unispeech-sat", **_MASK},
    "sew": {"conv_stride": [5, 2, 2, 2, 2, 2, 2], "conv_kernel": [10, 3, 3, 3, 3, 2, 2]},
    "whisper": {
        "max_source_positions": 50,
        "max_target_positions": 20,
        "vocab_size": 50,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
        "begin_suppress_tokens": None,
        "processor": {"feature_size": 16, "chunk_length": 1},
    },
    "moonshine": {"vocab_size": 50, **_MASK},
    "ast": {
        "model_type": "audio-spectrogram-transformer",
        "frequency_stride": 4,
        "time_stride": 6,
        "max_length": 100,
        "processor": {"num_mel_bins": 16, "max_length": 100},
    },
    "parakeet_encoder": {"subsampling_conv_channels": 8, "processor": {"feature_size": 16}},
}
AUDIO_PAIRS: Families = {
    "clap": {
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
}

_CROP = {"do_center_crop": True, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 2 / 255, "offset": True}
VIDEOS: Families = {
    "videomae": {"saved_as": "VideoMAEForPreTraining"},
    "timesformer": {},
    "vivit": {
        "tubelet_size": [2, 8, 8],
        "processor": {"image_processor_type": "VivitImageProcessor", "size": {"shortest_edge": 36}, **_CROP, **_HALF},
    },
    "vjepa2": {
        "crop_size": IMAGE_SIZE,
        "frames_per_clip": 4,
        "processor": {"video_processor_type": "VJEPA2VideoProcessor", "size": {"shortest_edge": 36}, **_CROP},
    },
}

FAMILIES: dict[tuple[str, ...], Families] = {
    ("image",): IMAGES,
    ("image", "text"): PAIRS,
    ("text",): TEXTS,
    ("audio",): AUDIO,
    ("audio", "text"): AUDIO_PAIRS,
    ("video",): VIDEOS,
}
"""The families by what their checkpoints encode."""

_BPE, _UNIGRAM, _WORDS = {"tokenizer": "GPTNeoXTokenizer"}, {"tokenizer": "T5Tokenizer"}, {"tokenizer": "BertTokenizer"}
_THIN = {"depth_multiplier": 0.1, "min_depth": 8}
_SECOND = {
    "max_source_positions": 50,
    "processor": {"kind": "WhisperFeatureExtractor", "feature_size": 16, "chunk_length": 1},
}
MORE: dict[tuple[str, ...], Families] = {
    ("image",): {
        "clip_vision_model": {"processor": {"of": "clip"}},
        "siglip2_vision_model": {
            "num_patches": 16,
            "processor": {"of": "siglip2", "patch_size": PATCH_SIZE, "max_num_patches": 16},
        },
        "chinese_clip_vision_model": {"processor": {"of": "chinese_clip"}},
        "mlcd_vision_model": {"processor": {"of": "clip"}},
        "tipsv2_vision_model": {"processor": {"of": "vit"}},
        "internvl_vision": {"image_size": [32, 32], "patch_size": [8, 8], "processor": {"of": "vit"}},
        "idefics3_vision": {"processor": {"of": "siglip"}},
        "sapiens2": {"image_size": [32, 32], "processor": {"of": "vit"}},
        "mobilevitv2": {"image_size": 64, "patch_size": 2, "width_multiplier": 0.25, "processor": {"edge": 64}},
        "mobilenet_v1": _THIN,
        "mobilenet_v2": _THIN,
        "swiftformer": {"embed_dims": [16, 16, 24, 32], "depths": [1, 1, 1, 1], "processor": {"of": "vit"}},
    },
    ("image", "text"): {
        "clipseg": {"tokenizer": "CLIPTokenizer"},
        "owlvit": {"tokenizer": "CLIPTokenizer"},
        "owlv2": {"tokenizer": "CLIPTokenizer"},
        "tipsv2": {"tokenizer": "T5Tokenizer", "processor": {"of": "vit"}},
    },
    ("text",): {
        "clip_text_model": {"tokenizer": "CLIPTokenizer"},
        "bert_generation": {"model_type": "bert-generation", **_UNIGRAM},
        "data2vec_text": {"model_type": "data2vec-text", "tokenizer": "RobertaTokenizer"},
        "roberta_prelayernorm": {"model_type": "roberta-prelayernorm", "tokenizer": "RobertaTokenizer"},
        "xlm_roberta_xl": {"model_type": "xlm-roberta-xl", "tokenizer": "XLMRobertaTokenizer"},
        "xmod": {"tokenizer": "XLMRobertaTokenizer", "default_language": "en_XX"},
        "dpr": _WORDS,
        "esmc": _WORDS,
        "ibert": {"tokenizer": "RobertaTokenizer"},
        "mra": _UNIGRAM,
        "yoso": _UNIGRAM,
        "splinter": _WORDS,
        "ultrabert": _BPE,
        "modernbert_decoder": {"model_type": "modernbert-decoder", "tokenizer": "MPNetTokenizer"},
        "longt5": {"saved_as": "LongT5EncoderModel", **_UNIGRAM},
        "switch_transformers": {"saved_as": "SwitchTransformersEncoderModel", "num_experts": 2, **_UNIGRAM},
        "t5gemma": {"tokenizer": "GemmaTokenizer"},
        "mbart": {"tokenizer": "XLMRobertaTokenizer"},
        "m2m_100": _UNIGRAM,
        "pegasus": _UNIGRAM,
        "biogpt": _BPE,
        "codegen": {"tokenizer": "CodeGenTokenizer", "n_head": 4, "rotary_dim": 8},
        "cohere2": {"tokenizer": "CohereTokenizer", **_GQA},
        "ernie4_5": _BPE,
        "exaone4": _BPE,
        "falcon_mamba": {"state_size": 4, **_BPE},
        "gemma4_unified_text": {"tokenizer": "GemmaTokenizer"},
        "glm": _BPE,
        "gpt_bigcode": {"tokenizer": "GPT2Tokenizer", "n_positions": MAX_TOKENS},
        "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, **_BPE},
        "helium": _BPE,
        "hunyuan_v1_dense": _BPE,
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, **_BPE},
        "lfm2": _BPE,
        "ministral3": _BPE,
        "mpt": _BPE,
        "nanochat": _BPE,
        "nemotron": _BPE,
        "olmo": _BPE,
        "olmo3": _BPE,
        "persimmon": _BPE,
        "qwen3_5_text": {
            "tokenizer": "Qwen2Tokenizer",
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
            **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
        },
        "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **_GQA},
        "recurrent_gemma": {"tokenizer": "GemmaTokenizer", "lru_width": 32},
        "rwkv": {"attention_hidden_size": 32, "context_length": MAX_TOKENS, **_BPE},
        "seed_oss": _BPE,
        "xglm": {"tokenizer": "XLMRobertaTokenizer"},
    },
    ("audio",): {
        "lasr_encoder": {"processor": {"feature_size": 16}},
        "voxtral_encoder": _SECOND,
        "qwen2_audio_encoder": _SECOND,
        "speech_to_text": {
            "conv_channels": 16,
            "input_feat_per_channel": 16,
            "processor": {"feature_size": 16, "num_mel_bins": 16},
        },
    },
}
"""Families beyond those: not part of the table in the docs, tried by name or with --more."""
