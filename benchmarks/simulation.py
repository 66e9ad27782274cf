"""Predict time and memory of a fit from shapes, and compare with measured runs.

    python -m benchmarks.simulation check            # calibrate on three small runs, compare with others
    python -m benchmarks.simulation draw FILE.png    # plot and table for 1 to 1,000 GPUs

Time is operations over speed. One batch costs a forward pass, K = C-1 backward passes for activations alone (no weight
gradients), the sums of the factors, and a fixed time per layer; the decompositions are added once. On W processes
every rank takes N / W rows, the sums are all-reduced, and the decompositions are distributed by factor: the longest
one is a lower bound.

Measured times are CPU seconds of one thread, which do not depend on other load.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lapora.curvature.kfac import width_of_sum
from lapora.curvature.nystrom import block_count


@dataclass(frozen=True)
class Shape:
    """A decoder with LoRA on query and value, and a run over it.

    Attributes:
        layers: Transformer blocks.
        width: Of the residual stream.
        inner: Of the feed-forward layers.
        values: Width of keys and values (less than ``width`` with grouped queries).
        vocabulary: Tokens.
        rank: Of LoRA.
        rows: N.
        tokens: T of each row.
        classes: C.
        batch: Rows in a batch of one process.
        head: LoRA on ``lm_head`` too.
        kept: ``--rank`` of the factors.
    """

    layers: int
    width: int
    inner: int
    vocabulary: int
    rank: int = 8
    rows: int = 64
    tokens: int = 32
    classes: int = 2
    batch: int = 16
    values: int | None = None
    head: bool = False
    kept: int | None = None

    @property
    def key_width(self) -> int:
        """Width of keys and values."""
        return self.values or self.width

    @property
    def block_weights(self) -> int:
        """Number of weights of one block: q, o of full width, k and v, and a gated feed-forward."""
        return 2 * self.width**2 + 2 * self.width * self.key_width + 3 * self.width * self.inner

    @property
    def weights(self) -> int:
        """Number of weights of the base, without norms."""
        return self.layers * self.block_weights + 2 * self.vocabulary * self.width

    def sides(self) -> list[tuple[int, int]]:
        """Sums of one block: dimension, and kind (1: input, 0: gradients)."""
        found = [(self.width, 1)]  # shared by q and v
        for out in (self.width, self.key_width):
            found += [(self.rank, 0), (self.rank, 1), (out, 0)]
        return found

    def head_sides(self) -> list[tuple[int, int]]:
        """The same for LoRA on ``lm_head``, whose gradient is nonzero only in the rows of the C answers."""
        return [(self.width, 1), (self.rank, 0), (self.rank, 1), (self.classes, 0)] if self.head else []


@dataclass(frozen=True)
class Machine:
    """Speed of a process.

    Attributes:
        passes: Floating-point operations a second in the model's passes.
        sums: The same in the sums of factors.
        decompositions: The same in float64 eigendecompositions.
        layer: Seconds that a batch loses in each block and pass, whatever its size.
        bandwidth: Bytes a second of an all-reduce on each link.
        latency: Seconds of one all-reduce step.
    """

    passes: float
    sums: float
    decompositions: float
    layer: float
    bandwidth: float = math.inf
    latency: float = 0.0


_EIGEN = 9  # d³ of an eigendecomposition with vectors (tridiagonal form 4/3, its vectors ~4, back-transformation 2 ...)


def pass_operations(shape: Shape) -> float:
    """Operations per row: a forward and K backward passes (blocks, attention, and the head at one position)."""
    passes = shape.classes  # 1 + (C - 1)
    linear = 2 * shape.block_weights * shape.tokens
    attention = 4 * shape.tokens**2 * shape.width
    lora = 2 * shape.rank * (3 * shape.width + shape.key_width) * shape.tokens
    backward_attention = 1.5  # recomputes the scores
    forward = linear + attention + lora
    backward = linear + backward_attention * attention + lora
    return shape.layers * (forward + (passes - 1) * backward) + passes * 2 * shape.vocabulary * shape.width


def sum_operations(shape: Shape) -> float:
    """Operations per row: rank-T updates of every sum, or of its sketch."""
    directions = shape.classes - 1
    total = 0.0
    for sides, tokens, times in ((shape.sides(), shape.tokens, shape.layers), (shape.head_sides(), 1, 1)):
        for dimension, is_input in sides:
            width = width_of_sum(dimension, shape.kept)
            products = 1.0 if width == dimension else 1 + 1 / block_count(dimension, width)
            total += times * (1 if is_input else directions) * products * 2 * tokens * dimension * width
    return total


def decompositions(shape: Shape) -> list[float]:
    """Operations of each factor's decomposition."""
    found = []
    for sides, times in ((shape.sides(), shape.layers), (shape.head_sides(), 1)):
        for dimension, _ in sides:
            width = width_of_sum(dimension, shape.kept)
            cost = _EIGEN * float(width) ** 3
            if (
                width < dimension
            ):  # two, the eigenvalues of some iterations, and a triangular factor beside three products
                cost = 3 * cost + 8 * dimension * float(width) ** 2
            found += [cost] * times
    return found


