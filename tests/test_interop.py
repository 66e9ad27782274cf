"""laplace-torch's own classes, given lapora's posterior, say what lapora says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
import torch

from lapora.curvature.passes import CurvatureRun
from lapora.errors import UsageError
from lapora.interop import from_laplace_torch, kron_laplace, to_kron_laplace, to_laplace_torch
from lapora.laplace_torch import curvlinops_factors
from lapora.laplace_torch.network import AdapterNetwork, as_inputs, trainable
from lapora.likelihoods.base import LogitMoments
from lapora.likelihoods.categorical import log_probabilities
from lapora.models.lora_layers import find_bayesian_layers
from lapora.posterior.eigen import decompose
from lapora.posterior.gaussian import BlockPosterior
from lapora.posterior.marglik import Evidence
from lapora.posterior.structures import fit_structure
from lapora.storage.manifest import FORMAT_VERSION, Manifest
from lapora.storage.saved import SavedPosterior, write_posterior
from tiny_models import batches, close, dense_jacobian, moments, posterior, rows, tiny_causal, tiny_classifier

DELTA = 0.7  # tiny_models.moments predicts at this prior precision


def save(folder, blocks, *, structure="kron", prior=None):
    posterior = BlockPosterior(blocks)
    manifest = {
        "format_version": FORMAT_VERSION,
        "adapter": "0" * 64,
        "base_model": {
            "name": "tiny",
            "revision": None,
            "quantization": "none",
            "dtype": "float64",
            "fingerprint": "0" * 64,
        },
        "task": {"task": "tiny"},
        "data": {"split": "train", "n": 6, "fingerprint": "0" * 64, "max_length": 32},
        "structure": structure,
        "weight_sharing": "expand",
        "fisher": "exact",
        "subset": "lora",
        "parameters": posterior.parameters(),
        "prior": {"method": "marglik", **(prior or {"precision": DELTA, "structure": "scalar"})},
        "answers": {"choices": ["no", "yes"], "token_ids": None},
        "log_likelihood": -3.5,
    }
    chosen = manifest.pop("prior")
    write_posterior(folder, msgspec.convert(manifest, Manifest), chosen, posterior)
    return SavedPosterior(folder)


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


def test_a_saved_posterior_goes_there_and_back_unchanged(answers, layers, tmp_path):
    _, blocks = posterior(answers, layers, rows())
    saved = save(tmp_path / "laplace" / "default", blocks)
    there = to_laplace_torch(tmp_path)
    exact(there.deltas, torch.full((len(layers),), DELTA, dtype=torch.float64))
    saved_again = save(tmp_path / "laplace" / "again", from_laplace_torch(there, layers))
    assert saved_again.content["parameters"] == saved.content["parameters"]
    for back, block in zip(saved_again.gaussian().blocks, saved.gaussian().blocks, strict=True):
        exact(back.eigenvalues, block.eigenvalues)
        torch.testing.assert_close(back.input_basis, block.input_basis, rtol=0, atol=0)
        torch.testing.assert_close(back.gradient_basis, block.gradient_basis, rtol=0, atol=0)


def test_the_precision_is_the_dense_one(answers, layers, tmp_path):
    factors, blocks = posterior(answers, layers, rows())
    there = to_laplace_torch(save(tmp_path / "p", blocks))
    dense = torch.block_diag(
        *[torch.kron(f.gradient_sum, f.input_sum) * f.scale for f in (factors[layer.name] for layer in layers)]
    )
    dense += DELTA * torch.eye(len(dense), dtype=torch.float64)
    scale = dense.abs().max()
    torch.testing.assert_close(there.to_matrix() / scale, dense / scale, rtol=0, atol=1e-6)  # saved bases are float32
    assert float(there.logdet()) == pytest.approx(float(torch.logdet(dense)), rel=1e-7)


def test_the_noise_scale_of_a_regression_divides_the_precision(answers, layers, tmp_path):
    """Weights have the covariance s² / (λ + δ): predictions have the variance s² (Λ + v)."""
    _, blocks = posterior(answers, layers, rows())
    prior = {"precision": DELTA, "structure": "scalar"}
    plain, scaled = (
        to_laplace_torch(save(tmp_path / str(scale), blocks, prior={**prior, "noise_scale": scale})).to_matrix()
        for scale in (1.0, 3.0)
    )
    torch.testing.assert_close(scaled, plain / 9)


def laplace_of(answers, layers, blocks, classes, prior_precision=DELTA):
    return kron_laplace(answers, layers, blocks, prior_precision, classes=classes, rows=6, log_likelihood=-3.5)


def test_marginal_likelihoods_agree(answers, layers):
    _, blocks = posterior(answers, layers, rows())
    evidence = Evidence(BlockPosterior(blocks).spectra, [b.squared_norm for b in blocks], -3.5)
    laplace = laplace_of(answers, layers, blocks, 3)
    for delta in (DELTA, 1e-3, 50.0):
        theirs = laplace.log_marginal_likelihood(torch.tensor(delta, dtype=torch.float64))
        assert float(theirs) == pytest.approx(evidence.log_marginal_likelihood(delta), rel=1e-12)


def test_predictions_agree(answers, layers):
    encoded = rows()
    _, blocks = posterior(answers, layers, encoded)
    logits, jacobian = dense_jacobian(answers, layers, encoded)
    mean, covariance = moments(answers, layers, blocks, encoded, classes=logits.shape[1])
    laplace = laplace_of(answers, layers, blocks, logits.shape[1])
    close(laplace.functional_variance(jacobian), covariance, answers)
    variance = laplace.posterior_precision.bmm(jacobian, exponent=-1)
    close(torch.einsum("ncp,ndp->ncd", jacobian, variance), covariance, answers)
    # The whole of it by laplace-torch: its Jacobians, from a padded batch, and its probit link.
    inputs = as_inputs(next(batches(answers, encoded, len(encoded))))
    their_mean, their_covariance = laplace._glm_predictive_distribution(inputs)
    close(their_mean, mean, answers)
    close(their_covariance, covariance, answers)
    ours = log_probabilities("probit", LogitMoments(mean, covariance)).exp()
    close(laplace(inputs, link_approx="probit"), ours, answers)
    assert laplace.sample(3).shape == (3, jacobian.shape[2])
    assert not any(parameter.requires_grad for parameter in answers.model.parameters())


def test_rows_padded_on_the_left_are_those_padded_on_the_right():
    """BERT's positions are learned: shifted by padding, they are other positions."""
    answers, encoded = tiny_classifier(3), rows()
    encoded = [replace(row, token_type_ids=[0, *[1] * (len(row.input_ids) - 1)]) for row in encoded]
    layers = find_bayesian_layers(answers.model)
    laplace = laplace_of(answers, layers, posterior(answers, layers, encoded)[1], 3)
    right, left = (as_inputs(next(batches(answers, encoded, len(encoded), side))) for side in ("right", "left"))
    assert not torch.equal(left["attention_mask"], right["attention_mask"])
    exact(laplace(left), laplace(right))
    left["attention_mask"] = left["attention_mask"].bool()
    exact(laplace(left), laplace(right))


