"""What ``fit`` needs before its first pass: the adapter on its base model, and its training rows as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lapora._version import __version__
from lapora.config import DataSettings, FitSettings, ModelSettings, Progress
from lapora.errors import DataError, UsageError
from lapora.model.adapter import Adapter, read_adapter
from lapora.model.answers import AnswerModel
from lapora.model.bases import SharedBases
from lapora.model.batch_feed import BatchFeed, BatchSize
from lapora.model.bayesian_layers import find_bayesian_layers
from lapora.model.fingerprint import library_versions
from lapora.model.loading import LoadedModel, load_model
from lapora.posterior.artifact import FORMAT_VERSION
from lapora.posterior.curvature_run import CurvatureRun
from lapora.processes import ALONE, Processes
from lapora.tasks import (
    EncodedExample,
    Example,
    Row,
    Task,
    answer_token_ids,
    data_fingerprint,
    encode_all,
    render_all,
    resolve_choices,
)
from lapora.workflows.identity import adapter_settings, base_digests, tokenizer_digest
from lapora.workflows.session import read_rows


@dataclass(frozen=True)
class PreparedFit:
    """A loaded adapter and its training rows, ready for any structure of the curvature.

    Attributes:
        adapter: The adapter's files.
        loaded: Model and tokenizer.
        answers: The network to answer logits.
        task: The task.
        choices: The answers.
        token_ids: Their tokens, for a causal model.
        examples: The training rows.
        encoded: Their token ids.
        split: The split they came from.
        max_length: Tokens a row may have.
        data: What was asked for.
        batch_size: How large batches are; it learns what fits.
        chat_template: Whether prompts are wrapped in the tokenizer's chat template.
        processes: Those that share the rows.
    """

    adapter: Adapter
    loaded: LoadedModel
    answers: AnswerModel
    task: Task
    choices: tuple[str, ...]
    token_ids: list[int] | None
    examples: list[Example]
    encoded: list[EncodedExample]
    split: str
    max_length: int
    data: DataSettings
    batch_size: BatchSize
    chat_template: bool
    processes: Processes

    def run(self, settings: FitSettings, progress: Progress | None = None) -> CurvatureRun:
        """The passes over the data that a structure is made of."""
        return CurvatureRun(
            answers=self.answers,
            layers=find_bayesian_layers(self.loaded.model, settings.subset),
            batches=lambda: BatchFeed(self.answers, self.encoded, self.batch_size, self.processes),
            targets=[example.target for example in self.examples],
            classes=len(self.choices),
            fisher=settings.fisher,
            weight_sharing=settings.weight_sharing,
            rank=settings.rank,
            seed=settings.seed,
            progress=progress,
            processes=self.processes,
            offload=settings.offload_factors,
        )

    def identity(self, settings: FitSettings) -> dict[str, Any]:
        """Everything that decides the sums of a pass, for ``--resume``: its settings, its rows, its batches."""
        described = self.describe()
        del described["data"]["data_dir"], described["data"]["limit"]
        tokens = hashlib.sha256()
        for row in self.encoded:
            tokens.update(json.dumps([row.input_ids, row.token_type_ids]).encode("ascii"))
        chosen = ("structure", "weight_sharing", "fisher", "subset", "rank", "seed")
        return {
            **described,
            **{key: getattr(settings, key) for key in chosen},
            "batch_size": self.batch_size.rows,
            "tokens": tokens.hexdigest(),
            "device": self.answers.device.type,
            "processes": self.processes.count,
        }

    def describe(self) -> dict[str, Any]:
        """The manifest's fields about adapter, base model, task and data."""
        loaded = self.loaded
        return {
            "format_version": FORMAT_VERSION,
            "lapora_version": __version__,
            "libraries": library_versions(),
            "adapter": self.adapter.sha256,
            "adapter_config": adapter_settings(self.adapter),
            "tokenizer": tokenizer_digest(loaded.tokenizer, self.chat_template),
            "base_model": {
                "name": loaded.base_model,
                "revision": loaded.revision,
                "quantization": loaded.quantize,
                "dtype": loaded.dtype,
                "fingerprint": loaded.fingerprint,
                "digests": base_digests(loaded),
            },
            "task": self.task.to_dict(),
            "answers": {"choices": list(self.choices), "token_ids": self.token_ids},
            "data": {
                "split": self.split,
                "n": len(self.examples),
                "fingerprint": data_fingerprint(self.examples),
                "data_dir": str(Path(self.data.data_dir).resolve()) if self.data.data_dir else None,
                "limit": self.data.limit,
                "max_length": self.max_length,
                "chat_template": self.chat_template,
            },
        }


