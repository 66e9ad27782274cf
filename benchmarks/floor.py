"""Compare lapora with the minimum work and with other libraries, on the same batches of the same model.

The floor for C answers is one forward and C-1 backward passes: the logits, and by plain autograd the gradients
of C-1 logit combinations with respect to the LoRA weights. Links that need every class are compared with C
backward passes.

    python -m benchmarks.floor                   # the table of ratios
    python -m benchmarks.floor --peers           # add laplace-torch (ASDL, curvlinops) and bayesian-lora
    python -m benchmarks.floor --memory          # peak memory, each program in its own process
    python -m benchmarks.floor --bases FOLDER    # real decoders: FOLDER/smollm2 and FOLDER/gemma3
    python -m benchmarks.floor --bases FOLDER --shares    # where the time goes

Time is measured in one process, floor and programs alternating, as medians of several rounds; with one thread
(``OMP_NUM_THREADS=1``) it is CPU time. Model loading is excluded, eigendecompositions are included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import Subject, subject
from benchmarks.peak import peak_memory
from lapora.curvature.kfac import KronObserver
from lapora.curvature.passes import CurvatureRun
from lapora.likelihoods.categorical import exact_columns, log_probabilities
from lapora.posterior.eigen import decompose
from lapora.posterior.gaussian import Posterior
from lapora.posterior.structures import fit_structure
from lapora.predictive.moments import LinearisedPredictor

CASES: list[dict[str, Any]] = [
    {"kind": "encoder-22M", "classes": 2, "tokens": 12, "rows": 400, "batch_size": 100},
    {"kind": "encoder-22M", "classes": 2, "tokens": 52, "rows": 160, "batch_size": 40},
    {"kind": "encoder-22M", "classes": 4, "tokens": 52, "rows": 80, "batch_size": 40},
    {"kind": "llama-134M", "classes": 2, "tokens": 64, "rows": 48, "batch_size": 16},
    {"kind": "llama-134M", "classes": 4, "tokens": 64, "rows": 48, "batch_size": 16},
]
REAL_CASES: list[dict[str, Any]] = [
    {"classes": 2, "tokens": 60, "rows": 48, "batch_size": 8, "targets": "q, v"},
    {"classes": 4, "tokens": 60, "rows": 32, "batch_size": 8, "targets": "q, v"},
    {"classes": 2, "tokens": 200, "rows": 16, "batch_size": 4, "targets": "q, v"},
    {"classes": 2, "tokens": 60, "rows": 48, "batch_size": 8, "targets": "q, v, head"},
    {"classes": 2, "tokens": 60, "rows": 192, "batch_size": 8, "targets": "all linear"},
]
"""Of every real decoder."""
PEER_CASES: list[dict[str, Any]] = [
    {"kind": "encoder-22M", "classes": 2, "tokens": 12, "rows": 100, "batch_size": 25},
    {"kind": "encoder-22M", "classes": 2, "tokens": 52, "rows": 50, "batch_size": 25},
]


def floor(it: Subject, backward: int) -> None:
    """Run one forward and ``backward`` backward passes per batch, with respect to the LoRA weights."""
    weights = [layer.module.weight for layer in it.layers]
    for weight in weights:
        weight.requires_grad_(True)
    for batch in it.batches:
        logits = it.answers.logits(batch)
        along = exact_columns(logits.detach()).to(logits.dtype)
        for index in range(backward):
            column = along[min(index, len(along) - 1)]
            torch.autograd.grad(logits, weights, column, retain_graph=index < backward - 1)
    for weight in weights:
        weight.requires_grad_(False)


def fit(it: Subject) -> Posterior:
    run = CurvatureRun(it.answers, it.layers, lambda: it.batches, [0] * it.rows, it.classes)
    return fit_structure("kron", run)[0]


def predict(it: Subject, posterior: Posterior, link: Any) -> None:
    every_class = link != "mc-joint"
    precisions = torch.ones(1, len(it.layers), dtype=torch.float64)
    with LinearisedPredictor(
        it.answers, it.layers, posterior, precisions, classes=it.classes, every_class=every_class
    ) as predictor:
        for batch in it.batches:
            log_probabilities(link, predictor.moments(batch))


def contestants(it: Subject, *, peers: bool = False) -> dict[str, tuple[int, Callable[[], object]]]:
    """Programs to measure, each with the number of backward passes of its floor."""
    less, posterior = it.classes - 1, fit(it).on_device(it.layers, it.answers.device, torch.float32)
    found: dict[str, tuple[int, Callable[[], object]]] = {
        "lapora fit": (less, lambda: fit(it)),
        "lapora predict mc-joint": (less, lambda: predict(it, posterior, "mc-joint")),
        "lapora predict mc-indep": (it.classes, lambda: predict(it, posterior, "mc-indep")),
        "lapora predict probit": (it.classes, lambda: predict(it, posterior, "probit")),
        "lapora predict bridge": (it.classes, lambda: predict(it, posterior, "bridge")),
    }
    if peers:
        from benchmarks.peers import peers as of_peers

        found |= of_peers(it)
    return found


def measure(case: dict[str, Any], rounds: int, peers: bool) -> list[dict[str, Any]]:
    """Return median times of floor and programs, measured alternately."""
    it = subject(**case)
    racers = contestants(it, peers=peers)
    times: dict[str, list[float]] = {name: [] for name in racers}
    floors: dict[int, list[float]] = {count: [] for count, _ in racers.values()}
    for turn in range(rounds + 1):
        for count in floors:
            floors[count].append(timed(lambda count=count: floor(it, count)))
        for name, (_, run) in racers.items():
            times[name].append(timed(run))
        if turn == 0:  # warm-up
            times = {name: [] for name in times}
            floors = {count: [] for count in floors}
    found = []
    for name, (count, _) in racers.items():
        base, taken = statistics.median(floors[count]), statistics.median(times[name])
        spread = (max(times[name]) - min(times[name])) / taken
        found.append({**case, "name": name, "floor": base, "time": taken, "ratio": taken / base, "spread": spread})
    return found


def timed(run: Callable[[], object]) -> float:
    """Return seconds; with one thread CPU seconds, which other work on the machine hardly changes."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def shares(case: dict[str, Any], rounds: int) -> dict[str, float]:
    """Return median seconds of the parts of a fit and of a prediction."""
    it = subject(**case)
    less = it.classes - 1
    posterior = fit(it).on_device(it.layers, it.answers.device, torch.float32)
    run = CurvatureRun(it.answers, it.layers, lambda: it.batches, [0] * it.rows, it.classes)
    precisions = torch.ones(1, len(it.layers), dtype=torch.float64)
    found: dict[str, list[float]] = {}

    def part(name: str, work: Callable[[], Any]) -> Any:
        kept: list[Any] = []
        found.setdefault(name, []).append(timed(lambda: kept.append(work())))
        return kept[0]

    for _ in range(rounds + 1):
        with torch.no_grad():
            part("forward", lambda: [it.answers.logits(batch) for batch in it.batches])
        part("forward and backward", lambda: floor(it, less))
        observer = KronObserver("expand")
        part("pass of fit", lambda observer=observer: run.observe(observer))
        part("decomposition", lambda o=observer: decompose(run.layers, o.factors(run.layers), run.rank, run.processes))
        with LinearisedPredictor(it.answers, it.layers, posterior, precisions, classes=it.classes) as predictor:
            moments = part("moments", lambda p=predictor: [p.moments(batch) for batch in it.batches])
        part("link", lambda m=moments: [log_probabilities("mc-joint", each) for each in m])
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def _print_shares(cases: list[dict[str, Any]], rounds: int) -> None:
    print("| model | LoRA | C | tokens | forward | backward | factors | decomposition | moments | link |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in cases:
        found = shares(case, rounds)
        floors = found["forward and backward"]
        parts = (
            found["forward"],
            floors - found["forward"],
            found["pass of fit"] - floors,
            found["decomposition"],
            found["moments"] - floors,
            found["link"],
        )
        cells = " | ".join(f"{each / floors:.3f}" for each in parts)
        print(f"| {case['kind']} | {case['targets']} | {case['classes']} | {case['tokens']} | {cells} |", flush=True)
    print("\nIn parts of one forward and C-1 backward passes; factors and moments are what a pass takes beyond them.")


def peak(case: dict[str, Any], name: str, peers: bool) -> float:
    """Return the peak memory beyond the loaded model, in MiB, of one program (or ``floor``) in this process."""
    it = subject(**case)
    if name == "floor":
        run: Callable[[], object] = lambda: floor(it, it.classes - 1)  # noqa: E731
    else:
        run = contestants(it, peers=peers)[name][1] if peers else _alone(it, name)
    before = peak_memory()
    run()
    return peak_memory() - before


def _alone(it: Subject, name: str) -> Callable[[], object]:
    """Return one program without preparing the others; it predicts from a posterior without rows."""
    if name == "lapora fit":
        return lambda: fit(it)
    few = Subject(it.answers, it.layers, it.batches[:0], 0, it.classes)
    posterior = fit(few).on_device(few.layers, it.answers.device, torch.float32)
    return lambda: predict(it, posterior, name.removeprefix("lapora predict "))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the cases, from 0; all by default")
    parser.add_argument("--bases", type=Path, help="folder with real decoders, made by shared/bases/make.py")
    parser.add_argument("--shares", action="store_true", help="the shares of time; needs --bases")
    parser.add_argument("--one", help="JSON of a case and a contestant, for a process of its own")
    options = parser.parse_args()
    if options.one:
        request = json.loads(options.one)
        print(peak(request["case"], request["name"], options.peers))
        return
    cases = PEER_CASES if options.peers else CASES
    if options.bases:
        cases = [
            {"kind": base.name, "folder": str(base), **case}
            for base in (options.bases / "smollm2", options.bases / "gemma3")
            if base.is_dir()
            for case in REAL_CASES
        ]
    cases = [cases[index] for index in options.cases] if options.cases else cases
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    if options.shares:
        _print_shares(cases, options.rounds)
        return
    if options.memory:
        _print_memory(cases, options.peers)
        return
    print("| model | LoRA | C | tokens | rows | | floor | time | ratio | spread |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in cases:
        for row in measure(case, options.rounds, options.peers):
            print(
                f"| {row['kind']} | {row.get('targets', 'q, v')} | {row['classes']} | {row['tokens']} | "
                f"{row['rows']} | {row['name']} | "
                f"{row['floor']:.2f} s | {row['time']:.2f} s | {row['ratio']:.2f} | {row['spread']:.0%} |",
                flush=True,
            )


def _print_memory(cases: list[dict[str, Any]], peers: bool) -> None:
    names = ["floor", "lapora fit", "lapora predict mc-joint"]
    if peers:
        names += ["laplace-torch asdl fit", "laplace-torch asdl predict"]
    print(
        "| model | LoRA | C | tokens | batch | | peak beyond the model | ratio |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for case in cases:
        base = None
        for name in names:
            request = json.dumps({"case": case, "name": name})
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.floor", "--one", request]
            done = subprocess.run(command + ["--peers"] * peers, capture_output=True, text=True, check=True)
            used = float(done.stdout.strip().splitlines()[-1])
            base = base or used
            print(
                f"| {case['kind']} | {case.get('targets', 'q, v')} | {case['classes']} | {case['tokens']} | "
                f"{case['batch_size']} | {name} | "
                f"{used:.0f} MiB | {used / base:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
