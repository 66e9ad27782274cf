"""The prior: several precisions, Adam, adapted evidence, tuning on validation rows."""

from __future__ import annotations

import json
import math
import shlex
import shutil

import numpy as np
import pytest
import torch

from lapora import metrics
from lapora.cli.app import app
from lapora.config import DataSettings, FitSettings, ModelSettings, PriorSettings
from lapora.curvature.passes import CurvatureRun
from lapora.errors import DataError, UsageError
from lapora.models.lora_layers import find_bayesian_layers
from lapora.posterior.linearised_evidence import LinearModel
from lapora.posterior.marglik import Spectrum, evidence_at, maximize_evidence
from lapora.posterior.prior import PriorPrecision
from lapora.posterior.structures import fit_structure
from lapora.storage.saved import SavedPosterior
from lapora.workflows import evaluate as evaluation
from lapora.workflows.evaluate import evaluate
from lapora.workflows.fit import fit
from lapora.workflows.rows import read_labelled_rows
from lapora.workflows.scoring import score_rows
from lapora.workflows.task_model import PriorAverage, open_fitted
from lapora.workflows.tune_prior import GRID, curve_minimum, tune_prior
from tiny_models import batches, dense_jacobian, rows, tiny_classifier

ROLES = ["A", "B", "A", "B", "head"]
SPECTRA = [Spectrum.of(np.array(each), [None]) for each in ([3.0, 0.2], [50.0], [0.1, 7.0], [2.0], [0.5, 0.5, 9.0])]
PARAMETERS = [
    {"name": f"layer{i}", "role": role, "shape": [1, 2], "squared_norm": norm}
    for i, (role, norm) in enumerate(zip(ROLES, (0.5, 1.5, 0.01, 4.0, 0.3), strict=True))
]


@pytest.mark.parametrize("structure", ["scalar", "kind", "layer"])
def test_adam_agrees_with_the_exact_solve(structure):
    exact = maximize_evidence(SPECTRA, PARAMETERS, -3.0, structure=structure)
    adam = maximize_evidence(SPECTRA, PARAMETERS, -3.0, structure=structure, optimizer="adam")
    assert adam.prior.precisions == pytest.approx(exact.prior.precisions, rel=1e-3)
    assert adam.log_marginal_likelihood == pytest.approx(exact.log_marginal_likelihood, abs=1e-6)


def test_more_priors_never_lower_the_evidence_and_each_is_its_groups_own():
    found = [maximize_evidence(SPECTRA, PARAMETERS, structure=structure) for structure in ("scalar", "kind", "layer")]
    evidence = [each.log_marginal_likelihood for each in found]
    assert evidence[0] < evidence[1] < evidence[2]
    assert set(found[1].prior.precisions) == {"A", "B", "head"}
    alone = maximize_evidence(SPECTRA[1:2], PARAMETERS[1:2])
    assert found[2].prior.precisions["layer1"] == pytest.approx(alone.prior.precisions["all"])
    for each in found:
        assert evidence_at(each.prior, SPECTRA, PARAMETERS, 0.0)[0] == pytest.approx(each.log_marginal_likelihood)
        again = PriorPrecision.from_manifest(json.loads(json.dumps(each.describe(True))))
        assert again.per_layer(PARAMETERS) == pytest.approx(each.prior.per_layer(PARAMETERS))


def test_several_priors_of_a_posterior_that_joins_layers_are_refused():
    with pytest.raises(UsageError, match=r"independent layers"):
        maximize_evidence(SPECTRA[:1], PARAMETERS, structure="kind")


