"""What the methods are called in the tables, and their scores as ``lapora eval`` prints them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SCORES = ("accuracy", "nll", "ece")
CONSTANT, PLAIN = "answer frequencies only", "MAP"
ASDL_SCALE = "asdl-scale"
"""Posterior with the scale of the paper's implementation."""
_METHODS = {
    "constant": CONSTANT,
    "map": PLAIN,
    "mc-dropout": "MC dropout",
    "ensemble": "ensemble of checkpoints",
    "default": "Laplace, averaged, no rows (default)",
    "marglik": "Laplace, marginal likelihood",
    "asdl": "Laplace, the paper's implementation",
    ASDL_SCALE: "Laplace, the paper's scale",
    "llla": "Laplace of the last layer, averaged",
}
"""Names in the tables, by method or posterior."""


def scores_of(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the scores of every method in a result of ``lapora eval --json``, by the name in the tables."""
    return {_label(result): _scores(result, record) for result in record["results"]}


def named(name: str) -> str:
    """Return the name in the tables of a method or posterior."""
    if re.fullmatch(r"m\d+", name):
        return f"Laplace, averaged, {name[1:]} rows"
    return _METHODS.get(name, name)


def _label(result: Mapping[str, Any]) -> str:
    if "fitted_on" in result:
        return f"temperature, {result['fitted_on']['n']} rows"
    return named(result.get("name") or result["method"])


def _scores(result: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    found = {"n": record["n"], **{score: result[score] for score in SCORES}}
    if difference := result.get("difference_to_map"):
        found["difference"] = [difference["nll"]["value"], *difference["nll"]["interval"]]
    return found
