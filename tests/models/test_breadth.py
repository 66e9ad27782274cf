"""Kinds of base models: positions, padding, shared layers, layouts; the covariance is the dense one to round-off."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora.config import VeloraConfig

from lapora.curvature.backward import Linearisation
from lapora.curvature.passes import CurvatureRun
from lapora.curvature.per_example import JacobianObserver
from lapora.errors import AdapterError, LaporaWarning, NumericalError, UsageError
from lapora.likelihoods.base import class_columns
from lapora.models.batching import BatchFeed, BatchSize
from lapora.models.lora_layers import find_bayesian_layers
from lapora.models.outputs import OutputModel
from lapora.models.padding_check import check_padding, sees_padding
from lapora.posterior.structures import fit_structure
from tiny_bases import covariance_error, row_ids, tiny_base
from tiny_models import Row, batches, dense_jacobian


def words_to_ids(text):
    """A tokenizer of 32 words."""
    return {"input_ids": [1 + sum(map(ord, word)) % 30 for word in text.split()]}


POSITIONS = ["gpt2", "opt", "gpt_neo", "bloom", "roberta", "recurrent_gemma", "rwkv", "codegen"]


@pytest.mark.parametrize("name", POSITIONS)
def test_padding_moves_no_causal_model(name):
    """Learned positions, positions counted from the padding id, alibi, rotary positions, recurrence."""
    answers = tiny_base(name, "causal")
    assert not sees_padding(answers, words_to_ids)
    assert covariance_error(answers) < 1e-5


@pytest.mark.parametrize("name", ["bart", "mbart", "pegasus", "plbart"])
def test_padding_moves_no_decoder_of_an_encoder_decoder_model(name):
    """Their cross-attention does not run, so that its layers have no gradient."""
    answers = tiny_base(name, "causal", targets=["fc1", "fc2"])
    assert not sees_padding(answers, words_to_ids)
    assert covariance_error(answers) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_the_head_runs_at_one_position_of_each_row(name):
    answers = tiny_base(name, "causal", targets=["fc1"] if name == "bart" else "all-linear")
    shapes = []
    head = answers.network.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    answers.logits(next(batches(answers, row_ids(answers), 5)))
    handle.remove()
    assert shapes == [(5, 1, 32)]


@pytest.mark.parametrize("name", ["fnet", "convbert", "xlnet"])
def test_a_model_that_sees_padding_has_batches_of_equal_length(name):
    answers = tiny_base(name, "classifier", targets=["dense"] if name == "fnet" else "all-linear")
    with pytest.warns(LaporaWarning, match="rows of equal length"):
        check_padding(answers, words_to_ids, quantized=False)
    encoded = row_ids(answers, 12)
    feed = list(BatchFeed(answers, encoded, BatchSize(8), bucketed=True))
    assert sorted(row for batch in feed for row in batch.rows) == list(range(12))
    assert not any(batch.has_padding for batch in feed) and any(len(batch) > 1 for batch in feed)
    layers = find_bayesian_layers(answers.model)
    logits, _ = dense_jacobian(answers, layers[:1], encoded)
    for batch in feed:
        torch.testing.assert_close(answers.logits(batch).detach(), logits[list(batch.rows)], atol=1e-6, rtol=1e-6)
    assert covariance_error(answers) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["convbert", "bert", "deberta-v2", "llama", "mixtral"])
def test_padding_is_seen_in_half_precision_too(name, dtype):
    answers = tiny_base(name, "classifier", double=False, initializer_range=0.02)
    answers = OutputModel(answers.model.to(dtype), "classifier", 0)
    assert sees_padding(answers, words_to_ids) == (name == "convbert")
    assert not answers.network.get_input_embeddings()._forward_hooks


def pair(first: int, second: int) -> Row:
    return Row([5 + index % 20 for index in range(first)], second=Row([7 + index % 20 for index in range(second)]))


@pytest.mark.parametrize("name", ["fnet", "convbert", "xlnet", "bert"])
def test_pairs_are_differences_of_single_texts_or_refused(name):
    answers = tiny_base(name, "classifier", targets=["dense"] if name == "fnet" else "all-linear")
    answers.equal_lengths = sees_padding(answers, words_to_ids)
    assert answers.equal_lengths == (name != "bert")

    def differences(pairs):
        found = torch.zeros(len(pairs), 3, dtype=torch.float64)
        for batch in BatchFeed(answers, pairs, BatchSize(None), bucketed=True):
            found[list(batch.rows)] = answers.logits(batch).detach()
        return found

    def alone(pairs):
        texts = [Row(text.input_ids) for each in pairs for text in (each, each.second)]
        logits = torch.cat([answers.logits(batch).detach() for batch in batches(answers, texts, 1)])
        return logits[0::2] - logits[1::2]

    equal, unequal = [pair(4, 4), pair(9, 9), pair(4, 4)], [pair(4, 4), pair(4, 9), pair(9, 5)]
    torch.testing.assert_close(differences(equal), alone(equal), atol=1e-6, rtol=1e-6)
    if name == "bert":
        torch.testing.assert_close(differences(unequal), alone(unequal), atol=1e-6, rtol=1e-6)
    else:
        with pytest.raises(AdapterError, match=f"^{name}: pairs of texts are not supported: padding"):
            differences(unequal)


def test_a_model_that_masks_padding_is_left_alone():
    answers = tiny_base("bert", "classifier")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_padding(answers, words_to_ids, quantized=False)
    assert not answers.equal_lengths


SHARED = [
    ("albert", {}),
    ("deberta-v2", {}),
    ("deberta-v2", {"share_att_key": False}),
    ("deberta", {}),
]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("name", "settings"), SHARED)
def test_layers_that_run_several_times_sum_their_gradients_over_calls(name, settings, size):
    answers = tiny_base(name, "classifier", **settings)
    assert covariance_error(answers, size=size) < 1e-5


@pytest.mark.parametrize(("name", "settings"), SHARED)
def test_pairs_of_texts_in_batches_of_any_size(name, settings):
    """A pair is two sequences, so that an input that all share is shared in a batch of one pair too."""
    answers = tiny_base(name, "classifier", **settings)
    layers = find_bayesian_layers(answers.model)
    encoded = [pair(3, 6), pair(7, 2), pair(5, 5)]
    found = []
    for size in (1, 2, 3):
        observer = JacobianObserver(layers, 3)
        with Linearisation(answers, layers, observer) as linearisation:
            jacobians = []
            for batch in batches(answers, encoded, size):
                linearisation.run(batch, class_columns)
                jacobians.append(observer.jacobian(len(batch), 3))
        found.append(torch.cat(jacobians, dim=1).transpose(0, 1))
    _, dense = dense_jacobian(answers, layers, encoded)
    for jacobian in found:
        torch.testing.assert_close(jacobian, dense, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("name", "settings"), SHARED)
def test_layers_that_run_several_times_in_blocks_that_are_recomputed(name, settings):
    answers = tiny_base(name, "classifier", **settings)
    answers.recompute_blocks = True
    assert covariance_error(answers) < 1e-5


EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("granitemoe", "causal", EXPERTS),
        ("granitemoeshared", "causal", EXPERTS),
        ("xlm", "classifier", {}),
        ("flaubert", "classifier", {}),
        ("llama", "causal", {}),
    ],
)
def test_blocks_that_are_recomputed_have_no_cache(name, kind, settings):
    """Granite takes ``use_cache`` among further keywords; XLM always makes a cache."""
    answers = tiny_base(name, kind, **settings)
    answers.recompute_blocks = True
    assert covariance_error(answers) < 1e-5


def test_the_positions_of_deberta_are_not_masked_where_they_are_as_many_as_the_tokens():
    answers = tiny_base("deberta-v2", "classifier", targets=["query_proj", "key_proj"])
    layers = find_bayesian_layers(answers.model)
    found = []
    for pad_to in (8, 9):  # eight relative positions
        run = CurvatureRun(
            answers, layers, lambda pad=pad_to: batches(answers, row_ids(answers), 1, pad_to=pad), [0] * 5, 3
        )
        found.append(fit_structure("diag", run)[0].eigenvalues)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("albert", {}), ("deberta-v2", {}), ("deberta", {}), ("deberta", {"max_relative_positions": 24})],
    ids=["albert", "deberta-v2", "deberta", "deberta-long"],
)
@pytest.mark.parametrize("structure", ["kron", "reduce", "ekfac", "diag", "full"])
def test_shared_layers_do_not_depend_on_batches_and_diag_is_exact(name, settings, structure):
    answers = tiny_base(name, "classifier", **settings)
    layers = find_bayesian_layers(answers.model)
    encoded = row_ids(answers, 6)
    found = []
    for size in (1, 4):
        run = CurvatureRun(
            answers,
            layers,
            lambda size=size: batches(answers, encoded, size),
            [0] * 6,
            3,
            weight_sharing="reduce" if structure == "reduce" else "expand",
        )
        found.append(fit_structure("kron" if structure == "reduce" else structure, run)[0].eigenvalues)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)
    if structure == "diag":
        logits, jacobian = dense_jacobian(answers, layers, encoded)
        p = torch.softmax(logits, dim=1)
        hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        exact = torch.einsum("ncp,ncd,ndp->p", jacobian, hessian, jacobian)
        torch.testing.assert_close(torch.cat([each.reshape(-1) for each in found[0]]), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("t5", ["q", "v", "wo"]),
        ("mt5", ["q", "v"]),
        ("mbart", ["q_proj", "v_proj", "fc1"]),
        ("xlm", "all-linear"),
        ("flaubert", "all-linear"),
    ],
)
def test_graphs_between_blocks_are_kept_for_all_blocks_that_need_them(name, targets):
    assert covariance_error(tiny_base(name, "classifier", targets=targets)) < 1e-5


def test_a_layer_between_blocks_that_several_blocks_read_is_followed_without_cuts():
    """Gemma 3n and 4 project the inputs of all layers at once, outside their blocks."""
    answers = tiny_base(
        "gemma4_text",
        "causal",
        hidden_size_per_layer_input=4,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=32,
        global_head_dim=8,
    )
    assert covariance_error(answers) < 1e-4
    assert not answers.cut_blocks


@pytest.mark.parametrize("name", ["opt", "qwen2_moe"])
def test_tokens_that_are_flattened_before_a_linear_layer(name):
    settings = {"experts_implementation": "eager"} if name == "qwen2_moe" else {}
    assert covariance_error(tiny_base(name, "causal", **settings)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_norm_of_dora_has_no_gradient(name):
    answers = tiny_base(name, "causal", lora={"use_dora": True})
    assert covariance_error(answers) < 1e-5


def test_lora_on_an_embedding_beside_linear_layers_is_fixed():
    answers = tiny_base("llama", "causal", targets=["embed_tokens", "q_proj"])
    assert {layer.name.split(".")[-2] for layer in find_bayesian_layers(answers.model)} == {"q_proj"}
    assert covariance_error(answers) < 1e-5


@pytest.mark.parametrize(
    "lora", [{"init_lora_weights": "mica"}, {"velora_config": VeloraConfig(num_groups=4)}], ids=["MiCA", "VeLoRA"]
)
def test_variants_whose_forward_pass_is_that_of_lora(lora):
    answers = tiny_base("llama", "causal", targets=["q_proj", "v_proj"], lora=lora)
    assert len(find_bayesian_layers(answers.model)) == 8
    assert covariance_error(answers) < 1e-5


@pytest.mark.parametrize("targets", [["Wqkv"], "all-linear"])
def test_dbrx(targets):
    answers = tiny_base(
        "dbrx",
        "causal",
        targets=targets,
        n_layers=2,
        n_heads=2,
        d_model=16,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 16, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        experts_implementation="eager",
    )
    assert covariance_error(answers) < 1e-5


def test_keys_and_values_of_all_heads_in_four_dimensions():
    answers = tiny_base(
        "minicpm3", "causal", q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8
    )
    assert covariance_error(answers) < 1e-4


def test_a_model_that_does_not_compute_in_float64_says_so():
    answers = tiny_base("gpt2", "causal")

    def fail(*_):
        raise RuntimeError("expected m1 and m2 to have the same dtype, but got: float != double")

    answers.network.register_forward_pre_hook(fail)
    with pytest.raises(UsageError, match="use --dtype float32"):
        answers.logits(next(batches(answers, row_ids(answers), 2)))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"])
def test_a_model_that_pads_rows_itself_and_has_tokens_of_global_attention(targets, size):
    """Longformer pads to a multiple of its window; one token of each row attends to all others."""
    answers = tiny_base("longformer", "classifier", targets=targets, attention_window=4)
    assert covariance_error(answers, size=size) < 1e-5


def test_positions_before_the_tokens_are_refused():
    answers = tiny_base("gpt2", "causal", targets=["c_attn"])
    layer, *_ = find_bayesian_layers(answers.model)
    batch = next(batches(answers, row_ids(answers), 2))
    tokens = batch.input_ids.shape[1]
    gradient = torch.ones(2, tokens + 3, 4)
    with pytest.raises(NumericalError, match=f"{tokens + 3} positions for {tokens} tokens"):
        answers.token_view(layer, gradient, batch, are_gradients=True)
    gradient[:, tokens:] = 0
    assert answers.token_view(layer, gradient, batch, are_gradients=True)[0].shape == (2, tokens, 4)


def test_logits_that_only_padding_makes_infinite_are_those_of_a_model_that_sees_padding():
    answers = tiny_base("bert", "classifier")

    def spoil(module, arguments, keywords, output):
        if not bool(keywords["attention_mask"].all()):
            output.logits = output.logits * float("nan")
        return output

    answers.network.register_forward_hook(spoil, with_kwargs=True)
    assert sees_padding(answers, words_to_ids)


def test_a_gradient_that_the_model_cuts_is_refused():
    answers = tiny_base("gpt2", "causal")

    def cut(module, arguments, output):
        output.logits = output.logits.detach()
        return output

    answers.network.register_forward_hook(cut)
    with pytest.raises(AdapterError, match="do not depend on any LoRA layer"):
        covariance_error(answers)


def test_an_error_of_the_models_own_code_is_one_line():
    answers = tiny_base("gpt2", "causal")
    batch = next(batches(answers, row_ids(answers), 2))

    def fail(*_):
        return (torch.tensor([1]).reshape(2, "x"),)

    handle = answers.network.transformer.register_forward_pre_hook(fail)
    with pytest.raises(AdapterError, match=r"the code of this base model fails .TypeError: reshape"):
        answers.logits(batch)
    handle.remove()
    with pytest.raises(AdapterError, match=r"the code of this base model fails .IndexError"):
        answers.logits(replace(batch, input_ids=batch.input_ids + 100))
