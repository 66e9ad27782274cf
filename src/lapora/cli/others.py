"""``lapora tasks``, ``inspect``, ``compare``, ``push`` and ``demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lapora.cli.arguments import (
    AdapterArgument,
    BaseModelOption,
    DataDirOption,
    JsonOption,
    LimitOption,
    NameOption,
    OutputDirOption,
    RevisionOption,
)
from lapora.cli.console import json_text, print_message
from lapora.config import DataSettings, ModelSettings
from lapora.errors import UsageError
from lapora.models.adapter import local_model


def tasks_command(
    name: Annotated[str | None, typer.Argument(help="Print this task's YAML.")] = None,
    check: Annotated[str | None, typer.Option(metavar="TASK", help="Show what a task makes of rows.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter to check the task with.")] = None,
    data_dir: DataDirOption = None,
    split: Annotated[str | None, typer.Option(help="Split to check.")] = None,
    limit: LimitOption = None,
    base_model: BaseModelOption = None,
) -> None:
    """List the built-in tasks, print one as YAML to start your own from, or check one on rows."""
    if check is not None:
        if adapter is None:
            raise UsageError("--check needs --adapter, whose tokenizer and kind decide what a row becomes")
        from lapora.workflows.check_task import check as check_rows

        report = check_rows(adapter, DataSettings(check, data_dir, split, limit), base_model=base_model)
        typer.echo(json_text(report, indent=2))
        return
    from lapora.tasks import builtin_tasks, builtin_yaml, describe_task, load_task

    if name is not None:
        if name not in builtin_tasks():
            raise UsageError(f"{name}: no such built-in task; there are {', '.join(builtin_tasks())}")
        typer.echo(builtin_yaml(name), nl=False)
        return
    from lapora.report import print_tasks

    print_tasks([describe_task(load_task(each)) for each in builtin_tasks()])


def inspect_command(
    adapter: AdapterArgument,
    name: NameOption = "default",
    output_dir: OutputDirOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what the saved posterior is."""
    from lapora.storage.saved import SavedPosterior, posterior_folder

    # A posterior elsewhere is read without its adapter.
    root = output_dir or local_model(ModelSettings(adapter, revision=revision)).root
    posterior = SavedPosterior(posterior_folder(root, name))
    if as_json:
        typer.echo(json.dumps(posterior.content))
        return
    from lapora.report import print_posterior

    print_posterior(posterior.manifest, posterior.prior)


_SIDE_BY_SIDE = ["accuracy", "ece", "nll"]


def compare_command(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS.jsonl...", help="Files of `lapora eval --output`.")],
    metric: Annotated[list[str], typer.Option(help="Score to show on a terminal; may be repeated.")] = _SIDE_BY_SIDE,
    as_json: JsonOption = False,
) -> None:
    """Show runs side by side: a table on a terminal, tab-separated lines in a pipe."""
    from lapora.report.tables import HEADINGS, print_comparison
    from lapora.workflows.results import read_results, same_rows

    for score in metric:
        if score not in HEADINGS:
            raise UsageError(f"--metric {score}: one of {', '.join(HEADINGS)}")
    runs = read_results(files)
    if as_json:
        typer.echo(json.dumps(runs))
    else:
        print_comparison(runs, list(dict.fromkeys(metric)))
    if not same_rows(runs):
        print_message("note: these runs did not score the same rows: their numbers differ by chance too")


def push_command(
    adapter: AdapterArgument,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub; made if there is none.")],
    name: NameOption = "default",
    private: Annotated[bool, typer.Option("--private", help="Make REPO private, if it is made.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch of REPO to commit to.")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="File of `lapora eval --output`: its last run goes into the model card.")
    ] = None,
    output_dir: OutputDirOption = None,
) -> None:
    """Upload a posterior beside its adapter on the Hub, and describe it in the model card."""
    from lapora.workflows.push import PushSettings, push

    model = local_model(ModelSettings(adapter, output_dir=output_dir))
    done = push(model, PushSettings(repository, name, private, revision, scores))
    for note in done.notes:
        print_message(f"note: {note}")
    print_message(f"{len(done.files)} files: {done.address}")


def demo_command(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the demo's files go.")] = Path(
        "lapora-demo"
    ),
) -> None:
    """Build a small base model, adapter and data offline, and run the whole pipeline on them."""
    from lapora.report import print_evaluation
    from lapora.workflows.demo import run_demo

    record = run_demo(directory, print_message)
    print_evaluation(record)
    print_message(f"the files stay in {directory}; try: lapora eval {directory}/adapter --link mc-joint --link probit")
