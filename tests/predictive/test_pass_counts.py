"""What guards the cost without a clock: passes counted, tensors measured."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lapora.curvature import passes as passes_module
from lapora.curvature.backward import Linearisation
from lapora.curvature.passes import CurvatureRun
from lapora.models.lora_layers import find_bayesian_layers
from lapora.posterior.gaussian import BlockPosterior
from lapora.posterior.structures import fit_structure
from lapora.predictive import moments
from lapora.predictive.moments import LinearisedPredictor
from tiny_models import Row, batches, posterior, rows, tiny_causal, tiny_classifier


class TensorSizes(TorchDispatchMode):
    """Elements of the largest tensor that any operation made, and the number of them over a limit."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.sizes += [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result


class CountingLinearisation(Linearisation):
    made: list[CountingLinearisation] = []  # noqa: RUF012

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.made.append(self)


@pytest.fixture
def counted(monkeypatch):
    CountingLinearisation.made = []
    monkeypatch.setattr(passes_module, "Linearisation", CountingLinearisation)
    monkeypatch.setattr(moments, "Linearisation", CountingLinearisation)

    def passes():
        made = CountingLinearisation.made
        return sum(each.forward_calls for each in made), sum(each.backward_calls for each in made)

    return passes


@pytest.mark.parametrize(("structure", "passes"), [("kron", 1), ("diag", 1), ("lowrank", 1), ("full", 1), ("ekfac", 2)])
@pytest.mark.parametrize("classes", [2, 4])
def test_fit_costs_one_forward_and_c_minus_one_backward_passes_a_batch(counted, structure, passes, classes):
    answers = tiny_classifier(classes)
    layers = find_bayesian_layers(answers.model)
    encoded = rows(6)
    run = CurvatureRun(answers, layers, lambda: batches(answers, encoded, 3), [0] * 6, classes)
    fit_structure(structure, run)
    assert counted() == (2 * passes, 2 * passes * (classes - 1))


@pytest.mark.parametrize(
    ("every_class", "map_only", "backward"), [(False, False, 3), (True, False, 4), (False, True, 0)]
)
def test_prediction_under_twenty_priors_costs_as_many_passes_as_under_one(counted, every_class, map_only, backward):
    answers = tiny_classifier(4)
    layers = find_bayesian_layers(answers.model)
    encoded = rows(6)
    _, blocks = posterior(answers, layers, encoded)
    before = counted()
    precisions = torch.logspace(-2, 3, 20, dtype=torch.float64).unsqueeze(1).expand(20, len(layers))
    with LinearisedPredictor(
        answers, layers, BlockPosterior(blocks), precisions, classes=4, every_class=every_class, map_only=map_only
    ) as linearised:
        for batch in batches(answers, encoded, 3):
            linearised.moments_under_each_prior(batch)
    after = counted()
    assert (after[0] - before[0], after[1] - before[1]) == (2, 2 * backward)


@pytest.mark.parametrize("make", [tiny_classifier, tiny_causal])
def test_no_tensor_grows_with_classes_times_parameters_times_rows(make):
    """Of one batch's gradients, one layer's of one direction is the largest thing there is."""
    generator = torch.Generator().manual_seed(0)
    encoded = [Row(torch.randint(1, 30, (4,), generator=generator).tolist()) for _ in range(64)]
    largest = {}
    for classes in (2, 6):
        answers = make(classes)
        layers = find_bayesian_layers(answers.model)
        _, blocks = posterior(answers, layers, encoded[:4])
        precisions = torch.ones(1, len(layers), dtype=torch.float64)
        with (
            LinearisedPredictor(
                answers, layers, BlockPosterior(blocks), precisions, classes=classes, every_class=True
            ) as linearised,
            TensorSizes() as sizes,
        ):
            linearised.moments(next(batches(answers, encoded, 64)))
        largest[classes] = max(sizes.sizes)
        parameters = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        assert largest[classes] < 64 * parameters
    with TensorSizes() as sizes:
        answers.logits(next(batches(answers, encoded, 64)))
    # The widest activation of the plain forward pass, or one layer's gradients of all rows.
    assert largest[6] == largest[2] <= max(max(sizes.sizes), 64 * max(r * c for r, c in (x.shape for x in layers)))