def prepare_fit(
    model: ModelSettings, data: DataSettings, settings: FitSettings, bases: SharedBases | None = None
) -> PreparedFit:
    """Load an adapter and the rows it was trained on.

    Args:
        model: The adapter and how to run it.
        data: The rows; the split ``train`` by default.
        settings: Greatest length, chat template, and whether labels are needed.
        bases: Base models that other adapters are put on too.

    Raises:
        AdapterError: The model cannot be loaded.
        DataError: The rows cannot be read, or their answers are not the head's.
    """
    adapter = read_adapter(model.folder)
    task, rows, split = read_rows(data, None, "train")

    def load() -> LoadedModel:
        return (load_model if bases is None else bases.load)(
            adapter,
            base_model=model.base_model,
            quantize=model.quantize,
            dtype=model.dtype or "auto",
            device=model.device,
            spread=model.spread,
            trust_remote_code=model.trust_remote_code,
        )

    data = replace(data, split=split)
    prepared = prepare_rows(adapter, load, task, rows, data, settings, model.batch_size, model.processes)
    prepared.answers.rerun_blocks |= model.gradient_checkpointing
    return prepared


def prepare_rows(
    adapter: Adapter,
    load: Callable[[], LoadedModel],
    task: Task,
    rows: Sequence[Row | Mapping[str, Any]],
    data: DataSettings,
    settings: FitSettings,
    batch_size: int | None,
    processes: Processes = ALONE,
) -> PreparedFit:
    """Render rows, then load the model, then encode: what is wrong with the rows is said before anything slow.

    Args:
        adapter: The adapter's files.
        load: Gives the model.
        task: The task.
        rows: The training rows.
        data: Where they come from, with the split's name.
        settings: Greatest length, chat template, and whether labels are needed.
        batch_size: Rows per batch, or None for a token budget.
        processes: Those that share the rows.

    Raises:
        AdapterError: The model cannot be loaded.
        DataError: The rows cannot be read, or their answers are not the head's.
    """
    choices = resolve_choices(task, rows)
    examples = render_all(
        task,
        rows,
        kind=adapter.kind,
        choices=choices,
        labels="required" if settings.fisher == "empirical" else "optional",
    )
    loaded = load()
    token_ids = _answers(loaded, task, examples, choices, settings.chat_template)
    max_length = settings.max_length or task.max_length_for(adapter.kind)
    encoded = encode_all(
        examples,
        loaded.tokenizer,
        kind=adapter.kind,
        max_length=max_length,
        task=task,
        chat_template=settings.chat_template,
    )
    return PreparedFit(
        adapter=adapter,
        loaded=loaded,
        answers=AnswerModel(loaded.model, loaded.kind, loaded.pad_token_id, token_ids),
        task=task,
        choices=choices,
        token_ids=token_ids,
        examples=examples,
        encoded=encoded,
        split=data.split or "train",
        max_length=max_length,
        data=data,
        batch_size=BatchSize(batch_size),
        chat_template=settings.chat_template,
        processes=processes,
    )


def _answers(
    loaded: LoadedModel, task: Task, examples: Sequence[Example], choices: Sequence[str], chat_template: bool
) -> list[int] | None:
    if loaded.kind == "causal":
        return answer_token_ids(
            loaded.tokenizer,
            [example.text or "" for example in examples],
            choices,
            delimiter=task.target_delimiter,
            chat_template=chat_template,
            labels=[example.where for example in examples],
        )
    if chat_template:
        raise UsageError("--chat-template wraps the prompt of a causal language model; this adapter is a classifier")
    if loaded.number_of_labels != len(choices):
        raise DataError(
            f"task {task.task} has {len(choices)} answers and the adapter's head {loaded.number_of_labels} outputs; "
            "give the task the adapter was trained on"
        )
    return None
