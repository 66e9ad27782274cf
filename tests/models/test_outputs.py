"""Other base models and LoRA settings: the covariance is still the dense one, or the adapter is refused by name."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lapora.errors import AdapterError, UsageError
from lapora.models.lora_layers import find_bayesian_layers
from lapora.models.outputs import OutputModel
from tiny_models import batches, close, dense_jacobian, moments, posterior, rows

GPT2 = {"vocab_size": 30, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
BERT = {
    "vocab_size": 30,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
LLAMA = {**BERT, "max_position_embeddings": 32}


def build(name: str, **lora):
    torch.manual_seed(0)
    if name == "gpt2":
        base, kind, targets = GPT2LMHeadModel(GPT2Config(**GPT2)), "causal", ["c_attn", "c_fc"]
    elif name == "gpt2-classifier":
        base = GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=3, pad_token_id=0))
        kind, targets = "classifier", ["c_attn"]
    elif name == "roberta":
        base = RobertaForSequenceClassification(RobertaConfig(**BERT, num_labels=3, pad_token_id=0))
        kind, targets = "classifier", ["query", "value"]
    elif name == "llama-classifier":
        base = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3, pad_token_id=0))
        kind, targets = "classifier", ["q_proj", "v_proj"]
    else:
        base, kind, targets = LlamaForCausalLM(LlamaConfig(**LLAMA)), "causal", ["q_proj", "v_proj"]
    settings = {"r": 3, "lora_alpha": 6, "target_modules": targets, **lora}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM" if kind == "causal" else "SEQ_CLS", **settings))
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            nn.init.normal_(parameter, std=0.3)
    model = model.double().eval().requires_grad_(False)
    return OutputModel(model, kind, 0, [5, 6, 7] if kind == "causal" else None)


def covariances(answers, subset="lora"):
    layers = find_bayesian_layers(answers.model, subset)
    encoded = rows()
    factors, blocks = posterior(answers, layers, encoded)
    _, ours = moments(answers, layers, blocks, encoded, classes=3)
    precision = torch.block_diag(
        *[torch.kron(f.gradient_sum, f.input_sum) * f.scale for f in (factors[layer.name] for layer in layers)]
    )
    precision += 0.7 * torch.eye(len(precision), dtype=torch.float64)
    return ours, layers, encoded, factors, precision


@pytest.mark.parametrize("name", ["gpt2", "gpt2-classifier", "roberta", "llama-classifier"])
def test_covariance_is_dense_on_other_architectures(name):
    answers = build(name)
    ours, layers, encoded, _, precision = covariances(answers)
    _, jacobian = dense_jacobian(answers, layers, encoded)
    expected = torch.einsum("ncp,pq,ndq->ncd", jacobian, torch.linalg.inv(precision), jacobian)
    assert float(expected.diagonal(dim1=1, dim2=2).min()) > 1e-6
    torch.testing.assert_close(ours, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 9}},
        {"bias": "lora_only", "lora_bias": True},
    ],
)
def test_covariance_is_dense_under_other_lora_settings(lora):
    answers = build("llama", **lora)
    ours, layers, encoded, _, precision = covariances(answers)
    _, jacobian = dense_jacobian(answers, layers, encoded)
    expected = torch.einsum("ncp,pq,ndq->ncd", jacobian, torch.linalg.inv(precision), jacobian)
    close(ours, expected, answers)


@pytest.mark.parametrize(
    ("name", "counted"), [("gpt2-classifier", "score"), ("llama-classifier", "score"), ("roberta", "out_proj")]
)
def test_a_head_counts_one_token_a_row(name, counted):
    answers = build(name)
    (layer,) = find_bayesian_layers(answers.model, "last-layer")
    assert counted in layer.name
    ours, _, encoded, factors, precision = covariances(answers, "last-layer")
    assert factors[layer.name].count == len(encoded)
    # For the last layer the Jacobian of f_c is the head's input in row c, and one where there is a bias.
    features = {}
    handle = layer.module.register_forward_hook(lambda module, inputs, output: features.update(x=inputs[0]))
    expected = []
    for batch in batches(answers, encoded, 1):
        answers.logits(batch)
        x = features["x"].reshape(-1, features["x"].shape[-1])[-1 if name != "roberta" else 0]
        x = torch.cat([x, x.new_ones(1)]) if layer.bias_as_input else x
        jacobian = torch.kron(torch.eye(3, dtype=x.dtype), x.unsqueeze(0))
        expected.append(jacobian @ torch.linalg.inv(precision) @ jacobian.T)
    handle.remove()
    torch.testing.assert_close(ours, torch.stack(expected), atol=1e-4, rtol=1e-3)


def test_all_covers_lora_and_head():
    layers = find_bayesian_layers(build("roberta").model, "all")
    assert [layer.role for layer in layers].count("head") == 2
    assert {layer.role for layer in layers} == {"A", "B", "head"}


def test_a_model_without_head_or_output_lora_has_no_last_layer():
    with pytest.raises(UsageError, match="last-layer"):
        find_bayesian_layers(build("llama").model, "last-layer")


@pytest.mark.parametrize(
    ("lora", "word"),
    [
        ({"target_modules": ["embed_tokens"]}, "Embedding"),
    ],
)
def test_uncovered_layers_are_refused_by_name(lora, word):
    with pytest.raises(AdapterError, match=word):
        find_bayesian_layers(build("llama", **lora).model)


def test_lora_on_a_convolution_is_refused_by_name():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def get_output_embeddings(self):
            return None

    model = get_peft_model(Network(), LoraConfig(r=2, target_modules=["conv"]))
    with pytest.raises(AdapterError, match="Conv2d"):
        find_bayesian_layers(model)


def test_a_merged_adapter_is_refused():
    answers = build("llama")
    answers.model.merge_adapter()
    with pytest.raises(AdapterError, match="merged"):
        find_bayesian_layers(answers.model)
