from __future__ import annotations

import numpy as np
import pytest
import torch

from lapora.errors import NumericalError
from lapora.posterior.marglik import HIGHEST_PRECISION, LOWEST_PRECISION, Evidence, Spectrum


def spectra(*arrays):
    return [Spectrum.of(values, [None]) for values in arrays]


def test_equals_the_dense_gaussian_evidence():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator).double()
    curvature, theta = root @ root.T, torch.randn(6, generator=generator).double()
    delta, log_likelihood = 0.8, -12.5
    eye = torch.eye(6, dtype=torch.float64)
    log_prior = torch.distributions.MultivariateNormal(torch.zeros(6).double(), eye / delta).log_prob(theta)
    laplace = log_likelihood + log_prior + 3 * np.log(2 * np.pi) - 0.5 * torch.logdet(curvature + delta * eye)
    evidence = Evidence(
        spectra(torch.linalg.eigvalsh(curvature).numpy()), [float(theta.square().sum())], log_likelihood
    )
    assert evidence.log_marginal_likelihood(delta) == pytest.approx(float(laplace), abs=1e-10)


def test_the_chosen_precision_is_the_maximum():
    evidence = Evidence(spectra(np.array([3.0, 0.2, 50.0]), np.array([0.0, 7.0])), [0.5, 1.5], -3.0)
    best, bound = evidence.maximize()
    grid = np.exp(np.linspace(np.log(best) - 5, np.log(best) + 5, 4001))
    assert bound is None
    assert evidence.log_marginal_likelihood(best) >= max(evidence.log_marginal_likelihood(d) for d in grid) - 1e-12
    assert best * 2.0 == pytest.approx(evidence.effective_parameters(best), rel=1e-6)


def test_an_eigenvalue_counts_as_often_as_it_occurs():
    values, repeated = np.array([[3.0, 0.2], [7.0, 0.5]]), np.array([[3.0, *[0.2] * 4], *[[7.0, *[0.5] * 4]] * 2])
    few = Evidence([Spectrum.of(values, [(3, 1), (5, 1)])], [1.5], -3.0)
    many = Evidence(spectra(repeated.ravel()), [1.5], -3.0)
    for delta in (0.1, 4.0):
        assert few.log_marginal_likelihood(delta) == pytest.approx(many.log_marginal_likelihood(delta), rel=1e-12)
        assert few.effective_parameters(delta) == pytest.approx(many.effective_parameters(delta), rel=1e-12)
    assert few.maximize()[0] == pytest.approx(many.maximize()[0], rel=1e-8)


def test_eigenvalues_that_do_not_fit_the_bases_are_refused():
    with pytest.raises(ValueError, match="eigenvalues"):
        Spectrum.of(np.ones((2, 3)), [(6, 2), (3, 3)])


def test_bounds_are_said():
    assert Evidence(spectra(np.array([1.0])), [0.0]).maximize() == (HIGHEST_PRECISION, "highest")
    assert Evidence(spectra(np.zeros(3)), [1.0]).maximize() == (LOWEST_PRECISION, "lowest")


def test_negative_or_nan_eigenvalues_are_refused():
    with pytest.raises(NumericalError):
        Evidence(spectra(np.array([-1.0])), [1.0])
    with pytest.raises(NumericalError):
        Evidence(spectra(np.array([np.nan])), [1.0])
