"""Every structure of the curvature against a dense computation on tiny models."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForSequenceClassification

from lapora.curvature import kfac
from lapora.curvature.kfac import KronObserver
from lapora.curvature.nystrom import NystromSketch
from lapora.curvature.passes import CurvatureRun
from lapora.curvature.per_example import LayerBasis, PerExampleObserver
from lapora.errors import UsageError
from lapora.models.lora_layers import find_bayesian_layers
from lapora.models.outputs import OutputModel
from lapora.posterior import structures
from lapora.posterior.eigen import decompose
from lapora.posterior.gaussian import BlockPosterior, check_blocks
from lapora.posterior.marglik import Evidence, maximize_evidence
from lapora.posterior.structures import fit_structure
from tiny_models import batches, close, dense_jacobian, moments, rows, tiny_causal, tiny_classifier

DELTA = 0.7


def run_of(answers, layers, encoded, **how) -> CurvatureRun:
    classes = answers.logits(next(batches(answers, encoded, 1))).shape[1]
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(0, classes, (len(encoded),), generator=generator).tolist()
    return CurvatureRun(
        answers, layers, lambda: batches(answers, encoded, 4, pad_to=11), targets=targets, classes=classes, **how
    )


def hessian_of(logits):
    p = torch.softmax(logits, dim=1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)


def dense_ggn(logits, jacobian):
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, hessian_of(logits), jacobian)


def dense_covariance(jacobian, curvature, delta=DELTA):
    """J (F + δI)⁻¹ Jᵀ, (N, C, C)."""
    precision = curvature + delta * torch.eye(len(curvature), dtype=curvature.dtype)
    return torch.einsum("ncp,pq,ndq->ncd", jacobian, torch.linalg.inv(precision), jacobian)


def layer_slices(layers, classes):
    start = 0
    for layer in layers:
        rows_, columns = layer.gradient_shape(classes)
        yield layer, slice(start, start + rows_ * columns)
        start += rows_ * columns


def kron_basis(block):
    return torch.kron(block.gradient_basis.contiguous(), block.input_basis.contiguous())


def truncated(matrix, rank):
    """``U Λ Uᵀ + ρ (I - U Uᵀ)`` with the leading eigenvectors and the mean of the remaining eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    rest = values[: max(0, len(values) - rank)]
    values[: len(rest)] = rest.mean() if len(rest) else 0.0
    return vectors * values @ vectors.T


def dense_kron(factors, layers, rank):
    """The curvature of all layers, every side truncated on its own."""
    found = (factors[layer.name] for layer in layers)
    return torch.block_diag(
        *[f.scale * torch.kron(truncated(f.gradient_sum, rank), truncated(f.input_sum, rank)) for f in found]
    )


def kron_factors(run):
    observer = KronObserver(run.weight_sharing, rank=99)
    run.observe(observer)
    return observer.factors(run.layers)


def check_evidence(posterior, curvature, layers):
    """The evidence counts every direction of the dense curvature."""
    norms = [layer.squared_norm for layer in layers]
    evidence = Evidence(posterior.spectra, norms)
    identity = torch.eye(len(curvature), dtype=torch.float64)
    for delta in (0.01, DELTA, 30.0):
        log_determinant = torch.logdet(identity + curvature / delta)
        expected = -0.5 * (delta * sum(norms) + float(log_determinant))
        assert evidence.log_marginal_likelihood(delta) == pytest.approx(expected, rel=1e-5)


def check_predictive(answers, layers, posterior, encoded, jacobian, curvature):
    classes = jacobian.shape[1]
    _, covariance = moments(answers, layers, posterior, encoded, classes=classes, precision=DELTA)
    close(covariance, dense_covariance(jacobian, curvature), answers)