@pytest.mark.parametrize(("delta", "classes"), [(0.05, 2), (1.0, 3), (30.0, 2)])
def test_adapted_evidence_equals_the_dense_one_in_weight_space(classes, delta):
    """Mode of the linearised model over all weights, by plain Newton; then its Laplace evidence."""
    answers = tiny_classifier(classes)
    layers = find_bayesian_layers(answers.model)
    encoded = rows(8)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes, (8,), generator=generator)
    run = CurvatureRun(answers, layers, lambda: batches(answers, encoded, 4), labels.tolist(), classes)
    posterior, _ = fit_structure("full", run)
    parts = posterior.linear_model
    dual = LinearModel(parts["kernel"].numpy(), parts["prior_mean"].numpy(), parts["labels"].numpy())
    evidence, _ = dual.log_marginal_likelihood(delta)

    logits, jacobian = dense_jacobian(answers, layers, encoded)
    at_map = torch.cat([layer.module.weight.flatten() for layer in layers])
    size = len(at_map)

    def terms(theta):
        f = logits + jacobian @ (theta - at_map)
        log_p = torch.log_softmax(f, dim=1)
        p = log_p.exp()
        one_hot = torch.nn.functional.one_hot(labels, classes)
        hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        curvature = torch.einsum("ncp,ncd,ndq->pq", jacobian, hessian, jacobian) + delta * torch.eye(size).double()
        gradient = torch.einsum("ncp,nc->p", jacobian, one_hot - p) - delta * theta
        return (
            float(log_p.gather(1, labels.unsqueeze(1)).sum() - delta / 2 * theta.square().sum()),
            gradient,
            curvature,
        )

    theta = torch.zeros(size, dtype=torch.float64)
    for _ in range(200):
        value, gradient, curvature = terms(theta)
        step, length = torch.linalg.solve(curvature, gradient), 1.0
        while terms(theta + length * step)[0] < value and length > 1e-9:
            length /= 2
        theta = theta + length * step
    value, _, curvature = terms(theta)
    expected = value - 0.5 * float(torch.logdet(curvature / delta))
    assert evidence == pytest.approx(expected, abs=1e-5)


def test_the_adapted_maximum_is_one():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(40, 6))
    labels = (features[:, 0] + 0.5 * generator.normal(size=40) > 0).astype(np.int64)
    model = LinearModel(features @ features.T, np.zeros((40, 1)), labels)
    precision, evidence, bound = model.maximize()
    assert bound is None
    around = [model.log_marginal_likelihood(precision * factor)[0] for factor in (0.5, 0.8, 1.25, 2.0)]
    assert evidence >= max(around)


def test_the_greater_of_two_adapted_maxima_is_found_beyond_a_dip():
    """Strong directions of noise cost log-determinant before a weak direction of signal pays."""
    generator = np.random.default_rng(1)
    signal = generator.normal(size=(200, 1))
    labels = (signal[:, 0] > 0).astype(np.int64)
    features = np.concatenate([signal, 1e3 * generator.normal(size=(200, 10))], axis=1)
    model = LinearModel(features @ features.T, np.zeros((200, 1)), labels)
    precision, evidence, _ = model.maximize()
    grid = [model.log_marginal_likelihood(10.0**power)[0] for power in range(-5, 9)]
    assert evidence >= max(grid) - 1e-6
    assert precision < 1.0


def test_a_kernel_of_nothing_runs_to_a_bound_and_says_so():
    _, _, bound = LinearModel(np.zeros((6, 6)), np.zeros((6, 1)), np.zeros(6, dtype=np.int64)).maximize()
    assert bound in ("lowest", "highest")


def test_the_vertex_of_a_parabola():
    positions = np.log(GRID).tolist()
    vertex, least, bound = curve_minimum(positions, [(x - 1.7) ** 2 + 3 for x in positions])
    assert vertex == pytest.approx(1.7) and least == pytest.approx(3.0) and bound is None
    assert curve_minimum(positions, [-x for x in positions]) == (positions[-1], -positions[-1], "highest")
    assert curve_minimum(positions, positions) == (positions[0], positions[0], "lowest")
    assert curve_minimum(positions, [1.0] * len(positions)) == (positions[-1], 1.0, "highest")  # no difference: MAP


