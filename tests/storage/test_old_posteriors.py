"""Posteriors that an earlier version saved: read, predicted with as before, tuned again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lapora.cli.app import app
from lapora.config import DataSettings, ModelSettings, PredictSettings, PriorSettings
from lapora.workflows.predict import predict
from lapora.workflows.tune_prior import tune_prior
from tiny_adapter import json_lines

SAVED = Path(__file__).parent / "saved" / "version-0.1"
EXPECTED = json.loads((SAVED / "expected.json").read_text())


@pytest.fixture
def model(tmp_path) -> ModelSettings:
    shutil.copytree(SAVED, tmp_path / "saved")
    folder = tmp_path / "saved"
    return ModelSettings(str(folder / "adapter"), base_model=str(folder / "base"), device="cpu")


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_predictions_are_as_they_were(model, name):
    found = list(predict(model, PredictSettings(name=name), json_lines(4)))
    for record, expected in zip(found, EXPECTED[name], strict=True):
        assert record["probabilities"] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_inspect_shows_them(model, name, capsys):
    app(["inspect", model.adapter, "--name", name], standalone_mode=False)
    assert "prior precision" in capsys.readouterr().out


def test_they_are_tuned_on_labelled_rows_without_a_tolerance(model):
    rows = DataSettings(data_dir=Path(model.adapter).parent / "data")
    tuned = tune_prior(model, rows, PriorSettings())
    assert tuned.prior["averaged"]["n"] == 6 and tuned.prior["averaged"]["tolerance"] is None
    assert len(list(predict(model, PredictSettings(), json_lines(4)))) == 4


def test_without_labelled_rows_they_say_what_is_not_known(model):
    tuned = tune_prior(model, None, PriorSettings())
    assert tuned.method == "marglik"
    assert any("fit again to average" in note for note in tuned.notes)


def test_the_curvature_that_version_01_dropped_is_said(model):
    """Its truncated factors have no remainder: outside the basis the posterior is the prior, as it was."""
    tuned = tune_prior(model, None, PriorSettings(name="truncated", method="marglik"))
    assert any("left 38% of the curvature's trace out" in note for note in tuned.notes)
    assert tuned.prior["precision"] == pytest.approx(2.1484927582193203, rel=1e-9)
    tuned = tune_prior(model, None, PriorSettings(name="default", method="marglik"))
    assert not any("trace" in note for note in tuned.notes)
