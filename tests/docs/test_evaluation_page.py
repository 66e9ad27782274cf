"""Every command of docs/evaluation.md, as it stands there, on the demo's adapter."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapora.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.mark.slow
def test_every_command_of_the_page(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo / "adapter", "adapter")
    shutil.copytree("adapter/laplace/default", "adapter/laplace/diag")
    Path("other").mkdir()
    shutil.copy("adapter/adapter_config.json", "other")
    weights = load_file("adapter/adapter_model.safetensors")
    save_file(
        {key: value + 0.01 * torch.ones_like(value) for key, value in weights.items()},
        "other/adapter_model.safetensors",
    )
    shutil.copy(demo / "farm.yaml", ".")
    lines = (demo / "data" / "validation.jsonl").read_text().splitlines(keepends=True)[:9]
    Path("rows.jsonl").write_text("".join(lines))
    Path("elsewhere").mkdir()
    Path("elsewhere/validation.jsonl").write_text(json.dumps({"story": "bees bees", "name": "anna"}) + "\n")
    commands = [
        command
        for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
        for command in block.replace("\\\n", " ").splitlines()
    ]
    assert len(commands) >= 8
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "lapora"
        app(arguments, standalone_mode=False)
        assert capsys.readouterr().out, command
    assert Path("report.html").is_file() and len(list(Path("figures").iterdir())) == 6


def test_the_gallery_is_whole_and_small():
    for page in (PAGE, *(PAGE.parent / "recipes").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).is_file(), f"{page}: {target}"
    pictures = list((PAGE.parent / "gallery").glob("*.png"))
    assert len(pictures) == 15 and sum(picture.stat().st_size for picture in pictures) < 500_000
