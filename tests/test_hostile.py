"""Files made by someone who means harm: no code is run, nothing outside is touched, nothing raw reaches a terminal."""

from __future__ import annotations

import io
import json
import os
import pickle
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from lapora import report
from lapora.config import DataSettings, PredictSettings, PriorSettings
from lapora.errors import AdapterError, DataError, LaporaError, PosteriorError, UsageError
from lapora.models.adapter import read_adapter
from lapora.report import tables
from lapora.storage import manifest
from lapora.storage.saved import SavedPosterior, posterior_folder
from lapora.tasks import load_task, render
from lapora.workflows.evaluate import evaluate
from lapora.workflows.predict import predict
from lapora.workflows.tune_prior import tune_prior
from tiny_adapter import command, fit_tiny, json_lines, make_adapter, model_of

MARK = "was-here"


class Bomb:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, MARK))


@pytest.fixture
def tiny(tmp_path) -> Path:
    fit_tiny(make_adapter(tmp_path))
    return tmp_path


def test_an_adapter_that_is_a_pickle_is_refused_unopened(tiny):
    (tiny / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tiny / MARK)))
    assert len(list(predict(model_of(tiny), PredictSettings(), json_lines(1)))) == 1  # beside safetensors: ignored
    (tiny / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.bin, a pickle, which lapora never opens"):
        fit_tiny(tiny, overwrite=True)
    assert not (tiny / MARK).exists()


@pytest.mark.parametrize("protocol", ["plain", "torch"])
def test_a_base_model_that_is_a_pickle_runs_nothing(tiny, protocol):
    (tiny / "base" / "model.safetensors").unlink()
    bomb = {"weight": Bomb(tiny / MARK)}
    if protocol == "plain":
        (tiny / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, tiny / "base" / "pytorch_model.bin")
    with pytest.raises(AdapterError) as caught:
        list(predict(model_of(tiny), PredictSettings(), json_lines(1)))
    assert not (tiny / MARK).exists() and "\n" not in str(caught.value)
    assert "could run code" in str(caught.value)


def test_a_posterior_that_is_a_pickle_runs_nothing(tiny):
    (tiny / "adapter" / "laplace" / "default" / "factors.safetensors").write_bytes(pickle.dumps(Bomb(tiny / MARK)))
    with pytest.raises(PosteriorError, match="damaged"):
        list(predict(model_of(tiny), PredictSettings(), json_lines(1)))
    assert not (tiny / MARK).exists()


CODE = "from pathlib import Path\nPath({path!r}).write_text('x')\nfrom transformers import {names}\n{more}\n"


def bring_code(tiny: Path) -> None:
    """A base model whose repository asks for its own classes."""
    code = CODE.format(
        path=str(tiny / MARK),
        names="LlamaConfig, LlamaForCausalLM",
        more=(
            "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
            "class Mine(LlamaForCausalLM):\n    config_class = MineConfig"
        ),
    )
    (tiny / "base" / "mine.py").write_text(code)
    file = tiny / "base" / "config.json"
    config = json.loads(file.read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}}
    file.write_text(json.dumps(config))


def test_a_models_own_code_runs_only_where_it_was_asked_for(tiny, monkeypatch, capfdbinary):
    bring_code(tiny)
    arguments = ("predict", tiny / "adapter", "--device", "cpu")
    status, out, errors = command(monkeypatch, capfdbinary, *arguments, stdin=json_lines(1)[0])
    assert (status, out) == (3, b"") and not (tiny / MARK).exists() and len(errors.splitlines()) == 1
    monkeypatch.setenv("HF_MODULES_CACHE", str(tiny / "modules"))
    command(monkeypatch, capfdbinary, *arguments, "--trust-remote-code", stdin=json_lines(1)[0])
    assert (tiny / MARK).exists()


