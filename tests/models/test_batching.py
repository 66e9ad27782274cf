"""Batches grow to what memory allows, and halve where it ends, without a row lost or counted twice."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lapora.config import MOST_TOKENS, TOKEN_BUDGET
from lapora.errors import UsageError
from lapora.models.batching import BatchFeed, BatchSize, bucket_length, run_batches
from lapora.models.lora_layers import find_bayesian_layers
from lapora.posterior.gaussian import BlockPosterior
from lapora.posterior.structures import CurvatureRun, fit_structure
from lapora.predictive.moments import LinearisedPredictor
from tiny_models import close, posterior, rows, tiny_causal, tiny_classifier


class MemoryEndsAt(TorchDispatchMode):
    """Fails one operation, the nth, as a device without memory does."""

    def __init__(self, operation: int):
        super().__init__()
        self.left = operation

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return function(*arguments, **(keywords or {}))


class RowsNeedMemory(TorchDispatchMode):
    """Fails every operation on more than so many rows."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.dim() == 3 and len(result) > self.most:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return result


def test_every_row_comes_once_longest_first_within_the_budget():
    answers, encoded = tiny_classifier(2), rows(20)
    found = list(BatchFeed(answers, encoded, BatchSize(None, tokens=16)))
    order = [row for batch in found for row in batch.rows]
    lengths = [len(encoded[row].input_ids) for row in order]
    assert sorted(order) == list(range(20))
    assert lengths == sorted(lengths, reverse=True)
    assert all(batch.input_ids.numel() <= 16 for batch in found)
    assert [len(batch) for batch in BatchFeed(answers, encoded, BatchSize(6))] == [6, 6, 6, 2]


def run_of(answers, layers, encoded, size, **how):
    targets = [index % 3 for index in range(len(encoded))]
    return CurvatureRun(answers, layers, lambda: BatchFeed(answers, encoded, size), targets, 3, **how)


def eigenvalues(found):
    return torch.cat([values.flatten() for values in found.eigenvalues])


STRUCTURES = {
    "kron": {},
    "kron, reduce": {"weight_sharing": "reduce"},
    "kron, sketched": {"rank": 3},
    "ekfac": {},
    "diag": {},
    "lowrank": {"rank": 40},
    "full": {},
}


@pytest.mark.parametrize(
    ("name", "model"), [*((name, tiny_classifier) for name in STRUCTURES), ("kron", tiny_causal), ("full", tiny_causal)]
)
def test_a_batch_that_runs_out_of_memory_anywhere_leaves_no_trace(name, model):
    answers, encoded = model(3), rows(9)
    layers = find_bayesian_layers(answers.model)
    structure = name.split(",")[0]
    whole, data = fit_structure(structure, run_of(answers, layers, encoded, BatchSize(None, 40), **STRUCTURES[name]))
    met = 0
    for operation in (11, 151, 293, 461):
        size = BatchSize(None, 40)
        with MemoryEndsAt(operation):
            try:
                run = run_of(answers, layers, encoded, size, **STRUCTURES[name])
                halved, again = fit_structure(structure, run)
            except torch.OutOfMemoryError:
                continue  # in the decomposition after the passes, where there is no batch to halve
        met += size.tokens < 40
        close(eigenvalues(halved), eigenvalues(whole), answers)
        close(again.logits, data.logits, answers)
    assert met > 1


def test_prediction_goes_on_in_halves():
    answers, encoded = tiny_classifier(3), rows(9)
    layers = find_bayesian_layers(answers.model)
    _, blocks = posterior(answers, layers, encoded)
    size = BatchSize(None, 1000)
    precisions = torch.ones(1, len(layers), dtype=torch.float64)

    def covariances(feed):
        found = torch.zeros(9, 4, dtype=torch.float64)
        with LinearisedPredictor(answers, layers, BlockPosterior(blocks), precisions, classes=3) as predictor:
            for batch, moments in run_batches(feed, predictor.moments):
                found[list(batch.rows)] = moments.covariance.flatten(1)
        return found

    whole = covariances(BatchFeed(answers, encoded, BatchSize(None)))
    with RowsNeedMemory(4):
        halved = covariances(BatchFeed(answers, encoded, size))
    assert size.tokens < 1000
    assert max(len(batch) for batch in BatchFeed(answers, encoded, size)) <= 4
    close(halved, whole, answers)


