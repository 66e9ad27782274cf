"""Several adapters on one base: fitted one after the other, predicted side by side, the base loaded once."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lapora.config import DataSettings, EvalSettings, FitSettings, ModelSettings, PredictSettings
from lapora.errors import DataError, LaporaError, UsageError
from lapora.models import shared_base as bases_module
from lapora.models.adapter import read_adapter
from lapora.models.loading import load_model, silence_libraries
from lapora.models.shared_base import BaseCache
from lapora.workflows.evaluate import run_evaluation
from lapora.workflows.fit import fit_several
from lapora.workflows.predict import AdapterPool, predict
from tiny_adapter import make_adapter


@pytest.fixture
def several(tmp_path):
    """Three adapters of one base: the second and third have other weights."""
    folder = make_adapter(tmp_path / "one")
    for number, name in enumerate(["second", "third"], 1):
        shutil.copytree(folder / "adapter", folder / name)
        file = folder / name / "adapter_model.safetensors"
        generator = torch.Generator().manual_seed(number)
        tensors = {
            key: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
    return folder


def settings_of(folder, name):
    return ModelSettings(adapter=str(folder / name), device="cpu")


def fit_all(folder, names=("adapter", "second", "third")):
    from contextlib import nullcontext

    data = DataSettings(task=str(folder / "task.yaml"), data_dir=folder / "data")
    models = [settings_of(folder, name) for name in names]
    return list(fit_several(models, data, FitSettings(), lambda model: nullcontext(lambda done, total: None)))


def initialize(adapter, initialization):
    """Change how PEFT initializes an adapter before it loads the trained weights."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": initialization}))


def logits_of(loaded):
    with torch.no_grad():
        return loaded.model.get_base_model()(input_ids=torch.tensor([[3, 4, 5, 6]])).logits


@pytest.fixture
def loads(monkeypatch):
    count = []
    real = bases_module.load_base

    def counted(*arguments, **how):
        count.append(1)
        return real(*arguments, **how)

    monkeypatch.setattr(bases_module, "load_base", counted)
    return count


def test_an_adapter_taken_off_and_put_on_again_is_the_same(several):
    shared = BaseCache()
    batch = torch.tensor([[3, 4, 5, 6]])

    def logits(model):
        with torch.no_grad():
            return model.get_base_model()(input_ids=batch).logits

    expected = {
        name: logits(load_model(read_adapter(several / name), ModelSettings("", device="cpu")).model)
        for name in ("adapter", "second", "third")
    }
    loaded = {}
    for name in expected:
        loaded[name] = shared.load(read_adapter(several / name), ModelSettings("", device="cpu"))
        torch.testing.assert_close(logits(loaded[name].model), expected[name], rtol=0, atol=0)
    for name in ("adapter", "third", "adapter", "second"):
        shared.attach(loaded[name])
        torch.testing.assert_close(logits(loaded[name].model), expected[name], rtol=0, atol=0)
    assert len({id(each.model.get_base_model()) for each in loaded.values()}) == 1
    assert shared.loads == 1


def test_an_adapter_that_writes_into_the_base_has_one_of_its_own(several):
    config = several / "second" / "adapter_config.json"
    file = several / "second" / "adapter_model.safetensors"
    base = load_file(next((several / "base").glob("*.safetensors")))
    key = "model.embed_tokens.weight"
    tensors = load_file(file)
    tensors[f"base_model.model.{key}"] = base[key] + 1.0
    save_file(tensors, file, {"format": "pt"})
    assert config.is_file()
    shared = BaseCache()
    first = shared.load(read_adapter(several / "adapter"), ModelSettings("", device="cpu"))
    second = shared.load(read_adapter(several / "second"), ModelSettings("", device="cpu"))
    assert shared.loads == 2
    assert first.model.get_base_model() is not second.model.get_base_model()
    embedding = first.model.get_base_model().get_input_embeddings().weight
    torch.testing.assert_close(embedding, base[key].to(embedding), rtol=0, atol=0)


@pytest.mark.parametrize(("initialization", "loads"), [("pissa", 3), ("olora", 3), ("gaussian", 1), ("mica", 1)])
def test_an_initialization_that_changes_the_base_has_one_of_its_own(several, initialization, loads):
    initialize(several / "second", initialization)
    how = ModelSettings("", device="cpu")
    expected = {name: logits_of(load_model(read_adapter(several / name), how)) for name in ("adapter", "second")}
    shared = BaseCache()
    for name in ("second", "adapter", "second"):
        loaded = shared.load(read_adapter(several / name), how)
        torch.testing.assert_close(logits_of(loaded), expected[name], rtol=0, atol=0)
    assert shared.loads == loads


