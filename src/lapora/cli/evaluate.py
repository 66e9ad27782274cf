"""``lapora eval``."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lapora._version import __version__
from lapora.cli.arguments import (
    DataDirOption,
    JsonOption,
    LimitOption,
    LinksOption,
    MethodsOption,
    SamplesOption,
    SeedOption,
    TaskOption,
    takes_model,
)
from lapora.cli.console import RowProgress, print_message
from lapora.config import DataSettings, EvalSettings, Link, Method, ModelSettings, PriorMethod
from lapora.errors import UsageError

if TYPE_CHECKING:
    from lapora.workflows.evaluate import Evaluation

_DEFAULT_METHODS = ["constant", "map", "laplace"]
_CHECKPOINT_LINKS: tuple[Link, ...] = ("mc-joint", "mc-indep", "probit", "bridge")


@takes_model()
def eval_command(
    model: ModelSettings,
    task: TaskOption = None,
    data_dir: DataDirOption = None,
    split: Annotated[str | None, typer.Option(help="Split to score.")] = None,
    limit: LimitOption = None,
    methods: MethodsOption = _DEFAULT_METHODS,
    link: LinksOption = [],  # noqa: B006
    name: Annotated[list[str], typer.Option(help="Posterior to score; may be repeated.")] = [],  # noqa: B006
    samples: SamplesOption = EvalSettings.samples,
    dropout_samples: Annotated[int, typer.Option(min=2, help="Passes of mc-dropout.")] = EvalSettings.dropout_samples,
    ensemble: Annotated[
        list[Path], typer.Option(help="Adapter, or folder of checkpoints, to average with; may be repeated.")
    ] = [],  # noqa: B006
    temperature_split: Annotated[
        str | None, typer.Option(help="Split that the temperature is fitted on; the rows that tuned the prior.")
    ] = None,
    temperature_oracle: Annotated[
        bool, typer.Option("--temperature-oracle", help="Add the temperature fitted on the scored rows themselves.")
    ] = False,
    ood: Annotated[list[str], typer.Option(metavar="TASK", help="Other data to tell apart; may be repeated.")] = [],  # noqa: B006
    ood_data_dir: Annotated[
        list[Path], typer.Option(help="Folder of the --ood rows: one for all, or one for each.")
    ] = [],  # noqa: B006
    coverage: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of rows to answer: gives the --abstain-below for it.")
    ] = None,
    fail_if: Annotated[
        list[str], typer.Option(metavar="CONDITION", help="Exit with 7 if so: 'ece>0.1', 'nll>map.nll'; repeatable.")
    ] = [],  # noqa: B006
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="ADAPTER is a training run: fit and score every checkpoint-*.")
    ] = False,
    fit_split: Annotated[str, typer.Option(help="With --checkpoints: split they were trained on.")] = "train",
    fit_limit: Annotated[int | None, typer.Option(min=1, help="With --checkpoints: rows to fit on.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="With --checkpoints: tokens per row.")] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="With --checkpoints: wrap as a chat.")] = False,
    prior_method: Annotated[PriorMethod, typer.Option(help="With --checkpoints: how priors are chosen.")] = "auto",
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures, PNG and SVG.")] = None,
    report: Annotated[Path | None, typer.Option(help="HTML file: one page with everything.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON-lines file to add this run to.")] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Score MAP, Laplace and other methods side by side."""
    if coverage == 0:
        raise UsageError("--coverage 0: a share of the rows above 0 and at most 1")
    data = DataSettings(task, data_dir, split, limit)
    settings = EvalSettings(
        methods=cast("tuple[Method, ...]", tuple(methods)),
        names=tuple(name),
        links=cast("tuple[Link, ...]", tuple(link)),
        samples=samples,
        seed=seed,
        dropout_samples=dropout_samples,
        ensemble=tuple(ensemble),
        temperature_split=temperature_split,
        temperature_oracle=temperature_oracle,
        ood=tuple(ood),
        ood_data_dirs=tuple(ood_data_dir),
        coverage=coverage,
    )
    if checkpoints:
        from lapora.workflows.checkpoints import CheckpointSettings

        if model.fetched:
            raise UsageError("--checkpoints needs the folder of a training run, not a Hub id")
        if name or fail_if:
            raise UsageError(f"{'--name' if name else '--fail-if'} does not go with --checkpoints")
        if prior_method == "adapted":
            raise UsageError("--prior-method adapted needs --structure full, which --checkpoints does not fit")
        fitting = CheckpointSettings(fit_split, fit_limit, max_length, chat_template, prior_method)
        record = _run_checkpoints(model, data, settings, fitting)
        if model.processes.is_main:
            print_checkpoint_results(record, as_json)
            keep_checkpoints(model, record, plots, report, output)
        return
    if (fit_split, fit_limit, max_length, chat_template, prior_method) != ("train", None, None, False, "auto"):
        raise UsageError(
            "--fit-split, --fit-limit, --max-length, --chat-template and --prior-method need --checkpoints"
        )
    from lapora.workflows.evaluate import run_evaluation
    from lapora.workflows.results import check_gates, parse_gate

    gates = [parse_gate(condition) for condition in fail_if]
    with RowProgress("eval") as progress:
        done = run_evaluation(model, data, settings, progress)
    with model.processes.raise_together():  # a gate that fails ends the run: not before all is written
        if model.processes.is_main:
            print_results(done, as_json)
            if plots or report:
                keep_results(done, model, plots, report)
            if output:
                from lapora.workflows.results import append_result

                append_result(output, done.record, model.adapter)
    check_gates(gates, done.record["results"])


def _run_checkpoints(model: ModelSettings, data: DataSettings, settings: EvalSettings, fitting: Any) -> dict[str, Any]:
    from dataclasses import replace

    from lapora.workflows.checkpoints import evaluate_checkpoints

    if not settings.links:
        settings = replace(settings, links=_CHECKPOINT_LINKS)
    with RowProgress("eval") as progress:
        return evaluate_checkpoints(model, data, settings, fitting, print_message, progress)


def print_results(done: Evaluation, as_json: bool) -> None:
    """The table or the JSON on stdout, remarks on stderr."""
    record = done.record
    if record["excluded"]:
        print_message(f"{record['excluded']} rows that tuned the prior or the temperature are left out")
    if record["truncated"]:
        print_message(f"{record['truncated']} of {record['n']} rows were cut to the greatest length")
    if told := _temperature(record):
        print_message(f"temperature {told}")
    if as_json:
        typer.echo(json.dumps(record))
    else:
        from lapora.metrics import reliability_bins
        from lapora.report import print_evaluation, print_reliability

        print_evaluation(record)
        shown = [_map_of(done), *[each for each in done.predictions if each.method == "laplace"][:1]]
        print_reliability({each.label: reliability_bins(each.log_p, done.targets) for each in shown})
    for warning in done.warnings:
        print_message(warning)


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
    from lapora.report.figures import evaluation_pictures, save_pictures, to_svg
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
        print_message(f"{len(files)} pictures: {plots}")
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
        print_message(f"report: {report}")


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
    from lapora.report.figures import checkpoint_pictures, save_pictures, to_svg

    pictures = checkpoint_pictures(record)
    folder = plots or model.root / "laplace" / "figures"
    save_pictures(pictures, folder)
    print_message(f"{2 * len(pictures)} pictures: {folder}")
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
        print_message(f"report: {report}")
    if output:
        from lapora.workflows.results import append_result

        for checkpoint in record["checkpoints"]:
            append_result(output, checkpoint, f"{model.adapter}/checkpoint-{checkpoint['step']}")
