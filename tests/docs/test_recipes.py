"""Every program and command of the start page and of the recipes, as it stands there, on the demo's adapter."""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from lapora.cli.app import app
from lapora.errors import GateError
from pages import blocks, copy_demo, lapora_lines, shell, titled
from tiny_adapter import make_adapter, make_rows

ROOT = Path(__file__).parents[2]
STORY = "anna keeps the cows with boris . in the morning anna went to the barn ."


@pytest.fixture
def folder(demo, tmp_path, monkeypatch) -> Path:
    copy_demo(demo, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_start_page(folder, capsys):
    """All but the installation and the demo itself, which other tests run; its one line of shell by hand."""
    install, demo_line, *rest = blocks("start.md", "sh")
    assert "pip install" in install and demo_line.strip() == "lapora demo --offline"
    ran = 0
    for block in rest:
        for line in block.splitlines():
            if line.startswith("echo "):
                assert shell(line, folder).returncode == 0
        for arguments in lapora_lines(block):
            app(arguments, standalone_mode=False)
            found = capsys.readouterr()
            assert found.out or arguments[0] in ("fit", "tune-prior"), arguments
            if arguments[0] == "predict":
                answer = json.loads(found.out)
                assert answer["id"] == 1 and answer["prediction"] == "yes"
            ran += 1
    assert ran == 6


def test_programs_of_the_reference_pages(folder, capsys):
    for page in ("format.md", "reference/python.md"):
        (program,) = blocks(page, "python")
        exec(compile(program, page, "exec"), {"__name__": page})
        assert capsys.readouterr().out


def test_finetune_trains_on_the_tokens_of_whole_answers(tmp_path):
    make_adapter(tmp_path)
    options = ["the cows", "boris is quiet"]
    rows = [{**row, "options": options[:: 1 - 2 * (number % 2)]} for number, row in enumerate(make_rows(6))]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = yaml.safe_load((tmp_path / "task.yaml").read_text()) | {"doc_to_choice": "{{options}}"}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    program = runpy.run_path(str(ROOT / "docs" / "recipes" / "finetune.py"))
    wanted = argparse.Namespace(data=str(tmp_path / "task.yaml"), data_dir=tmp_path / "data", limit=4, kind="causal")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    found, choices = program["training_rows"](wanted, tokenizer, 48)
    assert len(found) == 4 and choices == ()
    for row, trained in zip(rows, found, strict=False):
        prompt = tokenizer(f"{row['story']} ?")["input_ids"]
        answer = tokenizer(row["options"][row["label"]])["input_ids"]
        assert trained["ids"] == prompt + answer
        assert trained["labels"] == [-100] * len(prompt) + answer


@pytest.mark.slow
def test_fine_tune_then_calibrate(folder, capsys):
    Path("train.py").write_text(titled("recipes/peft.md", "train.py"))
    runpy.run_path("train.py")
    for arguments in lapora_lines(blocks("recipes/peft.md", "sh")[0]):
        app([*arguments, *(["--json"] if arguments[0] == "eval" else [])], standalone_mode=False)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    scores = {result["method"]: result for result in record["results"]}
    assert scores["laplace"]["nll"] < scores["map"]["nll"]


@pytest.mark.slow
def test_fine_tune_with_trl_then_calibrate(folder, capsys):
    pytest.importorskip("trl")
    Path("sft.py").write_text(titled("recipes/trl.md", "sft.py"))
    python, *commands = blocks("recipes/trl.md", "sh")[0].splitlines(keepends=True)
    done = shell(python, folder)
    assert done.returncode == 0, done.stderr
    assert "MAP {'no': " in done.stdout and "Laplace {'no': " in done.stdout
    for arguments in lapora_lines("".join(commands)):
        app([*arguments, *(["--json"] if arguments[0] == "eval" else [])], standalone_mode=False)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    scores = {result["method"]: result for result in record["results"]}
    assert scores["map"]["accuracy"] > 0.6
    assert scores["laplace"]["nll"] < scores["map"]["nll"]


@pytest.mark.slow
def test_a_reward_model(folder, capsys):
    pytest.importorskip("trl")
    Path("reward.py").write_text(titled("recipes/reward-model.md", "reward.py"))
    first, second = blocks("recipes/reward-model.md", "sh")
    python, *commands = first.splitlines(keepends=True)
    done = shell(python, folder)
    assert done.returncode == 0, done.stderr
    for arguments in lapora_lines("".join(commands)):
        app([*arguments, *(["--json"] if arguments[0] == "eval" else [])], standalone_mode=False)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    scores = {result["method"]: result for result in record["results"]}
    assert scores["map"]["accuracy"] > 0.6 and scores["laplace"]["nll"] <= scores["map"]["nll"] + 0.01
    done = shell(second.replace("lapora predict", f"{sys.executable} -m lapora predict"), folder)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["penalized_reward"] == pytest.approx(answer["reward"] - answer["deviation"])


@pytest.mark.slow
def test_shell_pipelines(folder):
    if shutil.which("jq") is None:
        pytest.skip("no jq")
    lines = Path("lapora-demo/data/validation.jsonl").read_text().splitlines(keepends=True)
    Path("lapora-demo/data/validation.jsonl").write_text("".join(lines[:80]))
    done = shell("\n".join(blocks("recipes/shell.md", "sh")), folder)
    assert done.returncode == 0, done.stderr
    confidences = [json.loads(line)["confidence"] for line in Path("to-label.jsonl").read_text().splitlines()]
    assert len(confidences) == 20 and confidences == sorted(confidences)
    sure, unsure = Path("answered.jsonl").read_text(), Path("unsure.txt").read_text()
    assert len(sure.splitlines()) + len(unsure.splitlines()) == 80
    assert [line.split(",")[0] for line in Path("answers.csv").read_text().splitlines()] == ["1", "2", "3", "4"]
    (posterior,) = map(json.loads, Path("posteriors.jsonl").read_text().splitlines())
    assert posterior["structure"] == "kron" and posterior["rows"] == 100
    assert Path("verdict").read_text().strip() in ("ship", "status 7")


def test_github_actions(folder, capsys):
    workflow = yaml.safe_load(titled("recipes/github-actions.md", ".github/workflows/calibration.yml"))
    steps = workflow["jobs"]["gate"]["steps"]
    shutil.copytree("lapora-demo/adapter", "adapter")
    shutil.copytree("lapora-demo/data", "data")
    shutil.copy("lapora-demo/farm.yaml", "task.yaml")
    ran = []
    for step in steps:
        for arguments in lapora_lines(step.get("run", "")):
            ran.append(arguments[0])
            app(arguments, standalone_mode=False)
    assert ran == ["fit", "tune-prior", "eval"]
    kept = steps[-1]["with"]["path"].split()
    assert steps[-1]["if"] == "always()" and kept == ["report.html", "results.jsonl"]
    assert all(Path(name).is_file() for name in kept)
    # The gate bites, and the report is there all the same: MAP's ECE is above this bound.
    Path("report.html").unlink()
    gate = [part.replace("ece>0.3", "map.ece>0.01") for part in lapora_lines(steps[-2]["run"])[0]]
    with pytest.raises(GateError):
        app(gate, standalone_mode=False)
    assert Path("report.html").is_file()


def test_a_parquet_file(folder, monkeypatch, capsys):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [json.loads(line) for line in Path("lapora-demo/data/validation.jsonl").read_text().splitlines()[:30]]
    rows[7]["story"] = None
    pq.write_table(pa.Table.from_pylist(rows), "rows.parquet")
    Path("score.py").write_text(titled("recipes/parquet.md", "score.py").replace("ROWS = 1024", "ROWS = 11"))
    (command,) = (block.strip() for block in blocks("recipes/parquet.md", "sh"))
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("score.py", run_name="__main__")
    assert ended.value.code == 5 and "1 bad line" in capsys.readouterr().err
    scored = pq.read_table("scored.parquet").to_pylist()
    assert [row["story"] for row in scored] == [row["story"] for row in rows]
    assert scored[7]["error"] and scored[7]["prediction"] is None
    good = [row for row in rows if row["story"]]
    Path("good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    capsys.readouterr()
    app(["predict", "lapora-demo/adapter", "good.jsonl"], standalone_mode=False)
    expected = [json.loads(line)["confidence"] for line in capsys.readouterr().out.splitlines()]
    found = [row["confidence"] for row in scored if row["story"]]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def service(folder, monkeypatch):
    pytest.importorskip("fastapi")
    Path("service.py").write_text(titled("recipes/fastapi.md", "service.py"))
    assert re.search(r"^ADAPTER=\S+ uvicorn service:app$", blocks("recipes/fastapi.md", "text")[0], flags=re.M)
    spec = importlib.util.spec_from_file_location("service", "service.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_service(service, monkeypatch, capsys):
    from fastapi.testclient import TestClient

    monkeypatch.setenv("ADAPTER", "lapora-demo/adapter")
    stories = [json.loads(line) for line in Path("lapora-demo/data/validation.jsonl").read_text().splitlines()[:24]]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stories))
    app(["predict", "lapora-demo/adapter", "rows.jsonl"], standalone_mode=False)
    expected = [json.loads(line)["confidence"] for line in capsys.readouterr().out.splitlines()]
    with TestClient(service.app) as client, concurrent.futures.ThreadPoolExecutor(8) as crowd:
        bad = crowd.submit(client.post, "/predict", json={"story": STORY})
        answers = list(crowd.map(lambda row: client.post("/predict", json=row), stories))
        assert [answer.status_code for answer in answers] == [200] * 24
        assert [answer.json()["confidence"] for answer in answers] == pytest.approx(expected, abs=1e-5)
        assert bad.result().status_code == 422 and "name" in bad.result().json()["detail"]
        worker = service.app.state.worker
    assert not worker._thread.is_alive()


def test_a_service_without_an_adapter_does_not_start(service, monkeypatch):
    from fastapi.testclient import TestClient

    from lapora.errors import AdapterError

    monkeypatch.setenv("ADAPTER", "nothing-here")
    with pytest.raises(AdapterError), TestClient(service.app):
        pass
