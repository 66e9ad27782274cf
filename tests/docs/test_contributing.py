"""A task, a structure, a link and an engine, added to a copy of the source as the contributing page says, work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TASK = """
task: barn
doc_to_text: "{{story}} ?"
doc_to_choice: ["no", "yes"]
doc_to_target: "{{ label }}"
max_length: 48
"""

STRUCTURE = '''
def fit_even(run):
    """One curvature for all weights of a layer."""
    posterior, data = fit_diag(run)
    blocks = [
        replace(block, eigenvalues=torch.full_like(block.eigenvalues, float(block.eigenvalues.mean())))
        for block in posterior.blocks
    ]
    return BlockPosterior(blocks), data


'''

ENGINE = '''
"""The native sums, doubled."""

from dataclasses import replace

from lapora.curvature.passes import collect
from lapora.curvature.kfac import KronObserver


def doubled_factors(answers, layers, batches, targets, progress=None):
    observer = KronObserver("expand")
    data = collect(answers, layers, observer, batches, targets=targets, progress=progress)
    doubled = {
        name: replace(factors, gradient_sum=2 * factors.gradient_sum)
        for name, factors in observer.factors(layers).items()
    }
    return doubled, data.log_likelihood
'''

# Where the page says that each is named: file, the line that is there, and what comes behind it.
NAMED = [
    ("config.py", 'Structure = Literal["kron",', ' "even",'),
    ("config.py", 'BASELESS_STRUCTURES: tuple[Structure, ...] = ("diag",', ' "even",'),
    ("posterior/structures.py", '    "diag": fit_diag,\n', '    "even": fit_even,\n'),
    ("config.py", 'Link = Literal["mc-joint",', ' "flat",'),
    (
        "likelihoods/categorical.py",
        '    if link == "map":\n        return torch.log_softmax(mean, dim=1)\n',
        '    if link == "flat":\n        return torch.log_softmax(0 * mean, dim=1)\n',
    ),
    ("config.py", 'Engine = Literal["native",', ' "doubled",'),
    (
        "workflows/fit.py",
        "    rows = (run.output_model, run.layers, run.batches(), run.targets)\n",
        '    if settings.engine == "doubled":\n'
        "        from lapora.curvature.doubled import doubled_factors\n\n"
        "        factors, log_likelihood = doubled_factors(*rows)\n"
        "        return BlockPosterior(decompose(run.layers, factors)), log_likelihood\n",
    ),
]

USE = """
import json, sys
from pathlib import Path
from tiny_adapter import make_adapter, make_rows
import lapora

folder = make_adapter(Path(sys.argv[1]))
adapter = folder / "adapter"
common = {"data": "barn", "data_dir": folder / "data"}
fitted = [
    lapora.fit(adapter, name="even", structure="even", **common),
    lapora.fit(adapter, name="doubled", engine="doubled", **common),
    lapora.fit(adapter, **common),
]
tuned = lapora.tune_prior(adapter, name="even", method="validation")
answers = lapora.load(adapter, name="even").predict(make_rows(3), link="flat")
record = lapora.evaluate(adapter, split="validation", methods=["all"])
print(json.dumps({
    "source": lapora.__file__,
    "rows": [each.rows for each in fitted],
    "method": tuned.method,
    "confidence": [answer.confidence for answer in answers],
    "scored": sorted({(result["name"], result["link"]) for result in record["results"] if "link" in result}),
}))
"""


@pytest.fixture
def source(tmp_path) -> Path:
    copy = tmp_path / "source" / "lapora"
    shutil.copytree(ROOT / "src" / "lapora", copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tasks" / "builtin" / "barn.yaml").write_text(TASK)
    (copy / "curvature" / "doubled.py").write_text(ENGINE)
    for name, line, behind in NAMED:
        text = (copy / name).read_text()
        assert text.count(line) == 1, (name, line)
        (copy / name).write_text(text.replace(line, line + behind))
    structures = copy / "posterior" / "structures.py"
    structures.write_text(structures.read_text().replace("_STRUCTURES: ", f"{STRUCTURE.lstrip()}_STRUCTURES: ", 1))
    return copy.parent


@pytest.mark.slow
def test_each_needs_what_the_page_says_and_no_more(source, tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", USE, str(tmp_path / "tiny")]
    (tmp_path / "tiny").mkdir()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["source"].startswith(str(source))
    assert found["rows"] == [24, 24, 24] and found["method"] == "validation"
    assert found["confidence"] == pytest.approx([0.5, 0.5, 0.5])
    scored = {tuple(each) for each in found["scored"]}
    assert {("even", "flat"), ("even", "mc-joint"), ("doubled", "flat"), ("default", "bridge")} <= scored
