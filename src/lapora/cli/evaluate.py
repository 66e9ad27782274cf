"""``lapora eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lapora.cli.model_options import takes_model
from lapora.cli.options import (
    DataDirOption,
    JsonOption,
    LimitOption,
    LinksOption,
    MethodsOption,
    SamplesOption,
    SeedOption,
    TaskOption,
)
from lapora.cli.output import RowProgress, say
from lapora.cli.results import keep_checkpoints, keep_results, print_checkpoint_results, print_results
from lapora.config import DataSettings, EvalSettings, Link, Method, ModelSettings, PriorMethod
from lapora.errors import UsageError

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
        if model.processes.first:
            print_checkpoint_results(record, as_json)
            keep_checkpoints(model, record, plots, report, output)
        return
    if (fit_split, fit_limit, max_length, chat_template, prior_method) != ("train", None, None, False, "auto"):
        raise UsageError(
            "--fit-split, --fit-limit, --max-length, --chat-template and --prior-method need --checkpoints"
        )
    from lapora.workflows.evaluate import run_evaluation
    from lapora.workflows.gates import check_gates, parse_gate

    gates = [parse_gate(condition) for condition in fail_if]
    with RowProgress("eval") as progress:
        done = run_evaluation(model, data, settings, progress)
    with model.processes.in_step():  # a gate that fails ends the run: not before all is written
        if model.processes.first:
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
        return evaluate_checkpoints(model, data, settings, fitting, say, progress)
