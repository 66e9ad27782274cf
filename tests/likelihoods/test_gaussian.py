"""Regression against linear regression in closed form, laplace-torch, and numerical integration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import multivariate_normal, norm

from lapora.curvature.passes import CurvatureRun
from lapora.errors import DataError, UsageError
from lapora.likelihoods.base import Averaging, LogitMoments
from lapora.likelihoods.gaussian import Gaussian
from lapora.metrics.mixtures import (
    central_interval,
    mixture_cdf,
    mixture_crps,
    mixture_log_density,
    mixture_moments,
    mixture_quantile,
    pit_histogram,
)
from lapora.models.lora_layers import BayesianLayer
from lapora.posterior.marglik import Spectrum, evidence_at, maximize_evidence
from lapora.posterior.prior import PriorPrecision
from lapora.posterior.structures import fit_structure
from lapora.predictive.moments import LinearisedPredictor
from tiny_models import batches, rows, tiny_classifier

ROWS = 40


def linear_problem(penalty: float, seed: int = 0):
    """Features, targets, the ridge solution, and the mean square of its residuals."""
    source = np.random.default_rng(seed)
    features = source.normal(size=(ROWS, 5)) * [1.0, 0.3, 2.0, 0.1, 1.0]
    targets = features @ [0.5, -1.0, 0.2, 2.0, 0.0] + 0.7 * source.normal(size=ROWS)
    weights = np.linalg.solve(features.T @ features + penalty * np.eye(5), features.T @ targets)
    return features, targets, weights, float(np.mean((targets - features @ weights) ** 2))


def spectrum_of(features) -> Spectrum:
    return Spectrum.of(np.linalg.eigvalsh(features.T @ features), [None])


def exact_evidence(features, targets, noise: float, precision: float) -> float:
    covariance = noise * np.eye(ROWS) + features @ features.T / precision
    return float(multivariate_normal(np.zeros(ROWS), covariance).logpdf(targets))


@pytest.mark.parametrize("penalty", [0.1, 1.0, 20.0])
def test_the_evidence_is_that_of_bayesian_linear_regression(penalty):
    """Exact where the weights are the mode: the noise is the best one, and the value is the closed form's."""
    features, targets, weights, variance = linear_problem(penalty)
    precision = penalty / variance
    eigenvalues = [spectrum_of(features / math.sqrt(variance))]
    parameters = [{"name": "w", "role": "head", "squared_norm": float(weights @ weights)}]
    at_one = float(norm(features @ weights, math.sqrt(variance)).logpdf(targets).sum())
    found, effective = evidence_at(PriorPrecision("scalar", {"all": precision}), eigenvalues, parameters, at_one, ROWS)
    square = 1.0 + precision * float(weights @ weights) / ROWS

    def exact(square: float) -> float:
        return exact_evidence(features, targets, square * variance, precision / square)

    assert found == pytest.approx(exact(square), abs=1e-8)
    assert exact(square) > max(exact(square * 1.01), exact(square / 1.01))
    assert 0 < effective < 5


def test_the_maximum_is_over_precision_and_noise_together():
    """MacKay's fixed point: with the mode at the chosen precision, no other precision and noise are better."""
    penalty = 1.0
    for _ in range(200):  # the ridge penalty whose evidence chooses itself
        features, targets, weights, variance = linear_problem(penalty)
        eigenvalues = [spectrum_of(features / math.sqrt(variance))]
        parameters = [{"name": "w", "role": "head", "squared_norm": float(weights @ weights)}]
        best = maximize_evidence(eigenvalues, parameters, 0.0, residuals=ROWS)
        penalty = best.prior.precisions["all"] * variance
    precision, square = best.prior.precisions["all"], best.noise_scale**2
    assert square == pytest.approx(1.0 / (1.0 - best.effective_parameters / ROWS), rel=1e-6)
    top = exact_evidence(features, targets, square * variance, precision / square)
    for noise, width in ((1.05, 1.0), (1 / 1.05, 1.0), (1.0, 1.2), (1.0, 1 / 1.2), (1.05, 1.2)):
        assert exact_evidence(features, targets, square * variance * noise, precision / square * width) < top