@pytest.fixture
def adapter(demo, tmp_path):
    shutil.copytree(demo / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def refit(demo, adapter, **settings):
    return fit(
        ModelSettings(adapter=str(adapter)),
        DataSettings(task=str(demo / "farm.yaml"), data_dir=demo / "data"),
        FitSettings(overwrite=True, **settings),
    )


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "lowrank", "full"])
def test_a_grid_of_priors_in_one_pass_equals_one_pass_for_each(demo, adapter, structure):
    refit(demo, adapter, structure=structure, rank=20 if structure == "lowrank" else None)
    session = open_fitted(ModelSettings(adapter=str(adapter)), "default")
    labelled = read_labelled_rows(session.posterior, session.model.kind, DataSettings(limit=20))
    priors = [PriorPrecision("scalar", {"all": delta}) for delta in (0.1, 3.0, 200.0)]
    links = ["mc-joint", "mc-indep", "probit", "bridge"]
    together = score_rows(
        session, labelled, links, samples=256, averages=[PriorAverage.single(each) for each in priors]
    )
    for index, prior in enumerate(priors):
        alone = score_rows(session, labelled, links, samples=256, averages=[PriorAverage.single(prior)])
        for link in links:
            torch.testing.assert_close(together.tables[link][index], alone.tables[link][0], atol=1e-6, rtol=1e-5)


def test_validation_chooses_the_least_nll_and_eval_leaves_its_rows_out(demo, adapter, capsys):
    model = ModelSettings(adapter=str(adapter))
    before = evaluate(model, DataSettings())
    tuned = tune_prior(model, settings=PriorSettings(method="validation"))
    assert tuned.method == "validation"
    record = tuned.prior["validation"]
    rows_in_split = before["n"] + before["excluded"]
    read_by_fit = 1  # one of the demo's rows has the text and label of a training row
    assert record["n"] == (rows_in_split - read_by_fit) // 2 and record["split"] == "validation"
    least = min(point["nll"] for point in record["curve"])
    assert record["map"]["nll"] >= least >= record["least_nll"]
    assert f"NLL about {record['least_nll']:.4f} on" in tuned.reason
    nearest = min(record["curve"], key=lambda point: point["nll"])["precision"]
    assert abs(math.log(tuned.prior["precision"] / nearest)) < math.log(10) / 2
    assert "marginal likelihood would have given" in tuned.reason
    app(["inspect", str(adapter)], standalone_mode=False)
    drawn = capsys.readouterr().out
    assert f"marglik {record['marglik']['precision']:.3g}" in drawn and "least" in drawn and "MAP" in drawn
    after = evaluate(model, DataSettings())
    # A row that says the same as a tuned one is left out as well.
    assert after["excluded"] >= record["n"] and after["n"] == rows_in_split - after["excluded"]
    # The rows used are the same ones every time, and those of another seed are others.
    assert tune_prior(model, settings=PriorSettings(method="validation")).prior["validation"]["rows"] == record["rows"]
    other = tune_prior(model, settings=PriorSettings(method="validation", seed=1))
    assert other.prior["validation"]["rows"] != record["rows"]
    few = tune_prior(model, DataSettings(limit=30), PriorSettings(method="validation", link="probit"))
    assert few.prior["validation"]["n"] == 30 and few.prior["validation"]["link"] == "probit"
    assert evaluate(model, DataSettings(limit=50))["excluded"] >= 30
    assert not any("--limit" in note for note in few.notes)
    every = tune_prior(model, DataSettings(limit=5000), PriorSettings(method="validation"))
    assert any("rows of validation tuned the prior, and none is left to evaluate on" in note for note in every.notes)


def test_validation_of_a_prior_per_layer_keeps_the_evidences_ratios(demo, adapter):
    model = ModelSettings(adapter=str(adapter))
    by_evidence = tune_prior(model, settings=PriorSettings(method="marglik", structure="kind")).prior["precision"]
    tuned = tune_prior(model, settings=PriorSettings(method="validation", structure="kind")).prior
    assert tuned["precision"]["A"] / tuned["precision"]["B"] == pytest.approx(by_evidence["A"] / by_evidence["B"])
    assert "ratios by marginal likelihood" in tuned["validation"]["scheme"]
    assert evaluate(model, DataSettings(limit=20))["n"] == 20