def test_a_prior_for_each_layer(tmp_path):
    answers = tiny_classifier(2)
    layers = find_bayesian_layers(answers.model)
    _, blocks = posterior(answers, layers, rows())
    precisions = [0.1 + index for index in range(len(blocks))]
    laplace = laplace_of(answers, layers, blocks, 2, precisions)
    parts = zip(blocks, precisions, strict=True)
    each = [Evidence([b.spectrum], [b.squared_norm]).log_marginal_likelihood(delta) for b, delta in parts]
    assert float(laplace.log_marginal_likelihood()) == pytest.approx(sum(each) - 3.5, rel=1e-12)
    by_name = {block.name: delta for block, delta in zip(blocks, precisions, strict=True)}
    saved = save(tmp_path / "p", blocks, prior={"structure": "layer", "precision": by_name})
    exact(to_laplace_torch(saved).deltas, torch.tensor(precisions, dtype=torch.float64))
    session = SimpleNamespace(
        posterior=saved, layers=layers, model=SimpleNamespace(outputs=answers, choices=("no", "yes"))
    )
    exact(to_kron_laplace(session).prior_precision, torch.tensor(precisions, dtype=torch.float64))


def test_a_session_brings_its_own_numbers(tmp_path):
    answers = tiny_causal(2)
    layers = find_bayesian_layers(answers.model)
    _, blocks = posterior(answers, layers, rows())
    saved = save(tmp_path / "p", blocks)
    session = SimpleNamespace(
        posterior=saved, layers=layers, model=SimpleNamespace(outputs=answers, choices=("no", "yes"))
    )
    laplace = to_kron_laplace(session)
    assert (laplace.n_data, laplace.n_outputs, laplace.model.output_size) == (6, 2, 2)
    assert float(laplace.log_likelihood) == -3.5
    exact(laplace.prior_precision, torch.tensor([DELTA], dtype=torch.float64))
    evidence = Evidence(BlockPosterior(blocks).spectra, [b.squared_norm for b in blocks], -3.5)
    expected = evidence.log_marginal_likelihood(DELTA)
    assert float(laplace.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-12)
    laplace.load_state_dict(laplace.state_dict())  # multiplied out and decomposed again, from bases saved in float32
    assert float(laplace.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-6)


