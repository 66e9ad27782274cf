"""Options that several commands share: one name, one meaning, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from lapora.cli.output import speak_as
from lapora.config import Dtype, Link, Method, ModelSettings, Quantisation
from lapora.errors import UsageError
from lapora.model.hub import local_model
from lapora.processes import join_processes


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
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of an adapter on the Hub.")]
BaseModelOption = Annotated[str | None, typer.Option(help="Base model, if not the one the adapter records.")]
QuantizeOption = Annotated[Quantisation | None, typer.Option(help="Load the base model in 8 or 4 bits.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Type of the base model's weights.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda ...")]
BatchOption = Annotated[str, typer.Option(help="Rows per batch, or auto (a token budget).")]
OutputDirOption = Annotated[Path | None, typer.Option(help="Where laplace/NAME is, if not in ADAPTER.")]
TaskOption = Annotated[str | None, typer.Option("--data", metavar="TASK", help="Built-in task, or a YAML file.")]
DataDirOption = Annotated[Path | None, typer.Option(help="Folder with SPLIT.jsonl (.json, .csv, .parquet).")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")]
NameOption = Annotated[str, typer.Option(help="Name of the posterior.")]
SeedOption = Annotated[int, typer.Option(help="Seed of whatever is random.")]
SamplesOption = Annotated[int, typer.Option(min=2, help="Points of the sampling links (more than two answers).")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that a base model or tokenizer brings along.")
]
CheckpointingOption = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing", help="Run blocks twice instead of keeping what they compute: less memory."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def model_settings(
    adapter: str,
    base_model: str | None,
    quantize: Quantisation | None,
    dtype: Dtype | None,
    device: str,
    batch_size: str,
    output_dir: Path | None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    *,
    writes: bool = False,
    gradient_checkpointing: bool = False,
) -> ModelSettings:
    """The options that every command that loads a model has; an adapter on the Hub is fetched.

    Where a launcher has started several processes, they meet here.

    Raises:
        UsageError: A batch size that is neither ``auto`` nor a positive number; an adapter on the Hub and nowhere to
            write.
        AdapterError: The Hub has no such adapter, or cannot be reached.
    """
    if batch_size != "auto" and not (batch_size.isdigit() and int(batch_size) > 0):
        raise UsageError(f"--batch-size {batch_size}: auto, or a positive number")
    processes, device = join_processes(device)
    speak_as(processes.rank)
    model = ModelSettings(
        adapter=adapter,
        base_model=base_model,
        quantize=quantize,
        dtype=dtype,
        device=device,
        batch_size=None if batch_size == "auto" else int(batch_size),
        output_dir=output_dir,
        trust_remote_code=trust_remote_code,
        revision=revision,
        processes=processes,
        gradient_checkpointing=gradient_checkpointing,
    )
    return local_model(model, writes=writes)
