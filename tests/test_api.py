"""The Python API: the same numbers as the commands, and a model in memory left as it was."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lapora
from lapora.errors import AdapterError, DataError
from lapora.model.adapter import read_adapter
from lapora.model.loading import load_model
from tiny_adapter import fit_tiny, json_lines, make_adapter, make_rows, model_of


def loaded(folder):
    return load_model(read_adapter(folder / "adapter"), device="cpu")


def training_state(model):
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: parameter.dtype for name, parameter in model.named_parameters()},
        {name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()},
        {name: value.clone() for name, value in model.state_dict().items()},
        model.config.get_text_config().pad_token_id,
    )


def assert_same_state(before, after):
    assert before[:4] == after[:4]
    assert all(torch.equal(before[4][name], value) for name, value in after[4].items())
    assert before[5] == after[5]


@pytest.fixture
def in_memory(tmp_path):
    folder = make_adapter(tmp_path)
    model = loaded(folder)
    model.model.train()
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    return folder, model.model, model.tokenizer, rows, yaml.safe_load((folder / "task.yaml").read_text())


def test_importing_lapora_imports_no_torch():
    code = "import sys, lapora; assert 'torch' not in sys.modules; lapora.load; assert 'torch' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no_such"):
        lapora.no_such  # noqa: B018


def test_the_examples_of_the_docstring_run(tmp_path, monkeypatch):
    make_adapter(tmp_path)
    monkeypatch.chdir(tmp_path)
    from lapora import api

    found = doctest.testmod(api)
    assert found.attempted >= 8
    assert found.failed == 0


def test_predictions_are_those_of_the_command(tmp_path):
    from lapora.config import PredictSettings
    from lapora.workflows.predict import predict

    folder = make_adapter(tmp_path)
    fit_tiny(folder)
    records = list(predict(model_of(folder), PredictSettings(logits=True), json_lines(9)))
    answers = lapora.load(folder / "adapter", device="cpu").predict(make_rows(9, 5))
    assert [answer.probabilities for answer in answers] == [record["probabilities"] for record in records]
    assert [answer.logit_covariance for answer in answers] == [record["logits"]["covariance"] for record in records]
    assert [answer.map_probabilities for answer in answers] == [record["map_probabilities"] for record in records]


def test_a_model_in_memory_has_the_posterior_of_its_files(in_memory):
    folder, model, tokenizer, rows, task = in_memory
    before = training_state(model)
    predictor = lapora.fit_model(model, tokenizer, rows, task=task, output_dir=folder / "memory")
    there = predictor.predict(make_rows(7, 5))
    assert_same_state(before, training_state(model))

    fit_tiny(folder)
    from_files = load_file(folder / "adapter" / "laplace" / "default" / "factors.safetensors")
    in_place = load_file(folder / "memory" / "laplace" / "default" / "factors.safetensors")
    assert from_files.keys() == in_place.keys()
    for key, value in from_files.items():
        assert torch.equal(value, in_place[key]), key
    answers = lapora.load(folder / "adapter", device="cpu").predict(make_rows(7, 5))
    assert [answer.probabilities for answer in answers] == [answer.probabilities for answer in there]


def test_a_posterior_fitted_in_memory_loads_with_the_saved_adapter(in_memory):
    folder, model, tokenizer, rows, task = in_memory
    lapora.fit_model(model, tokenizer, rows, task=task, output_dir=folder / "memory")
    reloaded = lapora.load(folder / "adapter", output_dir=folder / "memory", device="cpu")
    assert len(reloaded.predict(["the cows are in the barn ?"])) == 1


def test_the_model_is_given_back_after_an_error(in_memory):
    _, model, tokenizer, rows, task = in_memory
    before = training_state(model)
    with pytest.raises(DataError, match="story"):
        lapora.fit_model(model, tokenizer, [{"tale": "no such field"}], task=task)

    def stop(done: int, total: int) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        lapora.fit_model(model, tokenizer, rows, task=task, progress=stop)
    assert_same_state(before, training_state(model))


def test_training_goes_on_after_a_fit(in_memory):
    _, model, tokenizer, rows, task = in_memory
    lapora.fit_model(model, tokenizer, rows, task=task).predict(rows[:2])
    ids = tokenizer("the cows are in the barn", return_tensors="pt")
    model(input_ids=ids["input_ids"], labels=ids["input_ids"]).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert gradients and all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_what_is_no_peft_model_is_refused(in_memory):
    _, _, tokenizer, rows, task = in_memory
    with pytest.raises(AdapterError, match="not a PEFT model"):
        lapora.fit_model(torch.nn.Linear(2, 2), tokenizer, rows, task=task)
