"""One pass over the data: every batch shown to an observer of the curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lapora.config import FisherType, Progress, WeightSharing
from lapora.curvature.backward import Directions, Linearisation, Observer
from lapora.curvature.nystrom import NystromSketch
from lapora.distributed import SINGLE_PROCESS, Processes
from lapora.errors import UsageError
from lapora.likelihoods.categorical import empirical_columns, exact_columns, monte_carlo_columns
from lapora.models.batches import Batch
from lapora.models.batching import BatchFeed, run_batches
from lapora.models.lora_layers import BayesianLayer, describe_parameter
from lapora.models.outputs import OutputModel


@dataclass(frozen=True, eq=False)
class DataPass:
    """What a pass found besides the curvature.

    Attributes:
        logits: At the MAP, ``(N, C)`` in float64, in the rows' order.
        log_likelihood: ``log p(y|X, θ_MAP)`` in nats, or None where a row has no label.
    """

    logits: Tensor
    log_likelihood: float | None


def collect(
    answers: OutputModel,
    layers: Sequence[BayesianLayer],
    observer: Observer,
    batches: Iterable[Batch],
    *,
    targets: Sequence[int | None],
    fisher: FisherType | Directions = "exact",
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: PassCheckpoint | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> DataPass:
    """Show every batch to an observer.

    Args:
        answers: The network.
        layers: The Bayesian layers.
        observer: Who sees them.
        batches: All rows, each once; this process's share where there are several.
        targets: Label of each row.
        fisher: Which Fisher's columns to differentiate, or any other directions.
        seed: Of the labels drawn by the Monte-Carlo Fisher.
        progress: Told of rows done.
        checkpoint: Keeps the sums as the pass goes on, and has those to go on from; the observer must be resumable.
        processes: Those that share the rows: in the end the observer of each has the sums of all.

    Raises:
        UsageError: The empirical Fisher without labels.
    """
    # A number for each row, whatever batch or process it is in.
    uniform = torch.rand(len(targets), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labelled = all(target is not None for target in targets)
    if fisher == "empirical" and not labelled:
        raise UsageError("--fisher empirical needs a label in every row; use --fisher exact")
    found: list[Tensor] = []
    order: list[int] = []

    def state() -> PassState:
        assert isinstance(observer, Checkpointable)
        logits = torch.cat([each.cpu() for each in found])
        return PassState(order, logits, observer.state())

    with processes.raise_together():
        saved = None if checkpoint is None else checkpoint.saved()
    if saved is not None:
        assert isinstance(observer, Checkpointable)
        observer.restore(saved.observer)
        found, order = [saved.logits], list(saved.order)
        batches = _after(batches, len(order))
    with processes.on_shard(), Linearisation(answers, layers, observer) as linearisation:

        def run(batch: Batch) -> Tensor:
            labels = torch.tensor([targets[row] for row in batch.rows]) if labelled else None
            return linearisation.run(batch, _columns(fisher, labels, uniform[list(batch.rows)]))

        for batch, logits in run_batches(batches, run):
            found.append(logits.double())
            order += batch.rows
            if progress is not None:
                progress(min(len(order) * processes.count, len(targets)), len(targets))
            if checkpoint is not None:
                checkpoint.offer(state)
        if checkpoint is not None and found:
            checkpoint.finish(state)
    if processes.count > 1:
        assert isinstance(observer, Checkpointable)
        all_reduce_observer(processes, observer)
    logits = _in_order(processes.all_gather((order, [each.cpu() for each in found])))
    if not labelled or not len(logits):
        return DataPass(logits, None)
    log_p = torch.log_softmax(logits, dim=1)
    return DataPass(logits, float(log_p.gather(1, torch.tensor(targets).unsqueeze(1)).sum()))


def _after(batches: Iterable[Batch], rows: int) -> Iterable[Batch]:
    """The batches that are left when so many rows are done."""
    if isinstance(batches, BatchFeed):
        batches.skip(rows)
        return batches
    return _without(batches, rows)


def _without(batches: Iterable[Batch], rows: int) -> Iterator[Batch]:
    for batch in batches:
        if rows <= 0:
            yield batch
        rows -= len(batch)


def _in_order(parts: Sequence[tuple[list[int], list[Tensor]]]) -> Tensor:
    """Logits of all rows, ``(N, C)``, from the orders in which processes came to them."""
    order = [row for rows, _ in parts for row in rows]
    found = [logits for _, each in parts for logits in each]
    if not found:
        return torch.zeros(0, 0, dtype=torch.float64)
    stacked = torch.cat(found)
    logits = torch.empty_like(stacked)
    logits[torch.tensor(order, dtype=torch.long)] = stacked
    return logits


def _columns(fisher: FisherType | Directions, labels: Tensor | None, uniform: Tensor) -> Directions:
    if callable(fisher):
        return fisher
    if fisher == "exact":
        return exact_columns
    if fisher == "mc":
        return lambda logits: monte_carlo_columns(logits, uniform)
    assert labels is not None
    return lambda logits: empirical_columns(logits, labels.to(logits.device))


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
class Checkpointable(Protocol):
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


def all_reduce_observer(processes: Processes, observer: Checkpointable) -> None:
    """Give the observer the sums of all processes: the same to the last bit in each.

    Tensors and numbers are added, by name; whatever else a state holds must be the same where it is there.
    """
    own = observer.state()
    facts: dict[str, Any] = {}
    for each in processes.all_gather(own.facts):
        facts = _added(facts, each)
    observer.restore(ObserverState(processes.all_reduce(own.tensors), facts))


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


class PassCheckpoint(Protocol):
    """Keeps the states of one pass; see :class:`lapora.storage.partial.Checkpoint`."""

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


class CheckpointStore(Protocol):
    """Stores the state of the passes of one fit; see :class:`lapora.storage.partial.Checkpoint`."""

    def next_pass(self, *, keep: bool) -> PassCheckpoint:
        """Return the storage of the next pass; ``keep`` says that a later pass builds on it."""


@dataclass(frozen=True)
class CurvatureRun:
    """A model and its rows, ready to be passed over.

    Attributes:
        answers: The network.
        layers: The Bayesian layers.
        batches: Gives the batches, afresh each time.
        targets: Label of each row.
        classes: Number of answers C.
        fisher: Which Fisher.
        weight_sharing: ``expand`` or ``reduce``, for the Kronecker structures.
        rank: Of ``kron`` and ``lowrank``; None is the structure's own default.
        seed: Of whatever is random.
        progress: Told of rows done, from the start again for every pass.
        checkpoint: Keeps the sums on disk as they grow.
        processes: Those that share the rows.
        offload: Keep Kronecker sums in the host's memory.
    """

    answers: OutputModel
    layers: Sequence[BayesianLayer]
    batches: Callable[[], Iterable[Batch]]
    targets: Sequence[int | None]
    classes: int
    fisher: FisherType = "exact"
    weight_sharing: WeightSharing = "expand"
    rank: int | None = None
    seed: int = 0
    progress: Progress | None = None
    checkpoint: CheckpointStore | None = None
    processes: Processes = SINGLE_PROCESS
    offload: bool = False

    @property
    def columns(self) -> int:
        """Fisher columns of one example: C-1 exact ones, or a single one."""
        return self.classes - 1 if self.fisher == "exact" else 1

    def observe(self, observer: Observer, directions: Directions | None = None, *, another: bool = False) -> DataPass:
        """One pass; ``another`` says that a further one builds on it."""
        return collect(
            self.answers,
            self.layers,
            observer,
            self.batches(),
            targets=self.targets,
            fisher=directions or self.fisher,
            seed=self.seed,
            progress=self.progress,
            checkpoint=None if self.checkpoint is None else self.checkpoint.next_pass(keep=another),
            processes=self.processes,
        )

    @property
    def parameters(self) -> int:
        """How many weights can have a gradient."""
        return sum(rows * columns for rows, columns in (layer.gradient_shape(self.classes) for layer in self.layers))

    @property
    def working_dtype(self) -> torch.dtype:
        """Type of sums over rows: float64 where the adapter's weights are, else float32."""
        return torch.float64 if self.layers[0].module.weight.dtype == torch.float64 else torch.float32

    def describe_parameters(self) -> list[dict[str, object]]:
        """The manifest's entries of the layers' weights, in order."""
        return [describe_parameter(layer.name, layer.role, layer.shape, layer.squared_norm) for layer in self.layers]
