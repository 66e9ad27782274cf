"""``lapora tasks``, ``inspect``, ``compare``, ``push`` and ``demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lapora.cli.arguments import Fields, JsonOption, command
from lapora.cli.console import RowProgress, json_text, loading, print_command, print_message, program
from lapora.config import DataSettings, FitSettings, ModelSettings, Option, PushSettings
from lapora.errors import PosteriorError, UsageError, listed
from lapora.models.adapter import check_repository, local_model


@command()
def tasks_command(
    *,
    name: Annotated[str | None, Option("Built-in task: print its YAML.", flag="NAME")] = None,
    check: Annotated[str | None, Option("Task to check on rows: prompts, tokens, labels.", metavar="TASK")] = None,
    model: Annotated[
        ModelSettings,
        Fields(
            "adapter",
            "base_model",
            adapter={"flag": "--adapter", "default": "", "metavar": "ADAPTER", "help": "Adapter to check with."},
        ),
    ],
    data: Annotated[DataSettings, Fields("data_dir", "split", "limit", split={"help": "Split to check."})],
    fitting: Annotated[FitSettings, Fields("max_length", "chat_template")],
) -> None:
    """List, print or check tasks. Check your own task before a fit.

    Examples:
        lapora tasks boolq > task.yaml
        lapora tasks --check task.yaml --adapter ADAPTER --data-dir data
    """
    if check is not None:
        if not model.adapter:
            raise UsageError("--check needs --adapter: its tokenizer and model kind decide how rows are encoded")
        from lapora.workflows.check_task import check as check_rows

        rows = DataSettings(check, data.data_dir, data.split, data.limit)
        found = check_rows(
            model.adapter,
            rows,
            base_model=model.base_model,
            max_length=fitting.max_length,
            chat_template=fitting.chat_template,
        )
        typer.echo(json_text(found, indent=2))
        return
    from lapora.tasks import builtin_tasks, builtin_yaml, describe_task, load_task

    if name is not None:
        if name not in builtin_tasks():
            hint = f"; for a file of your own: --check {name}" if Path(name).suffix in (".yaml", ".yml") else ""
            raise UsageError(f"no built-in task named {name}; available: {', '.join(builtin_tasks())}{hint}")
        typer.echo(builtin_yaml(name), nl=False)
        return
    from lapora.report import print_tasks

    print_tasks([describe_task(load_task(each)) for each in builtin_tasks()])


@command()
def inspect_command(
    *,
    model: Annotated[ModelSettings, Fields("adapter", "output_dir", "revision")],
    name: Annotated[str, Option("Name of the posterior.", metavar="NAME")] = "default",
    as_json: JsonOption = False,
) -> None:
    """Show a summary of a saved posterior.

    Examples:
        lapora inspect ADAPTER
    """
    from lapora.storage.saved import SavedPosterior, posterior_folder

    root = model.output_dir or local_model(model).root  # with --output-dir the adapter is not needed
    if not root.is_dir():
        raise PosteriorError(f"{root}: no such directory; give the adapter's folder, or a Hub id (owner/name)")
    posterior = SavedPosterior(posterior_folder(root, name))
    if as_json:
        typer.echo(json.dumps(posterior.content))
        return
    from lapora.report import print_posterior

    print_posterior(posterior.manifest, posterior.prior)


@command()
def compare_command(
    *,
    files: Annotated[tuple[Path, ...], Option("Files written by lapora eval --output.", flag="RESULTS...")],
    metric: Annotated[
        tuple[str, ...],
        Option(
            "Score to show on a terminal: accuracy, mcc, ece, adaptive_ece, nll, brier, auroc, aurc; of other "
            "likelihoods also rmse, crps, f1_micro ... Repeatable.",
            metavar="NAME",
        ),
    ] = ("accuracy", "ece", "nll"),
    as_json: JsonOption = False,
) -> None:
    """Show results of eval side by side. Tab-separated lines in a pipe.

    Examples:
        lapora compare results.jsonl --metric nll
    """
    from lapora.report.tables import HEADINGS, print_comparison
    from lapora.workflows.results import read_results, same_rows

    for score in metric:
        if score not in HEADINGS:
            raise UsageError(f"--metric {score}: one of {', '.join(HEADINGS)}")
    runs = read_results(list(files))
    if as_json:
        typer.echo(json.dumps(runs))
    else:
        scored = {score for run in runs for result in run["results"] for score in result}
        print_comparison(runs, [score for score in dict.fromkeys(metric) if score in scored])
        if missing := [score for score in dict.fromkeys(metric) if score not in scored]:
            print_message(f"no run has {listed(missing)}")
    if not same_rows(runs):
        print_message("note: these runs did not score the same rows, so their scores also differ by chance")


@command()
def push_command(*, model: Annotated[ModelSettings, Fields("adapter", "output_dir")], settings: PushSettings) -> None:
    """Upload a posterior to the Hub. Adds a section to the model card.

    Examples:
        lapora push ADAPTER me/my-adapter --scores results.jsonl
    """
    check_repository(settings.repository)
    print_message(f"checking the posterior, then uploading to {settings.repository} ...")
    from lapora.workflows.push import push

    done = push(local_model(model), settings)
    for note in done.notes:
        print_message(f"note: {note}")
    print_message(f"{len(done.files)} files: {done.address}")


@command()
def demo_command(
    *,
    directory: Annotated[Path, Option("Folder for the files of the demo.", flag="DIR")] = Path("lapora-demo"),
    offline: Annotated[bool, Option("Train a small model instead of downloading one of 270 MB.")] = False,
) -> None:
    """Run the whole pipeline on a real model, SmolLM2-135M-Instruct, with an adapter that comes with lapora.

    Examples:
        lapora demo
        lapora demo my-folder --offline
    """
    with loading():
        from lapora.report import print_evaluation
        from lapora.report.tables import print_answers
        from lapora.workflows.commands import command_line
        from lapora.workflows.demo import run_demo

    done = run_demo(directory, print_message, RowProgress, offline=offline)
    print_evaluation(done.record)
    if done.answers:
        print_answers(done.answers)
    adapter = str(directory / "adapter")
    print_message(f"the files are in {directory}/; try:")
    for arguments in (
        ["predict", adapter, str(directory / "data" / "validation.jsonl")],
        ["eval", adapter, "--methods", "map,temperature,laplace"],
    ):
        print_command("  ", command_line(arguments, program()))
