"""Log-likelihoods of whole answers and accuracies are those of lm-evaluation-harness, on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from benchmarks.harness import compare
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lapora.models.loading import silence_libraries

sys.path.append(str(Path(__file__).parents[1] / "tasks"))
from tokenizers_for_tests import byte_level

pytestmark = pytest.mark.slow


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    tokenizer = byte_level(bos=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    with silence_libraries():
        base = LlamaForCausalLM(config)
        base.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        lora = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(base, lora)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "base", tmp_path / "adapter"


def test_scores_and_accuracies_are_the_harness_s(adapter: tuple[Path, Path], shared: Path) -> None:
    pytest.importorskip("lm_eval")
    base, folder = adapter
    for each in compare(str(base), str(folder), shared / "data", 12, "float64"):
        assert each.difference < 1e-4, each
        assert each.accuracy[0] == each.accuracy[1], each
        assert each.accuracy_per_byte[0] == each.accuracy_per_byte[1], each
