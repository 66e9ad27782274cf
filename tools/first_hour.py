"""Type the README and docs/start.md in a terminal of 80 columns, and record it.

    python tools/first_hour.py RECORDING.cast [--folder DIR] [--limit 2.0] [--tests]
        [--own ADAPTER --rows DIR [--base DIR]]

A fresh clone and two fresh virtual environments are made: the Makefile's, for the README's `make demo` and what it says
to type next, and the start page's. With ``--own``, the README's commands for an adapter of one's own follow. Its
`./adapter` is a copy of a classifier of BoolQ, whose rows (``--rows``: train.jsonl, validation.jsonl) and base model
(``--base``) are local, for machines that do not reach the Hub: `--data-dir` is added where a command says
`--data boolq`. With ``--tests``, `make test` is typed too.

Writes an asciinema recording (format 2) and prints, for each command, its seconds and the longest time without a sign
of life. Exits with 1 where a command fails or is silent for longer than the limit.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parents[1]
_COLUMNS, _LINES = 80, 24
_PROMPT = "first-hour-ready> "
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Colors and movements of the cursor."""


@dataclass(frozen=True)
class Own:
    """An adapter of one's own: a classifier of BoolQ, a folder of BoolQ's rows, and a local base model or None."""

    adapter: Path
    rows: Path
    base: Path | None

    def place(self, folder: Path) -> None:
        """Write what the README's commands name: ``adapter``, ``rows.jsonl``, and the ``data`` of its task's file."""
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        shutil.copytree(self.adapter, folder / "adapter", copy_function=shutil.copyfile)
        if self.base is not None:
            config = folder / "adapter" / "adapter_config.json"
            settings = json.loads(config.read_text()) | {"base_model_name_or_path": str(self.base.absolute())}
            config.write_text(json.dumps(settings))
        (folder / "data").mkdir(exist_ok=True)
        for split in ("train", "validation"):
            lines = (self.rows / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:300]
            rows = [json.loads(line) for line in lines]
            tickets = [{"body": row["passage"], "label": "yes" if row["answer"] else "no"} for row in rows]
            text = "".join(json.dumps(row) + "\n" for row in tickets)
            (folder / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")
        (folder / "rows.jsonl").write_text("\n".join(lines[:50]) + "\n", encoding="utf-8")


def blocks(file: Path, language: str) -> list[str]:
    """Return the blocks of code of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", file.read_text(encoding="utf-8"), flags=re.S)


def lines(block: str) -> Iterator[str]:
    """Yield the commands of a block; continued lines are one command."""
    for line in block.replace("\\\n", " ").splitlines():
        if line.strip():
            yield line


def commands(folder: Path, own: Own | None, *, tests: bool) -> Iterator[tuple[str, re.Pattern[str] | None]]:
    """Yield what is typed; with a pattern, the lines of its output that match are typed next."""
    readme = ROOT / "README.md"
    shell = blocks(readme, "sh")
    first, make, steps, tickets = (
        next(block for block in shell if words in block)
        for words in ("lapora calibrate", "make demo", "lapora tune-prior", "tickets.yaml")
    )
    yield 'git clone --quiet "$LAPORA" clone', None
    yield "cd clone", None
    for line in lines(make):
        if line == "make demo":
            yield line, re.compile(r"^\s*(\.venv/bin/lapora .*|.*\| \.venv/bin/lapora .*)$", flags=re.M)
        elif tests:
            yield line, None
    yield "cd ..", None
    for block in blocks(ROOT / "docs" / "start.md", "sh"):
        for line in lines(block):
            yield line, None
    if own is None:
        return
    for block in (first, steps, tickets):
        if block is not steps:
            own.place(folder)
        if block is tickets:
            (task,) = (each for each in blocks(readme, "yaml") if each.startswith("task: tickets"))
            (folder / "tickets.yaml").write_text(task, encoding="utf-8")
        for line in lines(block):
            yield line.replace("--data boolq", f"--data boolq --data-dir {own.rows.absolute()}"), None


class Terminal:
    """A shell in a pseudo-terminal, recorded.

    Args:
        folder: Where the shell starts.
        recording: Open file of the recording.
    """

    def __init__(self, folder: Path, recording: TextIO) -> None:
        self._recording, self._started = recording, time.monotonic()
        header = {"version": 2, "width": _COLUMNS, "height": _LINES}
        recording.write(json.dumps(header) + "\n")
        child, self._terminal = pty.fork()
        if child == 0:
            os.chdir(folder)
            kept = {key: os.environ[key] for key in ("HOME", "PATH", "LANG", "PIP_INDEX_URL") if key in os.environ}
            shell = {**kept, "TERM": "xterm-256color", "PS1": _PROMPT, "LAPORA": str(ROOT)}
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], shell)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", _LINES, _COLUMNS, 0, 0))
        self._until_prompt()

    def type(self, line: str) -> tuple[float, float, str]:
        """Type a line; return its seconds, the longest silence within them, and what it printed."""
        os.write(self._terminal, line.encode() + b"\n")
        return self._until_prompt()

    def _until_prompt(self) -> tuple[float, float, str]:
        begun = last = time.monotonic()
        silence, seen = 0.0, ""
        while not seen.endswith(_PROMPT):
            ready, _, _ = select.select([self._terminal], [], [], 1.0)
            if not ready:
                continue
            text = os.read(self._terminal, 65536).decode(errors="replace")
            now = time.monotonic()
            silence, last = max(silence, now - last), now
            seen += text
            self._recording.write(json.dumps([round(now - self._started, 3), "o", text]) + "\n")
        return last - begun, silence, seen


def main() -> int:
    """Type everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--folder", type=Path, help="an empty folder; by default a temporary one")
    parser.add_argument("--limit", type=float, default=2.0, help="seconds that a command may be silent")
    parser.add_argument("--own", type=Path, help="a classifier of BoolQ, typed as the README's ./adapter")
    parser.add_argument("--rows", type=Path, help="folder of BoolQ's train.jsonl and validation.jsonl")
    parser.add_argument("--base", type=Path, help="folder of the base model of --own")
    parser.add_argument("--tests", action="store_true", help="type `make test` too")
    options = parser.parse_args()
    if (options.own is None) != (options.rows is None):
        parser.error("--own and --rows come together")
    own = None if options.own is None else Own(options.own, options.rows, options.base)
    wrong, total = 0, 0.0
    with tempfile.TemporaryDirectory() as scratch, options.recording.open("w", encoding="utf-8") as recording:
        folder = options.folder or Path(scratch)
        terminal = Terminal(folder, recording)
        for command, following in commands(folder, own, tests=options.tests):
            waiting = [command]
            while waiting:
                line = waiting.pop(0)
                seconds, silence, output = terminal.type(line)
                _, _, status = terminal.type("echo status $?")
                failed = "status 0" not in status
                wrong += failed or silence > options.limit
                total += seconds
                print(f"{seconds:7.1f} s, silent {silence:4.1f} s{', FAILED' if failed else ''}: {line}", flush=True)
                if following is not None and line == command:
                    waiting += [each.strip() for each in following.findall(_CONTROL.sub("", output).replace("\r", ""))]
    print(f"{total / 60:.1f} minutes")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
