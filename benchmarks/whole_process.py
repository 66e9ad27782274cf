"""Measure whole processes, from start to exit: ``python -m benchmarks.whole_process [DEMO_FOLDER]``.

Each command runs several times, each in a new process. The time to the first batch is that from the start of the
process to its first forward pass.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ROUNDS = 3
_WATCHED = """
import os, sys, time
started = float(os.environ["LAPORA_STARTED"])
def watch():
    from lapora.curvature.backward import Linearisation
    run = Linearisation.run
    def first(self, *arguments):
        if watch.first is None:
            watch.first = time.time() - started
            print(f"FIRST {watch.first}", file=sys.stderr)
        return run(self, *arguments)
    Linearisation.run = first
watch.first = None
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "lapora.workflows.fit" or name == "lapora.workflows.predict":
            sys.meta_path.remove(self)
            watch()
        return None
sys.meta_path.insert(0, Finder())
from lapora.__main__ import main
main()
"""


def main() -> None:
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        subprocess.run(
            [sys.executable, "-m", "lapora", "demo", str(demo), "--offline"], check=True, capture_output=True
        )
        measure(demo)


def measure(demo: Path) -> None:
    adapter = str(demo / "adapter")
    manifest = json.loads((demo / "adapter" / "laplace" / "default" / "posterior.json").read_text())
    data = ["--data", str(demo / "farm.yaml"), "--data-dir", manifest["data"]["data_dir"]]
    rows = next((demo / "data").glob("validation.jsonl"))
    commands = {
        "lapora --help": ["--help"],
        "lapora tune-prior --method marglik": ["tune-prior", adapter, "--method", "marglik"],
        "lapora fit": ["fit", adapter, *data, "--overwrite"],
        "lapora predict": ["predict", adapter, str(rows)],
    }
    print("| command | whole process | to the first batch |\n| --- | --- | --- |")
    for name, arguments in commands.items():
        whole, first = [], []
        for _ in range(_ROUNDS):
            started = time.time()
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", _WATCHED, *arguments],
                env={**os.environ, "LAPORA_STARTED": str(started)},
                capture_output=True,
                text=True,
                check=True,
            )
            whole.append(time.time() - started)
            first += [float(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("FIRST ")]
        shown = f"{statistics.median(first):.2f} s" if first else ""
        print(f"| `{name}` | {statistics.median(whole):.2f} s | {shown} |", flush=True)


if __name__ == "__main__":
    main()
