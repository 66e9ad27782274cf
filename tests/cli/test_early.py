"""What is said before PyTorch is loaded, after Ctrl-C, and at the end of a command."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from contextlib import nullcontext
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from lapora.cli import console, early
from lapora.cli.app import run
from lapora.cli.fit import saying_how_to_resume
from lapora.config import FitSettings, ModelSettings
from lapora.errors import UsageError
from lapora.report.tables import _nats
from lapora.workflows.commands import command_line, tune_prior_arguments
from tiny_adapter import command, fit_tiny, make_adapter, make_rows
from tiny_heads import OUTPUTS, make_head, task_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = make_adapter(tmp_path_factory.mktemp("early"))
    fit_tiny(folder)
    task = yaml.safe_load((folder / "task.yaml").read_text())
    for name, changes in {
        "fields": {"doc_to_text": "{{tale}}"},
        "labels": {"doc_to_target": "answer"},
        "classes": {"doc_to_choice": ["x", "y"], "doc_to_target": "story"},
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, **changes}))
    return folder


OTHER = ("--data-dir", "data", "--name", "other")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("fit", "none", "--data", "boolq"), 3, ["none: no such directory"]),
        (
            ("fit", "none", "--data", "bool", "--data-dir", "none"),
            3,
            ["none: no such directory", "no built-in task 'bool'"],
        ),
        (("fit", "adapter", "--data", "task.yaml", "--data-dir", "none"), 5, ["no such folder", "exists already"]),
        (("calibrate", "adapter", "--data", "task.yaml", "--data-dir", "data"), 4, ["exists already"]),
        (("predict", "adapter", "none.jsonl"), 5, ["none.jsonl: cannot be read"]),
        (("predict", "adapter", "--name", "none"), 4, ["no posterior there"]),
        (("eval", "none"), 3, ["none: no such directory"]),
        (("eval", "adapter", "--split", "none", "--data-dir", "data"), 5, ["no none.jsonl"]),
        (("tune-prior", "adapter", "--name", "none"), 4, ["no posterior there"]),
        (("fit", "adapter", *OTHER, "--data", "fields.yaml"), 5, ["no value for tale"]),
        (("fit", "adapter", *OTHER, "--data", "labels.yaml"), 5, ["no row has answer", "--unlabelled"]),
        (("fit", "adapter", *OTHER, "--data", "classes.yaml"), 5, ["unknown label", "the 2 answers are x, y"]),
        (("fit", "adapter", *OTHER, "--data", "task.yaml", "--device", "gpu"), 2, ["--device gpu: no such device"]),
        (("eval", "adapter", "--device", "gpu"), 2, ["--device gpu: no such device"]),
        (("eval", "adapter", "--fail-if", "eec>0.1"), 2, ["eec"]),
        (("predict", "adapter", "--device", "mps"), 2, ["--device mps: not supported (it has no float64); use cpu"]),
    ],
)
def test_mistakes_are_said_together_and_without_torch(tiny, arguments, status, words):
    code = (
        "import sys\nfrom lapora.cli.app import run\ntry:\n    run()\nfinally:\n"
        "    print(any(each in sys.modules for each in ('torch', 'transformers', 'datasets')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tiny, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (status, "False\n"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and all(each in done.stderr for each in words)


@pytest.mark.skipif(sys.platform != "linux", reason="drivers are looked for on Linux")
@pytest.mark.parametrize(("driver", "refused"), [("none", True), ("cuda", False), ("amd", False)])
def test_a_gpu_without_a_driver_is_refused(driver, refused, monkeypatch):
    def load(name: str) -> None:
        if driver != "cuda":
            raise OSError(name)

    monkeypatch.setattr(early.ctypes, "CDLL", load)
    monkeypatch.setattr(early.Path, "exists", lambda path: str(path) == "/dev/kfd" and driver == "amd")
    with pytest.raises(UsageError, match="cuda:1: not available") if refused else nullcontext():
        early._check_device("cuda:1")
    early._check_device("cpu")
    early._check_device("cuda:1", here=False)  # of a dry run


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    """Heads of one and of three outputs, a causal adapter, fitted posteriors, and a task of every likelihood."""
    root = tmp_path_factory.mktemp("heads")
    make_adapter(root / "causal")
    make_head(root / "labels", "gaussian", problem_type="multi_label_classification")
    for name, likelihood in (("one", "gaussian"), ("three", "multilabel")):
        fit_tiny(make_head(root / name, likelihood))
    for likelihood, outputs in OUTPUTS.items():
        content = {**task_of(likelihood, outputs), "task": likelihood}
        (root / f"{likelihood}.yaml").write_text(yaml.safe_dump(content))
    (root / "two.yaml").write_text(yaml.safe_dump({**task_of("categorical", 2), "task": "two"}))
    shutil.copytree(root / "one" / "adapter", root / "unsaved", ignore=shutil.ignore_patterns("laplace"))
    file = root / "unsaved" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "score" not in key}, file)
    return root


NEW = ("--data-dir", "one/data", "--name", "new")
CONTRADICTIONS = [
    # kind of model, number of outputs, problem_type
    (("fit", "causal/adapter", *NEW, "--data", "gaussian.yaml"), 5, ["likelihood gaussian", "task_type CAUSAL_LM"]),
    (("fit", "causal/adapter", *NEW, "--data", "preference.yaml"), 5, ["likelihood preference", "task_type CAUSAL_LM"]),
    (("fit", "three/adapter", *NEW, "--data", "gaussian.yaml"), 5, ["1 outputs of likelihood gaussian", "head 3"]),
    (("fit", "three/adapter", *NEW, "--data", "bernoulli.yaml"), 5, ["1 outputs of likelihood bernoulli", "head 3"]),
    (("fit", "one/adapter", *NEW, "--data", "multilabel.yaml"), 5, ["3 outputs of likelihood multilabel", "head 1"]),
    (("fit", "one/adapter", *NEW, "--data", "two.yaml"), 5, ["2 answers", "head 1 outputs", "bernoulli, gaussian or"]),
    (("fit", "unsaved", *NEW, "--data", "two.yaml"), 5, ["2 answers", "head 1 outputs"]),
    (("fit", "labels/adapter", *NEW, "--data", "gaussian.yaml"), 5, ["likelihood gaussian", "multi_label_classifi"]),
    (("calibrate", "labels/adapter", *NEW, "--data", "gaussian.yaml"), 5, ["likelihood gaussian", "multi_label_cla"]),
    # options
    (("fit", "one/adapter", *NEW, "--data", "gaussian.yaml", "--engine", "asdl"), 2, ["--engine asdl", "gaussian"]),
    (("fit", "one/adapter", *NEW, "--data", "gaussian.yaml", "--unlabelled"), 2, ["--unlabelled", "gaussian"]),
    (("calibrate", "one/adapter", *NEW, "--data", "gaussian.yaml", "--link", "probit"), 2, ["--link probit", "gaus"]),
    (("tune-prior", "one/adapter", "--link", "bridge"), 2, ["--link bridge", "likelihood gaussian", "mc-joint or map"]),
    (("tune-prior", "one/adapter", "--method", "adapted"), 2, ["--method adapted", "likelihood gaussian"]),
    (("predict", "one/adapter", "gaussian.yaml", "--link", "probit"), 2, ["--link probit", "likelihood gaussian"]),
    (("predict", "one/adapter", "gaussian.yaml", "--abstain-below", "0.5"), 2, ["--abstain-below", "gaussian"]),
    (("predict", "one/adapter", "gaussian.yaml", "--penalty", "1"), 2, ["--penalty", "gaussian", "preference"]),
    (("predict", "three/adapter", "gaussian.yaml", "--interval", "0.5"), 2, ["--interval", "multilabel", "gaussian"]),
    (("eval", "one/adapter", "--link", "mc-indep"), 2, ["--link mc-indep", "likelihood gaussian"]),
    (("eval", "one/adapter", "--methods", "all", "--link", "probit"), 2, ["--link probit", "likelihood gaussian"]),
    (("eval", "three/adapter", "--interval", "0.9"), 2, ["--interval", "likelihood multilabel", "gaussian"]),
    (("eval", "three/adapter", "--coverage", "0.5"), 2, ["--coverage", "likelihood multilabel"]),
    (("eval", "one/adapter", "--fail-if", "accuracy<0.5"), 2, ["accuracy", "likelihood gaussian", "rmse"]),
    (("eval", "one", "--checkpoints", "--data", "gaussian.yaml", "--link", "probit"), 2, ["--link probit", "gaussian"]),
    # rows
    (("eval", "one/adapter", "--data", "bernoulli.yaml"), 5, ["likelihood bernoulli", "fitted with gaussian"]),
    (("tune-prior", "one/adapter", "--data", "preference.yaml"), 5, ["likelihood preference", "fitted with gaussian"]),
    (("eval", "one/adapter", "--ood", "preference.yaml"), 5, ["--ood preference", "posterior's gaussian"]),
    (("eval", "three/adapter", "--ood", "two.yaml"), 5, ["--ood two: 2 answers", "the adapter has 3"]),
    (("eval", "three/adapter", "--ood", "nothing"), 5, ["no built-in task 'nothing'"]),
]
ALL = """
import contextlib, io, json, sys
from lapora.cli.app import run
found = []
for arguments in json.load(sys.stdin):
    sys.argv, said, status = ["lapora", *arguments], io.StringIO(), 0
    with contextlib.redirect_stderr(said):
        try:
            run()
        except SystemExit as end:
            status = end.code
    found.append([status, said.getvalue(), sorted({"torch", "transformers", "datasets"} & set(sys.modules))])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def said(heads) -> list[tuple[int, str, list[str]]]:
    """Exit status, standard error and slow imports of each command, in one process."""
    arguments = json.dumps([each for each, *_ in CONTRADICTIONS])
    done = subprocess.run(
        [sys.executable, "-c", ALL], cwd=heads, input=arguments, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", range(len(CONTRADICTIONS)), ids=[" ".join(each) for each, *_ in CONTRADICTIONS])
def test_contradictions_of_the_likelihood_are_said_without_torch(said, case):
    _, status, words = CONTRADICTIONS[case]
    found, text, slow = said[case]
    assert (found, slow) == (status, []), text
    assert len(text.splitlines()) == 1 and all(each in text for each in words), text


OUTPUTS_OF_EVAL = [
    (("--output", "data/train.jsonl"), 5, "its first line is not a result of `lapora eval --output`"),
    (("--output", "page.html"), 2, "results are JSON lines; give a name that ends in .jsonl"),
    (("--output", "none/results.jsonl"), 5, "none/results.jsonl: cannot be written (no folder none)"),
    (("--output", "data"), 5, "data: cannot be written (a folder); give another --output"),
    (("--report", "none/page.html"), 5, "none/page.html: cannot be written (no folder none); give another --report"),
    (("--report", "data"), 5, "data: cannot be written (a folder)"),
    (("--plots", "task.yaml"), 5, "is not a folder); give another --plots"),
    (("--plots", "task.yaml/inner"), 5, "is not a folder); give another --plots"),
]


@pytest.mark.parametrize("more", [(), ("--checkpoints", "--data", "task.yaml")])
@pytest.mark.parametrize(("options", "status", "words"), OUTPUTS_OF_EVAL)
def test_outputs_of_eval_are_checked_before_anything_is_loaded(
    tiny, monkeypatch, capfdbinary, options, status, words, more
):
    monkeypatch.chdir(tiny)
    before = {file: file.read_bytes() for file in tiny.glob("data/*")}
    monkeypatch.setattr("lapora.workflows.evaluate.run_evaluation", None)
    monkeypatch.setattr("lapora.workflows.checkpoints.evaluate_checkpoints", None)
    found, out, err = command(monkeypatch, capfdbinary, "eval", "adapter", *options, *more)
    assert (found, out) == (status, b"") and words in err and len(err.splitlines()) == 1
    assert {file: file.read_bytes() for file in tiny.glob("data/*")} == before


def test_messages_are_wrapped_between_words_on_a_terminal(monkeypatch):
    path, verb = "/a/" + "long/" * 20, "lapora predict adapter rows.jsonl > predictions.jsonl"
    text = f"note: the scores are {'far ' * 30}apart by 95 % or more; give {path} or `{verb}`"
    for terminal in (True, False):
        said = StringIO()
        screen = Console(file=said, width=60, force_terminal=terminal, soft_wrap=True, highlight=False, no_color=True)
        monkeypatch.setattr(console, "_stderr", screen)
        console.print_message(text)
        lines = said.getvalue().splitlines()
        assert " ".join(lines) == text and (len(lines) > 1) == terminal
        assert not terminal or all(len(line) <= 60 or line.rstrip() == path for line in lines)
        assert any(f"`{verb}`" in line for line in lines) and any("95 %" in line for line in lines)
        said.truncate(0)
        console.print_command("next", "lapora " + "word " * 40)
        assert len(said.getvalue().splitlines()) == 1, "a command is copied as one line"


def test_retries_of_the_hubs_client_are_one_message(monkeypatch, capsys):
    client = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(client, "filters", [])
    monkeypatch.setattr(sys, "argv", ["lapora", "--version"])
    with pytest.raises(SystemExit):
        run()
    monkeypatch.setattr(console, "_stderr", Console(stderr=True, soft_wrap=True))
    capsys.readouterr()
    for attempt in range(3):
        client.warning("'no answer' thrown while requesting HEAD https://huggingface.co/a/b")
        client.warning(f"Retrying in {attempt}s [Retry {attempt}/5].")
    assert capsys.readouterr().err == "the Hugging Face Hub does not answer; trying again for up to 30 seconds\n"


def test_options_of_the_optimizer_without_effect_are_noted(tiny, monkeypatch, capfdbinary):
    def said(*options):
        status, _, err = command(monkeypatch, capfdbinary, "tune-prior", tiny / "adapter", *options)
        assert status == 0, err
        return [line for line in err.splitlines() if "no effect" in line]

    assert said("--optimizer", "adam") == ["note: --optimizer adam has no effect without --method marglik"]
    assert said("--steps", "2") == ["note: --lr and --steps have no effect without --optimizer adam"]
    assert said("--optimizer", "adam", "--steps", "2", "--method", "marglik") == []
    assert said() == []


def test_a_score_that_no_run_has_is_said(tmp_path, monkeypatch, capfdbinary):
    results = [{"method": "map", "accuracy": 0.5, "nll": 1.0, "ece": 0.1}]
    record = {"task": "t", "split": "validation", "n": 3, "results": results}
    (tmp_path / "results.jsonl").write_text(json.dumps(record) + "\n")
    for metric, words in (("rmse", ["no run has rmse"]), ("nll", [])):
        status, _, err = command(monkeypatch, capfdbinary, "compare", tmp_path / "results.jsonl", "--metric", metric)
        assert status == 0 and err.splitlines() == words


def test_tables_in_a_pipe_have_no_padding_and_nothing_is_cut(tmp_path, monkeypatch, capfdbinary):
    folder = make_adapter(tmp_path / ("long-" * 12))
    fit_tiny(folder)
    for words in (("inspect",), ("eval", "--device", "cpu")):
        status, out, err = command(monkeypatch, capfdbinary, words[0], folder / "adapter", *words[1:])
        text = out.decode()
        assert status == 0 and text, err
        assert not [line for line in text.splitlines() if line != line.rstrip()] and "…" not in text
        assert words[0] == "eval" or str(folder / "base") in text.replace("│", "").replace(" ", "").replace("\n", "")


@pytest.mark.parametrize("kept", [True, False])
def test_control_c_says_how_to_resume_where_there_is_a_checkpoint(tmp_path, kept, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lapora", "fit", "a b", "--data", "boolq"])
    if kept:
        (tmp_path / "laplace" / ".default.partial").mkdir(parents=True)
        (tmp_path / "laplace" / ".default.partial" / "pass-0.safetensors").touch()
    with pytest.raises(KeyboardInterrupt), saying_how_to_resume(ModelSettings(str(tmp_path)), FitSettings()):
        raise KeyboardInterrupt
    expected = "to resume from the checkpoint: lapora fit 'a b' --data boolq --resume\n"
    assert capsys.readouterr().err == (expected if kept else "")


def test_predict_and_fit_say_what_comes_next(tmp_path, monkeypatch, capfdbinary):
    folder = make_adapter(tmp_path)
    words = ["--data", folder / "task.yaml", "--data-dir", folder / "data", "--base-model", folder / "base"]
    status, _, err = command(monkeypatch, capfdbinary, "fit", folder / "adapter", *words)
    tuning = f"lapora tune-prior {folder}/adapter"
    assert status == 0 and err.splitlines()[-1] == f"next: {tuning}"
    line = str(make_rows(1)[0]).replace("'", '"').encode()

    def predict(*options: str) -> list[str]:
        arguments = ("predict", folder / "adapter", "--device", "cpu", *options)
        status, out, err = command(monkeypatch, capfdbinary, *arguments, stdin=line)
        assert status == 0 and len(out.splitlines()) == 1
        return err.splitlines()

    assert predict() == [f"note: the prior was not tuned on labelled rows; if there are any: {tuning}"]
    assert predict("--link", "map") == []
    command(monkeypatch, capfdbinary, "tune-prior", folder / "adapter", "--method", "marglik")
    (said,) = predict()
    assert said.startswith("warning: the prior precision is that of the marginal likelihood") and said.endswith(tuning)
    command(monkeypatch, capfdbinary, "tune-prior", folder / "adapter")
    assert predict() == []


def test_commands_have_the_options_that_they_need():
    model = ModelSettings("my adapter", base_model="b", output_dir=Path("o"), dtype="float16", trust_remote_code=True)
    typed = command_line(tune_prior_arguments(model, "x"))
    assert typed == "lapora tune-prior 'my adapter' --name x --output-dir o --base-model b --trust-remote-code"
    assert (
        command_line(["predict", "a", "b"], [".venv/bin/lapora"]) == ".venv/bin/lapora predict a b > predictions.jsonl"
    )


def test_the_program_is_called_as_it_was_started(tmp_path, monkeypatch):
    script = tmp_path / ".venv" / "bin" / "lapora"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [".venv/bin/lapora"])
    assert console.program() == [".venv/bin/lapora"]
    monkeypatch.setenv("PATH", str(script.parent))
    assert console.program() == ["lapora"]
    monkeypatch.setattr(sys, "argv", ["/site-packages/lapora/__main__.py"])
    assert console.program() == [sys.executable, "-m", "lapora"]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert console.program() == [Path(sys.executable).name, "-m", "lapora"]


def test_a_number_of_absurd_size_is_short():
    assert _nats(-4371054162.36) == "-4.37e+09 nats" and _nats(-71.234) == "-71.23 nats"
