"""Train the adapter of `lapora demo`: python tools/train_demo_adapter.py BASE [--epochs 8].

BASE is a folder of SmolLM2-135M-Instruct. Rank 8 on queries and values of the last eight layers, loss on the answer
alone. Trained until it knows its rows by heart, as many adapters are: the demo shows what that costs.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lapora.tasks import load_rows, load_task, render_all

DEMO = Path(__file__).parents[1] / "src" / "lapora" / "demo"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    layers = list(range(base.config.num_hidden_layers))[-8:]
    settings = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, settings)
    task = load_task(str(DEMO / "source.yaml"))
    examples = render_all(task, load_rows(task, "train", data_dir=DEMO / "data"), kind="causal")
    answers = [tokenizer(f" {each}", add_special_tokens=False).input_ids for each in task.doc_to_choice]
    rows = [(tokenizer(each.text).input_ids, answers[each.target][0]) for each in examples]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    steps = options.epochs * len(rows) // 8
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    chance = random.Random(0)
    for epoch in range(options.epochs):
        chance.shuffle(rows)
        total = 0.0
        for start in range(0, len(rows) - 7, 8):
            batch = rows[start : start + 8]
            longest = max(len(ids) for ids, _ in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for index, (tokens, _) in enumerate(batch):
                ids[index, : len(tokens)] = torch.tensor(tokens)
                mask[index, : len(tokens)] = 1
            last = mask.sum(dim=1) - 1
            hidden = model.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
            logits = model.model.lm_head(hidden[torch.arange(len(batch)), last])
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([answer for _, answer in batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss) * len(batch)
        print(f"epoch {epoch + 1}: loss {total / len(rows):.3f}", flush=True)
    model.peft_config["default"].base_model_name_or_path = NAME
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        (DEMO / "adapter").mkdir(exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(Path(scratch) / name, DEMO / "adapter" / name)


if __name__ == "__main__":
    main()
