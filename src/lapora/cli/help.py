"""A command of Typer with lapora's help: options in panels, choices and defaults in plain text, examples at the end."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import typer
import typer.core
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from lapora.config import ADVANCED, ONE_PANEL

_WIDEST = 100


class Command(typer.core.TyperCommand):
    """A command whose docstring may end with ``Examples:`` and indented lines."""

    def __init__(self, *arguments: Any, help: str | None = None, **attributes: Any) -> None:
        text, _, examples = (help or "").partition("\n\nExamples:\n")
        attributes["epilog"] = f"Examples:\n\n{examples.rstrip()}" if examples else None
        super().__init__(*arguments, help=text, **attributes)
        for each in self.params:
            if isinstance(each, typer.core.TyperArgument):
                vars(each)["display_type_rich"] = lambda ctx: ""  # no Python type beside the placeholder

    def get_help_option_names(self, ctx: Any) -> list[str]:
        """Return ``-h`` and ``--help``, in this order."""
        return sorted(super().get_help_option_names(ctx), key=len)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line, and refuse all wrong values in one error."""
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            self.callback.refuse_wrong_values(ctx.params)  # type: ignore[union-attr]
        return rest

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return ``[OPTIONS] ADAPTER [INPUT]``."""
        names = [each for each in self.params if isinstance(each, typer.core.TyperArgument)]
        return ["[OPTIONS]", *(_name(each) if each.required else f"[{_name(each)}]" for each in names)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        formatter.write(_page(self, ctx, {}))


class Group(typer.core.TyperGroup):
    """The program itself, with its commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; without arguments, print the help and exit with status 2."""
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            raise typer.Exit(2)
        return super().parse_args(ctx, args)

    def get_help_option_names(self, ctx: Any) -> list[str]:
        """Return ``-h`` and ``--help``, in this order."""
        return sorted(super().get_help_option_names(ctx), key=len)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        commands = {name: self.commands[name].help or "" for name in self.list_commands(ctx)}
        formatter.write(_page(self, ctx, commands))


def _page(command: Any, ctx: Any, commands: dict[str, str]) -> str:
    console = Console(highlight=False, soft_wrap=False, emoji=False)
    console.width = min(console.width, _WIDEST)
    options = [each for each in command.get_params(ctx) if isinstance(each, typer.core.TyperOption)]
    arguments = [each for each in command.params if isinstance(each, typer.core.TyperArgument)]
    panels: dict[str, list[tuple[str, Text]]] = {}
    if commands:
        panels["Commands"] = [(name, Text(text.partition(".")[0] + ".")) for name, text in commands.items()]
    for option in options:
        panel = "Options" if len(options) <= ONE_PANEL + 1 else option.rich_help_panel or ADVANCED  # and --help
        panels.setdefault(panel, []).append((_flags(option), _explained(option)))
    positional = [(_name(each), _explained(each)) for each in arguments]
    first = max(len(name) for rows in (positional, *panels.values()) for name, _ in rows)
    with console.capture() as captured:
        usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
        console.print(Text.assemble(("Usage: ", "bold"), usage))
        console.print()
        console.print(Text(" ".join((command.help or "").split())))
        if positional:
            console.print()
            console.print(_rows(positional, first))
        console.print()
        for title, rows in panels.items():
            console.print(Rule(Text(title, "bold"), align="left", style="dim"))
            console.print(_rows(rows, first))
        if command.epilog:
            title, _, lines = command.epilog.partition("\n\n")
            console.print(Rule(Text(title.rstrip(":"), "bold"), align="left", style="dim"))
            console.print(Text(textwrap.indent(textwrap.dedent(lines), " ")), overflow="ignore", no_wrap=True)
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _rows(rows: Sequence[tuple[str, Text]], first: int) -> Table:
    table = Table.grid(padding=(0, 1), pad_edge=False)
    table.add_column(width=first + 1, no_wrap=True, style="cyan")
    table.add_column(ratio=1)
    for name, text in rows:
        table.add_row(Text(f" {name}"), text)
    return table


def _name(argument: typer.core.TyperArgument) -> str:
    return str(argument.metavar or argument.name)


def _flags(option: typer.core.TyperOption) -> str:
    flags = ", ".join([*option.opts, *option.secondary_opts])
    return flags if option.is_flag or not option.metavar else f"{flags} {option.metavar}"


def _explained(parameter: Any) -> Text:
    text = Text(" ".join((parameter.help or "").split()))
    default = parameter.default if parameter.show_default is True else parameter.show_default
    if parameter.show_default and default is not None and not isinstance(default, bool):
        shown = ", ".join(map(str, default)) if isinstance(default, list | tuple) else default
        text.append(f" [default: {shown:g}]" if isinstance(shown, float) else f" [default: {shown}]", "dim")
    return text
