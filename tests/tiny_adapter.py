"""A whole adapter on disk in a second: base model, tokenizer, task and rows, random and small."""

from __future__ import annotations

import io
import json
import random
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lapora.config import DataSettings, FitSettings, ModelSettings
from lapora.models.loading import silence_libraries
from lapora.workflows.fit import FitResult, fit

WORDS = [
    "the",
    "cows",
    "sheep",
    "are",
    "is",
    "in",
    "barn",
    "office",
    "anna",
    "boris",
    "quiet",
    "loud",
    "?",
    "no",
    "yes",
]


def make_adapter(
    folder: Path,
    *,
    rows: int = 24,
    hidden: int = 16,
    seed: int = 0,
    zero_b: bool = False,
    scale: float = 0.3,
    initializer_range: float = 0.5,
    base: PreTrainedModel | None = None,
    **settings: object,
) -> Path:
    """Write ``base/``, ``adapter/``, ``data/`` and ``task.yaml``; the settings are PEFT's; returns ``folder``.

    The base is a Llama, unless another causal model of 17 tokens is given.
    """
    torch.manual_seed(seed)
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=initializer_range,
    )
    with silence_libraries():
        base = base or LlamaForCausalLM(config)
        base.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        plain = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        lora = LoraConfig(**{**plain, **settings})
        model = get_peft_model(base, lora)
        if not zero_b:
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=scale)
        model.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
        model.save_pretrained(str(folder / "adapter"))
    task = {
        "task": "tiny",
        "doc_to_text": "{{story}} ?",
        "doc_to_choice": ["no", "yes"],
        "doc_to_target": "{{ label }}",
        "max_length": 48,
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    (folder / "data").mkdir(exist_ok=True)
    for split, count in (("train", rows), ("validation", 12)):
        lines = [json.dumps(row) + "\n" for row in make_rows(count, seed=len(split))]
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines))
    return folder


def tiny_biogpt() -> BioGptForCausalLM:
    """A base whose output layer is called ``output_projection``."""
    torch.manual_seed(0)
    config = BioGptConfig(
        vocab_size=2 + len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return BioGptForCausalLM(config)


def make_rows(count: int, seed: int = 0) -> list[dict[str, object]]:
    source = random.Random(seed)
    return [
        {"story": " ".join(source.choices(WORDS[:11], k=source.randint(3, 12))), "label": source.randint(0, 1)}
        for _ in range(count)
    ]


def data_of(folder: Path, **settings) -> DataSettings:
    return DataSettings(**{"task": str(folder / "task.yaml"), "data_dir": folder / "data", **settings})


def model_of(folder: Path, **settings) -> ModelSettings:
    return ModelSettings(adapter=str(folder / "adapter"), device="cpu", **settings)


def fit_tiny(folder: Path, *, model: dict[str, object] | None = None, **settings) -> FitResult:
    """Fit with the prior precision of the marginal likelihood, unless another method is given."""
    return fit(
        model_of(folder, **(model or {})), data_of(folder), FitSettings(**{"prior_method": "marglik", **settings})
    )


def json_lines(count: int, seed: int = 5) -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in make_rows(count, seed)]


def command(monkeypatch, capfdbinary, *arguments: object, stdin: bytes | None = None) -> tuple[int, bytes, str]:
    """Run the command line in this process on real file descriptors: status, stdout, stderr."""
    from lapora.cli.app import run

    monkeypatch.setattr(sys, "argv", ["lapora", *map(str, arguments)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with tempfile.TemporaryFile() as file, warnings.catch_warnings():
        file.write(stdin or b"")
        file.seek(0)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file, encoding="utf-8"))
        capfdbinary.readouterr()
        try:
            run()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capfdbinary.readouterr()
        sys.stdin.detach()
    return status, out, err.decode()
