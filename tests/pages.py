"""Code blocks of the documentation's pages, so that tests run what stands there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}(?: [^\n]*)?\n(.*?)^```$", text, flags=re.S | re.M)


def titled(page: str, title: str) -> str:
    """The block that is a file of that name."""
    text = (DOCS / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf'^```\w+ title="{re.escape(title)}"\n(.*?)^```$', text, flags=re.S | re.M)
    return found


def copy_demo(demo: Path, folder: Path) -> None:
    """The demo as it stands in a reader's folder."""
    shutil.copytree(demo, folder / "lapora-demo", ignore=shutil.ignore_patterns("figures"))


def environment() -> dict[str, str]:
    """One where ``python`` and ``lapora`` are the tested ones."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run lines as bash does, stopping at the first that fails."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def lapora_lines(script: str) -> list[list[str]]:
    """The arguments of a block's ``lapora`` commands, continued lines joined and comments dropped."""
    lines = script.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("lapora ")]
