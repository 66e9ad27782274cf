"""The section about a posterior in the model card of its adapter's repository."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lapora.config import method_label
from lapora.errors import printable
from lapora.storage.manifest import Manifest, Prior

_SCORES = ("accuracy", "f1_micro", "f1_macro", "rmse", "ece", "nll", "crps", "brier")


def with_section(card: str, name: str, section: str) -> str:
    """Return the card with the section of a posterior: replaced if it is there, else appended.

    Args:
        card: The present card.
        name: Name of the posterior; each has its own section.
        section: The text of the section.
    """
    begin, end = f"<!-- lapora {name}: begin -->", f"<!-- lapora {name}: end -->"
    block = f"{begin}\n{section.strip()}\n{end}"
    present = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if present.search(card):
        return present.sub(lambda _: block, card, count=1)
    return f"{card.rstrip()}\n\n{block}\n" if card.strip() else f"{block}\n"


def posterior_section(
    manifest: Manifest,
    prior: Prior,
    name: str,
    repository: str,
    scores: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> str:
    """Return the section of a posterior in Markdown: what it is, its scores, how to use it.

    Args:
        manifest: Manifest of the posterior.
        prior: Its prior.
        name: Its name.
        repository: Repository of the adapter.
        scores: A record of ``lapora eval``, added as a table.
        revision: Branch of the repository, or None for the default branch.
    """
    base = manifest.base_model
    asked = ("" if name == "default" else f" --name {name}") + (f" --revision {revision}" if revision else "")
    facts = {
        "method": "Laplace-LoRA ([Yang et al. 2024](https://arxiv.org/abs/2308.13111)), fitted after training",
        "structure": f"{manifest.structure}, {manifest.weight_sharing}, {manifest.fisher} Fisher",
        "weights": f"{manifest.subset}, {len(manifest.parameters)} matrices",
        "prior precision": f"{_chosen(prior)}",
        "task": f"{manifest.task['task']}: {manifest.answers.describe()}",
        "rows": f"{manifest.data.n} of {manifest.data.split}",
        "base model": f"{base.name} ({base.dtype}, quantization {base.quantization})",
    }
    lines = [f"## Calibrated probabilities: posterior `{name}`", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in facts.items()]
    lines += ["", "```sh", f"lapora predict {repository} rows.jsonl{asked} > predictions.jsonl", "```"]
    if scores is not None:
        lines += ["", f"{_cell(scores['task'])}, {scores['n']} rows of {_cell(scores['split'])}:", ""]
        shown = [key for key in _SCORES if any(key in result for result in scores["results"])]
        lines += [f"| | {' | '.join(shown)} |", f"| --- |{' --- |' * len(shown)}"]
        for result in scores["results"]:
            label = method_label(result["method"], result.get("name"), result.get("link"))
            cells = ["" if result.get(key) is None else f"{result[key]:.3f}" for key in shown]
            lines.append(f"| {_cell(label)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _chosen(prior: Prior) -> str:
    if prior.averaged is not None and len(prior.averaged.precisions) > 1:
        return f"averaged around {prior.precisions.describe()}"
    return f"{prior.precisions.describe()}, by {prior.method}"


def _cell(text: Any) -> str:
    """Escape a table cell: bars, markup and line breaks that the data may contain."""
    return printable(str(text), 300).replace("|", "\\|").replace("<", "&lt;")
