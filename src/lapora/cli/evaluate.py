"""``lapora eval``."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lapora._version import __version__
from lapora.cli.arguments import Fields, JsonOption, command
from lapora.cli.console import RowProgress, loading, print_message
from lapora.cli.early import check_fitted, check_outputs, check_rows
from lapora.config import (
    CHECKPOINTS,
    OUTPUT,
    SCORES,
    CheckpointSettings,
    DataSettings,
    EvalSettings,
    ModelSettings,
    Option,
)
from lapora.errors import UsageError

if TYPE_CHECKING:
    from lapora.workflows.evaluate import Evaluation


@command()
def eval_command(
    *,
    model: ModelSettings,
    data: Annotated[DataSettings, Fields(split={"help": "Split to score.", "shown": "validation"})],
    settings: EvalSettings,
    fail_if: Annotated[
        tuple[str, ...],
        Option("Exit with 7 if true: 'nll>map.nll'. Repeatable.", SCORES, metavar="CONDITION"),
    ] = (),
    checkpoints: Annotated[bool, Option("Fit and score ADAPTER/checkpoint-* of a training run.", CHECKPOINTS)] = False,
    fitting: CheckpointSettings,
    plots: Annotated[Path | None, Option("Folder for figures, as PNG and SVG.", OUTPUT, metavar="DIR")] = None,
    report: Annotated[Path | None, Option("HTML report to write.", OUTPUT, metavar="FILE")] = None,
    output: Annotated[Path | None, Option("JSON-lines file to append the results to.", OUTPUT, metavar="FILE")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare MAP, Laplace and other methods. Scores accuracy, calibration and NLL.

    Examples:
        lapora eval ADAPTER --report report.html
        lapora eval ADAPTER --methods all --fail-if 'ece>0.1'
    """
    check_outputs(output, report, plots)
    if checkpoints:
        _refuse_for_checkpoints(model, settings, fitting, fail_if)
        check_rows(model, data, settings)
        from lapora.workflows.checkpoints import evaluate_checkpoints

        with RowProgress("eval") as progress:
            record = evaluate_checkpoints(model, data, settings, fitting, print_message, progress)
        if model.processes.is_main:
            print_checkpoint_results(record, as_json)
            save_checkpoint_results(model, record, plots, report, output)
        return
    if fitting != CheckpointSettings():
        raise UsageError(
            "--fit-split, --fit-limit, --max-length, --chat-template and --prior-method need --checkpoints"
        )
    from lapora.storage.saved import saved_names
    from lapora.workflows.results import append_result, check_gates, parse_gate

    gates = [parse_gate(condition) for condition in fail_if]
    names = settings.names or (saved_names(model.root) if "all" in settings.methods else ("default",))
    check_fitted(model, names, settings, data, gates)
    with loading():
        from lapora.workflows.evaluate import run_evaluation

    with RowProgress("eval") as progress:
        done = run_evaluation(model, data, settings, progress)
    with model.processes.raise_together():  # write everything before a failed gate ends the run
        if model.processes.is_main:
            print_results(done, as_json)
            if output:
                append_result(output, done.record, model.adapter)
            save_results(done, model, plots, report)
    check_gates(gates, done.record["results"])


def _refuse_for_checkpoints(
    model: ModelSettings, settings: EvalSettings, fitting: CheckpointSettings, fail_if: tuple[str, ...]
) -> None:
    if model.fetched:
        raise UsageError("--checkpoints needs the folder of a training run, not a Hub id")
    if settings.names or fail_if:
        raise UsageError(f"{'--name' if settings.names else '--fail-if'} does not go with --checkpoints")
    if fitting.prior_method == "adapted":
        raise UsageError("--prior-method adapted needs --structure full, which --checkpoints does not fit")


def print_results(done: Evaluation, as_json: bool) -> None:
    """Print the table or JSON on stdout, messages on stderr."""
    record = done.record
    if record["excluded"]:
        print_message(f"{record['excluded']} rows that tuned the prior or the temperature are left out")
    if record["truncated"]:
        print_message(f"{record['truncated']} of {record['n']} rows were truncated to the maximum length")
    if temperature := _temperature(record):
        print_message(f"temperature {temperature}")
    if as_json:
        typer.echo(json.dumps(record))
    else:
        from lapora.metrics import reliability_bins
        from lapora.report import print_evaluation, print_reliability

        print_evaluation(record)
        plain = next(each for each in done.predictions if each.method == "map")
        shown = [plain, *[each for each in done.predictions if each.method == "laplace"][:1]]
        answers = {each.label: done.likelihood.as_answers(each.table, done.targets) for each in shown}
        print_reliability({label: reliability_bins(*found) for label, found in answers.items() if found is not None})
    for warning in done.warnings:
        print_message(warning)


