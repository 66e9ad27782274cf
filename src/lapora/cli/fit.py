"""``lapora fit``."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from rich.table import Table

from lapora.cli.arguments import Fields, JsonOption, command
from lapora.cli.console import (
    RowProgress,
    loading,
    on_terminal,
    print_command,
    print_error,
    print_message,
    program,
    show,
)
from lapora.cli.early import check_fit
from lapora.cli.jsonl import write_json_lines
from lapora.config import OUTPUT, DataSettings, FitSettings, ModelSettings, Option
from lapora.errors import LaporaError, SeveralError, UsageError

if TYPE_CHECKING:
    from lapora.memory.estimate import MemoryEstimate
    from lapora.workflows.fit import FitResult


@command(writes=True)
def fit_command(
    *,
    models: list[ModelSettings],
    data: Annotated[DataSettings, Fields(split={"default": "train", "help": "Split the adapter was trained on."})],
    settings: FitSettings,
    dry_run: Annotated[bool, Option("Print the memory estimate only; load no weights.", OUTPUT)] = False,
    memory: Annotated[
        float | None, Option("With --dry-run: memory of the target device.", OUTPUT, metavar="GIB", min=0)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fit the posterior of an adapter. Laplace approximation on its training rows.

    Examples:
        lapora fit ADAPTER --data boolq
        lapora fit ADAPTER --data task.yaml --data-dir data --structure ekfac
    """
    refuse_missing_task(data)
    if memory is not None and not dry_run:
        raise UsageError("--memory goes with --dry-run")
    check_fit(models, data, settings, dry_run=dry_run)
    with loading():
        from lapora.workflows.commands import command_line, tune_prior_arguments
        from lapora.workflows.fit import estimate_memory, fit, fit_several

    if dry_run:
        free = None if memory is None else memory * 2**30
        budget = estimate_memory(models[0], data, settings, device_memory=free)
        print_memory_estimate(budget, whole=True)
        if as_json and models[0].processes.is_main:
            write_json_lines([{"budget": budget.describe()}], "-")
        return

    def show_estimate(found: MemoryEstimate) -> None:
        print_memory_estimate(found, whole=False)

    if len(models) == 1:
        with saying_how_to_resume(models[0], settings), RowProgress("fit") as progress:
            result = fit(models[0], data, settings, progress, on_estimate=show_estimate)
        _print_result(result, as_json and models[0].processes.is_main)
        following = tune_prior_arguments(replace(models[0], base_model=None), settings.name)  # the base is recorded
        print_command("next", command_line(following, program()))
        return
    failures = []
    bars = fit_several(models, data, settings, lambda model: RowProgress(f"fit {model.adapter}"), show_estimate)
    for model, found in bars:
        if isinstance(found, LaporaError):
            failures.append(found.exit_status)
            print_error(f"{model.adapter}: {found}", found.reporting_rank)
        else:
            _print_result(found, as_json and model.processes.is_main)
    if failures:
        raise SeveralError(
            f"{len(failures)} of {len(models)} adapters were not fitted; the others are done", failures[0]
        )


@contextmanager
def saying_how_to_resume(model: ModelSettings, settings: FitSettings) -> Iterator[None]:
    """At Ctrl-C, print the command that resumes the fit, if there is a checkpoint."""
    try:
        yield
    except KeyboardInterrupt:
        from lapora.storage.saved import posterior_folder
        from lapora.workflows.commands import command_line

        folder = posterior_folder(model.root, settings.name)
        if any(folder.with_name(f".{folder.name}.partial").glob("*.safetensors")):
            arguments = [each for each in sys.argv[1:] if each != "--resume"]
            print_command("to resume from the checkpoint", command_line([*arguments, "--resume"], program()))
        raise


def refuse_missing_task(data: DataSettings) -> None:
    """Check that a task was given.

    Raises:
        UsageError: There is none.
    """
    if data.task is None:
        raise UsageError("--data is missing: a built-in task (see `lapora tasks`) or the path of a task YAML")


def _print_result(result: FitResult, as_json: bool) -> None:
    print_notes(result)
    if as_json:
        write_json_lines([result.describe()], "-")


