"""One adapter: trained, fitted, tuned and scored by every method."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.real.commands import Commands
from benchmarks.real.experiments import Experiment
from benchmarks.real.labels import ASDL_SCALE, CONSTANT, PLAIN, named, scores_of

_LABELLED = (200, 50, 20)
"""Labelled rows m that tune the averaged prior."""
_LINK = ("--link", "mc-joint")
_TIMED = {"classifier": 60, "causal": 12}
"""Rows that are predicted to time a method."""
_KEPT = 5
"""Checkpoints of a run."""
_SCREENED = 8
"""Rows of the posterior that is fitted only to score MAP."""
_DEVIATIONS = 2.0


class Run:
    """One adapter of an experiment.

    Args:
        commands: Runs the commands and keeps their records.
        experiment: What is trained.
        seed: Seed of the training.
        base: Folder of the base model.
        shared: Folder with ``data/``.
        output: Folder of all results.
    """

    def __init__(
        self, commands: Commands, experiment: Experiment, seed: int, base: str, shared: Path, output: Path
    ) -> None:
        self.commands, self.experiment, self.seed, self.base = commands, experiment, seed, base
        self._scoring = threading.Lock()
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

    @cached_property
    def tuned(self) -> dict[str, list[str]]:
        """Posteriors tuned on labelled rows, most rows first, with the options that choose the rows."""
        return {f"m{count}": ["--limit", str(count)] for count in _LABELLED if 2 * count <= self.experiment.scored}

    @cached_property
    def posteriors(self) -> list[str]:
        """Names of the posteriors; the first that was tuned on rows gives the temperature its rows: the most rows."""
        paper = [] if self._lora_on_head else ["asdl"]  # ASDL's engine refuses LoRA on an output head
        return [*self.tuned, "default", "marglik", *paper, "llla"]

    def train(self) -> None:
        """Fine-tune, with five checkpoints."""
        one = self.experiment
        self.commands.run(
            self._key("train"),
            *("docs/recipes/finetune.py", "--kind", one.kind, "--base-model", self.base),
            *("--data", self.task, "--data-dir", str(self.data), "--output-dir", str(self.folder / "run")),
            *("--steps", str(one.steps), "--save-every", str(one.steps // _KEPT), "--batch-size", str(one.batch)),
            *("--learning-rate", str(one.rate), "--max-length", str(one.max_length), "--seed", str(self.seed)),
            *("--target-modules", *one.targets),
        )

    def screen(self) -> bool:
        """Train, and return whether the adapter has skill: MAP is more accurate than a constant by two errors."""
        self.train()
        if self._key("eval") not in self.commands.records:
            name = ["--name", "screen"]
            self._lapora("fit screen", "fit", *self._rows, *name, "--limit", str(_SCREENED), "--overwrite")
            self._lapora("eval screen", "eval", *name, "--methods", "constant,map", "--json")
        return self.skilled

    @property
    def skilled(self) -> bool:
        """Whether the adapter that was screened has skill."""
        record = self._result("eval") or self._result("eval screen")
        assert record is not None, "screened before"
        scores = scores_of(record)
        constant = scores[CONSTANT]["accuracy"]
        error = (constant * (1 - constant) / record["n"]) ** 0.5
        return bool(scores[PLAIN]["accuracy"] > constant + _DEVIATIONS * error)

    def score(self) -> None:
        """Fit and tune every posterior, and score every method on the rows that tuned nothing; waits for its end."""
        with self._scoring:
            self._score()

    def _score(self) -> None:
        self.train()
        self._fit()
        checkpoints = ["--ensemble", str(self.folder / "run")]
        self._lapora("eval", "eval", *self._chosen, "--methods", "all", *_LINK, *checkpoints, "--json")
        if self._scaled:
            names = [part for name in (*self.tuned, ASDL_SCALE) for part in ("--name", name)]
            self._lapora(f"eval {ASDL_SCALE}", "eval", *names, "--methods", "map,laplace", *_LINK, "--json")
        self._module("tfb", *self._model, str(self.experiment.scored))

    def score_seeds(self, others: Sequence[Run]) -> None:
        """Score the ensemble of this adapter and those of other seeds, after the others' training."""
        self.score()
        for each in others:
            each.train()
        members = [part for each in others for part in ("--ensemble", str(each.adapter))]
        self._lapora("eval seeds", "eval", *self._chosen, "--methods", "ensemble", *members, "--json")

    def time(self) -> None:
        """Measure seconds and peak memory of predicting rows, after :meth:`score`."""
        self.score()
        self._module("costs", *self._model, str(_TIMED[self.experiment.kind]), str(self.folder / "run"))

    def draw(self) -> None:
        """Draw accuracy, ECE and NLL along training, as in the paper's figures."""
        self.commands.lapora(
            self._key("checkpoints"),
            *("eval", str(self.folder / "run"), "--checkpoints", *self._where, *self._rows, "--limit", "200"),
            *("--plots", str(self.folder.parent / "figures"), "--json"),
        )

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Scores of every method that has been scored so far, by its name in the tables."""
        record = self._result("eval")
        if record is None:
            screened = self._result("eval screen")
            return scores_of(screened) if screened else {}
        found = scores_of(record)
        if scaled := self._result(f"eval {ASDL_SCALE}"):
            assert scaled["n"] == record["n"], "the same rows"
            found[named(ASDL_SCALE)] = scores_of(scaled)[named(ASDL_SCALE)]
        if seeds := self._result("eval seeds"):
            found["ensemble of seeds"] = scores_of(seeds)[named("ensemble")]
        if tfb := self._result("tfb"):
            assert tfb["n"] == record["n"], "the same rows"
            found["TFB"] = tfb
        return found

    @property
    def costs(self) -> dict[str, dict[str, float]]:
        """Seconds and peak memory of predicting rows, as ratios to MAP's, once they were measured."""
        return {named(label.removeprefix("laplace ")): cost for label, cost in (self._result("costs") or {}).items()}

    def _fit(self) -> None:
        self._lapora("fit", "fit", *self._rows, "--overwrite")
        for name, options in {"marglik": ["--method", "marglik"], **self.tuned}.items():
            folder = self.adapter / "laplace" / name
            if self._key(f"tune {name}") not in self.commands.records:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(self.adapter / "laplace" / "default", folder)
            self._lapora(f"tune {name}", "tune-prior", "--name", name, *options)
        if "asdl" in self.posteriors:
            self._lapora("fit asdl", "fit", *self._rows, "--name", "asdl", "--engine", "asdl", "--overwrite")
            self._lapora("tune asdl", "tune-prior", "--name", "asdl", "--method", "marglik")
        self._lapora("fit llla", "fit", *self._rows, "--name", "llla", "--subset", "last-layer", "--overwrite")
        if self._scaled:
            module = ("-m", "benchmarks.real.asdl_scale", str(self.adapter), self.base, "default", ASDL_SCALE)
            self.commands.run(self._key(f"scale {ASDL_SCALE}"), *module, prints_json=True)
            self._lapora(f"tune {ASDL_SCALE}", "tune-prior", "--name", ASDL_SCALE, "--method", "marglik")

    def _key(self, step: str) -> str:
        return f"{self.experiment.name} {self.seed} {step}"

    def _result(self, step: str) -> dict[str, Any] | None:
        record = self.commands.records.get(self._key(step))
        return record and record["result"]

    def _lapora(self, step: str, command: str, *arguments: str) -> None:
        self.commands.lapora(self._key(step), command, str(self.adapter), *self._where, *arguments)

    def _module(self, name: str, *arguments: str) -> None:
        self.commands.run(self._key(name), "-m", f"benchmarks.real.{name}", *arguments, prints_json=True)

    @property
    def _where(self) -> list[str]:
        return ["--base-model", self.base, "--device", "cpu", "--dtype", "float32"]

    @property
    def _rows(self) -> list[str]:
        return ["--data", self.task, "--data-dir", str(self.data), "--max-length", str(self.experiment.max_length)]

    @property
    def _model(self) -> list[str]:
        return [str(self.adapter), self.base, ",".join(self.posteriors)]

    @property
    def _chosen(self) -> list[str]:
        return [part for name in self.posteriors for part in ("--name", name)]

    @property
    def _lora_on_head(self) -> bool:
        return "lm_head" in self.experiment.targets

    @property
    def _scaled(self) -> bool:
        """Whether the paper's scale is applied to lapora's curvature, because its implementation refuses the model."""
        return self._lora_on_head and not self.experiment.task.endswith("-cloze")
