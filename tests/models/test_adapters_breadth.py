"""What PEFT saves: heads by name, embeddings saved beside, DoRA, experts, missing task types; loaded from disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lapora.config import ModelSettings
from lapora.errors import AdapterError, DataError, LaporaWarning
from lapora.models.adapter import read_adapter
from lapora.models.in_memory import prepared_for_fit
from lapora.models.loading import LoadedModel, load_model, silence_libraries
from lapora.models.lora_layers import find_bayesian_layers
from lapora.tasks import Task
from lapora.workflows.task_model import order_of_outputs
from tiny_adapter import fit_tiny, make_adapter
from tiny_bases import tiny_base, tiny_config


def save(folder: Path, name: str, kind: str, *, config=None, saving=None, **lora) -> Path:
    """Write a tiny base with a tokenizer, and an adapter on it."""
    torch.manual_seed(0)
    make_adapter(folder)  # for its tokenizer
    loader = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    with silence_libraries():
        base = loader.from_config(tiny_config(name, num_labels=3, **(config or {})))
        base.save_pretrained(folder / "base")
        task_type = "CAUSAL_LM" if kind == "causal" else "SEQ_CLS"
        model = get_peft_model(base, LoraConfig(**{"r": 3, "task_type": task_type, **lora}))
        for key, parameter in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                nn.init.normal_(parameter, std=0.3)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(str(folder / "adapter"), **(saving or {}))
    return folder / "adapter"


def change(adapter: Path, **settings) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


HEADS = [
    ("distilbert", ["q_lin"], None),
    ("bert", ["query"], None),
    ("roberta", ["query"], None),
    ("xlnet", ["layer_1"], ["logits_proj", "sequence_summary"]),
    ("funnel", ["q_head"], ["classifier"]),
    ("xlm", ["q_lin"], ["sequence_summary"]),
    ("gpt2", ["c_attn"], None),
    ("deberta-v2", ["query_proj"], ["classifier", "pooler"]),
    ("t5", ["q"], ["classification_head"]),
]


@pytest.mark.parametrize(("name", "targets", "saved"), HEADS)
def test_the_head_is_found_by_its_name(tmp_path, name, targets, saved):
    adapter = read_adapter(save(tmp_path, name, "classifier", target_modules=targets, modules_to_save=saved))
    assert adapter.number_of_labels() == 3
    loaded = load_model(adapter, ModelSettings(str(adapter.path), device="cpu"))
    assert loaded.number_of_labels == 3 and find_bayesian_layers(loaded.model)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_embeddings_saved_beside_the_adapter(tmp_path, targets, tie):
    folder = save(
        tmp_path, "llama", "causal", config={"tie_word_embeddings": tie}, target_modules=targets,
        saving={"save_embedding_layers": True},
    )  # fmt: skip
    loaded = load_model(read_adapter(folder), ModelSettings(str(folder), device="cpu"))
    assert len(find_bayesian_layers(loaded.model)) == 2 * (2 + len(targets) - 1)


def test_a_missing_task_type_is_taken_from_the_saved_head(tmp_path):
    for name, kind, targets in (("llama", "causal", ["q_proj"]), ("bert", "classifier", ["query"])):
        adapter = save(tmp_path / name, name, kind, target_modules=targets)
        change(adapter, task_type=None)
        read = read_adapter(adapter)
        assert read.kind == kind and any("task_type is missing" in note for note in read.notes)
        assert find_bayesian_layers(load_model(read, ModelSettings(str(adapter), device="cpu")).model)


@pytest.mark.parametrize(
    ("lora", "note"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, "LoRA on embeddings"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA's magnitudes"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, "trained token embeddings"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "the adapter's biases"),
    ],
)
def test_what_stays_fixed_is_said(tmp_path, lora, note):
    adapter = save(tmp_path, "llama", "causal", config={"attention_bias": True}, **lora)
    read = read_adapter(adapter)
    assert any(note in line for line in read.notes)
    layers = find_bayesian_layers(load_model(read, ModelSettings(str(adapter), device="cpu")).model)
    assert len(layers) == 4 and all("q_proj" in layer.name for layer in layers)


def test_lora_on_experts_is_fixed_and_attention_beside_it_is_covered(tmp_path):
    adapter = save(
        tmp_path, "qwen2_moe", "causal", target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    read = read_adapter(adapter)
    assert any("experts" in line for line in read.notes)
    layers = find_bayesian_layers(load_model(read, ModelSettings(str(adapter), device="cpu")).model)
    assert len(layers) == 4 and all("q_proj" in layer.name for layer in layers)


def test_lora_on_multi_head_attention_of_pytorch_is_fixed(tmp_path):
    """PEFT adds its factors to the weights for each forward pass, and never runs them."""
    network = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 2), "dense": nn.Linear(12, 12)})
    model = get_peft_model(network, LoraConfig(r=3, target_modules=["attention", "dense"]))
    model.get_base_model().get_output_embeddings = lambda: None
    assert {layer.name.split(".")[-2] for layer in find_bayesian_layers(model)} == {"dense"}
    model.save_pretrained(str(tmp_path))
    change(tmp_path, base_model_name_or_path="base", task_type="SEQ_CLS")
    assert any("LoRA on nn.MultiheadAttention" in note for note in read_adapter(tmp_path).notes)


@pytest.mark.parametrize("initialization", ["pissa_niter_4", "lora_ga"])
def test_an_adapter_that_loads_differently_each_time_is_refused(tmp_path, initialization):
    make_adapter(tmp_path)
    change(tmp_path / "adapter", init_lora_weights=initialization)
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        fit_tiny(tmp_path)
    assert not (tmp_path / "adapter" / "laplace").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_loftq_needs_a_gpu_and_says_so(tmp_path):
    make_adapter(tmp_path)
    change(tmp_path / "adapter", init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    with pytest.raises(AdapterError, match="loftq, by which PEFT quantizes the base weights on a GPU"):
        fit_tiny(tmp_path)
    assert not (tmp_path / "adapter" / "laplace").exists()


def test_settings_that_peft_does_not_know_are_said(tmp_path):
    make_adapter(tmp_path)
    change(tmp_path / "adapter", use_future=True, another=None)
    (note,) = [each for each in fit_tiny(tmp_path).notes if "does not know" in each]
    assert note.endswith("ignores: use_future")


def test_a_configuration_without_a_padding_id():
    answers = tiny_base("rwkv", "causal")
    config = answers.network.config
    before = vars(config).pop("pad_token_id", None)
    loaded = LoadedModel(
        model=answers.model,
        tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=None),
        kind="causal",
        base_model="rwkv",
        revision=None,
        quantize="none",
        dtype="float64",
        fingerprint="",
        number_of_labels=None,
    )
    with prepared_for_fit(loaded):
        assert config.pad_token_id == 0
    assert before == 0


NAMES = {0: "Yes", 1: "no", 2: "unknown"}


class Loaded:
    """As much of a loaded model as has names of labels."""

    def __init__(self, id2label):
        self.model = self
        self.config = type("Config", (), {"id2label": id2label})

    def get_base_model(self):
        return self


def test_answers_are_matched_to_the_head_by_name():
    task = Task.from_dict({"task": "t", "doc_to_text": "{{x}}", "doc_to_choice": ["a", "b"]}, source="t")
    with pytest.warns(LaporaWarning, match="by name"):
        assert order_of_outputs(Loaded(NAMES), task, ["no", "yes", "unknown"]) == [1, 0, 2]
    assert order_of_outputs(Loaded(NAMES), task, ["yes", "no", "unknown"]) is None
    assert order_of_outputs(Loaded({0: "LABEL_0", 1: "LABEL_1"}), task, ["no", "yes"]) is None
    with pytest.raises(DataError, match="contradicts"):
        order_of_outputs(Loaded(NAMES), task, ["no", "yes", "maybe"])


def test_outputs_are_in_the_order_of_the_answers():
    answers = tiny_base("bert", "classifier")
    from tiny_bases import covariance_error, row_ids
    from tiny_models import batches

    (batch,) = batches(answers, row_ids(answers), 5)
    before = answers.logits(batch)
    answers.output_order = [2, 0, 1]
    assert torch.equal(answers.logits(batch), before[:, [2, 0, 1]])
    assert covariance_error(answers) < 1e-5


def test_experts_in_float64(tmp_path):
    folder = save(tmp_path, "qwen2_moe", "causal", target_modules=["q_proj"])
    ids = torch.tensor([[3, 4, 5, 6]])
    logits = [
        load_model(read_adapter(folder), ModelSettings(str(folder), device="cpu", dtype=dtype)).model(ids).logits
        for dtype in ("float32", "float64")
    ]
    torch.testing.assert_close(logits[0].double(), logits[1], atol=1e-4, rtol=1e-3)
