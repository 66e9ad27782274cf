"""`fit` on rows without labels, in 8 and 4 bits, with other Fishers; and what it leaves on disk."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from lapora.config import DataSettings, FitSettings, ModelSettings
from lapora.errors import DataError, PosteriorError, UsageError
from lapora.storage.saved import SavedPosterior
from lapora.workflows.evaluate import evaluate
from lapora.workflows.fit import fit


@pytest.fixture
def adapter(demo, tmp_path):
    shutil.copytree(demo / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def run(demo, adapter, *, data_dir=None, quantize=None, dtype=None, **settings):
    return fit(
        ModelSettings(adapter=str(adapter), quantize=quantize, dtype=dtype),
        DataSettings(task=str(demo / "farm.yaml"), data_dir=data_dir or demo / "data"),
        FitSettings(name="other", **settings),
    )


def eigenvalues(folder) -> np.ndarray:
    return np.concatenate([spectrum.values.ravel() for spectrum in SavedPosterior(folder).spectra()])


def test_without_labels_the_curvature_is_the_same(demo, adapter, tmp_path):
    labelled = run(demo, adapter)
    lines = (demo / "data" / "train.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k != "label"} for line in lines]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = eigenvalues(labelled.folder)
    bare = run(demo, adapter, data_dir=tmp_path / "data", overwrite=True, unlabelled=True)
    assert bare.log_likelihood is None
    assert SavedPosterior(bare.folder).content["prior"]["log_marginal_likelihood"] is None
    assert bare.evidence.prior.precisions == pytest.approx(labelled.evidence.prior.precisions, rel=1e-6)
    np.testing.assert_allclose(eigenvalues(bare.folder), before, rtol=1e-6)
    with pytest.raises(DataError, match="label"):
        run(demo, adapter, data_dir=tmp_path / "data", overwrite=True, fisher="empirical")


def test_one_and_many_rows_a_batch_give_one_posterior(demo, adapter):
    many = eigenvalues(run(demo, adapter).folder)
    settings = ModelSettings(adapter=str(adapter), batch_size=7)
    data = DataSettings(task=str(demo / "farm.yaml"), data_dir=demo / "data")
    few = eigenvalues(fit(settings, data, FitSettings(name="other", overwrite=True)).folder)
    np.testing.assert_allclose(few, many, rtol=1e-3, atol=1e-4 * many.max())


def test_the_adapters_own_files_are_not_touched(demo, adapter):
    before = {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()}
    run(demo, adapter)
    assert {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()} == before
    assert sorted(item.name for item in (adapter / "laplace").iterdir()) == ["default", "other"]
    with pytest.raises(PosteriorError, match="overwrite"):
        run(demo, adapter)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_other_fishers_are_near_the_exact_one(demo, adapter, fisher):
    exact = eigenvalues(run(demo, adapter).folder).sum()
    other = eigenvalues(run(demo, adapter, overwrite=True, fisher=fisher).folder).sum()
    # A sampled or given label changes the trace by less than an order of magnitude, and is not the exact Fisher.
    assert 0.1 < other / exact < 10 and other != exact


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantised_bases_fit_and_evaluate(demo, adapter, quantize):
    result = run(demo, adapter, quantize=quantize)
    record = evaluate(ModelSettings(adapter=str(adapter)), DataSettings(limit=50), names=["other"])
    assert SavedPosterior(result.folder).content["base_model"]["quantization"] == quantize
    full = evaluate(ModelSettings(adapter=str(adapter)), DataSettings(limit=50))
    at_map, in_full = record["results"][1], full["results"][1]
    assert at_map["nll"] == pytest.approx(in_full["nll"], abs=0.3)
    assert at_map["nll"] != in_full["nll"]
    assert record["results"][2]["nll"] < at_map["nll"]


def test_laplace_torchs_engines_from_the_same_command(demo, adapter):
    """On rows of one length curvlinops equals the native engine; ASDL is T times as sure."""
    native = run(demo, adapter).evidence.prior.precisions["all"]
    curvlinops = run(demo, adapter, overwrite=True, engine="curvlinops")
    assert SavedPosterior(curvlinops.folder).content["engine"] == "curvlinops"
    assert curvlinops.evidence.prior.precisions["all"] == pytest.approx(native, rel=0.05)
    asdl = run(demo, adapter, overwrite=True, weight_sharing="asdl")
    assert SavedPosterior(asdl.folder).content["engine"] == "asdl"
    assert asdl.evidence.prior.precisions["all"] > 2 * native


@pytest.mark.parametrize(
    "settings",
    [
        {"structure": "full", "engine": "asdl"},
        {"structure": "diag", "rank": 4},
        {"structure": "lowrank", "rank": "full"},
        {"engine": "curvlinops", "weight_sharing": "asdl"},
        {"engine": "asdl", "weight_sharing": "reduce"},
        {"engine": "curvlinops", "fisher": "mc"},
        {"engine": "curvlinops", "rank": 4},
    ],
)
def test_impossible_combinations_are_refused(demo, adapter, settings):
    with pytest.raises(UsageError):
        run(demo, adapter, **settings)


@pytest.mark.parametrize(("structure", "rank"), [("ekfac", None), ("diag", None), ("lowrank", 64), ("full", None)])
def test_every_structure_is_saved_and_read_back(demo, adapter, structure, rank):
    result = run(demo, adapter, structure=structure, rank=rank)
    saved = SavedPosterior(result.folder)
    assert saved.content["structure"] == structure and saved.content["kept"] > 0.9
    record = evaluate(ModelSettings(adapter=str(adapter)), DataSettings(limit=100), names=["other"])
    assert record["results"][2]["nll"] < record["results"][1]["nll"]
