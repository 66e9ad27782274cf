"""``lapora inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from lapora.cli.options import AdapterArgument, JsonOption, NameOption, OutputDirOption


def inspect_command(
    adapter: AdapterArgument,
    name: NameOption = "default",
    output_dir: OutputDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what the saved posterior is."""
    from lapora.posterior.artifact import SavedPosterior, posterior_folder

    manifest: dict[str, Any] = SavedPosterior(posterior_folder(output_dir or Path(adapter), name)).manifest
    if as_json:
        typer.echo(json.dumps(manifest))
        return
    from lapora.report import print_manifest

    print_manifest(manifest)