def test_auto_without_other_rows_averages_over_what_the_training_rows_tolerate(demo, adapter, tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    shutil.copy(demo / "data" / "train.jsonl", data_dir)
    model = ModelSettings(adapter=str(adapter))
    data = DataSettings(task=str(demo / "farm.yaml"), data_dir=data_dir)
    result = fit(model, data, FitSettings(overwrite=True))
    tuned = tune_prior(model)
    assert tuned.method == "averaged" and tuned.prior == result.prior
    assert tuned.reason.startswith("from no labelled rows: averaged over prior precisions")
    with pytest.raises(DataError, match="no labelled rows"):
        tune_prior(model, settings=PriorSettings(method="validation"))
    with pytest.raises(UsageError, match="trained on these rows"):
        tune_prior(model, DataSettings(split="train"), PriorSettings(method="validation"))


def test_the_training_rows_never_tune_whatever_they_are_called(demo, adapter, tmp_path):
    model = ModelSettings(adapter=str(adapter))
    method = PriorSettings(method="validation")
    for data in (
        DataSettings(split="train", data_dir=demo / "data"),
        DataSettings(split="train", task=str(demo / "farm.yaml")),
        DataSettings(split="train", data_dir=demo / "data" / ".." / "data"),
    ):
        with pytest.raises(UsageError, match="trained on these rows"):
            tune_prior(model, data, method)
    renamed = tmp_path / "renamed.yaml"
    renamed.write_text((demo / "farm.yaml").read_text() + "\nvalidation_split: train\n")
    only_training_rows = tmp_path / "data"
    only_training_rows.mkdir()
    shutil.copy(demo / "data" / "train.jsonl", only_training_rows)
    fit(model, DataSettings(task=str(renamed), data_dir=only_training_rows), FitSettings(overwrite=True))
    assert tune_prior(model).prior["averaged"]["n"] == 0


def test_rows_that_cannot_be_read_are_an_error_and_not_a_want_of_rows(demo, adapter, tmp_path):
    data_dir = tmp_path / "data"
    shutil.copytree(demo / "data", data_dir)
    model = ModelSettings(adapter=str(adapter))
    fit(model, DataSettings(task=str(demo / "farm.yaml"), data_dir=data_dir), FitSettings(overwrite=True))
    tuned = tune_prior(model, DataSettings(limit=8)).prior
    data_dir.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"no such folder.*tuned on labelled rows and is kept"):
        tune_prior(model)
    kept = json.loads((adapter / "laplace" / "default" / "posterior.json").read_text())["prior"]
    assert kept["averaged"]["n"] == tuned["averaged"]["n"] == 8
    tune_prior(model, settings=PriorSettings(method="marglik"))  # which was not tuned on them
    assert any("no such folder" in note for note in tune_prior(model).notes)