def head_decoder(classes=3):
    """A decoder whose head reads one position: the last token's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=0.5, num_labels=classes, pad_token_id=0,
    )  # fmt: skip
    lora = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", modules_to_save=["score"]
    )
    model = get_peft_model(LlamaForSequenceClassification(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return OutputModel(model.double().eval().requires_grad_(False), "classifier", 0)


MIXTURES = {
    "classifier and its head": lambda: (tiny_classifier(3), "all"),
    "classifier's head alone": lambda: (tiny_classifier(2), "last-layer"),
    "decoder's head and body": lambda: (head_decoder(), "all"),
    "LoRA on lm_head and body": lambda: (tiny_causal(3, targets=("q_proj", "v_proj", "lm_head")), "lora"),
    "query, key and value share one input": lambda: (tiny_causal(3, targets=("q_proj", "k_proj", "v_proj")), "lora"),
    "LoRA on lm_head and body, all": lambda: (tiny_causal(3, targets=("v_proj", "lm_head")), "all"),
    "LoRA on lm_head alone": lambda: (tiny_causal(4, targets=("q_proj", "lm_head")), "last-layer"),
}


@pytest.fixture(params=list(MIXTURES))
def mixture(request):
    answers, subset = MIXTURES[request.param]()
    return answers, find_bayesian_layers(answers.model, subset)


def bayesian_jacobian(answers, layers, encoded):
    """Dense logits and Jacobian, biases as a last input column, vocabulary rows cut to the answers'."""
    logits, whole = dense_jacobian(answers, layers, encoded)
    parts, start = [], 0
    bias = {}
    for layer in layers:
        if layer.bias_as_input:
            bias[layer.name] = _bias_jacobian(answers, layer, encoded)
    for layer in layers:
        rows_, columns = layer.module.weight.shape
        part = whole[:, :, start : start + rows_ * columns].unflatten(2, (rows_, columns))
        start += rows_ * columns
        if layer.answer_rows_only:
            part = part[:, :, answers.answer_token_ids]
        if layer.bias_as_input:
            part = torch.cat([part, bias[layer.name].unsqueeze(3)], dim=3)
        parts.append(part.flatten(2))
    return logits, torch.cat(parts, dim=2)


def _bias_jacobian(answers, layer, encoded):
    layer.module.bias.requires_grad_(True)
    found = []
    for batch in batches(answers, encoded, 1):
        logits = answers.logits(batch)[0]
        found.append(torch.stack([torch.autograd.grad(f, layer.module.bias, retain_graph=True)[0] for f in logits]))
    layer.module.bias.requires_grad_(False)
    return torch.stack(found)


def check_diag(answers, layers, encoded, logits, jacobian):
    posterior, _ = fit_structure("diag", run_of(answers, layers, encoded))
    expected = dense_ggn(logits, jacobian).diagonal()
    close(torch.cat([values.flatten() for values in posterior.eigenvalues]), expected, answers)
    check_predictive(answers, layers, posterior, encoded, jacobian, torch.diag(expected))


def check_ekfac(answers, layers, encoded, logits, jacobian, sharing):
    run = run_of(answers, layers, encoded, weight_sharing=sharing)
    posterior, _ = fit_structure("ekfac", run)
    basis_of_kron, _ = fit_structure("kron", run)
    ggn = dense_ggn(logits, jacobian)
    curvature = torch.zeros_like(ggn)
    for block, kron, (_, place) in zip(
        posterior.blocks, basis_of_kron.blocks, layer_slices(layers, logits.shape[1]), strict=True
    ):
        basis = kron_basis(kron)
        moments_ = (basis.T @ ggn[place, place] @ basis).diagonal()
        close(block.eigenvalues.flatten(), moments_, answers)
        curvature[place, place] = basis @ torch.diag(moments_) @ basis.T
    check_predictive(answers, layers, posterior, encoded, jacobian, curvature)


def check_full(answers, layers, encoded, logits, jacobian):
    posterior, data = fit_structure("full", run_of(answers, layers, encoded))
    ggn = dense_ggn(logits, jacobian)
    close(data.logits, logits, answers)
    expected = torch.linalg.eigvalsh(ggn).flip(0)[: len(posterior.basis)]
    close(posterior.joint_eigenvalues, torch.cat([expected, expected.new_zeros(1)]), answers)
    check_predictive(answers, layers, posterior, encoded, jacobian, ggn)


def check_lowrank(answers, layers, encoded, logits, jacobian):
    """With a rank as great as the GGN's, the sketch is exact."""
    posterior, _ = fit_structure("lowrank", run_of(answers, layers, encoded, rank=len(encoded) * logits.shape[1]))
    assert posterior.retained_trace == pytest.approx(1.0, abs=1e-5)
    ggn = dense_ggn(logits, jacobian)
    (spectrum,) = posterior.spectra
    close(torch.tensor((spectrum.values * spectrum.counts).sum()), ggn.trace(), answers)
    check_predictive(answers, layers, posterior, encoded, jacobian, ggn)


