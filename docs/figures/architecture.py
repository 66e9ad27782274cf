"""Draw ``architecture.svg``: the packages in the order in which they import, and one row's way through them.

Run from the project's root::

    python docs/figures/architecture.py

The order of the packages is read from the import contract in ``pyproject.toml``. A test compares the file with what
this program draws.
"""

from __future__ import annotations

import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGET = Path(__file__).with_suffix(".svg")

SUMMARIES = {
    "cli": "commands, options, stdout and stderr",
    "api": "the commands as Python functions",
    "interop": "to laplace-torch and back",
    "options": "keyword arguments of the API",
    "workflows": "what a command does",
    "report": "tables, figures, HTML page",
    "memory": "memory estimate of a fit",
    "storage": "a posterior on disk",
    "predictive": "Gaussian to logit moments",
    "posterior": "sums to a Gaussian; prior",
    "laplace_torch": "ASDL and curvlinops",
    "curvature": "sums over a pass of the data",
    "likelihoods": "outputs to probabilities",
    "metrics": "scores with intervals",
    "models": "adapter, base, batches, logits",
    "tasks": "data to rows to token ids",
    "config": "settings and defaults",
    "distributed": "processes of a run",
    "errors": "errors with exit statuses",
}

FIT = (
    ("workflows.fit", "read adapter, task and rows once: TrainingRows"),
    ("memory.estimate", "memory of the fit, without weights"),
    ("models.loading", "base model and adapter: TaskModel"),
    ("tasks.tokens", "rows to token ids: FitInputs"),
    ("curvature.passes", "batches, forward and C-1 backward passes"),
    ("posterior.structures", "sums to eigenvalues and bases"),
    ("workflows.averaging", "what the training rows tolerate"),
    ("storage.saved", "posterior.json, factors.safetensors"),
)
PREDICT = (
    ("cli.jsonl", "a line of JSON"),
    ("workflows.predict", "a window of lines, an adapter for each"),
    ("tasks.examples", "the prompt: Example"),
    ("tasks.tokens", "token ids: EncodedExample"),
    ("models.batching", "a batch of rows of similar length"),
    ("predictive.moments", "mean and covariance: LogitMoments"),
    ("likelihoods.categorical", "probabilities, averaged"),
    ("cli.jsonl", "a line of JSON, in input order"),
)

_BOX, _GAP, _LEFT, _WIDTH = 40, 8, 20, 330
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2933 }
.head { font-weight: 600; font-size: 15px } .name { font-weight: 600; font-family: ui-monospace, monospace }
.what { fill: #52606d; font-size: 12px } rect { fill: #e6f4f1; stroke: #0f766e; rx: 6 }
.step { fill: #f5f7fa; stroke: #7b8794 } line { stroke: #52606d; stroke-width: 1.5 }
"""


def layers() -> list[list[str]]:
    """Return the layers of the import contract, top first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (found,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return [[part.strip().removeprefix("lapora.") for part in layer.split("|")] for layer in found]


def draw() -> str:
    """Return the picture as SVG."""
    parts: list[str] = []
    rows = layers()
    _text(parts, _LEFT, 24, "Packages: imports go down", "head")
    y = 40
    for layer in rows:
        width = (_WIDTH - _GAP * (len(layer) - 1)) / len(layer)
        for index, name in enumerate(layer):
            x = _LEFT + index * (width + _GAP)
            _box(parts, x, y, width, name, SUMMARIES[name] if len(layer) == 1 else "")
        y += _BOX + _GAP
    height = y + 16
    for x, title, steps in ((400, "One fit", FIT), (740, "One row of predict", PREDICT)):
        _text(parts, x, 24, title, "head")
        y = 40
        for number, (where, what) in enumerate(steps):
            if number:
                parts.append(f'<line x1="{x + 150}" y1="{y - 36}" x2="{x + 150}" y2="{y}" marker-end="url(#arrow)"/>')
            _box(parts, x, y, 310, where, what, "step")
            y += _BOX + 36
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#52606d"/></marker></defs>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1070 {height}" role="img" aria-label="Architecture">'
    background = f'<rect x="0" y="0" width="1070" height="{height}" style="fill:#fff;stroke:none"/>'
    return "\n".join([head, f"<style>{_STYLE}</style>", arrow, background, *parts, "</svg>", ""])


def _box(parts: list[str], x: float, y: float, width: float, name: str, what: str, kind: str = "") -> None:
    parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{_BOX}"/>')
    _text(parts, x + 10, y + (17 if what else 25), name, "name")
    if what:
        _text(parts, x + 10, y + 33, what, "what")


def _text(parts: list[str], x: float, y: float, text: str, kind: str) -> None:
    parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(text)}</text>')


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
