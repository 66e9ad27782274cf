from __future__ import annotations

import pytest
import torch

from lapora.curvature.backward import Linearisation
from lapora.curvature.kfac import KronObserver
from lapora.curvature.passes import collect
from lapora.errors import NumericalError
from lapora.likelihoods.categorical import exact_columns, monte_carlo_columns
from lapora.posterior.eigen import decompose
from tiny_models import batches, close, dense_jacobian, rows


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 30.0, 400.0])
def test_exact_columns_are_a_factor_of_the_softmax_hessian(classes, scale):
    logits = torch.randn(7, classes, generator=torch.Generator().manual_seed(0)).double() * scale
    columns = exact_columns(logits)
    p = torch.softmax(logits, dim=1)
    hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    assert columns.shape[0] == classes - 1
    torch.testing.assert_close(torch.einsum("kbc,kbd->bcd", columns, columns), hessian, atol=1e-12, rtol=1e-9)


def test_monte_carlo_columns_average_to_the_hessian():
    logits = torch.tensor([[0.3, -1.0, 0.8]]).double().expand(20000, 3)
    columns = monte_carlo_columns(logits, torch.rand(len(logits), generator=torch.Generator().manual_seed(0)))[0]
    p = torch.softmax(logits[:1], dim=1)[0]
    torch.testing.assert_close(
        columns.T @ columns / len(columns), torch.diag(p) - torch.outer(p, p), atol=0.01, rtol=0.05
    )


class Recorder:
    """Keeps every input and gradient, for the definitions to be written out with loops."""

    def __init__(self):
        self.inputs, self.gradients = {}, {}

    def begin(self, batch):
        pass

    def observe_input(self, layer, input_owner, inputs, mask):
        self.inputs.setdefault(layer.name, []).append(inputs[0].clone())
        return

    def observe_gradient(self, layer, kept, gradient):
        self.gradients.setdefault(layer.name, []).append(gradient[0].clone())

    def finish(self, layer):
        pass

    def end(self, rows, directions):
        pass


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kron_equals_its_definition_written_out(answers, layers, sharing):
    encoded = rows()
    observer = KronObserver(sharing)
    collect(answers, layers, observer, batches(answers, encoded, 4, pad_to=11), targets=[None] * len(encoded))
    recorder = Recorder()
    with Linearisation(answers, layers, recorder) as linearisation:
        for batch in batches(answers, encoded, 1):
            linearisation.run(batch, exact_columns)
    factors = observer.factors(layers)
    for layer in layers:
        inputs, gradients = recorder.inputs[layer.name], recorder.gradients[layer.name]
        if sharing == "expand":
            count = sum(len(a) for a in inputs)
            a_sum = sum(torch.outer(a, a) for row in inputs for a in row)
            g_sum = sum(torch.outer(g, g) for row in gradients for g in row)
        else:
            count = len(inputs)
            a_sum = sum(torch.outer(row.mean(0), row.mean(0)) for row in inputs)
            g_sum = sum(torch.outer(row.sum(0), row.sum(0)) for row in gradients)
        expected = torch.kron(g_sum, a_sum) / count
        ours = factors[layer.name]
        close(torch.kron(ours.gradient_sum, ours.input_sum) * ours.scale, expected, answers)


def test_gradients_are_those_of_plain_autograd(answers, layers):
    """Σ_ns vec(G) vec(G)ᵀ over all weights equals the dense generalised Gauss-Newton matrix."""
    encoded = rows()
    logits, jacobian = dense_jacobian(answers, layers, encoded)
    p = torch.softmax(logits, dim=1)
    hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    expected = torch.einsum("ncp,ncd,ndq->pq", jacobian, hessian, jacobian)

    stacked = []

    class Stack(Recorder):
        def observe_input(self, layer, input_owner, inputs, mask):
            return inputs

        def observe_gradient(self, layer, kept, gradient):
            g = torch.einsum("bto,bti->boi", gradient, kept).flatten(1)
            self.gradients.setdefault(layer.name, []).append(g)

    with Linearisation(answers, layers, Stack()) as linearisation:
        for batch in batches(answers, encoded, 4, pad_to=10):
            recorder = linearisation.observer = Stack()
            linearisation.run(batch, exact_columns)
            columns = len(recorder.gradients[layers[0].name])
            for k in range(columns):
                stacked.append(torch.cat([recorder.gradients[layer.name][k] for layer in layers], dim=1))
    j = torch.cat(stacked)
    close(j.T @ j, expected, answers)


def test_one_forward_and_c_minus_one_backward_passes(answers, layers):
    encoded = rows()
    with Linearisation(answers, layers, KronObserver("expand")) as linearisation:
        for batch in batches(answers, encoded, 3):
            classes = linearisation.run(batch, exact_columns).shape[1]
    assert linearisation.forward_calls == 2
    assert linearisation.backward_calls == 2 * (classes - 1)


def test_query_and_value_share_one_input(layers, answers):
    observer = KronObserver("expand")
    collect(answers, layers, observer, batches(answers, rows(), 3), targets=[None] * 6)
    factors = observer.factors(layers)
    first, second = [layer.name for layer in layers if layer.role == "A"][:2]
    assert factors[second].input_owner == first
    assert factors[second].input_sum is factors[first].input_sum


def test_a_nan_in_the_sums_names_the_layer(answers, layers):
    observer = KronObserver("expand")
    collect(answers, layers, observer, batches(answers, rows(), 3), targets=[None] * 6)
    observer._gradient_sums[layers[1].name][0, 0] = float("nan")
    with pytest.raises(NumericalError, match="lora_B"):
        decompose(layers, observer.factors(layers))