def test_what_laplace_torch_fitted_comes_back():
    """laplace-torch's own fit, taken over, equals the engine's factors decomposed here; a temperature stays in."""
    from laplace import KronLaplace

    answers, encoded = tiny_classifier(3), rows()
    layers = find_bayesian_layers(answers.model)
    targets = [0, 1, 2, 0, 1, 2]
    seen = list(batches(answers, encoded, 2))
    factors, log_likelihood = curvlinops_factors(answers, layers, seen, targets)
    ours = decompose(layers, factors)

    class Loader(list):
        dataset = encoded

    with trainable(layers):
        laplace = KronLaplace(AdapterNetwork(answers, layers), "classification", temperature=0.5)
        laplace.fit(
            Loader({**as_inputs(b), "labels": torch.tensor([targets[row] for row in b.rows])} for b in seen),
        )
        back = from_laplace_torch(laplace, layers)
        bare = from_laplace_torch(laplace.H_facs, layers)
    assert float(laplace.loss) == pytest.approx(-log_likelihood, rel=1e-12)
    for theirs, plain, block in zip(back, bare, ours, strict=True):
        torch.testing.assert_close(plain.eigenvalues, block.eigenvalues, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(theirs.eigenvalues, 2 * block.eigenvalues, rtol=1e-6, atol=1e-12)
        assert (theirs.input_owner, theirs.squared_norm) == (theirs.name, block.squared_norm)
    _, covariance = moments(answers, layers, bare, encoded, classes=3)
    close(covariance, moments(answers, layers, ours, encoded, classes=3)[1], answers)


def test_layers_without_curvature_keep_their_prior():
    answers = tiny_classifier(2)
    layers = find_bayesian_layers(answers.model)
    _, blocks = posterior(answers, layers, rows())
    blocks = [replace(block, eigenvalues=torch.zeros_like(block.eigenvalues)) for block in blocks]
    _, jacobian = dense_jacobian(answers, layers, rows())
    variance = laplace_of(answers, layers, blocks, 2).functional_variance(jacobian)
    close(variance, torch.einsum("ncp,ndp->ncd", jacobian, jacobian) / DELTA, answers)


@pytest.fixture
def one_block():
    answers = tiny_classifier(2)
    layers = find_bayesian_layers(answers.model)[:1]
    return answers, layers, posterior(answers, layers, rows())[1][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: {"eigenvalues": b.eigenvalues + 1e-6 * torch.eye(*b.shape, dtype=torch.float64)}, "EKFAC"),
        (lambda b: {"gradient_basis": None}, "diagonal"),
        (lambda b: {"shape": (b.shape[0] + 1, b.shape[1])}, "answers' rows"),
    ],
)
def test_other_structures_are_refused(one_block, change, words):
    answers, layers, block = one_block
    with pytest.raises(UsageError, match=words):
        laplace_of(answers, layers, [replace(block, **change(block))], 2)


def fitted(answers, encoded, structure, rank=None):
    layers = find_bayesian_layers(answers.model)
    run = CurvatureRun(
        answers, layers, lambda: batches(answers, encoded, 3), targets=[None] * len(encoded), classes=2, rank=rank
    )
    return layers, fit_structure(structure, run)[0]


@pytest.mark.parametrize("structure", ["ekfac", "diag"])
def test_what_fit_makes_of_other_structures_is_refused(structure):
    answers = tiny_classifier(2)
    layers, found = fitted(answers, rows(), structure)
    with pytest.raises(UsageError, match="laplace-torch"):
        laplace_of(answers, layers, found.blocks, 2)


def test_a_truncated_posterior_is_completed():
    """The mean of the remaining eigenvalues stands in for each of them."""
    answers, encoded = tiny_classifier(2), rows()
    layers, found = fitted(answers, encoded, "kron", rank=2)
    laplace = laplace_of(answers, layers, found.blocks, 2)
    evidence = Evidence(found.spectra, [block.squared_norm for block in found.blocks], -3.5)
    theirs = laplace.log_marginal_likelihood(torch.tensor(DELTA, dtype=torch.float64))
    assert float(theirs) == pytest.approx(evidence.log_marginal_likelihood(DELTA), rel=1e-9)
    _, jacobian = dense_jacobian(answers, layers, encoded)
    close(laplace.functional_variance(jacobian), moments(answers, layers, found, encoded, classes=2)[1], answers)


def test_other_posteriors_are_refused_by_name(one_block, tmp_path):
    _, _, block = one_block
    with pytest.raises(UsageError, match="structure ekfac"):
        to_laplace_torch(save(tmp_path / "e", [block], structure="ekfac"))


def test_other_curvature_of_laplace_torch_is_refused(one_block):
    from laplace import KronLaplace
    from laplace.utils.matrix import Kron, KronDecomposed

    _, layers, block = one_block
    rows_, columns = block.shape
    square = [torch.eye(rows_), torch.eye(columns)]
    damped = KronDecomposed([square], [[torch.ones(rows_), torch.ones(columns)]], damping=True)
    for source, words in [
        (Kron([square, square]), "2 blocks"),
        (Kron([[torch.eye(rows_)]]), "bias"),
        (damped, "damping"),
        (KronLaplace(torch.nn.Linear(2, 2), "classification"), "not been fitted"),
    ]:
        with pytest.raises(UsageError, match=words):
            from_laplace_torch(source, layers)


def test_the_mode_of_the_network_is_left_alone():
    """Quantized layers on a CPU do not round their inputs in training mode alone."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 2).train(), torch.nn.Linear(2, 2).eval())
    output_model = SimpleNamespace(network=network, logits=None, device=torch.device("cpu"))
    wrapped = AdapterNetwork(output_model, [])
    assert wrapped.eval() is wrapped and not wrapped.training
    assert [layer.training for layer in network] == [True, False]
    wrapped.train()
    assert wrapped.training and [layer.training for layer in network] == [True, False]