@pytest.mark.parametrize("check", [check_diag, check_full, check_lowrank])
def test_equals_the_dense_reference(answers, layers, check):
    encoded = rows()
    check(answers, layers, encoded, *dense_jacobian(answers, layers, encoded))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ekfac_has_exact_second_moments_in_krons_basis(answers, layers, sharing):
    encoded = rows()
    check_ekfac(answers, layers, encoded, *dense_jacobian(answers, layers, encoded), sharing)


def test_heads_and_mixtures(mixture):
    answers, layers = mixture
    encoded = rows()
    logits, jacobian = bayesian_jacobian(answers, layers, encoded)
    check_diag(answers, layers, encoded, logits, jacobian)
    check_ekfac(answers, layers, encoded, logits, jacobian, "expand")
    check_full(answers, layers, encoded, logits, jacobian)
    check_lowrank(answers, layers, encoded, logits, jacobian)


def test_a_head_that_reads_one_position_counts_one_token(mixture):
    answers, layers = mixture
    encoded = rows()
    observer = KronObserver("expand")
    recorded = {}

    class Watch(KronObserver):
        def observe_input(self, layer, input_owner, inputs, mask):
            recorded.setdefault(layer.name, []).append(inputs if mask is None else inputs[mask].unsqueeze(0))
            return super().observe_input(layer, input_owner, inputs, mask)

    observer = Watch("expand")
    run_of(answers, layers, encoded).observe(observer)
    factors = observer.factors(layers)
    tokens = sum(len(row.input_ids) for row in encoded)
    in_head = {layer.name for layer in layers if layer.role == "head" or "lm_head" in layer.name}
    for layer in layers:
        assert factors[layer.name].count == (len(encoded) if layer.name in in_head else tokens)
        seen = torch.cat([part.flatten(0, 1) for part in recorded[layer.name]])
        assert len(seen) == factors[layer.name].count
        close(factors[layer.name].input_sum, seen.T @ seen, answers)
    for layer in (layer for layer in layers if layer.role == "head"):
        # One token per row: what the head reads is what its own module was given at that position.
        given = []
        handle = layer.module.register_forward_pre_hook(lambda _, arguments, given=given: given.append(arguments[0]))
        for batch in batches(answers, encoded, 1):
            answers.logits(batch)
        handle.remove()
        last = torch.stack([value.reshape(-1, value.shape[-1])[-1] for value in given])
        if layer.bias_as_input:
            last = torch.cat([last, torch.ones(len(last), 1).double()], dim=1)
        close(factors[layer.name].input_sum, last.T @ last, answers)


@pytest.mark.parametrize("rank", [1, 2, 6])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_truncated_kron_equals_its_dense_matrix(answers, layers, rank, sharing, monkeypatch):
    """Leading eigenvectors and the mean of the rest on both sides; sums are exact here, and truncated afterwards."""
    monkeypatch.setattr(kfac, "_OVERSAMPLING", 12)
    encoded = rows()
    run = run_of(answers, layers, encoded, rank=rank, weight_sharing=sharing)
    _, jacobian = dense_jacobian(answers, layers, encoded)
    posterior, _ = fit_structure("kron", run)
    assert all(max(block.basis.inputs.shape[1], block.basis.gradients.shape[1]) <= rank for block in posterior.blocks)
    curvature = dense_kron(kron_factors(run), layers, rank)
    check_predictive(answers, layers, posterior, encoded, jacobian, curvature)
    check_evidence(posterior, curvature, layers)
    traces = [float((each.values * each.counts).sum()) for each in posterior.spectra]
    assert sum(traces) == pytest.approx(float(curvature.trace()), rel=1e-6)


def test_truncation_keeps_the_variance_and_the_evidence_of_the_whole(answers, layers):
    """Nearer to the whole posterior than one that drops the rest, which is always too wide."""
    encoded = rows(24)
    whole, data = fit_structure("kron", run_of(answers, layers, encoded))
    classes = data.logits.shape[1]
    norms = [layer.squared_norm for layer in layers]
    exact = Evidence(whole.spectra, norms).maximize()[0]
    _, covariance = moments(answers, layers, whole, encoded, classes=classes, precision=exact)
    posterior, _ = fit_structure("kron", run_of(answers, layers, encoded, rank=3))
    dropped = replace_remainder(posterior)
    errors = []
    for each in (posterior, dropped):
        _, found = moments(answers, layers, each, encoded, classes=classes, precision=exact)
        ratio = found.diagonal(dim1=1, dim2=2).sum() / covariance.diagonal(dim1=1, dim2=2).sum()
        errors.append((abs(float(ratio) - 1), abs(Evidence(each.spectra, norms).maximize()[0] / exact - 1)))
    assert errors[0][0] < 0.5 * errors[1][0] and errors[0][1] < 0.5 * errors[1][1]


