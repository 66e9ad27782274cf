"""Adapters on the Hub, through huggingface_hub's own client and a stand-in server; no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub.constants as constants
import pytest
from transformers import AutoTokenizer

from hub_server import commit_of, running_hub
from lapora.config import ModelSettings
from lapora.errors import AdapterError, DataError, UsageError
from lapora.models.adapter import is_hub_id, local_model, read_adapter
from lapora.report.card import posterior_section, with_section
from lapora.storage.saved import SavedPosterior
from lapora.workflows import push as push_module
from tiny_adapter import command, fit_tiny, json_lines, make_adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = make_adapter(tmp_path_factory.mktemp("hub"))
    fit_tiny(folder, prior_method="averaged")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def put(server, folder, repository="anna/farm", **more: bytes) -> None:
    files = {file.name: file.read_bytes() for file in (folder / "adapter").iterdir() if file.is_file()}
    server.repositories[repository] = [{**files, **{name.replace("__", "."): text for name, text in more.items()}}]


def run_of(name: str = "default", nll: float = 1.5, **more: str) -> str:
    """A line of ``eval --output``."""
    results = [
        {"method": "map", "accuracy": 0.5, "ece": 0.25, "nll": nll, "brier": 0.75},
        {"method": "laplace", "name": name, "link": "mc-joint", "accuracy": 0.5, "ece": 0.2, "nll": 1.2, "brier": 0.7},
    ]
    return json.dumps({"task": "tiny", "split": "validation", "n": 12, "results": results, **more}) + "\n"


def test_the_adapter_alone_is_fetched_and_gives_what_the_folder_gives(hub, made, tmp_path, monkeypatch, capfdbinary):
    put(hub, made, pytorch_model__bin=b"large")
    data = ["--data", made / "task.yaml", "--data-dir", made / "data", "--device", "cpu"]
    status, _, errors = command(monkeypatch, capfdbinary, "fit", "anna/farm", *data)
    assert status == 2 and "--output-dir" in errors
    there = ["--output-dir", tmp_path / "out", "--device", "cpu"]
    status, _, errors = command(monkeypatch, capfdbinary, "fit", "anna/farm", *data, "--output-dir", tmp_path / "out")
    assert status == 0, errors
    assert not any("pytorch_model.bin" in asked for asked in hub.asked)
    rows = b"".join(json_lines(5))
    status, found, errors = command(monkeypatch, capfdbinary, "predict", "anna/farm", *there, stdin=rows)
    assert status == 0, errors
    _, expected, _ = command(monkeypatch, capfdbinary, "predict", made / "adapter", "--device", "cpu", stdin=rows)
    assert found == expected and found.count(b"\n") == 5


def test_what_is_pushed_is_found_again(hub, made, tmp_path, monkeypatch, capfdbinary):
    scores = tmp_path / "scores.jsonl"
    scores.write_text(run_of())
    status, out, errors = command(
        monkeypatch, capfdbinary, "push", made / "adapter", "anna/fresh", "--private", "--scores", scores
    )
    assert status == 0 and not out, errors
    assert "anna/fresh" in hub.private
    files = hub.files("anna/fresh")
    assert {"adapter_config.json", "adapter_model.safetensors", "laplace/default/factors.safetensors"} <= set(files)
    assert json.loads(files["laplace/default/posterior.json"])["data"]["data_dir"] is None
    card = files["README.md"].decode()
    assert "| map | 0.500 | 0.250 | 1.500 | 0.750 |" in card and card.count("lapora default: begin") == 1

    rows = b"".join(json_lines(5))
    status, found, errors = command(monkeypatch, capfdbinary, "predict", "anna/fresh", "--device", "cpu", stdin=rows)
    assert status == 0, errors
    _, expected, _ = command(monkeypatch, capfdbinary, "predict", made / "adapter", "--device", "cpu", stdin=rows)
    assert found == expected

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.asked)
    status, out, _ = command(monkeypatch, capfdbinary, "inspect", "anna/fresh", "--json")
    assert status == 0 and json.loads(out)["structure"] == "kron" and len(hub.asked) == before


def test_the_tokenizer_is_pushed_whole(hub, tmp_path, monkeypatch, capfdbinary):
    folder = make_adapter(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = "the {{ messages[0]['content'] }} is "
    tokenizer.save_pretrained(folder / "adapter")
    beside = ("vocab.json", "merges.txt", "spiece.model", "added_tokens.json", "additional_chat_templates/tools.jinja")
    for name in beside:
        (folder / "adapter" / name).parent.mkdir(exist_ok=True)
        (folder / "adapter" / name).write_bytes(b"{}")
    fit_tiny(folder, chat_template=True)
    assert command(monkeypatch, capfdbinary, "push", folder / "adapter", "anna/chat")[0] == 0
    pushed = hub.files("anna/chat")
    assert {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json", *beside} <= set(pushed)
    rows = b"".join(json_lines(5))
    status, found, errors = command(monkeypatch, capfdbinary, "predict", "anna/chat", "--device", "cpu", stdin=rows)
    assert status == 0, errors
    _, expected, _ = command(monkeypatch, capfdbinary, "predict", folder / "adapter", "--device", "cpu", stdin=rows)
    assert found == expected

    for name in ("chat_template.jinja", "vocab.json"):  # as an earlier version pushed it
        del pushed[name]
    pushed["tokenizer_config.json"] += b"\n"
    assert command(monkeypatch, capfdbinary, "push", folder / "adapter", "anna/chat")[0] == 0
    again = hub.files("anna/chat")
    assert {"chat_template.jinja", "vocab.json"} <= set(again) and again["tokenizer_config.json"].endswith(b"\n")


def test_the_scores_on_the_card_are_those_of_the_posterior(hub, made, tmp_path, monkeypatch, capfdbinary):
    monkeypatch.chdir(made)
    scores = tmp_path / "scores.jsonl"
    other = run_of(nll=5.5, adapter="/elsewhere/adapter") + run_of("other", 6.5, adapter=str(made / "adapter"))
    pushing = ("push", made / "adapter", "anna/scored", "--scores", scores)
    for located in ("adapter", f"{made}/data/../adapter/"):
        scores.write_text(run_of(nll=3.5, adapter=located) + run_of(nll=4.5, adapter=located) + other)
        status, _, errors = command(monkeypatch, capfdbinary, *pushing)
        assert status == 0, errors
        assert "| map | 0.500 | 0.250 | 4.500 | 0.750 |" in hub.files("anna/scored")["README.md"].decode()
    commits = len(hub.repositories["anna/scored"])
    scores.write_text(other + run_of(nll=7.5, adapter="\0"))
    status, _, errors = command(monkeypatch, capfdbinary, *pushing)
    assert status == DataError.exit_status and len(hub.repositories["anna/scored"]) == commits
    assert f"no run of posterior default of {made / 'adapter'}" in errors
    assert "scores.jsonl:1 (/elsewhere/adapter: default), scores.jsonl:2" in errors
    assert f"lapora eval {made / 'adapter'} --output {scores}" in errors


def test_the_scores_on_the_card_are_of_the_same_fit_and_prior(hub, tmp_path, monkeypatch, capfdbinary):
    folder = make_adapter(tmp_path)
    fit_tiny(folder, prior_method="averaged")
    scores = tmp_path / "scores.jsonl"
    scoring = ("eval", folder / "adapter", "--output", scores, "--device", "cpu")
    assert command(monkeypatch, capfdbinary, *scoring)[0] == 0
    pushing = ("push", folder / "adapter", "anna/changed", "--scores", scores)
    assert command(monkeypatch, capfdbinary, *pushing)[0] == 0
    assert " rows of validation:" in hub.files("anna/changed")["README.md"].decode()
    tuning = ("tune-prior", folder / "adapter", "--method", "marglik", "--device", "cpu")
    assert command(monkeypatch, capfdbinary, *tuning)[0] == 0
    commits = len(hub.repositories["anna/changed"])
    status, _, errors = command(monkeypatch, capfdbinary, *pushing)
    assert status == DataError.exit_status and len(hub.repositories["anna/changed"]) == commits
    assert (
        f"scores.jsonl:1 scored another fit or prior of posterior default; score this one with `lapora eval {folder}"
        in errors.replace("\n", " ")
    )
    assert command(monkeypatch, capfdbinary, *scoring)[0] == 0
    assert command(monkeypatch, capfdbinary, *pushing)[0] == 0


def test_a_repository_with_another_configuration_is_refused(hub, made, monkeypatch, capfdbinary):
    config = json.loads((made / "adapter" / "adapter_config.json").read_text())
    put(hub, made, adapter_config__json=json.dumps({**config, "lora_alpha": 3, "lora_dropout": 0.3}).encode())
    status, _, errors = command(monkeypatch, capfdbinary, "push", made / "adapter", "anna/farm")
    assert status == 4 and len(hub.repositories["anna/farm"]) == 1
    assert "another adapter_config.json" in errors and f"lora_alpha {config['lora_alpha']} then, 3 now" in errors
    assert "dropout" not in errors
    put(
        hub,
        made,
        "anna/moved",
        adapter_config__json=json.dumps({**config, "base_model_name_or_path": "owner/base"}).encode(),
    )
    assert command(monkeypatch, capfdbinary, "push", made / "adapter", "anna/moved")[0] == 0
    assert b"owner/base" in hub.files("anna/moved")["adapter_config.json"]


def test_a_card_that_was_edited_meanwhile_is_kept(hub, made, monkeypatch, capfdbinary):
    put(hub, made, README__md=b"# Farm\n")
    writing = push_module.with_section

    def edited_meanwhile(*arguments):
        hub.repositories["anna/farm"].append({**hub.files("anna/farm"), "README.md": b"# Farm, edited\n"})
        return writing(*arguments)

    monkeypatch.setattr(push_module, "with_section", edited_meanwhile)
    status, _, errors = command(monkeypatch, capfdbinary, "push", made / "adapter", "anna/farm")
    assert status == AdapterError.exit_status and "changed meanwhile, so nothing was uploaded" in errors
    assert hub.files("anna/farm")["README.md"] == b"# Farm, edited\n"
    monkeypatch.setattr(push_module, "with_section", writing)
    assert command(monkeypatch, capfdbinary, "push", made / "adapter", "anna/farm")[0] == 0
    assert hub.files("anna/farm")["README.md"].startswith(b"# Farm, edited\n")


def test_the_scores_of_an_adapter_on_the_hub(hub, made, tmp_path, monkeypatch, capfdbinary):
    put(hub, made)
    out, scores = tmp_path / "out", tmp_path / "scores.jsonl"
    shutil.copytree(made / "adapter" / "laplace", out / "laplace")
    scores.write_text(run_of(adapter="anna/farm") + run_of(nll=2.5, adapter="anna/other"))
    pushing = ("push", "anna/farm", "anna/farm", "--output-dir", out, "--scores", scores)
    status, _, errors = command(monkeypatch, capfdbinary, *pushing)
    assert status == 0, errors
    assert "| map | 0.500 | 0.250 | 1.500 | 0.750 |" in hub.files("anna/farm")["README.md"].decode()


def test_a_task_with_a_lone_surrogate_is_pushed(hub, tmp_path, monkeypatch, capfdbinary):
    folder = make_adapter(tmp_path)
    with (folder / "task.yaml").open("a") as stream:
        stream.write('dataset_name: "caf\\ud800é"\n')
    fit_tiny(folder)
    status, _, errors = command(monkeypatch, capfdbinary, "push", folder / "adapter", "anna/odd")
    assert status == 0, errors
    pushed = json.loads(hub.files("anna/odd")["laplace/default/posterior.json"])
    assert pushed["task"]["dataset_name"] == "caf\ud800é"


def test_a_second_push_replaces_its_section_and_keeps_the_card(hub, made, monkeypatch, capfdbinary):
    put(hub, made, README__md=b"---\nlicense: mit\n---\n# Farm\n\nWritten by hand.\n")
    for _ in range(2):
        assert command(monkeypatch, capfdbinary, "push", made / "adapter", "anna/farm")[0] == 0
    card = hub.files("anna/farm")["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n---\n# Farm\n\nWritten by hand.\n")
    assert card.count("## Calibrated probabilities") == 1
    first, second = hub.repositories["anna/farm"][1:]
    assert first == second
    hub.repositories["anna/farm"][-1]["adapter_model.safetensors"] = b"other weights"
    status, _, errors = command(monkeypatch, capfdbinary, "push", made / "adapter", "anna/farm")
    assert status == 4 and "another adapter" in errors
    assert len(hub.repositories["anna/farm"]) == 3


def test_the_card_of_a_branch_has_the_branch_in_its_command(made):
    posterior = SavedPosterior(made / "adapter" / "laplace" / "default")
    section = posterior_section(posterior.manifest, posterior.prior, "default", "anna/farm", revision="v2")
    assert "lapora predict anna/farm rows.jsonl --revision v2 > predictions.jsonl" in section


def test_a_revision_is_a_commit(hub, made):
    put(hub, made)
    hub.repositories["anna/farm"].append({})
    model = ModelSettings("anna/farm", revision=commit_of("anna/farm", 0))
    assert (local_model(model).folder / "adapter_model.safetensors").is_file()
    with pytest.raises(AdapterError, match="no revision nowhere"):
        local_model(ModelSettings("anna/farm", revision="nowhere"))
    with pytest.raises(UsageError, match="--revision"):
        local_model(ModelSettings(str(made / "adapter"), revision="main"))


def test_what_the_hub_refuses_is_one_clear_line(hub, made, monkeypatch, capfdbinary):
    put(hub, made)
    with pytest.raises(AdapterError, match="not found on the Hub"):
        local_model(ModelSettings("anna/nothing"))
    hub.gated.add("anna/farm")
    with pytest.raises(AdapterError, match="gated"):
        local_model(ModelSettings("anna/farm"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE"):
        local_model(ModelSettings("anna/farm"))
    status, _, errors = command(monkeypatch, capfdbinary, "push", made / "adapter", "anna/farm")
    assert status == 3 and "error: anna/farm: HF_HUB_OFFLINE is set, so that nothing is uploaded; unset it" in errors


def test_a_folder_of_the_hubs_cache_is_named_as_one(made, tmp_path):
    cache = tmp_path / "models--anna--farm"
    shutil.copytree(made / "adapter", cache / "snapshots" / "abc")
    with pytest.raises(AdapterError, match=r"a folder of the Hub's cache; give the adapter's id, or .*snapshots/abc"):
        read_adapter(cache)


def test_the_environment_says_where_the_hub_is(made, tmp_path):
    with running_hub() as server:
        put(server, made)
        posterior = made / "adapter" / "laplace" / "default"
        server.files("anna/farm").update(
            {f"laplace/default/{file.name}": file.read_bytes() for file in posterior.iterdir()}
        )
        environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        ran = subprocess.run(
            [sys.executable, "-m", "lapora", "inspect", "anna/farm", "--json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["task"]["task"] == "tiny" and not ran.stderr


def test_what_is_a_hub_id(made, monkeypatch):
    monkeypatch.chdir(made.parent)
    assert is_hub_id("anna/farm")
    assert not any(is_hub_id(name) for name in ("farm", "./anna/farm", "/anna/farm", "a/b/c", f"{made.name}/adapter"))


def test_each_posterior_has_its_own_section():
    card = with_section(with_section("# Title\n", "one", "first"), "two", "second")
    again = with_section(card, "one", "other \\1 words")
    assert "first" not in again and "other \\1 words" in again and "second" in again and again.startswith("# Title")


def test_a_push_without_a_network_is_one_line(made, monkeypatch, capfdbinary):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    status, _, errors = command(monkeypatch, capfdbinary, "push", made / "adapter", "anna/farm")
    assert status == 3
    assert errors.splitlines()[-1] == "error: anna/farm: the Hub cannot be reached; check the network and try again"
