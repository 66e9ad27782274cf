from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real rows with the field names of the Hub's data sets."""
    folder = Path(os.environ.get("LAPORA_SHARED", REPOSITORY / ".." / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set LAPORA_SHARED")
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines and returns their folder."""

    def write(rows: list[dict[str, Any]], name: str = "train.jsonl") -> Path:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(lines, encoding="utf-8")
        return tmp_path

    return write
