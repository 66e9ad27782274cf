"""Check all cases, each in a process of its own, and write docs/reference/coverage.md."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.breadth.cases import model_cases, option_cases
from benchmarks.breadth.check import TOLERANCE, Case, NoSuchCaseError, check_case, save_case
from benchmarks.breadth.page import write_page
from lapora.config import Dtype
from lapora.errors import LaporaError, NumericalError, UsageError

SECONDS = 600


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breadth", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("coverage.jsonl"), help="results; those there are kept")
    parser.add_argument("--only", default="", help="regular expression of the cases to check, such as causal/llama/")
    parser.add_argument("--minutes", type=float, default=600, help="stop after this time; the next run goes on")
    parser.add_argument("--seed", type=int, help="check the cases in a random order")
    parser.add_argument("--again", default="^$", help="regular expression of outcomes to check again: wrong|crash")
    parser.add_argument("--page", action="store_true", help="write the page from the results, and check nothing")
    arguments = parser.parse_args()
    cases = [*option_cases(), *model_cases()]
    if arguments.page:
        found = read_results(arguments.results)
        write_page({case.key: found[case.key] for case in cases})
        return
    if arguments.seed is not None:
        random.Random(arguments.seed).shuffle(cases)
    torch.set_num_threads(1)  # threads do not survive a fork
    end = time.monotonic() + 60 * arguments.minutes
    done = read_results(arguments.results)
    done = {key: each for key, each in done.items() if not re.search(arguments.again, each["outcome"])}
    for case in cases:
        if case.key in done or not re.search(arguments.only, case.key):
            continue
        if time.monotonic() > end:
            break
        result = run_alone(case)
        print(json.dumps(result), flush=True)
        with arguments.results.open("a") as stream:
            stream.write(json.dumps(result) + "\n")


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """Return the last result of every case in a file."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {each["case"]: each for each in map(json.loads, lines)}


def run_alone(case: Case, seconds: int = SECONDS) -> dict[str, Any]:
    """Check a case in a fork of this process, ended after a time limit."""
    start = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(seconds)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        with os.fdopen(writing, "w") as stream:
            json.dump(outcome(case), stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    found = json.loads(text) if text else {"outcome": "crash", "words": f"no result within {seconds} s"}
    return {"case": case.key, **found, "seconds": round(time.monotonic() - start, 1)}


def outcome(case: Case) -> dict[str, Any]:
    """Return ``works``, ``wrong``, ``refused`` (by lapora), ``none`` (PEFT makes no such adapter) or ``crash``."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        try:
            folder = save_case(case, Path(place))
        except NoSuchCaseError as error:
            return {"outcome": "none", "words": str(error)}
        except BaseException as error:
            return {"outcome": "unbuilt", "words": words_of(error)}
        try:
            try:
                return measured(folder, "float64")
            except (UsageError, NumericalError):  # the model's own code computes in float32 alone
                return measured(folder, "float32")
        except LaporaError as refusal:
            return {"outcome": "refused", "words": str(refusal).replace(place, "…")}
        except BaseException as error:
            return {"outcome": "crash", "words": words_of(error)}


def measured(folder: Path, dtype: Dtype) -> dict[str, Any]:
    error = check_case(folder, dtype)
    return {"outcome": "works" if error < TOLERANCE[dtype] else "wrong", "dtype": dtype, "error": error}


def words_of(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"


if __name__ == "__main__":
    main()
