"""Layers that rest on the disk: equal results, and no more of them in memory than one block's."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertModel

from lapora.config import DataSettings, FitSettings, ModelSettings, Placement, PredictSettings
from lapora.errors import PosteriorError, UsageError
from lapora.models import device_map
from lapora.models.adapter import read_adapter
from lapora.models.device_map import device_map_arguments
from lapora.models.loading import load_model
from lapora.models.shared_base import BaseCache
from lapora.workflows.fit import fit
from lapora.workflows.predict import predict
from tiny_adapter import make_adapter

ROWS = [b'{"story": "the cows are in the barn"}\n', b'{"story": "anna is quiet"}\n']


@pytest.fixture
def folder(tmp_path):
    return make_adapter(tmp_path / "one")


def settings(folder, **how):
    return ModelSettings(adapter=str(folder / "adapter"), output_dir=folder / how.pop("to", "plain"), **how)


def spread(folder, **how):
    return settings(folder, device_map="auto", max_memory="cpu=12KB", offload_dir=folder / "rest", **how)


def factors(model):
    return load_file(model.root / "laplace" / "default" / "factors.safetensors")


def resting(loaded):
    return [name for name, parameter in loaded.model.named_parameters() if parameter.is_meta]


def test_layers_rest_on_the_disk_and_the_adapter_does_not(folder):
    how = ModelSettings("", device_map="auto", max_memory="cpu=12KB", offload_dir=folder / "rest")
    loaded = load_model(read_adapter(folder / "adapter"), how)
    plain = load_model(read_adapter(folder / "adapter"), ModelSettings("", device="cpu"))
    assert any("layers.1." in name for name in resting(loaded))
    assert not any("lora_" in name for name in resting(loaded))
    assert loaded.fingerprint == plain.fingerprint
    assert loaded.digest("float32") == plain.digest("float32")
    with torch.no_grad():
        ids = torch.tensor([[3, 4, 5, 6]])
        found, expected = (each.model.get_base_model()(input_ids=ids).logits for each in (loaded, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_head_that_the_base_has_not(folder):
    """A classifier's head is the adapter's; the base has none, on no disk."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    BertModel(config).save_pretrained(folder / "encoder")
    for file in (folder / "base").glob("token*"):
        shutil.copyfile(file, folder / "encoder" / file.name)
    whole = BertForSequenceClassification.from_pretrained(folder / "encoder", num_labels=3)
    lora = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(whole, lora).save_pretrained(folder / "classifier")
    adapter = read_adapter(folder / "classifier")
    plain = load_model(adapter, ModelSettings("", base_model=str(folder / "encoder"), device="cpu"))
    spread_out = load_model(
        adapter,
        ModelSettings(
            "",
            base_model=str(folder / "encoder"),
            device_map="auto",
            max_memory="cpu=4KB",
            offload_dir=folder / "rest",
        ),
    )
    assert resting(spread_out) and plain.fingerprint == spread_out.fingerprint
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        found, expected = (each.model.get_base_model()(input_ids=ids).logits for each in (spread_out, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert float(expected.abs().max()) > 0


@pytest.mark.parametrize(
    ("structure", "choices"),
    [
        *((structure, ["no", "yes"]) for structure in ("kron", "ekfac", "diag", "lowrank", "full")),
        ("kron", ["the cows", "anna is loud", "no"]),  # whole answers
    ],
)
def test_fit_and_predict_are_the_same(folder, structure, choices):
    task = yaml.safe_load((folder / "task.yaml").read_text())
    (folder / "task.yaml").write_text(yaml.safe_dump({**task, "doc_to_choice": choices}))
    data = DataSettings(task=str(folder / "task.yaml"), data_dir=folder / "data")
    how = FitSettings(structure=structure, rank=20 if structure == "lowrank" else None)
    plain, other = settings(folder), spread(folder, to="spread")
    fit(plain, data, how)
    fit(other, data, how)
    found, expected = factors(other), factors(plain)
    for name, tensor in expected.items():
        if "eigenvalues" in name:
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6 * float(tensor.abs().max()))
    answers = list(predict(other, PredictSettings(), ROWS))
    for record, other_record in zip(answers, predict(plain, PredictSettings(), ROWS), strict=True):
        assert record["probabilities"] == pytest.approx(other_record["probabilities"], abs=1e-5)
    # A posterior is the base's, wherever its layers are.
    for record, other_record in zip(
        predict(spread(folder), PredictSettings(), ROWS), predict(plain, PredictSettings(), ROWS), strict=True
    ):
        assert record["probabilities"] == pytest.approx(other_record["probabilities"], abs=1e-6)


def test_one_block_at_a_time_is_in_memory(folder, monkeypatch):
    """The backward pass holds on to no weight that has gone back to the disk."""
    import gc
    import weakref

    from accelerate.hooks import AlignDevicesHook

    present: dict[int, object] = {}
    most = 0
    before, after = AlignDevicesHook.pre_forward, AlignDevicesHook.post_forward

    def pre_forward(self, module, *arguments, **named):
        nonlocal most
        result = before(self, module, *arguments, **named)
        if self.offload:
            for parameter in module.parameters(recurse=False):
                if not parameter.is_meta:
                    present[id(parameter)] = weakref.ref(parameter)
            gc.collect()
            most = max(most, sum(reference() is not None for reference in present.values()))
        return result

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", pre_forward)
    monkeypatch.setattr(AlignDevicesHook, "post_forward", after)
    loaded_from = spread(folder, to="spread")
    gc.freeze()  # collections look at the fit's own objects alone
    try:
        fit(loaded_from, DataSettings(task=str(folder / "task.yaml"), data_dir=folder / "data"), FitSettings())
    finally:
        gc.unfreeze()
    assert 0 < most <= 12, "a block has nine weights"


def test_another_base_is_still_refused(folder):
    data = DataSettings(task=str(folder / "task.yaml"), data_dir=folder / "data")
    fit(spread(folder), data, FitSettings())
    other = make_adapter(folder / "other", seed=5)
    shutil.copytree(other / "base", folder / "changed")
    with pytest.raises(PosteriorError, match="base model"):
        list(predict(spread(folder, base_model=str(folder / "changed")), PredictSettings(), ROWS))


def test_adapters_share_a_spread_base(folder):
    shutil.copytree(folder / "adapter", folder / "second")
    bases = BaseCache()
    how = ModelSettings("", device_map="auto", max_memory="cpu=12KB", offload_dir=folder / "rest")
    ids = torch.tensor([[3, 4, 5]])
    loaded = [bases.load(read_adapter(folder / name), how) for name in ("adapter", "second")]
    assert bases.loads == 1
    with torch.no_grad():
        second = loaded[1].model.get_base_model()(input_ids=ids).logits
        bases.attach(loaded[0])
        first = loaded[0].model.get_base_model()(input_ids=ids).logits
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_memory": "cpu=1GiB"}, "go with --device-map"),
        ({"device_map": "auto", "device": "cpu"}, "leave --device cpu out"),
    ],
)
def test_options_that_contradict_each_other(how, message):
    with pytest.raises(UsageError, match=message):
        _ = ModelSettings(adapter="x", **how).placement


