from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from lapora.curvature.per_example import PerExampleObserver
from lapora.likelihoods.base import LogitMoments
from lapora.likelihoods.categorical import difference_covariance, log_probabilities
from lapora.likelihoods.quadrature import log_expected_sigmoid
from lapora.models.lora_layers import find_bayesian_layers
from tiny_models import batches, close, dense_jacobian, moments, posterior, rows, tiny_causal


def test_covariance_equals_dense_j_sigma_jt(answers, layers):
    encoded = rows()
    factors, blocks = posterior(answers, layers, encoded)
    logits, jacobian = dense_jacobian(answers, layers, encoded)
    precision = torch.block_diag(
        *[torch.kron(f.gradient_sum, f.input_sum) * f.scale for f in (factors[layer.name] for layer in layers)]
    )
    precision += 0.7 * torch.eye(len(precision), dtype=torch.float64)
    expected = torch.einsum("ncp,pq,ndq->ncd", jacobian, torch.linalg.inv(precision), jacobian)
    mean, covariance = moments(answers, layers, blocks, encoded, classes=logits.shape[1])
    close(mean, logits, answers)
    close(covariance, expected, answers)
    _, differences = moments(answers, layers, blocks, encoded, classes=logits.shape[1], every_class=False)
    close(differences, difference_covariance(expected), answers)


def test_layers_of_one_input_may_have_bases_of_their_own(answers, layers):
    """As the engines give them; rotated by another layer's basis, the variance would be off by a third."""
    encoded = rows()
    _, blocks = posterior(answers, layers, encoded)
    assert any(block.input_owner != block.name for block in blocks)
    own = [replace(block, input_owner=block.name, input_basis=block.input_basis.flip(1)) for block in blocks]
    own = [replace(block, eigenvalues=block.eigenvalues.flip(1)) for block in own]
    classes = answers.logits(next(batches(answers, encoded, 1))).shape[1]
    shared = moments(answers, layers, blocks, encoded, classes=classes, size=1)
    close(moments(answers, layers, own, encoded, classes=classes, size=1), shared, answers)


def test_gradients_of_one_block_at_a_time_are_held(answers, layers, monkeypatch):
    """No Jacobian of batch x directions x parameters: at most one transformer block's share is ever there."""
    encoded = rows()
    _, blocks = posterior(answers, layers, encoded)
    classes = answers.logits(next(batches(answers, encoded, 1))).shape[1]
    held = []
    finish = PerExampleObserver.finish

    def watch(self, layer):
        held.append(sum(gradient.inside.numel() for kept in self._gradients.values() for gradient in kept))
        finish(self, layer)

    monkeypatch.setattr(PerExampleObserver, "finish", watch)
    moments(answers, layers, blocks, encoded, classes=classes, size=len(encoded))
    parameters = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    assert max(held) == len(encoded) * classes * parameters // 2  # the tiny models have two equal blocks


def test_padding_batch_size_and_order_change_nothing(answers, layers):
    encoded = rows()
    _, blocks = posterior(answers, layers, encoded)
    classes = answers.logits(next(batches(answers, encoded, 1))).shape[1]
    reference = moments(answers, layers, blocks, encoded, classes=classes, size=1)
    # A classifier pools its first token, so its padding stands on the right.
    sides = ("left", "right") if answers.kind == "causal" else ("right",)
    for size, side in itertools.product((2, 6), sides):
        other = moments(answers, layers, blocks, encoded, classes=classes, size=size, side=side, pad_to=12)
        close(other, reference, answers)
    backwards = moments(answers, layers, blocks, encoded[::-1], classes=classes, size=4)
    close((backwards[0].flip(0), backwards[1].flip(0)), reference, answers)


