"""The cases: every model type of the auto classes, and every option of ``LoraConfig``."""

from __future__ import annotations

from typing import Any, get_args

from peft import PeftType
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from benchmarks.breadth.check import Case
from lapora.models.adapter import ModelKind

MAPPINGS: dict[ModelKind, dict[str, str]] = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classifier": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def model_cases() -> list[Case]:
    """Return every model type with LoRA on queries and values, and on all linear layers."""
    return [
        Case(kind, name, targets, name, kind)
        for kind in get_args(ModelKind)
        for name in sorted(MAPPINGS[kind])
        for targets in ("attention", "all-linear")
    ]


def option_cases() -> list[Case]:
    """Return every option of ``LoraConfig``, one at a time, on Llama unless it is of another kind of layer."""
    targets = {"target_modules": ["q_proj", "v_proj"]}

    def case(name: str, base: str = "llama", kind: ModelKind = "causal", **other: Any) -> Case:
        lora = {**(targets if base == "llama" else {}), **other.pop("lora", {})}
        return Case("lora", name, "", base, kind, lora=lora, **other)

    initializations = [
        "true", "gaussian", "olora", "orthogonal", "pissa", "pissa_niter_4", "mica", "eva", "lora_ga",
    ]  # fmt: skip
    return [
        *(
            case(f"init_lora_weights: {name}", lora={"init_lora_weights": True if name == "true" else name})
            for name in initializations
        ),
        case("init_lora_weights: corda", edits={"init_lora_weights": "corda"}),
        case(
            "init_lora_weights: loftq",
            edits={"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
        ),
        case("rank 1", lora={"r": 1}),
        case("use_rslora", lora={"use_rslora": True}),
        case("use_dora", lora={"use_dora": True}),
        case("use_dora (Conv1D)", "gpt2", lora={"use_dora": True}),
        case("fan_in_fan_out (Conv1D)", "gpt2", lora={"fan_in_fan_out": True}),
        case("lora_dropout", lora={"lora_dropout": 0.3}),
        case("bias: all", "bert", "classifier", lora={"bias": "all"}),
        case("bias: lora_only", "bert", "classifier", lora={"bias": "lora_only"}),
        case("lora_bias", config={"attention_bias": True}, lora={"lora_bias": True}),
        case("rank_pattern, alpha_pattern", lora={"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 1}}),
        case("layers_to_transform", lora={"layers_to_transform": [1]}),
        case("layers_pattern", lora={"layers_to_transform": [0], "layers_pattern": "layers"}),
        case("layer_replication", lora={"layer_replication": [[0, 2], [0, 2]]}),
        case("exclude_modules", lora={"exclude_modules": r".*\.0\..*"}),
        case("target_modules: expression", lora={"target_modules": r".*\.1\..*_proj"}),
        case("target_modules: lm_head", lora={"target_modules": ["q_proj", "lm_head"]}),
        case(
            "target_modules: lm_head, tied", lora={"target_modules": ["lm_head"]}, config={"tie_word_embeddings": True}
        ),
        case("target_modules: embed_tokens", lora={"target_modules": ["q_proj", "embed_tokens"]}),
        case("target_modules: embed_tokens alone", lora={"target_modules": ["embed_tokens"]}),
        case(
            "target_modules: convolution",
            "convbert",
            "classifier",
            lora={"target_modules": ["conv_out_layer", "query"]},
        ),
        case("target_modules: classifier", "bert", "classifier", lora={"target_modules": ["query", "dense"]}),
        case(
            "ensure_weight_tying",
            lora={"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
            config={"tie_word_embeddings": True},
        ),
        case("modules_to_save: lm_head", lora={"modules_to_save": ["lm_head"]}),
        case("modules_to_save: embed_tokens", lora={"modules_to_save": ["embed_tokens"]}),
        case("modules_to_save: norm", lora={"modules_to_save": ["norm"]}),
        case("modules_to_save: a block's layer", lora={"modules_to_save": ["o_proj"]}),
        case("save_embedding_layers", saving={"save_embedding_layers": True}),
        case("trainable_token_indices", lora={"trainable_token_indices": [3, 4]}),
        case("trainable_token_indices, by layer", lora={"trainable_token_indices": {"embed_tokens": [3, 4]}}),
        case(
            "target_parameters",
            "qwen2_moe",
            lora={"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        ),
        case(
            "target_parameters alone",
            "qwen2_moe",
            lora={"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
        ),
        case("task_type: null", edits={"task_type": None}),
        case("task_type: TOKEN_CLS", edits={"task_type": "TOKEN_CLS"}),
        case("velora_config", lora={"velora_config": VeloraConfig(num_groups=4)}),
        case("monteclora_config", lora={"monteclora_config": MontecloraConfig()}),
        case("kasa_config", lora={"kasa_config": KasaConfig()}),
        case("arrow_config", edits={"arrow_config": {"top_k": 2}}),
        case("use_bdlora", edits={"use_bdlora": {"nblocks": 2}}),
        case("use_qalora", edits={"use_qalora": True}),
        case("alora_invocation_tokens", lora={"alora_invocation_tokens": [3]}),
        case("megatron_config", edits={"megatron_config": {}}),
        case("an unknown setting", edits={"use_future": True}),
        *(case(f"peft_type: {each.value}", edits={"peft_type": each.value}) for each in PeftType if each != "LORA"),
    ]
