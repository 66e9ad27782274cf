"""The paper's stack gives what it is known to give: expand times T."""

from __future__ import annotations

import pytest
import torch

from lapora.curvature.collection import collect
from lapora.curvature.kron import KronObserver
from lapora.curvature.laplace_torch import asdl_factors
from lapora.errors import UsageError
from lapora.model.bayesian_layers import find_bayesian_layers
from tiny_models import Row, batches, close, tiny_causal, tiny_classifier


@pytest.mark.parametrize("make", [lambda: tiny_classifier(3), lambda: tiny_causal(2)])
def test_asdl_is_expand_times_the_number_of_tokens(make):
    answers, tokens = make(), 7
    layers = find_bayesian_layers(answers.model)
    generator = torch.Generator().manual_seed(0)
    encoded = [Row(torch.randint(1, 30, (tokens,), generator=generator).tolist()) for _ in range(6)]
    targets = [0, 1, 1, 0, 1, 0]
    observer = KronObserver("expand")
    data = collect(answers, layers, observer, batches(answers, encoded, 6), targets=targets)
    ours = observer.factors(layers)
    theirs, their_log_likelihood = asdl_factors(answers, layers, batches(answers, encoded, 6), targets)
    assert their_log_likelihood == pytest.approx(data.log_likelihood, rel=1e-5)
    for layer in layers:
        mine, other = ours[layer.name], theirs[layer.name]
        expected = torch.kron(mine.gradient_sum, mine.input_sum) * mine.scale * tokens
        actual = torch.kron(other.gradient_sum, other.input_sum) * other.scale
        close(actual / expected.abs().max(), expected / expected.abs().max(), answers)
    assert not any(parameter.requires_grad for parameter in answers.model.parameters())


def test_asdl_refuses_what_it_does_not_cover():
    answers = tiny_causal(2, targets=("q_proj", "lm_head"))
    with pytest.raises(UsageError, match="asdl"):
        asdl_factors(answers, find_bayesian_layers(answers.model), [], [0])