def test_the_rounding_before_an_initialization_in_float64_stays_off_a_shared_base(several):
    with silence_libraries():
        base = AutoModelForCausalLM.from_pretrained(several / "base", dtype=torch.float64)
        for parameter in base.parameters():
            parameter.data += 1e-10
        base.save_pretrained(several / "base")
    initialize(several / "second", "gaussian")
    how = ModelSettings("", device="cpu", dtype="float64")
    expected = logits_of(load_model(read_adapter(several / "adapter"), how))
    shared = BaseCache()
    shared.load(read_adapter(several / "second"), how)
    torch.testing.assert_close(logits_of(shared.load(read_adapter(several / "adapter"), how)), expected, rtol=0, atol=0)


def test_pissa_among_others_is_fitted_predicted_and_averaged_as_alone(several):
    """PEFT subtracts the initial adapter from the base each time it loads one of PiSSA."""
    names = ("second", "adapter", "third")
    initialize(several / "second", "pissa")
    together = {found.folder.parent.parent.name: found.log_likelihood for _, found in fit_all(several, names)}
    wanted = list(names) * 2
    rows = lines_for(wanted)
    routes = PredictSettings(adapters=(str(several / "second"), str(several / "third")))
    routed = list(predict(settings_of(several, "adapter"), routes, rows))
    tables = []
    for name in names:
        shutil.rmtree(several / name / "laplace")
        ((model, alone),) = fit_all(several, [name])
        assert together[name] == pytest.approx(alone.log_likelihood, rel=1e-6)
        for index, record in enumerate(predict(model, PredictSettings(), lines_for([None] * len(wanted)))):
            if wanted[index] == name:
                assert routed[index]["map_probabilities"] == pytest.approx(record["map_probabilities"], abs=1e-6)
        (at_map,) = run_evaluation(model, DataSettings(), EvalSettings(methods=("map",))).predictions
        tables.append(at_map.table.exp())
    ensemble = EvalSettings(methods=("ensemble",), ensemble=(several / "second", several / "third"))
    predictions = run_evaluation(settings_of(several, "adapter"), DataSettings(), ensemble).predictions
    (averaged,) = [each for each in predictions if each.method == "ensemble"]
    torch.testing.assert_close(averaged.table.exp(), torch.stack(tables).mean(dim=0), rtol=0, atol=1e-6)


def test_a_quantized_base_is_shared_by_adapters_that_save_the_same_modules(several, monkeypatch):
    monkeypatch.setattr(bases_module, "load_base", lambda adapter, how: SimpleNamespace(model=torch.nn.Linear(1, 1)))
    monkeypatch.setattr(bases_module, "attach_adapter", lambda adapter, base: SimpleNamespace(model=base.model))
    adapter = read_adapter(several / "adapter")
    other = replace(adapter, config={**adapter.config, "modules_to_save": ["embed_tokens"]})
    for quantize, loads in (("none", 1), ("4bit", 2)):
        bases = BaseCache(max_bases=2)
        monkeypatch.setattr(bases, "_detach", lambda base: None)
        for each in (adapter, other, adapter, other):
            bases.load(each, replace(settings_of(several, "adapter"), quantize=quantize))
        assert bases.loads == loads


def test_fit_of_several_is_fit_of_each(several, loads):
    found = fit_all(several)
    assert not any(isinstance(each, LaporaError) for _, each in found)
    assert len(loads) == 1
    together = {
        name: load_file(several / name / "laplace/default/factors.safetensors")
        for name in ("adapter", "second", "third")
    }
    for name, tensors in together.items():
        shutil.rmtree(several / name / "laplace")
        fit_all(several, [name])
        for key, tensor in load_file(several / name / "laplace/default/factors.safetensors").items():
            torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=0)


def test_what_is_wrong_with_one_stops_no_other(several):
    (several / "second" / "adapter_model.safetensors").write_bytes(b"damaged")
    found = [each for _, each in fit_all(several)]
    assert isinstance(found[1], LaporaError) and not isinstance(found[0], LaporaError)
    assert not isinstance(found[2], LaporaError)
    assert not (several / "second" / "laplace" / "default").exists()


STORIES = ["the cows are in the barn", "the sheep is in the office", "anna is quiet", "boris is loud ?"]


def lines_for(adapters):
    return [
        json.dumps({"story": STORIES[index % 4]} | ({"adapter": name} if name else {})).encode() + b"\n"
        for index, name in enumerate(adapters)
    ]


