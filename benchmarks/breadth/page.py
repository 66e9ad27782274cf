"""The page docs/reference/coverage.md, made from the results."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import lapora

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "coverage.md"
Results = Mapping[str, Mapping[str, Any]]

HEAD = """\
# Coverage

Every base model type of the installed transformers, as a causal model and as a classifier, and every LoRA option of the
installed PEFT. Each case is a tiny model with random weights, saved by PEFT and loaded as `lapora fit` loads it.

A number is the error: the largest difference between the covariance of the logits and that of dense Jacobians of single
rows, relative to its largest entry, with all weights in one Gaussian; or the difference between padded batches and
single rows, if that is larger. It is in float64 where the model computes in it, else marked float32; many layers
compute in float32 whatever the dtype. A case is accepted below 1e-4 (float32: 1e-2). Everything else is refused, with
the words given here (exit status 3; 2 for an option). A cell is empty where PEFT makes no
such adapter, or no linear layer is called like queries and values.

Made on {date} with lapora {lapora}, transformers {transformers}, PEFT {peft} and PyTorch {torch} by
`python -m benchmarks.breadth`: {works} cases work, {refused} are refused.
"""


def write_page(results: Results, file: Path = PAGE) -> None:
    """Write the page.

    Raises:
        ValueError: A case neither works nor is refused; all are named.
    """
    bad = [key for key, each in results.items() if each["outcome"] not in ("works", "refused", "none")]
    if bad:
        raise ValueError(f"neither works nor refused: {', '.join(bad)}")
    file.write_text("\n".join(_lines(results)) + "\n", encoding="utf-8")


def _lines(results: Results) -> Iterable[str]:
    outcomes = [each["outcome"] for each in results.values()]
    yield HEAD.format(
        date=datetime.datetime.now(datetime.UTC).date(),
        lapora=lapora.__version__,
        transformers=transformers.__version__,
        peft=peft.__version__,
        torch=torch.__version__,
        works=outcomes.count("works"),
        refused=outcomes.count("refused"),
    )
    yield from ("## Options of LoRA", "", "| option | result |", "| --- | --- |")
    other_types = []
    for key, each in results.items():
        group, _, name = key.partition("/")
        if group == "lora" and name.startswith("peft_type: ") and each["outcome"] == "refused":
            other_types.append(name.removeprefix("peft_type: "))
        elif group == "lora" and each["outcome"] != "none":
            yield f"| {name} | {_cell(each)} |"
    if other_types:
        yield f"| peft_type: {', '.join(other_types)} | refused: peft_type ... is not supported; only LORA is |"
    for group, heading in (("causal", "Causal models"), ("classifier", "Classifiers")):
        yield from ("", f"## {heading}", "", "| type | queries and values | all linear layers |", "| --- | --- | --- |")
        names = sorted({key.split("/")[1] for key in results if key.startswith(f"{group}/")})
        for name in names:
            cells = [results.get(f"{group}/{name}/{targets}") for targets in ("attention", "all-linear")]
            yield f"| {name} | {' | '.join(map(_cell, cells))} |"


def _cell(each: Mapping[str, Any] | None) -> str:
    if each is None or each["outcome"] == "none":
        return ""
    if each["outcome"] == "refused":
        return f"refused: {_plain(each['words'])}"
    return f"{each['error']:.0e}" + (" (float32)" if each["dtype"] == "float32" else "")


def _plain(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;").replace("base_model.model.", "")[:400]
