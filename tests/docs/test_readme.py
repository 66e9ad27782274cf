"""The README's commands, run as they stand there, on the demo's adapter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks() -> list[str]:
    return re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.slow
def test_every_command_of_the_readme(demo, tmp_path):
    """`make` targets must exist; every `lapora` line must succeed on an adapter, a task and rows of that name."""
    makefile = (ROOT / "Makefile").read_text()
    shutil.copytree(demo / "adapter", tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter" / "laplace")
    shutil.copytree(demo / "data", tmp_path / "data")
    rows = (demo / "data" / "validation.jsonl").read_text().splitlines(keepends=True)[:4]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    # The README's names, on the demo's task: `boolq` reads local rows here, and its own YAML has a field `body`.
    task = (demo / "farm.yaml").read_text()
    (tmp_path / "boolq.yaml").write_text(task)
    (tmp_path / "tickets.yaml").write_text(
        'task: tickets\ndoc_to_text: "{{body}}"\ndoc_to_choice: ["no", "yes"]\ndoc_to_target: label\n'
    )
    tickets = "".join(f'{{"body": "story : anna went to the barn . {i}", "label": {i % 2}}}\n' for i in range(6))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = 0
    for block in blocks():
        for line in block.splitlines():
            command = line.split("#")[0].strip()
            if command.startswith("make "):
                assert f"\n{command.removeprefix('make ')}:" in makefile
                continue
            command = command.replace("--data boolq", "--data boolq.yaml --data-dir data")
            if "tickets" in command:
                (tmp_path / "data" / "train.jsonl").write_text(tickets)
                command += " --overwrite"
            done = subprocess.run(
                command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            ran += 1
    assert ran >= 6
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(rows)