@pytest.mark.parametrize(
    ("values", "counts", "norm", "count"),
    [
        ([1e4], [405], 500.0, 400),  # a hundred steps of δ and s² by turns end 2.3 nats below the maximum
        ([1e5, 10.0, 0.1], [48, 400, 1000], 5.0, 50),
        ([1e4], [395], 5.0, 400),
        ([1.0], [3], 1e-9, 50),
    ],
)
def test_the_maximum_is_found_where_the_spectrum_is_flat(values, counts, norm, count):
    spectra = [Spectrum(np.array(values), np.array(counts, dtype=float))]
    parameters = [{"name": "w", "role": "head", "squared_norm": norm}]
    best = maximize_evidence(spectra, parameters, 0.0, residuals=count)

    def profile(position: float) -> float:
        prior = PriorPrecision("scalar", {"all": math.exp(position)})
        return -evidence_at(prior, spectra, parameters, 0.0, count)[0]

    grid = np.linspace(math.log(1e-6), math.log(1e8), 2000)
    start = grid[int(np.argmin([profile(each) for each in grid]))]
    found = minimize_scalar(profile, bounds=(start - 0.1, start + 0.1), method="bounded", options={"xatol": 1e-9})
    assert best.log_marginal_likelihood == pytest.approx(-found.fun, abs=1e-6)
    if not best.at_bound:
        assert math.log(best.prior.precisions["all"]) == pytest.approx(found.x, abs=1e-3)


def test_several_groups_share_one_noise():
    features, _, weights, variance = linear_problem(1.0)
    halves = [spectrum_of(part / math.sqrt(variance)) for part in (features[:, :2], features[:, 2:])]
    parameters = [
        {"name": name, "role": role, "squared_norm": float(part @ part)}
        for name, role, part in (("a", "A", weights[:2]), ("b", "B", weights[2:]))
    ]
    best = maximize_evidence(halves, parameters, 0.0, structure="kind", residuals=ROWS)
    own = sum(best.prior.precisions[each["role"]] * each["squared_norm"] for each in parameters)
    assert best.noise_scale**2 == pytest.approx(1 + own / ROWS, rel=1e-8)
    again, effective = evidence_at(best.prior, halves, parameters, 0.0, ROWS)
    assert (again, effective) == pytest.approx((best.log_marginal_likelihood, best.effective_parameters), rel=1e-8)
    with pytest.raises(UsageError, match="--optimizer exact"):
        maximize_evidence(halves, parameters, 0.0, optimizer="adam", residuals=ROWS)


def head_of(answers) -> BayesianLayer:
    head = answers.network.classifier
    return BayesianLayer("classifier", "head", head, head, reads_answer_only=True, bias_as_input=True)


def features_of(answers, encoded) -> torch.Tensor:
    """What the head reads, and a constant for its bias."""
    seen = []
    handle = answers.network.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    for batch in batches(answers, encoded, 1):
        answers.logits(batch)
    handle.remove()
    features = torch.stack(seen)
    return torch.cat([features, torch.ones(len(features), 1).double()], dim=1)


