"""The recipe that trains checkpoints, as it stands in docs/, and what `eval --checkpoints` makes of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file, save_file

from lapora.cli.app import app
from lapora.config import DataSettings, EvalSettings, FitSettings, ModelSettings
from lapora.errors import PosteriorError, UsageError
from lapora.storage.saved import SavedPosterior
from lapora.workflows import checkpoints as workflow
from lapora.workflows.checkpoints import CheckpointSettings, evaluate_checkpoints
from lapora.workflows.fit import fit
from tiny_adapter import data_of, json_lines, make_adapter

ROOT = Path(__file__).parents[2]
POSTERIORS = ["la-kron", "la-diag", "llla-kron", "llla-diag"]


def recipe_commands() -> list[str]:
    text = (ROOT / "docs" / "recipes" / "checkpoints.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture(scope="module")
def recipe(demo, tmp_path_factory):
    """The recipe's folder after its commands, with a shorter training."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / "lapora-demo").symlink_to(demo)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    outputs = {}
    for command in recipe_commands():
        if command == "lapora demo lapora-demo --offline":
            continue
        assert command.startswith(("python docs/", "lapora "))
        command = command.replace("--steps 300 --save-every 50", "--steps 40 --save-every 20")
        command = re.sub(r"^lapora\b", f"{sys.executable} -m lapora", command)
        done = subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        outputs[command.split()[-1]] = done  # the last command is `compare`
    return folder, outputs


@pytest.mark.slow
def test_the_recipe_draws_the_papers_figures(recipe):
    folder, outputs = recipe
    figures = sorted(file.name for file in (folder / "figures").iterdir())
    names = ("checkpoints", "checkpoints-links", "checkpoints-structures")
    assert figures == sorted(f"{name}.{ending}" for name in names for ending in ("png", "svg"))
    assert (folder / "run.html").read_text().count("data:image/svg+xml") == 3
    runs = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    assert [run["adapter"] for run in runs] == ["run/checkpoint-20", "run/checkpoint-40"]
    for run in runs:
        found = {(result.get("name"), result.get("link")) for result in run["results"]}
        assert {(name, link) for name in POSTERIORS for link in ("mc-joint", "mc-indep", "probit", "bridge")} <= found
    # All checkpoints are scored on the same rows: priors were tuned on the same others.
    assert len({run["rows"] for run in runs}) == 1 and runs[0]["excluded"] >= 300
    assert outputs["run.jsonl"].stdout.startswith("run\ttime")


def settings():
    return EvalSettings(links=("mc-joint", "mc-indep", "probit", "bridge"))


def again(folder, monkeypatch, said, **changes):
    monkeypatch.chdir(folder)
    data = DataSettings("lapora-demo/farm.yaml", Path("lapora-demo/data"), changes.pop("split", None))
    checkpoints = CheckpointSettings(**changes)
    return evaluate_checkpoints(ModelSettings(adapter="run"), data, settings(), checkpoints, said.append)


@pytest.mark.slow
def test_what_is_done_is_not_redone_and_what_has_changed_is(recipe, monkeypatch):
    folder, _ = recipe
    done: list[str] = []
    monkeypatch.setattr(workflow, "fit", lambda model, data, fitting, progress: done.append(fitting.name))
    monkeypatch.setattr(workflow, "tune_prior", lambda *_: pytest.fail("tuned again"))
    said: list[str] = []
    first = again(folder, monkeypatch, said)
    assert done == [] and said == ["checkpoint 20 (1 of 2): already scored", "checkpoint 40 (2 of 2): already scored"]
    assert [each["step"] for each in first["checkpoints"]] == [20, 40]
    monkeypatch.undo()

    # The scores gone: they are made again from the posteriors that are there.
    (folder / "run" / "checkpoint-20" / "laplace" / workflow.CACHE_FILE).write_text("{half")
    said.clear()
    second = again(folder, monkeypatch, said)
    assert said == ["checkpoint 20 (1 of 2): scoring", "checkpoint 40 (2 of 2): already scored"]
    assert second == first

    # A posterior gone: it alone is fitted again.
    shutil.rmtree(folder / "run" / "checkpoint-40" / "laplace" / "llla-diag")
    said.clear()
    third = again(folder, monkeypatch, said)
    assert [line for line in said if "fitting" in line] == ["checkpoint 40 (2 of 2): llla-diag: fitting"]
    assert third["checkpoints"][1]["results"] == first["checkpoints"][1]["results"]


