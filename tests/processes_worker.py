"""What several processes of one run do, for `test_processes.py`: started by torchrun, or alone to compare with.

``sums FILE``: every structure is fitted by all processes together, and again by the first alone; the first writes how
far they are apart. ``commands JSON``: a list of lapora's commands, one after the other.
"""

from __future__ import annotations

import atexit
import json
import sys

import torch

from lapora.cli.app import app
from lapora.cli.console import print_error
from lapora.curvature.passes import CurvatureRun
from lapora.distributed import SINGLE_PROCESS, init_processes
from lapora.errors import LaporaError
from lapora.models.batching import BatchFeed, BatchSize
from lapora.models.lora_layers import find_bayesian_layers
from lapora.posterior.structures import fit_structure
from tiny_models import rows, tiny_causal, tiny_classifier, whole_rows

CASES = {
    "kron": ("kron", {}),
    "kron, reduce": ("kron", {"weight_sharing": "reduce"}),
    "kron, sketched": ("kron", {"rank": 3}),
    "kron, mc": ("kron", {"fisher": "mc"}),
    "kron, empirical": ("kron", {"fisher": "empirical"}),
    "ekfac": ("ekfac", {}),
    "diag": ("diag", {}),
    "lowrank": ("lowrank", {"rank": 40}),
    "full": ("full", {}),
}


def whole_answers(classes):
    """A model that scores answers of several tokens; the rows have three or four."""
    answers = tiny_causal(classes)
    answers.answer_token_ids = None
    return answers


def fitted(processes, make, count, name):
    answers = make(3)
    layers = find_bayesian_layers(answers.model)
    encoded = whole_rows([3, 4, 4, 3] * count)[:count] if make is whole_answers else rows(count)
    structure, options = CASES[name]
    size = BatchSize(2)
    run = CurvatureRun(
        output_model=answers,
        layers=layers,
        batches=lambda: BatchFeed(answers, encoded, size, processes),
        targets=[row % 3 for row in range(count)],
        classes=4 if make is whole_answers else 3,
        processes=processes,
        **options,
    )
    posterior, data = fit_structure(structure, run)
    return torch.cat([values.flatten() for values in posterior.eigenvalues]), data


def compare_sums(file: str) -> None:
    processes, _ = init_processes()
    found = {}
    # 11 rows do not divide by the processes; with two rows one of three has nothing to do.
    for make, count in ((tiny_classifier, 11), (tiny_causal, 11), (tiny_classifier, 2), (whole_answers, 7)):
        for name in CASES:
            values, data = fitted(processes, make, count, name)
            agreed = all(torch.equal(values, other) for other in processes.all_gather(values))
            expected, alone = fitted(SINGLE_PROCESS, make, count, name)
            found[f"{name} of {make.__name__}, {count} rows"] = {
                "agreed": agreed,
                "error": float((values - expected).abs().max() / expected.abs().max()),
                "logits": float((data.logits - alone.logits).nan_to_num(0.0).abs().max()),  # minus infinity in both
                "log_likelihood": abs(data.log_likelihood - alone.log_likelihood),
            }
    if processes.is_main:
        with open(file, "w", encoding="utf-8") as stream:
            json.dump(found, stream)


def run_commands(commands: list[list[str]]) -> None:
    for command in commands:
        try:
            app(command, standalone_mode=False)
        except LaporaError as error:
            print_error(str(error), error.reporting_rank)
            if error.exit_status != 5:  # a bad line that was reported
                sys.exit(error.exit_status)


def _say_if_the_group_is_left() -> None:
    if torch.distributed.is_initialized():
        print("the process group was not ended", file=sys.stderr)


if __name__ == "__main__":
    atexit.register(_say_if_the_group_is_left)  # called after what lapora registers
    if sys.argv[1] == "sums":
        compare_sums(sys.argv[2])
    else:
        run_commands(json.loads(sys.argv[2]))