def sum_bytes(shape: Shape) -> int:
    """Bytes of all sums, which are all-reduced."""
    total = 0
    for sides, times in ((shape.sides(), shape.layers), (shape.head_sides(), 1)):
        for dimension, _ in sides:
            total += times * 4 * dimension * width_of_sum(dimension, shape.kept)
    return total


def seconds(shape: Shape, machine: Machine, processes: int = 1) -> dict[str, float]:
    """Parts of a fit's time, without model loading."""
    rows = math.ceil(shape.rows / processes)
    batches = math.ceil(rows / shape.batch)
    jobs = sorted(decompositions(shape), reverse=True)
    loads = [0.0] * min(processes, len(jobs))
    for job in jobs:  # the longest first, to whoever has least
        least = min(range(len(loads)), key=loads.__getitem__)
        loads[least] += job
    moved = 2 * (processes - 1) / processes * sum_bytes(shape)  # a ring: twice all but one share
    steps = 2 * (processes - 1)
    gathered = sum_bytes(shape) if processes > 1 else 0  # bases go to the rank that writes
    return {
        "passes": rows * pass_operations(shape) / machine.passes,
        "sums": rows * sum_operations(shape) / machine.sums,
        "overhead": batches * shape.classes * shape.layers * machine.layer,
        "all-reduce": moved / machine.bandwidth + steps * machine.latency,
        "decompositions": max(loads) / machine.decompositions,
        "gather": gathered / machine.bandwidth,
    }


def total(shape: Shape, machine: Machine, processes: int = 1) -> float:
    return sum(seconds(shape, machine, processes).values())


def memory(shape: Shape, *, item: int = 4) -> dict[str, float]:
    """Peak bytes: weights, activations of a batch, and sums twice (of the batch and of the pass)."""
    tokens = shape.batch * shape.tokens
    # Two norms and their inputs, q, k, v, attention's output; the feed-forward's gate, activation and other factor.
    a_block = (6 * shape.width + 2 * shape.key_width + 3 * shape.inner) * item
    directions = shape.classes - 1
    along = (2 * directions * shape.width + 4 * shape.inner) * item
    norms = 2 * shape.width * 4 * (item < 4)
    widths = {dimension: width_of_sum(dimension, shape.kept) for dimension, _ in shape.sides()}
    random = 4 * sum(
        dimension * width // block_count(dimension, width) for dimension, width in widths.items() if width < dimension
    )
    return {
        "weights": shape.weights * item,
        "activations": tokens * (shape.layers * (a_block + norms) + along),
        "factors": 2 * sum_bytes(shape) + random,
    }


