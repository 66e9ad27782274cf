"""``lapora eval``: MAP, every link asked for, and the constant predictor, on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from lapora import metrics
from lapora.config import DEFAULT_SAMPLES, DataSettings, Link, ModelSettings
from lapora.errors import DataError, PosteriorError
from lapora.predictive.links import log_probabilities, needs_every_class
from lapora.predictive.moments import LogitMoments
from lapora.tasks import render_all, resolve_choices
from lapora.workflows.fit import Progress
from lapora.workflows.session import open_session, read_rows


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
    """Score posteriors against labels.

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
    results: list[dict[str, Any]] = []
    warnings: list[str] = []
    record: dict[str, Any] = {}
    for name in names:
        session = open_session(model, name)
        task, rows, split = read_rows(data, session.posterior.manifest, "validation")
        kind = session.loaded.kind
        choices = resolve_choices(task, rows)
        if choices != session.choices:
            raise PosteriorError(
                f"posterior {name}: fitted to the answers {', '.join(session.choices)}; task {task.task} has "
                f"{', '.join(choices)}; give the task that it was fitted on"
            )
        examples = render_all(task, rows, kind=kind, choices=session.choices, labels="required")
        targets = torch.tensor([cast(int, example.target) for example in examples])
        coded = session.encode(examples)
        truncated = sum(row.truncated for row in coded)
        classes = len(session.choices)
        every_class = any(needs_every_class(link) for link in links)
        log_p: dict[Link, torch.Tensor] = {
            link: torch.zeros(len(examples), classes, dtype=torch.float64) for link in ("map", *links)
        }
        done = 0
        with session.predictor(every_class=every_class) as predictor:
            for batch in session.batches(coded):
                moments: LogitMoments = predictor.moments(batch)
                for link, table in log_p.items():
                    table[list(batch.rows)] = log_probabilities(link, moments, samples=samples, seed=seed)
                done += len(batch)
                if progress is not None:
                    progress(done, len(examples))
        with_mcc = task.metric == "mcc"
        if not results:
            record = {"task": task.task, "split": split, "n": len(examples), "truncated": truncated}
            constant = metrics.constant_predictor(targets, classes)
            results.append({"method": "constant", **metrics.evaluate(constant, targets, with_mcc=with_mcc)})
            results.append({"method": "map", **metrics.evaluate(log_p["map"], targets, with_mcc=with_mcc)})
        for link in links:
            scores = metrics.evaluate(log_p[link], targets, with_mcc=with_mcc)
            results.append({"method": "laplace", "name": name, "link": link, **scores})
            warnings += _warn(name, link, scores, results[1], log_p[link], len(examples))
    if not results:
        raise DataError("no posterior to evaluate; give --name")
    return {**record, "results": results, "warnings": warnings}


def _warn(
    name: str, link: Link, scores: dict[str, float], at_map: dict[str, Any], log_p: torch.Tensor, rows: int
) -> list[str]:
    if scores["nll"] <= at_map["nll"]:
        return []
    confidence = float(log_p.exp().max(dim=1).values.mean())
    direction = "underconfident" if confidence < scores["accuracy"] else "overconfident"
    return [
        f"{name} ({link}) is worse than MAP in NLL ({scores['nll']:.3f} against {at_map['nll']:.3f}, {rows} rows) "
        f"and {direction} (confidence {confidence:.2f}, accuracy {scores['accuracy']:.2f}): "
        "do not use it here; predict with --link map"
    ]
