"""Run commands in processes of their own, measure them, and keep what they gave: a run that was cut resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Commands:
    """Runs each command once; may be used by several threads.

    Args:
        file: JSON-lines file with a record of every command that ended well.
        threads: Threads that PyTorch uses in each process.
    """

    def __init__(self, file: Path, threads: int) -> None:
        self._file, self._threads = file, threads
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.records: dict[str, dict[str, Any]] = {record["key"]: record for record in map(json.loads, lines)}
        self._running: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._writing = threading.Lock()

    def run(self, key: str, *command: str, prints_json: bool = False) -> dict[str, Any]:
        """Return the record of a command: ``key``, ``seconds``, ``peak_mib`` and, if it prints JSON, ``result``.

        Raises:
            RuntimeError: It fails; the message has its last lines.
        """
        with self._writing:
            running = self._running[key]
        with running:
            if key not in self.records:
                self._keep(self._measured(key, command, prints_json))
            return self.records[key]

    def lapora(self, key: str, *arguments: str) -> dict[str, Any]:
        """Run a command of lapora; its peak memory is measured as well."""
        return self.run(key, "-m", "benchmarks.real.measured", *arguments, prints_json="--json" in arguments)

    def _measured(self, key: str, command: tuple[str, ...], prints_json: bool) -> dict[str, Any]:
        print(f"{time.strftime('%H:%M:%S')} {key}", file=sys.stderr, flush=True)
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        started = time.perf_counter()
        process = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(self._threads)},
        )
        if process.returncode:
            raise RuntimeError(f"{key}: {' '.join(command)}\n{process.stderr[-3000:]}")
        record: dict[str, Any] = {"key": key, "seconds": round(time.perf_counter() - started, 2)}
        if peak := [line for line in process.stderr.splitlines() if line.startswith("PEAK ")]:
            record["peak_mib"] = float(peak[-1].split()[1])
        if prints_json:
            record["result"] = json.loads(process.stdout)
        return record

    def _keep(self, record: dict[str, Any]) -> None:
        with self._writing, self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            self.records[record["key"]] = record
