from __future__ import annotations

import numpy as np
import pytest
import torch

from lapora.errors import NumericalError
from lapora.posterior.marglik import HIGHEST_PRECISION, LOWEST_PRECISION, Evidence


def test_equals_the_dense_gaussian_evidence():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator).double()
    curvature, theta = root @ root.T, torch.randn(6, generator=generator).double()
    delta, log_likelihood = 0.8, -12.5
    eye = torch.eye(6, dtype=torch.float64)
    log_prior = torch.distributions.MultivariateNormal(torch.zeros(6).double(), eye / delta).log_prob(theta)
    laplace = log_likelihood + log_prior + 3 * np.log(2 * np.pi) - 0.5 * torch.logdet(curvature + delta * eye)
    evidence = Evidence([torch.linalg.eigvalsh(curvature).numpy()], [float(theta.square().sum())], log_likelihood)
    assert evidence.log_marginal_likelihood(delta) == pytest.approx(float(laplace), abs=1e-10)


def test_the_chosen_precision_is_the_maximum():
    evidence = Evidence([np.array([3.0, 0.2, 50.0]), np.array([0.0, 7.0])], [0.5, 1.5], -3.0)
    best, bound = evidence.maximize()
    grid = np.exp(np.linspace(np.log(best) - 5, np.log(best) + 5, 4001))
    assert bound is None
    assert evidence.log_marginal_likelihood(best) >= max(evidence.log_marginal_likelihood(d) for d in grid) - 1e-12
    assert best * 2.0 == pytest.approx(evidence.effective_parameters(best), rel=1e-6)


def test_bounds_are_said():
    assert Evidence([np.array([1.0])], [0.0]).maximize() == (HIGHEST_PRECISION, "highest")
    assert Evidence([np.zeros(3)], [1.0]).maximize() == (LOWEST_PRECISION, "lowest")


def test_negative_or_nan_eigenvalues_are_refused():
    with pytest.raises(NumericalError):
        Evidence([np.array([-1.0])], [1.0])
    with pytest.raises(NumericalError):
        Evidence([np.array([np.nan])], [1.0])
