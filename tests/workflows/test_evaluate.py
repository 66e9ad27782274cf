"""`eval` and `compare`: baselines, shift, abstention, gates, results kept."""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lapora import metrics
from lapora.cli.app import app
from lapora.cli.app import run as run_command_line
from lapora.config import DataSettings, EvalSettings, FitSettings, ModelSettings, PriorSettings
from lapora.errors import AdapterError, DataError, GateError, LaporaWarning, PosteriorError, UsageError
from lapora.models import loading
from lapora.models.batching import BatchSize
from lapora.posterior.averaging import TEMPERATURE_WIDTH
from lapora.storage.saved import SavedPosterior
from lapora.workflows import evaluate as evaluation
from lapora.workflows.evaluate import run_evaluation
from lapora.workflows.fit import fit
from lapora.workflows.results import append_result, check_gates, parse_gate, read_results
from lapora.workflows.rows import read_labelled_rows, row_digest
from lapora.workflows.scoring import forward_table, score_rows
from lapora.workflows.task_model import open_fitted
from lapora.workflows.tune_prior import tune_prior


@pytest.fixture(scope="module")
def adapter(demo, tmp_path_factory):
    """The demo's adapter with dropout, and a second posterior whose prior validation rows did not choose."""
    folder = tmp_path_factory.mktemp("eval") / "adapter"
    shutil.copytree(demo / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.1}))
    fit(
        ModelSettings(adapter=str(folder)),
        DataSettings(task=str(demo / "farm.yaml"), data_dir=demo / "data"),
        FitSettings(name="diag", structure="diag"),
    )
    return folder


