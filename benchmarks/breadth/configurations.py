"""Tiny configurations of every model type, made from its default configuration by the names of its settings."""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

WIDTH = 16
VOCABULARY = 64
PADDING, END = 0, 31
PLACEHOLDER = 40
"""First of the token ids of images and sounds; the rows have smaller ones."""

# The first pattern that matches the whole name of a setting decides its value.
_SIZES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size(_per_layer_input)?|n_tokens|.*_num_embeddings|vocabulary_size", VOCABULARY),
    (r"num_(hidden_|decoder_|encoder_|dense_)?layers|n_layers?|(encoder|decoder)_layers|depth|layers", 2),
    (r"num_(decoder|encoder)_layers|num_blocks|.*_depth", 2),
    (r"(moe|expert|shared_expert|dense)_.*intermediate_size|expert_ffn_hidden_size|.*expert_dim", 8),
    (r"(num|n)_(routed_|local_)?experts|moe_num_experts|num_experts_.*group|n_experts", 4),
    (r"(num_)?experts_per_tok(en)?|num_experts_per_tok|moe_k|moe_top_?k|top_k|num_selected_experts|topk", 2),
    (r"n_shared_experts|num_shared_experts|n_group|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_nextn_predict_layers", 1),
    (r"(.*_)?num_(key_value|kv|query)_?(heads|groups)|num_kv_heads|.*_kv_heads|n_head_kv|multi_query_group_num", 2),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|.*head_(dim|size)|.*dim_(key|head)|d_kv|kv_channels|d_head", 8),
    (r".*(attention|att|num|n|_)_?heads?|n_heads?|.*num_.*_heads|num_heads", 2),
    (r".*lora_rank|.*_rank|time_mix_extra_dim|rank", 8),
    (r".*intermediate_size|.*ffn.*(dim|size)|d_inner|n_inner|inner_dim|d_ff|dff|dim_ff|hidden_dim|mlp_hidden_size", 24),
    (r".*(hidden_size|embedding_size|embed_dim|emb_dim|d_model|n_embd|width)|dim|model_dim|lru_width|d_embed", WIDTH),
    (r"n_positions|n_ctx|(.*_)?max_position.*|max_seq(uence)?_len(gth)?|seq_length|max_len|.*context_length", 128),
    (r".*window.*", 8),
    (r".*state_size|.*d_state|ssm_state_size", 8),
    (r".*groups", 1),
    (r"rotary_dim", 4),
    (r"image_size", 32),
    (r"patch_size", 16),
    (r".*chunk_size.*", 8),
]
_COMPILED = [(re.compile(pattern), value) for pattern, value in _SIZES]
_FIXED: dict[str, Any] = {
    "initializer_range": 0.3,
    "init_std": 0.3,
    "initializer_factor": 3.0,
    "pad_token_id": PADDING,
    "eos_token_id": END,
    "bos_token_id": 1,
    "decoder_start_token_id": 2,
    "torch_dtype": None,
    "dtype": None,
}
DROPPED = object()
"""Value of a setting that is left to the class."""

_MAMBA = {"mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_ssm": 32}
_SLIDING_LATENT = {
    "per_layer_config": DROPPED,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_HYBRID = {
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "num_hidden_layers": 4,
    "attention_hidden_size": 32,
    "attention_head_dim": 16,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "blt": {
        "encoder_config.hidden_size_global": WIDTH,
        "decoder_config.hidden_size_global": WIDTH,
        "encoder_hash_byte_group_vocab": VOCABULARY,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config.moe_top_k": 2},
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": DROPPED,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note": {
        **{f"text_config.{name}": size for name, size in _SLIDING_LATENT.items()},
        "vision_config.adapter_in_dim": WIDTH,
        "vision_config.adapter_out_dim": WIDTH,
        "audio_config.adapter_input_size": WIDTH,
        "audio_config.adapter_out_dim": WIDTH,
    },
    "dots3_note_text": _SLIDING_LATENT,
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": PADDING, "mask_token_id": 4},
    "falcon_h1": _MAMBA,
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config.num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 0},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 2, "shape_size": 4, "visual_embed": False},
    "lilt": {"hidden_size": 24, "channel_shrink_ratio": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 8},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "mistral4": {"rope_parameters": DROPPED, "head_dim": DROPPED, "qk_head_dim": DROPPED},
    "mobilebert": {"intra_bottleneck_size": WIDTH, "classifier_activation": False},
    "phi4_multimodal": {
        f"audio_config.{name}": WIDTH
        for name in ("nemo_conv_channels", "ext_pw_out_channel", "depthwise_separable_out_channel")
    },
    "perceiver": {"d_latents": WIDTH, "num_latents": 8, "num_self_attends_per_block": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [8, 8], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"]},
    "xlstm": {"embedding_dim": WIDTH},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": _HYBRID,
    "zamba2": _HYBRID | {"hybrid_layer_ids": DROPPED, "mamba_headdim": 16, "n_mamba_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
}
SPECIAL["qwen4_exp"] = {f"text_config.{name}": value for name, value in SPECIAL["qwen4_exp_text"].items()}
"""Settings by model type that the rules above do not find; dotted names are of an inner configuration."""


_REQUIRED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        }
    },
}
"""Settings without which the class makes no default configuration."""


def tiny_configuration(model_type: str, **changes: Any) -> PretrainedConfig:
    """Return a configuration of two layers or so, 16 wide.

    Args:
        model_type: Key of transformers' ``CONFIG_MAPPING``.
        changes: Settings that differ from those of :data:`SPECIAL`.
    """
    default = CONFIG_MAPPING[model_type](**_REQUIRED.get(model_type, {}))
    return _shrunk(default, {**SPECIAL.get(model_type, {}), **changes})


def _shrunk(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    values: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in _OF_THE_CLASS:
            continue
        if isinstance(value, PretrainedConfig):
            inner = {key.partition(".")[2]: each for key, each in changes.items() if key.startswith(f"{name}.")}
            values[name] = _shrunk(value, inner)
        else:
            values[name] = _small(name, value)
    values |= _few_layers(config, values)
    if config.is_encoder_decoder:
        values["decoder_start_token_id"] = 2
    values |= {name: value for name, value in changes.items() if "." not in name}
    return type(config)(**{name: value for name, value in values.items() if value is not DROPPED})


_OF_THE_CLASS = (
    "transformers_version",
    "architectures",
    "model_type",
    "attribute_map",
    "id2label",
    "label2id",
    "ignore_keys_at_rope_validation",
)


def _few_layers(config: PretrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Keep one layer of every kind, where lists have an entry for every layer."""
    count = getattr(config, "num_hidden_layers", None)
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == count}
    if not lists or not isinstance(count, int) or count < 3:
        return {}
    kinds: dict[Any, int] = {}
    for layer, kind in enumerate(zip(*lists.values(), strict=True)):
        kinds.setdefault(repr(kind), layer)
    kept = sorted(kinds.values())[:4]
    kept = kept if len(kept) > 1 else [0, 1]
    return {name: [_small(name, value[layer]) for layer in kept] for name, value in lists.items()} | {
        "num_hidden_layers": len(kept)
    }


def _small(name: str, value: Any) -> Any:
    if name in _FIXED:
        return _FIXED[name]
    if name.endswith(("_token_id", "_token_index")):
        return value if value is None or not isinstance(value, int) else PLACEHOLDER + sum(map(ord, name)) % 20
    if value is None:
        return {"head_dim": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2}.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, small in _COMPILED:
        if pattern.fullmatch(name):
            return small if value else value
    return value
