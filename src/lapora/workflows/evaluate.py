"""``lapora eval``: MAP, every link asked for, and the constant predictor, on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lapora import metrics
from lapora.config import DEFAULT_SAMPLES, DataSettings, Link, ModelSettings, Progress
from lapora.errors import DataError
from lapora.workflows.scoring import LabelledRows, read_labelled_rows, score_rows
from lapora.workflows.session import Session, open_posterior, open_session


def evaluate(
    model: ModelSettings,
    data: DataSettings,
    *,
    names: Sequence[str] = ("default",),
    links: Sequence[Link] = ("mc-joint",),
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score posteriors against labels. Rows that tuned any of their priors are left out.

    Args:
        model: The adapter and how to run it.
        data: The rows; by default the validation split of what ``fit`` recorded.
        names: Saved posteriors.
        links: Links to score for each.
        samples: Points of the sampling links.
        seed: Their scrambling.
        progress: Told of rows done.

    Returns:
        The record that ``eval --json`` prints, with ``warnings`` added.

    Raises:
        DataError: The rows have no labels, or their answers are not the posterior's.
    """
    if not names:
        raise DataError("no posterior to evaluate; give --name")
    tuned_on = frozenset(digest for name in names for digest in _tuning_rows(model, name))
    results: list[dict[str, Any]] = []
    warnings: list[str] = []
    record: dict[str, Any] = {}
    session: Session | None = None
    for name in names:
        session = open_session(model, name, session)
        rows = read_labelled_rows(session, data, exclude=tuned_on)
        scored = score_rows(session, rows, links, samples=samples, seed=seed, progress=progress)
        log_p = {link: table[0] for link, table in scored.log_p.items()}
        with_mcc = rows.task.metric == "mcc"
        if not results:
            record = {
                "task": rows.task.task,
                "split": rows.split,
                "n": len(rows.examples),
                "excluded": rows.excluded,
                "truncated": scored.truncated,
            }
            constant = metrics.constant_predictor(rows.targets, len(session.choices))
            results.append({"method": "constant", **metrics.evaluate(constant, rows.targets, with_mcc=with_mcc)})
            results.append({"method": "map", **metrics.evaluate(log_p["map"], rows.targets, with_mcc=with_mcc)})
        for link in links:
            scores = metrics.evaluate(log_p[link], rows.targets, with_mcc=with_mcc)
            results.append({"method": "laplace", "name": name, "link": link, **scores})
            if link != "map":
                warnings += _warn(session, link, rows, log_p[link], log_p["map"], scores["accuracy"])
    return {**record, "results": results, "warnings": warnings}


def _tuning_rows(model: ModelSettings, name: str) -> list[str]:
    _, posterior = open_posterior(model, name)
    found: list[str] = posterior.manifest["prior"].get("validation", {}).get("rows", [])
    return found


def _warn(
    session: Session, link: Link, rows: LabelledRows, log_p: torch.Tensor, log_map: torch.Tensor, accuracy: float
) -> list[str]:
    """Where Laplace is worse than MAP beyond chance: how, and the command that mends it."""
    differences = metrics.row_nll(log_p, rows.targets) - metrics.row_nll(log_map, rows.targets)
    worse = float(differences.mean())
    if worse <= 0:
        return []
    low, high = metrics.paired_interval(differences)
    name = session.posterior.folder.name
    interval = f"{worse:.4f} a row, 95 % interval {low:.4f} to {high:.4f}, {len(differences)} rows"
    if low <= 0:
        return [f"note: {name} ({link}) is no better than MAP in NLL on these rows ({interval})"]
    confidence = float(log_p.exp().max(dim=1).values.mean())
    direction = "underconfident" if confidence < accuracy else "overconfident"
    return [
        f"warning: {name} ({link}) is worse than MAP in NLL by {interval}, and {direction} (confidence "
        f"{confidence:.2f}, accuracy {accuracy:.2f}); {_remedy(session, link)}"
    ]


def _remedy(session: Session, link: Link) -> str:
    prior = session.posterior.manifest["prior"]
    folder = session.posterior.folder
    command = f"lapora tune-prior {folder.parent.parent} --name {folder.name} --method validation"
    if prior["method"] != "validation":
        return f"tune the prior on validation rows: {command}"
    if prior["validation"]["link"] != link:
        return f"the prior was tuned for {prior['validation']['link']}: {command} --link {link}"
    return "the tuning rows said otherwise: tune on more rows (--limit), or predict with --link map"