def test_an_adapters_configuration_nested_too_deeply(tiny):
    for content in ("[" * 100_000, '{"a":' * 50_000, '{"peft_type": "LORA", "r": ' + "7" * 6000 + "}"):
        (tiny / "adapter" / "adapter_config.json").write_text(content)
        with pytest.raises(AdapterError, match="cannot be read as JSON"):
            read_adapter(tiny / "adapter")


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "/etc", "", ".hidden", "a\n", "a\0", "é", "x" * 101, "-x"])
def test_a_posteriors_name_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(UsageError, match="--name"):
        posterior_folder(tmp_path, name)


def test_names_in_a_manifest_are_names_and_never_paths(tiny):
    """A forger makes every checksum fit; a tensor's name that looks like a path is still only a name."""
    folder = tiny / "adapter" / "laplace" / "default"
    saved = SavedPosterior(folder)
    (tiny / "outside.safetensors").write_bytes((folder / "factors.safetensors").read_bytes())
    before = sorted(path for path in tiny.rglob("*"))
    for name in ("../../../outside", "/etc/passwd", "..\\x"):
        parameters = [dict(parameter) for parameter in saved.content["parameters"]]
        parameters[0]["name"] = parameters[0]["input_of"] = name
        saved.rewrite_manifest({"parameters": parameters})
        with pytest.raises(LaporaError):
            list(predict(model_of(tiny), PredictSettings(), json_lines(1)))
        saved.rewrite_manifest({"tensors": {name: next(iter(saved.content["tensors"].values()))}})
        with pytest.raises(LaporaError):
            saved.gaussian()
    assert sorted(path for path in tiny.rglob("*")) == before


def test_a_split_and_a_task_in_a_manifest_cannot_name_other_files(tiny):
    folder = tiny / "adapter" / "laplace" / "default"
    for split in ("../../etc/passwd", "/etc/passwd", ".."):
        with pytest.raises(DataError, match="is not a valid file name"):
            evaluate(model_of(tiny), DataSettings(split=split))
    saved = SavedPosterior(folder)
    task = saved.content["task"] | {"doc_to_text": "{{ ''.__class__.__mro__ }}"}
    saved.rewrite_manifest({"task": task})
    with pytest.raises(LaporaError) as caught:
        list(predict(model_of(tiny), PredictSettings(), json_lines(1)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ story.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ story.format }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{{ 'x' * 10 ** 9 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ story | attr('__class__') }}",
    ],
)
def test_templates_are_sandboxed(tmp_path, template):
    task = {"task": "t", "doc_to_text": template, "doc_to_choice": ["no", "yes"], "doc_to_target": "0"}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(task))
    with pytest.raises(DataError) as caught:
        render(load_task(str(tmp_path / "t.yaml")), {"story": "x"}, kind="causal", labels="ignore")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "task: !!python/name:os.system",
        "a: &a [x, x]\nb: [*a, *a]",
        "task: " + "[" * 5000,
        "task: t\n# " + "x" * 70_000,
        "\0",
    ],
)
def test_task_files_are_data(tmp_path, text):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        load_task(str(tmp_path / "t.yaml"))
    assert "\n" not in str(caught.value)


NASTY = "[red]x[/] [/nothing] :bomb: \x1b[2J \x9b31m \u202e"


