"""``lapora tasks``."""

from __future__ import annotations

from typing import Annotated

import typer

from lapora.cli.options import BaseModelOption, DataDirOption, LimitOption
from lapora.cli.output import json_text
from lapora.config import DataSettings
from lapora.errors import UsageError


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
