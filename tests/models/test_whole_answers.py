"""Scores of whole answers: packed and separate sequences against a plain loop and a dense Jacobian."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch

from lapora.curvature.kfac import KronObserver
from lapora.curvature.passes import CurvatureRun, PassState, collect
from lapora.models.answer_check import check_answers, packs_answers
from lapora.models.batches import collate
from lapora.models.batching import BatchFeed, BatchSize
from lapora.models.lora_layers import find_bayesian_layers
from lapora.models.outputs import OutputModel
from lapora.posterior.eigen import decompose
from lapora.posterior.gaussian import BlockPosterior
from lapora.posterior.structures import fit_structure
from lapora.predictive.moments import LinearisedPredictor
from tiny_bases import tiny_base
from tiny_models import Answer, Row
from tiny_models import rows as plain_rows
from tiny_models import whole_rows as rows

ARCHITECTURES = ["llama", "gemma3_text", "gpt2", "qwen2", "qwen3"]


def model(name: str, *, packed: bool | None = None, **how) -> OutputModel:
    outputs = tiny_base(name, "causal", **how)
    outputs.answer_token_ids = None
    outputs.packs_answers = packed
    return outputs


def plain_scores(outputs: OutputModel, row: Row) -> torch.Tensor:
    """Each answer alone behind the prompt, the log-probability of each of its tokens."""
    scores = []
    for answer in row.answers:
        ids = [*row.input_ids, *answer.ids]
        log_p = torch.log_softmax(outputs.network(torch.tensor([ids])).logits[0], dim=1)
        scored = range(len(ids) - answer.scored, len(ids))
        scores.append(answer.weight * sum(log_p[place - 1, ids[place]] for place in scored))
    return torch.stack(scores)


def plain_jacobian(outputs: OutputModel, layers, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores ``(C,)`` and Jacobian ``(C, P)`` of a row, by plain autograd over the weights."""
    weights = [layer.module.weight for layer in layers]
    for weight in weights:
        weight.requires_grad_(True)
    scores = plain_scores(outputs, row)
    jacobian = [
        torch.cat([each.reshape(-1) for each in torch.autograd.grad(score, weights, retain_graph=True)])
        for score in scores
    ]
    for weight in weights:
        weight.requires_grad_(False)
    return scores.detach(), torch.stack(jacobian)


def feed(outputs: OutputModel, encoded, *, size=None, bucketed=False) -> BatchFeed:
    return BatchFeed(outputs, encoded, BatchSize(size, 64), bucketed=bucketed)


def by_row(outputs, encoded, work, **how):
    found = {}
    for batch in feed(outputs, encoded, **how):
        found |= zip(batch.rows, work(batch), strict=True)
    return [found[row] for row in range(len(encoded))]


def tolerance(outputs: OutputModel) -> dict[str, float]:
    """Norms of these networks run in float32 whatever the model runs in."""
    exact = outputs.network.config.model_type == "gpt2"
    return {"atol": 1e-9, "rtol": 1e-7} if exact else {"atol": 2e-4, "rtol": 1e-3}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("packed", [True, False])
def test_scores_are_those_of_each_answer_alone(name, packed):
    outputs, encoded = model(name, packed=packed), rows()
    for how in ({"size": 1}, {"size": 4}, {"size": 4, "bucketed": True}):
        found = by_row(outputs, encoded, outputs.logits, **how)
        for scores, row in zip(found, encoded, strict=True):
            assert len(scores) == len(row.answers)
            torch.testing.assert_close(scores, plain_scores(outputs, row), **tolerance(outputs))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_check_packs_what_it_can(name):
    outputs = model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_answers(outputs)
    assert outputs.packs_answers


