"""Fixtures: tiny models, and the shared real data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from lapora.errors import AdapterError
from lapora.models.demo_base import fetch_demo_base
from lapora.models.lora_layers import find_bayesian_layers
from lapora.workflows.demo import run_demo
from tiny_models import tiny_causal, tiny_classifier

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the workers and for what they start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
DEMO_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "lapora-demo"
SHARED = Path(os.environ.get("LAPORA_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}; set LAPORA_SHARED")
    return SHARED


@pytest.fixture(
    params=[("classifier", 2), ("classifier", 3), ("classifier", 5), ("causal", 2), ("causal", 3), ("causal", 5)]
)
def answers(request):
    kind, classes = request.param
    return tiny_classifier(classes) if kind == "classifier" else tiny_causal(classes)


@pytest.fixture
def layers(answers):
    return find_bayesian_layers(answers.model)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Iterator[str]:
    """SmolLM2-135M-Instruct as `lapora demo` gets it, kept in a folder that git ignores."""
    cache = Path(__file__).parents[1] / ".pytest_cache" / "bases"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        try:
            with FileLock(f"{tmp_path_factory.getbasetemp().parent}/bases.lock"):
                base = fetch_demo_base(print, lambda label: nullcontext())
        except AdapterError as error:
            pytest.skip(str(error))
        yield base


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """What `lapora demo` makes, once for all workers; tests that write work on a copy."""
    shared_by_workers = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared_by_workers = shared_by_workers.parent
    folder = shared_by_workers / "lapora-demo"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            # Training takes a minute: base model and adapter of an earlier session serve again.
            if DEMO_CACHE.is_dir():
                shutil.copytree(DEMO_CACHE, folder)
            record = run_demo(folder, lambda line: None, offline=True).record
            assert [result["method"] for result in record["results"]] == ["constant", "map", "laplace"]
            fresh = DEMO_CACHE.with_name(f".new-{os.getpid()}")
            shutil.rmtree(DEMO_CACHE, ignore_errors=True)
            shutil.copytree(folder, fresh, ignore=shutil.ignore_patterns("laplace"))
            fresh.rename(DEMO_CACHE)
    return folder
