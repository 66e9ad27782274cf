"""Likelihoods: from a model's outputs to Fisher columns, predictions and scores; one file each."""

from __future__ import annotations

from collections.abc import Sequence

from lapora.config import LikelihoodName
from lapora.likelihoods.base import Likelihood
from lapora.likelihoods.bernoulli import Bernoulli
from lapora.likelihoods.categorical import Categorical
from lapora.likelihoods.gaussian import Gaussian
from lapora.likelihoods.multilabel import Multilabel
from lapora.likelihoods.preference import Preference

_LIKELIHOODS: dict[str, type[Likelihood]] = {
    each.name: each for each in (Categorical, Bernoulli, Multilabel, Gaussian, Preference)
}


def likelihood_of(name: LikelihoodName, choices: Sequence[str], noise: Sequence[float] | None = None) -> Likelihood:
    """Return a likelihood by name.

    Args:
        name: Its name, the task's ``likelihood``.
        choices: The answers, or the names of the outputs.
        noise: Residual variance of each output of a regression, once it was measured.
    """
    if name == "gaussian":
        return Gaussian(tuple(choices), tuple(noise or ()))
    return _LIKELIHOODS[name](tuple(choices))
