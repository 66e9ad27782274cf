"""The processes of one run, as ``torchrun`` or ``accelerate launch`` starts them: each has a share of the rows.

Every process holds the whole model and reads the same rows; a pass gives each a share, and its sums are added
over all of them afterwards. The first process alone writes, locks and speaks. A run without a launcher is
:data:`SINGLE_PROCESS`, for which everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from lapora.errors import LaporaError, ProcessError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Item = TypeVar("Item")


class Processes:
    """A run of one process, and the base of a run of many.

    Attributes:
        rank: Which one this is, from 0.
        count: How many there are.
    """

    rank = 0
    count = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def shard(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a sequence: every ``count``-th item, so that like neighbours are dealt out evenly."""
        return items[self.rank :: self.count]

    def on_main(self, manager: AbstractContextManager[None]) -> AbstractContextManager[None]:
        """A context that the first process enters; an error on its way in is everybody's."""
        return manager

    def raise_together(self) -> AbstractContextManager[None]:
        """Work that every process does by itself and that may fail in some: an error of one ends all."""
        return nullcontext()

    def on_shard(self) -> AbstractContextManager[None]:
        """Work on this process's share: an error is its own, and says so."""
        return nullcontext()

    def broadcast_stream(self, items: Generator[Item]) -> Generator[Item]:
        """What the first process reads, read by all."""
        yield from items

    def all_gather(self, item: Item) -> list[Item]:
        """The items of all processes, by rank."""
        return [item]

    def all_reduce(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors added over the processes by name; one that a process lacks is zero there."""
        return dict(tensors)

    def all_gather_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every process's tensors, whose names differ, at all of them."""
        return dict(tensors)

    def interleave(self, part: Tensor, total: int, dim: int = 0) -> Tensor:
        """Put the shares of ``total`` rows, as :meth:`share` deals them out, together along a dimension."""
        return part


SINGLE_PROCESS = Processes()
"""A run of a single process."""


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1") or "1") > 1 and "RANK" in os.environ


def init_processes(device: str = "auto") -> tuple[Processes, str]:
    """Meet the other processes that a launcher has started.

    Args:
        device: As asked for. Where it is a GPU by default or by the name ``cuda``, each process gets one of its own.

    Returns:
        The processes, and this one's device.

    Raises:
        ProcessError: They cannot meet.
    """
    if not is_launched():
        return SINGLE_PROCESS, device
    import torch

    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    processes = LaunchedProcesses(cpu=on_cpu)
    return processes, str(processes.device) if device in ("auto", "cuda") else device


class LaunchedProcesses(Processes):
    """The processes of a launcher, met through Accelerate.

    Args:
        cpu: Talk over gloo, in the host's memory.

    Raises:
        ProcessError: They cannot meet.
    """

    def __init__(self, *, cpu: bool) -> None:
        import warnings
        from datetime import timedelta

        from accelerate import PartialState

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the number of threads that it sets
                # One that is done waits for the slowest, however long; one that has died is noticed otherwise.
                state = PartialState(cpu=cpu, timeout=timedelta(days=7))
        except (RuntimeError, ValueError) as error:
            raise ProcessError(f"the processes of this run cannot meet ({first_line(error)})") from error
        self.rank: int = state.process_index
        self.count: int = state.num_processes
        self.device: torch.device = state.device

    @contextmanager
    def on_main(self, manager: AbstractContextManager[None]) -> Iterator[None]:
        """The first process enters; an error on its way in is everybody's."""
        with self.raise_together():
            if self.is_main:
                manager.__enter__()
        if not self.is_main:
            yield
            return
        with _Entered(manager):
            yield

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """An error of one process ends all; the first that has one says it."""
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        found = self.all_gather(None if own is None else (str(own), getattr(own, "exit_status", 1)))
        failed = [rank for rank, error in enumerate(found) if error is not None]
        if not failed:
            return
        if isinstance(own, LaporaError):
            own.reporting_rank = failed[0]
        if own is not None:
            raise own
        text, status = found[failed[0]]  # type: ignore[misc]
        raise ProcessError(text, status, reporting_rank=failed[0])

    @contextmanager
    def on_shard(self) -> Iterator[None]:
        """An error is this process's own, and says so."""
        try:
            yield
        except LaporaError as error:
            error.reporting_rank = self.rank
            if not isinstance(error, ProcessError):
                error.args = (f"process {self.rank} of {self.count}: {error}", *error.args[1:])
            raise

    def broadcast_stream(self, items: Generator[Item]) -> Generator[Item]:
        """What the first process reads, read by all; when it stops, for whatever reason, the others are told."""
        if not self.is_main:
            while (found := self._broadcast(None)) is not None:
                try:
                    yield found[0]
                except GeneratorExit:  # what ends this process ends the first, which has a word to say
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
        """The items of all processes, by rank."""
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        with self._talking():
            dist.all_gather_object(found, item)
        return found

    def all_reduce(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors added over the processes by name; one that a process lacks is zero there."""
        import torch
        import torch.distributed as dist

        described = self.all_gather({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        shapes = {name: shape for each in described for name, shape in each.items()}
        found = {}
        for name in sorted(shapes):
            own = tensors.get(name)
            shape, dtype = shapes[name]
            total = torch.zeros(shape, dtype=dtype) if own is None else own
            here = total.device
            total = total.to(self.device, copy=True, memory_format=torch.contiguous_format)
            with self._talking():
                dist.all_reduce(total)
            found[name] = total.to(here if own is not None else self.device)
        return found

    def all_gather_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every process's tensors, whose names differ, at all of them."""
        import torch
        import torch.distributed as dist

        described = self.all_gather({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        found = {}
        for rank, each in enumerate(described):
            for name, (shape, dtype) in each.items():
                if rank == self.rank:
                    there = tensors[name].to(self.device).contiguous()
                else:
                    there = torch.empty(shape, dtype=dtype, device=self.device)
                with self._talking():
                    dist.broadcast(there, src=rank)
                found[name] = tensors[name] if rank == self.rank else there
        return found

    def interleave(self, part: Tensor, total: int, dim: int = 0) -> Tensor:
        """Put the shares of ``total`` rows together along a dimension."""
        import torch

        shape = list(part.shape)
        shape[dim] = total
        whole = torch.empty(shape, dtype=part.dtype)
        for rank, each in enumerate(self.all_gather(part.cpu())):
            places = torch.arange(rank, total, self.count)
            whole.index_copy_(dim, places, each)
        return whole

    def _broadcast(self, item: Any) -> Any:
        import torch.distributed as dist

        carried = [item]
        with self._talking():
            dist.broadcast_object_list(carried, src=0)
        return carried[0]

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Talk to the others: what fails here is that one of them is no more."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.rank} of {self.count}: another process of this run has ended ({first_line(error)}); "
                "what it was doing is not done",
                reporting_rank=self.rank,
            ) from error


class _Entered(AbstractContextManager[None]):
    """A context that has been entered already."""

    def __init__(self, manager: AbstractContextManager[None]) -> None:
        self._manager = manager

    def __exit__(self, *error: Any) -> bool | None:
        return self._manager.__exit__(*error)