@pytest.mark.parametrize("structure", ["full", "kron", "ekfac"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_linear_head_predicts_as_bayesian_linear_regression(structure, outputs):
    answers = tiny_classifier(outputs)
    layer, encoded = head_of(answers), rows(12)
    features = features_of(answers, encoded)
    noise, scale, precision = (0.4, 1.7)[:outputs], 1.3, 0.9
    likelihood = Gaussian(("x", "y")[:outputs], noise)
    run = CurvatureRun(
        answers, [layer], lambda: batches(answers, encoded, 5), [(0.0,) * outputs] * 12, outputs, likelihood=likelihood
    )
    posterior, _ = fit_structure(structure, run)
    (batch,) = batches(answers, encoded, 12)
    with LinearisedPredictor(
        answers, [layer], posterior, torch.tensor([[precision]]).double(), classes=outputs, every_class=True
    ) as predictor:
        moments = predictor.moments(batch)
    averaging = Averaging(torch.tensor([scale]).double(), torch.ones(1, 1).double())
    mean, variance = mixture_moments(likelihood.predict("mc-joint", [moments], averaging))
    assert torch.allclose(mean, moments.mean)
    for output in range(outputs):
        own = scale**2 * noise[output]
        # KFAC's factors of the two outputs' gradients are exact for a head: each output has its own noise.
        posterior_precision = features.T @ features / own + precision / scale**2 * torch.eye(features.shape[1]).double()
        expected = own + torch.einsum("np,pq,nq->n", features, torch.linalg.inv(posterior_precision), features)
        assert torch.allclose(variance[:, output], expected, rtol=1e-6)


def test_regression_agrees_with_laplace_torch():
    from laplace import Laplace

    answers = tiny_classifier(1)
    layer, encoded = head_of(answers), rows(12)
    features = features_of(answers, encoded)
    targets = torch.randn(12, 1, generator=torch.Generator().manual_seed(1)).double()
    head = torch.nn.Linear(features.shape[1], 1, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.cat([layer.module.weight, layer.module.bias.unsqueeze(1)], dim=1))
    outputs = head(features).detach()
    likelihood = Gaussian(("x",)).with_noise(outputs, targets)
    assert likelihood.noise[0] == pytest.approx(float((targets - outputs).square().mean()))
    run = CurvatureRun(
        answers, [layer], lambda: batches(answers, encoded, 5), targets.tolist(), 1, likelihood=likelihood
    )
    posterior, data = fit_structure("full", run)
    precision = 0.8
    eigenvalues = posterior.spectra
    norm_squared = float(head.weight.detach().square().sum())
    parameters = [{"name": "classifier", "role": "head", "squared_norm": norm_squared}]
    prior = PriorPrecision("scalar", {"all": precision})
    evidence, _ = evidence_at(prior, eigenvalues, parameters, data.log_likelihood, 12)
    square = 1 + precision * norm_squared / 12
    theirs = Laplace(
        head,
        "regression",
        subset_of_weights="all",
        hessian_structure="full",
        sigma_noise=math.sqrt(square * likelihood.noise[0]),
        prior_precision=precision / square,
    )
    theirs.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features, targets), batch_size=5))
    assert float(theirs.log_marginal_likelihood()) == pytest.approx(evidence, rel=1e-6)
    mean, variance = theirs(features)[:2]
    (batch,) = batches(answers, encoded, 12)
    with LinearisedPredictor(
        answers, [layer], posterior, torch.tensor([[precision]]).double(), classes=1, every_class=True
    ) as predictor:
        moments = predictor.moments(batch)
    assert torch.allclose(moments.mean, mean.detach(), atol=1e-9)
    assert torch.allclose(square * moments.covariance, variance.detach().reshape(12, 1, 1), rtol=1e-6)


def test_noise_is_measured_for_each_output_and_must_be_there():
    outputs = torch.tensor([[0.0, 1.0], [0.0, 3.0]]).double()
    targets = torch.tensor([[1.0, 1.0], [3.0, 2.0]]).double()
    assert Gaussian(("a", "b")).with_noise(outputs, targets).noise == pytest.approx((5.0, 0.5))
    with pytest.raises(DataError, match="no residual of a"):
        Gaussian(("a", "b")).with_noise(outputs, outputs + torch.tensor([0.0, 1.0]))


def mixtures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    variance = 0.1 + torch.rand(4, 3, generator=generator, dtype=torch.float64)
    weight = torch.softmax(torch.randn(4, 3, generator=generator, dtype=torch.float64), dim=1)
    return torch.stack([mean, variance, weight], dim=2), torch.randn(4, generator=generator, dtype=torch.float64)


