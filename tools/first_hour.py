"""Type the README's `make demo`, what it says to type next, and docs/start.md in a terminal of 80 columns; record it.

A fresh clone and two fresh virtual environments are made: the Makefile's, and the start page's.

    python tools/first_hour.py RECORDING.cast [--folder DIR] [--limit 2.0]

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
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parents[1]
_COLUMNS, _LINES = 80, 24
_PROMPT = "first-hour-ready> "
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Colors and movements of the cursor."""


def commands() -> Iterator[tuple[str, re.Pattern[str] | None]]:
    """Yield what is typed; with a pattern, the lines of its output that match are typed next."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\nmake demo\n" in readme, "the README's command"
    yield 'git clone --quiet "$LAPORA" clone', None
    yield "cd clone", None
    yield "make demo", re.compile(r"^\s*(\.venv/bin/lapora .*|.*\| \.venv/bin/lapora .*)$", flags=re.M)
    yield "cd ..", None
    page = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", page, flags=re.S):  # continued lines are one command
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip():
                yield line, None


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
    options = parser.parse_args()
    wrong, total = 0, 0.0
    with tempfile.TemporaryDirectory() as scratch, options.recording.open("w", encoding="utf-8") as recording:
        terminal = Terminal(options.folder or Path(scratch), recording)
        for command, following in commands():
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
