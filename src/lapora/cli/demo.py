"""``lapora demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lapora.cli.output import say


def demo_command(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the demo's files go.")] = Path(
        "lapora-demo"
    ),
) -> None:
    """Build a small base model, adapter and data offline, and run the whole pipeline on them."""
    from lapora.report import print_evaluation
    from lapora.workflows.demo import run_demo

    record = run_demo(directory, say)
    print_evaluation(record)
    say(f"the files stay in {directory}; try: lapora eval {directory}/adapter --link mc-joint --link probit")