def test_rows_go_to_the_adapter_they_name(several, loads):
    fit_all(several)
    loads.clear()
    wanted = ["adapter", "second", None, "third", "second", "adapter", "third", None] * 12
    settings = PredictSettings(adapters=(str(several / "second"), f"third={several / 'third'}"))
    found = list(predict(settings_of(several, "adapter"), settings, lines_for(wanted)))
    assert len(loads) == 1
    assert [each["adapter"] for each in found] == [name or "adapter" for name in wanted]
    alone = {
        name: list(predict(settings_of(several, name), PredictSettings(), lines_for([None] * len(wanted))))
        for name in ("adapter", "second", "third")
    }
    for index, record in enumerate(found):
        expected = alone[record.pop("adapter")][index]
        assert record["index"] == expected["index"]
        assert record["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
    assert abs(alone["adapter"][0]["confidence"] - alone["second"][0]["confidence"]) > 1e-3


@pytest.mark.parametrize("given", ["runs/lr=0.001/second", "second=runs/lr=0.001/second", "runs/lr=0.001"])
def test_paths_with_an_equals_sign(several, monkeypatch, given):
    fit_all(several, ["adapter", "second"])
    sweep = several / "runs" / "lr=0.001"
    sweep.mkdir(parents=True)
    shutil.copytree(several / "second", sweep / "second")
    monkeypatch.chdir(several)
    (found,) = predict(settings_of(several, "adapter"), PredictSettings(adapters=(given,)), lines_for(["second"]))
    assert found["adapter"] == "second"


def test_the_default_adapter_has_a_name_in_its_own_folder(several, monkeypatch):
    fit_all(several, ["adapter", "second"])
    monkeypatch.chdir(several / "adapter")
    model = ModelSettings(adapter=".", device="cpu")
    (found,) = predict(model, PredictSettings(adapters=(str(several / "second"),)), lines_for([None]))
    assert found["adapter"] == "adapter"


def test_a_folder_of_adapters_and_few_kept_open(several, loads):
    fit_all(several)
    folder = several / "all"
    folder.mkdir()
    for number in range(5):
        shutil.copytree(several / ("second" if number % 2 else "third"), folder / f"customer-{number}")
    wanted = [f"customer-{index % 5}" for index in range(40)]
    settings = PredictSettings(adapters=(str(folder),), adapters_kept=1)
    model = ModelSettings(adapter=str(several / "adapter"), device="cpu", batch_size=1)  # a window is four rows
    found = list(predict(model, settings, lines_for(wanted)))
    many = list(predict(model, PredictSettings(adapters=(str(folder),)), lines_for(wanted)))
    assert found == many
    assert len(loads) == 3  # one for the fits, one for each prediction


@pytest.mark.parametrize("on_error", ["stop", "report"])
def test_an_adapter_that_is_not_there(several, on_error):
    fit_all(several, ["adapter", "second"])
    settings = PredictSettings(adapters=(str(several / "second"), str(several / "third")), on_error=on_error)
    wanted = ["second", "nobody", "third", "adapter"]
    found = []
    with pytest.raises(DataError, match="nobody" if on_error == "stop" else "2 bad lines"):
        found.extend(predict(settings_of(several, "adapter"), settings, lines_for(wanted)))
    if on_error == "report":
        records = []
        with pytest.raises(DataError):
            for record in predict(settings_of(several, "adapter"), settings, lines_for(wanted)):
                records.append(record)
        assert ["error" in record for record in records] == [False, True, True, False]
        assert "there are adapter, second, third" in records[1]["error"]
        assert "no posterior" in records[2]["error"] or "third" in records[2]["error"]


def test_two_of_one_name_are_refused(several):
    fit_all(several, ["adapter"])
    settings = PredictSettings(adapters=(f"adapter={several / 'second'}",))
    with pytest.raises(UsageError, match="two adapters are called adapter"):
        list(predict(settings_of(several, "adapter"), settings, []))


def test_the_default_adapter_may_be_in_the_folder_of_adapters(several):
    fit_all(several, ["adapter", "second"])
    pool = AdapterPool(settings_of(several, "adapter"), PredictSettings(adapters=(str(several),)))
    assert pool.names == ["adapter", "second", "third"]


@pytest.mark.slow
def test_the_commands(several, tmp_path):
    lapora = [sys.executable, "-m", "lapora"]
    (several / "third" / "adapter_model.safetensors").write_bytes(b"damaged")
    data = ["--data", several / "task.yaml", "--data-dir", several / "data"]
    fitted = subprocess.run(
        [*lapora, "fit", *(several / name for name in ("adapter", "third", "second")), *data],
        capture_output=True,
        text=True,
    )
    assert fitted.returncode == 3
    assert "1 of 3 adapters were not fitted" in fitted.stderr and fitted.stderr.count("posterior over") == 2
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"".join(lines_for(["second", None])))
    answered = subprocess.run(
        [*lapora, "predict", several / "adapter", file, "--adapter", several / "second"], capture_output=True, text=True
    )
    assert [json.loads(line)["adapter"] for line in answered.stdout.splitlines()] == ["second", "adapter"]