def test_tables_print_markup_and_escapes_as_text(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(tables, "Console", lambda **_: Console(file=shown, width=300, force_terminal=True))
    scores = {"accuracy": 0.5, "ece": 0.1, "nll": 0.7, "brier": 0.5}
    results = [{"method": "map", **scores}, {"method": "laplace", "name": NASTY, "link": "map", **scores}]
    report.print_evaluation({"task": NASTY, "split": NASTY, "n": 1, "results": results})
    task = {"task": NASTY, "kinds": [NASTY], "choices": [NASTY], "metric": NASTY, "hub": NASTY}
    report.print_tasks([task])
    plain = io.StringIO()
    monkeypatch.setattr(tables, "Console", lambda **_: Console(file=plain, width=300))
    with redirect_stdout(plain):
        report.print_tasks([task])
    base = manifest.BaseModel(name=NASTY, revision=None, quantization="none", dtype=NASTY, fingerprint="0")
    record = manifest.Manifest(
        **dict.fromkeys(("structure", "weight_sharing", "fisher", "subset"), NASTY),
        format_version=1,
        adapter="0",
        base_model=base,
        task={"task": NASTY},
        answers=manifest.Answers(choices=[NASTY, "b"], token_ids=None),
        data=manifest.Data(split=NASTY, n=1, fingerprint="0", max_length=1),
        parameters=[],
        log_likelihood=None,
    )
    report.print_posterior(record, manifest.Prior(structure="scalar", precision=1.0, method=NASTY))
    for text in (shown.getvalue(), plain.getvalue()):
        assert "[red]x[/] [/nothing] :bomb:" in text
        assert "\x1b[2J" not in text and "\x9b" not in text and "\u202e" not in text


def test_answers_and_ids_reach_stdout_without_terminal_controls(tiny, monkeypatch, capfdbinary):
    line = json.dumps({"story": "cows", "id": NASTY}).encode()
    status, out, _ = command(monkeypatch, capfdbinary, "predict", tiny / "adapter", "--device", "cpu", stdin=line)
    assert status == 0 and json.loads(out)["id"] == NASTY
    assert not any(character in out.decode() for character in ("\x1b", "\x9b", "\u202e"))


def test_error_messages_have_no_terminal_controls(tiny, monkeypatch, capfdbinary):
    for arguments in (("predict", f"no{NASTY}"), ("inspect", f"no{NASTY}"), ("fit", "x", "--data", f"{NASTY}.yaml")):
        status, out, errors = command(monkeypatch, capfdbinary, *arguments)
        assert status in (3, 4, 5) and out == b"" and len(errors.splitlines()) == 1
        assert "\x1b" not in errors and "\x9b" not in errors and "\u202e" not in errors


def test_what_is_saved_is_safetensors_and_json_alone(tiny):
    folder = tiny / "adapter" / "laplace" / "default"
    assert sorted(file.name for file in folder.iterdir()) == ["factors.safetensors", "posterior.json"]
    assert load_file(folder / "factors.safetensors") and json.loads((folder / "posterior.json").read_text())


def test_links_beside_a_posterior_do_not_lead_the_writing_elsewhere(tiny):
    """What `fit` and `tune-prior` write on their way has names that anyone can guess."""
    laplace, elsewhere = tiny / "adapter" / "laplace", tiny / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    for name in (".default.partial", ".default.new", ".default.previous"):
        (laplace / name).symlink_to(elsewhere)
    (laplace / ".default.lock").symlink_to(elsewhere / "precious")
    with pytest.raises(PosteriorError, match="cannot be written"):
        fit_tiny(tiny, overwrite=True)
    (laplace / ".default.lock").unlink()
    for options in ({"resume": True}, {}):
        fit_tiny(tiny, overwrite=True, save_every=0.0, **options)
    (laplace / "default" / ".posterior.json.new").symlink_to(elsewhere / "precious")
    tune_prior(model_of(tiny), settings=PriorSettings(method="marglik"))
    (laplace / ".default.partial").mkdir()
    (laplace / ".default.partial" / "pass-0.safetensors.new").symlink_to(elsewhere / "precious")
    fit_tiny(tiny, overwrite=True, save_every=0.0, resume=True)
    assert [(each.name, each.read_text()) for each in elsewhere.iterdir()] == [("precious", "precious")]
    assert [each.name for each in laplace.iterdir()] == ["default"]
    assert len(list(predict(model_of(tiny), PredictSettings(), json_lines(2)))) == 2


@pytest.mark.parametrize("name", ["factors.safetensors", "posterior.json"])
def test_named_pipes_in_place_of_files_are_not_waited_for(tiny, name):
    file = tiny / "adapter" / "laplace" / "default" / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(PosteriorError, match=r"missing|no posterior there"):
        list(predict(model_of(tiny), PredictSettings(), json_lines(2)))
    partial = file.parent.with_name(".default.partial")
    partial.mkdir()
    os.mkfifo(partial / "pass-0.safetensors")
    with pytest.raises(PosteriorError, match="not a regular file"):
        fit_tiny(tiny, overwrite=True, resume=True)
