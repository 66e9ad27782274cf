"""Every likelihood against dense, slow computations: Hessian, score, GGN, and the covariance of the outputs."""

from __future__ import annotations

import math

import pytest
import torch

from lapora.config import LINKS, WITH_ANSWERS, PredictSettings, check_likelihood
from lapora.curvature.passes import CurvatureRun, collect
from lapora.errors import UsageError
from lapora.likelihoods import likelihood_of
from lapora.likelihoods.base import Averaging, Likelihood, LogitMoments
from lapora.models.lora_layers import find_bayesian_layers
from lapora.posterior.structures import fit_structure
from lapora.predictive.moments import LinearisedPredictor
from tiny_models import Row, batches, dense_jacobian, rows, tiny_classifier

NAMES = {
    "categorical": ("a", "b", "c"),
    "bernoulli": ("no", "yes"),
    "multilabel": ("a", "b", "c"),
    "gaussian": ("x", "y"),
    "preference": ("first", "second"),
}
LIKELIHOODS = list(NAMES)


def make(name: str) -> Likelihood:
    return likelihood_of(name, NAMES[name], noise=(0.3, 2.5) if name == "gaussian" else None)


def labels_of(likelihood: Likelihood, count: int, seed: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if likelihood.name == "gaussian":
        return torch.randn(count, likelihood.outputs, generator=generator, dtype=torch.float64)
    if likelihood.name == "multilabel":
        return torch.randint(2, (count, likelihood.outputs), generator=generator).double()
    return torch.randint(len(likelihood.choices), (count,), generator=generator)


def outputs_of(likelihood: Likelihood, count: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return scale * torch.randn(count, likelihood.outputs, generator=generator, dtype=torch.float64)


def log_density(likelihood: Likelihood, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``log p(y|f)`` of one row, written out."""
    if likelihood.name == "categorical":
        return torch.log_softmax(f, dim=0)[y]
    if likelihood.name == "bernoulli":
        return torch.nn.functional.logsigmoid(f[0] if y == 1 else -f[0])
    if likelihood.name == "preference":
        return torch.nn.functional.logsigmoid(f[0] if y == 0 else -f[0])
    if likelihood.name == "multilabel":
        return -torch.nn.functional.binary_cross_entropy_with_logits(f, y, reduction="sum")
    return torch.distributions.Normal(f, torch.tensor([0.3, 2.5]).double().sqrt()).log_prob(y).sum()


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_exact_columns_are_a_root_of_the_hessian(name, scale):
    likelihood = make(name)
    outputs, labels = outputs_of(likelihood, 5, scale), labels_of(likelihood, 5)
    columns = likelihood.exact_columns(outputs)
    assert len(columns) == likelihood.columns
    found = torch.einsum("kbc,kbd->bcd", columns, columns)
    for f, y, own in zip(outputs, labels, found, strict=True):
        hessian = torch.autograd.functional.hessian(lambda v, y=y: -log_density(likelihood, v, y), f)
        assert torch.allclose(own, hessian, atol=1e-9)
    weights = likelihood.column_weights(outputs)
    again = torch.einsum("bsk,kbc->sbc", weights, likelihood.directions(outputs))
    assert torch.allclose(again, columns, atol=1e-12)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_empirical_columns_are_the_score_and_the_log_likelihood_its_integral(name):
    likelihood = make(name)
    outputs, labels = outputs_of(likelihood, 5), labels_of(likelihood, 5)
    (scores,) = likelihood.empirical_columns(outputs, labels)
    found = likelihood.log_likelihood(outputs, labels)
    nll = likelihood.row_nll(likelihood.at_map(outputs), labels)
    for f, y, score, value, loss in zip(outputs, labels, scores, found, nll, strict=True):
        v = f.clone().requires_grad_()
        expected = log_density(likelihood, v, y)
        expected.backward()
        assert torch.allclose(score, v.grad, atol=1e-12)
        assert float(value) == pytest.approx(expected.item()) and float(loss) == pytest.approx(-expected.item())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_columns_average_to_the_exact_ones(name):
    likelihood = make(name)
    count = 40_000
    outputs = outputs_of(likelihood, 1, 0.7).expand(count, -1)
    uniform = likelihood.random_numbers(count, torch.Generator().manual_seed(0))
    (drawn,) = likelihood.sampled_columns(outputs, uniform)
    (exact,) = torch.einsum("kbc,kbd->bcd", *[likelihood.exact_columns(outputs[:1])] * 2)
    found = drawn.T @ drawn / count
    assert torch.allclose(found, exact, atol=0.03 * float(exact.abs().max()))
    assert drawn.mean(dim=0).abs().max() < 0.03 * float(exact.abs().max()) ** 0.5


def model_and_rows(name: str):
    answers = tiny_classifier(make(name).outputs)
    encoded = rows(6)
    if name == "preference":
        encoded = [
            Row(row.input_ids, second=Row(other.input_ids)) for row, other in zip(encoded, rows(6, 8), strict=True)
        ]
    return answers, find_bayesian_layers(answers.model), encoded


def run_of(name: str, size: int = 4, **options) -> tuple[CurvatureRun, torch.Tensor, torch.Tensor]:
    likelihood = make(name)
    answers, layers, encoded = model_and_rows(name)
    labels = labels_of(likelihood, 6)
    run = CurvatureRun(
        answers,
        layers,
        lambda: batches(answers, encoded, size, pad_to=11),
        labels.tolist(),
        likelihood.outputs,
        likelihood=likelihood,
        **options,
    )
    return run, *dense_jacobian(answers, layers, encoded)


def dense_ggn(likelihood: Likelihood, outputs: torch.Tensor, jacobian: torch.Tensor) -> torch.Tensor:
    columns = likelihood.exact_columns(outputs)
    hessian = torch.einsum("kbc,kbd->bcd", columns, columns)
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, hessian, jacobian)


def covariance_under(run: CurvatureRun, posterior, precision: float) -> torch.Tensor:
    (batch,) = batches(run.output_model, model_and_rows(run.likelihood.name)[2], 6)
    precisions = torch.full((1, len(run.layers)), precision, dtype=torch.float64)
    every = not run.likelihood.uses_differences
    with LinearisedPredictor(
        run.output_model, run.layers, posterior, precisions, classes=run.classes, every_class=every
    ) as predictor:
        return predictor.moments(batch).covariance


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_full_structure_predicts_with_the_dense_ggn(name):
    run, outputs, jacobian = run_of(name)
    posterior, data = fit_structure("full", run)
    assert torch.allclose(data.logits, outputs, atol=1e-9)
    labels = run.likelihood.targets(run.targets)
    assert data.log_likelihood == pytest.approx(
        sum(float(log_density(run.likelihood, f, y)) for f, y in zip(outputs, labels, strict=True))
    )
    ggn = dense_ggn(run.likelihood, outputs, jacobian)
    inverse = torch.linalg.inv(ggn + 0.7 * torch.eye(len(ggn)).double())
    expected = torch.einsum("ncp,pq,ndq->ncd", jacobian, inverse, jacobian)
    if run.likelihood.uses_differences:
        expected = expected[:, 1:, 1:] - expected[:, 1:, :1] - expected[:, :1, 1:] + expected[:, :1, :1]
    assert torch.allclose(covariance_under(run, posterior, 0.7), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_diag_is_the_diagonal_of_the_dense_ggn(name):
    run, outputs, jacobian = run_of(name)
    posterior, _ = fit_structure("diag", run)
    found = torch.cat([block.eigenvalues.flatten() for block in posterior.blocks])
    assert torch.allclose(found, dense_ggn(run.likelihood, outputs, jacobian).diagonal(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_no_structure_depends_on_the_batches(name, structure):
    found = [fit_structure(structure, run_of(name, size)[0])[0] for size in (1, 4)]
    precisions = [covariance_under(run_of(name)[0], each, 0.7) for each in found]
    assert torch.allclose(*precisions, rtol=1e-6, atol=1e-9)


def test_a_pair_in_kron_is_one_row_with_the_tokens_of_both_texts():
    """Expand, written out: every token of both texts, the gradient of the difference of rewards."""
    from lapora.curvature.backward import Linearisation
    from lapora.curvature.kfac import KronObserver

    run, *_ = run_of("preference")
    observer = KronObserver("expand")
    collect(run.output_model, run.layers, observer, run.batches(), targets=run.targets, likelihood=run.likelihood)
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {layer.name: [] for layer in run.layers}

    class Recorder(KronObserver):
        def observe_input(self, layer, input_owner, inputs, mask):
            self.last = inputs[0] if mask is None else inputs[0][mask[0]]
            self.mask = mask
            return self.last, mask

        def observe_gradient(self, layer, saved, gradient):
            inputs, mask = saved
            seen[layer.name].append((inputs, gradient[0] if mask is None else gradient[0][mask[0]]))

        def finish(self, layer):
            pass

        def end(self, rows, directions):
            pass

    _, _, encoded = model_and_rows("preference")
    lengths = [len(row.input_ids) + len(row.second.input_ids) for row in encoded]
    with Linearisation(run.output_model, run.layers, Recorder("expand")) as linearisation:
        for batch in batches(run.output_model, encoded, 1):
            linearisation.run(batch, run.likelihood.exact_columns)
        assert linearisation.forward_calls == linearisation.backward_calls == 6
    factors = observer.factors(run.layers)
    for layer in run.layers:
        pairs = seen[layer.name]
        assert [len(inputs) for inputs, _ in pairs] == lengths
        inputs = sum(each.T @ each for each, _ in pairs)
        gradients = sum(each.T @ each for _, each in pairs)
        own = factors[layer.name]
        expected = torch.kron(gradients, inputs) / sum(lengths)
        assert torch.allclose(torch.kron(own.gradient_sum, own.input_sum) * own.scale, expected, rtol=1e-7, atol=1e-12)


def moments(likelihood: Likelihood, count: int = 6, seed: int = 0, width: float = 1.0) -> LogitMoments:
    generator = torch.Generator().manual_seed(seed)
    size = likelihood.outputs
    root = width * torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    return LogitMoments(outputs_of(likelihood, count), root @ root.transpose(1, 2))


def components(likelihood: Likelihood) -> tuple[list[LogitMoments], Averaging]:
    found = [moments(likelihood, seed=index, width=width) for index, width in enumerate((2.0, 0.7))]
    found.append(LogitMoments(found[0].mean, torch.zeros_like(found[0].covariance)))  # MAP
    weights = torch.tensor([[0.1, 0.25], [0.2, 0.0], [0.15, 0.3]], dtype=torch.float64)
    return found, Averaging(torch.tensor([0.6, 1.7], dtype=torch.float64), weights)


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("link", ["mc-joint", "probit"])
def test_an_average_predicts_the_labels_as_the_sum_of_its_components(name, link):
    likelihood = make(name)
    if link not in LINKS[name]:
        with pytest.raises(UsageError, match=f"--link {link} does not go with likelihood {name}"):
            check_likelihood(name, PredictSettings(link=link))
        return
    found, averaging = components(likelihood)
    labels = labels_of(likelihood, 6)
    table = likelihood.predict(link, found, averaging, samples=2**13)
    assert table.shape[1:] == likelihood.row_shape(len(averaging.components))
    grid = likelihood.grid(link, found, averaging.temperatures, labels, samples=2**13)
    if name in ("categorical", "bernoulli", "preference", "gaussian"):
        expected = (averaging.weights.unsqueeze(2) * grid.exp()).sum(dim=(0, 1))
        if name == "gaussian":  # the average of each output by itself
            one = likelihood_of("gaussian", ("x",), noise=(0.3,))
            narrow = [LogitMoments(each.mean[:, :1], each.covariance[:, :1, :1]) for each in found]
            own = one.predict(link, narrow, averaging)
            expected = (
                averaging.weights.unsqueeze(2) * one.grid(link, narrow, averaging.temperatures, labels[:, :1]).exp()
            ).sum(dim=(0, 1))
            assert torch.allclose(own, table[:, :1])
            assert torch.allclose(one.row_nll(own, labels[:, :1]), -expected.log(), atol=1e-9)
            return
        tolerance = 1e-8 if name != "categorical" or link == "probit" else 5e-3
        assert torch.allclose(likelihood.row_nll(table, labels), -expected.log(), atol=tolerance)
    else:
        for label in range(likelihood.outputs):
            single = likelihood_of("bernoulli", ("no", "yes"))
            narrow = [
                LogitMoments(each.mean[:, label : label + 1], each.covariance[:, label : label + 1, label : label + 1])
                for each in found
            ]
            assert torch.allclose(table[:, label], single.predict(link, narrow, averaging), atol=1e-12)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_without_variance_a_prediction_is_the_plain_adapters(name):
    likelihood = make(name)
    certain = LogitMoments(outputs_of(likelihood, 6), torch.zeros(6, *[likelihood.outputs] * 2, dtype=torch.float64))
    for link in LINKS[name]:
        if link == "mc-joint" or name != "categorical":
            table = likelihood.predict(link, [certain], Averaging.single())
            assert torch.allclose(table, likelihood.at_map(certain.mean), atol=1e-9)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_scores_do_not_depend_on_the_order_of_rows_and_weights_count_them(name):
    likelihood = make(name)
    labels, table = labels_of(likelihood, 30), likelihood.at_map(outputs_of(likelihood, 30))
    scores = likelihood.scores(table, labels)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert likelihood.scores(table[order], labels[order]) == pytest.approx(scores, nan_ok=True)
    twice = likelihood.scorer(torch.cat([table, table[:10]]), torch.cat([labels, labels[:10]]))
    weights = torch.ones(1, 30, dtype=torch.float64)
    weights[0, :10] = 2.0
    weighted = {key: float(value) for key, value in likelihood.scorer(table, labels)(weights).items()}
    counted = {key: float(value) for key, value in twice(torch.ones(1, 40, dtype=torch.float64)).items()}
    assert weighted == pytest.approx(counted, nan_ok=True)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_temperature_is_the_one_of_least_nll(name):
    likelihood = make(name)
    outputs = outputs_of(likelihood, 30)
    labels, table = labels_of(likelihood, 30), likelihood.at_map(outputs)
    if name in WITH_ANSWERS:  # mostly right, so that the temperature is not at its bound
        labels[:20] = table[:20].argmax(dim=1)
    elif name == "multilabel":
        labels[:20] = (outputs[:20] > 0).double()

    def nll(temperature: float) -> float:
        return float(likelihood.row_nll(likelihood.scaled(table, temperature), labels).mean())

    best = likelihood.fit_temperature(table, labels)
    assert nll(best) <= min(nll(best * factor) for factor in (0.9, 0.99, 1.01, 1.1)) + 1e-12
    assert math.isclose(nll(1.0), float(likelihood.row_nll(table, labels).mean()), rel_tol=1e-9)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_mixture_of_equal_predictions_is_that_prediction(name):
    likelihood = make(name)
    labels, table = labels_of(likelihood, 9), likelihood.at_map(outputs_of(likelihood, 9))
    mixed = likelihood.mixture(torch.stack([table, table, table]))
    assert torch.allclose(likelihood.row_nll(mixed, labels), likelihood.row_nll(table, labels))
    assert likelihood.scores(mixed, labels) == pytest.approx(likelihood.scores(table, labels), nan_ok=True)


def test_the_uncertainty_of_several_labels_is_that_of_each():
    likelihood, single = make("multilabel"), likelihood_of("bernoulli", ("no", "yes"))
    found, averaging = components(likelihood)
    table, information = likelihood.predict("mc-joint", found, averaging), likelihood.information(found, averaging)
    measures = likelihood.uncertainty(table)
    entropy, confidence, expected = (torch.zeros(6, dtype=torch.float64) for _ in range(3))
    for label in range(likelihood.outputs):
        own = slice(label, label + 1)
        narrow = [LogitMoments(each.mean[:, own], each.covariance[:, own, own]) for each in found]
        one = single.uncertainty(single.predict("mc-joint", narrow, averaging))
        entropy, confidence = entropy + one["entropy"], confidence + (1.0 - one["max_probability"]) / 3
        expected = expected + single.information(narrow, averaging)
    assert torch.allclose(measures["entropy"], entropy) and torch.allclose(
        1.0 - measures["max_probability"], confidence
    )
    assert torch.allclose(information, expected) and bool((information > 0).all())


def test_the_uncertainty_of_a_regression_in_closed_form():
    likelihood = make("gaussian")
    found = moments(likelihood)
    noise, epistemic = likelihood.variance, found.covariance.diagonal(dim1=1, dim2=2)
    table = likelihood.predict("mc-joint", [found], Averaging.single())
    normal = torch.distributions.Normal(torch.zeros(6, 2).double(), (epistemic + noise).sqrt())
    measures = likelihood.uncertainty(table)
    assert torch.allclose(measures["entropy"], normal.entropy().sum(dim=1))
    assert torch.allclose(measures["deviation"], normal.scale.prod(dim=1).sqrt())
    information = likelihood.information([found], Averaging.single())
    assert torch.allclose(information, 0.5 * torch.log1p(epistemic / noise).sum(dim=1))
    assert likelihood.noise_entropy == pytest.approx(
        float(torch.distributions.Normal(0.0, noise.sqrt()).entropy().sum())
    )
    certain = likelihood.information([LogitMoments(found.mean, torch.zeros_like(found.covariance))], Averaging.single())
    assert torch.allclose(certain, torch.zeros(6, dtype=torch.float64), atol=1e-12)
