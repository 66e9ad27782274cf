"""The commands put together, and the status that a run ends with."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Annotated, TextIO

import typer

from lapora._version import __version__
from lapora.cli.console import print_error, print_message
from lapora.cli.evaluate import eval_command
from lapora.cli.fit import fit_command
from lapora.cli.others import compare_command, demo_command, inspect_command, push_command, tasks_command
from lapora.cli.predict import predict_command
from lapora.cli.tune_prior import tune_prior_command
from lapora.errors import LaporaError, LaporaWarning, UsageError

app = typer.Typer(
    name="lapora",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Calibrated probabilities for LoRA fine-tuned language models, by the Laplace approximation.",
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Calibrated probabilities for LoRA fine-tuned language models, by the Laplace approximation."""
    if version:
        typer.echo(f"lapora {__version__}")
        raise typer.Exit


app.command("fit")(fit_command)
app.command("tune-prior")(tune_prior_command)
app.command("predict")(predict_command)
app.command("eval")(eval_command)
app.command("compare")(compare_command)
app.command("tasks")(tasks_command)
app.command("inspect")(inspect_command)
app.command("push")(push_command)
app.command("demo")(demo_command)

INTERRUPTED = 130
"""What Typer makes of Ctrl-C."""


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Lapora's own warnings are lines for people; a library's are no news for them."""
    if issubclass(category, LaporaWarning):
        print_message(f"warning: {message}")


def run() -> None:
    """Run the command line and end the process with the promised status."""
    warnings.simplefilter("once", LaporaWarning)
    warnings.showwarning = _show_warning
    # They speak of kernels that nobody asked for, and of weights that rest on the disk as they were told to.
    for library in ("bitsandbytes", "accelerate"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        # Without its standalone mode Typer returns an exit status instead of ending the process.
        status = app(standalone_mode=False)
    except LaporaError as error:
        print_error(str(error), error.reporting_rank)
        sys.exit(error.exit_status)
    except typer.TyperException as error:
        # `lapora` alone has printed its help already, and has no message.
        if message := getattr(error, "format_message", error.__str__)().strip():
            print_error(f"{message} (see --help)")
        sys.exit(UsageError.exit_status)
    if status == INTERRUPTED:
        print_error("interrupted")
    sys.exit(status if isinstance(status, int) else 0)
