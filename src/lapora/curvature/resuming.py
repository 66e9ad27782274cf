"""What of a pass can be put aside and taken up again: sums, and the logits found.

The rows come in the same order every time, so a pass goes on by leaving out as many of them as are done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lapora.curvature.sketch import NystromSketch
from lapora.processes import Processes

_OBSERVER = "observer."


@dataclass(frozen=True, eq=False)
class ObserverState:
    """What an observer has summed up.

    Attributes:
        tensors: By name.
        facts: Whatever JSON can hold exactly, floats included.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Resumable(Protocol):
    """An observer whose sums can be put aside, and added to those of other processes."""

    def state(self) -> ObserverState:
        """All sums so far; the tensors are the observer's own, not copies."""

    def restore(self, state: ObserverState) -> None:
        """Go on from sums; the tensors are on the model's device."""


@dataclass(frozen=True, eq=False)
class PassState:
    """A pass over the data, cut between two batches.

    Attributes:
        order: The rows seen, in that order.
        logits: Theirs, ``(rows, C)`` in float64.
        observer: The curvature so far.
    """

    order: list[int]
    logits: Tensor
    observer: ObserverState

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is not JSON, by name."""
        return {
            "order": torch.tensor(self.order, dtype=torch.long),
            "logits": self.logits,
            **{_OBSERVER + name: tensor for name, tensor in self.observer.tensors.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> PassState:
        """Read back what :meth:`tensors` gave."""
        observed = {
            name.removeprefix(_OBSERVER): tensor for name, tensor in tensors.items() if name.startswith(_OBSERVER)
        }
        order = tensors["order"].tolist()
        return cls(order, tensors["logits"], ObserverState(observed, facts))


def add_up(processes: Processes, observer: Resumable) -> None:
    """Give the observer the sums of all processes: the same to the last bit in each.

    Tensors and numbers are added, by name; whatever else a state holds must be the same where it is there.
    """
    own = observer.state()
    facts: dict[str, Any] = {}
    for each in processes.gather(own.facts):
        facts = _added(facts, each)
    observer.restore(ObserverState(processes.sum(own.tensors), facts))


def _added(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        found = dict(left)
        for key, value in right.items():
            found[key] = _added(found[key], value) if key in found else value
        return found
    if isinstance(left, int | float):
        return left + right
    if left != right:
        raise AssertionError(f"the processes disagree: {left} and {right}")
    return left


class PassKeeper(Protocol):
    """Keeps the states of one pass; see :class:`lapora.posterior.checkpoint.Checkpoint`."""

    def saved(self) -> PassState | None:
        """The state to go on from, if there is one."""

    def offer(self, take: Callable[[], PassState]) -> None:
        """A batch is done: keep the state, if it is time."""

    def finish(self, take: Callable[[], PassState]) -> None:
        """The pass is done."""


def sums_state(sums: Mapping[str, Tensor | NystromSketch], prefix: str) -> ObserverState:
    """Sums, whole or sketched, as a state. A sketch's test matrix is drawn again from its seed.

    Args:
        sums: By layer.
        prefix: Of their names in the state, so that several kinds of sums have room in one.
    """
    tensors = {
        f"{prefix}.{name}": total.image if isinstance(total, NystromSketch) else total for name, total in sums.items()
    }
    traces = {name: total.trace for name, total in sums.items() if isinstance(total, NystromSketch)}
    return ObserverState(tensors, {f"{prefix}.traces": traces})


def sums_from_state(state: ObserverState, prefix: str, seed: int) -> dict[str, Tensor | NystromSketch]:
    """Read back what :func:`sums_state` gave, under the same prefix; ``seed`` is that of the sketches."""
    traces = state.facts[f"{prefix}.traces"]
    found: dict[str, Tensor | NystromSketch] = {}
    sketches: dict[tuple[int, ...], NystromSketch] = {}  # of one shape they share a test matrix
    for key, tensor in state.tensors.items():
        if not key.startswith(f"{prefix}."):
            continue
        name = key.removeprefix(f"{prefix}.")
        if name in traces:
            shape = tuple(tensor.shape)
            if shape not in sketches:
                sketches[shape] = NystromSketch(*shape, seed=seed, like=tensor)
            sketch = sketches[shape].another()
            # Into the sketch's own memory: in another layout products are rounded otherwise.
            sketch.image.copy_(tensor)
            sketch.trace = float(traces[name])
            found[name] = sketch
        else:
            found[name] = tensor
    return found