@pytest.mark.parametrize("text", ["cpu", "cpu=much", "gpu=1GiB", "=1GiB"])
def test_bounds_that_cannot_be_read(text):
    with pytest.raises(UsageError, match="--max-memory"):
        device_map_arguments(Placement("auto", text))


def test_bounds():
    found = device_map_arguments(Placement("balanced", "0=20GiB, cpu=60GiB"))
    assert found == {"device_map": "balanced", "max_memory": {0: "20GiB", "cpu": "60GiB"}}
    assert json.dumps(found["device_map"])


GIB = 2**30
STATISTICS = f"anon {GIB}\ninactive_anon 3\ninactive_file {12 * GIB}\nactive_file 5\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"memory.max": "max", "memory.current": 15 * GIB, "memory.stat": STATISTICS}, 64),
        ({"memory.max": 16 * GIB, "memory.current": 15 * GIB, "memory.stat": STATISTICS}, 13),
        ({"memory.max": 16 * GIB, "memory.current": 15 * GIB, "memory.stat": "anon 7\n"}, 1),
        ({"memory.max": 16 * GIB, "memory.current": 15 * GIB}, 1),
        ({"memory.max": 16 * GIB, "memory.current": 11 * GIB, "memory.stat": STATISTICS}, 16),
        ({"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/memory.usage_in_bytes": 15 * GIB}, 64),
        (
            {
                "memory/memory.limit_in_bytes": 16 * GIB,
                "memory/memory.usage_in_bytes": 15 * GIB,
                "memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {12 * GIB}\n",
            },
            13,
        ),
    ],
)
def test_page_cache_that_can_be_reclaimed_is_available(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(device_map.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    monkeypatch.setattr(device_map, "_CGROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(str(content))
    assert device_map.available_memory() == expected * GIB