def replace_remainder(posterior):
    """The same posterior with nothing outside its bases, as version 0.1 saved it."""
    blocks = []
    for block in posterior.blocks:
        inside = torch.from_numpy(block.spectrum.counts == 1)
        blocks.append(replace(block, eigenvalues=block.eigenvalues * inside))
    return BlockPosterior(blocks)


@pytest.mark.parametrize("rank", [1, 4])
def test_truncated_ekfac_has_the_mean_second_moment_of_each_eigenspace(answers, layers, rank):
    encoded = rows()
    run = run_of(answers, layers, encoded, rank=rank)
    logits, jacobian = dense_jacobian(answers, layers, encoded)
    posterior, _ = fit_structure("ekfac", run)
    ggn = dense_ggn(logits, jacobian)
    curvature = torch.zeros_like(ggn)
    for block, (_, place) in zip(posterior.blocks, layer_slices(layers, logits.shape[1]), strict=True):
        eigenspaces = [
            torch.kron(left, right)
            for left in projections(block.gradient_basis)
            for right in projections(block.input_basis)
        ]
        for projection in eigenspaces:
            part = (projection * ggn[place, place]).sum() / projection.trace()
            curvature[place, place] += part * projection
    check_predictive(answers, layers, posterior, encoded, jacobian, curvature)
    check_evidence(posterior, curvature, layers)


def projections(basis):
    """Projections onto each vector of a basis, and onto its complement."""
    found = [torch.outer(vector, vector) for vector in basis.T]
    rest = torch.eye(len(basis), dtype=basis.dtype) - basis @ basis.T
    return found if basis.shape[1] == len(basis) else [*found, rest]


def test_truncated_lowrank_equals_its_dense_matrix(answers, layers):
    encoded = rows()
    posterior, _ = fit_structure("lowrank", run_of(answers, layers, encoded, rank=3))
    logits, jacobian = dense_jacobian(answers, layers, encoded)
    ggn = dense_ggn(logits, jacobian)
    basis, values = posterior.basis, posterior.joint_eigenvalues
    identity = torch.eye(len(ggn), dtype=torch.float64)
    curvature = basis.T * (values[:-1] - values[-1]) @ basis + values[-1] * identity
    close(curvature.trace(), ggn.trace(), answers)
    check_predictive(answers, layers, posterior, encoded, jacobian, curvature)
    check_evidence(posterior, curvature, layers)


