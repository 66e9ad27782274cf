"""Compare token budgets per batch: ``python -m benchmarks.batch_size [BUDGET...]``.

Time of fit and predict on rows of 8 to 64 tokens, sorted by length, with the 22M encoder; budgets alternate.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from benchmarks.models import RandomRow, Subject, subject
from lapora.curvature.passes import CurvatureRun
from lapora.models.batching import BatchFeed, BatchSize
from lapora.posterior.structures import fit_structure

_ROWS, _ROUNDS = 192, 3


def main() -> None:
    budgets = [int(word) for word in sys.argv[1:]] or [256, 512, 1024, 2048, 4096, 8192]
    it = subject("encoder-22M", classes=2, tokens=8, rows=8, batch_size=8)
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(8, 65, (_ROWS,), generator=generator).tolist()
    rows = [RandomRow(torch.randint(1000, 20000, (length,), generator=generator).tolist()) for length in lengths]
    times: dict[int, list[float]] = {budget: [] for budget in budgets}
    for turn in range(_ROUNDS + 1):
        for budget in budgets:
            started = time.perf_counter()
            _fit(it, rows, budget)
            if turn:  # the first is warm-up
                times[budget].append(time.perf_counter() - started)
    best = min(statistics.median(taken) for taken in times.values())
    print(f"{torch.get_num_threads()} threads\n\n| tokens per batch | fit | against the best |\n| --- | --- | --- |")
    for budget, taken in times.items():
        print(f"| {budget} | {statistics.median(taken):.2f} s | {statistics.median(taken) / best:.2f} |")


def _fit(it: Subject, rows: list[RandomRow], budget: int) -> None:
    size = BatchSize(None, tokens=budget)
    run = CurvatureRun(it.answers, it.layers, lambda: BatchFeed(it.answers, rows, size), [0] * len(rows), 2)
    fit_structure("kron", run)


if __name__ == "__main__":
    main()