@pytest.mark.slow
def test_an_adapter_without_a_last_layer_has_no_llla_said_aloud(demo, tmp_path, monkeypatch, capsys):
    for step in (3, 12):
        shutil.copytree(
            demo / "adapter", tmp_path / "run" / f"checkpoint-{step}", ignore=shutil.ignore_patterns("laplace")
        )
    (tmp_path / "run" / "checkpoint-99").mkdir()
    data = ["--data", str(demo / "farm.yaml"), "--data-dir", str(demo / "data"), "--limit", "40", "--fit-limit", "40"]
    run = [str(tmp_path / "run"), "--checkpoints", *data, "--link", "probit", "--prior-method", "marglik"]
    app(["eval", *run, "--json"], standalone_mode=False)
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert [each["step"] for each in record["checkpoints"]] == [3, 12]
    assert set(record["skipped"]) == {"llla-kron", "llla-diag"} and "llla-kron left out" in printed.err
    assert {result.get("name") for result in record["checkpoints"][0]["results"]} == {None, "la-kron", "la-diag"}
    assert record["checkpoints"][0]["excluded"] == 0
    assert (tmp_path / "run" / "laplace" / "figures" / "checkpoints.png").is_file()
    app(["eval", *run], standalone_mode=False)
    assert "la-kron (probit)" in capsys.readouterr().out


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """An adapter with rows, and a run with one checkpoint of one posterior."""
    folder = make_adapter(tmp_path)
    shutil.copytree(folder / "adapter", folder / "run" / "checkpoint-3")
    monkeypatch.setattr(workflow, "POSTERIORS", {"la-diag": workflow.POSTERIORS["la-diag"]})
    return folder


def evaluated(folder: Path, run: str = "run", split: str | None = None, **settings) -> tuple[dict, set[str]]:
    """The record of the checkpoint, and what was done."""
    said: list[str] = []
    record = evaluate_checkpoints(
        ModelSettings(adapter=str(folder / run), device="cpu"),
        data_of(folder, split=split),
        EvalSettings(links=("mc-joint",), **settings),
        CheckpointSettings(),
        said.append,
    )["checkpoints"][0]
    steps = ("already scored", "fitting", "scoring")
    return record, {step for step in steps for line in said if line.endswith(f": {step}")}


def test_memory_that_ran_out_is_not_a_posterior_that_cannot_be(tiny, monkeypatch):
    """Only an adapter without such layers has none of these posteriors."""
    last_layer = FitSettings(name="llla-diag", structure="diag", subset="last-layer")
    monkeypatch.setattr(workflow, "POSTERIORS", {**workflow.POSTERIORS, "llla-diag": last_layer})

    def out_of_memory(model, data, settings, progress=None):
        if settings.name == "llla-diag":
            raise UsageError("one row of 48 tokens does not fit in memory")
        return fit(model, data, settings, progress)

    monkeypatch.setattr(workflow, "fit", out_of_memory)
    with pytest.raises(UsageError, match="does not fit in memory"):
        evaluated(tiny)
    monkeypatch.setattr(workflow, "fit", fit)
    record, _ = evaluated(tiny)
    assert {each.get("name") for each in record["results"]} == {None, "la-diag"}  # this adapter has no last layer


def change_weights(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: value + 0.5 for name, value in load_file(file).items()}, file, {"format": "pt"})


def change_base(base: Path) -> None:
    """Change one layer, and neither the size of a file nor its times."""
    file = base / "model.safetensors"
    before = file.stat()
    tensors = load_file(file)
    name = next(name for name in tensors if "mlp" in name)
    save_file({**tensors, name: tensors[name] * 2}, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_settings(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 3}))


@pytest.mark.parametrize("change", [change_weights, change_settings])
def test_a_checkpoint_that_was_trained_again_is_fitted_and_scored_again(tiny, change):
    checkpoint = tiny / "run" / "checkpoint-3"
    cache = checkpoint / "laplace" / workflow.CACHE_FILE
    first, done = evaluated(tiny)
    assert done == {"fitting", "scoring"} and evaluated(tiny) == (first, {"already scored"})
    change(checkpoint)
    second, done = evaluated(tiny)
    assert done == {"fitting", "scoring"} and second != first
    ignored = shutil.ignore_patterns("laplace")
    shutil.copytree(checkpoint, tiny / "fresh" / "checkpoint-3", ignore=ignored)
    assert evaluated(tiny, "fresh")[0] == second
    cache.unlink()
    assert evaluated(tiny) == (second, {"scoring"})
    change_weights(checkpoint)
    cache.unlink()
    assert evaluated(tiny)[1] == {"fitting", "scoring"}


def test_a_base_model_that_was_changed_in_place_is_noticed(tiny):
    first, _ = evaluated(tiny)
    change_base(tiny / "base")
    second, done = evaluated(tiny)
    assert done == {"fitting", "scoring"} and second != first
    assert evaluated(tiny) == (second, {"already scored"})


