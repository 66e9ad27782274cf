"""The ``checkpoint-STEP`` folders that a training run leaves."""

from __future__ import annotations

import re
from pathlib import Path

from lapora.model.adapter import CONFIG_FILE


def checkpoint_folders(run: Path) -> list[tuple[int, Path]]:
    """Training step and folder of every checkpoint that holds an adapter, in the order of training."""
    if not run.is_dir():
        return []
    found = []
    for folder in run.iterdir():
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and (folder / CONFIG_FILE).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)
