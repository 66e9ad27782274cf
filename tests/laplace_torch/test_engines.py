"""laplace-torch's backends give what they are known to give: expand times T, expand itself, reduce itself."""

from __future__ import annotations

import pytest
import torch

from lapora.curvature.kfac import KronObserver
from lapora.curvature.passes import collect
from lapora.errors import NumericalError, UsageError
from lapora.laplace_torch import asdl_factors, curvlinops_factors
from lapora.models.lora_layers import BayesianLayer, find_bayesian_layers
from tiny_bases import row_ids, tiny_base
from tiny_models import Row, batches, close, rows, tiny_causal, tiny_classifier

TOKENS = 7
TARGETS = [0, 1, 1, 0, 1, 0]
MODELS = [
    pytest.param(lambda make=make, classes=classes: make(classes), id=f"{make.__name__}-{classes}")
    for make in (tiny_classifier, tiny_causal)
    for classes in (2, 3, 5)
]


def equally_long_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    return [Row(torch.randint(1, 30, (TOKENS,), generator=generator).tolist()) for _ in TARGETS]


def native(answers, layers, encoded, weight_sharing, targets=TARGETS):
    observer = KronObserver(weight_sharing)
    data = collect(answers, layers, observer, batches(answers, encoded, 6), targets=targets)
    return observer.factors(layers), data.log_likelihood


def curvature(factors):
    return torch.kron(factors.gradient_sum, factors.input_sum) * factors.scale


def same_up_to(factor, theirs, ours, layers, answers):
    for layer in layers:
        expected = curvature(ours[layer.name]) * factor
        close(curvature(theirs[layer.name]) / expected.abs().max(), expected / expected.abs().max(), answers)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("size", [6, 4])
def test_asdl_is_expand_times_the_number_of_tokens(make, size):
    answers = make()
    layers = find_bayesian_layers(answers.model)
    encoded = equally_long_rows()
    ours, log_likelihood = native(answers, layers, encoded, "expand")
    theirs, their_log_likelihood = asdl_factors(answers, layers, batches(answers, encoded, size), TARGETS)
    assert their_log_likelihood == pytest.approx(log_likelihood, rel=1e-5)
    same_up_to(TOKENS, theirs, ours, layers, answers)
    assert not any(parameter.requires_grad for parameter in answers.model.parameters())


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("size", [6, 4])
def test_curvlinops_is_expand_or_reduce_itself(make, weight_sharing, size):
    answers = make()
    layers = find_bayesian_layers(answers.model)
    encoded, seen = equally_long_rows(), []
    ours, log_likelihood = native(answers, layers, encoded, weight_sharing)
    theirs, their_log_likelihood = curvlinops_factors(
        answers, layers, batches(answers, encoded, size), TARGETS, weight_sharing, lambda *at: seen.append(at)
    )
    assert their_log_likelihood == pytest.approx(log_likelihood, rel=1e-5)
    assert seen[-1] == (6, 6)
    same_up_to(1, theirs, ours, layers, answers)
    assert not any(parameter.requires_grad for parameter in answers.model.parameters())


def test_curvlinops_expand_is_a_mean_over_rows_of_means_over_tokens():
    answers = tiny_classifier(3)
    layers = find_bayesian_layers(answers.model)
    encoded = rows()
    lengths = [len(row.input_ids) for row in encoded]
    assert len(set(lengths)) > 1
    theirs, log_likelihood = curvlinops_factors(answers, layers, batches(answers, encoded, 1), [None] * len(encoded))
    assert log_likelihood is None
    one_by_one = [native(answers, layers, [row], "expand", [0])[0] for row in encoded]
    for layer in layers:
        each = [factors[layer.name] for factors in one_by_one]
        inputs = sum(factors.input_sum / length for factors, length in zip(each, lengths, strict=True)) / len(encoded)
        expected = torch.kron(sum(factors.gradient_sum for factors in each), inputs)
        close(curvature(theirs[layer.name]), expected, answers)


def test_curvlinops_counts_padding_as_tokens():
    answers = tiny_classifier(2)
    layers = find_bayesian_layers(answers.model)
    first = next(layer for layer in layers if layer.role == "A")
    encoded = equally_long_rows()
    padded = list(batches(answers, encoded, 6, pad_to=2 * TOKENS))
    theirs, _ = curvlinops_factors(answers, [first], padded, TARGETS)
    seen = []
    handle = first.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    answers.logits(padded[0])
    handle.remove()
    expected = seen[0].flatten(0, 1).T @ seen[0].flatten(0, 1) / (len(encoded) * 2 * TOKENS)
    close(theirs[first.name].input_sum, expected, answers)
    ours, _ = native(answers, layers, encoded, "expand")
    close(theirs[first.name].gradient_sum, ours[first.name].gradient_sum, answers)  # no gradient at padding


@pytest.mark.parametrize("factors", [asdl_factors, curvlinops_factors])
def test_layers_of_the_head_are_refused(factors):
    answers = tiny_causal(2, targets=("q_proj", "lm_head"))
    with pytest.raises(UsageError, match=factors.__name__.removesuffix("_factors")):
        factors(answers, find_bayesian_layers(answers.model), [], [0])


@pytest.mark.parametrize("factors", [asdl_factors, curvlinops_factors])
def test_a_layer_that_no_logit_depends_on_is_an_error_of_one_line(factors):
    answers = tiny_classifier(2)
    answers.network.unused = torch.nn.Linear(2, 3, bias=False).double().requires_grad_(False)
    unused = BayesianLayer("unused", "A", answers.network.unused, answers.network.unused)
    layers = [*find_bayesian_layers(answers.model), unused]
    with pytest.raises(NumericalError, match="--engine"):
        factors(answers, layers, batches(answers, equally_long_rows(), 6), TARGETS)
    assert not any(layer.module.weight.requires_grad for layer in layers)


@pytest.mark.parametrize("name", ["albert", "deberta-v2"])
@pytest.mark.parametrize("engine", [asdl_factors, curvlinops_factors])
def test_layers_that_run_several_times_in_a_pass_are_refused_by_name(name, engine):
    answers = tiny_base(name, "classifier", double=False)
    layers = find_bayesian_layers(answers.model)
    with pytest.raises(UsageError, match=r"lora_A runs \d times in a pass .*use --engine native"):
        engine(answers, layers, batches(answers, row_ids(answers, 6), 3), TARGETS)
