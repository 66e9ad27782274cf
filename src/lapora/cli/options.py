"""Options that several commands share: one name, one meaning, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from lapora.config import Link, Method
from lapora.errors import UsageError


def _known_links(links: list[str]) -> list[str]:
    """Typer checks a Literal, but not a list of them."""
    for link in links:
        if link not in get_args(Link):
            raise UsageError(f"--link {link}: one of {', '.join(get_args(Link))}")
    return links


LinksOption = Annotated[
    list[str],
    typer.Option(
        callback=_known_links, metavar=f"<{'|'.join(get_args(Link))}>", help="Link to score; may be repeated."
    ),
]


def _known_methods(methods: list[str]) -> list[str]:
    """Repeated, or several in one with commas."""
    known = ("all", *get_args(Method))
    found = [part.strip() for method in methods for part in method.split(",")]
    for method in found:
        if method not in known:
            raise UsageError(f"--methods {method}: one of {', '.join(known)}")
    return found


MethodsOption = Annotated[
    list[str],
    typer.Option(
        "--methods",
        "--method",
        callback=_known_methods,
        metavar=f"<all|{'|'.join(get_args(Method))}>",
        help="What to score; may be repeated. all: every method, saved posterior and link.",
        show_default="constant, map, laplace",
    ),
]
AdapterArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="Folder of a PEFT LoRA adapter, or its Hub id.")
]
BaseModelOption = Annotated[str | None, typer.Option(help="Base model, if not the one the adapter records.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of an adapter on the Hub.")]
OutputDirOption = Annotated[Path | None, typer.Option(help="Where laplace/NAME is, if not in ADAPTER.")]
TaskOption = Annotated[str | None, typer.Option("--data", metavar="TASK", help="Built-in task, or a YAML file.")]
DataDirOption = Annotated[Path | None, typer.Option(help="Folder with SPLIT.jsonl (.json, .csv, .parquet).")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")]
NameOption = Annotated[str, typer.Option(help="Name of the posterior.")]
SeedOption = Annotated[int, typer.Option(help="Seed of whatever is random.")]
SamplesOption = Annotated[int, typer.Option(min=2, help="Points of the sampling links (more than two answers).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
