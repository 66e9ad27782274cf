"""Several processes of one run: the result of one, to round-off; and what happens where one of them fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_heads import make_head

HERE = Path(__file__).parent


def torchrun(count, *arguments, **how):
    """Start processes; the tests' own folder is where the worker's helpers are."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **how,
    )


def done(process, status=0):
    out, err = process.communicate(timeout=240)
    assert (process.returncode == 0) == (status == 0), err
    assert "the process group was not ended" not in err
    return out, err


@pytest.mark.slow
def test_sums_of_two_processes_are_those_of_one(tmp_path):
    file = tmp_path / "found.json"
    done(torchrun(2, HERE / "processes_worker.py", "sums", file))
    _all_agree(file)


@pytest.mark.slow
def test_sums_of_three_processes_are_those_of_one(tmp_path):
    file = tmp_path / "found.json"
    done(torchrun(3, HERE / "processes_worker.py", "sums", file))
    _all_agree(file)


def _all_agree(file):
    found = json.loads(file.read_text())
    assert len(found) == 36
    for name, case in found.items():
        assert case["agreed"], name
        # Llama's norm works in float32 whatever the model runs in.
        tolerance = 1e-10 if "classifier" in name else 1e-5
        assert case["error"] < (1e-4 if "sketched" in name else tolerance), (name, case)
        assert case["logits"] < tolerance and case["log_likelihood"] < tolerance, (name, case)


