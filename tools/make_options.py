"""Write the option classes of ``lapora/options.py`` from the settings in ``lapora/config.py``; ``make options``."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import Literal, get_origin

from lapora import config, options

FILE = Path(options.__file__)
LINE = "# Written by `make options` from lapora/config.py; do not edit below this line.\n"

ALIASES = {name for name, value in vars(config).items() if get_origin(value) is Literal}

# Class: bases, settings, fields (all where empty), docstring.
CLASSES: dict[str, tuple[str, type | None, tuple[str, ...], str]] = {
    "ModelOptions": ("TypedDict", config.ModelSettings, (), "How to load the adapter and its base."),
    "DataOptions": ("TypedDict", config.DataSettings, (), "Which rows to read."),
    "CurvatureOptions": ("TypedDict", config.FitSettings, (), "Curvature, weights and name of the posterior."),
    "FitOptions": ("CurvatureOptions, DataOptions, ModelOptions", None, (), "Options of :func:`lapora.api.fit`."),
    "CalibrateOptions": ("FitOptions", config.PriorSettings, ("link",), "Options of :func:`lapora.api.calibrate`."),
    "PriorOptions": (
        "DataOptions, ModelOptions",
        config.PriorSettings,
        (),
        "Options of :func:`lapora.api.tune_prior`, beside those of rows and model.",
    ),
    "EvalOptions": (
        "DataOptions, ModelOptions",
        config.EvalSettings,
        (),
        "Options of :func:`lapora.api.evaluate`, beside those of rows and model.",
    ),
    "LinkOptions": (
        "TypedDict",
        config.PredictSettings,
        ("link", "samples", "seed"),
        "How logits become probabilities, in ``predict``.",
    ),
}


def written() -> str:
    """Return the whole content of ``lapora/options.py``."""
    head = FILE.read_text(encoding="utf-8").partition(LINE)[0].rstrip()
    types = _annotations()
    blocks = [head, LINE.strip()]
    blocks += [_class(name, *about, types) for name, about in CLASSES.items()]
    return "\n\n\n".join(blocks) + "\n"


def _class(
    name: str,
    bases: str,
    settings: type | None,
    only: tuple[str, ...],
    docstring: str,
    types: dict[str, dict[str, str]],
) -> str:
    lines = [f"class {name}({bases}, total=False):", f'    """{docstring}']
    if settings is None:
        return "\n".join([lines[0], lines[1] + '"""'])
    found = {
        field: option
        for field, option in config.options_of(settings).items()
        if option.option.keyword and (not only or field in only)
    }
    lines += ["", "    Attributes:"]
    for field, option in found.items():
        lines += textwrap.wrap(
            f"{field}: {options.describe(option)}",
            120,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
            break_on_hyphens=False,
            break_long_words=False,
        )
    lines += ['    """', ""]
    lines += [f"    {field}: {types[settings.__name__][field]}" for field in found]
    return "\n".join(lines)


def _annotations() -> dict[str, dict[str, str]]:
    """The types of all fields as they are written in the settings, in the form that the API accepts."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(config.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            found[node.name] = {each.target.id: _accepted(each.annotation) for each in fields}  # type: ignore[union-attr]
    return found


def _accepted(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        annotation = annotation.slice.elts[0]  # type: ignore[attr-defined]
    text = ast.unparse(annotation).replace("'", '"')
    text = re.sub(r"[A-Z]\w+", lambda name: f"config.{name[0]}" if name[0] in ALIASES else name[0], text)
    text = re.sub(r"tuple\[(.*), \.\.\.\]", r"Sequence[\1]", text)
    return re.sub(r"\bPath\b", "str | Path", text)


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
