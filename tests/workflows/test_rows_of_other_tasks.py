"""Over-long rows of another task are rendered and truncated by that task, under every method of `eval`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from lapora.config import DataSettings, EvalSettings, ModelSettings
from lapora.workflows.evaluate import run_evaluation
from tiny_adapter import fit_tiny, make_adapter, make_rows

LENGTH = 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A fitted adapter with dropout, and a task of other fields and another prompt."""
    folder = make_adapter(tmp_path_factory.mktemp("tasks"))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.2}))
    task = yaml.safe_load((folder / "task.yaml").read_text())
    (folder / "task.yaml").write_text(yaml.safe_dump({**task, "truncate_field": "story", "max_length": LENGTH}))
    other = {
        "task": "other",
        "doc_to_text": "anna is {{note}} quiet ?",
        "doc_to_choice": ["no", "yes"],
        "doc_to_target": "{{ label }}",
        "truncate_field": "note",
    }
    (folder / "other.yaml").write_text(yaml.safe_dump(other))
    rows = [{"note": f"{row['story']} {row['story']}", "label": row["label"]} for row in make_rows(16, seed=9)]
    words = LENGTH - 4  # the prompt's other tokens
    short = [{**row, "note": " ".join(row["note"].split()[:words])} for row in rows]
    assert sum(len(row["note"].split()) > words for row in rows) > 4
    for name, content in (("long", rows), ("short", short)):
        (folder / name).mkdir()
        (folder / name / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    fit_tiny(folder)
    member = folder / "member"
    shutil.copytree(folder / "adapter", member, ignore=shutil.ignore_patterns("laplace"))
    from safetensors.torch import load_file, save_file

    weights = load_file(member / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(4)
    moved = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
    save_file(moved, member / "adapter_model.safetensors")
    return folder


def evaluated(folder, rows: str, **settings):
    data = DataSettings(task=str(folder / "other.yaml"), data_dir=folder / rows)
    methods = EvalSettings(
        methods=("map", "laplace", "temperature", "mc-dropout", "ensemble"),
        ensemble=(folder / "member",),
        dropout_samples=3,
        **settings,
    )
    return run_evaluation(ModelSettings(str(folder / "adapter"), device="cpu"), data, methods)


def test_eval_of_another_task(tiny):
    """A row that is cut gives what the row cut by hand gives, by every method."""
    long, short = (evaluated(tiny, rows) for rows in ("long", "short"))
    assert long.record["truncated"] > 0 and short.record["truncated"] == 0
    assert {each.method for each in long.predictions} == {"map", "laplace", "temperature", "mc-dropout", "ensemble"}
    for cut, whole in zip(long.predictions, short.predictions, strict=True):
        assert cut.method == whole.method
        assert torch.allclose(cut.table, whole.table, atol=1e-5), cut.method


def test_ood_rows_of_another_task(tiny):
    model = ModelSettings(str(tiny / "adapter"), device="cpu")
    scores = []
    for rows in ("long", "short"):
        settings = EvalSettings(
            methods=("map", "laplace", "mc-dropout", "ensemble"),
            ensemble=(tiny / "member",),
            dropout_samples=3,
            ood=(str(tiny / "other.yaml"),),
            ood_data_dirs=(tiny / rows,),
        )
        scores.append(run_evaluation(model, DataSettings(), settings).record["ood"][0]["results"])
    for cut, whole in zip(*scores, strict=True):
        for key, value in cut.items():
            if isinstance(value, float):
                assert value == pytest.approx(whole[key], abs=1e-4), (cut["method"], key)