@pytest.fixture(scope="module")
def other(adapter, tmp_path_factory):
    """An adapter of other weights."""
    folder = tmp_path_factory.mktemp("other") / "adapter"
    folder.mkdir()
    shutil.copy(adapter / "adapter_config.json", folder)
    weights = load_file(adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    moved = {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
    save_file(moved, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Rows of the same task about other things, some without a label."""
    folder = tmp_path_factory.mktemp("ood")
    rows = [{"story": "the barn the barn the barn the barn", "name": name, "label": 1} for name in ("anna", "hugo")]
    rows.append({"story": "bees", "name": "ines"})
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 5))
    return folder


def run(adapter, data=None, **settings):
    return run_evaluation(ModelSettings(adapter=str(adapter)), data or DataSettings(limit=80), EvalSettings(**settings))


def by_label(done):
    return {each.label: result for each, result in zip(done.predictions, done.record["results"], strict=True)}


def test_everything_in_one_table(demo, adapter, other, elsewhere):
    done = run(
        adapter,
        methods=("all",),
        ensemble=(other,),
        temperature_oracle=True,
        dropout_samples=4,
        coverage=0.8,
        ood=(str(demo / "farm.yaml"),),
        ood_data_dirs=(elsewhere,),
    )
    results = by_label(done)
    laplace = [
        f"laplace {n} ({link})" for n in ("default", "diag") for link in ("mc-joint", "mc-indep", "probit", "bridge")
    ]
    assert list(results) == [
        "constant",
        "map",
        "temperature",
        "temperature (oracle)",
        "mc-dropout",
        "ensemble",
        *laplace,
    ]
    assert done.record["n"] == 80 and done.record["excluded"] >= 300
    assert results["temperature (oracle)"]["nll"] <= min(results["temperature"]["nll"], results["map"]["nll"])
    assert results["ensemble"]["members"] == 2 and results["mc-dropout"]["passes"] == 4
    for label, result in results.items():
        assert set(result["intervals"]) >= {"accuracy", "ece", "adaptive_ece", "nll", "brier", "aurc"}
        assert ("difference_to_map" in result) == (label != "map")
        kept = result["coverage"]
        assert kept["coverage"] >= 0.8 and 0 <= kept["accuracy"] <= 1
    difference = results["temperature"]["difference_to_map"]["nll"]
    assert difference["value"] == pytest.approx(results["temperature"]["nll"] - results["map"]["nll"])
    assert difference["interval"][0] <= difference["value"] <= difference["interval"][1]

    (shifted,) = done.record["ood"]
    assert (shifted["task"], shifted["split"], shifted["n"]) == ("farm", "test", 15)
    assert [each["method"] for each in shifted["results"]][:4] == ["map", "temperature", "mc-dropout", "ensemble"]
    for each in shifted["results"]:
        # With two answers the entropy orders rows as the top probability does.
        assert each["auroc"]["entropy"] == pytest.approx(each["auroc"]["max_probability"])
        averaged = each["method"] in ("mc-dropout", "ensemble", "laplace")
        assert (each["auroc"]["mutual_information"] is not None) == averaged
        assert 0 < each["entropy"] < 0.7 and each["accuracy"] is not None


def test_temperature_reuses_the_rows_that_tuned_the_prior_and_none_is_scored(adapter):
    model = ModelSettings(adapter=str(adapter))
    done = run(adapter, DataSettings(), methods=("temperature",))
    results = by_label(done)
    assert list(results) == ["map", "temperature"]
    session = open_fitted(model, "default")
    tuned = session.posterior.content["prior"]["averaged"]["rows"]
    digests = set(tuned)
    every = read_labelled_rows(session.posterior, session.model.kind, DataSettings())
    scored = read_labelled_rows(session.posterior, session.model.kind, DataSettings(), exclude=digests)
    assert done.record["n"] == len(scored.examples)
    left, positions = list(tuned), []
    for position, each in enumerate(every.examples):
        if row_digest(each) in left:
            left.remove(row_digest(each))
            positions.append(position)
    tuning = every.only(positions)
    # As many rows as tuned the prior, also where another row says the same.
    assert not left and results["temperature"]["fitted_on"] == {"split": "validation", "n": len(tuned)}
    log_map = run_log_map(session, tuning)
    assert results["temperature"]["temperature"] == pytest.approx(
        metrics.fit_temperature(log_map, tuning.targets, width=TEMPERATURE_WIDTH)
    )


def run_log_map(session, rows):
    log_p = forward_table(replace(session.model, batch_size=BatchSize(16)), session.model.encode(rows.examples))
    torch.testing.assert_close(log_p, score_rows(session, rows, ["map"], samples=8).tables["map"][0], atol=1e-5, rtol=0)
    return log_p


def test_temperature_without_tuning_rows_takes_half_and_leaves_it_out(demo, adapter, tmp_path):
    done = run(adapter, DataSettings(), methods=("temperature",), names=("diag",))
    assert by_label(done)["temperature"]["fitted_on"]["n"] == pytest.approx(300, abs=5)
    assert done.record["excluded"] >= 300 and done.record["n"] + done.record["excluded"] == 600
    with pytest.raises(UsageError, match="trained on these rows"):
        run(adapter, temperature_split="train")
    with pytest.raises(UsageError, match="trained on these rows"):
        run(adapter, DataSettings(data_dir=demo / "data"), temperature_split="train")
    shutil.copytree(demo / "data", tmp_path / "data")
    lines = (demo / "data" / "validation.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data" / "test.jsonl").write_text("".join(lines[:40]))
    done = run(adapter, DataSettings(data_dir=tmp_path / "data"), names=("diag",), temperature_split="test")
    assert by_label(done)["temperature"]["fitted_on"]["split"] == "test"
    assert done.record["excluded"] >= 40


def test_what_cannot_be_had_is_refused_by_name_and_left_out_of_all(demo, adapter):
    with pytest.raises(UsageError, match="lora_dropout is 0"):
        run(demo / "adapter", methods=("mc-dropout",))
    done = run(demo / "adapter", methods=("all",), links=("mc-joint",))
    assert "mc-dropout" not in by_label(done) and any("mc-dropout" in line for line in done.warnings)
    assert any(line.startswith("left out: ensemble") for line in done.warnings)
    with pytest.raises(UsageError, match="--ensemble PATH"):
        run(adapter, methods=("ensemble",))
    with pytest.raises(UsageError, match="other weights"):
        run(adapter, ensemble=(adapter,))
    with pytest.raises(AdapterError, match="no such directory"):
        run(adapter, ensemble=(adapter / "nowhere",))


def test_an_ensemble_of_a_folder_of_checkpoints_averages_probabilities(adapter, other, tmp_path):
    for step, source in ((10, adapter), (20, other)):
        shutil.copytree(source, tmp_path / f"checkpoint-{step}", ignore=shutil.ignore_patterns("laplace"))
    done = run(adapter, methods=("map", "ensemble"), ensemble=(tmp_path,))
    predictions = {each.method: each for each in done.predictions}
    p = predictions["ensemble"].table.exp()
    own = predictions["map"].table.exp()
    assert torch.allclose(p.sum(dim=1), torch.ones(80, dtype=torch.float64))
    # The other member's probabilities, got back from the average, are probabilities of another model.
    rest = 2 * p - own
    assert float(rest.min()) > -1e-9 and float(rest.max()) < 1 + 1e-9 and float((rest - own).abs().max()) > 1e-3
    assert bool((predictions["ensemble"].mutual_information >= 0).all())


def test_a_member_of_another_base_is_said_to_be_that(adapter, other, tmp_path):
    member = tmp_path / "member"
    shutil.copytree(other, member)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(adapter, methods=("map", "ensemble"), ensemble=(member,))
    config = json.loads((member / "adapter_config.json").read_text())
    (member / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "owner/another"}))
    with pytest.warns(LaporaWarning, match="its base is owner/another, and it is scored on ADAPTER's"):
        run(adapter, methods=("map", "ensemble"), ensemble=(member,))


def test_posteriors_of_other_tasks_are_scored_apart(demo, adapter, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    task = yaml.safe_load((demo / "farm.yaml").read_text())
    task |= {"task": "turned", "doc_to_choice": task["doc_to_choice"][::-1], "doc_to_target": "{{ 1 - label }}"}
    (tmp_path / "turned.yaml").write_text(yaml.safe_dump(task))
    data = DataSettings(task=str(tmp_path / "turned.yaml"), data_dir=demo / "data")
    fit(ModelSettings(adapter=str(folder)), data, FitSettings(name="turned"))
    with pytest.raises(UsageError, match="--name turned: fitted on other prompts, answers or labels"):
        run(folder, names=("default", "turned"))
    alone = by_label(run(folder, DataSettings(limit=40), names=("turned",)))
    assert alone["laplace turned (mc-joint)"]["accuracy"] == alone["map"]["accuracy"] > 0.5
    done = run(folder, DataSettings(limit=20), methods=("all",))
    assert not any("turned" in label for label in by_label(done))
    assert any(line.startswith("left out: turned: fitted on other prompts") for line in done.warnings)


def test_posteriors_that_differ_in_their_prior_alone_share_a_pass(adapter, elsewhere, demo, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    for name, settings in {"evidence": PriorSettings(method="marglik"), "tuned": PriorSettings(link="probit")}.items():
        shutil.copytree(folder / "laplace" / "default", folder / "laplace" / name)
        tune_prior(ModelSettings(adapter=str(folder)), None, replace(settings, name=name))
    names = ("tuned", "diag", "evidence", "default")
    shift = {"ood": (str(demo / "farm.yaml"),), "ood_data_dirs": (elsewhere,)}
    passes = []
    monkeypatch.setattr(evaluation, "score_rows", lambda *args, **kw: passes.append(1) or score_rows(*args, **kw))
    together = run(folder, names=names, methods=("map", "laplace"), links=("mc-joint", "probit"), **shift)
    assert len(passes) == 4  # two sets of rows, and diag has factors of its own
    labels = [f"laplace {name} ({link})" for name in names for link in ("mc-joint", "probit")]
    assert list(by_label(together)) == ["map", *labels] and list(together.manifests) == list(names)
    assert together.manifests["evidence"]["prior"] != together.manifests["tuned"]["prior"]
    monkeypatch.setattr(SavedPosterior, "digest_without_prior", property(lambda posterior: posterior.folder.name))
    passes.clear()
    apart = run(folder, names=names, methods=("map", "laplace"), links=("mc-joint", "probit"), **shift)
    assert len(passes) == 8 and apart.warnings == together.warnings
    assert_close(apart.record, together.record)


def assert_close(first, second):
    """Compare two records, numbers within 1e-6."""
    if isinstance(first, dict):
        assert list(first) == list(second)
        first, second = list(first.values()), list(second.values())
    if isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_close(one, other)
    else:
        assert first == (pytest.approx(second, abs=1e-6) if isinstance(second, float) else second)


def test_a_posterior_that_is_fitted_again_meanwhile_is_not_scored_with_the_factors_of_another(
    adapter, demo, tmp_path, monkeypatch
):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    shutil.copytree(folder / "laplace" / "default", folder / "laplace" / "copy")
    real = evaluation.make_plan

    def plan_before_a_fit(*arguments):
        plan = real(*arguments)
        data = DataSettings(task=str(demo / "farm.yaml"), data_dir=demo / "data", limit=20)
        fit(ModelSettings(adapter=str(folder)), data, FitSettings(name="copy", overwrite=True))
        return plan

    monkeypatch.setattr(evaluation, "make_plan", plan_before_a_fit)
    with pytest.raises(PosteriorError, match=r"copy: another fit replaced it .*; run the command again"):
        run(folder, names=("default", "copy"))


def test_members_of_an_ensemble_are_on_the_adapters_base_and_revision(adapter, other, demo, tmp_path, monkeypatch):
    folder, member = tmp_path / "adapter", tmp_path / "member"
    for source, target in ((adapter, folder), (other, member)):
        shutil.copytree(source, target)
        config = json.loads((target / "adapter_config.json").read_text())
        (target / "adapter_config.json").write_text(json.dumps(config | {"revision": "v1"}))
    data = DataSettings(task=str(demo / "farm.yaml"), data_dir=demo / "data", limit=20)
    fit(ModelSettings(adapter=str(folder)), data, FitSettings(overwrite=True))
    revisions, real = [], loading.load_config
    monkeypatch.setattr(loading, "load_config", lambda *args: revisions.append(args[1]) or real(*args))
    run(folder, methods=("map", "ensemble"), ensemble=(member,))
    assert revisions == ["v1", "v1"]


def test_the_rows_that_tuned_are_elsewhere_and_unlabelled_here(adapter, demo, tmp_path):
    lines = (demo / "data" / "validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:40]]
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:40]))
    bare = [json.dumps({key: value for key, value in row.items() if key != "label"}) for row in rows]
    (tmp_path / "validation.jsonl").write_text("\n".join(bare))
    done = run(adapter, DataSettings(data_dir=tmp_path, split="test"), methods=("temperature",))
    assert by_label(done)["temperature"]["fitted_on"] == {"split": "test", "n": 20}
    assert any("the rows that tuned the prior are not in this data" in line for line in done.warnings)


def test_a_temperature_that_takes_all_rows_is_left_out(adapter, demo, tmp_path):
    (tmp_path / "test.jsonl").write_text((demo / "data" / "validation.jsonl").read_text().split("\n")[0])
    data = DataSettings(data_dir=tmp_path, split="test")
    with pytest.raises(DataError, match="all 1 rows were used to tune the prior or the temperature"):
        run(adapter, data, methods=("temperature",), names=("diag",))
    done = run(adapter, data, methods=("all",), names=("diag",))
    assert "temperature" not in by_label(done) and done.record["n"] == 1
    assert any(line.startswith("left out: temperature: test: all 1 rows") for line in done.warnings)


def test_posteriors_with_other_prompts_are_noted(adapter, demo, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    data = DataSettings(task=str(demo / "farm.yaml"), data_dir=demo / "data", limit=20)
    fit(ModelSettings(adapter=str(folder)), data, FitSettings(name="short", max_length=40))
    done = run(folder, names=("default", "short"))
    assert any(
        line.startswith("note: short has at most 40 tokens, no chat template, and MAP") for line in done.warnings
    )


def test_factors_that_are_not_used_are_checked(adapter, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    copy = shutil.copytree(folder / "laplace" / "default", folder / "laplace" / "copy")
    (copy / "factors.safetensors").write_bytes(b"damaged")
    with pytest.raises(PosteriorError, match=r"copy/factors\.safetensors: damaged"):
        run(folder, names=("default", "copy"))


def test_a_damaged_file_of_other_rows_is_an_error(adapter, elsewhere, demo, tmp_path):
    shutil.copytree(elsewhere, tmp_path / "ood")
    (tmp_path / "ood" / "validation.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"--ood .*line 1: not JSON"):
        run(adapter, ood=(str(demo / "farm.yaml"),), ood_data_dirs=(tmp_path / "ood",))


def test_figures_and_results_of_map_alone(adapter, tmp_path):
    where = ["--limit", "20", "--methods", "map", "--plots", str(tmp_path), "--report", str(tmp_path / "page.html")]
    app(["eval", str(adapter), *where, "--output", str(tmp_path / "runs.jsonl")], standalone_mode=False)
    assert {"reliability.png", "confidence.png", "risk-coverage.png"} <= {file.name for file in tmp_path.iterdir()}
    assert (tmp_path / "page.html").is_file() and (tmp_path / "runs.jsonl").read_text().count("\n") == 1


def test_results_with_unusual_line_separators_are_read_back(tmp_path):
    record = {"task": "a\u2028b", "split": "validation", "n": 1, "results": [{"method": "map"}]}
    append_result(tmp_path / "runs.jsonl", record, "adapter\u0085")
    (found,) = read_results([tmp_path / "runs.jsonl"])
    assert (found["task"], found["adapter"]) == ("a\u2028b", "adapter\u0085")


def test_dropout_is_off_again_and_the_same_seed_draws_the_same(adapter):
    first, again, another = (
        run(adapter, methods=("map", "mc-dropout"), dropout_samples=3, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.predictions[1].table, again.predictions[1].table)
    assert not torch.equal(first.predictions[1].table, another.predictions[1].table)
    assert torch.equal(first.predictions[0].table, another.predictions[0].table)


def test_coverage_is_the_value_for_predict(adapter, demo, tmp_path, capsys):
    done = run(adapter, DataSettings(), coverage=0.7)
    threshold = by_label(done)["laplace default (mc-joint)"]["coverage"]["threshold"]
    session = open_fitted(ModelSettings(adapter=str(adapter)), "default")
    digests = set(session.posterior.content["prior"]["averaged"]["rows"])
    rows = read_labelled_rows(session.posterior, session.model.kind, DataSettings(), exclude=digests)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(dict(each.row)) + "\n" for each in rows.examples))
    app(
        ["predict", str(adapter), str(tmp_path / "rows.jsonl"), "--abstain-below", str(threshold - 1e-6)],
        standalone_mode=False,
    )
    answered = [not json.loads(line)["abstained"] for line in capsys.readouterr().out.splitlines()]
    kept = by_label(done)["laplace default (mc-joint)"]["coverage"]["coverage"]
    assert sum(answered) / len(answered) == pytest.approx(kept, abs=0.005) and kept >= 0.7


def test_other_data_with_another_number_of_answers_is_refused(demo, adapter, elsewhere, tmp_path):
    (tmp_path / "three.yaml").write_text((demo / "farm.yaml").read_text().replace("- 'no'", "- 'no'\n- perhaps"))
    with pytest.raises(DataError, match="3 answers"):
        run(adapter, ood=(str(tmp_path / "three.yaml"),), ood_data_dirs=(elsewhere,))
    with pytest.raises(DataError, match="--ood-data-dir"):
        run(adapter, ood=(str(demo / "farm.yaml"),))
    with pytest.raises(UsageError, match="2 --ood-data-dir for 1"):
        run(adapter, ood=("boolq",), ood_data_dirs=(elsewhere, elsewhere))
    with pytest.raises(UsageError, match="without --ood"):
        run(adapter, ood_data_dirs=(elsewhere,))


RESULTS = [
    {"method": "constant", "nll": 0.7, "ece": 0.0, "auroc": 0.5},
    {"method": "map", "nll": 0.8, "ece": 0.2, "auroc": 0.6},
    {"method": "laplace", "name": "default", "link": "mc-joint", "nll": 0.6, "ece": 0.05, "auroc": 0.61},
    {"method": "laplace", "name": "v1.2", "link": "probit", "nll": 0.65, "ece": 0.15, "auroc": None},
]


@pytest.mark.parametrize(
    ("condition", "named"),
    [
        ("ece>0.1", ["v1.2 (probit) ece 0.15"]),
        ("ece > .2", []),
        ("nll>map.nll", []),
        ("map.nll>constant.nll", ["map nll 0.8, constant nll 0.7"]),
        ("nll>=0.6", ["default", "v1.2"]),
        ("default.ece<=1e-1", ["default"]),
        ("v1.2/probit.nll > 0.5", ["v1.2"]),
        ("v1.2.nll<0.5", []),
        ("laplace.nll<map.nll", ["default", "v1.2"]),
        ("auroc<0.5", ["v1.2 (probit) auroc is not defined"]),
    ],
)
def test_gates(condition, named):
    gate = parse_gate(condition)
    if not named:
        check_gates([gate], RESULTS)
        return
    with pytest.raises(GateError) as failed:
        check_gates([gate], RESULTS)
    assert all(part in str(failed.value) for part in named) and gate.text in str(failed.value)
    assert str(failed.value).count("(laplace") == sum(part.startswith(("v1", "default")) for part in named)


@pytest.mark.parametrize(
    "condition", ["", "ece", "ece=0.1", "ece>", "0.1<ece", "loss>1", "ece>0.1>0.2", "map.x>1", "ece>1.2.3"]
)
def test_bad_gates_are_usage_errors(condition):
    with pytest.raises(UsageError, match="--fail-if"):
        parse_gate(condition)


@pytest.mark.parametrize("condition", ["ensemble.nll>1", "nll>nothing.nll", "mcc<0.5"])
def test_gates_on_what_was_not_scored(condition):
    with pytest.raises(UsageError, match="--fail-if"):
        check_gates([parse_gate(condition)], RESULTS)


def test_gates_speak_of_map_where_there_is_no_laplace():
    with pytest.raises(GateError, match=r"map ece 0\.2"):
        check_gates([parse_gate("ece>0.1")], RESULTS[:2])


def test_a_failed_gate_ends_with_7_after_the_results(adapter, tmp_path, capsys, monkeypatch):
    file = tmp_path / "results.jsonl"
    file.write_text('{"half')
    arguments = ["eval", str(adapter), "--limit", "60", "--output", str(file), "--fail-if", "nll>0.01", "--json"]
    with pytest.raises(GateError, match=r"nll>0\.01 \(laplace default \(mc-joint\) nll") as failed:
        app(arguments, standalone_mode=False)
    assert failed.value.exit_status == 7 and len(str(failed.value).splitlines()) == 1
    assert json.loads(capsys.readouterr().out)["n"] == 60
    lines = file.read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["adapter"] == str(adapter)
    with pytest.raises(DataError, match="line 1"):
        app(["compare", str(file)], standalone_mode=False)

    file.write_text(lines[1] + "\n")
    app(
        ["eval", str(adapter), "--limit", "50", "--output", str(file), "--methods", "map,constant"],
        standalone_mode=False,
    )
    capsys.readouterr()
    app(["compare", str(file), str(file), "--json"], standalone_mode=False)
    printed = capsys.readouterr()
    runs = json.loads(printed.out)
    assert [run["n"] for run in runs] == [60, 50, 60, 50] and "did not score the same rows" in printed.err
    app(["compare", str(file)], standalone_mode=False)
    table = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len({len(line) for line in table}) == 1 and len(table) == 1 + 3 + 2
    assert [line[6:9] for line in table[1:]][2] == ["laplace", "default", "mc-joint"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    app(["compare", str(file)], standalone_mode=False)
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in out and "#2" in out and "laplace default (mc-joint)" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--fail-if", "loss>1"), "not a metric"),
        (("--methods", "mpa"), "--methods mpa"),
        (("--coverage", "0"), "--coverage"),
        (("--checkpoints", "--name", "x"), "--name"),
        (("--checkpoints",), "no checkpoint-STEP"),
        (("--prior-method", "marglik"), "need --checkpoints"),
    ],
)
def test_bad_options(adapter, arguments, words):
    with pytest.raises(UsageError, match=words):
        app(["eval", str(adapter), *arguments], standalone_mode=False)


def test_tables_for_a_terminal(adapter, demo, elsewhere, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "130")
    ood = ["--ood", str(demo / "farm.yaml"), "--ood-data-dir", str(elsewhere)]
    app(["eval", str(adapter), "--limit", "60", "--coverage", "0.8", *ood], standalone_mode=False)
    out = capsys.readouterr().out
    for words in ("adaptive", "nll minus MAP", "--abstain-below", "out of distribution: farm", "mutual", "█", "┃"):
        assert words in out
    assert "…" not in out


def test_a_narrow_terminal_shows_every_score_and_cuts_nothing(adapter, demo, elsewhere, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    ood = ["--ood", str(demo / "farm.yaml"), "--ood-data-dir", str(elsewhere)]
    names = ["--name", "default", "--name", "diag", "--link", "mc-joint", "--link", "mc-indep"]
    app(["eval", str(adapter), "--limit", "60", "--coverage", "0.8", *names, *ood], standalone_mode=False)
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for words in (
        "accuracy",
        "adaptive",
        "brier",
        "auroc",
        "aurc",
        "nll minus MAP",
        "mutual",
        "bars end at the mark",
    ):
        assert words in out
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    # A method is named on one line wherever the table leaves room for it.
    assert out.count("laplace default (mc-indep)") >= 4


def test_the_temperature_is_told_with_its_rows(adapter, capsys, tmp_path):
    page = tmp_path / "page.html"
    arguments = ["--methods", "temperature", "--temperature-oracle", "--limit", "60", "--report", str(page)]
    app(["eval", str(adapter), *arguments], standalone_mode=False)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("temperature")]
    assert re.fullmatch(
        r"temperature [\d.]+, fitted on 299 rows of validation that are not scored; oracle: [\d.]+, fitted on the "
        "scored rows themselves",
        told,
    )
    assert told.removeprefix("temperature ") in page.read_text()


def test_scores_of_the_training_rows_are_said_to_be_that(adapter, demo):
    for data in (DataSettings(split="train"), DataSettings(split="train", data_dir=demo / "data")):
        assert any("trained on" in line for line in run(adapter, data, methods=("map",)).warnings)
    assert not any("trained on" in line for line in run(adapter, methods=("map",)).warnings)


def test_tuning_on_the_training_rows_is_never_advised(adapter, monkeypatch):
    monkeypatch.setattr("lapora.metrics.paired_interval", lambda differences: (0.1, 0.2))
    monkeypatch.setattr("lapora.workflows.evaluate._WORTH_SAYING", -1e9)
    for split, advised in (("train", "--split validation"), ("validation", "tune on more rows")):
        warnings = run(adapter, DataSettings(split=split), methods=("map", "laplace")).warnings
        (line,) = (line for line in warnings if "worse than MAP" in line)
        assert advised in line and ("tune" in line) == (split == "validation")


def test_what_bitsandbytes_says_as_it_is_imported_stays_off_the_terminal(caplog, monkeypatch):
    logger = logging.getLogger("bitsandbytes")
    monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setattr("sys.argv", ["lapora", "tasks"])
    with pytest.raises(SystemExit):
        run_command_line()
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("no kernels")
    assert not caplog.records
