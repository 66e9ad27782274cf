"""Score every link on one real adapter, as Markdown tables, with the posterior of ``lapora fit`` with defaults.

``python -m benchmarks.links [boolq|source2|source5|demo] [--validation]``. The prior is chosen by marginal
likelihood, the same for all links. ``--validation`` adds a table with the prior tuned for each link on half of
the rows, scored on the other half.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from benchmarks.shared_adapters import ADAPTERS
from lapora.config import DataSettings, FitSettings, Link, ModelSettings, PriorSettings
from lapora.workflows.evaluate import evaluate
from lapora.workflows.fit import fit
from lapora.workflows.tune_prior import tune_prior

LINKS: tuple[Link, ...] = tuple(link for link in get_args(Link) if link != "map")


def main() -> None:
    chosen = ADAPTERS[sys.argv[1] if len(sys.argv) > 1 else "demo"]
    with tempfile.TemporaryDirectory() as folder:
        model, data = chosen.place(Path(folder))
        fit(model, data, FitSettings(max_length=chosen.max_length, name="links"))
        scored = DataSettings(split="validation", limit=chosen.scored)
        for line in [
            chosen.name,
            *one_prior(model, scored),
            *(own_priors(model) if "--validation" in sys.argv else []),
        ]:
            print(line, flush=True)


def one_prior(model: ModelSettings, scored: DataSettings) -> Iterator[str]:
    """Score all links with the prior by marginal likelihood."""
    record = evaluate(model, scored, names=["links"], links=LINKS)
    yield f"{record['n']} rows, marginal likelihood"
    for result in record["results"]:
        yield _row(result)


def own_priors(model: ModelSettings) -> Iterator[str]:
    """Score each link with the prior tuned for it."""
    for link in LINKS:
        tuned = tune_prior(model, settings=PriorSettings(name="links", method="validation", link=link))
        record = evaluate(model, DataSettings(split="validation"), names=["links"], links=[link])
        if link == LINKS[0]:
            yield f"{record['n']} other rows, validation"
            yield from map(_row, record["results"][:2])
        yield _row(record["results"][-1], tuned.precision.describe())


def _row(result: dict[str, Any], precision: str = "") -> str:
    scores = [f"{result[key]:.3f}" for key in ("accuracy", "nll", "ece")]
    return "| " + " | ".join([result.get("link", result["method"]), precision, *scores]) + " |"


if __name__ == "__main__":
    main()
