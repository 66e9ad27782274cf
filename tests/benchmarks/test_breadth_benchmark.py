"""The breadth benchmark: its cases, its page, and that the page has no third column."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import transformers

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.breadth.__main__ import outcome, read_results  # noqa: E402
from benchmarks.breadth.cases import model_cases, option_cases  # noqa: E402
from benchmarks.breadth.page import PAGE, write_page  # noqa: E402

CASES = {case.key: case for case in (*option_cases(), *model_cases())}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("causal/llama/attention", "works"),
        ("classifier/bert/all-linear", "works"),
        ("lora/use_dora", "works"),
        ("lora/kasa_config", "refused"),
    ],
)
def test_a_case(key, expected):
    found = outcome(CASES[key])
    assert found["outcome"] == expected
    assert expected == "refused" or found["error"] < 1e-6


def test_every_case_has_a_name_of_its_own():
    assert len(CASES) == len([*option_cases(), *model_cases()])


def test_the_page_refuses_a_third_outcome(tmp_path):
    good = {"outcome": "works", "dtype": "float64", "error": 1e-7}
    refused = {"outcome": "refused", "words": "a|b is not supported"}
    results = {
        "lora/x": good,
        "lora/peft_type: IA3": refused,
        "causal/a/attention": good,
        "causal/a/all-linear": refused,
    }
    write_page(results, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| x | 1e-07 |" in text and "| a | 1e-07 | refused: a\\|b is not supported |" in text
    with pytest.raises(ValueError, match="neither works nor refused: lora/y"):
        write_page({**results, "lora/y": {"outcome": "crash", "words": ""}}, tmp_path / "page.md")


def test_the_page_has_every_model_type_of_its_versions():
    text = PAGE.read_text()
    if f"transformers {transformers.__version__}, PEFT {peft.__version__}" not in text:
        pytest.skip("the page was made with other versions")
    assert all(f"| {case.name} |" in text for case in model_cases())


@pytest.mark.slow
def test_every_case_works_or_is_refused(tmp_path):
    """A quarter of an hour."""
    results = tmp_path / "results.jsonl"
    subprocess.run([sys.executable, "-m", "benchmarks.breadth", "--results", str(results)], cwd=ROOT, check=True)
    found = read_results(results)
    assert len(found) == len(CASES)
    assert not {key: each for key, each in found.items() if each["outcome"] not in ("works", "refused", "none")}
