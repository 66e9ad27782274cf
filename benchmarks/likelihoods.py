"""Regression and reward models on a real encoder: what Laplace gains over the plain adapter and over a scale.

Run from the project's root::

    python -m benchmarks.likelihoods --shared ../shared --out /tmp/likelihoods

Three adapters are trained on all-MiniLM-L6-v2 (LoRA of rank 8 on query and value, head in ``modules_to_save``):

* ``words``: a regression of the mean number of letters of the words of a BoolQ passage (CC BY-SA 3.0) on the
  passage, of which the model reads the first 48 tokens and has to infer the rest;
* ``answers``: a reward model on ARC-Easy (CC BY-SA 4.0) that prefers the right answer of a question to a wrong one of
  the same question;
* ``topics``: the same with the answer of another question as the worse one, which is easier.

A reward model is judged by the answer of the largest reward among n: whether it is the right one, and its reward by a
judge, a reward model trained on 1,800 other questions with both kinds of worse answers.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.prior_selection.train_adapters import base_model_folder
from lapora.config import DataSettings, EvalSettings, FitSettings, ModelSettings, PredictSettings, PriorSettings
from lapora.workflows.evaluate import run_evaluation
from lapora.workflows.fit import fit
from lapora.workflows.predict import predict
from lapora.workflows.tune_prior import tune_prior

Name = Literal["words", "answers", "topics", "judge"]
Row = dict[str, Any]

BATCH, MAX_LENGTH = 16, 48
SIZES: dict[Name, tuple[int, int]] = {"words": (400, 300), "answers": (100, 150), "topics": (100, 150)}
"""Training rows and steps."""

JUDGE_ROWS, JUDGE_STEPS = 1_800, 300
POOL = 16
"""Candidates for each question: its own four answers, and answers of other questions."""

NUMBERS = (1, 2, 4, 8, 16)
PENALTIES = (0.0, 0.5, 1.0, 2.0)
METHODS = ("none", "marglik", "validation", "auto")


def read(shared: Path, name: str, split: str) -> list[Row]:
    """Return the rows of a data set."""
    lines = (shared / "data" / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def passages(shared: Path, split: str) -> list[Row]:
    """Return every passage of BoolQ with the mean number of letters of its words."""
    found = {}
    for row in read(shared, "boolq", split):
        words = re.findall(r"[A-Za-z']+", row["passage"])
        found[row["passage"]] = sum(map(len, words)) / len(words)
    return [{"text": text, "letters": letters} for text, letters in found.items()]


def questions(shared: Path, split: str) -> list[Row]:
    """Return question, answers, and index of the right one of every row of ARC-Easy with four answers."""
    found = []
    for row in read(shared, "arc-e", split):
        answers = row["choices"]["text"]
        if len(set(answers)) == len(answers) == 4:
            right = row["choices"]["label"].index(row["answerKey"])
            found.append({"question": row["question"], "answers": answers, "right": right})
    return found


def preferences(found: Sequence[Row], name: Name, seed: int) -> list[Row]:
    """Return pairs of a right answer and a worse one: of the same question, of another, or either (of the judge)."""
    draw = random.Random(seed)
    rows = []
    for each in found:
        right = each["answers"][each["right"]]
        wrong = draw.choice([text for text in each["answers"] if text != right])
        other = draw.choice([text for text in draw.choice(found)["answers"] if text not in each["answers"]] or [wrong])
        rejected = {"answers": wrong, "topics": other}.get(name) or draw.choice([wrong, other])
        rows.append({"prompt": each["question"] + " ", "chosen": right, "rejected": rejected})
    return rows


def rewards(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the outputs of texts, ``(N,)``."""
    inputs = tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
    outputs: Tensor = model(**inputs).logits[:, 0]
    return outputs


def train(name: Name, rows: Sequence[Row], steps: int) -> tuple[PeftModel, Any, float]:
    """Train an adapter; return it with its tokenizer and the mean loss of the last tenth of the steps."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base_model_folder())
    network = AutoModelForSequenceClassification.from_pretrained(base_model_folder(), num_labels=1)
    if name == "words":
        network.classifier.bias.data.fill_(sum(row["letters"] for row in rows) / len(rows))
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"]
    )
    model = get_peft_model(network, config)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    draw, losses = random.Random(0), []
    model.train()
    for _ in range(steps):
        batch = draw.sample(list(rows), BATCH)
        if name == "words":
            outputs = rewards(model, tokenizer, [row["text"] for row in batch])
            loss = (outputs - torch.tensor([row["letters"] for row in batch])).square().mean()
        else:
            texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in batch]
            outputs = rewards(model, tokenizer, texts)
            loss = -torch.nn.functional.logsigmoid(outputs[:BATCH] - outputs[BATCH:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    last = steps // 10
    return model, tokenizer, sum(losses[-last:]) / last


def pool_of(found: Sequence[Row]) -> list[list[str]]:
    """Return the candidates of each question, in random order."""
    draw = random.Random(1)
    pools = []
    for each in found:
        pool = list(each["answers"])
        while len(pool) < POOL:
            text = draw.choice(draw.choice(found)["answers"])
            if text not in pool:
                pool.append(text)
        pools.append(draw.sample(pool, POOL))
    return pools


def judged(shared: Path, out: Path, found: Sequence[Row], pools: Sequence[Sequence[str]]) -> Tensor:
    """Return the judge's reward of every candidate, ``(questions, candidates)``, with mean 0 for each question."""
    file = out / "judged.json"
    if not file.is_file():
        rows = preferences(questions(shared, "train")[-JUDGE_ROWS:], "judge", seed=3)
        model, tokenizer, loss = train("judge", rows, JUDGE_STEPS)
        pairs = preferences(found, "judge", seed=4)
        with torch.no_grad():
            sides = [rewards(model, tokenizer, [row["prompt"] + row[side] for row in pairs]) for side in _SIDES]
            scores = [
                rewards(model, tokenizer, [f"{each['question']} {text}" for text in pool]).tolist()
                for each, pool in zip(found, pools, strict=True)
            ]
        accuracy = float((sides[0] > sides[1]).double().mean())
        print(json.dumps({"adapter": "judge", "training_loss": loss, "accuracy of pairs": accuracy}), flush=True)
        file.write_text(json.dumps(scores), encoding="utf-8")
    scores_of = torch.tensor(json.loads(file.read_text(encoding="utf-8")), dtype=torch.float64)
    return scores_of - scores_of.mean(dim=1, keepdim=True)


