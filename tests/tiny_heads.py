"""A sequence classifier on disk in a second, with the rows and the task of any likelihood."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from lapora.models.loading import silence_libraries
from tiny_adapter import WORDS

OUTPUTS = {"categorical": 3, "bernoulli": 1, "multilabel": 3, "gaussian": 1, "preference": 1}


def make_head(
    folder: Path,
    likelihood: str,
    *,
    outputs: int | None = None,
    rows: int = 24,
    problem_type: str | None = None,
    dropout: float = 0.0,
) -> Path:
    """Write ``base/``, ``adapter/`` with a saved head, ``data/`` and ``task.yaml``; returns ``folder``."""
    torch.manual_seed(0)
    outputs = outputs or OUTPUTS[likelihood]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        num_labels=outputs,
        initializer_range=0.5,
    )
    if problem_type is not None:
        config.problem_type = problem_type
    with silence_libraries():
        base = LlamaForSequenceClassification(config)
        base.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        lora = LoraConfig(
            r=3,
            lora_alpha=6,
            lora_dropout=dropout,
            target_modules=["q_proj", "v_proj"],
            task_type="SEQ_CLS",
            modules_to_save=["score"],
        )
        model = get_peft_model(base, lora)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
        model.save_pretrained(str(folder / "adapter"))
    (folder / "task.yaml").write_text(yaml.safe_dump(task_of(likelihood, outputs), sort_keys=False))
    (folder / "data").mkdir(exist_ok=True)
    for split, count in (("train", rows), ("validation", 12)):
        lines = [json.dumps(row) + "\n" for row in rows_of(likelihood, count, outputs, seed=len(split))]
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines))
    return folder


def task_of(likelihood: str, outputs: int) -> dict[str, Any]:
    task: dict[str, Any] = {"task": "tiny", "likelihood": likelihood, "max_length": 48}
    if likelihood == "preference":
        return task
    names = {"bernoulli": ["no", "yes"], "gaussian": [f"number{index}" for index in range(outputs)]}
    task |= {"doc_to_inputs": "{{story}}", "doc_to_target": "{{ label }}"}
    task["doc_to_choice"] = names.get(likelihood, [f"label{index}" for index in range(outputs)])
    return task


def rows_of(likelihood: str, count: int, outputs: int, seed: int = 0) -> list[dict[str, Any]]:
    source = random.Random(seed)

    def story() -> str:
        return " ".join(source.choices(WORDS[:11], k=source.randint(3, 12)))

    def label() -> Any:
        if likelihood == "gaussian":
            numbers = [source.gauss(2.0 * index, 1.5) for index in range(outputs)]
            return numbers if outputs > 1 else numbers[0]
        if likelihood == "multilabel":
            return [source.randint(0, 1) for _ in range(outputs)]
        return source.randint(0, 1 if likelihood == "bernoulli" else outputs - 1)

    if likelihood == "preference":
        return [{"chosen": f"{story()} yes", "rejected": f"{story()} no"} for _ in range(count)]
    return [{"story": story(), "label": label()} for _ in range(count)]
