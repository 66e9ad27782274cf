"""Results of ``eval`` in a JSON-lines file, one run per line, and the conditions of ``--fail-if``."""

from __future__ import annotations

import datetime
import json
import operator
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapora._version import __version__
from lapora.config import ModelSettings, method_label
from lapora.errors import DataError, GateError, UsageError, first_line
from lapora.storage.files import json_bytes, os_error_reason
from lapora.storage.saved import SavedPosterior
from lapora.workflows.commands import command_line, model_arguments


def append_result(file: Path, record: Mapping[str, Any], adapter: str) -> None:
    """Append one run to a file, in one write.

    Args:
        file: The file; created if it is missing.
        record: The record that ``eval --json`` prints.
        adapter: Location of the adapter.

    Raises:
        DataError: The file cannot be written.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json_bytes({"time": now, "lapora_version": __version__, "adapter": adapter, **record})
    try:
        with file.open("ab+") as stream:
            # A run that was killed while writing leaves an incomplete line: start a new one.
            if stream.seek(0, os.SEEK_END):
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read(1) == b"\n" else b"\n" + line
            stream.write(line + b"\n")
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({os_error_reason(error)}); give another --output") from error


_BEGIN = b'{"time"'
"""How a line of ``--output`` begins."""


def check_results_file(file: Path) -> None:
    """Check that a file, if it has any line, has results.

    Raises:
        DataError: Its first line is not a result, nor the beginning of one that was not completed.
    """
    try:
        with file.open("rb") as stream:
            first = next((line for line in stream if line.strip()), b"")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({os_error_reason(error)}); give another --output") from error
    if first and not first.startswith(_BEGIN):
        try:
            _run(first.decode("utf-8"), str(file))
        except (DataError, UnicodeDecodeError):
            if first.startswith(b"{") and not first.rstrip().endswith(b"}") and not first.endswith(b"\n"):
                return  # begun by a run that was killed
            raise DataError(
                f"{file}: its first line is not a result of `lapora eval --output`, and results are appended; give "
                "another --output"
            ) from None


def read_results(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Read every run of some files, and add its file and line as ``run``.

    Raises:
        DataError: A file cannot be read, a line is not a run, or there are no runs.
    """
    runs = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise DataError(f"{file}: cannot be read ({reason})") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                runs.append({"run": f"{file.name}:{number}", **_run(line, f"{file}, line {number}")})
    if not runs:
        raise DataError("no runs in these files; `lapora eval ... --output FILE` adds one")
    return runs


def last_run_of(file: Path, model: ModelSettings, posterior: SavedPosterior) -> dict[str, Any]:
    """Return the last run of a file that scored a posterior.

    Args:
        file: The file.
        model: The posterior's adapter; a run that does not say its adapter is taken as one of it.
        posterior: The posterior; a run of an earlier version, which does not say its digest, is taken as one of it.

    Raises:
        DataError: There is no such run, or only of another fit or prior, or the file cannot be read.
    """
    runs, name, earlier = read_results([file]), posterior.name, None
    for run in reversed(runs):
        located = str(run.get("adapter", model.adapter))
        if name in _scored_posteriors(run) and _is_same_location(located, model.adapter):
            if _digests(run).get(name) in (None, posterior.digest):
                return run
            earlier = earlier or run["run"]
    scoring = command_line(["eval", model.adapter, *model_arguments(model, name), "--output", str(file)])
    if earlier:
        raise DataError(
            f"{file}: {earlier} scored another fit or prior of posterior {name}; score this one with `{scoring}`"
        )
    shown: dict[str, str] = {}
    for run in runs:
        scored = ", ".join(_scored_posteriors(run)) or "no posterior"
        shown[f"{run.get('adapter', 'adapter not recorded')}: {scored}"] = run["run"]
    others = ", ".join(f"{where} ({what})" for what, where in list(shown.items())[-3:])
    raise DataError(
        f"{file}: no run of posterior {name} of {model.adapter}, only {others}; score it with `{scoring}`, or give the "
        "adapter as eval was given it"
    )


def _scored_posteriors(run: Mapping[str, Any]) -> list[str]:
    names = (result.get("name") for result in run["results"] if result["method"] == "laplace")
    return list(dict.fromkeys(str(name) for name in names))


def _digests(run: Mapping[str, Any]) -> Mapping[str, Any]:
    recorded = run.get("posteriors")
    return recorded if isinstance(recorded, dict) else {}


def _is_same_location(one: str, other: str) -> bool:
    """Return whether two locations are the same Hub id or folder; relative folders are below the current one."""
    try:
        return one == other or os.path.realpath(one) == os.path.realpath(other)
    except ValueError:  # not a path: NUL, or a lone surrogate
        return False


def _run(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        for result in record["results"]:
            str(result["method"])
        return {"task": record["task"], "split": record["split"], "n": record["n"], **record}
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error.args[0]}" if isinstance(error, KeyError) else first_line(error, 60)
        raise DataError(f"{where}: not a result of `lapora eval --output` ({reason})") from error


