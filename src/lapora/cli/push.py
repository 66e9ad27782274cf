"""``lapora push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lapora.cli.options import AdapterArgument, NameOption, OutputDirOption
from lapora.cli.output import say
from lapora.config import ModelSettings
from lapora.model.hub import local_model


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
        say(f"note: {note}")
    say(f"{len(done.files)} files: {done.address}")
