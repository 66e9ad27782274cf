"""Tiny base models of many architectures with random LoRA, and their dense covariances."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lapora.config import COMPLETE
from lapora.curvature.kfac import KronObserver
from lapora.curvature.passes import collect
from lapora.models.loading import silence_libraries
from lapora.models.lora_layers import find_bayesian_layers
from lapora.models.outputs import OutputModel
from lapora.posterior.eigen import decompose
from tiny_models import batches, dense_jacobian, moments, rows

# Every architecture reads the names that it knows and ignores the others.
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "initializer_factor": 3.0,
}
ENCODER_DECODER = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 2,
    "eos_token_id": 31,
}
SETTINGS: dict[str, dict[str, object]] = {
    "albert": {"embedding_size": 8, "num_hidden_layers": 3},
    "bart": ENCODER_DECODER,
    "bloom": {"n_layer": 2, "n_head": 2},
    "convbert": {"embedding_size": 16, "conv_kernel_size": 3},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 6},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 4,
        "max_relative_positions": 6,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
    },
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    "flaubert": {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "pre_norm": False, "pad_index": 0, "eos_index": 31},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48},
    "mbart": ENCODER_DECODER,
    "mt5": {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        "eos_token_id": 31,
    },
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "pegasus": ENCODER_DECODER,
    "plbart": ENCODER_DECODER,
    "roberta": {},
    "t5": {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        "eos_token_id": 31,
    },
    "xlm": {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "pad_index": 0, "eos_index": 31},
    "codegen": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 48, "n_ctx": 48, "rotary_dim": 4},
    "funnel": {"block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, "num_decoder_layers": 1},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 24,
    },
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
}


def tiny_config(name: str, **settings):
    """The configuration of a model type with tiny sizes."""
    refused = {"xlnet": {"max_position_embeddings"}, "funnel": {"num_hidden_layers"}}.get(name, set())
    sizes = {key: value for key, value in SIZES.items() if key not in refused}
    return AutoConfig.for_model(name, **{**sizes, **SETTINGS.get(name, {}), **settings})


def tiny_base(name: str, kind: str, *, targets="all-linear", lora=None, double=True, **settings) -> OutputModel:
    """A model type with random weights and random LoRA; three answers."""
    torch.manual_seed(0)
    with silence_libraries():
        if kind == "causal":
            base = AutoModelForCausalLM.from_config(tiny_config(name, is_decoder=True, **settings))
        else:
            base = AutoModelForSequenceClassification.from_config(tiny_config(name, num_labels=3, **settings))
        task_type = "CAUSAL_LM" if kind == "causal" else "SEQ_CLS"
        config = LoraConfig(task_type=task_type, **{"r": 3, "lora_alpha": 6, "target_modules": targets, **(lora or {})})
        model = get_peft_model(base, config)
    for key, parameter in model.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            nn.init.normal_(parameter, std=0.3)
    model = (model.double() if double else model).eval().requires_grad_(False)
    return OutputModel(model, kind, 0, [5, 6, 7] if kind == "causal" else None)


def row_ids(answers: OutputModel, count: int = 5):
    """Rows of unlike length; encoder-decoder classifiers read the position of the last end-of-text token."""
    encoded = rows(count)
    if answers.network.config.is_encoder_decoder:
        for row in encoded:
            row.input_ids.append(31)
    return encoded


def covariance_error(answers: OutputModel, subset: str = "lora", size: int = 3) -> float:
    """Largest difference of the covariance to the dense one, relative to the largest dense entry."""
    layers = find_bayesian_layers(answers.model, subset)
    encoded = row_ids(answers)
    size = 1 if answers.equal_lengths else size
    observer = KronObserver("expand", COMPLETE)
    collect(answers, layers, observer, batches(answers, encoded, size), targets=[None] * len(encoded))
    factors = observer.factors(layers)
    blocks = decompose(layers, factors, COMPLETE)
    mean, ours = moments(answers, layers, blocks, encoded, classes=3, size=size)
    precision = torch.block_diag(
        *[torch.kron(f.gradient_sum, f.input_sum) * f.scale for f in (factors[layer.name] for layer in layers)]
    )
    precision += 0.7 * torch.eye(len(precision), dtype=torch.float64)
    logits, jacobian = dense_jacobian(answers, layers, encoded)
    expected = torch.einsum("ncp,pq,ndq->ncd", jacobian, torch.linalg.inv(precision), jacobian)
    assert float(expected.diagonal(dim1=1, dim2=2).min()) > 1e-9
    assert float((mean - logits).abs().max() / logits.abs().max()) < 1e-5
    return float((ours - expected).abs().max() / expected.abs().max())