@pytest.fixture
def adapter(demo, tmp_path):
    shutil.copytree(demo / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def task_of(demo):
    return ["--data", demo / "farm.yaml", "--data-dir", demo / "data"]


def commands(demo, adapter, name, lines):
    """fit, tune-prior, eval and predict, with their outputs beside the posterior."""
    folder = adapter / "laplace" / name
    scored = ["--limit", 47, "--methods", "constant,map,temperature,laplace", "--json"]
    return json.dumps(
        [
            [str(part) for part in command]
            for command in (
                ["fit", adapter, *task_of(demo), "--name", name],
                ["tune-prior", adapter, "--name", name, "--limit", 51],
                ["eval", adapter, "--name", name, *scored, "--output", f"{folder}.eval"],
                [
                    "predict",
                    adapter,
                    lines,
                    "--name",
                    name,
                    "--on-error",
                    "report",
                    "--output",
                    f"{folder}.predictions",
                ],
            )
        ]
    )


@pytest.mark.slow
def test_the_commands_by_three_processes(demo, adapter, tmp_path):
    """Beside what one process says. Of the lines one is bad, and they do not divide by three."""
    rows = [json.loads(line) for line in (demo / "data" / "validation.jsonl").read_text().splitlines()[:301]]
    lines = [json.dumps({"story": row["story"], "name": row["name"], "id": index}) for index, row in enumerate(rows)]
    lines[100] = "no json"
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    worker = HERE / "processes_worker.py"
    _, said = done(torchrun(3, worker, "commands", commands(demo, adapter, "many", file)))
    alone = subprocess.run(
        [sys.executable, worker, "commands", commands(demo, adapter, "alone", file)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(_spoken(said)) == len(_spoken(alone.stderr)), "the first process alone speaks"

    found, expected = (load_file(adapter / "laplace" / name / "factors.safetensors") for name in ("many", "alone"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "eigenvalues" in name:
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.max()))
    priors = [
        json.loads((adapter / "laplace" / name / "posterior.json").read_text())["prior"] for name in ("many", "alone")
    ]
    assert priors[0]["method"] == "averaged"
    assert priors[0]["precision"] == pytest.approx(priors[1]["precision"], rel=1e-3)
    assert priors[0]["averaged"]["rows"] == priors[1]["averaged"]["rows"]

    scores = [json.loads((adapter / "laplace" / f"{name}.eval").read_text()) for name in ("many", "alone")]
    assert scores[0]["rows"] == scores[1]["rows"] and scores[0]["n"] == 47
    for result, other in zip(scores[0]["results"], scores[1]["results"], strict=True):
        assert result["method"] == other["method"]
        assert result["nll"] == pytest.approx(other["nll"], abs=1e-4)

    answers = [
        [json.loads(line) for line in (adapter / "laplace" / f"{name}.predictions").read_text().splitlines()]
        for name in ("many", "alone")
    ]
    assert [record["index"] for record in answers[0]] == list(range(301))
    for record, other in zip(*answers, strict=True):
        assert record.keys() == other.keys() and record.get("id") == other.get("id")
        if "error" not in record:
            assert record["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
    assert sum("error" in record for record in answers[0]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["gaussian", "multilabel", "preference"])
def test_other_likelihoods_by_two_processes(likelihood, tmp_path):
    """The noise of a regression is measured on all rows; the two texts of a pair stay together."""
    folder = make_head(tmp_path, likelihood)
    lines = folder / "data" / "validation.jsonl"
    data = ["--data", folder / "task.yaml", "--data-dir", folder / "data"]
    others = ["--ood", folder / "task.yaml", "--ood-data-dir", folder / "data", "--methods", "map,temperature,laplace"]

    def steps(name):
        output = folder / f"{name}.predictions"
        each = (
            ["fit", folder / "adapter", *data, "--name", name],
            ["tune-prior", folder / "adapter", "--name", name],
            ["predict", folder / "adapter", lines, "--name", name, "--output", output],
            ["eval", folder / "adapter", "--name", name, *others, "--output", folder / f"{name}.eval"],
        )
        return json.dumps([[str(part) for part in command] for command in each])

    worker = HERE / "processes_worker.py"
    done(torchrun(2, worker, "commands", steps("many")))
    subprocess.run([sys.executable, worker, "commands", steps("alone")], capture_output=True, check=True)
    manifests = [
        json.loads((folder / "adapter" / "laplace" / name / "posterior.json").read_text()) for name in ("many", "alone")
    ]
    noise = [manifest["noise_variance"] or [] for manifest in manifests]
    assert noise[0] == pytest.approx(noise[1], rel=1e-5) and bool(noise[0]) == (likelihood == "gaussian")
    assert manifests[0]["prior"]["precision"] == pytest.approx(manifests[1]["prior"]["precision"], rel=1e-3)
    found, expected = (
        [json.loads(line) for line in (folder / f"{name}.predictions").read_text().splitlines()]
        for name in ("many", "alone")
    )
    assert len(found) == len(expected) == 12
    for record, other in zip(found, expected, strict=True):
        assert record.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, (dict, float)):
                assert record[key] == pytest.approx(value, abs=1e-4), key
    scores = [json.loads((folder / f"{name}.eval").read_text()) for name in ("many", "alone")]
    for result, other in zip(*([*each["results"], *each["ood"][0]["results"]] for each in scores), strict=True):
        for key, value in other.items():
            if isinstance(value, float):
                assert result[key] == pytest.approx(value, abs=1e-3), key


def _spoken(stderr):
    return [line for line in stderr.splitlines() if "kernels-community" not in line]  # bitsandbytes, as it is imported


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all(demo, adapter):
    before = (adapter / "laplace" / "default" / "posterior.json").read_bytes()
    running = torchrun(
        2, "-m", "lapora", "fit", adapter, *task_of(demo), "--overwrite", "--save-every", "0", "--batch-size", "1"
    )
    partial = adapter / "laplace" / ".default.partial"
    deadline = time.monotonic() + 120
    while not (partial.is_dir() and len(list(partial.glob("pass-0*.safetensors"))) == 2):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = done(running, status=1)
    assert "Signal 9" in err
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child), 0)
    assert (adapter / "laplace" / "default" / "posterior.json").read_bytes() == before
    # What every process had saved is gone on from, by as many processes.
    _, said = done(
        torchrun(2, "-m", "lapora", "fit", adapter, *task_of(demo), "--overwrite", "--resume", "--batch-size", "1")
    )
    assert "resumed after" in said
    assert not partial.exists()


@pytest.mark.slow
def test_an_error_is_said_once(demo, adapter):
    _, err = done(torchrun(2, "-m", "lapora", "fit", adapter, *task_of(demo)), status=1)
    assert err.count("error: ") == 1 and "exists already" in err
    assert "exitcode  : 4" in err


@pytest.mark.slow
def test_accelerate_launches_it_too(demo, adapter):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "-m",
        "lapora",
    ]
    done = subprocess.run(
        [*map(str, [*command, "fit", adapter, *task_of(demo), "--name", "two", "--device", "cpu"])],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("posterior over") == 1


@pytest.mark.slow
def test_a_bad_line_that_stops_the_run_is_named_once(demo, adapter, tmp_path):
    rows = [json.loads(line) for line in (demo / "data" / "validation.jsonl").read_text().splitlines()[:80]]
    lines = [json.dumps({"story": row["story"], "name": row["name"]}) for row in rows]
    lines[70] = "no json"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    out, err = done(torchrun(2, "-m", "lapora", "predict", adapter, tmp_path / "rows.jsonl"), status=1)
    assert err.count("error: ") == 1 and "line 71" in err and "exitcode  : 5" in err
    assert [json.loads(line)["index"] for line in out.splitlines()] == list(range(70))


@pytest.mark.slow
def test_a_damaged_share_of_saved_sums_is_named(demo, adapter):
    options = ["fit", adapter, *task_of(demo), "--name", "cut", "--batch-size", "1", "--save-every", "0"]
    running = torchrun(2, "-m", "lapora", *options)
    partial = adapter / "laplace" / ".cut.partial"
    while not (partial.is_dir() and len(list(partial.glob("pass-0*.safetensors"))) == 2):
        assert running.poll() is None
        time.sleep(0.01)
    running.terminate()  # which torchrun hands on to its processes
    running.communicate(timeout=60)
    (partial / "pass-0-process-1.safetensors").write_bytes(b"damaged")
    _, err = done(torchrun(2, "-m", "lapora", *options, "--resume"), status=1)
    assert err.count("error: ") == 1 and "pass-0-process-1" in err
