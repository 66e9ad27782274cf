"""Copy a posterior with the scale of the paper's implementation: times the mean number of tokens of a row.

Run as ``python -m benchmarks.real.asdl_scale ADAPTER BASE NAME COPY``, for an output head with LoRA, which
``--engine asdl`` refuses. On the layers below it and without padding, the factors of ``--engine asdl`` are those of
``expand`` times this number; a head reads one token of a row, and both scales are the same. Prints the number as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from lapora.config import DataSettings, ModelSettings
from lapora.posterior.gaussian import BlockPosterior
from lapora.storage.files import write_lock
from lapora.storage.saved import posterior_folder, write_posterior
from lapora.workflows.rows import read_labelled_rows
from lapora.workflows.task_model import open_fitted

HEAD = "lm_head"


def main() -> None:
    adapter, base, name, copy = sys.argv[1:]
    fitted = open_fitted(ModelSettings(adapter, base_model=base, device="cpu", dtype="float32"), name)
    saved = fitted.posterior
    train = DataSettings(data_dir=Path(saved.manifest.data.data_dir or "."), split="train")
    rows = read_labelled_rows(saved, fitted.model.kind, train)
    tokens = statistics.fmean(len(row.input_ids) for row in fitted.model.encode(rows.examples))
    posterior = saved.gaussian()
    assert isinstance(posterior, BlockPosterior)
    scaled = [
        block if HEAD in block.name else replace(block, eigenvalues=block.eigenvalues * tokens)
        for block in posterior.blocks
    ]
    folder = posterior_folder(Path(adapter), copy)
    with write_lock(folder):
        write_posterior(folder, saved.manifest, saved.content["prior"], BlockPosterior(scaled))
    print(json.dumps({"tokens": tokens}))


if __name__ == "__main__":
    main()