def test_an_adapter_opened_between_two_rows_of_another_does_not_answer_them(several):
    """A window of four rows: the second opens another adapter while the first one's predictor is still there."""
    fit_all(several)
    wanted = ["adapter"] * 4 + ["adapter", "second", "adapter", "second"]
    model = ModelSettings(adapter=str(several / "adapter"), device="cpu", batch_size=1)
    found = list(predict(model, PredictSettings(adapters=(str(several / "second"),)), lines_for(wanted)))
    for name in ("adapter", "second"):
        own = ModelSettings(adapter=str(several / name), device="cpu", batch_size=1)
        expected = list(predict(own, PredictSettings(), lines_for([None] * len(wanted))))
        for index, record in enumerate(found):
            if wanted[index] == name:
                assert record["map_probabilities"] == expected[index]["map_probabilities"], index


def test_an_adapter_that_does_not_fit_leaves_nothing_on_the_base(several):
    shared = BaseCache()
    ids = torch.tensor([[3, 4, 5]])

    def logits(loaded):
        with torch.no_grad():
            return loaded.model.get_base_model()(input_ids=ids).logits

    good = shared.load(read_adapter(several / "adapter"), ModelSettings("", device="cpu"))
    expected = logits(good)
    config = several / "second" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["q_proj", "v_proj", "up_proj"]}))
    with pytest.raises(LaporaError):
        shared.load(read_adapter(several / "second"), ModelSettings("", device="cpu"))
    shared.attach(good)
    torch.testing.assert_close(logits(good), expected, rtol=0, atol=0)


def test_a_base_that_had_to_go_still_serves_the_adapters_that_were_on_it(several):
    shared = BaseCache(max_bases=1)
    ids = torch.tensor([[3, 4, 5]])

    def logits(loaded):
        shared.attach(loaded)
        with torch.no_grad():
            return loaded.model.get_base_model()(input_ids=ids).logits

    first = shared.load(read_adapter(several / "adapter"), ModelSettings("", device="cpu"))
    expected = [logits(first)]
    second = shared.load(read_adapter(several / "second"), ModelSettings("", device="cpu"))
    expected.append(logits(second))
    shared.load(read_adapter(several / "third"), ModelSettings("", device="cpu", dtype="float64"))
    assert shared.loads == 2
    for loaded, before in zip((first, second, first), (*expected, expected[0]), strict=True):
        torch.testing.assert_close(logits(loaded), before, rtol=0, atol=0)


def test_adapters_that_are_done_with_are_freed(several):
    shared = BaseCache()
    seen = []
    for name in ("adapter", "second", "third"):
        seen.append(weakref.ref(shared.load(read_adapter(several / name), ModelSettings("", device="cpu")).model))
    gc.collect()
    assert [reference() is None for reference in seen] == [True, True, False]


@pytest.mark.slow
def test_where_several_posteriors_are_put_and_found(several, tmp_path):
    lapora = [sys.executable, "-m", "lapora"]
    data = ["--data", several / "task.yaml", "--data-dir", several / "data"]
    out = ["--output-dir", tmp_path / "out"]

    def run(*arguments, **how):
        return subprocess.run([*lapora, *map(str, arguments)], capture_output=True, text=True, **how)

    same = run("fit", several / "adapter", several / "x" / "adapter", *data, *out)
    assert same.returncode == 2 and "folders of one name" in same.stderr
    assert run("fit", several / "adapter", several / "second", *data, *out).returncode == 0
    rows = b"".join(lines_for(["two", None])).decode()
    found = run("predict", several / "adapter", "-", "--adapter", f"two={several / 'second'}", *out, input=rows)
    assert [json.loads(line)["adapter"] for line in found.stdout.splitlines()] == ["two", "adapter"]
    ignored = run("predict", several / "adapter", "--adapter-field", "who")
    assert ignored.returncode == 2 and "go with --adapter" in ignored.stderr
