"""Batches sorted by length, whose size grows while memory allows and is halved after running out of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from lapora.config import MOST_TOKENS, TOKEN_BUDGET
from lapora.distributed import SINGLE_PROCESS, Processes
from lapora.errors import UsageError
from lapora.models.answer_check import check_answers
from lapora.models.batches import Batch, Encoded, collate, network_length, texts_of
from lapora.models.heap import return_freed_memory
from lapora.models.outputs import OutputModel
from lapora.models.padding_check import check_pairs

Result = TypeVar("Result")

_MEMORY_FRACTION = 0.9
_VOCABULARY = 2**16
"""Number of vocabulary logits of a position that take about as much memory as a token in the rest of the network."""
_CPU_ALLOCATOR = "DefaultCPUAllocator"


class BatchSize:
    """Number of rows per batch: fixed, or limited by a token budget.

    The budget is adapted as batches run, and carries over to later passes that use this object. On a CUDA device it
    doubles while twice the last batch would fit in memory; on a CPU it stays, since larger batches are no faster.

    Args:
        rows: Rows per batch, or None for the token budget.
        tokens: Initial budget: maximum B x T of a batch, padding included (a single row may exceed it).
    """

    def __init__(self, rows: int | None, tokens: int = TOKEN_BUDGET) -> None:
        self.rows = rows
        self.tokens = tokens
        self._may_grow = rows is None

    def for_length(self, length: int) -> int:
        """Return the number of rows per batch, for rows of up to ``length`` tokens."""
        return self.rows or max(1, self.tokens // max(1, length))

    def report_success(self, device: torch.device) -> None:
        """Double the budget after a batch that fit, if twice its memory would fit too."""
        if not self._may_grow or device.type != "cuda" or self.tokens >= MOST_TOKENS:
            return
        resident = torch.cuda.memory_allocated(device)
        used = torch.cuda.max_memory_allocated(device) - resident
        torch.cuda.reset_peak_memory_stats(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - resident
        if 2 * used < _MEMORY_FRACTION * free:
            self.tokens *= 2

    def report_out_of_memory(self, rows: int, length: int) -> None:
        """Halve the budget after a batch that ran out of memory, and stop its growth.

        Args:
            rows: Rows of the batch.
            length: Tokens per row, padding included.

        Raises:
            UsageError: The batch size is fixed, or the batch had a single row.
        """
        if self.rows is not None:
            raise UsageError(
                f"a batch of {rows} rows of {length} tokens does not fit in memory; use --batch-size auto or a smaller "
                "number"
            )
        if rows == 1:
            raise UsageError(
                f"one row of {length} tokens does not fit in memory; use --gradient-checkpointing, or fit with --dtype "
                "bfloat16, --quantize 4bit or a smaller --max-length"
            )
        self.tokens = max(1, rows * length // 2)
        self._may_grow = False


class BatchFeed:
    """One pass over rows in batches of similar length; can be iterated once.

    The rows with the most answers come first, the longest of them before the others, so that running out of memory
    happens at the start; the rows of a batch have the same number of answers. Every row is yielded exactly once,
    except for the rows of a requeued batch.

    Args:
        output_model: The network; gives padding id, padding side and device.
        encoded: The encoded rows.
        size: Batch size.
        processes: The processes that share the rows; this rank's shard is yielded.
        bucketed: Pad every row to :func:`bucket_length`, independent of the other rows of its batch. The padded
            length determines the summation order in attention, so that results are nearly independent of batch size.
            Ignored where only rows of equal length share a batch.
    """

    def __init__(
        self,
        output_model: OutputModel,
        encoded: Sequence[Encoded],
        size: BatchSize,
        processes: Processes = SINGLE_PROCESS,
        *,
        bucketed: bool = False,
    ) -> None:
        self.size = size
        self._bucketed = bucketed and not output_model.equal_lengths
        self._output_model = output_model
        self._encoded = encoded
        if any(row.answers for row in encoded):
            check_answers(output_model)
        check_pairs(output_model, encoded)
        self._shapes = [self._shape(row) for row in encoded]
        order = sorted(range(len(encoded)), key=self._order_of)
        self._order = processes.shard(order)
        self._done = 0

    def __iter__(self) -> Iterator[Batch]:
        while self._done < len(self._order):
            sequences, answers, longest = self._shapes[self._order[self._done]]
            rows = self._order[self._done : self._done + self.size.for_length(self._cost(self._order[self._done]))]
            common = 3 if self._bucketed or self._output_model.equal_lengths else 2
            rows = [row for row in rows if self._shapes[row][:common] == (sequences, answers, longest)[:common]]
            self._done += len(rows)
            yield collate(
                [self._encoded[row] for row in rows],
                rows,
                pad_token_id=self._output_model.pad_token_id,
                padding_side=self._output_model.padding_side,
                device=self._output_model.device,
                pad_to=longest,
                packed=sequences == 1,
            )

    def _order_of(self, row: int) -> tuple[int, int, int, int]:
        sequences, answers, _ = self._shapes[row]
        return -sequences, -answers, -network_length(self._encoded[row], packed=sequences == 1), row

    def _cost(self, row: int) -> int:
        """Return the number of tokens of a row; those of answers count more if the vocabulary is large."""
        sequences, answers, length = self._shapes[row]
        scored = length - len(self._encoded[row].input_ids) if answers else 0
        return sequences * (length + scored * (self._output_model.vocabulary // _VOCABULARY))

    def _shape(self, row: Encoded) -> tuple[int, int, int]:
        """Return the number of sequences of a row, of its answers, and of tokens of a sequence."""
        answers, length = len(row.answers), network_length(row)
        if not answers:
            longest = bucket_length(length, self._output_model.max_positions) if self._bucketed else length
            return texts_of(row), 0, longest
        packed = self._output_model.packs(length)
        if not packed:
            length = network_length(row, packed=False)
        if self._bucketed:
            length = bucket_length(length, None if packed else self._output_model.max_positions)
        return (1 if packed else answers), answers, length

    def skip(self, rows: int) -> None:
        """Skip the first ``rows`` rows, in the order in which they would be yielded."""
        self._done += rows

    def requeue(self, batch: Batch) -> None:
        """Requeue the rows of the last batch, which ran out of memory, in smaller batches.

        Raises:
            UsageError: The batch size is fixed, or the batch had a single row.
        """
        rows = len(batch)
        self.size.report_out_of_memory(rows, batch.input_ids.numel() // rows)
        self._done -= rows

    def report_success(self) -> None:
        """Report that the last batch fit in memory, and return what it freed on a CPU."""
        device = self._output_model.device
        self.size.report_success(device)
        if device.type == "cpu":
            return_freed_memory()


def bucket_length(length: int, limit: int | None) -> int:
    """Return the next longer bucket of 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160 ... (four per doubling).

    Strictly longer, so that there is always padding: without padding torch may choose another attention kernel.

    Args:
        length: Tokens of a row.
        limit: Number of positions of the model, or None.
    """
    step = 1 << (max(length.bit_length(), 6) - 3)
    longer = (length // step + 1) * step
    return longer if limit is None else max(length, min(longer, limit))


def run_batches(batches: Iterable[Batch], work: Callable[[Batch], Result]) -> Iterator[tuple[Batch, Result]]:
    """Run a function on every batch; batches of a feed that run out of memory are requeued in smaller batches.

    Args:
        batches: A :class:`BatchFeed`, or fixed batches.
        work: The function. It may be called again for rows for which it ran out of memory, so it must not have side
            effects before it returns.

    Yields:
        Each batch and the function's result.

    Raises:
        UsageError: A batch does not fit in memory and cannot be made smaller.
    """
    for batch in batches:
        fits, result = _attempt(work, batch, may_retry=isinstance(batches, BatchFeed))
        if fits:
            assert result is not None
            if isinstance(batches, BatchFeed):
                batches.report_success()
            yield batch, result
        else:
            _free_memory()
            assert isinstance(batches, BatchFeed)
            batches.requeue(batch)


def _attempt(work: Callable[[Batch], Result], batch: Batch, *, may_retry: bool) -> tuple[bool, Result | None]:
    # A separate function, so that the error and the tensors in its traceback are freed when it returns.
    try:
        return True, work(batch)
    except (RuntimeError, MemoryError) as error:
        if may_retry and is_out_of_memory(error):
            return False, None
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the host is out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