def same_rows(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all runs scored the same rows, so that their scores can be compared."""
    return len({run.get("rows") for run in runs}) == 1


_OF_ANSWERS = ("accuracy", "mcc", "ece", "adaptive_ece", "nll", "brier", "auroc", "aurc")
_OF_LIKELIHOOD: dict[str, tuple[str, ...]] = {
    "multilabel": ("f1_macro", "f1_micro", "exact_match", "ece", "nll", "brier"),
    "gaussian": ("rmse", "nll", "crps", "interval_coverage", "interval_width"),
}
METRICS = tuple(dict.fromkeys((*_OF_ANSWERS, *(score for scores in _OF_LIKELIHOOD.values() for score in scores))))
_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_SIDE = re.compile(r"(?:(?P<selector>[A-Za-z0-9][A-Za-z0-9 ._/()-]*)\.)?(?P<metric>[a-z][a-z0-9_]*)")
_HELP = "write METRIC>NUMBER or METRIC>METHOD.METRIC, as in 'ece>0.1' or 'nll>map.nll'"


@dataclass(frozen=True)
class Operand:
    """One side of a condition: a number, or a metric of some of the results.

    Attributes:
        number: The number, or None.
        metric: The metric, if it is not a number.
        selector: A method, a posterior's name or ``NAME/LINK``; None is every Laplace result (MAP if there is none).
    """

    number: float | None = None
    metric: str = ""
    selector: str | None = None


@dataclass(frozen=True)
class Gate:
    """A condition under which the run fails.

    Attributes:
        text: Text of the condition.
        left: Left side, a metric.
        comparison: One of ``> >= < <=``.
        right: Right side, a number or a metric.
    """

    text: str
    left: Operand
    comparison: str
    right: Operand


def parse_gate(text: str) -> Gate:
    """Parse one condition.

    Raises:
        UsageError: The text is not a condition.
    """
    parts = re.fullmatch(r"\s*([^<>=]+?)\s*(>=|<=|>|<)\s*([^<>=]+?)\s*", text)
    if not parts:
        raise UsageError(f"--fail-if {text!r}: no comparison; {_HELP}")
    left, right = _operand(parts[1], text), _operand(parts[3], text)
    if left.number is not None:
        raise UsageError(f"--fail-if {text!r}: a number on the left; {_HELP}")
    return Gate(text.strip(), left, parts[2], right)


def _operand(side: str, text: str) -> Operand:
    if re.match(r"[-+.\d]", side) and not re.search(r"[A-Za-z_](?<![eE])", side):
        try:
            return Operand(number=float(side))
        except ValueError:
            raise UsageError(f"--fail-if {text!r}: {side!r} is not a number; {_HELP}") from None
    match = _SIDE.fullmatch(side)
    if not match or match["metric"] not in METRICS:
        raise UsageError(f"--fail-if {text!r}: {side!r} is not a metric ({', '.join(METRICS)}); {_HELP}")
    return Operand(metric=match["metric"], selector=match["selector"])


def check_gate_metrics(gates: Sequence[Gate], likelihood: str) -> None:
    """Refuse conditions on scores that a likelihood does not have.

    Raises:
        UsageError: A score does not exist; the message lists the existing ones.
    """
    known = _OF_LIKELIHOOD.get(likelihood, _OF_ANSWERS)
    for gate in gates:
        for operand in (gate.left, gate.right):
            if operand.number is None and operand.metric not in known:
                raise UsageError(
                    f"--fail-if {gate.text!r}: {operand.metric} is not a score of likelihood {likelihood}, which has "
                    f"{', '.join(known)}"
                )


def check_gates(gates: Sequence[Gate], results: Sequence[Mapping[str, Any]]) -> None:
    """Raise if any condition holds.

    Args:
        gates: The conditions.
        results: The record's ``results``.

    Raises:
        GateError: A condition holds, or a metric in it is undefined; all of these are named.
        UsageError: A condition names a method that was not scored, or a metric that this task does not have.
    """
    failed = [line for gate in gates for line in _failures(gate, results)]
    if failed:
        raise GateError(f"gate failed: {'; '.join(failed)}")


def _failures(gate: Gate, results: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for left_name, left in _values(gate.left, gate, results):
        for right_name, right in _values(gate.right, gate, results):
            if left is None or right is None:
                lines.append(f"{gate.text} ({left_name if left is None else right_name} is not defined on these rows)")
            elif _COMPARISONS[gate.comparison](left, right):
                against = f", {right_name} {right:.4g}" if gate.right.number is None else ""
                lines.append(f"{gate.text} ({left_name} {left:.4g}{against})")
    return lines


def _values(operand: Operand, gate: Gate, results: Sequence[Mapping[str, Any]]) -> list[tuple[str, float | None]]:
    if operand.number is not None:
        return [("", operand.number)]
    chosen = [result for result in results if _selects(operand.selector, result)]
    if not chosen and operand.selector is None:
        chosen = [result for result in results if result["method"] == "map"]
    if not chosen:
        known = sorted({name for result in results for name in _names(result)})
        raise UsageError(f"--fail-if {gate.text!r}: {operand.selector} was not scored; there are {', '.join(known)}")
    if operand.metric not in chosen[0]:
        raise UsageError(f"--fail-if {gate.text!r}: {operand.metric} is not a metric of this task")
    return [
        (f"{method_label(result['method'], result.get('name'), result.get('link'))} {operand.metric}", value)
        for result in chosen
        for value in [result[operand.metric]]
    ]


def _names(result: Mapping[str, Any]) -> list[str]:
    """Return the names of a result in conditions."""
    names = [str(result["method"])]
    if "name" in result:
        names += [str(result["name"]), f"{result['name']}/{result['link']}"]
    return names


def _selects(selector: str | None, result: Mapping[str, Any]) -> bool:
    return result["method"] == "laplace" if selector is None else selector in _names(result)
