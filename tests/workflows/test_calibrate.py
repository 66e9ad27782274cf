"""`calibrate`: the numbers of `fit`, `tune-prior` and `eval`, and each verdict."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import lapora
from lapora.config import DataSettings, EvalSettings, FitSettings, PriorSettings
from lapora.errors import NoRowsLeftError, PosteriorError, UsageError
from lapora.likelihoods.categorical import Categorical
from lapora.models import loading
from lapora.report.tables import label_of
from lapora.workflows import calibrate as workflow
from lapora.workflows.evaluate import Evaluation, run_evaluation
from lapora.workflows.fit import fit
from lapora.workflows.scoring import Prediction
from lapora.workflows.tune_prior import tune_prior
from tiny_adapter import command, data_of, make_adapter, model_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("calibrate"), scale=0.5)


@pytest.fixture
def tiny(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def calibrate(folder, data=None, **settings):
    given = data or data_of(folder)
    return workflow.calibrate(
        model_of(folder), given, FitSettings(**settings), PriorSettings(), lambda label: nullcontext()
    )


def without_labels(folder):
    (folder / "data" / "validation.jsonl").unlink()


def test_the_numbers_are_those_of_the_three_commands(tiny, monkeypatch):
    other = tiny / "other"
    model = model_of(tiny, output_dir=other)
    fitted = fit(model, data_of(tiny), FitSettings(seed=3))
    tuned = tune_prior(model, None, PriorSettings(seed=3))
    settings = EvalSettings(methods=("map", "temperature", "laplace"), seed=3)
    scored = run_evaluation(model, DataSettings(), settings)

    loads = []
    load_base = loading.load_base
    monkeypatch.setattr(loading, "load_base", lambda *arguments: loads.append(1) or load_base(*arguments))
    done = calibrate(tiny, seed=3)
    assert len(loads) == 1
    assert done.fit.log_likelihood == fitted.log_likelihood and done.fit.prior == fitted.prior
    assert done.prior.prior == tuned.prior
    assert done.evaluation.record == scored.record and done.evaluation.record["n"] == 6
    assert [each["method"] for each in done.evaluation.record["results"]] == ["map", "temperature", "laplace"]
    factors = "laplace/default/factors.safetensors"
    assert (tiny / "adapter" / factors).read_bytes() == (other / factors).read_bytes()


def evaluation_of(
    laplace: float, temperature: float, plain: float, spread: float = 0.01, rows: int = 200
) -> Evaluation:
    """Two answers, the label's probability near the one given for each method."""
    from lapora import metrics

    noise = spread * torch.randn(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = {}
    for index, (method, value) in enumerate({"map": plain, "temperature": temperature, "laplace": laplace}.items()):
        p = (value + noise.roll(index)).clamp(0.01, 0.99)
        found[method] = torch.stack([p, 1 - p], dim=1).log()
    targets = torch.zeros(rows, dtype=torch.long)
    _, paired = metrics.intervals(found, targets, reference="map")
    results = []
    for method, log_p in found.items():
        scores = metrics.evaluate(log_p, targets)
        differences = {
            key: {"value": scores[key] - metrics.evaluate(found["map"], targets)[key], "interval": list(interval)}
            for key, interval in paired.get(method, {}).items()
        }
        results.append({"method": method, **scores, "difference_to_map": differences})
    record = {"task": "t", "split": "validation", "n": rows, "results": results}
    return Evaluation(
        record, [Prediction(method, log_p) for method, log_p in found.items()], targets, [], {}, Categorical()
    )


@pytest.mark.parametrize(
    ("probabilities", "better", "words", "link"),
    [
        ((0.8, 0.7, 0.6), True, ["better calibrated than the plain", "same rows is worse"], "probit"),
        (
            (0.8, 0.8, 0.6),
            True,
            ["better calibrated than the plain", "same rows is not significantly different"],
            "probit",
        ),
        ((0.7, 0.8, 0.6), True, ["better calibrated than the plain", "same rows is better"], "probit"),
        ((0.6, 0.6, 0.6), False, ["no better than the plain adapter", "Use --link map."], "map"),
        ((0.6, 0.7, 0.8), False, ["worse than the plain adapter", "Use --link map."], "map"),
        ((0.4, 0.7, 0.8), False, ["Accuracy falls from 1.000 to .000."], "map"),
    ],
)
def test_each_verdict(probabilities, better, words, link):
    found = workflow.judge(evaluation_of(*probabilities), "probit")
    assert found.better is better and found.link == link
    assert all(each in found.text for each in words), found.text


def test_a_few_rows_decide_nothing():
    found = workflow.judge(evaluation_of(0.6, 0.7, 0.8, rows=19), "probit")
    assert found.better is None and found.link == "probit" and "too few rows to judge" in found.text
    assert workflow.judge(evaluation_of(0.6, 0.7, 0.8, rows=20), "probit").better is False


def test_the_sentence_holds_the_numbers():
    found = workflow.judge(evaluation_of(0.8, 0.7, 0.6, 0.0), "mc-joint")
    assert found.text.startswith(
        "better calibrated than the plain adapter on 200 held-out rows of validation: NLL .223 against .511 "
        "(difference -.288, 95 % interval -.288 to -.288)."
    )
    assert found.temperature.difference == pytest.approx(torch.tensor(0.7 / 0.8).log().item())


def test_without_labelled_rows_it_says_what_was_done(tiny):
    without_labels(tiny)
    done = calibrate(tiny)
    assert done.evaluation is None and done.verdict.better is None and done.verdict.link == "mc-joint"
    assert done.verdict.text.startswith(
        "not evaluated: there are no labelled rows except those that fit read. The prior:"
    )
    assert "averaged over prior precisions" in done.verdict.text
    assert done.describe()["evaluation"] is None


def test_one_labelled_row_tunes_and_nothing_is_left_to_score(tiny):
    lines = (tiny / "data" / "validation.jsonl").read_text().splitlines(keepends=True)
    (tiny / "data" / "validation.jsonl").write_text(lines[0])
    done = calibrate(tiny)
    assert done.prior.prior["averaged"]["n"] == 1
    assert "all 1 rows were used to tune the prior" in done.verdict.text


def test_a_posterior_is_not_replaced_and_map_is_refused_before_the_fit(tiny):
    with pytest.raises(UsageError, match="--link map"):
        lapora.calibrate(
            tiny / "adapter", data=tiny / "task.yaml", data_dir=tiny / "data", link="map", output_dir=tiny / "elsewhere"
        )
    assert not (tiny / "elsewhere").exists()
    done = calibrate(tiny)
    with pytest.raises(PosteriorError, match="give --overwrite"):
        calibrate(tiny)
    assert calibrate(tiny, overwrite=True).prior.prior == done.prior.prior


def test_the_command_and_the_function(tiny, monkeypatch, capfdbinary):
    adapter = tiny / "adapter"
    words = ["calibrate", adapter, "--data", tiny / "task.yaml", "--data-dir", tiny / "data", "--link", "probit"]
    status, out, _ = command(monkeypatch, capfdbinary, *words, "--json", "--output-dir", tiny / "a b")
    record = json.loads(out)
    assert status == 0 and set(record) == {"fit", "prior", "evaluation", "verdict"}
    done = lapora.calibrate(
        adapter, data=tiny / "task.yaml", data_dir=tiny / "data", link="probit", output_dir=tiny / "function"
    )
    assert record["evaluation"] == json.loads(json.dumps(done.describe()["evaluation"]))
    assert {label_of(each) for each in record["evaluation"]["results"]} == {
        "map",
        "temperature",
        "laplace default (probit)",
    }
    assert "rows.jsonl" in record["verdict"]["next"] and f"--output-dir '{tiny}/a b'" in record["verdict"]["next"]

    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = command(monkeypatch, capfdbinary, *words, "--overwrite", "--output-dir", tiny / "a b")
    text = out.decode()
    assert status == 0 and "against 1.541" in " ".join(text.split())
    assert len(text.splitlines()) + len(err.splitlines()) <= 24
    next_line = text.splitlines()[-1].strip()
    assert next_line.startswith("lapora predict ") and next_line.endswith(" > predictions.jsonl")


def test_a_copy_of_the_training_rows_is_not_held_out(tiny):
    data = tiny / "data"
    shutil.copy(data / "train.jsonl", data / "validation.jsonl")
    done = calibrate(tiny)
    assert done.evaluation is None and done.verdict.better is None and done.prior.prior["averaged"]["n"] == 0
    assert "validation: fit read all 24 rows too, with the same labels" in " ".join(done.prior.notes)
    with pytest.raises(NoRowsLeftError, match="fit read all 24 rows too"):
        tune_prior(model_of(tiny), DataSettings(split="validation"), PriorSettings())
    scored = run_evaluation(model_of(tiny), DataSettings(), EvalSettings())
    assert scored.record["n"] == 24 and any("fit read 24 of these 24 rows too" in each for each in scored.warnings)


def test_rows_that_fit_read_do_not_tune_the_prior(tiny):
    data = tiny / "data"
    held_out, trained = (data / f"{split}.jsonl" for split in ("validation", "train"))
    lines = held_out.read_text().splitlines()
    relabelled = [{**json.loads(line), "label": 1 - json.loads(line)["label"]} for line in lines]
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in relabelled))
    own = trained.read_text().splitlines()
    held_out.write_text("\n".join([*own[:5], *lines]) + "\n")
    fit(model_of(tiny), data_of(tiny), FitSettings())
    tuned = tune_prior(model_of(tiny), DataSettings(split="validation", limit=50), PriorSettings())
    assert tuned.prior["averaged"]["n"] == len(lines)
    assert "rows of validation left out, because fit read them too, with the same labels: 5" in tuned.notes
    scored = run_evaluation(model_of(tiny), DataSettings(split="test"), EvalSettings())
    assert not any("fit read" in each for each in scored.warnings), "the same texts with other labels are other rows"


