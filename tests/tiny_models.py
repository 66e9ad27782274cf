"""Tiny models in float64 and the dense, slow, obviously correct computations on them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lapora.curvature.kfac import KronObserver
from lapora.curvature.passes import collect
from lapora.models.batches import collate
from lapora.models.outputs import OutputModel
from lapora.posterior.eigen import decompose
from lapora.posterior.gaussian import BlockPosterior
from lapora.predictive.moments import LinearisedPredictor


@dataclass
class Answer:
    ids: list[int]
    scored: int
    weight: float = 1.0


@dataclass
class Row:
    input_ids: list[int]
    token_type_ids: list[int] | None = field(default=None)
    second: Row | None = None
    answers: list[Answer] = field(default_factory=list)


def _random_lora(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval().requires_grad_(False)


def tiny_classifier(classes: int, seed: int = 0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        num_labels=classes,
        initializer_range=0.5,
    )
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = _random_lora(get_peft_model(BertForSequenceClassification(config), lora))
    return OutputModel(model, "classifier", 0)


def tiny_causal(classes: int, seed: int = 0, targets=("q_proj", "v_proj")):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), task_type="CAUSAL_LM")
    model = _random_lora(get_peft_model(LlamaForCausalLM(config), lora))
    return OutputModel(model, "causal", 0, list(range(5, 5 + classes)))


def rows(count: int = 6, seed: int = 3) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [Row(torch.randint(1, 30, (length,), generator=generator).tolist()) for length in lengths]


def whole_rows(counts=(3, 3, 2, 4, 3), seed: int = 3) -> list[Row]:
    """Rows with answers of one to four tokens, and as many of them as the counts say."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, 30, (length,), generator=generator).tolist()

    found = []
    for count in counts:
        answers = [Answer(ids, len(ids)) for ids in (tokens(1, 5) for _ in range(count))]
        answers[1].weight = 0.5
        if len(answers[-1].ids) > 1:
            answers[-1].scored -= 1  # the first token belongs to the prompt of this answer
        found.append(Row(tokens(2, 7), answers=answers))
    return found


def batches(answers, encoded, size, side=None, pad_to=None):
    for start in range(0, len(encoded), size):
        chosen = list(range(start, min(start + size, len(encoded))))
        yield collate(
            [encoded[i] for i in chosen],
            chosen,
            pad_token_id=0,
            padding_side=side or answers.padding_side,
            pad_to=pad_to,
        )


def close(actual, expected, answers):
    """Equal to round-off. Llama's norm works in float32 whatever the model runs in, so its round-off is that."""
    llama = answers.network.config.model_type == "llama"
    tolerance = {"atol": 3e-5, "rtol": 3e-4} if llama else {"atol": 1e-9, "rtol": 1e-7}
    torch.testing.assert_close(actual, expected, **tolerance)


def dense_jacobian(answers, layers, encoded) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows one at a time, unpadded, through plain autograd: logits (N, C) and Jacobian (N, C, P)."""
    weights = [layer.module.weight for layer in layers]
    all_logits, jacobian = [], []
    for weight in weights:
        weight.requires_grad_(True)
    for batch in batches(answers, encoded, 1):
        logits = answers.logits(batch)[0]
        all_logits.append(logits.detach())
        jacobian.append(
            torch.stack(
                [torch.cat([g.reshape(-1) for g in torch.autograd.grad(f, weights, retain_graph=True)]) for f in logits]
            )
        )
    for weight in weights:
        weight.requires_grad_(False)
    return torch.stack(all_logits), torch.stack(jacobian)


def posterior(answers, layers, encoded):
    observer = KronObserver("expand")
    collect(answers, layers, observer, batches(answers, encoded, 3), targets=[None] * len(encoded))
    return observer.factors(layers), decompose(layers, observer.factors(layers))


def moments(answers, layers, blocks, encoded, *, classes, size=4, every_class=True, precision=0.7, **how):
    found = []
    gaussian = BlockPosterior(blocks) if isinstance(blocks, list) else blocks
    precisions = torch.full((1, len(layers)), precision, dtype=torch.float64)
    with LinearisedPredictor(
        answers, layers, gaussian, precisions, classes=classes, every_class=every_class
    ) as predictor:
        for batch in batches(answers, encoded, size, **how):
            found.append(predictor.moments(batch))
    return torch.cat([m.mean for m in found]), torch.cat([m.covariance for m in found])
