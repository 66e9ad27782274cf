"""The shared adapters of SmolLM2-135M against the figures of an independent implementation that lie beside them."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from lapora.config import DataSettings, EvalSettings, FitSettings, ModelSettings, PredictSettings, PriorSettings
from lapora.workflows.demo import run_demo
from lapora.workflows.evaluate import run_evaluation
from lapora.workflows.fit import fit
from lapora.workflows.predict import predict
from lapora.workflows.tune_prior import tune_prior

pytestmark = pytest.mark.slow


def fitted(shared, tmp_path, smollm2, name) -> tuple[ModelSettings, DataSettings]:
    adapter = tmp_path / "adapter"
    shutil.copytree(shared / "adapters" / f"smollm2-{name}", adapter, copy_function=shutil.copyfile)
    adapter.chmod(0o755)
    model = ModelSettings(str(adapter), base_model=smollm2, dtype="float32", device="cpu")
    return model, DataSettings(str(adapter / "task.yaml"), data_dir=shared / "data" / name.split("-")[0], limit=200)


def test_two_answers_have_the_independent_covariances(shared, tmp_path, smollm2):
    model, data = fitted(shared, tmp_path, smollm2, "source2")
    result = fit(model, data, FitSettings(rank="full"))
    assert result.evidence.prior.precisions["all"] == pytest.approx(1.9324, rel=2e-3)
    tune_prior(model, settings=PriorSettings(method="marglik"))
    reference = [
        json.loads(line)["logits"]
        for line in (shared / "adapters" / "smollm2-source2" / "reference.jsonl").read_text().splitlines()
    ]
    rows = (shared / "data" / "source2" / "validation.jsonl").read_bytes().splitlines()[: len(reference)]
    for record, expected in zip(predict(model, PredictSettings(logits=True), rows), reference, strict=True):
        found, wanted = (torch.tensor(each["covariance"]) for each in (record["logits"], expected))
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-3
        assert record["logits"]["mean"] == pytest.approx(expected["mean"], abs=2e-3)


def test_five_answers_known_by_heart_are_calibrated_without_a_labelled_row(shared, tmp_path, smollm2):
    """MAP 1.027, marginal likelihood 1.328, averaged .754 by the independent implementation."""
    model, data = fitted(shared, tmp_path, smollm2, "source5-over")
    fit(model, data, FitSettings())
    scored = run_evaluation(model, DataSettings(limit=200), EvalSettings())
    results = {each["method"]: each for each in scored.record["results"]}
    assert results["constant"]["nll"] == pytest.approx(1.605, abs=0.001)
    assert results["map"]["nll"] == pytest.approx(1.027, abs=0.003)
    assert results["map"]["accuracy"] == pytest.approx(0.685, abs=1e-6)
    assert results["laplace"]["nll"] == pytest.approx(0.754, abs=0.02)
    assert results["laplace"]["ece"] < 0.11 and results["laplace"]["accuracy"] > 0.66
    assert not scored.warnings


def test_the_demo_makes_its_adapter_better(tmp_path, smollm2):
    done = run_demo(tmp_path / "demo", lambda line: None)
    results = {each["method"]: each for each in done.record["results"]}
    assert results["map"]["accuracy"] > 1.3 * results["constant"]["accuracy"], "the adapter has skill"
    assert results["laplace"]["nll"] < results["map"]["nll"] - 0.05
    assert results["laplace"]["ece"] < results["map"]["ece"]
    assert len(done.answers) == 3
    for answer in done.answers:
        assert math.isclose(sum(answer["probabilities"].values()), 1.0, abs_tol=1e-9)
        assert answer["confidence"] < max(answer["map_probabilities"].values())
