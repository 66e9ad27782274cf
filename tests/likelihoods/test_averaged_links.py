"""Links averaged over prior precisions and temperatures, against every component by itself."""

from __future__ import annotations

import pytest
import torch

from lapora.likelihoods.base import Averaging, LogitMoments
from lapora.likelihoods.categorical import (
    averaged_log_probabilities,
    averaged_mutual_information,
    grid_log_probabilities,
    log_probabilities,
    mutual_information,
)

LINKS = ("mc-joint", "mc-indep", "probit", "bridge")


def moments(classes: int, rows: int = 6, seed: int = 0, width: float = 1.0) -> LogitMoments:
    generator = torch.Generator().manual_seed(seed)
    mean = 2.0 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    root = width * torch.randn(rows, classes, classes, generator=generator, dtype=torch.float64)
    return LogitMoments(mean, root @ root.transpose(1, 2))


def components(classes: int) -> tuple[list[LogitMoments], Averaging]:
    found = [moments(classes, seed=index, width=width) for index, width in enumerate((2.0, 0.7))]
    found.append(LogitMoments(found[0].mean, torch.zeros_like(found[0].covariance)))  # MAP
    weights = torch.tensor([[0.1, 0.25], [0.2, 0.0], [0.15, 0.3]], dtype=torch.float64)
    return found, Averaging(torch.tensor([0.6, 1.7], dtype=torch.float64), weights)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("link", LINKS)
def test_an_average_is_the_sum_of_its_components(classes, link):
    found, averaging = components(classes)
    expected = torch.zeros(6, classes, dtype=torch.float64)
    for index, temperature, weight in averaging.components:
        divided = LogitMoments(found[index].mean / temperature, found[index].covariance / temperature**2)
        expected += weight * log_probabilities(link, divided, samples=2**14).exp()
    exact = link in ("probit", "bridge") or classes == 2
    samples = 2048 if exact else 2**14
    averaged = averaged_log_probabilities(link, found, averaging, samples=samples).exp()
    assert torch.allclose(averaged.sum(dim=1), torch.ones(6, dtype=torch.float64))
    assert (averaged - expected).abs().max() < (1e-9 if exact else 2e-3)


def test_the_usual_number_of_points_is_enough_for_an_average():
    found, averaging = components(4)
    fine = averaged_log_probabilities("mc-joint", found, averaging, samples=2**16).exp()
    usual = averaged_log_probabilities("mc-joint", found, averaging).exp()
    assert (fine - usual).abs().max() < 5e-3


@pytest.mark.parametrize("link", [*LINKS, "map"])
def test_one_component_is_the_link_itself_to_the_last_bit(link):
    one = moments(3)
    assert torch.equal(averaged_log_probabilities(link, [one], Averaging.single()), log_probabilities(link, one))


def test_map_is_not_averaged():
    found, averaging = components(3)
    assert torch.equal(
        averaged_log_probabilities("map", found, averaging), torch.log_softmax(found[0].mean.double(), dim=1)
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_rows_are_independent_of_their_neighbors(classes):
    found, averaging = components(classes)
    together = averaged_log_probabilities("mc-joint", found, averaging)
    for row in range(6):
        alone = [LogitMoments(each.mean[row : row + 1], each.covariance[row : row + 1]) for each in found]
        assert torch.allclose(averaged_log_probabilities("mc-joint", alone, averaging)[0], together[row], atol=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("link", LINKS)
def test_the_grid_holds_the_labels_of_every_component(classes, link):
    found, averaging = components(classes)
    labels = torch.tensor([0, 1, classes - 1, 0, 1, classes - 1])
    table = grid_log_probabilities(link, found, averaging.temperatures, labels, samples=512)
    assert table.shape == (3, 2, 6)
    for row, each in enumerate(found):
        for column, temperature in enumerate(averaging.temperatures.tolist()):
            expected = log_probabilities(link, each.divided(temperature), samples=512)
            assert torch.allclose(table[row, column], expected.gather(1, labels.unsqueeze(1)).squeeze(1), atol=1e-9)


@pytest.mark.parametrize("of_differences", [False, True])
def test_the_moments_of_an_average_are_those_of_its_draws(of_differences):
    found, averaging = components(3)
    if of_differences:
        found = [LogitMoments(each.mean, each.covariance[:, 1:, 1:]) for each in found]
    mixed = averaging.moments(found)
    generator = torch.Generator().manual_seed(3)
    chosen = torch.multinomial(averaging.weights.reshape(-1), 200_000, replacement=True, generator=generator)
    for row in range(2):
        mean = found[0].mean[row] if not of_differences else found[0].mean[row, 1:] - found[0].mean[row, :1]
        roots = torch.stack(
            [torch.linalg.cholesky(each.covariance[row] + 1e-12 * torch.eye(len(mean))) for each in found]
        )
        noise = torch.randn(200_000, len(mean), generator=generator, dtype=torch.float64)
        drawn = mean + torch.einsum("sij,sj->si", roots[chosen // 2], noise)
        drawn = drawn / averaging.temperatures[chosen % 2].unsqueeze(1)
        expected = drawn.mean(dim=0)
        own = mixed.mean[row] if not of_differences else mixed.mean[row, 1:] - mixed.mean[row, :1]
        assert torch.allclose(own, expected, atol=0.05)
        assert torch.allclose(mixed.covariance[row], torch.cov(drawn.T), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_information_of_an_average(classes):
    found, averaging = components(classes)
    averaged = averaged_log_probabilities("mc-joint", found, averaging, samples=2**14)
    known = torch.zeros(6, dtype=torch.float64)
    for index, temperature, weight in averaging.components:
        each = found[index].divided(temperature)
        p = log_probabilities("mc-joint", each, samples=2**14).exp()
        known += weight * (torch.special.entr(p).sum(dim=1) - mutual_information(each, samples=2**14))
    expected = torch.special.entr(averaged.exp()).sum(dim=1) - known
    information = averaged_mutual_information(found, averaging, samples=2**13)
    assert torch.allclose(information, expected, atol=5e-3)
    assert torch.equal(averaged_mutual_information([found[0]], Averaging.single()), mutual_information(found[0]))


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("link", LINKS)
def test_without_variance_every_link_is_the_softmax(classes, link):
    one = moments(classes)
    certain = LogitMoments(one.mean, torch.zeros_like(one.covariance))
    assert torch.allclose(log_probabilities(link, certain), torch.log_softmax(one.mean, dim=1), atol=1e-9)
