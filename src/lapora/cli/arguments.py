"""Command-line arguments and options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from lapora.cli.console import set_rank
from lapora.config import DeviceMap, Dtype, Link, Method, ModelSettings, Quantization
from lapora.distributed import init_processes, is_launched
from lapora.errors import UsageError
from lapora.models.adapter import local_model


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


_ONE = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a PEFT LoRA adapter, or its Hub id.")]
_SEVERAL = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER", help="Folders of PEFT LoRA adapters, or Hub ids; several share a base."),
]


def _options(
    *,
    base_model: BaseModelOption = None,
    quantize: Annotated[Quantization | None, typer.Option(help="Load the base model in 8 or 4 bits.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the base model's weights.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    device_map: Annotated[
        DeviceMap | None, typer.Option(help="Spread a model larger than a device over devices, host and disk.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="DEVICE=SIZE,...", help="With --device-map: bounds, 0=20GiB,cpu=60GiB.")
    ] = None,
    offload_dir: Annotated[
        Path | None, typer.Option(help="With --device-map: folder for what fits in no memory.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Rows per batch, or auto (a token budget).")] = "auto",
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Run blocks twice instead of keeping what they compute: less memory."
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that a base model or tokenizer brings along.")
    ] = False,
    revision: RevisionOption = None,
    output_dir: OutputDirOption = None,
) -> dict[str, Any]:
    """The fields of the settings, from the command line's words.

    Raises:
        UsageError: A batch size that is neither ``auto`` nor a positive number.
    """
    if batch_size != "auto" and not (batch_size.isdigit() and int(batch_size) > 0):
        raise UsageError(f"--batch-size {batch_size}: auto, or a positive number")
    return {
        "base_model": base_model,
        "quantize": quantize,
        "dtype": dtype,
        "device": device,
        "device_map": device_map,
        "max_memory": max_memory,
        "offload_dir": offload_dir,
        "batch_size": None if batch_size == "auto" else int(batch_size),
        "gradient_checkpointing": gradient_checkpointing,
        "trust_remote_code": trust_remote_code,
        "revision": revision,
        "output_dir": output_dir,
    }


def takes_model(*, writes: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command its ``model`` (or ``models``, where it takes several), with all options that decide it.

    An adapter on the Hub is fetched, and where a launcher has started several processes, they meet here.

    Args:
        writes: Whether the command writes a posterior, which needs a place that is not the Hub's cache.

    Raises:
        UsageError: By the command: options that contradict each other, or an adapter on the Hub and nowhere to write.
        AdapterError: By the command: the Hub has no such adapter, or cannot be reached.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        several = "models" in own.parameters
        given = inspect.Parameter(
            "adapters" if several else "adapter",
            inspect.Parameter.KEYWORD_ONLY,
            annotation=_SEVERAL if several else _ONE,
        )
        rest = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, each in own.parameters.items()
            if name not in ("model", "models")
        ]
        shared = list(inspect.signature(_options, eval_str=True).parameters.values())

        @functools.wraps(command)
        def run(**words: Any) -> None:
            adapters = words.pop(given.name)
            settings = _options(**{each.name: words.pop(each.name) for each in shared})
            models = _models(adapters if several else [adapters], settings, writes=writes)
            command(**({"models": models} if several else {"model": models[0]}), **words)

        wrapper: Any = run
        wrapper.__signature__ = own.replace(parameters=[given, *rest, *shared])
        wrapper.__annotations__ = get_type_hints(command, include_extras=True)
        return run

    return decorate


def _models(adapters: list[str], settings: dict[str, Any], *, writes: bool) -> list[ModelSettings]:
    if settings["device_map"] is not None and is_launched():
        raise UsageError("--device-map runs in one process, which spreads the model: start it without a launcher")
    if settings["output_dir"] is not None and len({Path(adapter).name for adapter in adapters}) < len(adapters):
        raise UsageError("--output-dir: two adapters have folders of one name; fit them one by one")
    processes, settings["device"] = init_processes(settings["device"])
    set_rank(processes.rank)
    folder = settings.pop("output_dir")
    found = []
    for adapter in adapters:
        here = folder / Path(adapter).name if folder and len(adapters) > 1 else folder
        model = ModelSettings(adapter=adapter, output_dir=here, processes=processes, **settings)
        _ = model.spread  # what contradicts itself is said at once
        found.append(local_model(model, writes=writes))
    return found