def test_the_check_packs_with_eager_attention():
    outputs, encoded = model("llama", attn_implementation="eager"), rows()
    check_answers(outputs)
    assert outputs.packs_answers
    for scores, row in zip(by_row(outputs, encoded, outputs.logits, size=3), encoded, strict=True):
        torch.testing.assert_close(scores, plain_scores(outputs, row), **tolerance(outputs))


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_the_check_separates_what_takes_no_mask_or_positions(name):
    targets = ["in_proj", "x_proj"] if name == "mamba" else "all-linear"
    outputs, encoded = model(name, targets=targets), rows()
    with pytest.warns(UserWarning, match="the answers of a row run as separate sequences"):
        check_answers(outputs)
    assert outputs.packs_answers is False
    found = by_row(outputs, encoded, outputs.logits, size=3)
    for scores, row in zip(found, encoded, strict=True):
        torch.testing.assert_close(scores, plain_scores(outputs, row), atol=1e-4, rtol=1e-4)


LEAKING = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 16},
    "jamba": {"num_experts": 2, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "mpt": {"n_heads": 2, "n_layers": 2, "d_model": 32, "max_seq_len": 48},
}
"""Convolutions, recurrences, and positions that the network counts."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*LEAKING, "llama", "gemma3_text", "mixtral", "qwen2_moe"])
def test_the_check_is_as_strict_in_half_precision(name, dtype):
    weak = {"lfm2": {"initializer_range": 0.1}, "jamba": {"initializer_range": 0.05}}.get(name, {})
    settings = {**LEAKING.get(name, {}), "vocab_size": 500, **weak}
    outputs = tiny_base(name, "causal", targets=["q_proj", "Wqkv"], double=False, **settings)
    outputs = OutputModel(outputs.model.to(dtype), "causal", 0)
    assert packs_answers(outputs) == (name not in LEAKING)


def test_rows_longer_than_a_sliding_window_are_separate():
    outputs, encoded = model("gemma3_text", packed=True, sliding_window=9), rows()
    shapes = [(len(batch), len(batch.input_ids)) for batch in feed(outputs, encoded, size=1)]
    assert any(sequences > 1 for _, sequences in shapes) and any(sequences == 1 for _, sequences in shapes)
    for scores, row in zip(by_row(outputs, encoded, outputs.logits, size=3), encoded, strict=True):
        torch.testing.assert_close(scores, plain_scores(outputs, row), **tolerance(outputs))


def test_fewer_rows_share_a_batch_where_the_vocabulary_is_large(monkeypatch):
    outputs, encoded = model("llama", packed=True), rows((3,) * 12)
    few = len(next(iter(feed(outputs, encoded))))
    monkeypatch.setattr(OutputModel, "vocabulary", 2**18)
    batches = list(feed(outputs, encoded))
    assert len(batches[0]) < few and sorted(row for batch in batches for row in batch.rows) == list(range(12))


def factors_of(outputs, layers, encoded, sharing="expand", **how):
    observer = KronObserver(sharing)
    collect(outputs, layers, observer, feed(outputs, encoded, **how), targets=[None] * len(encoded))
    return observer.factors(layers)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_packed_and_separate_sequences_give_the_same_factors(name, sharing):
    encoded = rows()
    packed, separate = model(name, packed=True), model(name, packed=False)
    found = []
    for outputs, how in ((packed, {"size": 3}), (separate, {"size": 2}), (packed, {"size": 1, "bucketed": True})):
        found.append(factors_of(outputs, find_bayesian_layers(outputs.model), encoded, sharing, **how))
    tokens = sum(len(row.input_ids) + sum(len(answer.ids) - 1 for answer in row.answers) for row in encoded)
    for layer, first in found[0].items():
        assert first.count == (tokens if sharing == "expand" else len(encoded))
        for other in found[1:]:
            assert other[layer].count == first.count
            for side in ("input_sum", "gradient_sum"):
                one, two = getattr(first, side), getattr(other[layer], side)
                torch.testing.assert_close(two, one, atol=1e-4 * float(one.abs().max()), rtol=1e-3)


class _Kept:
    """A checkpoint that keeps the state after the first batch, or gives it back."""

    def __init__(self, state: PassState | None = None) -> None:
        self.state = state

    def saved(self):
        return self.state

    def offer(self, take):
        if self.state is None:
            state = take()
            tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
            self.state = PassState.from_tensors(tensors, copy.deepcopy(state.observer.facts))

    def finish(self, take):
        pass


def test_a_resumed_pass_over_unlike_numbers_of_answers_gives_the_same():
    outputs, encoded = model("gpt2", packed=True), rows()
    layers = find_bayesian_layers(outputs.model)
    kept, found = _Kept(), []
    for checkpoint in (kept, kept):
        observer = KronObserver("expand")
        batches = feed(outputs, encoded, size=2)
        data = collect(outputs, layers, observer, batches, targets=[1] * len(encoded), checkpoint=checkpoint)
        found.append((data, observer.factors(layers)))
    (first, factors), (second, resumed) = found
    assert 0 < len(kept.state.order) < len(encoded)
    torch.testing.assert_close(first.logits, second.logits)
    assert first.log_likelihood == pytest.approx(second.log_likelihood)
    for name, each in factors.items():
        torch.testing.assert_close(resumed[name].gradient_sum, each.gradient_sum)
        assert resumed[name].count == each.count


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_single_tokens_have_one_posterior_scored_as_logits_or_as_whole_answers(sharing):
    """Log-probabilities differ from logits by a shift of the row, which no difference of two answers has."""
    tokens, found = [5, 6, 7], []
    for whole in (False, True):
        outputs = model("gpt2", packed=True, targets=["c_attn", "lm_head"])
        outputs.answer_token_ids = None if whole else torch.tensor(tokens)
        answers = [Answer([token], 1) for token in tokens] if whole else []
        encoded = [replace(row, answers=answers) for row in plain_rows()]
        layers = find_bayesian_layers(outputs.model, whole_answers=whole)
        factors = factors_of(outputs, layers, encoded, sharing, size=3)
        precisions = torch.full((1, len(layers)), 0.7, dtype=torch.float64)
        posterior = BlockPosterior(decompose(layers, factors))
        predictor = LinearisedPredictor(outputs, layers, posterior, precisions, classes=3, every_class=False)
        with predictor:
            covariances = by_row(outputs, encoded, lambda batch, of=predictor: of.moments(batch).covariance, size=3)
        found.append((factors, torch.stack(covariances)))
    (logits, expected), (scores, covariance) = found
    for name, one in logits.items():
        gradient_sum = scores[name].gradient_sum
        if "lm_head.lora_B" in name:
            assert gradient_sum.shape == (32, 32) and one.gradient_sum.shape == (3, 3)
            others = [token for token in range(32) if token not in tokens]
            assert float(gradient_sum[others].abs().max()) < 1e-12 * float(gradient_sum.abs().max())
            gradient_sum = gradient_sum[tokens][:, tokens]
        torch.testing.assert_close(gradient_sum, one.gradient_sum)
        torch.testing.assert_close(scores[name].input_sum, one.input_sum)
        assert scores[name].count == one.count
    torch.testing.assert_close(covariance, expected)


def dense_ggn(outputs, layers, encoded):
    curvature = 0
    for row in encoded:
        scores, jacobian = plain_jacobian(outputs, layers, row)
        p = torch.softmax(scores.double(), dim=0)
        curvature = curvature + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return curvature


@pytest.mark.parametrize(("name", "packed"), [("llama", True), ("gpt2", True), ("gpt2", False), ("mamba", False)])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_the_curvature_is_the_dense_ggn_of_the_scores(name, packed, structure):
    targets = ["in_proj", "x_proj"] if name == "mamba" else "all-linear"
    outputs, encoded = model(name, packed=packed, targets=targets), rows()
    layers = find_bayesian_layers(outputs.model)
    run = CurvatureRun(outputs, layers, lambda: feed(outputs, encoded, size=2), targets=[1] * len(encoded), classes=4)
    posterior, data = fit_structure(structure, run)
    expected = dense_ggn(outputs, layers, encoded)
    if structure == "full":
        found = (
            posterior.basis.T.double()
            @ torch.diag(posterior.joint_eigenvalues[: len(posterior.basis)])
            @ posterior.basis.double()
        )
    else:
        found = torch.cat([values.flatten() for values in posterior.eigenvalues])
        expected = expected.diagonal()
    torch.testing.assert_close(found, expected, atol=2e-3 * float(expected.abs().max()), rtol=2e-3)
    log_p = [torch.log_softmax(plain_scores(outputs, row), dim=0)[1] for row in encoded]
    assert data.log_likelihood == pytest.approx(float(sum(log_p)), rel=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn", "v_proj", "lm_head"]])
@pytest.mark.parametrize(("name", "packed"), [("llama", True), ("gpt2", True), ("gpt2", False)])
def test_the_covariance_is_dense_and_has_a_row_s_own_number_of_answers(name, packed, targets):
    outputs, encoded = model(name, packed=packed, targets=targets), rows()
    layers = find_bayesian_layers(outputs.model, whole_answers=True)
    factors = factors_of(outputs, layers, encoded, size=3)
    blocks = decompose(layers, factors)
    precision = torch.block_diag(
        *[torch.kron(f.gradient_sum, f.input_sum) * f.scale for f in (factors[layer.name] for layer in layers)]
    )
    precision += 0.7 * torch.eye(len(precision), dtype=torch.float64)
    precisions = torch.full((1, len(layers)), 0.7, dtype=torch.float64)
    predictor = LinearisedPredictor(outputs, layers, BlockPosterior(blocks), precisions, classes=3, every_class=True)
    with predictor:
        covariances = by_row(outputs, encoded, lambda batch: predictor.moments(batch).covariance, size=3, bucketed=True)
    for covariance, row in zip(covariances, encoded, strict=True):
        _, jacobian = plain_jacobian(outputs, layers, row)
        expected = jacobian @ torch.linalg.inv(precision) @ jacobian.T
        torch.testing.assert_close(covariance, expected, atol=2e-4 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("packed", [True, False])
def test_lora_on_the_output_layer_has_gradients_in_all_rows(packed):
    outputs, encoded = model("llama", packed=packed, targets=["v_proj", "lm_head"]), rows()
    layers = find_bayesian_layers(outputs.model, whole_answers=True)
    run = CurvatureRun(outputs, layers, lambda: feed(outputs, encoded, size=2), targets=[1] * len(encoded), classes=4)
    posterior, _ = fit_structure("diag", run)
    expected = dense_ggn(outputs, layers, encoded).diagonal()
    found = torch.cat([values.flatten() for values in posterior.eigenvalues])
    torch.testing.assert_close(found, expected, atol=2e-3 * float(expected.abs().max()), rtol=2e-3)
    factors = factors_of(outputs, layers, encoded, size=2)
    head = next(layer for layer in layers if "lm_head" in layer.name)
    assert factors[head.name].count == sum(1 + sum(len(a.ids) - 1 for a in row.answers) for row in encoded)


def test_one_answer_of_one_token_reads_the_prompt_alone():
    """Scores of single tokens are their log-probabilities: the same up to a shift as their logits."""
    outputs = model("llama", packed=True)
    row = Row([3, 4, 5], answers=[Answer([7], 1), Answer([9], 1)])
    batch = collate([row], [0], pad_token_id=0, padding_side="right")
    assert batch.input_ids.tolist() == [[3, 4, 5]]
    logits = outputs.network(batch.input_ids).logits[0, -1]
    torch.testing.assert_close(
        torch.softmax(outputs.logits(batch)[0], 0),
        torch.softmax(logits[[7, 9]], 0).to(torch.float64),
        atol=1e-5,
        rtol=1e-5,
    )


def test_an_answer_without_a_common_prompt():
    """Nothing is shared: the first token of each answer is read, and not scored."""
    outputs = model("gpt2", packed=True)
    row = Row([], answers=[Answer([3, 4, 5], 2), Answer([6, 4, 5, 2], 2)])
    for packed in (True, False):
        batch = collate([row], [0], pad_token_id=0, padding_side="right", packed=packed)
        torch.testing.assert_close(outputs.logits(batch)[0], plain_scores(outputs, row), atol=1e-6, rtol=1e-6)
