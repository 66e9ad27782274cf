"""Every benchmark finds what it imports from the package."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in (ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_it_is_imported(name):
    importlib.import_module(name)
