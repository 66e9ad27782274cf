"""Likelihoods: from a model's outputs to Fisher columns, predictions and scores; one file each."""

from __future__ import annotations

from collections.abc import Sequence

from lapora.config import LikelihoodName
from lapora.likelihoods.base import Likelihood
from lapora.likelihoods.categorical import Categorical

_LIKELIHOODS: dict[LikelihoodName, type[Likelihood]] = {"categorical": Categorical}


def likelihood_of(name: LikelihoodName, choices: Sequence[str]) -> Likelihood:
    """Return a likelihood by name.

    Args:
        name: Its name, the task's ``likelihood``.
        choices: The answers, or the names of the outputs.
    """
    return _LIKELIHOODS[name](tuple(choices))
