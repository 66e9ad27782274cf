"""The Python API: the same numbers as the commands, and a model in memory left as it was."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import json
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args, get_type_hints

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import lapora
from lapora import api, options
from lapora.config import (
    DataSettings,
    EvalSettings,
    FitSettings,
    ModelSettings,
    PredictSettings,
    PriorSettings,
    options_of,
)
from lapora.errors import AdapterError, DataError, PosteriorError, UsageError
from lapora.models.adapter import read_adapter
from lapora.models.loading import load_model
from lapora.tasks import given_rows, load_rows, load_task
from tiny_adapter import command, fit_tiny, json_lines, make_adapter, make_rows, model_of


def loaded(folder):
    return load_model(read_adapter(folder / "adapter"), ModelSettings(str(folder / "adapter"), device="cpu"))


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
    assert (done.returncode, done.stderr) == (0, "")


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no_such"):
        lapora.no_such  # noqa: B018


EXAMPLES = [found for found in doctest.DocTestFinder(exclude_empty=True).find(api) if found.examples]


@pytest.mark.parametrize("examples", EXAMPLES, ids=lambda found: found.name)
def test_the_examples_of_the_docstrings_run(examples, tmp_path, monkeypatch):
    """Each on an adapter that is fitted, but for the module's own, which begins with the fit."""
    folder = make_adapter(tmp_path)
    if examples.name != "lapora.api":
        fit_tiny(folder)
    monkeypatch.chdir(folder)
    examples.globs["lapora"] = lapora
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_every_public_function_has_an_example():
    classes = {"Predictor", "RoutedPredictor", "RowPrediction"}
    public = {f"{getattr(lapora, name).__module__}.{name}" for name in set(lapora.__all__) - {"__version__", *classes}}
    methods = {"lapora.api.Predictor.predict", "lapora.api.RoutedPredictor.predict"}
    assert {found.name for found in EXAMPLES} == public | methods | {"lapora.api"}


SETTINGS = {
    "load": [ModelSettings],
    "fit": [FitSettings, DataSettings, ModelSettings],
    "fit_model": [FitSettings],
    "tune_prior": [PriorSettings, DataSettings, ModelSettings],
    "evaluate": [EvalSettings, DataSettings, ModelSettings],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_options_are_the_fields_of_the_settings(name):
    """The classes that type checkers read say what the dataclasses say, and ``help`` says both."""
    function = getattr(lapora, name)
    (options,) = get_args(get_type_hints(inspect.unwrap(function))["options"])
    hints = get_type_hints(options)
    fields = {each.name: each for settings in SETTINGS[name] for each in dataclasses.fields(settings)}
    assert set(hints) == set(fields) - {"adapter", "fetched", "task"}
    types = {key: hint for settings in SETTINGS[name] for key, hint in get_type_hints(settings).items()}
    for key, hint in hints.items():
        assert str(hint).replace("str | pathlib.Path", "pathlib.Path").replace(
            "collections.abc.Sequence", "tuple"
        ) == str(types[key]).replace(", ...", ""), key
    shown = inspect.signature(function).parameters
    assert {key: shown[key].default for key in hints} == {key: fields[key].default for key in hints}


def test_calibrate_takes_the_options_of_fit_and_a_link():
    options = {
        name: set(get_args(get_type_hints(inspect.unwrap(getattr(lapora, name)))["options"])[0].__annotations__)
        for name in ("fit", "calibrate")
    }
    assert options["calibrate"] == options["fit"] | {"link"}


def test_the_option_classes_are_those_that_the_settings_give():
    script = Path(__file__).parents[1] / "tools" / "make_options.py"
    written = runpy.run_path(str(script))["written"]()
    assert Path(options.__file__).read_text(encoding="utf-8") == written, "run `make options`"


def test_help_of_a_function_explains_its_options():
    about = inspect.getdoc(lapora.fit)
    for name, option in options_of(FitSettings).items():
        assert f"{name}: {options.describe(option)}" in about
    assert "--" not in about.partition("Options:")[2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"limit": 0}, "limit=0: at least 1"), ({"save_every": -1.0}, "save_every=-1.0: at least 0")],
)
def test_numbers_out_of_bounds_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        lapora.fit("adapter", data="boolq", **wrong)


def test_dir_of_the_package_is_the_api():
    assert dir(lapora) == sorted(lapora.__all__)


