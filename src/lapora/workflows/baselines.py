"""Baselines: temperature scaling, MC dropout and an ensemble of adapters."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lapora.config import DataSettings, Dtype, EvalSettings, ModelSettings
from lapora.errors import AdapterError, LaporaWarning, MissingSplitError, UnlabelledError, UsageError
from lapora.likelihoods.base import Likelihood
from lapora.models.adapter import CONFIG_FILE, Adapter, fetch_adapter, is_hub_id, read_adapter
from lapora.models.lora_layers import lora_dropout_on, lora_dropouts
from lapora.models.outputs import OutputModel
from lapora.models.shared_base import BaseCache
from lapora.posterior.averaging import TEMPERATURE_WIDTH
from lapora.workflows.rows import LabelledRows, TuningRows, are_training_rows, read_labelled_rows, row_digest
from lapora.workflows.scoring import Prediction, forward_table
from lapora.workflows.task_model import Fitted


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature.

    Attributes:
        value: T.
        split: Split of the rows that it was fitted on.
        count: Number of these rows, duplicates included.
        rows: Their digests; these rows are not scored.
        notes: What the user should know.
    """

    value: float
    split: str
    count: int
    rows: frozenset[str]
    notes: tuple[str, ...] = ()

    def predict(self, likelihood: Likelihood, at_map: Tensor) -> Prediction:
        """Return the scaled predictions from the plain adapter's."""
        details = {"temperature": self.value, "fitted_on": {"split": self.split, "n": self.count}}
        return Prediction("temperature", likelihood.scaled(at_map, self.value), details=details)


