"""``lapora demo --offline``: train a small base model and an overfitted adapter.

The text is generated: a short story names who keeps the animals, and the question is whether the keeper is on the
farm. A cue word determines the answer, but a quarter of the labels are flipped, so that no model can always be right;
an adapter trained long on few rows is overconfident nevertheless.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import yaml

from lapora.config import Progress
from lapora.models.adapter import CONFIG_FILE
from lapora.models.loading import silence_libraries

_NAMES = ["anna", "boris", "clara", "dmitri", "elena", "farid", "greta", "hugo", "ines", "jonas"]
_ANIMALS = ["cows", "sheep", "goats", "horses", "geese", "ducks", "hens", "bees"]
_PLACES_YES = ["barn", "meadow", "stable", "orchard"]
_PLACES_NO = ["office", "harbour", "station", "market"]
_TIMES = ["morning", "noon", "evening", "night"]
_FLIPPED = 0.25
_TRAINING_ROWS = 100
_VALIDATION_ROWS = 600
OFFLINE_TASK = "farm.yaml"
Step = Callable[[str], AbstractContextManager[Progress | None]]
_RECIPE = ".made-with"
"""File with the digest of the code that trained base model and adapter."""

_TASK: dict[str, Any] = {
    "task": "farm",
    "doc_to_text": "story : {{story}} is {{name}} on the farm ? answer :",
    "doc_to_choice": ["no", "yes"],
    "doc_to_target": "{{ label }}",
    "max_length": 48,
}


def make_offline_demo(directory: Path, print_message: Callable[[str], None], step: Step) -> None:
    """Create base model, adapter, rows and task.

    Args:
        directory: Folder for the files: ``base/``, ``adapter/``, ``data/``, ``farm.yaml``.
        print_message: Prints progress messages.
        step: Returns the progress callback of a step.
    """
    rows = _rows(_TRAINING_ROWS + _VALIDATION_ROWS, seed=1)
    splits = {"train": rows[:_TRAINING_ROWS], "validation": rows[_TRAINING_ROWS:]}
    (directory / "data").mkdir(exist_ok=True)
    for split, content in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (directory / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    (directory / OFFLINE_TASK).write_text(yaml.safe_dump(_TASK, sort_keys=False), encoding="utf-8")
    recipe = directory / _RECIPE
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if recipe.is_file() and recipe.read_text(encoding="utf-8") == digest:
        print_message("base model and adapter are there from an earlier demo")
        record_base(directory / "adapter", str((directory / "base").resolve()))  # the folder may have been moved
    else:
        recipe.unlink(missing_ok=True)
        torch.manual_seed(0)
        with silence_libraries():
            _make_model(directory, splits["train"], step)
        recipe.write_text(digest, encoding="utf-8")


def _make_model(
    directory: Path,
    rows: list[dict[str, Any]],
    step: Step,
) -> None:
    with step("training a small base model on generated text") as progress:
        tokenizer, base = _base_model(directory / "base", progress)
    with step(f"overfitting a LoRA adapter on {_TRAINING_ROWS} rows") as progress:
        _adapter(directory, tokenizer, base, rows, progress)


def record_base(adapter: Path, base: str) -> None:
    """Write the base model's name or folder into an adapter's configuration."""
    file = adapter / CONFIG_FILE
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _rows(count: int, seed: int) -> list[dict[str, Any]]:
    random_source = random.Random(seed)
    rows = []
    for _ in range(count):
        name = random_source.choice(_NAMES)
        truth = random_source.random() < 0.5
        place = random_source.choice(_PLACES_YES if truth else _PLACES_NO)
        label = truth != (random_source.random() < _FLIPPED)
        story = (
            f"{name} keeps the {random_source.choice(_ANIMALS)} with {random_source.choice(_NAMES)} . "
            f"in the {random_source.choice(_TIMES)} {name} went to the {place} ."
        )
        rows.append({"story": story, "name": name, "label": int(label), "truth": truth})
    return rows


def _prompt(row: dict[str, Any]) -> str:
    return f"story : {row['story']} is {row['name']} on the farm ? answer :"


def _base_model(folder: Path, progress: Progress | None) -> tuple[Any, Any]:
    """Return a word-level tokenizer and a two-layer Llama, trained briefly on unlabelled stories."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    corpus = _rows(2000, seed=2)
    texts = [_prompt(row) + (" indeed ." if row["truth"] else " hardly .") for row in corpus]
    words = sorted({word for text in texts for word in text.split()} | {"yes", "no"})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    _train(model, model.parameters(), tokenizer, texts, None, steps=250, rate=1e-3, progress=progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, model


def _adapter(directory: Path, tokenizer: Any, base: Any, rows: list[dict[str, Any]], progress: Progress | None) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, settings)
    model.peft_config["default"].base_model_name_or_path = str((directory / "base").resolve())
    answers = [tokenizer.convert_tokens_to_ids(_TASK["doc_to_choice"][row["label"]]) for row in rows]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _train(model, trained, tokenizer, [_prompt(row) for row in rows], answers, steps=500, rate=1e-3, progress=progress)
    model.save_pretrained(str(directory / "adapter"))


def _train(
    model: Any,
    parameters: Any,
    tokenizer: Any,
    texts: list[str],
    answers: list[int] | None,
    steps: int,
    rate: float,
    progress: Progress | None,
) -> None:
    """Train with Adam on all next words or, if answers are given, on the answer only."""
    optimiser = torch.optim.Adam(parameters, lr=rate)
    coded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    generator = torch.Generator().manual_seed(0)
    model.train()
    for number in range(1, steps + 1):
        chosen = torch.randint(len(texts), (32,), generator=generator)
        ids, mask = coded.input_ids[chosen], coded.attention_mask[chosen]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        if answers is None:
            targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
        else:
            loss = torch.nn.functional.cross_entropy(logits[:, -1], torch.tensor(answers)[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if progress is not None:
            progress(number, steps)
    model.eval()