def test_lora_on_the_output_layer_counts_one_token_and_the_answer_rows():
    answers = tiny_causal(3, targets=("q_proj", "lm_head"))
    layers = find_bayesian_layers(answers.model)
    encoded = rows()
    factors, blocks = posterior(answers, layers, encoded)
    head = [layer for layer in layers if "lm_head" in layer.name]
    assert [layer.reads_answer_only for layer in head] == [True, True]
    assert [factors[layer.name].count for layer in head] == [len(encoded)] * 2
    assert factors[head[1].name].gradient_sum.shape == (3, 3)
    _, jacobian = dense_jacobian(answers, layers, encoded)
    ids = answers.answer_token_ids
    parts, start = [], 0
    for layer in layers:
        rows_, columns = layer.shape
        block = jacobian[:, :, start : start + rows_ * columns]
        start += rows_ * columns
        f = factors[layer.name]
        if layer.answer_rows_only:
            block = block.unflatten(2, (rows_, columns))[:, :, ids].flatten(2)
        precision = torch.kron(f.gradient_sum, f.input_sum) * f.scale
        precision = precision + 0.7 * torch.eye(len(precision), dtype=torch.float64)
        parts.append(torch.einsum("ncp,pq,ndq->ncd", block, torch.linalg.inv(precision), block))
    _, covariance = moments(answers, layers, blocks, encoded, classes=3)
    close(covariance, sum(parts), answers)


def reference_sigmoid(mean: float, deviation: float) -> float:
    """A million-point midpoint rule over forty deviations."""
    z = torch.linspace(-20, 20, 1_000_001, dtype=torch.float64)
    weights = torch.exp(-0.5 * z.square()) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
    return float((torch.sigmoid(mean + deviation * z) * weights).sum())


@pytest.mark.parametrize("mean", [0.0, 0.5, -7.0, 30.0, 100.0])
@pytest.mark.parametrize("deviation", [1e-3, 1.0, 4.99, 5.01, 20.0, 60.0, 1000.0])
def test_two_class_integral_is_right_everywhere(mean, deviation):
    low, high = log_expected_sigmoid(torch.tensor([mean]).double(), torch.tensor([deviation]).double())
    assert abs(float(high.exp()) - reference_sigmoid(mean, deviation)) < 1e-6
    assert abs(float(low.exp() + high.exp()) - 1) < 1e-12


def test_saturated_log_probabilities_are_finite():
    low, _ = log_expected_sigmoid(torch.tensor([900.0]).double(), torch.tensor([1.0]).double())
    assert float(low) == pytest.approx(-900 + 0.5, abs=1e-3)


def random_moments(classes: int, rows_: int = 5) -> LogitMoments:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(rows_, classes, classes, generator=generator).double()
    mean = 2 * torch.randn(rows_, classes, generator=generator).double()
    return LogitMoments(mean, root @ root.transpose(1, 2))


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("link", ["mc-joint", "mc-indep"])
def test_sampling_links_equal_plain_monte_carlo(classes, link):
    m = random_moments(classes)
    covariance = m.covariance if link == "mc-joint" else torch.diag_embed(m.covariance.diagonal(dim1=1, dim2=2))
    root = torch.linalg.cholesky(covariance)
    z = torch.randn(400_000, classes, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = torch.stack(
        [torch.softmax(mean + z @ factor.T, dim=1).mean(0) for mean, factor in zip(m.mean, root, strict=True)]
    )
    ours = log_probabilities(link, m).exp()
    torch.testing.assert_close(ours, expected, atol=2.5e-3, rtol=0)
    torch.testing.assert_close(ours.sum(1), torch.ones(len(ours), dtype=torch.float64))


def test_probit_and_bridge_equal_their_formulas():
    m = random_moments(3)
    variance = m.covariance.diagonal(dim1=1, dim2=2)
    probit = torch.softmax(m.mean / torch.sqrt(1 + math.pi / 8 * variance), dim=1)
    torch.testing.assert_close(log_probabilities("probit", m).exp(), probit)
    exponentials = m.mean.exp() * (-m.mean).exp().sum(1, keepdim=True)
    alpha = (1 - 2 / 3 + exponentials / 9) / variance
    torch.testing.assert_close(log_probabilities("bridge", m).exp(), alpha / alpha.sum(1, keepdim=True))


def test_differences_are_enough_for_mc_joint():
    m = random_moments(4)
    short = LogitMoments(m.mean, difference_covariance(m.covariance))
    torch.testing.assert_close(log_probabilities("mc-joint", short), log_probabilities("mc-joint", m))
