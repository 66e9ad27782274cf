"""Data parallelism over processes started by ``torchrun`` or ``accelerate launch``.

Every process has the whole model and reads the same rows. A pass runs on each rank's shard, and its sums are
all-reduced afterwards. Only the main process (rank 0) writes files, takes locks and prints. Without a launcher,
:data:`SINGLE_PROCESS` makes all collectives no-ops.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from lapora.errors import LaporaError, ProcessError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Item = TypeVar("Item")


class Processes:
    """Collectives of a run of one process, and the base class for several.

    Attributes:
        rank: Rank of this process, from 0.
        count: Number of processes (the world size).
    """

    rank = 0
    count = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which writes files and prints."""
        return self.rank == 0

    def shard(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this rank's shard: every ``count``-th item, so that rows sorted by length are split evenly."""
        return items[self.rank :: self.count]

    def on_main(self, manager: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """Return a context that is entered on rank 0 only; if entering fails, all ranks raise."""
        return manager

    def raise_together(self) -> AbstractContextManager[None]:
        """Return a context for code that every rank runs; if one rank fails, all ranks raise."""
        return nullcontext()

    def on_shard(self) -> AbstractContextManager[None]:
        """Return a context for work on this rank's shard; errors are prefixed with the rank."""
        return nullcontext()

    def broadcast_stream(self, items: Generator[Item]) -> Generator[Item]:
        """Yield on every rank the items that rank 0 reads."""
        yield from items

    def all_gather(self, item: Item) -> list[Item]:
        """Return the items of all ranks, in rank order."""
        return [item]

    def all_reduce(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum tensors over the ranks by name; a tensor missing on a rank counts as zero."""
        return dict(tensors)

    def all_gather_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of all ranks; every name occurs on one rank only."""
        return dict(tensors)

    def interleave(self, part: Tensor, total: int, dim: int = 0) -> Tensor:
        """Reassemble ``total`` rows from the shards made by :meth:`shard`.

        Args:
            part: This rank's shard of the rows.
            total: Number of rows over all ranks.
            dim: Dimension of ``part`` that indexes the rows.
        """
        return part


SINGLE_PROCESS = Processes()
"""The collectives of a run without a launcher."""


def is_launched() -> bool:
    """Return whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1") or "1") > 1 and "RANK" in os.environ


def init_processes(device: str = "auto") -> tuple[Processes, str]:
    """Initialize the process group of the launcher, if there is one.

    Args:
        device: The requested device. ``cuda``, or ``auto`` on a machine with GPUs, gives each process its own GPU.

    Returns:
        The collectives, and this process's device.

    Raises:
        ProcessError: The process group cannot be initialized.
    """
    if not is_launched():
        return SINGLE_PROCESS, device
    import torch

    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    processes = LaunchedProcesses(cpu=on_cpu)
    return processes, str(processes.device) if device in ("auto", "cuda") else device


def _end_process_group() -> None:
    """End the process group's threads: one that still runs when Python has ended aborts the process."""
    from torch import distributed

    if distributed.is_initialized():
        with suppress(RuntimeError):
            distributed.destroy_process_group()


class LaunchedProcesses(Processes):
    """Collectives over the processes of a launcher, by Accelerate and ``torch.distributed``.

    Args:
        cpu: Use the gloo backend on the CPU.

    Raises:
        ProcessError: The process group cannot be initialized.
    """

    def __init__(self, *, cpu: bool) -> None:
        import warnings
        from datetime import timedelta

        from accelerate import PartialState
        from torch import distributed

        begun = distributed.is_initialized()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Accelerate warns about the number of threads that it sets
                # Ranks may wait for the slowest one for days; a process that died closes its connection.
                state = PartialState(cpu=cpu, timeout=timedelta(days=7))
        except (RuntimeError, ValueError) as error:
            raise ProcessError(
                f"the process group cannot be initialized ({first_line(error)}); check the launcher's options"
            ) from error
        if not begun:
            atexit.register(_end_process_group)
        self.rank: int = state.process_index
        self.count: int = state.num_processes
        self.device: torch.device = state.device

    @contextmanager
    def on_main(self, manager: AbstractContextManager[None]) -> Iterator[None]:
        """Enter a context on rank 0 only; if entering fails, all ranks raise."""
        with self.raise_together():
            if self.is_main:
                manager.__enter__()
        if not self.is_main:
            yield
            return
        with _ExitOnly(manager):
            yield

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Raise on all ranks if one rank fails; the lowest failed rank reports its error."""
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        errors = self.all_gather(None if own is None else (str(own), getattr(own, "exit_status", 1)))
        failed = [rank for rank, error in enumerate(errors) if error is not None]
        if not failed:
            return
        if isinstance(own, LaporaError):
            own.reporting_rank = failed[0]
        if own is not None:
            raise own
        text, status = errors[failed[0]]  # type: ignore[misc]
        raise ProcessError(text, status, reporting_rank=failed[0])

    @contextmanager
    def on_shard(self) -> Iterator[None]:
        """Prefix errors with this rank, which reports them."""
        try:
            yield
        except LaporaError as error:
            error.reporting_rank = self.rank
            if not isinstance(error, ProcessError):
                error.args = (f"process {self.rank} of {self.count}: {error}", *error.args[1:])
            raise

    def broadcast_stream(self, items: Generator[Item]) -> Generator[Item]:
        """Yield on every rank the items that rank 0 reads; the end of the stream, or an error, ends it everywhere."""
        if not self.is_main:
            while (received := self._broadcast(None)) is not None:
                try:
                    yield received[0]
                except GeneratorExit:  # drain the broadcasts, so that rank 0 can report its own error
                    while self._broadcast(None) is not None:
                        pass
                    raise
            return
        try:
            for item in items:
                self._broadcast((item,))
                yield item
        finally:
            self._broadcast(None)

    def all_gather(self, item: Item) -> list[Item]:
        """Return the items of all ranks, in rank order."""
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.count
        with self._peer_errors():
            dist.all_gather_object(gathered, item)
        return gathered

    def all_reduce(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum tensors over the ranks by name; a tensor missing on a rank counts as zero."""
        import torch
        import torch.distributed as dist

        described = self.all_gather({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        shapes = {name: shape for each in described for name, shape in each.items()}
        reduced = {}
        for name in sorted(shapes):
            own = tensors.get(name)
            shape, dtype = shapes[name]
            total = torch.zeros(shape, dtype=dtype) if own is None else own
            original_device = total.device
            total = total.to(self.device, copy=True, memory_format=torch.contiguous_format)
            with self._peer_errors():
                dist.all_reduce(total)
            reduced[name] = total.to(original_device if own is not None else self.device)
        return reduced

    def all_gather_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of all ranks; every name occurs on one rank only."""
        import torch
        import torch.distributed as dist

        described = self.all_gather({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        gathered = {}
        for rank, each in enumerate(described):
            for name, (shape, dtype) in each.items():
                if rank == self.rank:
                    buffer = tensors[name].to(self.device).contiguous()
                else:
                    buffer = torch.empty(shape, dtype=dtype, device=self.device)
                with self._peer_errors():
                    dist.broadcast(buffer, src=rank)
                gathered[name] = tensors[name] if rank == self.rank else buffer
        return gathered

    def interleave(self, part: Tensor, total: int, dim: int = 0) -> Tensor:
        """Reassemble ``total`` rows from the shards of all ranks; the result is on the CPU."""
        import torch

        shape = list(part.shape)
        shape[dim] = total
        whole = torch.empty(shape, dtype=part.dtype)
        for rank, each in enumerate(self.all_gather(part.cpu())):
            whole.index_copy_(dim, torch.arange(rank, total, self.count), each)
        return whole

    def _broadcast(self, item: Any) -> Any:
        import torch.distributed as dist

        buffer = [item]
        with self._peer_errors():
            dist.broadcast_object_list(buffer, src=0)
        return buffer[0]

    @contextmanager
    def _peer_errors(self) -> Iterator[None]:
        """Turn the failure of a collective, which means that a peer exited, into a ProcessError."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.rank} of {self.count}: another process of this run exited ({first_line(error)}); "
                "see its own error, then run the command again",
                reporting_rank=self.rank,
            ) from error


class _ExitOnly(AbstractContextManager[None]):
    """Exit a context that has already been entered."""

    def __init__(self, manager: AbstractContextManager[None]) -> None:
        self._manager = manager

    def __exit__(self, *error: Any) -> bool | None:
        return self._manager.__exit__(*error)