CALIBRATION = [
    Shape(layers=4, width=256, inner=682, vocabulary=32000, rows=64, tokens=64),
    Shape(layers=8, width=256, inner=682, vocabulary=32000, rows=64, tokens=8, batch=8),
    Shape(layers=2, width=1024, inner=2730, vocabulary=32000, rows=16, tokens=16, batch=8, kept=1024),
]
CHECKS = [
    Shape(layers=4, width=256, inner=682, vocabulary=32000, rows=256, tokens=32),
    Shape(layers=4, width=256, inner=682, vocabulary=32000, rows=64, tokens=128),
    Shape(layers=4, width=256, inner=682, vocabulary=32000, rows=64, tokens=32, classes=5),
    Shape(layers=4, width=256, inner=682, vocabulary=32000, rows=64, tokens=32, rank=32),
    Shape(layers=6, width=512, inner=1365, vocabulary=32000, rows=64, tokens=48),
    Shape(layers=12, width=768, inner=2048, vocabulary=32000, rows=32, tokens=64),
    Shape(layers=4, width=512, inner=1365, vocabulary=32000, rows=64, tokens=64, classes=3, kept=512),
    Shape(layers=2, width=1280, inner=3413, vocabulary=32000, rows=64, tokens=64),
]


def measure(shape: Shape) -> dict[str, float]:
    """Measure CPU seconds of passes and decompositions of a fit, and its peak memory, in this process."""
    import torch

    from benchmarks.models import subject
    from lapora.curvature.kfac import KronObserver
    from lapora.curvature.passes import CurvatureRun
    from lapora.models.meta_model import LiveMemory
    from lapora.posterior.eigen import decompose

    torch.set_num_threads(1)
    it = subject(
        "llama-134M",
        classes=shape.classes,
        tokens=shape.tokens,
        rows=shape.rows,
        batch_size=shape.batch,
        rank=shape.rank,
        layers=shape.layers,
        width=shape.width,
        heads=shape.width // 64,
    )

    def once(batches: Sequence[Any]) -> tuple[float, float]:
        run = CurvatureRun(it.answers, it.layers, lambda: batches, [0] * it.rows, it.classes, rank=shape.kept)
        observer = KronObserver("expand", shape.kept)
        started = time.process_time()
        few = replace(run, targets=[0] * sum(len(batch) for batch in batches))
        few.observe(observer)
        middle = time.process_time()
        decompose(it.layers, observer.factors(it.layers), shape.kept)
        return middle - started, time.process_time() - middle

    once(it.batches[:1])
    times = [once(it.batches) for _ in range(3)]
    weights = sum(each.nbytes for each in it.answers.model.parameters())
    with LiveMemory(it.answers.model) as live:
        once(it.batches[:1])
    return {"pass": min(a for a, _ in times), "decompose": min(b for _, b in times), "memory": weights + live.peak}


def calibrated(runs: Sequence[tuple[Shape, Mapping[str, float]]]) -> Machine:
    """Return the speeds that reproduce the passes of two runs and the decompositions of a third."""
    import numpy as np

    table, found = [], []
    for shape, measured in runs[:2]:
        batches = math.ceil(shape.rows / shape.batch)
        table.append(
            [shape.rows * (pass_operations(shape) + sum_operations(shape)), batches * shape.classes * shape.layers]
        )
        found.append(measured["pass"])
    operation, layer = np.linalg.solve(np.array(table), np.array(found))
    wide, measured = runs[2]
    return Machine(
        passes=1 / float(operation),
        sums=1 / float(operation),
        decompositions=sum(decompositions(wide)) / measured["decompose"],
        layer=float(layer),
    )


