"""What ``lapora eval`` found: on the terminal, as pictures, as a page."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lapora._version import __version__
from lapora.cli.output import say
from lapora.config import ModelSettings

if TYPE_CHECKING:
    from lapora.workflows.evaluate import Evaluation


def print_results(done: Evaluation, as_json: bool) -> None:
    """The table or the JSON on stdout, remarks on stderr."""
    record = done.record
    if record["excluded"]:
        say(f"{record['excluded']} rows that tuned the prior or the temperature are left out")
    if record["truncated"]:
        say(f"{record['truncated']} of {record['n']} rows were cut to the greatest length")
    if told := _temperature(record):
        say(f"temperature {told}")
    if as_json:
        typer.echo(json.dumps(record))
    else:
        from lapora.metrics import reliability_bins
        from lapora.report import print_evaluation, print_reliability

        print_evaluation(record)
        shown = [_map_of(done), *[each for each in done.predictions if each.method == "laplace"][:1]]
        print_reliability({each.label: reliability_bins(each.log_p, done.targets) for each in shown})
    for warning in done.warnings:
        say(warning)


def print_checkpoint_results(record: Mapping[str, Any], as_json: bool) -> None:
    """The table or the JSON on stdout."""
    if as_json:
        typer.echo(json.dumps(record))
    else:
        from lapora.report import print_checkpoints

        print_checkpoints(record)


def _temperature(record: Mapping[str, Any]) -> str:
    """What the temperature is and where it comes from, where there is one."""
    told = []
    for result in record["results"]:
        if "temperature" in result:
            rows = result.get("fitted_on")
            where = f"{rows['n']} rows of {rows['split']} that are not scored" if rows else "the scored rows themselves"
            told.append(f"{result['temperature']:.3f}, fitted on {where}")
    return "; oracle: ".join(told)


def _map_of(done: Evaluation) -> Any:
    return next(each for each in done.predictions if each.method == "map")


def keep_results(done: Evaluation, model: ModelSettings, plots: Path | None, report: Path | None) -> None:
    """Pictures to a folder, and into the page."""
    from lapora.plots import evaluation_pictures, save_pictures, to_svg
    from lapora.report.page import Page, evaluation_tables, write_page

    tables = {each.label: each.log_p for each in done.predictions}
    # One picture of each posterior, by its first link; where there is none, of another method.
    firsts: dict[str | None, str] = {}
    for each in done.predictions:
        if each.method == "laplace":
            firsts.setdefault(each.name, each.label)
    others = [each.label for each in done.predictions if each.method not in ("constant", "map")]
    pictures = evaluation_pictures(tables, done.targets, list(firsts.values()) or others[:1] or ["map"])
    if plots:
        files = save_pictures(pictures, plots)
        say(f"{len(files)} pictures: {plots}")
    if report:
        record = done.record
        first = next(iter(done.manifests.values()))
        facts = {
            **_facts(model, record),
            "base model": f"{first['base_model']['name']} ({first['base_model']['dtype']})",
            "rows left out": f"{record['excluded']}, which tuned the prior or the temperature",
            "rows cut": str(record["truncated"]),
        }
        if told := _temperature(record):
            facts["temperature"] = told
        page = Page(
            title=f"{record['task']}: is {Path(model.adapter).name} calibrated?",
            facts=facts,
            tables=evaluation_tables(record),
            pictures=[(picture.caption, to_svg(picture.figure)) for picture in pictures],
            warnings=done.warnings,
            manifests={"results": record, **{f"posterior {name}": found for name, found in done.manifests.items()}},
        )
        write_page(report, page)
        say(f"report: {report}")


def _facts(model: ModelSettings, record: Mapping[str, Any]) -> dict[str, str]:
    return {
        "command": shlex.join(["lapora", *sys.argv[1:]]),
        "adapter": model.adapter,
        "task": f"{record['task']}, {record['n']} rows of {record['split']}",
        "made": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC by lapora {__version__}",
    }


def keep_checkpoints(
    model: ModelSettings, record: dict[str, Any], plots: Path | None, report: Path | None, output: Path | None
) -> None:
    """The curves to a folder, and into the page and the results file where these are asked for."""
    from lapora.plots import checkpoint_pictures, save_pictures, to_svg

    pictures = checkpoint_pictures(record)
    folder = plots or model.root / "laplace" / "figures"
    save_pictures(pictures, folder)
    say(f"{2 * len(pictures)} pictures: {folder}")
    if report:
        from lapora.report.page import Page, checkpoint_page_tables, write_page

        page = Page(
            title=f"{record['task']}: {len(record['checkpoints'])} checkpoints of {Path(model.adapter).name}",
            facts=_facts(model, record),
            tables=checkpoint_page_tables(record),
            pictures=[(picture.caption, to_svg(picture.figure)) for picture in pictures],
            warnings=[f"{name} left out: {reason}" for name, reason in record["skipped"].items()],
            manifests={"results": record},
        )
        write_page(report, page)
        say(f"report: {report}")
    if output:
        from lapora.workflows.results import append_result

        for checkpoint in record["checkpoints"]:
            append_result(output, checkpoint, f"{model.adapter}/checkpoint-{checkpoint['step']}")