_SIDES = ("chosen", "rejected")


def best_of_n(
    model: ModelSettings, found: Sequence[Row], pools: Sequence[Sequence[str]], judge: Tensor
) -> dict[str, dict[str, float]]:
    """Return the judge's mean reward of the best of n by ``reward - k deviation``, and how often it is right.

    The candidates of n are the first n of the pool, among which the right answer may not be; it is with all of them.
    The gain is over ``k = 0``.
    """
    lines = [
        {"prompt": each["question"] + " ", "text": text}
        for each, pool in zip(found, pools, strict=True)
        for text in pool
    ]
    records = list(predict(model, PredictSettings(), lines))
    values = torch.tensor([[record["reward"], record["deviation"]] for record in records]).double()
    reward, deviation = values.reshape(len(found), POOL, 2).unbind(dim=2)
    right = torch.tensor([pool.index(each["answers"][each["right"]]) for each, pool in zip(found, pools, strict=True)])
    results: dict[str, dict[str, float]] = {}
    plain = judge.gather(1, reward.argmax(dim=1, keepdim=True))
    for penalty in PENALTIES:
        penalized = reward - penalty * deviation
        best = {number: penalized[:, :number].argmax(dim=1, keepdim=True) for number in NUMBERS}
        judges = {str(number): float(judge.gather(1, index).mean()) for number, index in best.items()}
        gain = judge.gather(1, best[POOL]) - plain
        results[str(penalty)] = {
            **judges,
            f"gain of {POOL}": float(gain.mean()),
            "its standard error": float(gain.std()) / len(found) ** 0.5,
            f"right of {POOL}": float((best[POOL][:, 0] == right).double().mean()),
        }
    return results


def main() -> None:
    """Train, fit, tune, score, and print one JSON line for each adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scored", type=int, default=400, help="validation rows, of which half tune the prior")
    parser.add_argument("--pools", type=int, default=100, help="questions of which the best of n is picked")
    parser.add_argument("--only", choices=sorted(SIZES), action="append")
    arguments = parser.parse_args()
    for name in arguments.only or SIZES:
        measure(name, arguments.shared, arguments.out, arguments.scored, arguments.pools)


def measure(name: Name, shared: Path, out: Path, scored: int, pools: int) -> None:
    """Train an adapter, or take the one of an earlier run; fit, tune and score it, and print the figures."""
    folder, (count, steps) = out / name, SIZES[name]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    regression = name == "words"
    task: Row = {"task": name, "likelihood": "gaussian" if regression else "preference"}
    task |= {"max_length": MAX_LENGTH if regression else 4 * MAX_LENGTH}
    if regression:
        task |= {"doc_to_inputs": "{{text}}", "doc_to_target": "{{letters}}", "truncate_field": "text"}
    (folder / "task.yaml").write_text(json.dumps(task), encoding="utf-8")
    parts = {}
    for split, limit in (("train", count), ("validation", scored)):
        found = (passages if regression else questions)(shared, split)
        # The last questions are those that answers are picked for.
        parts[split] = found[:limit] if regression else preferences(found[:limit], name, seed=len(split))
        text = "".join(json.dumps(row) + "\n" for row in parts[split])
        (folder / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    report: Row = {"adapter": name}
    if not (folder / "adapter").is_dir():
        begun = time.perf_counter()
        trained, _, report["training_loss"] = train(name, parts["train"], steps)
        trained.save_pretrained(str(folder / "adapter"))
        report["training_seconds"] = time.perf_counter() - begun
    model = ModelSettings(str(folder / "adapter"), base_model=str(base_model_folder()), device="cpu")
    begun = time.perf_counter()
    fit(model, DataSettings(str(folder / "task.yaml"), folder / "data"), FitSettings(overwrite=True))
    report["fit_seconds"] = time.perf_counter() - begun
    asked = questions(shared, "validation")[-pools:]
    candidates = pool_of(asked)
    for method in METHODS:
        if method != "none":
            report[f"{method}: prior"] = tune_prior(model, None, PriorSettings(method=method)).reason  # type: ignore[arg-type]
        if not regression and method in ("none", "auto"):
            judge = judged(shared, out, asked, candidates)
            report[f"{method}: best of n"] = best_of_n(model, asked, candidates, judge)
        settings = EvalSettings(methods=("constant", "map", "temperature", "laplace"))
        report[f"{method}: scores"] = [
            {key: value for key, value in result.items() if not isinstance(value, dict)}
            | {"nll_minus_map": result.get("difference_to_map", {}).get("nll")}
            for result in run_evaluation(model, DataSettings(), settings).record["results"]
        ]
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
