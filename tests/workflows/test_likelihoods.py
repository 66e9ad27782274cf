"""`fit`, `tune-prior`, `predict`, `eval` and `calibrate` with every likelihood but the categorical one."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lapora
from lapora.config import DataSettings, EvalSettings, FitSettings, PredictSettings, PriorSettings
from lapora.errors import AdapterError, DataError, UsageError
from lapora.likelihoods.gaussian import Gaussian
from lapora.metrics.mixtures import mixture_moments
from lapora.models import padding_check
from lapora.models.batching import bucket_length
from lapora.models.loading import silence_libraries
from lapora.report.figures import checkpoint_pictures
from lapora.report.tables import checkpoint_scores
from lapora.storage.saved import SavedPosterior
from lapora.workflows.evaluate import run_evaluation
from lapora.workflows.fit import estimate_memory, fit, prepare_fit
from lapora.workflows.predict import predict
from lapora.workflows.rows import read_labelled_rows
from lapora.workflows.scoring import forward_outputs, score_rows
from lapora.workflows.task_model import open_fitted
from lapora.workflows.tune_prior import tune_prior
from tiny_adapter import command, data_of, fit_tiny, model_of
from tiny_heads import OUTPUTS, make_head, rows_of, task_of

LIKELIHOODS = ("bernoulli", "multilabel", "gaussian", "preference")


@pytest.fixture(scope="module")
def fitted_once(tmp_path_factory):
    folders = {}
    for name in LIKELIHOODS:
        folders[name] = make_head(tmp_path_factory.mktemp(name), name)
        fit_tiny(folders[name], prior_method="averaged")
    return folders


@pytest.fixture(scope="module")
def fitted_with_dropout(tmp_path_factory):
    """A fitted adapter with dropout, another one beside it, and rows elsewhere."""
    folders = {}
    for name in LIKELIHOODS:
        folder = folders[name] = make_head(tmp_path_factory.mktemp(f"{name}-dropout"), name, dropout=0.2)
        fit_tiny(folder, prior_method="averaged")
        move_weights(folder / "adapter", folder / "member")
        (folder / "elsewhere").mkdir()
        lines = [json.dumps(row) + "\n" for row in rows_of(name, 9, 3 if name == "multilabel" else 1, seed=8)]
        (folder / "elsewhere" / "validation.jsonl").write_text("".join(lines))
    return folders


def move_weights(adapter, folder):
    """Copy an adapter with slightly other weights, and without its posterior."""
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("laplace"))
    weights = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(4)
    moved = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
    save_file(moved, folder / "adapter_model.safetensors")


@pytest.fixture
def tiny(fitted_once, tmp_path):
    def copy(name):
        return shutil.copytree(fitted_once[name], tmp_path / name)

    return copy


def lines_of(name, count=5, outputs=None):
    return [json.dumps(row).encode() for row in rows_of(name, count, outputs or 3, seed=11)]


def table_and_rows(folder, link="mc-joint"):
    fitted = open_fitted(model_of(folder), "default")
    rows = read_labelled_rows(fitted.posterior, fitted.model.kind, DataSettings())
    return fitted, rows, score_rows(fitted, rows, [link], samples=256).tables


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_several_averages_in_one_pass_equal_a_pass_each(name, tiny):
    folder = tiny(name)
    fitted, rows, _ = table_and_rows(folder)
    averages = []
    for method in ("auto", "marglik", "validation"):
        tune_prior(model_of(folder), None, PriorSettings(method=method))
        averages.append(open_fitted(model_of(folder), "default").average)
    scored = score_rows(fitted, rows, ["mc-joint"], samples=256, averages=averages, with_information=True)
    for index, average in enumerate(averages):
        alone = score_rows(fitted, rows, ["mc-joint"], samples=256, averages=[average], with_information=True)
        for link in ("map", "mc-joint"):
            torch.testing.assert_close(scored.tables[link][index], alone.tables[link][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(scored.information[index], alone.information[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["auto", "validation", "marglik"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_predictions_are_those_that_are_scored(name, method, tiny):
    folder = tiny(name)
    tune_prior(model_of(folder), None, PriorSettings(method=method))
    fitted, rows, tables = table_and_rows(folder)
    lines = [json.dumps(dict(example.row)).encode() for example in rows.examples]
    records = list(predict(model_of(folder), PredictSettings(), lines))
    table = tables["mc-joint"][0]
    if name == "gaussian":
        mean, variance = mixture_moments(table)
        found = torch.tensor([[record["prediction"], record["deviation"]] for record in records])
        assert torch.allclose(found.double(), torch.cat([mean, variance.sqrt()], dim=1), atol=1e-6)
    elif name == "multilabel":
        found = torch.tensor([list(record["probabilities"].values()) for record in records]).double()
        assert torch.allclose(found, table[:, :, 1].exp(), atol=1e-6)
        assert all(
            record["prediction"] == [label for label, p in record["probabilities"].items() if p >= 0.5]
            for record in records
        )
    else:
        found = torch.tensor([list(record["probabilities"].values()) for record in records]).double()
        assert torch.allclose(found, table.exp(), atol=1e-6)
        assert all(record["confidence"] == max(record["probabilities"].values()) for record in records)
    assert torch.allclose(
        fitted.model.likelihood.at_map(forward_outputs(fitted.model, fitted.model.encode(rows.examples))),
        tables["map"][0],
        atol=1e-5,
    )


def test_pairs_on_a_base_that_sees_padding_are_refused(tiny, monkeypatch, capfdbinary):
    folder = tiny("preference")
    monkeypatch.setattr(padding_check, "sees_padding", lambda *_: True)
    data = ("--data", folder / "task.yaml", "--data-dir", folder / "data")
    for arguments in (("fit", folder / "adapter", *data, "--name", "other"), ("predict", folder / "adapter")):
        lines = b"\n".join(lines_of("preference"))
        status, out, err = command(monkeypatch, capfdbinary, *arguments, stdin=lines)
        assert (status, out) == (AdapterError.exit_status, b"")
        assert err.splitlines()[-1].startswith("error: llama: pairs of texts are not supported: padding changes")
    assert not (folder / "adapter" / "laplace" / "other").exists()


@pytest.mark.parametrize("structure", ["ekfac", "diag", "full", "lowrank"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_structure_ends_at_map(name, structure, tiny):
    folder = tiny(name)
    fit_tiny(folder, prior_method="averaged", structure=structure, overwrite=True, **_rank(structure))
    manifest = open_fitted(model_of(folder), "default").posterior.manifest
    curve = manifest.training_curve
    assert curve.nll[-1] == pytest.approx(curve.map_nll, abs=1e-3)
    record = run_evaluation(model_of(folder), DataSettings(), EvalSettings()).record
    assert {result["method"] for result in record["results"]} == {"constant", "map", "laplace"}


def _rank(structure):
    return {"rank": 8} if structure == "lowrank" else {}


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_other_fishers(name, fisher, tiny):
    folder = tiny(name)
    result = fit_tiny(folder, fisher=fisher, overwrite=True)
    assert result.log_likelihood is not None and result.evidence.log_marginal_likelihood < result.log_likelihood


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_all_baselines_that_exist_are_scored(name, fitted_with_dropout):
    folder = fitted_with_dropout[name]
    interval = {"interval": 0.5} if name == "gaussian" else {}
    settings = EvalSettings(
        methods=("all",),
        temperature_oracle=True,
        ensemble=(folder / "member",),
        dropout_samples=3,
        ood=(str(folder / "task.yaml"),),
        ood_data_dirs=(folder / "elsewhere",),
        **interval,
    )
    done = run_evaluation(model_of(folder), DataSettings(), settings)
    results = {result["method"]: result for result in done.record["results"]}
    assert list(results) == [
        *("constant", "map", "temperature", "temperature (oracle)", "mc-dropout", "ensemble", "laplace")
    ]
    assert len([result for result in done.record["results"] if result["method"] == "laplace"]) == (
        1 if name == "gaussian" else 3
    )
    tables = {each.method: each.table for each in done.predictions}
    assert not torch.equal(tables["ensemble"], tables["map"]) and not torch.equal(tables["mc-dropout"], tables["map"])
    wanted = {
        "gaussian": {"rmse", "nll", "crps", "interval_coverage", "interval_width"},
        "multilabel": {"f1_macro", "f1_micro", "exact_match", "ece", "nll", "brier"},
    }.get(name, {"accuracy", "ece", "nll", "brier", "auroc", "aurc"})
    assert all(wanted <= set(result) for result in results.values())
    assert set(results["laplace"]["difference_to_map"]) <= set(results["laplace"])
    if name == "gaussian":
        assert results["temperature (oracle)"]["nll"] <= results["map"]["nll"]
    if name == "preference":
        assert results["constant"]["nll"] == pytest.approx(math.log(2))
    (shifted,) = done.record["ood"]
    score = {"gaussian": "rmse", "multilabel": "f1_micro"}.get(name, "accuracy")
    measure = "deviation" if name == "gaussian" else "max_probability"
    assert shifted["n"] == 9 and len(shifted["results"]) == len(done.record["results"]) - 2
    for result in shifted["results"]:
        alone = result["method"] in ("map", "temperature")
        assert (result["mutual_information"] is None) == alone == (result["auroc"]["mutual_information"] is None)
        assert alone or result["mutual_information"] > 0
        assert set(result["auroc"]) == {measure, "entropy", "mutual_information"} and result[score] is not None
        assert 0 <= result["auroc"]["entropy"] <= 1
        if name == "gaussian" and alone:  # the plain adapter is as sure of one row as of another
            assert result["auroc"]["deviation"] == 0.5 and result["deviation"] == pytest.approx(result["deviation_in"])


def test_the_noise_is_the_residual_variance_of_the_training_rows(tiny):
    folder = tiny("gaussian")
    fitted = open_fitted(model_of(folder), "default")
    rows = read_labelled_rows(fitted.posterior, fitted.model.kind, DataSettings(split="train"))
    outputs = forward_outputs(fitted.model, fitted.model.encode(rows.examples))
    variance = float((outputs - rows.targets).square().mean())
    manifest = fitted.posterior.manifest
    assert manifest.noise_variance == [pytest.approx(variance, rel=1e-5)] and manifest.residuals == 24
    assert isinstance(fitted.model.likelihood, Gaussian)
    assert manifest.log_likelihood == pytest.approx(-12 * math.log(2 * math.pi * math.e * variance), rel=1e-5)


def test_two_outputs_have_a_noise_each(tmp_path):
    folder = make_head(tmp_path, "gaussian", outputs=2)
    fit_tiny(folder, prior_method="averaged")
    for method in ("marglik", "validation", "auto"):
        tune_prior(model_of(folder), None, PriorSettings(method=method))
        (record,) = predict(model_of(folder), PredictSettings(logits=True), lines_of("gaussian", 1, 2))
        assert set(record["prediction"]) == set(record["interval"]["low"]) == {"number0", "number1"}
        for output in ("number0", "number1"):
            assert record["interval"]["low"][output] < record["prediction"][output] < record["interval"]["high"][output]
            assert record["epistemic_deviation"][output] < record["deviation"][output]
        assert len(record["logits"]["covariance"]) == 2
    assert len(SavedPosterior(folder / "adapter" / "laplace" / "default").manifest.noise_variance) == 2


def test_the_marginal_likelihood_scales_the_noise(tiny):
    folder = tiny("gaussian")
    prior = tune_prior(model_of(folder), None, PriorSettings(method="marglik")).prior
    fitted = open_fitted(model_of(folder), "default")
    assert prior["noise_scale"] > 1.0 and fitted.average.averaging.temperatures.tolist() == [prior["noise_scale"]]
    (record,) = predict(model_of(folder), PredictSettings(), lines_of("gaussian", 1))
    (plain,) = predict(model_of(folder), PredictSettings(link="map"), lines_of("gaussian", 1))
    noise = fitted.posterior.manifest.noise_variance[0]
    assert plain["deviation"] == pytest.approx(math.sqrt(noise)) and plain["epistemic_deviation"] == 0.0
    total = record["epistemic_deviation"] ** 2 + prior["noise_scale"] ** 2 * noise
    assert record["deviation"] ** 2 == pytest.approx(total, rel=1e-6)


def test_a_regression_without_labelled_rows_is_averaged_by_its_training_rows(tiny):
    folder = tiny("gaussian")
    (folder / "data" / "validation.jsonl").unlink()
    result = fit_tiny(folder, prior_method="averaged", overwrite=True)
    assert result.prior["method"] == "averaged" and result.prior["averaged"]["temperatures"] == [1.0]
    tuned = tune_prior(model_of(folder), None, PriorSettings())
    assert tuned.prior == result.prior and "no labelled rows" in tuned.notes[0]
    by_evidence = tune_prior(model_of(folder), None, PriorSettings(method="marglik")).prior
    assert by_evidence["noise_scale"] == result.evidence.noise_scale > 1.0


def test_what_the_training_rows_tolerate_does_not_depend_on_the_unit(tiny):
    """Targets and head a thousand times as large give the same tolerance and the same relative deviations."""
    folder = tiny("gaussian")
    small = fit_tiny(folder, prior_method="averaged", overwrite=True).prior["averaged"]
    (before,) = predict(model_of(folder), PredictSettings(), lines_of("gaussian", 1))
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    scaled = {key: 1e3 * value if "score" in key else value for key, value in weights.items()}
    save_file(scaled, folder / "adapter" / "adapter_model.safetensors")
    for file in (folder / "data").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({**row, "label": 1e3 * row["label"]}) + "\n" for row in rows))
    large = fit_tiny(folder, prior_method="averaged", overwrite=True).prior["averaged"]
    (after,) = predict(model_of(folder), PredictSettings(), lines_of("gaussian", 1))
    assert large["tolerance"] == pytest.approx(small["tolerance"], rel=1e-3)
    assert after["deviation"] == pytest.approx(1e3 * before["deviation"], rel=1e-3)
    assert after["epistemic_deviation"] == pytest.approx(1e3 * before["epistemic_deviation"], rel=1e-3)


def test_validation_finds_the_noise_of_least_nll(tiny):
    folder = tiny("gaussian")
    tuned = tune_prior(model_of(folder), None, PriorSettings(method="validation"))
    points = tuned.prior["validation"]["curve"]
    assert all(set(point) == {"precision", "nll"} for point in points)
    assert open_fitted(model_of(folder), "default").prior.noise_scale == tuned.prior["noise_scale"]
    assert min(point["nll"] for point in points) <= tuned.prior["validation"]["map"]["nll"] + 1e-6


def test_the_reward_of_one_text_and_its_penalty(tiny):
    folder = tiny("preference")
    pairs = rows_of("preference", 3, 1, seed=2)
    lines = []
    for pair in pairs:  # pairs and texts in one stream
        lines += [json.dumps(row).encode() for row in (pair, {"text": pair["chosen"]}, {"text": pair["rejected"]})]
    records = list(predict(model_of(folder), PredictSettings(penalty=2.0), lines))
    for pair, chosen, rejected in zip(records[0::3], records[1::3], records[2::3], strict=True):
        difference = chosen["reward"] - rejected["reward"]
        assert pair["reward_difference"]["mean"] == pytest.approx(difference, abs=1e-4)
        assert pair["map_probabilities"]["first"] == pytest.approx(1 / (1 + math.exp(-difference)), abs=1e-5)
        assert pair["reward_difference"]["deviation"] <= chosen["deviation"] + rejected["deviation"]
        for one in (chosen, rejected):
            assert one["penalized_reward"] == pytest.approx(one["reward"] - 2.0 * one["deviation"])
            assert one["deviation"] > 0 and "prediction" not in one
    alone = list(predict(model_of(folder), PredictSettings(penalty=2.0), lines[1:2]))
    assert alone[0]["reward"] == pytest.approx(records[1]["reward"], abs=1e-6)


def test_a_pair_turned_around_has_the_other_probability(tiny):
    folder = tiny("preference")
    (pair,) = rows_of("preference", 1, 1, seed=2)
    turned = {"chosen": pair["rejected"], "rejected": pair["chosen"]}
    first, second = predict(model_of(folder), PredictSettings(), [json.dumps(row).encode() for row in (pair, turned)])
    assert first["probabilities"]["first"] == pytest.approx(second["probabilities"]["second"], abs=1e-6)
    assert first["reward_difference"]["deviation"] == pytest.approx(second["reward_difference"]["deviation"], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gaussian", {"link": "probit"}, "--link probit does not go with likelihood gaussian"),
        ("gaussian", {"abstain_below": 0.5}, "--abstain-below does not go with likelihood gaussian"),
        ("bernoulli", {"link": "bridge"}, "--link bridge does not go with likelihood bernoulli"),
        ("bernoulli", {"interval": 0.5}, "--interval does not go with likelihood bernoulli"),
        ("multilabel", {"penalty": 1.0}, "--penalty does not go with likelihood multilabel"),
    ],
)
def test_settings_of_another_likelihood_are_refused(name, settings, message, fitted_once):
    with pytest.raises(UsageError, match=message):
        list(predict(model_of(fitted_once[name]), PredictSettings(**settings), lines_of(name)))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_coverage_is_for_answers(name, fitted_once):
    model, settings = model_of(fitted_once[name]), EvalSettings(coverage=0.5, methods=("map",))
    if name in ("gaussian", "multilabel"):
        with pytest.raises(UsageError, match=f"--coverage does not go with likelihood {name}, but with categorical"):
            run_evaluation(model, DataSettings(), settings)
        return
    done = run_evaluation(model, DataSettings(), settings)
    found = done.record["results"][0]["coverage"]
    confidence = done.predictions[0].table.exp().amax(dim=1)
    assert found["coverage"] == float((confidence >= found["threshold"]).double().mean()) >= 0.5


def test_rows_of_another_task_without_targets_tell_a_regression_apart(tiny):
    """Rows of pairs are refused; of answers, the texts are read."""
    folder = tiny("gaussian")
    other = folder / "other"
    other.mkdir()
    rows = rows_of("categorical", 9, 3, seed=8)
    (other / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "answers.yaml").write_text(json.dumps(task_of("categorical", 3)))
    settings = EvalSettings(methods=("laplace",), ood=(str(folder / "answers.yaml"),), ood_data_dirs=(other,))
    done = run_evaluation(model_of(folder), DataSettings(), settings)
    (plain, laplace) = done.record["ood"][0]["results"]
    assert plain["rmse"] is None and laplace["rmse"] is None
    records = list(predict(model_of(folder), PredictSettings(), [json.dumps(row).encode() for row in rows]))
    deviation = sum(record["deviation"] for record in records) / len(records)
    assert laplace["deviation"] == pytest.approx(deviation, rel=1e-5)
    (folder / "pairs.yaml").write_text(json.dumps(task_of("preference", 1)))
    with pytest.raises(DataError, match="its likelihood is preference, and the posterior's gaussian"):
        run_evaluation(model_of(folder), DataSettings(), replace(settings, ood=(str(folder / "pairs.yaml"),)))


def change_task(folder, **keys):
    import yaml

    task = yaml.safe_load((folder / "task.yaml").read_text())
    (folder / "task.yaml").write_text(yaml.safe_dump({**task, **keys}, sort_keys=False))


def test_a_head_of_another_size_is_refused(tiny):
    folder = tiny("gaussian")
    change_task(folder, doc_to_choice=["a", "b"], doc_to_target="{{ [label, label] }}")
    with pytest.raises(DataError, match="has 2 outputs of likelihood gaussian and the adapter's head 1 outputs"):
        fit_tiny(folder, overwrite=True)


def test_a_problem_type_that_contradicts_the_likelihood_is_refused(tmp_path):
    folder = make_head(tmp_path, "gaussian", problem_type="multi_label_classification")
    with pytest.raises(DataError, match=r"likelihood gaussian, and .* problem_type multi_label_classification"):
        fit_tiny(folder)
    folder = make_head(tmp_path / "right", "gaussian", problem_type="regression")
    assert fit_tiny(folder).rows == 24


def test_rows_of_another_likelihood_are_refused(tiny):
    folder = tiny("bernoulli")
    change_task(folder, likelihood="gaussian", doc_to_choice=["value"])
    with pytest.raises(DataError, match="has likelihood gaussian, and the posterior was fitted with bernoulli"):
        run_evaluation(
            model_of(folder), DataSettings(str(folder / "task.yaml"), folder / "data", "validation"), EvalSettings()
        )


def test_a_regression_needs_a_target_in_every_row(tiny):
    folder = tiny("gaussian")
    file = folder / "data" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(
        "".join(json.dumps({**row, "label": None if n == 3 else row["label"]}) + "\n" for n, row in enumerate(rows))
    )
    with pytest.raises(DataError, match="row 3: no target; likelihood gaussian measures its noise"):
        fit_tiny(folder, overwrite=True)
    file.write_text("".join(json.dumps({**row, "label": "NaN"}) + "\n" for row in rows))
    with pytest.raises(DataError, match="row 0: target 'NaN' is not finite"):
        fit_tiny(folder, overwrite=True)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_memory_is_estimated(name, fitted_once):
    folder = fitted_once[name]
    found = estimate_memory(model_of(folder), data_of(folder), FitSettings())
    encoded = prepare_fit(model_of(folder), data_of(folder), FitSettings()).encoded
    longest = max(len(text) for row in encoded for text in (row, row.second) if text is not None)
    assert found.activations > 0 and found.batch == (24, bucket_length(longest, None))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_checkpoints_of_a_run(name, tiny, monkeypatch, capfdbinary, tmp_path):
    folder = tiny(name)
    move_weights(folder / "adapter", folder / "run" / "checkpoint-2")
    move_weights(folder / "run" / "checkpoint-2", folder / "run" / "checkpoint-10")
    data = ("--data", folder / "task.yaml", "--data-dir", folder / "data", "--device", "cpu")
    written = ("--plots", tmp_path / "plots", "--report", tmp_path / "run.html")
    status, out, said = command(
        monkeypatch, capfdbinary, "eval", folder / "run", "--checkpoints", *data, *written, "--json"
    )
    assert status == 0, said
    record = json.loads(out)
    scores = {"gaussian": ["rmse", "crps", "nll"], "multilabel": ["f1_micro", "ece", "nll"]}
    assert checkpoint_scores(record) == scores.get(name, ["accuracy", "ece", "nll"])
    assert [each["step"] for each in record["checkpoints"]] == [2, 10] and record["skipped"] == {}
    links = {(result["name"], result["link"]) for result in record["checkpoints"][1]["results"] if "link" in result}
    wanted = ["mc-joint"] if name == "gaussian" else ["mc-joint", "mc-indep", "probit"]
    assert links == {(each, link) for each in ("la-kron", "la-diag", "llla-kron", "llla-diag") for link in wanted}
    names = {file.stem for file in (tmp_path / "plots").glob("*.svg")}
    assert names == {"checkpoints", "checkpoints-structures", *(["checkpoints-links"] if len(wanted) > 1 else [])}
    assert (tmp_path / "run.html").read_text().count("data:image/svg+xml") == len(names)
    best = (min if name == "gaussian" else max)(
        record["checkpoints"], key=lambda each: each["results"][1][checkpoint_scores(record)[0]]
    )
    (picture, *_) = checkpoint_pictures(record)
    dashed = next(line for line in picture.figure.axes[0].lines if len(set(line.get_xdata())) == 1)
    assert dashed.get_xdata()[0] == best["step"]


def test_engines_of_laplace_torch_are_for_answers(tiny):
    with pytest.raises(UsageError, match="--engine curvlinops does not go with likelihood gaussian"):
        fit_tiny(tiny("gaussian"), engine="curvlinops", overwrite=True)
    with pytest.raises(UsageError, match="--weight-sharing asdl does not go with likelihood bernoulli"):
        fit_tiny(tiny("bernoulli"), weight_sharing="asdl", overwrite=True)


def test_the_adapted_evidence_is_for_answers(fitted_once):
    with pytest.raises(UsageError, match="--method adapted does not go with likelihood gaussian"):
        tune_prior(model_of(fitted_once["gaussian"]), None, PriorSettings(method="adapted"))


@pytest.mark.parametrize("structure", ["kind", "layer"])
@pytest.mark.parametrize("method", ["auto", "validation", "marglik"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_several_prior_precisions(name, method, structure, tiny, monkeypatch, capfdbinary):
    folder = tiny(name)
    prior = tune_prior(model_of(folder), None, PriorSettings(method=method, structure=structure)).prior
    assert prior["structure"] == structure and len(prior["precision"]) > 1
    for extra in ((), ("--json",)):
        status, out, said = command(monkeypatch, capfdbinary, "inspect", folder / "adapter", *extra)
        assert status == 0 and out, said


def test_the_scale_of_a_regression_is_averaged_over(tiny):
    """Tempering: of rows with three times the residuals, the predictive deviation is about three times as large."""
    folder = tiny("gaussian")
    file = folder / "data" / "validation.jsonl"
    fitted, rows, tables = table_and_rows(folder)
    residuals = rows.targets - tables["map"][0][:, :, 0, 0]
    factor = 3.0 * math.sqrt(fitted.posterior.manifest.noise_variance[0]) / float(residuals.square().mean().sqrt())
    wide = rows.targets + (factor - 1.0) * residuals
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(
        "".join(json.dumps({**line, "label": y}) + "\n" for line, y in zip(lines, wide[:, 0].tolist(), strict=True))
    )
    for method in ("auto", "validation"):
        tune_prior(model_of(folder), DataSettings(data_dir=folder / "data", limit=12), PriorSettings(method=method))
        fitted = open_fitted(model_of(folder), "default")
        found = score_rows(fitted, rows, ["mc-joint"], samples=256).tables
        mean, variance = mixture_moments(found["mc-joint"][0])
        assert torch.allclose(mean, tables["map"][0][:, :, 0, 0], atol=1e-5)
        ratio = float((variance / fitted.posterior.manifest.noise_variance[0]).sqrt().mean())
        assert 2.0 < ratio < 4.5, method


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_python_api(name, tiny):
    folder = tiny(name)
    predictor = lapora.load(folder / "adapter", device="cpu")
    row = rows_of(name, 1, 3 if name == "multilabel" else 1, seed=4)[0]
    answer = predictor.predict(row)
    (record,) = predict(model_of(folder), PredictSettings(logits=True), [json.dumps(row).encode()])
    assert answer.record == record and answer.prediction == record["prediction"]
    assert math.isnan(answer.confidence) == (name in ("gaussian", "multilabel"))
    done = lapora.calibrate(
        folder / "adapter", data=folder / "task.yaml", data_dir=folder / "data", name="c", device="cpu"
    )
    assert done.verdict.better is None, "six rows are too few to judge"


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_model_in_memory_predicts_as_its_files(name, fitted_once, tmp_path):
    folder = fitted_once[name]
    with silence_libraries():
        base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=OUTPUTS[name])
        network = PeftModel.from_pretrained(base, str(folder / "adapter"))
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    predictor = lapora.fit_model(network, tokenizer, rows, task=folder / "task.yaml", output_dir=tmp_path)
    row = rows_of(name, 1, OUTPUTS[name], seed=4)[0]
    found = predictor.predict(row).record
    (record,) = predict(model_of(folder), PredictSettings(logits=True), [json.dumps(row).encode()])
    flat, expected = (torch.tensor(list(numbers_in(each))) for each in (found, record))
    assert found.keys() == record.keys() and torch.allclose(flat, expected, rtol=1e-3, atol=1e-4)


def numbers_in(value):
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(each)
    elif isinstance(value, (int, float)):
        yield float(value)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_command_line_prints_plots_and_gates(name, tiny, monkeypatch, capfdbinary, tmp_path):
    folder = tiny(name)
    arguments = ("--plots", tmp_path / "plots", "--report", tmp_path / "report.html", "--device", "cpu")
    status, out, said = command(
        monkeypatch, capfdbinary, "eval", folder / "adapter", *arguments, "--fail-if", "nll<-1000"
    )
    assert status == 0, said
    names = {file.stem for file in (tmp_path / "plots").glob("*.png")}
    expected = {"quantiles", "pit"} if name == "gaussian" else {"reliability", "confidence", "risk-coverage"}
    assert names == expected and b"laplace default" in out
    assert "laplace default" in (tmp_path / "report.html").read_text()
    gate = {"gaussian": "rmse>0", "multilabel": "f1_micro>=0"}.get(name, "accuracy>=0")
    status, _, said = command(
        monkeypatch, capfdbinary, "eval", folder / "adapter", "--fail-if", gate, "--device", "cpu"
    )
    assert status == 7 and "gate failed" in said


def test_predictions_of_a_regression_as_columns(tiny, monkeypatch, capfdbinary, tmp_path):
    folder, rows = tiny("gaussian"), tmp_path / "rows.jsonl"
    rows.write_bytes(b"\n".join(lines_of("gaussian", 3)))
    for ending in ("csv", "parquet"):
        target = tmp_path / f"out.{ending}"
        status, _, said = command(
            monkeypatch, capfdbinary, "predict", folder / "adapter", rows, "--output", target, "--device", "cpu"
        )
        assert status == 0, said
    header = (tmp_path / "out.csv").read_text().splitlines()[0]
    assert header.startswith("index,id,prediction,deviation,epistemic_deviation,interval.low,interval.high")


@pytest.mark.parametrize("name", ["gaussian", "multilabel", "preference"])
def test_an_interrupted_fit_resumes_to_the_same_posterior(name, tiny):
    folder = tiny(name)
    options = {"overwrite": True, "model": {"batch_size": 4}}
    whole = fit_tiny(folder, **options)
    before = SavedPosterior(whole.folder).tensors
    done = []

    def stop(count: int, total: int) -> None:
        done.append(count)
        if len(done) == 3:
            raise KeyboardInterrupt

    settings = FitSettings(overwrite=True, save_every=0, prior_method="marglik")
    with pytest.raises(KeyboardInterrupt):
        fit(model_of(folder, batch_size=4), data_of(folder), settings, stop)
    resumed = fit_tiny(folder, resume=True, save_every=0, **options)
    assert any("resumed after" in note for note in resumed.notes)
    assert SavedPosterior(resumed.folder).tensors == before
