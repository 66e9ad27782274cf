"""The commands on the demo's own files: in this process, and in a real one where the process is what is tested."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest

from tiny_adapter import command


@pytest.fixture
def lapora(monkeypatch, capfdbinary):
    """Run the command line in this process, on real file descriptors."""

    def run(*arguments, stdin: str = "") -> subprocess.CompletedProcess[str]:
        status, out, errors = command(monkeypatch, capfdbinary, *arguments, stdin=stdin.encode())
        return subprocess.CompletedProcess(arguments, status, out.decode(), errors)

    return run


@pytest.fixture(scope="module")
def lines(demo) -> str:
    return "".join((demo / "data" / "validation.jsonl").read_text().splitlines(keepends=True)[:9])


def test_demo_shows_map_overconfident_and_laplace_better(lapora, demo):
    done = lapora("eval", demo / "adapter", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["task"] == "farm" and record["n"] + record["excluded"] == 600
    by_method = {entry["method"]: entry for entry in record["results"]}
    assert by_method["laplace"]["nll"] < by_method["map"]["nll"]
    assert by_method["laplace"]["ece"] < by_method["map"]["ece"]
    assert by_method["laplace"]["accuracy"] > by_method["constant"]["accuracy"] + 0.1


def test_tune_prior_gives_the_same_again_and_says_what_was_learned(lapora, demo, tmp_path):
    shutil.copytree(demo / "adapter", tmp_path / "adapter")
    before = json.loads(lapora("inspect", demo / "adapter", "--json").stdout)["prior"]
    done = lapora("tune-prior", tmp_path / "adapter", "--json")
    assert json.loads(done.stdout) == before
    assert "averaged over prior precisions" in done.stderr
    alone = lapora("tune-prior", tmp_path / "adapter", "--method", "marglik", "--prior", "kind", "--json")
    assert set(json.loads(alone.stdout)["precision"]) == {"A", "B"}


def test_predict_in_a_pipe(lapora, demo, lines):
    done = lapora("predict", demo / "adapter", "--logits", "--abstain-below", 0.7, stdin=lines)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["index"] for record in records] == list(range(9))
    for record in records:
        assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert record["confidence"] == max(record["probabilities"].values())
        assert record["abstained"] == (record["confidence"] < 0.7)
        assert len(record["logits"]["covariance"]) == 2
    assert lapora("predict", demo / "adapter", "--logits", "--abstain-below", 0.7, stdin=lines).stdout == done.stdout


def test_batch_size_changes_nothing(lapora, demo, lines):
    one, nine = (
        [
            json.loads(line)
            for line in lapora("predict", demo / "adapter", "--batch-size", n, stdin=lines).stdout.splitlines()
        ]
        for n in (1, 9)
    )
    for first, second in zip(one, nine, strict=True):
        assert first["probabilities"] == pytest.approx(second["probabilities"], abs=1e-5)


def test_bad_lines(lapora, demo, lines):
    good = lines.splitlines()[0]
    text = f'{good}\n{{"id": 7, "name": "anna"}}\n\n{good}\nnot json\n'
    stopped = lapora("predict", demo / "adapter", stdin=text)
    assert stopped.returncode == 5
    assert len(stopped.stdout.splitlines()) == 1
    assert "line 2" in stopped.stderr and "story" in stopped.stderr
    reported = lapora("predict", demo / "adapter", "--on-error", "report", stdin=text)
    assert reported.returncode == 5
    records = [json.loads(line) for line in reported.stdout.splitlines()]
    assert ["error" in record for record in records] == [False, True, False, True]
    assert records[1]["id"] == 7


def test_a_row_that_was_cut_says_so(lapora, demo, lines):
    row = json.loads(lines.splitlines()[0])
    long_text = json.dumps({"text": "the cows " * 60 + "is anna on the farm ? answer :"})
    done = lapora("predict", demo / "adapter", stdin=f"{json.dumps(row)}\n{long_text}\n")
    assert done.returncode == 0, done.stderr
    assert ["truncated" in json.loads(line) for line in done.stdout.splitlines()] == [False, True]


def test_a_chat_template_wraps_prompts_in_fit_and_predict(lapora, demo, lines, tmp_path):
    shutil.copytree(demo / "adapter", tmp_path / "adapter")
    data = ("--data", demo / "farm.yaml", "--data-dir", demo / "data")
    plain = lapora("fit", tmp_path / "adapter", *data, "--name", "chat", "--chat-template")
    assert plain.returncode == 5 and "chat template" in plain.stderr
    for file in (demo / "base").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} indeed {% endif %}"
    )
    done = lapora("fit", tmp_path / "adapter", *data, "--name", "chat", "--chat-template")
    assert done.returncode == 0, done.stderr
    chat, bare = (
        [json.loads(line)["map_probabilities"]["yes"] for line in run.stdout.splitlines()]
        for run in (
            lapora("predict", tmp_path / "adapter", "--name", "chat", stdin=lines),
            lapora("predict", tmp_path / "adapter", stdin=lines),
        )
    )
    assert len(chat) == len(bare) == 9 and all(abs(a - b) > 1e-6 for a, b in zip(chat, bare, strict=True))


@pytest.mark.slow
def test_a_reader_that_goes_ends_the_run_quietly(demo, lines):
    started = [sys.executable, "-m", "lapora", "predict", str(demo / "adapter"), "--batch-size", "1"]
    with subprocess.Popen(started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(lines.encode() * 40)
        process.stdin.close()
        assert process.stdout.readline()
        process.stdout.close()
        assert (process.wait(timeout=120), process.stderr.read()) == (0, b"")


@pytest.mark.slow
def test_interruption_leaves_whole_lines(demo, lines):
    started = [sys.executable, "-m", "lapora", "predict", str(demo / "adapter"), "--batch-size", "1"]
    # A test runner in the background ignores SIGINT, and its children would too.
    restore = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=restore
    ) as process:
        process.stdin.write(lines.encode())
        process.stdin.flush()
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.decode().strip() == "error: interrupted"
    for line in (first + output).splitlines():
        json.loads(line)


def test_an_output_that_cannot_be_written(lapora, demo, lines, tmp_path):
    done = lapora("predict", demo / "adapter", "--output", tmp_path / "nowhere" / "out.jsonl", stdin=lines)
    assert done.returncode == 5 and "cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_another_tasks_answers_are_refused(lapora, demo, tmp_path):
    (tmp_path / "other.yaml").write_text((demo / "farm.yaml").read_text().replace("- 'no'", "- never"))
    done = lapora("eval", demo / "adapter", "--data", tmp_path / "other.yaml")
    assert done.returncode == 4 and "never" in done.stderr and "answers no, yes then" in done.stderr


def test_empty_input_gives_empty_output(lapora, demo):
    done = lapora("predict", demo / "adapter", stdin="")
    assert (done.returncode, done.stdout) == (0, "")


def test_links_agree_with_eval(lapora, demo):
    done = lapora("eval", demo / "adapter", "--json", "--link", "probit", "--link", "mc-indep", "--link", "bridge")
    assert [entry.get("link") for entry in json.loads(done.stdout)["results"]][2:] == ["probit", "mc-indep", "bridge"]


def test_tasks_check_shows_prompts_tokens_and_labels(lapora, demo):
    done = lapora(
        "tasks",
        "--check",
        demo / "farm.yaml",
        "--adapter",
        demo / "adapter",
        "--data-dir",
        demo / "data",
        "--limit",
        50,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert sum(report["labels"].values()) == report["rows"] == 50
    assert report["answer_tokens"]["yes"]["token"] == "yes"
    assert report["examples"][0]["text"].endswith("on the farm ? answer :")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("fit", "nowhere", "--data", "boolq"), 3, "no such directory"),
        (("fit", "nowhere"), 2, "--data"),
        (("fit", "nowhere", "--weight-sharing", "no"), 2, "expand"),
        (("inspect", "nowhere"), 4, "nowhere: no such directory"),
        (("tasks", "nothing"), 2, "boolq"),
        (("predict", "nowhere", "--lnik", "map"), 2, "--lnik"),
        (("eval", "nowhere", "--link", "no"), 2, "mc-joint"),
    ],
)
def test_errors_are_one_line_with_their_status(lapora, arguments, status, words):
    done = lapora(*arguments)
    assert done.returncode == status
    assert words in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_posterior_of_other_weights_is_refused(lapora, demo, tmp_path):
    manifest = demo / "adapter" / "laplace" / "default" / "posterior.json"
    text = manifest.read_text()
    try:
        manifest.write_text(text.replace(json.loads(text)["adapter"], "0" * 64))
        assert lapora("predict", demo / "adapter", stdin="").returncode == 4
    finally:
        manifest.write_text(text)


def test_damaged_factors_are_refused(lapora, demo):
    factors = demo / "adapter" / "laplace" / "default" / "factors.safetensors"
    whole = factors.read_bytes()
    try:
        factors.write_bytes(whole[:-9] + bytes([whole[-9] ^ 255]) + whole[-8:])
        done = lapora("predict", demo / "adapter", stdin="")
        assert done.returncode == 4 and "damaged" in done.stderr
    finally:
        factors.write_bytes(whole)


def test_uncovered_methods_are_refused_by_name(lapora, demo, tmp_path):
    config = json.loads((demo / "adapter" / "adapter_config.json").read_text())
    for change, word in (({"peft_type": "ADALORA"}, "ADALORA"), ({"peft_type": "IA3"}, "IA3")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        done = lapora("fit", tmp_path, "--data", "boolq")
        assert done.returncode == 3 and word in done.stderr


def test_help_and_version_import_no_torch():
    code = "import sys, lapora.cli.app, lapora.report; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    shown = subprocess.run([sys.executable, "-m", "lapora", "--version"], capture_output=True, text=True, timeout=60)
    assert shown.stdout.startswith("lapora ")


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_large_tensors_are_aligned_to_pages_unless_the_user_says_no(given, expected):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {} if given is None else {"THP_MEM_ALLOC_ENABLE": given}
    script = (
        "import os, sys\n"
        "import lapora.cli.app\n"
        "lapora.cli.app.run = lambda: print(os.environ['THP_MEM_ALLOC_ENABLE'], 'torch' in sys.modules)\n"
        "from lapora.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [expected, "False"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [("tasks",), ("tasks", "boolq"), ("--help",), ("--version",)])
def test_a_full_disk_is_an_error_and_a_closed_pipe_is_not(words):
    program = [sys.executable, "-m", "lapora", *words]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (5, "error: the output cannot be written (No space left on device)\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