def test_mixtures_against_numerical_integration():
    mixture, values = mixtures()
    grid = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    step = float(grid[1] - grid[0])
    for one, value in zip(mixture, values, strict=True):
        density = mixture_log_density(one.expand(len(grid), -1, -1), grid).exp()
        cdf = mixture_cdf(one.expand(len(grid), -1, -1), grid)
        assert float(density.sum() * step) == pytest.approx(1.0, abs=1e-6)
        mean, variance = mixture_moments(one)
        assert float((grid * density).sum() * step) == pytest.approx(float(mean), abs=1e-6)
        assert float(((grid - mean) ** 2 * density).sum() * step) == pytest.approx(float(variance), abs=1e-6)
        crps = float(((cdf - (grid >= value).double()) ** 2).sum() * step)
        assert float(mixture_crps(one.unsqueeze(0), value.reshape(1))) == pytest.approx(crps, abs=1e-3)
        assert float(mixture_cdf(one, mixture_quantile(one, 0.3))) == pytest.approx(0.3, abs=1e-9)
    low, high = central_interval(mixture, 0.8)
    assert torch.allclose(mixture_cdf(mixture, high) - mixture_cdf(mixture, low), torch.full((4,), 0.8).double())


def test_one_component_is_a_normal_distribution():
    table = torch.tensor([[[[1.0, 4.0, 1.0]]]]).double()
    assert float(mixture_quantile(table, 0.975)) == pytest.approx(1.0 + 2.0 * norm.ppf(0.975))
    targets = torch.tensor([[2.0]]).double()
    z = 0.5
    crps = 2.0 * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / math.sqrt(math.pi))
    scores = Gaussian(("x",), (1.0,)).scores(table, targets)
    assert scores["crps"] == pytest.approx(crps)
    assert scores["rmse"] == pytest.approx(1.0) and scores["interval_coverage"] == 1.0
    assert scores["interval_width"] == pytest.approx(4.0 * norm.ppf(0.95))
    assert scores["nll"] == pytest.approx(-norm(1, 2).logpdf(2))


def test_calibrated_predictions_have_flat_levels_and_the_coverage_asked_for():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(20_000, 1, generator=generator).double()
    targets = mean + 0.5 * torch.randn(20_000, 1, generator=generator).double()
    likelihood = Gaussian(("x",), (0.25,))
    table = likelihood.at_map(mean)
    assert max(abs(share - 0.05) for share in pit_histogram(likelihood.levels(table, targets))) < 0.006
    assert likelihood.scores(table, targets)["interval_coverage"] == pytest.approx(0.9, abs=0.01)
    assert likelihood.bias(likelihood.scaled(table, 0.5), targets)[0] == "overconfident"
    assert likelihood.bias(likelihood.scaled(table, 2.0), targets)[0] == "underconfident"
    tuned, scale = likelihood.tuned(likelihood.scaled(table, 0.5), targets)
    assert scale == pytest.approx(2.0, rel=0.02) and torch.allclose(tuned[..., 1], table[..., 1], rtol=0.04)


def test_the_constant_is_mean_and_variance_of_the_targets():
    targets = torch.tensor([[1.0], [2.0], [6.0]]).double()
    table = Gaussian(("x",), (1.0,)).constant(targets)
    assert table.shape == (3, 1, 1, 3) and table[0, 0, 0].tolist() == pytest.approx([3.0, 14 / 3, 1.0])


def test_deviations_of_the_record_are_the_averages():
    likelihood = Gaussian(("x",), (0.5,))
    found = [LogitMoments(torch.zeros(1, 1).double(), value * torch.ones(1, 1, 1).double()) for value in (1.0, 0.0)]
    averaging = Averaging(torch.tensor([1.0, 2.0]).double(), torch.tensor([[0.2, 0.1], [0.3, 0.4]]).double())
    from lapora.config import PredictSettings

    (record,) = likelihood.records(found, averaging, PredictSettings(interval=0.5, logits=True))
    epistemic = 0.2 * 1 + 0.1 * 4 * 1
    total = epistemic + 0.5 * (0.5 * 1 + 0.5 * 4)
    assert record["epistemic_deviation"] == pytest.approx(math.sqrt(epistemic))
    assert record["deviation"] == pytest.approx(math.sqrt(total))
    assert record["logits"]["covariance"] == [[pytest.approx(epistemic)]] and record["logits"]["averaged"]
    ends = [record["interval"][key] for key in ("low", "high")]
    table = likelihood.predict("mc-joint", found, averaging)
    levels = [float(mixture_cdf(table, torch.full((1, 1), end).double())) for end in ends]
    assert levels == pytest.approx([0.25, 0.75])
