"""``lapora inspect``."""

from __future__ import annotations

import json
from typing import Any

import typer

from lapora.cli.options import AdapterArgument, JsonOption, NameOption, OutputDirOption, RevisionOption
from lapora.config import ModelSettings
from lapora.model.hub import local_model


def inspect_command(
    adapter: AdapterArgument,
    name: NameOption = "default",
    output_dir: OutputDirOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what the saved posterior is."""
    from lapora.posterior.artifact import SavedPosterior, posterior_folder

    # A posterior elsewhere is read without its adapter.
    root = output_dir or local_model(ModelSettings(adapter, revision=revision)).root
    manifest: dict[str, Any] = SavedPosterior(posterior_folder(root, name)).manifest
    if as_json:
        typer.echo(json.dumps(manifest))
        return
    from lapora.report import print_manifest

    print_manifest(manifest)