def test_options_of_predict_are_fields_of_the_settings():
    defaults = {each.name: each.default for each in dataclasses.fields(PredictSettings)}
    shown = inspect.signature(lapora.Predictor.predict).parameters
    assert {key: shown[key].default for key in ("link", "samples", "seed")} == {
        key: defaults[key] for key in ("link", "samples", "seed")
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strcture": "kron"}, TypeError, r"fit\(\) has no option 'strcture'; did you mean 'structure'\?"),
        ({"zzz": 1}, TypeError, r"fit\(\) has no option 'zzz'; it has adapter, data, progress, structure"),
        ({"structure": "kronn"}, UsageError, "structure='kronn': one of kron, ekfac, diag, lowrank, full"),
        ({"dtype": "int8"}, UsageError, "dtype='int8': one of auto, float32"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        lapora.fit("adapter", data="boolq", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"links": "probit"}, r"links='probit': give a list, \['probit'\]"),
        ({"links": ["probit", "logit"]}, "links='logit': one of mc-joint, mc-indep, probit, bridge, map"),
        ({"methods": ["everything"]}, "methods='everything': one of constant, .*, all"),
    ],
)
def test_wrong_choices_in_a_list_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        lapora.evaluate("adapter", **options)


@pytest.mark.slow
def test_type_checkers_see_the_options(tmp_path):
    pytest.importorskip("mypy")
    lines = [
        "import lapora",
        'lapora.fit("a", data="b", structure="ekfac", dtype="bfloat16", split="train").rows',
        'lapora.fit("a", data="b", strcture="ekfac")',
        'lapora.fit("a", data="b", structure="kronn")',
        'lapora.load("a", device=3)',
        'lapora.load("a").predict(["text"], link="softmax")',
        'lapora.tune_prior("a", method="guess").precision',
        'lapora.evaluate("a", links=["mc-joint"], ensemble=["b"])["results"]',
        'lapora.evaluate("a", links=["logit"])',
    ]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "numpy", "transformers"))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nignore_missing_imports = true\n{skipped}")
    done = subprocess.run([sys.executable, "-m", "mypy", "user.py"], cwd=tmp_path, capture_output=True, text=True)
    assert {int(found) for found in re.findall(r"^user\.py:(\d+): error", done.stdout, re.M)} == {3, 4, 5, 6, 7, 9}


def test_the_commands_do_what_the_functions_do(tmp_path, monkeypatch, capfdbinary):
    folder = make_adapter(tmp_path)
    adapter = folder / "adapter"
    where = {"data_dir": folder / "data", "output_dir": folder / "function"}
    model = ["--output-dir", folder / "command"]
    monkeypatch.setattr(sys, "argv", sys.argv)

    lapora.fit(adapter, data=folder / "task.yaml", structure="ekfac", **where)
    words = ["--data", folder / "task.yaml", "--data-dir", folder / "data", "--structure", "ekfac"]
    assert command(monkeypatch, capfdbinary, "fit", adapter, *words, *model)[0] == 0
    factors = [folder / each / "laplace" / "default" / "factors.safetensors" for each in ("function", "command")]
    assert factors[0].read_bytes() == factors[1].read_bytes()

    tuned = lapora.tune_prior(adapter, method="validation", link="probit", output_dir=folder / "function")
    words = ["--method", "validation", "--link", "probit", "--json"]
    _, out, _ = command(monkeypatch, capfdbinary, "tune-prior", adapter, *words, *model)
    assert json.loads(out) == tuned.prior

    record = lapora.evaluate(adapter, split="validation", links=["probit", "bridge"], output_dir=folder / "function")
    words = ["--split", "validation", "--link", "probit", "--link", "bridge", "--json"]
    _, out, _ = command(monkeypatch, capfdbinary, "eval", adapter, *words, *model)
    del record["warnings"]
    assert json.loads(out) == json.loads(json.dumps(record))


def test_predictions_are_those_of_the_command(tmp_path):
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

    fit_tiny(folder, prior_method="averaged")
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


@pytest.mark.parametrize(
    "adapter",
    [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [1, 2]}],
    ids=["modules_to_save", "trainable_token_indices"],
)
def test_a_posterior_fitted_in_memory_loads_where_the_adapter_replaces_modules_of_the_base(tmp_path, adapter):
    folder = make_adapter(tmp_path, **adapter)
    fitted = loaded(folder)
    rows = make_rows(6)
    predictor = lapora.fit_model(
        fitted.model, fitted.tokenizer, rows, task=folder / "task.yaml", output_dir=folder / "adapter"
    )
    read = lapora.load(folder / "adapter", device="cpu")
    for one, other in zip(predictor.predict(rows), read.predict(rows), strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
    # Another base is still noticed, if it is not only another one of the modules that are replaced.
    file = folder / "base" / "model.safetensors"
    save_file({name: value * 1.5 for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(PosteriorError, match="base model's weights"):
        lapora.load(folder / "adapter", device="cpu")


def test_settings_with_duplicates_are_those_without(tmp_path):
    """PEFT saves ``modules_to_save`` with duplicates after it has loaded an adapter."""
    folder = make_adapter(tmp_path, modules_to_save=["lm_head"])
    fit_tiny(folder)
    file = folder / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "modules_to_save": settings["modules_to_save"] * 2}))
    assert lapora.load(folder / "adapter", device="cpu").choices == ("no", "yes")


