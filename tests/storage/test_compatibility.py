"""A posterior is used with the adapter, base model, tokenizer and answers it was fitted to, or not at all."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapora.config import DataSettings, FitSettings, PredictSettings
from lapora.errors import LaporaWarning, PosteriorError
from lapora.models import loading
from lapora.storage.saved import SavedPosterior
from lapora.workflows.evaluate import evaluate
from lapora.workflows.fit import fit
from lapora.workflows.predict import predict
from lapora.workflows.task_model import open_fitted
from tiny_adapter import command, data_of, fit_tiny, json_lines, make_adapter, model_of


@pytest.fixture
def tiny(tmp_path) -> Path:
    fit_tiny(make_adapter(tmp_path))
    return tmp_path


def change_tensor(file: Path, part: str, by: float = 1e-3) -> None:
    tensors = load_file(file)
    name = next(name for name in tensors if part in name)
    tensors[name] = tensors[name] + by
    save_file(tensors, file, {"format": "pt"})


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refusal(tiny: Path, **model) -> str:
    with pytest.raises(PosteriorError) as caught:
        list(predict(model_of(tiny, **model), PredictSettings(), json_lines(2)))
    assert caught.value.exit_status == 4 and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_adapters_weights(tiny):
    change_tensor(tiny / "adapter" / "adapter_model.safetensors", "lora_A")
    assert "adapter weights" in refusal(tiny)


SCALING = [("lora_alpha", 7), ("use_rslora", True), ("alpha_pattern", {"q_proj": 1})]


@pytest.mark.parametrize(("setting", "value"), SCALING)
def test_the_adapters_scaling_with_the_same_weights(tiny, setting, value):
    change_json(tiny / "adapter" / "adapter_config.json", **{setting: value})
    message = refusal(tiny)
    assert f"adapter setting {setting}" in message and "adapter weights" not in message


def test_settings_written_in_another_order_are_the_same(tiny):
    file = tiny / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = config["target_modules"][::-1]
    file.write_text(json.dumps(dict(reversed(config.items()))))
    assert len(list(predict(model_of(tiny), PredictSettings(), json_lines(2)))) == 2


@pytest.mark.parametrize("part", ["embed_tokens", "layers.1.mlp", "q_proj"])
def test_the_base_model(tiny, part):
    change_tensor(tiny / "base" / "model.safetensors", part)
    assert "base model's weights" in refusal(tiny)


def test_a_base_model_that_moved_is_the_same(tiny):
    shutil.move(tiny / "base", tiny / "elsewhere")
    assert len(list(predict(model_of(tiny, base_model=str(tiny / "elsewhere")), PredictSettings(), json_lines(2)))) == 2


@pytest.mark.parametrize("given", [False, True])
def test_a_base_model_that_fit_found_by_a_relative_path_is_found_from_elsewhere(tmp_path, monkeypatch, given):
    folder = make_adapter(tmp_path / "work")
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "none" if given else "base"}))
    monkeypatch.chdir(tmp_path)
    fit(model_of(Path("work"), base_model="work/base" if given else None), data_of(Path("work")), FitSettings())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(list(predict(model_of(folder), PredictSettings(), json_lines(2)))) == 2


@pytest.mark.parametrize("recorded", ["work/base", "/nowhere/base"])
def test_a_recorded_base_model_that_is_not_there_is_looked_for_where_the_adapter_has_it(tmp_path, recorded):
    """Earlier versions recorded relative paths; and folders are moved with adapter and base in them."""
    folder = make_adapter(tmp_path / "work")
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "base"}))
    fit_tiny(folder)
    posterior = SavedPosterior(folder / "adapter" / "laplace" / "default")
    posterior.rewrite_manifest({"base_model": posterior.content["base_model"] | {"name": recorded}})
    assert len(list(predict(model_of(folder), PredictSettings(), json_lines(2)))) == 2


def test_a_base_model_given_without_the_adapters_revision_is_loaded_without_it(tmp_path, monkeypatch):
    folder = make_adapter(tmp_path)
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"revision": "v1"}))
    revisions, real = [], loading.load_config
    monkeypatch.setattr(loading, "load_config", lambda *args: revisions.append(args[1]) or real(*args))
    for base, expected in ((str(folder / "base"), None), (None, "v1")):
        revisions.clear()
        fit(model_of(folder, base_model=base), data_of(folder), FitSettings(overwrite=True))
        list(predict(model_of(folder), PredictSettings(), json_lines(1)))
        assert set(revisions) == {expected}


def test_the_quantisation(tiny):
    assert "quantization none then, 8bit now" in refusal(tiny, quantize="8bit")


def test_the_tokenizer(tiny):
    file = tiny / "base" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["no"], vocabulary["yes"] = vocabulary["yes"], vocabulary["no"]
    file.write_text(json.dumps(content))
    assert "tokenizer" in refusal(tiny)


def test_the_answers_of_another_task(tiny):
    (tiny / "task.yaml").write_text((tiny / "task.yaml").read_text().replace("- 'yes'", "- quiet"))
    with pytest.raises(PosteriorError, match="answers no, yes then, no, quiet of task tiny now"):
        evaluate(model_of(tiny), data_of(tiny))
    text = (tiny / "task.yaml").read_text()
    (tiny / "task.yaml").write_text(text.replace("doc_to_choice:\n- 'no'\n- quiet", "doc_to_choice: '{{ answers }}'"))
    for split in ("validation", "train"):
        file = tiny / "data" / f"{split}.jsonl"
        rows = [{**json.loads(line), "answers": ["no", "loud"]} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PosteriorError, match="answers no, yes then, no, loud of task tiny now"):
        evaluate(model_of(tiny), data_of(tiny))


def test_the_answers_are_listed_with_all_else_by_every_command_that_takes_a_task(tiny, monkeypatch, capfdbinary):
    fit_tiny(tiny, name="other")
    (tiny / "task.yaml").write_text((tiny / "task.yaml").read_text().replace("- 'yes'", "- 'yes'\n- quiet"))
    change_tensor(tiny / "adapter" / "adapter_model.safetensors", "lora_B")
    change_json(tiny / "adapter" / "adapter_config.json", lora_alpha=12)
    change_tensor(tiny / "base" / "model.safetensors", "embed_tokens")
    task = ("--data", tiny / "task.yaml", "--device", "cpu")
    for name, *options in (("eval", "--name", "other"), ("eval",), ("tune-prior", "--method", "validation")):
        status, out, errors = command(monkeypatch, capfdbinary, name, tiny / "adapter", *task, *options)
        assert status == 4 and out == b"" and len(errors.splitlines()) == 1
        for word in ("adapter weights", "lora_alpha 6 then, 12 now", "base model's weights", "no, yes, quiet of task"):
            assert word in errors


def test_all_differences_at_once(tiny):
    change_tensor(tiny / "adapter" / "adapter_model.safetensors", "lora_B")
    change_json(tiny / "adapter" / "adapter_config.json", lora_alpha=12)
    change_tensor(tiny / "base" / "model.safetensors", "embed_tokens")
    message = refusal(tiny)
    for word in ("adapter weights", "lora_alpha 6 then, 12 now", "base model's weights"):
        assert word in message


def test_an_adapter_of_another_shape_on_another_base(tiny, tmp_path_factory):
    other = make_adapter(tmp_path_factory.mktemp("other"), hidden=32)
    shutil.copytree(tiny / "adapter" / "laplace", other / "adapter" / "laplace")
    message = refusal(other, base_model=str(other / "base"))
    assert "adapter weights" in message and "base model's weights" in message and "parameter " in message
    assert "does not fit base model" in refusal(other)  # on the recorded base it cannot even be loaded


def rewrite(tiny: Path, **changes) -> None:
    SavedPosterior(tiny / "adapter" / "laplace" / "default").rewrite_manifest(changes)


def test_parameters_that_are_not_the_adapters(tiny):
    manifest = SavedPosterior(tiny / "adapter" / "laplace" / "default").content
    parameters = [dict(parameter) for parameter in manifest["parameters"]]
    parameters[0]["shape"] = parameters[0]["shape"][::-1]
    old = parameters[-1]["name"]
    parameters[-1]["name"] = parameters[-1]["input_of"] = old.replace("layers.1", "layers.7")
    rewrite(tiny, parameters=parameters)
    message = refusal(tiny)
    assert "1 parameters gone" in message and "1 parameters new" in message and "then, " in message


def test_a_newer_library_is_a_warning_once(tiny, monkeypatch, capfdbinary):
    rewrite(tiny, libraries={"torch": "2.0.0", "transformers": "5.0.0", "peft": "0.19.0"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_fitted(model_of(tiny), "default")
    (warning,) = [each for each in caught if issubclass(each.category, LaporaWarning)]
    assert "torch 2.0.0 then" in str(warning.message) and "peft 0.19.0 then" in str(warning.message)
    fit_tiny(tiny, name="other")
    names = ("--name", "default", "--name", "other")
    status, _, errors = command(monkeypatch, capfdbinary, "eval", tiny / "adapter", *names, "--device", "cpu")
    assert status == 0 and errors.count("other library versions") == 1


@pytest.mark.parametrize("fitted", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("run", ["float32", "bfloat16", "float16", "float64"])
def test_a_base_model_is_known_in_another_element_type(tiny, fitted, run):
    """Compared in the coarser type; the two short ones have none in common, which is said."""
    fit_tiny(tiny, overwrite=True, model={"dtype": fitted})
    short = {fitted, run} == {"bfloat16", "float16"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_fitted(model_of(tiny, dtype=run), "default")
        change_tensor(tiny / "base" / "model.safetensors", "layers.1.mlp", 0.25)
        if short:
            open_fitted(model_of(tiny, dtype=run), "default")
        else:
            assert "base model's weights" in refusal(tiny, dtype=run)
    said = [str(each.message) for each in caught if issubclass(each.category, LaporaWarning)]
    assert all(f"fitted in {fitted}, run in {run}" in each for each in said) and len(said) == (2 if short else 0)


def test_one_element_anywhere_in_the_base_model_is_enough(tiny):
    file = tiny / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][5, 3] += 1e-6
    save_file(tensors, file, {"format": "pt"})
    assert "base model's weights" in refusal(tiny)


def test_a_posterior_of_an_earlier_version_knows_its_base_by_a_sample(tiny):
    manifest = SavedPosterior(tiny / "adapter" / "laplace" / "default").content
    rewrite(tiny, base_model={key: value for key, value in manifest["base_model"].items() if key != "digests"})
    assert len(list(predict(model_of(tiny), PredictSettings(), json_lines(2)))) == 2
    with pytest.warns(LaporaWarning, match="fitted in float32, run in float64"):
        open_fitted(model_of(tiny, dtype="float64"), "default")
    change_tensor(tiny / "base" / "model.safetensors", "layers.1.mlp")
    assert "base model's weights" in refusal(tiny)


def test_the_same_adapter_is_used_silently(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error", LaporaWarning)
        record = evaluate(model_of(tiny), DataSettings())
    assert record["n"] == 12 and torch.isfinite(torch.tensor(record["results"][2]["nll"]))