def test_nothing_cancels_in_float32():
    """A gradient that is almost inside the basis: its small component outside has the accuracy of float32."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 8, generator=generator).double()).Q
    outside = torch.randn(5, 1, 64, generator=generator).double()
    outside = 1e-4 * (outside - outside @ basis @ basis.T)
    tokens = torch.randn(5, 1, 8, generator=generator).double() @ basis.T + outside
    gradient = torch.ones(5, 1, 1)
    observer = PerExampleObserver({"layer": LayerBasis("layer", basis.float(), torch.eye(1))})
    found = []
    observer.join = lambda layer, gradients: found.extend(gradients)
    layer = SimpleNamespace(name="layer")
    saved = observer.observe_input(layer, "layer", tokens.float(), None)
    observer.observe_gradient(layer, saved, gradient)
    observer.finish(layer)
    products = found[0].products(found[0])
    assert products.shape == (5, 1, 9)
    torch.testing.assert_close(
        products[:, 0, 8].double(), outside.square().sum(dim=(1, 2)), rtol=0.01, atol=0
    )  # a difference of squared norms has nothing left of 1e-8 of them


def test_a_factor_that_is_zero_has_no_direction_and_keeps_the_prior(answers, layers, tmp_path):
    encoded = rows()
    logits, jacobian = dense_jacobian(answers, layers, encoded)
    factors = kron_factors(run_of(answers, layers, encoded))
    for layer in layers:
        nothing = NystromSketch(layer.shape[0], 2, seed=0, like=jacobian)
        factors[layer.name] = replace(factors[layer.name], gradient_sum=nothing)
    posterior = BlockPosterior(decompose(layers, factors, 2))
    check_blocks(posterior, "kron", logits.shape[1], tmp_path)
    assert {block.gradient_basis.shape[1] for block in posterior.blocks} == {0}
    check_predictive(answers, layers, posterior, encoded, jacobian, torch.zeros(2 * [jacobian.shape[2]]).double())


def test_full_equals_laplace_torchs_full():
    from laplace.baselaplace import FullLaplace
    from laplace.utils import SubnetMask  # noqa: F401 - the package imports lazily

    answers = tiny_classifier(3)
    layers = find_bayesian_layers(answers.model)
    encoded = rows()
    run = run_of(answers, layers, encoded)
    posterior, _ = fit_structure("full", run)
    for layer in layers:
        layer.module.weight.requires_grad_(True)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = answers.network

        def forward(self, data):
            return self.network(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits

    items = []
    for batch in batches(answers, encoded, len(encoded)):
        for row in range(len(batch)):
            items.append(
                {
                    "input_ids": batch.input_ids[row],
                    "attention_mask": batch.attention_mask[row],
                    "labels": torch.tensor(run.targets[row]),
                }
            )
    loader = torch.utils.data.DataLoader(items, batch_size=3)
    theirs = FullLaplace(Plain(), "classification", prior_precision=DELTA, dict_key_y="labels")
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no forward-mode derivative
        theirs.fit(loader, progress_bar=False)
    values = torch.linalg.eigvalsh(theirs.H.double())
    ours = posterior.joint_eigenvalues[:-1]
    torch.testing.assert_close(values.flip(0)[: len(ours)], ours, atol=1e-6, rtol=1e-4)
    batch = next(batches(answers, encoded, len(encoded)))
    jacobians, _ = theirs.backend.jacobians({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})
    expected = theirs.functional_variance(jacobians.detach())
    for layer in layers:
        layer.module.weight.requires_grad_(False)
    _, covariance = moments(answers, layers, posterior, encoded, classes=3, precision=DELTA)
    torch.testing.assert_close(covariance, expected.detach().double(), atol=1e-5, rtol=1e-4)


def test_full_refuses_what_does_not_fit_and_says_what_does(monkeypatch):
    answers = tiny_classifier(3)
    layers = find_bayesian_layers(answers.model)
    monkeypatch.setattr(structures, "available_memory", lambda: 1000.0)
    with pytest.raises(UsageError, match=r"GiB.*lowrank"):
        fit_structure("full", run_of(answers, layers, rows()))


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "lowrank", "full"])
def test_a_wider_prior_never_narrows_the_prediction(structure):
    """Monotone in δ: variance falls, effective parameters fall, and the evidence has one maximum."""
    answers = tiny_classifier(3)
    layers = find_bayesian_layers(answers.model)
    encoded = rows()
    posterior, data = fit_structure(structure, run_of(answers, layers, encoded))
    traces = []
    for delta in (0.01, 0.1, 1.0, 10.0):
        _, covariance = moments(answers, layers, posterior, encoded, classes=3, precision=delta)
        traces.append(covariance.diagonal(dim1=1, dim2=2).sum(1))
    assert all(bool((before > after).all()) for before, after in itertools.pairwise(traces))
    best = maximize_evidence(posterior.spectra, posterior.parameters(), data.log_likelihood)
    assert not best.at_bound
    assert isinstance(posterior, BlockPosterior) == (structure in ("kron", "ekfac", "diag"))


def test_monte_carlo_and_empirical_fishers_of_full():
    answers = tiny_classifier(3)
    layers = find_bayesian_layers(answers.model)
    encoded = rows()
    logits, jacobian = dense_jacobian(answers, layers, encoded)
    run = run_of(answers, layers, encoded, fisher="empirical")
    posterior, _ = fit_structure("full", run)
    score = torch.nn.functional.one_hot(torch.tensor(run.targets), 3) - torch.softmax(logits, dim=1)
    gradients = torch.einsum("nc,ncp->np", score, jacobian)
    expected = torch.linalg.eigvalsh(gradients.T @ gradients).flip(0)[: len(posterior.basis)]
    close(posterior.joint_eigenvalues[:-1], expected, answers)
    assert not posterior.linear_model
    # Sampled labels: the trace is right in expectation.
    exact = float(dense_ggn(logits, jacobian).trace())
    sampled = [
        float(
            fit_structure("full", run_of(answers, layers, encoded, fisher="mc", seed=seed))[0].joint_eigenvalues.sum()
        )
        for seed in range(60)
    ]
    error = torch.tensor(sampled).std() / 60**0.5
    assert abs(sum(sampled) / 60 - exact) < 4 * float(error)
