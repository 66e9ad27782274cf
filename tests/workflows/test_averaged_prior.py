"""`fit`, `tune-prior` and `predict` with an averaged prior, against predictions under every prior by itself."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

from lapora.config import DataSettings, EvalSettings, PredictSettings, PriorSettings
from lapora.errors import PosteriorError, UsageError
from lapora.likelihoods.categorical import log_probabilities
from lapora.posterior.averaging import TOLERANCE_ROWS, average, tolerance_of
from lapora.storage.manifest import read_prior
from lapora.storage.saved import SavedPosterior
from lapora.workflows.averaging import grid
from lapora.workflows.evaluate import run_evaluation
from lapora.workflows.predict import predict
from lapora.workflows.rows import read_labelled_rows, row_digest, tuning_rows
from lapora.workflows.scoring import score_rows
from lapora.workflows.task_model import PriorAverage, open_fitted
from lapora.workflows.tune_prior import tune_prior
from tiny_adapter import command, data_of, fit_tiny, json_lines, make_adapter, model_of


@pytest.fixture(scope="module")
def fitted_once(tmp_path_factory):
    folder = make_adapter(tmp_path_factory.mktemp("averaged"), scale=0.5)
    result = fit_tiny(folder, prior_method="averaged")
    return folder, result


@pytest.fixture
def tiny(fitted_once, tmp_path):
    """A copy to write in; the base stays where it was."""
    shutil.copytree(fitted_once[0], tmp_path / "copy")
    return tmp_path / "copy"


def posterior_of(folder) -> SavedPosterior:
    return SavedPosterior(folder / "adapter" / "laplace" / "default")


def test_fit_leaves_an_average_around_what_the_training_rows_tolerate(fitted_once):
    folder, result = fitted_once
    posterior = posterior_of(folder)
    prior, curve = posterior.prior, posterior.manifest.training_curve
    assert prior.method == "averaged" and prior.averaged.n == 0 and prior.averaged.temperatures == [1.0]
    assert curve.n == min(TOLERANCE_ROWS, 24)
    assert prior.averaged.tolerance == pytest.approx(tolerance_of(curve))
    assert np.allclose(prior.averaged.weights, average(grid(), [1.0], tolerance_of(curve)))
    assert prior.precision == pytest.approx(prior.averaged.mean_precision)
    assert result.describe()["prior"] == posterior.content["prior"]
    assert prior.log_marginal_likelihood == pytest.approx(result.prior["log_marginal_likelihood"])


def test_the_training_curve_is_the_nll_of_the_training_rows(fitted_once):
    folder, _ = fitted_once
    fitted = open_fitted(model_of(folder), "default")
    curve = fitted.posterior.manifest.training_curve
    rows = read_labelled_rows(fitted.posterior, fitted.model.kind, DataSettings(split="train"))
    priors = fitted.prior.precisions.on_grid(grid())
    scored = score_rows(
        fitted, rows, ["mc-joint"], samples=512, averages=[PriorAverage.single(each) for each in priors]
    )
    tables = torch.stack(scored.tables["mc-joint"])
    by_row = -tables.gather(2, rows.targets.expand(len(priors), -1).unsqueeze(2)).squeeze(2)
    expected = torch.tensor([*curve.nll, curve.map_nll], dtype=torch.float64)
    assert torch.allclose(by_row.mean(dim=1), expected, atol=1e-6)
    excess = (by_row[:-1] - by_row[-1]).numpy()
    assert np.allclose(curve.variance, excess.var(axis=1), atol=1e-6)


@pytest.mark.parametrize("link", ["mc-joint", "probit", "bridge", "mc-indep"])
def test_predictions_are_the_weighted_sum_over_every_prior_and_temperature(tiny, link):
    tune_prior(model_of(tiny), None, PriorSettings(link=link))
    fitted = open_fitted(model_of(tiny), "default")
    averaged = fitted.prior.averaged.pruned()
    rows = read_labelled_rows(fitted.posterior, fitted.model.kind, DataSettings())
    encoded = fitted.model.encode(rows.examples)
    expected = torch.zeros(len(encoded), 2, dtype=torch.float64)
    for index, prior in enumerate(fitted.average.priors):
        with fitted.predictor(every_class=True, priors=[prior]) as predictor:
            for batch in fitted.model.batches(encoded):
                moments = predictor.moments(batch)
                for column, temperature in enumerate(averaged.temperatures):
                    weight = averaged.weights[index][column]
                    expected[list(batch.rows)] += weight * log_probabilities(link, moments.divided(temperature)).exp()
    lines = [json.dumps(example.row).encode() for example in rows.examples]
    records = list(predict(model_of(tiny), PredictSettings(link=link), lines))
    found = torch.tensor([list(record["probabilities"].values()) for record in records], dtype=torch.float64)
    assert (found - expected).abs().max() < 1e-6
    scored = score_rows(fitted, rows, [link], samples=2048)
    assert (scored.tables[link][0].exp() - expected).abs().max() < 1e-6


def test_the_moments_of_an_average_say_that_they_are(tiny):
    (record,) = predict(model_of(tiny), PredictSettings(logits=True), json_lines(1))
    assert record["logits"]["averaged"] is True
    tune_prior(model_of(tiny), None, PriorSettings(method="marglik"))
    (record,) = predict(model_of(tiny), PredictSettings(logits=True), json_lines(1))
    assert "averaged" not in record["logits"]


def test_labelled_rows_give_the_weights_of_the_formula(tiny):
    model = model_of(tiny)
    tuned = tune_prior(model, None, PriorSettings(seed=3))
    fitted = open_fitted(model, "default")
    averaged = fitted.prior.averaged
    rows = tuning_rows(fitted.posterior, fitted.model.kind, DataSettings(), seed=3)
    assert averaged.rows == [row_digest(example) for example in rows.examples] and averaged.n == len(rows.examples)
    nll = np.zeros((len(grid()), len(averaged.temperatures)))
    priors = fitted.prior.precisions.on_grid(grid())
    encoded = fitted.model.encode(rows.examples)
    with fitted.predictor(every_class=False, priors=priors) as predictor:
        for batch in fitted.model.batches(encoded):
            for i, moments in enumerate(predictor.moments_under_each_prior(batch)):
                for j, temperature in enumerate(averaged.temperatures):
                    log_p = log_probabilities("mc-joint", moments.divided(temperature))
                    nll[i, j] -= float(log_p[range(len(log_p)), rows.targets[list(batch.rows)]].sum())
    expected = average(grid(), averaged.temperatures, averaged.tolerance, nll / averaged.n, averaged.n)
    assert np.allclose(averaged.weights, expected, atol=1e-6)
    assert tuned.method == "averaged" and tuned.precision.mean == pytest.approx(averaged.mean_precision)
    assert "rows of validation" in tuned.reason and "temperature" in tuned.reason
    assert any("more labelled rows would" in note for note in tuned.notes)


def test_rows_that_were_averaged_over_are_not_scored(tiny):
    tune_prior(model_of(tiny), None, PriorSettings())
    record = run_evaluation(model_of(tiny), DataSettings(), EvalSettings()).record
    assert record["excluded"] == 6 and record["n"] == 6


def test_without_labelled_rows_the_average_needs_no_model(tiny, monkeypatch):
    (tiny / "data" / "validation.jsonl").unlink()
    fit_tiny(tiny, prior_method="averaged", overwrite=True)  # records this copy's data
    before = posterior_of(tiny).content["prior"]
    tune_prior(model_of(tiny), None, PriorSettings(method="marglik"))
    monkeypatch.setattr("lapora.workflows.task_model.open_fitted", lambda *_: pytest.fail("the model was loaded"))
    tuned = tune_prior(model_of(tiny), None, PriorSettings())
    assert tuned.prior == before
    assert tuned.notes[0].startswith("the average is over what the training rows tolerate: no labelled rows except")


@pytest.mark.parametrize("structure", ["kind", "layer"])
def test_several_precisions_keep_the_ratios_of_the_marginal_likelihood(tiny, structure):
    tuned = tune_prior(model_of(tiny), None, PriorSettings(structure=structure))
    evidence = tune_prior(model_of(tiny), None, PriorSettings(structure=structure, method="marglik"))
    ratios = {group: value / tuned.precision.mean for group, value in tuned.precision.precisions.items()}
    expected = {group: value / evidence.precision.mean for group, value in evidence.precision.precisions.items()}
    assert ratios == pytest.approx(expected)


def test_a_point_is_one_precision_and_one_temperature(tiny):
    averaged = tune_prior(model_of(tiny), None, PriorSettings()).prior["averaged"]
    tuned = tune_prior(model_of(tiny), None, PriorSettings(structure="point"))
    fitted = open_fitted(model_of(tiny), "default")
    assert len(fitted.average.priors) == 1 and fitted.average.averaging.weights.tolist() == [[1.0]]
    assert fitted.prior.averaged.rows == averaged["rows"]
    assert fitted.average.priors[0].precisions["all"] == pytest.approx(tuned.prior["precision"])
    with pytest.raises(UsageError, match="--prior point goes with --method auto"):
        tune_prior(model_of(tiny), None, PriorSettings(structure="point", method="marglik"))


def test_rows_without_labels_leave_the_evidence_and_say_so(tiny):
    rows = [json.loads(line) for line in (tiny / "data" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        del row["label"]
    (tiny / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = fit_tiny(tiny, prior_method="averaged", overwrite=True, unlabelled=True)
    assert result.prior["method"] == "marglik" and posterior_of(tiny).manifest.training_curve is None
    assert any("may be far too small" in note for note in result.notes)


def test_a_damaged_average_is_refused(tiny):
    posterior = posterior_of(tiny)
    prior = json.loads(json.dumps(posterior.content["prior"]))
    prior["averaged"]["weights"][0][0] = 2.0
    posterior.rewrite_manifest({"prior": prior})
    with pytest.raises(PosteriorError, match=r"field prior is damaged .*sum to 1"):
        read_prior(posterior.folder / "posterior.json", posterior.content)
    assert tune_prior(model_of(tiny), None, PriorSettings(method="marglik")).method == "marglik"


def test_the_paper_stays_reachable(tiny):
    result = fit_tiny(tiny, prior_method="marglik", overwrite=True)
    assert result.prior["method"] == "marglik" and "averaged" not in result.prior
    tuned = tune_prior(model_of(tiny), None, PriorSettings(method="marglik"))
    assert tuned.prior == result.prior
    assert any("marginal likelihood often chooses far too small" in note for note in tuned.notes)


def test_the_command_line_says_what_was_learned(tiny, monkeypatch, capfdbinary):
    status, out, said = command(monkeypatch, capfdbinary, "tune-prior", tiny / "adapter", "--json", "--device", "cpu")
    prior = json.loads(out)
    assert (
        status == 0 and prior["method"] == "averaged" and math.isclose(sum(map(sum, prior["averaged"]["weights"])), 1)
    )
    assert "from 6 rows of validation: averaged over prior precisions" in said


def test_data_of_names_the_rows(tiny):
    asked = data_of(tiny, split="validation", limit=4)
    assert tune_prior(model_of(tiny), asked, PriorSettings()).prior["averaged"]["n"] == 4


@pytest.mark.parametrize("structure", ["ekfac", "diag", "full", "lowrank"])
def test_every_structure_has_a_curve_that_ends_at_map(tiny, structure):
    """At the largest precisions the posterior has no width: NLL and probabilities are MAP's."""
    options = {"rank": 8} if structure == "lowrank" else {}
    fit_tiny(tiny, prior_method="averaged", structure=structure, overwrite=True, **options)
    fitted = open_fitted(model_of(tiny), "default")
    curve = fitted.posterior.manifest.training_curve
    assert curve.nll[-1] == pytest.approx(curve.map_nll, abs=1e-4) and curve.variance[-1] < 1e-6
    encoded = fitted.model.encode(read_labelled_rows(fitted.posterior, "causal", DataSettings()).examples)
    (without_width,) = fitted.prior.precisions.on_grid([math.inf])
    with fitted.predictor(every_class=True, priors=[without_width]) as predictor:
        for batch in fitted.model.batches(encoded):
            moments = predictor.moments(batch)
            assert not moments.covariance.any()
            for link in ("mc-joint", "probit", "bridge", "mc-indep"):
                assert torch.allclose(log_probabilities(link, moments), log_probabilities("map", moments), atol=1e-9)


def test_several_precisions_without_labelled_rows_are_one(tiny):
    (tiny / "data" / "validation.jsonl").unlink()
    fit_tiny(tiny, prior_method="averaged", overwrite=True)
    tuned = tune_prior(model_of(tiny), None, PriorSettings(structure="kind"))
    assert tuned.prior["structure"] == "scalar" and any(
        "is ignored without labelled rows" in note for note in tuned.notes
    )
