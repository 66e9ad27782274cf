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
    (r".*(attention|att|num|n|_)_?heads?|n_heads?|.*num_.*_heads|num_heads", 2),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|.*head_(dim|size)|.*dim_(key|head)|d_kv|kv_channels|d_head", 8),
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
SPECIAL: dict[str, dict[str, Any]] = {}
"""Settings by model type that the rules above do not find; dotted names are of an inner configuration."""


def tiny_configuration(model_type: str, **changes: Any) -> PretrainedConfig:
    """Return a configuration of two layers or so, 16 wide.

    Args:
        model_type: Key of transformers' ``CONFIG_MAPPING``.
        changes: Settings that differ from those of :data:`SPECIAL`.
    """
    default = CONFIG_MAPPING[model_type]()
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


DROPPED = object()
"""Value of a setting that is left to the class."""


def _small(name: str, value: Any) -> Any:
    if name in _FIXED:
        return _FIXED[name]
    if name.endswith(("_token_id", "_token_index")):
        return value if value is None or not isinstance(value, int) else PLACEHOLDER + sum(map(ord, name)) % 20
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, small in _COMPILED:
        if pattern.fullmatch(name):
            return small if value else value
    return value
