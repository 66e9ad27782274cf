"""A memory budget, for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from lapora.cli.output import on_terminal, say, show

if TYPE_CHECKING:
    from lapora.workflows.budget import Budget

_BLOCK, _PREFIX = re.compile(r"\.\d+\."), "base_model.model."
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_budget(budget: Budget, *, whole: bool) -> None:
    """Print a budget to stderr.

    Args:
        budget: What was reckoned.
        whole: As a table with a line for each part; otherwise, or where stderr is no terminal, in one line.
    """
    if whole or on_terminal():
        show(_table(budget))
    else:
        rows, tokens = budget.batch
        say(
            f"memory: weights {size(sum(budget.weights.values()))}, activations {size(budget.activations)} (a batch of "
            f"{rows} x {tokens} tokens), factors {size(budget.factors.sums)}, artifact {size(budget.factors.artifact)}"
        )
    say(verdict(budget))


def _table(budget: Budget) -> Table:
    rows, tokens = budget.batch
    factors = budget.factors
    from lapora.workflows.budget import allowance

    table = Table(title=f"memory of this fit on {budget.device}", title_justify="left")
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_column("of what")
    for kind, count in budget.weights.items():
        table.add_row("weights", size(count), kind)
    table.add_row("activations", size(budget.activations), f"a batch of {rows} rows of {tokens} tokens")
    for (name, count), layers in _groups(factors.by_layer).items():
        each = "" if layers == 1 else f"{layers} x {size(count)}, "
        table.add_row("factors", size(layers * count), each + name)
    table.add_row("workspace", size(factors.passing), "a batch's sums, random matrices")
    table.add_row("workspace", size(factors.deciding), "decompositions, after the pass")
    table.add_row("artifact", size(factors.artifact), "on disk")
    unused = budget.peak_device - sum(budget.weights.values())
    unused -= round(unused / allowance(budget.device))
    table.add_row("allocator", size(unused), "held and not in use")
    table.add_section()
    table.add_row(f"peak on {budget.device}", size(budget.peak_device), _free(budget.free_device))
    if budget.device != "cpu":
        table.add_row("peak on the host", size(budget.peak_host), _free(budget.free_host))
    return table


def _groups(by_layer: Mapping[str, int]) -> Counter[tuple[str, int]]:
    """Layers of one name in all blocks and of one size."""
    named = ((_BLOCK.sub(".*.", name.removeprefix(_PREFIX)), count) for name, count in by_layer.items() if count)
    return Counter(named)


def _free(free: float | None) -> str:
    return "free: not known here" if free is None else f"{size(free)} free"


def verdict(budget: Budget) -> str:
    """Whether it fits, and what would make it fit."""
    needed = f"peak {size(budget.peak_device)} on {budget.device}"
    if budget.fits is None:
        return f"{needed}; what is free there is not known here: give --memory GIB"
    free = _free(budget.free_device)
    if budget.fits:
        return f"{needed}, {free}: it fits"
    host = ""
    if budget.device != "cpu" and budget.peak_host > budget.free_host:
        host = f" and {size(budget.peak_host)} on the host, {_free(budget.free_host)}"
    if not budget.remedies:
        return f"{needed}, {free}{host}: it does not fit, and no option makes it; a larger device does"
    return f"{needed}, {free}{host}: it does not fit; what makes it fit: {', or '.join(budget.remedies)}"


def size(count: float) -> str:
    """Bytes in a unit that people read."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"
