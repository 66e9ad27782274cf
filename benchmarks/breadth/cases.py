"""The cases: every model type of the auto classes, and every option of ``LoraConfig``."""

from __future__ import annotations

from typing import get_args

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from benchmarks.breadth.check import Case
from lapora.models.adapter import ModelKind

MAPPINGS: dict[ModelKind, dict[str, str]] = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classifier": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def model_cases() -> list[Case]:
    """Return every model type with LoRA on queries and values, and on all linear layers."""
    return [
        Case(kind, name, targets, name, kind)
        for kind in get_args(ModelKind)
        for name in sorted(MAPPINGS[kind])
        for targets in ("attention", "all-linear")
    ]
