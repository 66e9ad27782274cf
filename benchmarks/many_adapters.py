"""Measure many adapters on one base: time to load one, memory per adapter, and mixed rows compared with one adapter.

``python -m benchmarks.many_adapters [--adapters 32] [--rows 512]``. The adapter is the shared two-class one on MiniLM
(22M parameters), copied.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from benchmarks.shared_adapters import ADAPTERS
from lapora.config import FitSettings, ModelSettings, PredictSettings
from lapora.workflows.fit import fit
from lapora.workflows.predict import predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rows", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        model, data = ADAPTERS["source2"].place(Path(folder))
        fit(model, data, FitSettings())
        many = Path(folder) / "many"
        for number in range(options.adapters):
            shutil.copytree(model.adapter, many / f"customer-{number}")
        texts = [
            json.loads(line)["text"]
            for line in (Path(str(data.data_dir)) / "validation.jsonl").read_text().splitlines()
        ]
        _measure(model, many, [texts[row % len(texts)] for row in range(options.rows)], options.adapters)


def _measure(model: ModelSettings, many: Path, texts: list[str], count: int) -> None:
    alone = PredictSettings()
    routed = replace(alone, adapters=(str(many),), adapters_kept=count + 1)
    _, loading = _run(model, alone, [_line(texts[0])])
    before = psutil.Process().memory_info().rss
    _, base = _run(model, routed, [_line(texts[0])])
    _, opened = _run(model, routed, [_line(texts[0], f"customer-{number}") for number in range(count)])
    after = psutil.Process().memory_info().rss
    print(f"one adapter alone, loaded and one row: {loading:.2f} s")
    print(
        f"{count} adapters opened and one row each: {opened:.2f} s, {(opened - base) / count * 1e3:.0f} ms an adapter"
    )
    print(f"memory: {(after - before) / count / 2**20:.1f} MiB an adapter")
    plain = [_line(text) for text in texts]
    in_turn = [_line(text, f"customer-{row % count}") for row, text in enumerate(texts)]
    grouped = sorted(in_turn, key=lambda line: json.loads(line)["adapter"])
    warm = [_line(texts[0], f"customer-{number}") for number in range(count)]
    for name, settings, lines, opening in (
        ("one adapter", alone, plain, [_line(texts[0])]),
        ("in turn", routed, in_turn, warm),
        ("sorted by adapter", routed, grouped, warm),
    ):
        _, spent = _run(model, settings, opening + lines)
        _, start = _run(model, settings, opening)
        print(f"{name}: {(spent - start) / len(lines) * 1e3:.2f} ms a row")


def _line(text: str, adapter: str | None = None) -> bytes:
    return json.dumps({"text": text} | ({"adapter": adapter} if adapter else {})).encode()


def _run(model: ModelSettings, settings: PredictSettings, lines: list[bytes]) -> tuple[int, float]:
    started = time.perf_counter()
    answered = sum(1 for _ in predict(model, settings, lines))
    return answered, time.perf_counter() - started


if __name__ == "__main__":
    main()
