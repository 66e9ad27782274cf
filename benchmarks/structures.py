"""Compare all structures on one real adapter: calibration, time and size, as a Markdown table.

``python -m benchmarks.structures [boolq|source2|source5|demo] [--brief]``. Times exclude loading: fit is the passes
over the rows and the decompositions, predict the linearized prediction of the scored rows.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.shared_adapters import ADAPTERS, BenchmarkAdapter
from lapora import metrics
from lapora.config import DataSettings, FitSettings, PriorMethod, PriorSettings
from lapora.workflows import fit as fitting
from lapora.workflows.fit import prepare_fit
from lapora.workflows.rows import read_labelled_rows
from lapora.workflows.scoring import score_rows
from lapora.workflows.task_model import open_fitted
from lapora.workflows.tune_prior import tune_prior

SAME_POSTERIOR = {"`full`, adapted evidence": "`full`"}
"""Table rows that tune another row's posterior with another method."""

ONLY_IN_DETAIL = ("rank 16", "rank 64", "rank 50", "reduce basis", "all (")
"""Omitted with --brief."""

METHODS: dict[str, tuple[FitSettings, PriorMethod]] = {
    "paper's stack (`--engine asdl`)": (FitSettings(engine="asdl"), "marglik"),
    "`kron`, expand": (FitSettings(), "marglik"),
    "`kron`, reduce": (FitSettings(weight_sharing="reduce"), "marglik"),
    "`kron`, expand, rank 16": (FitSettings(rank=16), "marglik"),
    "`kron`, expand, rank 64": (FitSettings(rank=64), "marglik"),
    "`kron`, expand, rank full": (FitSettings(rank="full"), "marglik"),
    "`ekfac`, expand basis": (FitSettings(structure="ekfac"), "marglik"),
    "`ekfac`, reduce basis": (FitSettings(structure="ekfac", weight_sharing="reduce"), "marglik"),
    "`diag`": (FitSettings(structure="diag"), "marglik"),
    "`lowrank`, rank 50": (FitSettings(structure="lowrank", rank=50), "marglik"),
    "`lowrank`, rank 400": (FitSettings(structure="lowrank", rank=400), "marglik"),
    "`full`": (FitSettings(structure="full"), "marglik"),
    "`full`, adapted evidence": (FitSettings(structure="full"), "adapted"),
    "last layer (LLLA), `kron`": (FitSettings(subset="last-layer"), "marglik"),
    "all (LoRA and head), `kron`": (FitSettings(subset="all"), "marglik"),
}


def main() -> None:
    chosen = ADAPTERS[sys.argv[1] if len(sys.argv) > 1 else "boolq"]
    with tempfile.TemporaryDirectory() as folder:
        for line in table(chosen, Path(folder)):
            print(line, flush=True)


def table(chosen: BenchmarkAdapter, folder: Path):
    """Yield the lines of the table as they are measured."""
    model, data = chosen.place(folder)
    rows_used = f"{chosen.rows or 'all'} training rows, {chosen.scored} scored"
    yield f"{chosen.name}: {rows_used}, {torch.get_num_threads()} threads"
    yield ""
    yield "| | prior precision | accuracy | NLL | ECE | trace kept | fit | predict | size |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    prepared = prepare_fit(model, data, FitSettings(max_length=chosen.max_length))
    original = fitting.load_inputs
    fitting.load_inputs = lambda *_: prepared  # loading and encoding are done once and are not timed
    try:
        session = None
        for label, (settings, method) in METHODS.items():
            if "--brief" in sys.argv and any(part in label for part in ONLY_IN_DETAIL):
                continue
            name = f"m{list(METHODS).index(SAME_POSTERIOR.get(label, label))}"
            if chosen.name == "demo" and settings.subset != "lora":
                continue  # it has neither a saved head nor LoRA on its lm_head
            if label not in SAME_POSTERIOR:
                started = time.perf_counter()
                result = fitting.fit(model, data, replace(settings, name=name, max_length=chosen.max_length))
                fit_time = time.perf_counter() - started
            tuned = tune_prior(model, settings=PriorSettings(name=name, method=method))
            session = open_fitted(model, name, session)
            rows = read_labelled_rows(session.posterior, session.model.kind, DataSettings(limit=chosen.scored))
            started = time.perf_counter()
            scored = score_rows(session, rows, ["mc-joint"], samples=2048)
            predict_time = time.perf_counter() - started
            if name == "m0":
                constant = metrics.constant_predictor(rows.targets, len(session.model.choices))
                yield _row("constant predictor", metrics.evaluate(constant, rows.targets))
                yield _row("MAP", metrics.evaluate(scored.tables["map"][0], rows.targets))
            scores = metrics.evaluate(scored.tables["mc-joint"][0], rows.targets)
            size = sum(file.stat().st_size for file in result.folder.iterdir())
            rest = [f"{result.kept:.3f}", f"{fit_time:.1f} s", f"{predict_time:.1f} s", f"{size / 1e6:.1f} MB"]
            yield _row(label, scores, tuned.precision.describe(), rest)
    finally:
        fitting.load_inputs = original


def _row(label: str, scores: dict[str, float], precision: str = "", rest: list[str] | None = None) -> str:
    cells = [label, precision, *(f"{scores[key]:.3f}" for key in ("accuracy", "nll", "ece")), *(rest or [""] * 4)]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