def test_a_damaged_validation_row_is_an_error_and_not_a_want_of_rows(demo, adapter, tmp_path):
    data_dir = tmp_path / "data"
    shutil.copytree(demo / "data", data_dir)
    lines = (data_dir / "validation.jsonl").read_text().splitlines()
    model = ModelSettings(adapter=str(adapter))
    fit(model, DataSettings(task=str(demo / "farm.yaml"), data_dir=data_dir), FitSettings(overwrite=True))
    bad = json.loads(lines[3]) | {"label": 7}
    (data_dir / "validation.jsonl").write_text("\n".join([*lines[:3], json.dumps(bad), *lines[4:]]) + "\n")
    with pytest.raises(DataError, match="label"):
        tune_prior(model)
    bare = [{key: value for key, value in json.loads(line).items() if key != "label"} for line in lines]
    (data_dir / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    assert any("have no labels" in note for note in tune_prior(model).notes)


def test_the_map_has_no_prior_to_tune(adapter):
    with pytest.raises(UsageError, match="--link map"):
        tune_prior(ModelSettings(adapter=str(adapter)), settings=PriorSettings(link="map"))


def test_adam_that_does_not_arrive_says_so(adapter):
    model = ModelSettings(adapter=str(adapter))
    tuned = tune_prior(model, settings=PriorSettings(method="marglik", optimizer="adam", steps=3))
    assert any("adam stopped" in note for note in tuned.notes)
    done = tune_prior(model, settings=PriorSettings(method="marglik", optimizer="adam"))
    assert not any("adam" in note for note in done.notes)


def test_adam_with_a_large_learning_rate_is_no_traceback(adapter):
    settings = PriorSettings(method="marglik", optimizer="adam", learning_rate=1000.0)
    assert any(
        "adam stopped" in note for note in tune_prior(ModelSettings(adapter=str(adapter)), settings=settings).notes
    )


def test_adapted_needs_full_and_a_scalar_prior(demo, adapter):
    model = ModelSettings(adapter=str(adapter))
    with pytest.raises(UsageError, match="--structure full"):
        tune_prior(model, settings=PriorSettings(method="adapted"))
    result = refit(demo, adapter, structure="full")
    with pytest.raises(UsageError, match="--prior scalar"):
        tune_prior(model, settings=PriorSettings(method="adapted", structure="kind"))
    tuned = tune_prior(model, settings=PriorSettings(method="adapted"))
    assert tuned.prior["method"] == "adapted"
    assert SavedPosterior(result.folder).content["prior"]["precision"] == tuned.prior["precision"]
    assert evaluate(model, DataSettings(limit=20))["results"][2]["nll"] > 0


def test_a_prior_that_makes_it_worse_is_a_warning_with_its_remedy(demo, adapter):
    tune_prior(ModelSettings(adapter=str(adapter)), settings=PriorSettings(method="marglik"))
    session = open_fitted(ModelSettings(adapter=str(adapter)), "default")
    labelled = read_labelled_rows(session.posterior, session.model.kind, DataSettings(limit=100))
    hit = torch.nn.functional.one_hot(labelled.targets, 2).double()
    sure, unsure = torch.log(0.9 * hit + 0.1 * (1 - hit)), torch.log(0.6 * hit + 0.4 * (1 - hit))
    (warning,) = evaluation._warn(session, "mc-joint", labelled, unsure, sure, "x")
    assert warning.startswith("warning") and "underconfident" in warning and "lapora tune-prior x" in warning
    (warning,) = evaluation._warn(session, "mc-joint", labelled, unsure.flip(1), sure, "x")
    assert "overconfident" in warning
    noise = 0.01 * torch.where(torch.arange(100) % 2 == 0, 1.0, -1.0).double().unsqueeze(1) - 3e-4
    (note,) = evaluation._warn(session, "mc-joint", labelled, unsure + noise, unsure, "x")
    assert note.startswith("note") and "no better than MAP" in note
    assert evaluation._warn(session, "mc-joint", labelled, sure, unsure, "x") == []


def test_the_remedy_fits_how_the_prior_was_chosen(demo, adapter):
    model = ModelSettings(adapter=str(adapter))
    tune_prior(model, settings=PriorSettings(method="validation"))
    session = open_fitted(model, "default")
    assert "--link probit" in evaluation._remedy(session, "probit", "x")
    assert "average instead of choosing" in evaluation._remedy(session, "mc-joint", "x")
    tune_prior(model)
    assert "tune on more rows" in evaluation._remedy(open_fitted(model, "default"), "mc-joint", "x")


def test_the_remedy_finds_posterior_and_rows_again(demo, adapter, tmp_path):
    elsewhere = tmp_path / "a folder"
    shutil.move(adapter / "laplace", elsewhere / "laplace")
    shutil.copytree(demo / "data", elsewhere / "data")
    model = ModelSettings(adapter=str(adapter), output_dir=elsewhere)
    tune_prior(model, settings=PriorSettings(method="marglik"))
    options = evaluation.remedy_options(model, DataSettings(data_dir=elsewhere / "data", split="validation"))
    line = evaluation._remedy(open_fitted(model, "default"), "probit", options)
    _, *arguments = shlex.split(line.partition(": ")[2])
    app(arguments, standalone_mode=False)
    prior = SavedPosterior(elsewhere / "laplace" / "default").content["prior"]
    assert prior["method"] == "averaged" and prior["averaged"]["link"] == "probit"


def test_the_bootstrap_interval_covers_the_mean():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(60):
        sample = torch.randn(80, generator=generator).double() + 0.3
        low, high = metrics.paired_interval(sample, resamples=400)
        covered += low < 0.3 < high
    assert covered >= 50
