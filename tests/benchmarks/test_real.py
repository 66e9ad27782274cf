"""The experiments on real models: each command once, adapters without skill apart, tables of what there is so far."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from benchmarks.real.__main__ import steps
from benchmarks.real.commands import Commands
from benchmarks.real.experiments import FULL, QUICK, Experiment
from benchmarks.real.run import Run
from benchmarks.real.tables import markdown, write_csv

EXPERIMENT = Experiment("small", "smollm2", "source5", 10, 2, 1e-3, 16, 3, 3)


def result(accuracy, **more):
    return {"accuracy": accuracy, "nll": 1.0, "ece": 0.1, "difference_to_map": None} | more


def evaluation(plain):
    methods = [result(0.2, method="constant"), result(plain, method="map"), result(plain, method="laplace", name="m20")]
    return {"n": 100, "results": methods}


@pytest.fixture
def shared(tmp_path):
    folder = tmp_path / "shared" / "data" / "source5"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": str(n), "label": 0}) + "\n" for n in range(9))
        )
    return tmp_path / "shared"


def runs_of(tmp_path, shared, records, seeds=1):
    file = tmp_path / "commands.jsonl"
    file.write_text(
        "".join(json.dumps({"key": f"small {key}", "result": value}) + "\n" for key, value in records.items())
    )
    commands = Commands(file, threads=1)
    return [Run(commands, EXPERIMENT, seed, "base", shared, tmp_path / "out") for seed in range(seeds)]


def test_a_command_runs_once_even_if_two_threads_ask_for_it(tmp_path):
    commands = Commands(tmp_path / "commands.jsonl", threads=1)
    script = (
        f"import json, time; open({str(tmp_path / 'runs')!r}, 'a').write('x'); time.sleep(.2); print(json.dumps(7))"
    )
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: commands.run("step", "-c", script, prints_json=True), range(2)))
    assert [each["result"] for each in both] == [7, 7]
    assert (tmp_path / "runs").read_text() == "x"
    assert Commands(tmp_path / "commands.jsonl", threads=1).run("step")["result"] == 7


def test_a_command_that_fails_is_named_and_not_recorded(tmp_path):
    commands = Commands(tmp_path / "commands.jsonl", threads=1)
    with pytest.raises(RuntimeError, match=r"(?s)step: -c .*boom"):
        commands.run("step", "-c", "raise SystemExit('boom')")
    assert "step" not in commands.records


def test_each_run_has_the_first_rows_of_its_data(tmp_path, shared):
    (run,) = runs_of(tmp_path, shared, {})
    assert [len((run.data / f"{split}.jsonl").read_text().splitlines()) for split in ("train", "validation")] == [3, 3]


def test_an_adapter_without_skill_is_listed_and_nothing_else_is_done(tmp_path, shared):
    seeds = runs_of(tmp_path, shared, {"0 train": None, "0 fit screen": None, "0 eval screen": evaluation(0.27)}, 2)
    for step in steps([seeds]):
        step()  # would run commands that fail
    text = "\n".join(markdown([seeds]))
    assert "No skill" in text and "| small | 100 | 0.200 | 0.270 |" in text and "MC dropout" not in text


def test_steps_of_one_run_at_the_same_time_wait_for_its_scores(tmp_path, shared, monkeypatch):
    """Costs are those of the posteriors, which another thread may be fitting."""
    done = []
    screened = {"0 train": None, "0 fit screen": None, "0 eval screen": evaluation(0.9)}
    (run,) = runs_of(tmp_path, shared, screened)

    def fit():
        if "fitted" not in done:
            time.sleep(0.2)
            done.append("fitted")

    monkeypatch.setattr(run, "_fit", fit)
    monkeypatch.setattr(run, "_lapora", lambda step, *_: None)
    monkeypatch.setattr(run, "_module", lambda name, *_: done.append(name))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda step: step(), steps([[run]])))
    assert done == ["fitted", "tfb", "tfb", "costs"]


def test_tables_have_means_over_seeds_and_costs_of_the_first(tmp_path, shared):
    records = {
        "0 eval": evaluation(0.6),
        "1 eval": evaluation(0.8),
        "0 tfb": {"n": 100, "accuracy": 0.5, "nll": 1.0, "ece": 0.1},
        "0 costs": {"map": {"seconds": 1.0, "memory": 1.0}, "laplace m20": {"seconds": 2.5, "memory": 1.25}},
    }
    seeds = runs_of(tmp_path, shared, records, 2)
    text = "\n".join(markdown([seeds]))
    assert "small: 100 rows scored, 2 seeds" in text
    assert "| MAP | 0.700 ± 0.141 |" in text and "| TFB | 0.500 |" in text
    assert "| Laplace, averaged, 20 rows | 0.700 ± 0.141 | 1.000 ± 0.000 |  | 0.100 ± 0.000 | 2.50, 1.25 |" in text
    write_csv(tmp_path / "results.csv", [seeds])
    assert (tmp_path / "results.csv").read_text().splitlines()[2] == "small,0,MAP,0.6000,1.0000,0.1000"


def test_names_of_experiments_are_unique_and_every_base_has_figures():
    for experiments in (FULL, QUICK):
        assert len({each.name for each in experiments}) == len(experiments)
    assert {each.base for each in FULL} == {each.base for each in FULL if each.drawn}
    assert all(each.scored >= 2 * 20 for each in (*FULL, *QUICK)), "rows for the tuned posterior and as many to score"
