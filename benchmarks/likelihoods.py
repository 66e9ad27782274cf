"""Regression and reward models on a real encoder: what Laplace gains over the plain adapter and over a scale.

Run from the project's root, a quarter of an hour on one thread::

    python -m benchmarks.likelihoods --shared ../shared --out /tmp/likelihoods

Two adapters are trained on all-MiniLM-L6-v2 (LoRA of rank 8 on query and value, head in ``modules_to_save``), both on
few rows of ARC-Easy (CC BY-SA 4.0):

* ``length``: a regression of the logarithm of the number of characters of a question on the question, a real quantity
  that the encoder has to infer from its tokens;
* ``reward``: a reward model that prefers the right answer to a wrong one, judged by how often the best of n answers by
  its reward is the right one. Beside a question's own answers the candidates are answers of other questions.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.prior_selection.train_adapters import base_model_folder
from lapora.config import DataSettings, EvalSettings, FitSettings, ModelSettings, PredictSettings, PriorSettings
from lapora.workflows.evaluate import run_evaluation
from lapora.workflows.fit import fit
from lapora.workflows.predict import predict
from lapora.workflows.tune_prior import tune_prior

ROWS, MAX_LENGTH, BATCH = 300, 64, 16
STEPS = {"length": 200, "reward": 150}
_TASKS = {
    "length": {
        "task": "length",
        "likelihood": "gaussian",
        "doc_to_inputs": "{{text}}",
        "doc_to_target": "{{length}}",
        "max_length": MAX_LENGTH,
    },
    "reward": {"task": "reward", "likelihood": "preference", "max_length": 4 * MAX_LENGTH},
}


def questions(shared: Path, split: str) -> list[dict[str, Any]]:
    """Return question, answers, and index of the right one of every row of ARC-Easy."""
    lines = (shared / "data" / "arc-e" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        row = json.loads(line)
        answers = row["choices"]["text"]
        if len(set(answers)) == len(answers) and len(answers) == 4:
            right = row["choices"]["label"].index(row["answerKey"])
            found.append({"question": row["question"], "answers": answers, "right": right})
    return found


def rows_of(name: str, found: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the rows of a task."""
    draw = random.Random(seed)
    if name == "length":
        return [{"text": each["question"], "length": math.log(len(each["answers"][each["right"]]))} for each in found]
    return [
        {
            "prompt": each["question"] + " ",
            "chosen": each["answers"][each["right"]],
            "rejected": draw.choice([text for index, text in enumerate(each["answers"]) if index != each["right"]]),
        }
        for each in found
    ]


def train(name: str, rows: Sequence[dict[str, Any]], folder: Path) -> float:
    """Train and save an adapter; return the mean loss of the last tenth of the steps."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base_model_folder())
    network = AutoModelForSequenceClassification.from_pretrained(base_model_folder(), num_labels=1)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"]
    )
    model = get_peft_model(network, config)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / STEPS[name])
    draw, losses = random.Random(0), []
    model.train()
    for _ in range(STEPS[name]):
        batch = draw.sample(list(rows), BATCH)
        if name == "length":
            texts = [row["text"] for row in batch]
        else:
            texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in batch]
        inputs = tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
        outputs = model(**inputs).logits[:, 0]
        if name == "length":
            loss = (outputs - torch.tensor([row["length"] for row in batch])).square().mean()
        else:
            loss = -torch.nn.functional.logsigmoid(outputs[:BATCH] - outputs[BATCH:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(str(folder))
    last = STEPS[name] // 10
    return sum(losses[-last:]) / last


def best_of_n(
    model: ModelSettings, found: Sequence[dict[str, Any]], others: int, penalties: Sequence[float]
) -> dict[float, float]:
    """Return how often the best candidate by ``reward - k deviation`` is the right answer, for each penalty k.

    Args:
        model: The reward model.
        found: The questions.
        others: Number of candidates that are answers of other questions.
        penalties: k.
    """
    draw = random.Random(1)
    lines: list[dict[str, Any]] = []
    for each in found:
        elsewhere = [draw.choice(draw.choice(found)["answers"]) for _ in range(others)]
        lines += [{"prompt": each["question"] + " ", "text": text} for text in [*each["answers"], *elsewhere]]
    records = list(predict(model, PredictSettings(), lines))
    reward = torch.tensor([[record["reward"], record["deviation"]] for record in records]).double()
    by_question = reward.reshape(len(found), 4 + others, 2)
    right = torch.tensor([each["right"] for each in found])
    rates = {}
    for penalty in penalties:
        best = (by_question[..., 0] - penalty * by_question[..., 1]).argmax(dim=1)
        rates[penalty] = float((best == right).double().mean())
    return rates


def main() -> None:
    """Train, fit, tune, score, and print one JSON line for each adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scored", type=int, default=200)
    parser.add_argument("--only", choices=sorted(_TASKS))
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else _TASKS:
        folder = arguments.out / name
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "task.yaml").write_text(json.dumps(_TASKS[name]), encoding="utf-8")
        parts = {
            "train": questions(arguments.shared, "train")[:ROWS],
            "validation": questions(arguments.shared, "validation")[: arguments.scored],
        }
        for split, found in parts.items():
            text = "".join(json.dumps(row) + "\n" for row in rows_of(name, found, seed=len(split)))
            (folder / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")
        started, loss = time.perf_counter(), None
        if not (folder / "adapter").is_dir():  # an adapter of an earlier run serves again
            loss = train(name, rows_of(name, parts["train"], seed=len("train")), folder / "adapter")
        model = ModelSettings(str(folder / "adapter"), base_model=str(base_model_folder()), device="cpu")
        data = DataSettings(str(folder / "task.yaml"), folder / "data")
        fit(model, data, FitSettings(overwrite=True))
        report: dict[str, Any] = {"adapter": name, "training_loss": loss, "seconds": time.perf_counter() - started}
        for method in ("none", "marglik", "validation", "auto"):
            if method != "none":
                tuned = tune_prior(model, DataSettings(), PriorSettings(method=method))  # type: ignore[arg-type]
                report[f"{method}: prior"] = tuned.reason
            if name == "reward" and method in ("none", "auto"):
                report[f"{method}: best of 8"] = best_of_n(model, parts["validation"], 4, (0.0, 0.5, 1.0, 2.0))
            settings = EvalSettings(methods=("constant", "map", "temperature", "laplace"))
            done = run_evaluation(model, DataSettings(), settings)
            report[f"{method}: scores"] = [
                {key: value for key, value in result.items() if not isinstance(value, dict)}
                | {"nll_minus_map": result.get("difference_to_map", {}).get("nll")}
                for result in done.record["results"]
            ]
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
