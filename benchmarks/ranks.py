"""Compare Kronecker posteriors of several ranks with the whole one, as a Markdown table.

    python -m benchmarks.ranks source2 source5 boolq
    python -m benchmarks.ranks --base SMOLLM2 smollm2-source2 smollm2-source5 smollm2-source5-over
    python -m benchmarks.ranks --base GEMMA3 ADAPTER:TASK:DATA    # any adapter, its task and the folder of its rows

Ratios to whole factors (``--rank full``): prior precision by marginal likelihood, NLL of held-out rows, and the median
over these rows of the trace of the covariance of the logit differences, each posterior at its own prior precision. The
factors are summed whole in one pass; every rank sketches these sums, which differs from sketching the rows by round-off
alone, and all ranks predict the same pass. With ``--exact`` the whole factors are truncated instead of sketched.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shared_adapters import ADAPTERS, SHARED
from lapora.config import COMPLETE, DataSettings, FitSettings, ModelSettings
from lapora.curvature.backward import Linearisation
from lapora.curvature.kfac import KronFactors, KronObserver, Sum, width_of_sum
from lapora.curvature.nystrom import NystromSketch
from lapora.likelihoods.base import LogitMoments, difference_columns
from lapora.likelihoods.categorical import log_probabilities
from lapora.models.batches import Batch
from lapora.models.batching import run_batches
from lapora.models.lora_layers import BayesianLayer
from lapora.posterior.eigen import decompose
from lapora.posterior.gaussian import BlockPosterior
from lapora.posterior.marglik import maximize_evidence
from lapora.predictive.moments import BlockCovarianceObserver
from lapora.workflows.fit import prepare_fit

RANKS = [8, 16, 32, 64, 128]
_SCORED = 200


class _All:
    """Observers of one pass; see :class:`lapora.curvature.backward.Observer`."""

    def __init__(self, observers: Sequence[BlockCovarianceObserver]) -> None:
        self.observers = observers

    def begin(self, batch: Batch) -> None:
        for each in self.observers:
            each.begin(batch)

    def observe_input(self, layer: BayesianLayer, owner: str, inputs: Tensor, mask: Tensor | None) -> list[Any]:
        return [each.observe_input(layer, owner, inputs, mask) for each in self.observers]

    def observe_gradient(self, layer: BayesianLayer, saved: list[Any], gradient: Tensor) -> None:
        for each, own in zip(self.observers, saved, strict=True):
            each.observe_gradient(layer, own, gradient)

    def finish(self, layer: BayesianLayer) -> None:
        for each in self.observers:
            each.finish(layer)

    def end(self, rows: int, directions: int) -> None:
        pass


def place(name: str, folder: Path, base: str | None) -> tuple[ModelSettings, DataSettings, int | None, int]:
    """Copy a shared adapter; returns how to run it, its training rows, their length, and the rows to score."""
    if name in ADAPTERS:
        chosen = ADAPTERS[name]
        return *chosen.place(folder), chosen.max_length, min(_SCORED, chosen.scored)
    if ":" in name:
        adapter, task, rows = name.split(":")
        return ModelSettings(adapter, base, device="cpu"), DataSettings(task, Path(rows), "train", 200), None, _SCORED
    source = SHARED / "adapters" / name
    shutil.copytree(source, folder / name, copy_function=shutil.copyfile)
    data = DataSettings(str(source / "task.yaml"), SHARED / "data" / name.split("-")[1], "train", 200)
    return ModelSettings(str(folder / name), base, device="cpu"), data, None, _SCORED


def sketched(factors: KronFactors, rank: int, seen: dict[int, Sum], roots: dict[int, Tensor]) -> KronFactors:
    """Return the factors as a fit of this rank sums them; shared input sums stay shared.

    ``roots`` keeps a square root of every sum.
    """

    def sketch(total: Sum) -> Sum:
        assert isinstance(total, Tensor)
        width = width_of_sum(len(total), rank)
        if width == len(total):
            return total
        if id(total) not in roots:
            values, vectors = torch.linalg.eigh(total.double())
            roots[id(total)] = (vectors * values.clamp(min=0.0).sqrt()).T.to(total)
        found = NystromSketch(len(total), width, seed=0, like=total)
        found.add(roots[id(total)])
        return found

    if id(factors.input_sum) not in seen:
        seen[id(factors.input_sum)] = sketch(factors.input_sum)
    return replace(factors, input_sum=seen[id(factors.input_sum)], gradient_sum=sketch(factors.gradient_sum))


def table(name: str, base: str | None, ranks: Sequence[int], *, exact: bool) -> list[str]:
    """Return the rows of one adapter; all its whole factors are in memory at once."""
    ranks = [COMPLETE, *ranks]
    with tempfile.TemporaryDirectory() as folder:
        model, data, length, scored = place(name, Path(folder), base)
        settings = FitSettings(rank="full", max_length=length)
        fitted = prepare_fit(model, data, settings)
        held = prepare_fit(model, replace(data, split="validation", limit=scored), settings)
    run = fitted.run(settings)
    observer = KronObserver("expand", COMPLETE)
    log_likelihood = run.observe(observer).log_likelihood or 0.0
    whole = observer.factors(run.layers)
    observers, deltas, sizes = [], [], []
    roots: dict[int, Tensor] = {}
    for rank in ranks:
        seen: dict[int, Sum] = {}
        factors = whole if exact else {layer: sketched(each, rank, seen, roots) for layer, each in whole.items()}
        posterior = BlockPosterior(decompose(run.layers, factors, rank))
        evidence = maximize_evidence(posterior.spectra, posterior.parameters(), log_likelihood)
        deltas.append(evidence.prior.precisions["all"])
        sizes.append(sum(tensor.nbytes for tensor in posterior.tensors().values()))
        precisions = torch.full((1, len(run.layers)), deltas[-1], dtype=torch.float64)
        blocks = posterior.on_device(run.layers, torch.device("cpu"), torch.float32).blocks
        observers.append(BlockCovarianceObserver(blocks, precisions, directions=run.columns))
    del whole, roots
    nll, variance = torch.zeros(len(ranks)), []
    targets = torch.tensor([example.target for example in held.rows.examples])
    with Linearisation(fitted.model.outputs, run.layers, _All(observers)) as linearisation:

        def predict(batch: Batch) -> list[LogitMoments]:
            logits = linearisation.run(batch, difference_columns).double()
            return [LogitMoments(logits, each.covariance(len(batch), run.columns)[0]) for each in observers]

        for batch, moments in run_batches(fitted.model.batches(held.encoded), predict):
            labels = targets[list(batch.rows)].unsqueeze(1)
            nll -= torch.stack([log_probabilities("mc-joint", each).gather(1, labels).sum() for each in moments])
            variance.append(torch.stack([each.covariance.diagonal(dim1=1, dim2=2).sum(dim=1) for each in moments]))
    nll, ratio = nll / len(targets), torch.cat(variance, dim=1)
    ratio = (ratio / ratio[0]).median(dim=1).values
    rows = []
    for index, rank in enumerate(ranks):
        label = "full" if rank == COMPLETE else str(rank)
        shift = f"{deltas[index] / deltas[0] - 1:+.1%} | {nll[index] / nll[0] - 1:+.2%} | {ratio[index] - 1:+.1%}"
        cells = f"{deltas[0]:.3g} | {nll[0]:.3f} | " if not index else f"{shift} | "
        rows.append(f"| `{name}` | {label} | {cells}{'| ' if not index else ''}{sizes[index] / 1e6:.1f} MB |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+")
    parser.add_argument("--base", help="folder of the decoders' base model")
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--exact", action="store_true", help="truncate whole factors")
    options = parser.parse_args()
    print("| adapter | rank | prior precision | NLL | variance | size |\n| --- | --- | --- | --- | --- | --- |")
    for name in options.names:
        print("\n".join(table(name, options.base, options.ranks, exact=options.exact)), flush=True)


if __name__ == "__main__":
    main()
