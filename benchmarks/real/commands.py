"""Run commands in processes of their own, measure them, and keep what they gave: a run that was cut resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Commands:
    """Runs each command once.

    Args:
        file: JSON-lines file with a record of every command that ended well.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.records: dict[str, dict[str, Any]] = {record["key"]: record for record in map(json.loads, lines)}

    def run(self, key: str, *command: str, prints_json: bool = False) -> dict[str, Any]:
        """Return the record of a command: ``key``, ``seconds``, ``peak_mib`` and, if it prints JSON, ``result``.

        Raises:
            SystemExit: It fails; its last lines are printed.
        """
        if key in self.records:
            return self.records[key]
        print(f"{time.strftime('%H:%M:%S')} {key}", file=sys.stderr, flush=True)
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        out, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{key}: {' '.join(command)}\n{errors[-3000:]}")
        record: dict[str, Any] = {"key": key, "seconds": round(time.perf_counter() - started, 2)}
        if peak := [line for line in errors.splitlines() if line.startswith("PEAK ")]:
            record["peak_mib"] = float(peak[-1].split()[1])
        if prints_json:
            record["result"] = json.loads(out)
        self.records[key] = record
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record

    def lapora(self, key: str, *arguments: str) -> dict[str, Any]:
        """Run a command of lapora; its peak memory is measured as well."""
        return self.run(key, "-m", "benchmarks.real.measured", *arguments, prints_json="--json" in arguments)