def test_rows_of_the_prior_and_of_ood_and_the_ensemble_are_looked_at(tiny):
    member = tiny / "member"
    shutil.copytree(tiny / "adapter", member)
    change_weights(member)
    shutil.copytree(tiny / "data", tiny / "other")
    (tiny / "data" / "validation.jsonl").rename(tiny / "data" / "test.jsonl")

    def write(place: str, seed: int) -> None:
        (tiny / place).write_bytes(b"".join(json_lines(12, seed)))

    def run() -> tuple[dict, set[str]]:
        more = {"ood": (str(tiny / "task.yaml"),), "ood_data_dirs": (tiny / "other",), "ensemble": (member,)}
        return evaluated(tiny, split="test", **more)

    write("data/validation.jsonl", 1)
    first, done = run()
    assert done == {"fitting", "scoring"} and run() == (first, {"already scored"})
    for change, expected in (
        (lambda: write("data/validation.jsonl", 2), {"fitting", "scoring"}),
        (lambda: write("other/validation.jsonl", 3), {"scoring"}),
        (lambda: write("data/test.jsonl", 4), {"fitting", "scoring"}),  # they might tune it, too
        (lambda: change_weights(member), {"scoring"}),
    ):
        change()
        second, done = run()
        assert done == expected and second != first
        first = second


def fit_own(folder: Path, **settings) -> Path:
    """Fit a posterior by hand, with a name of the command's own."""
    own = FitSettings(name="la-diag", structure="ekfac", prior_method="marglik", **settings)
    return fit(ModelSettings(adapter=str(folder / "run" / "checkpoint-3"), device="cpu"), data_of(folder), own).folder


def test_a_posterior_of_the_users_own_is_not_replaced(tiny):
    shutil.copytree(tiny / "adapter", tiny / "run" / "checkpoint-2")
    own = fit_own(tiny)
    refused = (
        r"checkpoint-3/laplace/la-diag: not made by eval --checkpoints.*; rename the folder, or give .*--output-dir"
    )
    with pytest.raises(PosteriorError, match=refused):
        evaluated(tiny)
    assert SavedPosterior(own).manifest.structure == "ekfac"
    assert not (tiny / "run" / "checkpoint-2" / "laplace").exists()
    own.rename(own.with_name("mine"))
    assert evaluated(tiny)[1] == {"fitting", "scoring"}
    fit_own(tiny, overwrite=True)
    with pytest.raises(PosteriorError, match=refused):
        evaluated(tiny)
    assert SavedPosterior(own).manifest.structure == "ekfac"


def test_posteriors_of_earlier_and_interrupted_runs_are_replaced(tiny, monkeypatch):
    laplace = tiny / "run" / "checkpoint-3" / "laplace"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(workflow, "tune_prior", Mock(side_effect=KeyboardInterrupt))
        evaluated(tiny)
    assert (laplace / "la-diag").exists()
    first, done = evaluated(tiny)
    assert done == {"fitting", "scoring"}

    (laplace / ".la-diag.made-with").write_text("5d41402abc4b2a76b9719d911017c592" * 2)  # as version 0.1 wrote it
    (laplace / workflow.CACHE_FILE).unlink()
    assert evaluated(tiny) == (first, {"fitting", "scoring"})

    (laplace / "la-diag" / "posterior.json").write_text("{half")
    assert evaluated(tiny) == (first, {"fitting", "scoring"})


def test_bad_runs(demo, tmp_path):
    with pytest.raises(UsageError, match="no checkpoint-STEP"):
        evaluate_checkpoints(
            ModelSettings(adapter=str(tmp_path)), DataSettings(), EvalSettings(), CheckpointSettings(), print
        )
    shutil.copytree(demo / "adapter", tmp_path / "checkpoint-1")
    with pytest.raises(UsageError, match="--data is missing"):
        app(["eval", str(tmp_path), "--checkpoints"], standalone_mode=False)
    with pytest.raises(UsageError, match="adapted"):
        app(["eval", str(tmp_path), "--checkpoints", "--prior-method", "adapted"], standalone_mode=False)


def save_tiny_encoder(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", *"abcde"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    config = BertConfig(
        vocab_size=len(words), hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_the_script_trains_a_classifier_whose_head_is_llla(tmp_path):
    save_tiny_encoder(tmp_path / "base")
    rows = [{"body": "a b c a" if i % 2 else "d e d", "label": i % 2} for i in range(24)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        'task: t\ndoc_to_inputs: ["{{body}}"]\ndoc_to_choice: ["no", "yes"]\ndoc_to_target: label\n'
    )
    command = [sys.executable, ROOT / "docs" / "recipes" / "finetune.py", "--kind", "classifier", "--base-model"]
    command += [tmp_path / "base", "--data", tmp_path / "task.yaml", "--data-dir", tmp_path, "--output-dir"]
    command += [tmp_path / "run", "--steps", "2", "--save-every", "2", "--batch-size", "8"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    record = evaluate_checkpoints(
        ModelSettings(adapter=str(tmp_path / "run")),
        DataSettings(str(tmp_path / "task.yaml"), tmp_path),
        EvalSettings(links=("mc-joint",)),
        CheckpointSettings(prior_method="marglik"),
        print,
    )
    assert record["skipped"] == {}
    names = [result.get("name") for result in record["checkpoints"][0]["results"]]
    assert names[2:] == POSTERIORS