def print_notes(result: FitResult) -> None:
    """Print on stderr what was fitted and what the user should know."""
    for note in result.notes:
        print_message(f"note: {note}")
    if result.truncated:
        print_message(f"{result.truncated} of {result.rows} rows were truncated to the maximum length")
    if result.log_likelihood is None:
        print_message(
            "rows without labels: the marginal likelihood is known up to a constant, which does not affect the prior"
        )
    print_message(
        f"posterior over {result.parameters:,} parameters from {result.rows:,} rows, {_prior(result)}: {result.folder}"
    )


def _prior(result: FitResult) -> str:
    if result.prior["method"] == "averaged":
        return f"averaged over prior precisions around {result.prior['precision']:.3g}"
    return f"prior precision {result.evidence.prior.describe()} by marginal likelihood"


_BLOCK, _PREFIX = re.compile(r"\.\d+\."), "base_model.model."
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_memory_estimate(budget: MemoryEstimate, *, whole: bool) -> None:
    """Print a memory estimate on stderr.

    Args:
        budget: The estimate.
        whole: Whether to print a table with a row per part even if stderr is not a terminal.
    """
    if whole or on_terminal():
        show(_table(budget))
    else:
        rows, tokens = budget.batch
        print_message(
            f"memory: weights {size(sum(budget.weights.values()))}, activations {size(budget.activations)} (a batch of "
            f"{rows} x {tokens} tokens), factors {size(budget.factors.sums)}, posterior on disk "
            f"{size(budget.factors.artifact)}"
        )
    print_message(verdict(budget))


def _table(budget: MemoryEstimate) -> Table:
    rows, tokens = budget.batch
    factors = budget.factors
    from lapora.memory.estimate import allocator_overhead

    table = Table(title=f"memory of this fit on {budget.device}", title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    table.add_column("detail")
    for kind, count in budget.weights.items():
        table.add_row("weights", size(count), kind)
    table.add_row("activations", size(budget.activations), f"a batch of {rows} rows of {tokens} tokens")
    for (name, count), layers in _groups(factors.by_layer).items():
        each = "" if layers == 1 else f"{layers} x {size(count)}, "
        table.add_row("factors", size(layers * count), each + name)
    table.add_row("workspace", size(factors.passing), "a batch's sums, random matrices")
    table.add_row("workspace", size(factors.deciding), "decompositions, after the pass")
    table.add_row("posterior", size(factors.artifact), "its file on disk")
    unused = budget.peak_device - sum(budget.weights.values()) - budget.process
    unused -= round(unused / allocator_overhead(budget.device))
    table.add_row("allocator", size(unused), "held and not in use")
    if budget.process:
        table.add_row("process", size(budget.process), "Python, its libraries and the rows")
    table.add_section()
    table.add_row(f"peak on {budget.device}", size(budget.peak_device), _free(budget.free_device))
    if budget.device != "cpu":
        table.add_row("peak on the host", size(budget.peak_host), _free(budget.free_host))
    return table


def _groups(by_layer: Mapping[str, int]) -> Counter[tuple[str, int]]:
    """Count the layers of the same size and of the same name in all blocks."""
    named = ((_BLOCK.sub(".*.", name.removeprefix(_PREFIX)), count) for name, count in by_layer.items() if count)
    return Counter(named)


def _free(free: float | None) -> str:
    return "free memory unknown" if free is None else f"{size(free)} free"


def verdict(budget: MemoryEstimate) -> str:
    """Return a sentence: whether the fit fits in memory, and which options would make it fit."""
    needed = f"peak {size(budget.peak_device)} on {budget.device}"
    if budget.fits is None:
        return f"{needed}, whose free memory is unknown: give --memory GIB"
    free = _free(budget.free_device)
    if budget.fits:
        return f"{needed}, {free}: it fits"
    host = ""
    if budget.device != "cpu" and budget.peak_host > budget.free_host:
        host = f" and {size(budget.peak_host)} on the host, {_free(budget.free_host)}"
    if not budget.remedies:
        return f"{needed}, {free}{host}: it does not fit with any options; use a larger device"
    return f"{needed}, {free}{host}: it does not fit; use {', or '.join(budget.remedies)}"


def size(count: float) -> str:
    """Format a number of bytes."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"
