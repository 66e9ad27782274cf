"""The commands, and the exit status of a run."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TextIO

import typer

from lapora._version import __version__
from lapora.cli.calibrate import calibrate_command
from lapora.cli.console import print_error, print_message
from lapora.cli.evaluate import eval_command
from lapora.cli.fit import fit_command
from lapora.cli.help import Command, Group
from lapora.cli.others import compare_command, demo_command, inspect_command, push_command, tasks_command
from lapora.cli.predict import predict_command
from lapora.cli.tune_prior import tune_prior_command
from lapora.errors import DataError, LaporaError, LaporaWarning, UsageError

app = typer.Typer(
    name="lapora",
    cls=Group,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Calibrated probabilities for LoRA fine-tuned language models, by the Laplace approximation."""
    if version:
        typer.echo(f"lapora {__version__}")
        raise typer.Exit


COMMANDS: Mapping[str, Callable[..., None]] = {
    "calibrate": calibrate_command,
    "fit": fit_command,
    "tune-prior": tune_prior_command,
    "predict": predict_command,
    "eval": eval_command,
    "compare": compare_command,
    "tasks": tasks_command,
    "inspect": inspect_command,
    "push": push_command,
    "demo": demo_command,
}
for _name, _function in COMMANDS.items():
    app.command(_name, cls=Command)(_function)

INTERRUPTED = 130
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}

ENDINGS: Mapping[type[BaseException], Callable[[Any], tuple[int, str, int]]] = {
    LaporaError: lambda error: (error.exit_status, str(error), error.reporting_rank),
    typer.TyperException: lambda error: (UsageError.exit_status, _usage_message(error), 0),
    KeyboardInterrupt: lambda _: (INTERRUPTED, "interrupted", 0),
}
"""Exit status, message and reporting rank of each expected exception; any other is a bug, with a traceback."""


class _HubRetries(logging.Filter):
    """Replace the messages about failed requests and retries of the Hub's client by one."""

    _said = False

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "Retrying" not in message and "thrown while requesting" not in message:
            return True
        if not self._said:
            self._said = True
            print_message("the Hugging Face Hub does not answer; trying again for up to 30 seconds")
        return False


def run() -> None:
    """Run the command line and exit with the documented status."""
    warnings.simplefilter("once", LaporaWarning)
    warnings.showwarning = _show_warning
    # Silence the messages about missing kernels (bitsandbytes) and about offloaded weights (accelerate).
    for library in ("bitsandbytes", "accelerate"):
        logging.getLogger(library).setLevel(logging.ERROR)
    hub = logging.getLogger("huggingface_hub.utils._http")
    hub.setLevel(logging.WARNING)  # of its own, because `datasets` is read with the client silenced
    hub.addFilter(_HubRetries())
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper) and stdout.errors == "strict":
        stdout.reconfigure(errors="backslashreplace")  # for paths that are not UTF-8
    try:
        # Without its standalone mode Typer returns an exit status and does not end the process.
        status = app(standalone_mode=False)
        if status == INTERRUPTED:  # how Typer returns Ctrl-C
            raise KeyboardInterrupt
        if stdout is not None:
            stdout.flush()
    except SystemExit:
        if sys.stdout is stdout:
            raise
        status = 0  # Typer replaces it when the reader of a pipe closes it, as `| head -1` does
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            status = 0
        elif error.errno in _FULL and error.filename is None:
            status = DataError.exit_status
            print_error(f"the output cannot be written ({error.strerror})", 0)
        else:
            raise
        if stdout is not None:  # what is left in its buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    except tuple(ENDINGS) as error:
        ending = next(ending for kind, ending in ENDINGS.items() if isinstance(error, kind))
        status, message, reporting_rank = ending(error)
        print_error(message, reporting_rank)
    sys.exit(status if isinstance(status, int) else 0)


def _usage_message(error: typer.TyperException) -> str:
    """Return Typer's message, in one line."""
    if similar := getattr(error, "possibilities", None):
        return f"{getattr(error, 'message', '')}; did you mean {' or '.join(sorted(similar))}? (see --help)"
    return f"{getattr(error, 'format_message', error.__str__)().strip()} (see --help)"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print lapora's warnings on stderr; drop those of other libraries."""
    if issubclass(category, LaporaWarning):
        print_message(f"warning: {message}")
