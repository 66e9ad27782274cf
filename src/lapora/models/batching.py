"""Rows fed to a model in batches as large as fit: sorted by length, grown where memory allows, halved where it ends."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from lapora.config import MOST_TOKENS, TOKEN_BUDGET
from lapora.distributed import SINGLE_PROCESS, Processes
from lapora.errors import UsageError
from lapora.models.batches import Batch, Encoded, collate
from lapora.models.outputs import OutputModel

Result = TypeVar("Result")

_SHARE_OF_MEMORY = 0.9
_CPU_ALLOCATOR = "DefaultCPUAllocator"


class BatchSize:
    """How many rows a batch has: a fixed number, or as many as a budget of tokens holds.

    The budget is learnt as batches are run, and serves every pass that is given this object. On a CUDA device it
    doubles while twice the last batch would fit in memory; on a CPU larger batches are no faster, and it stays.

    Args:
        rows: Rows per batch, or None for the budget.
        tokens: The first budget: greatest B x T of a batch, padding included (one row may exceed it).
    """

    def __init__(self, rows: int | None, tokens: int = TOKEN_BUDGET) -> None:
        self.rows = rows
        self.tokens = tokens
        self._may_grow = rows is None

    def for_length(self, length: int) -> int:
        """How many rows of up to ``length`` tokens make a batch."""
        return self.rows or max(1, self.tokens // max(1, length))

    def report_success(self, device: torch.device) -> None:
        """A batch went through: double the budget if twice as much would."""
        if not self._may_grow or device.type != "cuda" or self.tokens >= MOST_TOKENS:
            return
        resident = torch.cuda.memory_allocated(device)
        used = torch.cuda.max_memory_allocated(device) - resident
        torch.cuda.reset_peak_memory_stats(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - resident
        if 2 * used < _SHARE_OF_MEMORY * free:
            self.tokens *= 2

    def report_out_of_memory(self, rows: int, length: int) -> None:
        """A batch ran out of memory: halve the budget, and let it grow no more.

        Raises:
            UsageError: The rows of a batch are fixed, or there was one alone.
        """
        if self.rows is not None:
            raise UsageError(
                f"a batch of {rows} rows of {length} tokens does not fit in memory; use --batch-size auto, or less"
            )
        if rows == 1:
            raise UsageError(
                f"one row of {length} tokens does not fit in memory; use a smaller --max-length, --dtype bfloat16 or "
                "--quantize 4bit"
            )
        self.tokens = max(1, rows * length // 2)
        self._may_grow = False


class BatchFeed:
    """One pass over rows, in batches of like length; iterate it once.

    The longest rows come first, so that a batch that does not fit is met at once. Every row comes exactly once,
    but for those of a batch that is put back.

    Args:
        answers: The network that will read them.
        encoded: The rows' token ids.
        size: How large a batch may be.
        processes: Those that share the rows: this one's are fed, of like lengths as the others'.
        bucketed: Pad every row to :func:`bucket_length`, whatever rows are beside it. How far a row is padded decides how
            attention adds up, and so the last digits: these then depend little on the size of the batches.
    """

    def __init__(
        self,
        answers: OutputModel,
        encoded: Sequence[Encoded],
        size: BatchSize,
        processes: Processes = SINGLE_PROCESS,
        *,
        bucketed: bool = False,
    ) -> None:
        self.size = size
        self._bucketed = bucketed
        self._answers = answers
        self._encoded = encoded
        order = sorted(range(len(encoded)), key=lambda row: (-len(encoded[row].input_ids), row))
        self._order = processes.shard(order)
        self._done = 0

    def __iter__(self) -> Iterator[Batch]:
        while self._done < len(self._order):
            longest = self._length(self._order[self._done])
            rows = self._order[self._done : self._done + self.size.for_length(longest)]
            if self._bucketed:
                rows = [row for row in rows if self._length(row) == longest]
            self._done += len(rows)
            yield collate(
                [self._encoded[row] for row in rows],
                rows,
                pad_token_id=self._answers.pad_token_id,
                padding_side=self._answers.padding_side,
                device=self._answers.device,
                pad_to=longest,
            )

    def _length(self, row: int) -> int:
        length = len(self._encoded[row].input_ids)
        return bucket_length(length, self._answers.max_positions) if self._bucketed else length

    def skip(self, rows: int) -> None:
        """Leave out the first rows, in the order in which they would come."""
        self._done += rows

    def requeue(self, batch: Batch) -> None:
        """The batch last given did not fit in memory: its rows come again, in halves.

        Raises:
            UsageError: Smaller batches are not allowed, or not possible.
        """
        rows, length = batch.input_ids.shape
        self.size.report_out_of_memory(rows, length)
        self._done -= rows

    def report_success(self) -> None:
        """The batch last given was no trouble."""
        self.size.report_success(self._answers.device)


def bucket_length(length: int, most: int | None) -> int:
    """The next longer of 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160 ...: four in a doubling.

    Longer, so that there is always padding: without any, another kernel may be chosen.

    Args:
        length: Tokens of a row.
        most: Positions that the model has, or None.
    """
    step = 1 << (max(length.bit_length(), 6) - 3)
    longer = (length // step + 1) * step
    return longer if most is None else max(length, min(longer, most))


def run_batches(batches: Iterable[Batch], work: Callable[[Batch], Result]) -> Iterator[tuple[Batch, Result]]:
    """Do something with every batch; what a feed gave and did not fit is done again in smaller batches.

    Args:
        batches: A :class:`BatchFeed`, or batches as they are to be.
        work: What is done. It may be called again for rows for which it ran out of memory: until it returns
            it must have changed nothing that lasts.

    Yields:
        Each batch and what was made of it.

    Raises:
        UsageError: It does not fit, and cannot be made smaller.
    """
    for batch in batches:
        fits, result = _attempt(work, batch, forgiving=isinstance(batches, BatchFeed))
        if fits:
            assert result is not None
            if isinstance(batches, BatchFeed):
                batches.report_success()
            yield batch, result
        else:
            _free_memory()
            assert isinstance(batches, BatchFeed)
            batches.requeue(batch)


def _attempt(work: Callable[[Batch], Result], batch: Batch, *, forgiving: bool) -> tuple[bool, Result | None]:
    # A function of its own: the error, and the tensors that its traceback holds, are gone when it returns.
    try:
        return True, work(batch)
    except (RuntimeError, MemoryError) as error:
        if forgiving and is_out_of_memory(error):
            return False, None
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the machine, has come to its end."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
