"""Tokenizers larger than the base, rows longer than its positions, and chat templates in `tasks --check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lapora.config import PredictSettings
from lapora.errors import DataError, LaporaWarning
from lapora.models.adapter import read_adapter
from lapora.models.loading import load_model, silence_libraries
from lapora.models.meta_model import build_meta_model
from lapora.models.shared_base import BaseCache
from lapora.workflows.check_task import check
from lapora.workflows.fit import fit, prepare_fit
from lapora.workflows.predict import predict
from tiny_adapter import WORDS, FitSettings, data_of, fit_tiny, make_adapter, model_of

SETTINGS = FitSettings(prior_method="marglik")


def add_token(folder: Path, word: str, *, pad: bool = False) -> int:
    """Give the adapter a tokenizer of its own, with another token; return its id."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    if pad:
        tokenizer.add_special_tokens({"pad_token": word})
    else:
        tokenizer.add_tokens([word])
    tokenizer.save_pretrained(folder / "adapter")
    return len(tokenizer) - 1


def rewrite(folder: Path, **changes) -> None:
    file = folder / "task.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))


@pytest.mark.parametrize("tie", [False, True])
def test_embeddings_that_the_adapter_saved_beyond_the_base_are_added(tmp_path, tie):
    make_adapter(tmp_path)
    added = add_token(tmp_path, "tractor")
    with silence_libraries():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", tie_word_embeddings=tie)
        base.save_pretrained(tmp_path / "base")
        base.resize_token_embeddings(added + 1)
        lora = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(base, lora).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name or "embed" in name:
                nn.init.normal_(parameter, std=0.3)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    adapter = read_adapter(tmp_path / "adapter")
    how = model_of(tmp_path)
    ids = torch.tensor([[3, added, 4]])
    expected = model(input_ids=ids).logits
    for load in (load_model, BaseCache().load):
        loaded = load(adapter, how)
        assert loaded.embedding_rows == added + 1
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected)
    meta = build_meta_model(adapter, how, "cpu")
    assert len(meta.model.get_base_model().get_input_embeddings().weight) == added + 1
    rows = tmp_path / "data" / "train.jsonl"
    rows.write_text(rows.read_text() + '{"story": "the tractor is loud", "label": 1}\n')
    assert fit(how, data_of(tmp_path), SETTINGS).rows == 25


def test_a_row_with_a_token_beyond_the_base_is_refused_before_weights_are_loaded(tmp_path):
    make_adapter(tmp_path)
    added = add_token(tmp_path, "tractor")
    rows = tmp_path / "data" / "train.jsonl"
    rows.write_text(rows.read_text() + '{"story": "the tractor is loud", "label": 1}\n')

    def load(*_):
        raise AssertionError("loaded")

    with pytest.raises(DataError, match=rf"row 24: token id {added}, and the base model has {added} embeddings"):
        fit(model_of(tmp_path), data_of(tmp_path), SETTINGS, load=load)


@pytest.mark.parametrize("pad", [False, True])
def test_the_good_lines_of_a_batch_are_answered(tmp_path, pad):
    make_adapter(tmp_path)
    added = add_token(tmp_path, "tractor", pad=pad)
    fit_tiny(tmp_path)
    lines = [json.dumps({"story": story}).encode() for story in ("the cows", "a tractor", "anna is in the barn")]
    records = []
    with pytest.raises(DataError, match="1 bad line"):
        for record in predict(model_of(tmp_path), PredictSettings(on_error="report"), lines):
            records.append(record)
    assert ["error" in record for record in records] == [False, True, False]
    assert f"token id {added}" in records[1]["error"]


def gpt2_with(folder: Path, positions: int) -> None:
    """Replace the base and the adapter by GPT-2's, with few positions."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS) + 2, n_embd=16, n_layer=2, n_head=2, n_positions=positions, initializer_range=0.5
    )
    with silence_libraries():
        base = GPT2LMHeadModel(config)
        base.save_pretrained(folder / "base")
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(str(folder / "adapter"))


def test_rows_are_no_longer_than_the_positions_of_the_base(tmp_path):
    make_adapter(tmp_path)
    gpt2_with(tmp_path, 8)
    rewrite(tmp_path, truncate_field="story")
    with pytest.warns(
        LaporaWarning, match="maximum length is 8 tokens, the positions of the base model, instead of"
    ) as said:
        result = fit_tiny(tmp_path)
    assert len([each for each in said if issubclass(each.category, LaporaWarning)]) == 1
    manifest = json.loads((result.folder / "posterior.json").read_text())
    assert result.truncated and manifest["data"]["max_length"] == 8
    line = json.dumps({"story": " ".join(WORDS)}).encode()
    (record,) = predict(model_of(tmp_path), PredictSettings(), [line])
    assert record["truncated"]


def test_a_limit_that_the_model_does_not_have_is_not_one(tmp_path):
    """Rotary positions have no table: the configuration's number of positions is that of the training."""
    make_adapter(tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4}))
    assert fit_tiny(tmp_path).truncated == 0


def test_a_task_is_checked_with_the_ids_of_fit(tmp_path):
    make_adapter(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template = "{% for message in messages %}is {{ message.content }} quiet {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    for chat_template in (False, True):
        report = check(
            str(tmp_path / "adapter"), data_of(tmp_path, split="train"), max_length=40, chat_template=chat_template
        )
        fitted = prepare_fit(
            model_of(tmp_path), data_of(tmp_path), FitSettings(max_length=40, chat_template=chat_template)
        )
        assert [each["id"] for each in report["answer_tokens"].values()] == fitted.model.token_ids
        assert report["longest"] == max(len(row.input_ids) for row in fitted.encoded)