def check() -> None:
    """Print predicted against measured."""
    runs = [(shape, _in_a_process(shape)) for shape in CALIBRATION]
    machine = calibrated(runs)
    print(
        f"calibrated: passes and sums {machine.passes / 1e9:.1f} GFLOP/s, decompositions "
        f"{machine.decompositions / 1e9:.1f} GFLOP/s, {machine.layer * 1e3:.2f} ms a block and pass\n"
    )
    print(
        "| blocks x width | N | T | C | r | `--rank` | pass, s | predicted | ratio | "
        "decompositions, s | predicted | memory, MiB | predicted | ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for known, shape in [(True, shape) for shape in CALIBRATION] + [(False, shape) for shape in CHECKS]:
        measured = dict(runs)[shape] if known else _in_a_process(shape)
        parts = seconds(shape, machine)
        passing = parts["passes"] + parts["sums"] + parts["overhead"]
        held = sum(memory(shape).values())
        print(
            f"| {shape.layers} x {shape.width}{' (calibration)' if known else ''} | {shape.rows} | {shape.tokens} | "
            f"{shape.classes} | {shape.rank} | {shape.kept or ''} | {measured['pass']:.2f} | {passing:.2f} | "
            f"{passing / measured['pass']:.2f} | {measured['decompose']:.2f} | {parts['decompositions']:.2f} | "
            f"{measured['memory'] / 2**20:.0f} | {held / 2**20:.0f} | {held / measured['memory']:.2f} |",
            flush=True,
        )


def _in_a_process(shape: Shape) -> dict[str, float]:
    request = json.dumps(shape.__dict__)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.simulation", "measure", request]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


# 7B and 70B shapes of Llama 2, 16,000 rows of 300 tokens, two answers; a GPU holds the whole model (70B: in 4 bits).
SEVEN = Shape(layers=32, width=4096, inner=11008, vocabulary=32000, rows=16000, tokens=300, batch=16)
SEVENTY = Shape(layers=80, width=8192, inner=28672, vocabulary=32000, values=1024, rows=16000, tokens=300, batch=8)
# Assumptions, not measurements: 989 TFLOP/s of bf16 at 40 %, float32 sums at 67 TFLOP/s at 50 %, float64
# decompositions at 1 TFLOP/s (small ones hardly fill a GPU), 50 GB/s between nodes, 20 us a step.
GPU = Machine(passes=0.4e15, sums=33e12, decompositions=1e12, layer=1e-4, bandwidth=50e9, latency=20e-6)
MODELS = [("7B", SEVEN), ("70B", SEVENTY)]
GPUS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]


STYLES = {
    "passes": ("#0072B2", "-"),
    "sums": ("#56B4E9", "--"),
    "overhead": ("#999999", ":"),
    "all-reduce": ("#D55E00", "-."),
    "decompositions": ("#E69F00", (0, (5, 1))),
    "gather": ("#CC79A7", (0, (1, 1))),
}


def draw(picture: str) -> None:
    """Plot time against the number of GPUs, and print the table."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    print("| GPUs | 7B, s | efficiency | 70B, s | efficiency |")
    print("| --- | --- | --- | --- | --- |")
    table: dict[int, list[str]] = {count: [] for count in GPUS}
    for axis, (name, shape) in zip(axes, MODELS, strict=True):
        parts = [seconds(shape, GPU, count) for count in GPUS]
        totals = [sum(part.values()) for part in parts]
        axis.plot(GPUS, totals, color="black", linewidth=2.5, marker="o", label="in all")
        ideal = [totals[0] / count for count in GPUS]
        axis.plot(GPUS, ideal, color="black", linewidth=0.8, linestyle=":", label="ideal")
        for key, (colour, line) in STYLES.items():
            values = [part[key] or math.nan for part in parts]
            axis.plot(GPUS, values, color=colour, linestyle=line, label=key)
        axis.set(
            xscale="log", yscale="log", xlabel="GPUs", title=f"{name}: LoRA r=8 on q, v; 16,000 rows of 300 tokens"
        )
        axis.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        axis.grid(alpha=0.3)
        for count, took, best in zip(GPUS, totals, ideal, strict=True):
            table[count] += [f"{took:.2f}", f"{best / took:.0%}"]
    axes[0].set_ylabel("seconds, loading left out")
    axes[0].set_ylim(bottom=3e-3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9)
    figure.savefig(picture, dpi=80)
    for count, cells in table.items():
        print(f"| {count:,} | {' | '.join(cells)} |")
    for name, shape in MODELS:
        print(f"\n{name}: {shape.weights / 1e9:.2f}e9 weights, sums {sum_bytes(shape) / 2**20:.0f} MiB, of one row")
        print(f"passes {pass_operations(shape):.3g} operations, sums {sum_operations(shape):.3g}")
        print(f"decompositions {sum(decompositions(shape)):.3g}, the longest {max(decompositions(shape)):.3g}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["check", "draw", "measure"])
    parser.add_argument("argument", nargs="?", default="simulation.png")
    options = parser.parse_args()
    if options.what == "measure":
        print(json.dumps(measure(Shape(**json.loads(options.argument)))))
    elif options.what == "draw":
        draw(options.argument)
    else:
        check()


if __name__ == "__main__":
    main()
