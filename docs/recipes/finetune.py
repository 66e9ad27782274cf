"""Fine-tune LoRA on a lapora task with transformers and peft, and save checkpoints.

The defaults are those of Tables 1 and 2 of "Bayesian low-rank adaptation for large language models": r 8, alpha 16,
dropout 0.1, learning rate 5e-5 falling linearly, weight decay 0, 10,000 steps, a checkpoint every 1,000; batches of
32 rows and 256 tokens for a classifier, of 8 rows and 300 tokens for a causal language model. lapora renders prompts
and answers, so training and evaluation use the same text. The loss of a causal model is the cross-entropy of the right
answer's tokens, one or several.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lapora.tasks import encode_all, load_rows, load_task, render_all, resolve_choices

PAPER: dict[str, dict[str, Any]] = {
    "classifier": {"batch_size": 32, "max_length": 256, "targets": ["query", "value"]},
    "causal": {"batch_size": 8, "max_length": 300, "targets": ["q_proj", "v_proj", "lm_head"]},
}


class AnswerTrainer(Trainer):
    """A trainer of causal models that computes logits only at the tokens of the answers."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The cross-entropy of the answers' tokens, averaged over them."""
        labels = inputs.pop("labels")[:, 1:]
        kept = (labels != -100).any(dim=0).nonzero().squeeze(1)
        outputs = model(**inputs, logits_to_keep=kept)
        loss = cross_entropy(outputs.logits.float().flatten(0, 1), labels[:, kept].flatten())
        return (loss, outputs) if return_outputs else loss


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--kind", choices=sorted(PAPER), required=True)
    parser.add_argument("--data", required=True, metavar="TASK", help="built-in task, or a YAML file")
    parser.add_argument("--data-dir", type=Path, help="folder with train.jsonl; by default the Hub")
    parser.add_argument("--limit", type=int, help="maximum number of training rows")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--save-every", type=int, default=1_000)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, help="32 for a classifier, 8 for a causal model")
    parser.add_argument("--max-length", type=int, help="256 for a classifier, 300 for a causal model")
    parser.add_argument("--target-modules", nargs="+", help="query value, or q_proj v_proj lm_head")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the base's weights")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train."""
    options = arguments()
    paper = PAPER[options.kind]
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.base_model)
    rows, choices = training_rows(options, tokenizer, options.max_length or paper["max_length"])
    causal = options.kind == "causal"
    loader = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    settings = {} if causal else {"num_labels": len(choices)}
    base = loader.from_pretrained(options.base_model, dtype=getattr(torch, options.dtype), **settings)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=options.target_modules or paper["targets"],
        task_type="CAUSAL_LM" if causal else "SEQ_CLS",
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if base.config.pad_token_id is None:
        base.config.pad_token_id = pad
    trainer = (AnswerTrainer if causal else Trainer)(
        model=get_peft_model(base, lora),
        args=TrainingArguments(
            output_dir=options.output_dir,
            max_steps=options.steps,
            save_steps=options.save_every,
            save_only_model=True,
            learning_rate=options.learning_rate,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            per_device_train_batch_size=options.batch_size or paper["batch_size"],
            remove_unused_columns=False,
            logging_steps=max(1, options.steps // 10),
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=rows,
        data_collator=lambda batch: collate(batch, pad),
    )
    trainer.train()


def training_rows(options: argparse.Namespace, tokenizer: Any, max_length: int) -> tuple[list[dict[str, Any]], Any]:
    """Token ids and labels: a class, or, of a causal model, the tokens of the right answer after the prompt."""
    task = load_task(options.data)
    loaded = load_rows(task, "train", data_dir=options.data_dir, limit=options.limit)
    choices = resolve_choices(task, loaded, kind=options.kind)
    examples = render_all(task, loaded, kind=options.kind, choices=choices)
    coded = encode_all(examples, tokenizer, kind=options.kind, max_length=max_length, answer_score="sum")
    if options.kind == "classifier":
        rows = [
            {"ids": row.input_ids, "types": row.token_type_ids, "labels": example.target}
            for row, example in zip(coded, examples, strict=True)
        ]
        return rows, choices
    rows = []
    for row, example in zip(coded, examples, strict=True):
        answer = row.answers[example.target]
        ids = [*row.input_ids, *answer.ids]
        rows.append({"ids": ids, "labels": [-100] * (len(ids) - answer.scored) + ids[len(ids) - answer.scored :]})
    return rows, choices


def collate(batch: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Pad to the longest row, on the right."""
    longest = max(len(row["ids"]) for row in batch)
    ids = torch.tensor([row["ids"] + [pad] * (longest - len(row["ids"])) for row in batch])
    mask = torch.tensor([[1] * len(row["ids"]) + [0] * (longest - len(row["ids"])) for row in batch])
    labels = [row["labels"] for row in batch]
    if isinstance(labels[0], list):
        labels = [label + [-100] * (longest - len(label)) for label in labels]
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}
    if batch[0].get("types") is not None:
        inputs["token_type_ids"] = torch.tensor([row["types"] + [0] * (longest - len(row["ids"])) for row in batch])
    return inputs


if __name__ == "__main__":
    main()