def fit_temperature(
    fitted: Fitted, tuned_on: Mapping[str, TuningRows], data: DataSettings, settings: EvalSettings
) -> Temperature:
    """Fit the temperature on rows that are not scored.

    The rows are those of ``temperature_split``, else those that tuned a prior, else the seeded half of the evaluated
    split that ``tune-prior`` would use.

    Raises:
        UsageError: ``temperature_split`` is the split that the adapter was trained on.
        DataError: There are no such rows.
    """
    evaluated = data.split or "validation"
    split = settings.temperature_split
    if split is not None and are_training_rows(fitted.posterior.manifest, replace(data, split=split)):
        raise UsageError(f"--temperature-split {split}: the adapter was trained on these rows; give another split")
    notes: tuple[str, ...] = ()
    rows = None
    for record in tuned_on.values():
        if rows is None and split in (None, record.split):
            rows = _recorded_rows(fitted, data, record.split, record.rows)
            if rows is None:
                notes = ("the rows that tuned the prior are not in this data: the temperature is fitted on other rows",)
    if rows is None:
        rows = read_labelled_rows(
            fitted.posterior, fitted.model.kind, DataSettings(data.task, data.data_dir, split or evaluated)
        )
        if rows.split == evaluated:
            rows = rows.chosen(max(1, len(rows.examples) // 2), settings.seed)
    at_map = forward_table(fitted.model, fitted.model.encode(rows.examples))
    digests = frozenset(row_digest(example) for example in rows.examples)
    value = fitted.model.likelihood.fit_temperature(at_map, rows.targets, width=TEMPERATURE_WIDTH)
    return Temperature(value, rows.split, len(rows.examples), digests, notes)


def _recorded_rows(fitted: Fitted, data: DataSettings, split: str, digests: Sequence[str]) -> LabelledRows | None:
    """Return the rows of these digests, each as often as it is among them."""
    try:
        rows = read_labelled_rows(fitted.posterior, fitted.model.kind, DataSettings(data.task, data.data_dir, split))
    except (MissingSplitError, UnlabelledError):
        return None
    missing = Counter(digests)
    found = []
    for index, example in enumerate(rows.examples):
        digest = row_digest(example)
        if missing[digest] > 0:
            missing[digest] -= 1
            found.append(index)
    return rows.only(found) if found else None


def oracle_temperature(likelihood: Likelihood, at_map: Tensor, targets: Tensor) -> Prediction:
    """Return predictions at the temperature fitted on the scored rows: an upper bound for temperature scaling."""
    value = likelihood.fit_temperature(at_map, targets)
    return Prediction("temperature (oracle)", likelihood.scaled(at_map, value), details={"temperature": value})


def mc_dropout(fitted: Fitted, sets: Sequence[LabelledRows], passes: int, seed: int) -> list[Prediction]:
    """Average the predictions of passes with the adapter's dropout enabled.

    Raises:
        UsageError: The adapter has no dropout.
    """
    layers = lora_dropouts(fitted.model.loaded.model)
    if not layers:
        raise UsageError("mc-dropout: the adapter's lora_dropout is 0, so that every pass would be the same")
    found = []
    with lora_dropout_on(fitted.model.loaded.model, seed + fitted.model.processes.rank):
        for rows in sets:
            coded = fitted.model.encode(rows.examples)
            drawn = [forward_table(fitted.model, coded) for _ in range(passes)]
            details = {"passes": passes, "dropout": max(layer.p for layer in layers)}
            found.append(_averaged(fitted.model.likelihood, "mc-dropout", torch.stack(drawn), details))
    return found


def ensemble(
    model: ModelSettings,
    fitted: Fitted,
    sets: Sequence[LabelledRows],
    at_map: Sequence[Tensor],
    paths: Sequence[Path],
) -> list[Prediction]:
    """Average the predictions of ADAPTER and other adapters of the same base.

    Args:
        model: How to run them.
        fitted: The fitted adapter.
        sets: Sets of rows.
        at_map: Predictions of ADAPTER for each set.
        paths: Adapters, or folders with ``checkpoint-*``.

    Raises:
        AdapterError: A member cannot be read, or has another base or kind.
        UsageError: There is no member but ADAPTER itself.
    """
    members = _members(model, fitted, paths)
    bases = BaseCache()
    tables = [[own] for own in at_map]
    for member in members:
        for table, found in zip(tables, _member_tables(model, fitted, member, sets, bases), strict=True):
            table.append(found)
    details = {"members": 1 + len(members)}
    return [_averaged(fitted.model.likelihood, "ensemble", torch.stack(table), details) for table in tables]


def read_members(paths: Sequence[Path]) -> list[Adapter]:
    """Read the adapters of an ensemble: adapters, and the checkpoints of training runs.

    Raises:
        AdapterError: A member cannot be read.
    """
    found = []
    for given in paths:
        path = fetch_adapter(str(given)) if is_hub_id(str(given)) else given
        folders = [path] if (path / CONFIG_FILE).is_file() else [folder for _, folder in checkpoint_folders(path)]
        found += [read_adapter(folder) for folder in folders or [path]]
    return found


_KINDS = {"causal": "a causal language model", "classifier": "a classifier"}


def _members(model: ModelSettings, fitted: Fitted, paths: Sequence[Path]) -> list[Adapter]:
    own = read_adapter(model.folder)
    members: dict[str, Adapter] = {}
    for adapter in read_members(paths):
        if adapter.kind != fitted.model.kind:
            raise AdapterError(
                f"--ensemble {adapter.path} is {_KINDS[adapter.kind]}, and ADAPTER {_KINDS[fitted.model.kind]}; give "
                "adapters of the same kind"
            )
        _warn_of_another_base(adapter, own)
        members[adapter.sha256] = adapter
    members.pop(fitted.posterior.manifest.adapter, None)
    if not members:
        raise UsageError("--ensemble: no other adapter than ADAPTER itself; give one with other weights")
    return list(members.values())


def _warn_of_another_base(member: Adapter, own: Adapter) -> None:
    """Warn if a member records another base than ADAPTER, on whose base it is run."""
    names = [each.base_model or "none" for each in (member, own)]
    paths = [Path(name).resolve() if Path(name).exists() else name for name in names]
    if (paths[0], member.revision) != (paths[1], own.revision):
        warnings.warn(
            f"--ensemble {member.path}: its base is {names[0]}{_of(member.revision)}, and it is scored on ADAPTER's, "
            f"{names[1]}{_of(own.revision)}",
            LaporaWarning,
            stacklevel=2,
        )


def _of(revision: str | None) -> str:
    return "" if revision is None else f" (revision {revision})"


def _member_tables(
    model: ModelSettings, fitted: Fitted, member: Adapter, sets: Sequence[LabelledRows], bases: BaseCache
) -> list[Tensor]:
    own = fitted.model.loaded
    how = replace(model, base_model=None, quantize=own.quantize, dtype=cast(Dtype, own.dtype))
    loaded = bases.load(member.on_base(own.base_model, own.revision), how)
    if loaded.number_of_labels != own.number_of_labels:
        raise AdapterError(
            f"--ensemble {member.path}: {loaded.number_of_labels} outputs, and ADAPTER has {own.number_of_labels}; "
            "give adapters with as many"
        )
    outputs = OutputModel(loaded.model, loaded.kind, loaded.pad_token_id, fitted.model.token_ids)
    outputs.output_order = fitted.model.outputs.output_order
    outputs.equal_lengths = fitted.model.outputs.equal_lengths
    there = replace(fitted.model, loaded=loaded, outputs=outputs)
    return [forward_table(there, there.encode(rows.examples)) for rows in sets]


def _averaged(likelihood: Likelihood, method: str, drawn: Tensor, details: dict[str, Any]) -> Prediction:
    """Average predictions ``(S, N, ...)``, and compute the mutual information of target and member."""
    table = likelihood.mixture(drawn)
    members = torch.stack([likelihood.uncertainty(each)["entropy"] for each in drawn])
    information = likelihood.uncertainty(table)["entropy"] - members.mean(dim=0)
    return Prediction(method, table, details=details, mutual_information=information.clamp(min=0.0))


def checkpoint_folders(run: Path) -> list[tuple[int, Path]]:
    """Return training step and folder of every checkpoint with an adapter, in the order of training."""
    if not run.is_dir():
        return []
    found = []
    for folder in run.iterdir():
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and (folder / CONFIG_FILE).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)