def test_the_callers_inference_mode_and_autocast_change_nothing(in_memory):
    _, model, tokenizer, rows, task = in_memory
    expected = lapora.fit_model(model, tokenizer, rows, task=task).predict(rows)
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.no_grad()):
        with context:
            found = lapora.fit_model(model, tokenizer, rows, task=task).predict(rows)
        assert [each.record for each in found] == [each.record for each in expected]


def test_threads_that_predict_with_one_model_wait_for_each_other(tmp_path):
    folder = make_adapter(tmp_path)
    fit_tiny(folder)
    one, many = lapora.load(folder / "adapter", device="cpu"), lapora.load_many(folder / "adapter", [], device="cpu")
    sets = [make_rows(24, seed=seed) for seed in range(3)]
    for predictor in (one, many):
        expected = [predictor.predict(rows, logits=True) for rows in sets]
        with ThreadPoolExecutor(len(sets)) as pool:
            found = list(pool.map(lambda rows: predictor.predict(rows, logits=True), sets * 3))  # noqa: B023
        assert found == expected * 3


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


def test_rows_may_be_those_that_a_task_loads(in_memory):
    folder, model, tokenizer, rows, task = in_memory
    loaded_rows = load_rows(load_task(str(folder / "task.yaml")), "train", data_dir=folder / "data")
    one, other = (lapora.fit_model(model, tokenizer, each, task=task) for each in (rows, loaded_rows))
    assert one.predict(rows[:2]) == other.predict(rows[:2])
    with pytest.raises(TypeError, match="row 0: a str; a row is a mapping"):
        lapora.fit_model(model, tokenizer, ["the cows are loud"], task=task)
    with pytest.raises(TypeError, match="give a list of the rows"):
        lapora.fit_model(model, tokenizer, rows[0], task=task)
    with pytest.raises(DataError, match="no row has story, the fields of task tiny; the first row has text, label"):
        lapora.fit_model(model, tokenizer, [{"text": "the cows are loud", "label": 1}], task=task)


def test_rows_may_be_one_a_frame_or_a_dataset(tmp_path):
    import datasets
    import pandas

    folder = make_adapter(tmp_path)
    fit_tiny(folder)
    predictor = lapora.load(folder / "adapter", device="cpu")
    several = lapora.load_many(folder / "adapter", [], device="cpu")
    rows = make_rows(5, 5)
    expected = predictor.predict(rows)
    assert predictor.predict(rows[0]).probabilities == pytest.approx(expected[0].probabilities, abs=1e-6)
    assert several.predict(rows[0], logits=True) == predictor.predict(rows[0])
    assert predictor.predict(f"{rows[0]['story']} ?") == predictor.predict([f"{rows[0]['story']} ?"])[0]
    given = [pandas.DataFrame(rows), datasets.Dataset.from_list(rows), (row for row in rows), tuple(rows)]
    assert all(predictor.predict(each) == expected for each in given)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (7, "rows: an int; give a row .*DataFrame, or a datasets.Dataset"),
        (b"text", "rows: a bytes; give a row"),
        ([{"story": "a"}, 7], "row 1: an int; a row is a text or a mapping"),
        ("series", "a Series may be a row or a column"),
        ("splits", r"a DatasetDict holds several splits; give one of them, rows\['train'\]"),
    ],
)
def test_a_wrong_type_says_what_to_give(rows, message):
    import datasets
    import pandas

    made = {"series": pandas.Series(["a"]), "splits": datasets.DatasetDict()}
    with pytest.raises(TypeError, match=message):
        list(given_rows(made.get(rows, rows) if isinstance(rows, str) else rows, texts=True))


def test_missing_values_are_none():
    import numpy
    import pandas

    frame = pandas.DataFrame({"story": ["a", None], "label": [1, float("nan")]})
    expected = [{"story": "a", "label": 1.0}, {"story": None, "label": None}]
    assert list(given_rows(frame, texts=True)) == expected
    assert list(given_rows(frame.to_dict("records"), texts=True)) == expected
    for missing in (float("nan"), numpy.float32("nan"), pandas.NA, pandas.NaT):
        assert list(given_rows({"story": missing}, texts=True)) == [{"story": None}]


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


def test_names_of_labels_that_contradict_the_answers_are_refused():
    names = datasets.ClassLabel(names=["yes", "no"])
    features = datasets.Features({"question": datasets.Value("string"), "label": names})
    rows = datasets.Dataset.from_dict({"question": ["a"], "label": [0]}, features=features)
    task = {"task": "t", "doc_to_text": "{{question}}", "doc_to_choice": ["no", "yes"], "doc_to_target": "label"}
    with pytest.raises(DataError, match="label 0 of 'label' is called 'yes', which is answer 1"):
        lapora.fit_model(None, None, rows, task=task)