def print_checkpoint_results(record: Mapping[str, Any], as_json: bool) -> None:
    """Print the tables or JSON on stdout."""
    if as_json:
        typer.echo(json.dumps(record))
    else:
        from lapora.report import print_checkpoints

        print_checkpoints(record)


def _temperature(record: Mapping[str, Any]) -> str:
    """Return the fitted temperatures and the rows they were fitted on; empty without one."""
    parts = []
    for result in record["results"]:
        if "temperature" in result:
            rows = result.get("fitted_on")
            where = f"{rows['n']} rows of {rows['split']} that are not scored" if rows else "the scored rows themselves"
            parts.append(f"{result['temperature']:.3f}, fitted on {where}")
    return "; oracle: ".join(parts)


def save_results(done: Evaluation, model: ModelSettings, plots: Path | None, report: Path | None) -> None:
    """Write the requested figures and HTML report."""
    if not plots and not report:
        return
    from lapora.report.figures import evaluation_pictures, regression_pictures, save_pictures, to_svg
    from lapora.report.page import Page, evaluation_tables, verdict, write_page

    # One figure per posterior, with its first link; without a posterior, of one other method.
    firsts: dict[str | None, str] = {}
    for each in done.predictions:
        if each.method == "laplace":
            firsts.setdefault(each.name, each.label)
    others = [each.label for each in done.predictions if each.method not in ("constant", "map")]
    after = list(firsts.values()) or others[:1] or ["map"]
    answers = {each.label: done.likelihood.as_answers(each.table, done.targets) for each in done.predictions}
    known = {label: found for label, found in answers.items() if found is not None}
    if known:
        targets = next(iter(known.values()))[1]
        pictures = evaluation_pictures(
            {label: log_p for label, (log_p, _) in known.items()}, targets, after, _rows(done.record)
        )
    else:
        levels = {each.label: done.likelihood.levels(each.table, done.targets) for each in done.predictions}
        wanted = dict.fromkeys(["map", *after])
        pictures = regression_pictures({label: found for label in wanted if (found := levels[label]) is not None})
    if plots:
        print_message(f"{len(save_pictures(pictures, plots))} figures: {plots}")
    if not report:
        return
    record = done.record
    first = next(iter(done.manifests.values()))
    facts = {
        **_facts(model, record),
        "base model": f"{first['base_model']['name']} ({first['base_model']['dtype']})",
        "rows left out": f"{record['excluded']}, used to tune the prior or the temperature",
        "rows truncated": str(record["truncated"]),
    }
    if temperature := _temperature(record):
        facts["temperature"] = temperature
    page = Page(
        title=f"{record['task']}: is {Path(model.adapter).name} calibrated?",
        verdict=verdict(record),
        facts=facts,
        tables=evaluation_tables(record),
        pictures=[(picture.caption, to_svg(picture.figure)) for picture in pictures],
        warnings=done.warnings,
        manifests={"results": record, **{f"posterior {name}": found for name, found in done.manifests.items()}},
    )
    write_page(report, page)
    print_message(f"report: {report}")


def save_checkpoint_results(
    model: ModelSettings, record: dict[str, Any], plots: Path | None, report: Path | None, output: Path | None
) -> None:
    """Write the figures, by default to ``laplace/figures``, and the requested report and results."""
    from lapora.report.figures import checkpoint_pictures, save_pictures, to_svg
    from lapora.report.page import Page, checkpoint_page_tables, write_page

    pictures = checkpoint_pictures(record)
    folder = plots or model.root / "laplace" / "figures"
    print_message(f"{len(save_pictures(pictures, folder))} figures: {folder}")
    if report:
        page = Page(
            title=f"{record['task']}: {len(record['checkpoints'])} checkpoints of {Path(model.adapter).name}",
            facts=_facts(model, record),
            tables=checkpoint_page_tables(record),
            pictures=[(picture.caption, to_svg(picture.figure)) for picture in pictures],
            warnings=[f"{name} left out: {reason}" for name, reason in record["skipped"].items()],
            manifests={"results": record},
        )
        write_page(report, page)
        print_message(f"report: {report}")
    if output:
        from lapora.workflows.results import append_result

        for checkpoint in record["checkpoints"]:
            append_result(output, checkpoint, f"{model.adapter}/checkpoint-{checkpoint['step']}")


def _facts(model: ModelSettings, record: Mapping[str, Any]) -> dict[str, str]:
    return {
        "command": shlex.join(["lapora", *sys.argv[1:]]),
        "adapter": model.adapter,
        "task": _rows(record),
        "made": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC by lapora {__version__}",
    }


def _rows(record: Mapping[str, Any]) -> str:
    return f"{record['task']}, {record['n']} rows of {record['split']}"