def test_each_posterior_that_was_fitted_on_scored_rows_is_noted_once(tiny):
    fit(model_of(tiny), data_of(tiny), FitSettings(name="a"))
    other = replace(data_of(tiny), split="validation")
    for name in ("b", "c"):
        fit(model_of(tiny), other, FitSettings(name=name))
    settings = EvalSettings(names=("a", "b", "c"))
    (note,) = (each for each in run_evaluation(model_of(tiny), DataSettings(), settings).warnings if "trained" in each)
    assert note == "note: the adapter was trained on the rows of validation: these scores are too optimistic"


def test_the_temperature_has_as_many_rows_as_the_prior(tiny):
    held_out = tiny / "data" / "validation.jsonl"
    first, *others = held_out.read_text().splitlines()
    held_out.write_text("\n".join([first, first, first, *others]) + "\n")
    fit(model_of(tiny), data_of(tiny), FitSettings())
    for seed in range(20):
        rows = tune_prior(model_of(tiny), None, PriorSettings(seed=seed)).prior["averaged"]["rows"]
        if len(set(rows)) < len(rows):
            break
    assert len(rows) == 7 and max(map(rows.count, rows)) == 2
    settings = EvalSettings(methods=("temperature",))
    scored = run_evaluation(model_of(tiny), DataSettings(), settings).record["results"]
    assert [each["fitted_on"]["n"] for each in scored if each["method"] == "temperature"] == [7]