def test_evenly_padded_rows_have_the_same_length_beside_any_others():
    answers, encoded = tiny_classifier(2), rows(40)
    for row, length in zip(encoded, range(1, 33), strict=False):
        row.input_ids = [1] * length
    padded = [{}, {}, {}]
    for found, size in zip(padded, (BatchSize(1), BatchSize(7), BatchSize(None)), strict=True):
        for batch in BatchFeed(answers, encoded, size, bucketed=True):
            found |= dict.fromkeys(batch.rows, batch.input_ids.shape[1])
    assert padded[0] == padded[1] == padded[2] and sorted(padded[0]) == list(range(40))
    assert set(padded[0].values()) == {8, 16, 24, 32}  # the model has 32 positions


def test_bucket_lengths():
    seen = sorted({bucket_length(length, None) for length in range(300)})
    assert seen == [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]
    for length in range(1, 513):
        assert length < bucket_length(length, None) <= max(length + 8, 1.25 * length)
        assert length <= bucket_length(length, 512) <= 512


def test_what_cannot_be_halved_is_refused_in_one_line():
    answers, encoded = tiny_classifier(2), rows(4)

    def fails(batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(UsageError, match=r"^a batch of 3 rows of \d tokens does not fit in memory; use --ba"):
        list(run_batches(BatchFeed(answers, encoded, BatchSize(3)), fails))
    with pytest.raises(UsageError, match=r"^one row of \d tokens does not fit in memory; use --gradient-checkpointing"):
        list(run_batches(BatchFeed(answers, encoded, BatchSize(None)), fails))


def test_other_errors_are_not_taken_for_it():
    def fails(batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        list(run_batches(BatchFeed(tiny_classifier(2), rows(4), BatchSize(None)), fails))


@pytest.fixture
def device_memory(monkeypatch):
    """A CUDA device of 8,000 bytes, on which a token takes one and 1,000 are resident."""

    def last_batch(tokens):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + tokens)

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1500)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6500, 8000))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    return last_batch


def test_the_budget_doubles_on_a_device_while_twice_as_much_fits(device_memory):
    size = BatchSize(None, tokens=100)
    seen = []
    for _ in range(8):
        device_memory(size.tokens)
        size.report_success(torch.device("cuda"))
        seen.append(size.tokens)
    # 9/10 of 7,000 free bytes hold a batch of 3,200 tokens, but not one of 6,400.
    assert seen == [200, 400, 800, 1600, 3200, 3200, 3200, 3200]
    size.report_out_of_memory(rows=32, length=100)
    device_memory(1)
    size.report_success(torch.device("cuda"))
    assert size.tokens == 1600  # once it did not fit, it grows no more


def test_the_budget_has_an_end_and_a_cpu_or_a_fixed_size_does_not_grow(device_memory):
    device_memory(1)
    for size, device, tokens in (
        (BatchSize(None, MOST_TOKENS), "cuda", MOST_TOKENS),
        (BatchSize(None), "cpu", TOKEN_BUDGET),
        (BatchSize(4), "cuda", TOKEN_BUDGET),
    ):
        size.report_success(torch.device(device))
        assert size.tokens == tokens


SCRIPT = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
from lapora.models.batching import BatchFeed, BatchSize
from lapora.models.lora_layers import find_bayesian_layers
from lapora.posterior.structures import CurvatureRun, fit_structure
from tiny_models import rows, tiny_causal

torch.set_num_threads(1)
answers = tiny_causal(2)
layers, encoded = find_bayesian_layers(answers.model), rows(3000)
def fit(size):
    run = CurvatureRun(answers, layers, lambda: BatchFeed(answers, encoded, size), [0] * len(encoded), 2)
    return torch.cat([values.flatten() for values in fit_structure("kron", run)[0].eigenvalues])
expected = fit(BatchSize(500))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 10 * 2**20, resource.RLIM_INFINITY))
size = BatchSize(None, tokens=200_000)
found = fit(size)
torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
print(size.tokens)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited as Linux does it")
def test_real_memory_that_ends(tmp_path):
    from pathlib import Path

    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 100_000
