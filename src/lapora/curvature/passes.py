"""One pass over the data, with every batch given to an observer, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lapora.config import FisherType, Progress, WeightSharing
from lapora.curvature.backward import Linearisation, Observer
from lapora.curvature.nystrom import NystromSketch
from lapora.distributed import SINGLE_PROCESS, Processes
from lapora.errors import UsageError
from lapora.likelihoods.base import Directions, Likelihood
from lapora.likelihoods.categorical import Categorical
from lapora.models.batches import Batch
from lapora.models.batching import BatchFeed, run_batches
from lapora.models.lora_layers import BayesianLayer, describe_parameter
from lapora.models.outputs import OutputModel

CATEGORICAL = Categorical()


@dataclass(frozen=True, eq=False)
class DataPass:
    """Outputs of a pass besides the curvature.

    Attributes:
        logits: Logits at the MAP, ``(N, C)`` in float64, in the order of the rows; minus infinity for the answers that
            a row does not have.
        log_likelihood: ``log p(y|X, θ_MAP)`` in nats, or None if a row has no label.
    """

    logits: Tensor
    log_likelihood: float | None


def collect(
    output_model: OutputModel,
    layers: Sequence[BayesianLayer],
    observer: Observer,
    batches: Iterable[Batch],
    *,
    targets: Sequence[Any],
    fisher: FisherType | Directions = "exact",
    likelihood: Likelihood = CATEGORICAL,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: PassCheckpoint | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> DataPass:
    """Run every batch, with its inputs and output gradients given to an observer.

    Args:
        output_model: The network.
        layers: The Bayesian layers.
        observer: Accumulates the curvature.
        batches: All rows, each once; with several processes, this rank's shard.
        targets: Label of each row, or None.
        fisher: Fisher estimator, or a function that returns other directions to differentiate.
        likelihood: Gives the Fisher's columns and the log-likelihood.
        seed: Random seed of the labels drawn by the Monte-Carlo Fisher.
        progress: Progress callback: rows done, rows in total.
        checkpoint: Stores the sums during the pass, and resumes from stored ones; requires a
            :class:`Checkpointable` observer.
        processes: The processes that share the rows; the sums are all-reduced at the end.

    Returns:
        The logits and the log-likelihood of all rows.

    Raises:
        UsageError: ``fisher`` is ``empirical``, and a row has no label.
    """
    # One uniform number per row, so that sampled labels do not depend on batches or ranks.
    uniform = likelihood.random_numbers(len(targets), torch.Generator().manual_seed(seed))
    labelled = all(target is not None for target in targets)
    if fisher == "empirical" and not labelled:
        raise UsageError("--fisher empirical needs a label in every row; use --fisher exact")
    all_logits: list[Tensor] = []
    order: list[int] = []

    def state() -> PassState:
        assert isinstance(observer, Checkpointable)
        logits = stack_outputs([each.cpu() for each in all_logits])
        return PassState(order, logits, observer.state())

    with processes.raise_together():
        saved = None if checkpoint is None else checkpoint.saved()
    if saved is not None:
        assert isinstance(observer, Checkpointable)
        observer.restore(saved.observer)
        all_logits, order = [saved.logits], list(saved.order)
        batches = _skip_rows(batches, len(order))
    with processes.on_shard(), Linearisation(output_model, layers, observer) as linearisation:

        def run(batch: Batch) -> Tensor:
            if callable(fisher):
                return linearisation.run(batch, fisher)
            labels = likelihood.targets([targets[row] for row in batch.rows]) if labelled else None
            return linearisation.run(batch, likelihood.fisher_columns(fisher, labels, uniform[list(batch.rows)]))

        for batch, logits in run_batches(batches, run):
            all_logits.append(logits.double())
            order += batch.rows
            if progress is not None:
                progress(min(len(order) * processes.count, len(targets)), len(targets))
            if checkpoint is not None:
                checkpoint.offer(state)
        if checkpoint is not None and all_logits:
            checkpoint.finish(state)
    if processes.count > 1:
        assert isinstance(observer, Checkpointable)
        all_reduce_observer(processes, observer)
    logits = _in_row_order(processes.all_gather((order, [each.cpu() for each in all_logits])))
    if not labelled or not len(logits):
        return DataPass(logits, None)
    return DataPass(logits, float(likelihood.log_likelihood(logits, likelihood.targets(targets)).sum()))


def _skip_rows(batches: Iterable[Batch], rows: int) -> Iterable[Batch]:
    """Skip the rows that a resumed pass has already done."""
    if isinstance(batches, BatchFeed):
        batches.skip(rows)
        return batches
    return _skip_batches(batches, rows)


def _skip_batches(batches: Iterable[Batch], rows: int) -> Iterator[Batch]:
    for batch in batches:
        if rows <= 0:
            yield batch
        rows -= len(batch)


def _in_row_order(parts: Sequence[tuple[list[int], list[Tensor]]]) -> Tensor:
    """Combine each rank's row indices and logits into the logits of all rows, ``(N, C)``."""
    order = [row for rows, _ in parts for row in rows]
    all_logits = [logits for _, each in parts for logits in each]
    if not all_logits:
        return torch.zeros(0, 0, dtype=torch.float64)
    stacked = stack_outputs(all_logits)
    logits = torch.empty_like(stacked)
    logits[torch.tensor(order, dtype=torch.long)] = stacked
    return logits


def stack_outputs(parts: Sequence[Tensor]) -> Tensor:
    """Stack ``(B, C)`` of rows that may have fewer answers than others: minus infinity where there is none."""
    classes = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, classes - part.shape[1]), value=-torch.inf) for part in parts])


_OBSERVER = "observer."


@dataclass(frozen=True, eq=False)
class ObserverState:
    """The accumulated sums of an observer.

    Attributes:
        tensors: Tensors by name.
        facts: Other values, as JSON stores them exactly (floats included).
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Checkpointable(Protocol):
    """An observer whose sums can be checkpointed and all-reduced."""

    def state(self) -> ObserverState:
        """Return all sums so far; the tensors are not copied."""

    def restore(self, state: ObserverState) -> None:
        """Replace the sums; the tensors are on the model's device."""


@dataclass(frozen=True, eq=False)
class PassState:
    """State of a pass between two batches.

    Attributes:
        order: Indices of the rows done, in the order in which they were run.
        logits: Their logits, ``(rows, C)`` in float64.
        observer: The sums so far.
    """

    order: list[int]
    logits: Tensor
    observer: ObserverState

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state by name; the rest is ``observer.facts``."""
        return {
            "order": torch.tensor(self.order, dtype=torch.long),
            "logits": self.logits,
            **{_OBSERVER + name: tensor for name, tensor in self.observer.tensors.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> PassState:
        """Rebuild a state from the values of :meth:`tensors` and the observer's facts."""
        observer_tensors = {
            name.removeprefix(_OBSERVER): tensor for name, tensor in tensors.items() if name.startswith(_OBSERVER)
        }
        order = tensors["order"].tolist()
        return cls(order, tensors["logits"], ObserverState(observer_tensors, facts))


def all_reduce_observer(processes: Processes, observer: Checkpointable) -> None:
    """Sum the states of all ranks into the observer; the result is bitwise equal on all ranks.

    Tensors and numbers are summed by name; other values must be equal on the ranks that have them.
    """
    own = observer.state()
    facts: dict[str, Any] = {}
    for each in processes.all_gather(own.facts):
        facts = _summed_facts(facts, each)
    observer.restore(ObserverState(processes.all_reduce(own.tensors), facts))


def _summed_facts(left: Any, right: Any) -> Any:
    if isinstance(left, dict):
        summed = dict(left)
        for key, value in right.items():
            summed[key] = _summed_facts(summed[key], value) if key in summed else value
        return summed
    if isinstance(left, int | float):
        return left + right
    if left != right:
        raise AssertionError(f"ranks have different values: {left} and {right}")
    return left


class PassCheckpoint(Protocol):
    """Stores the state of one pass; see :class:`lapora.storage.partial.Checkpoint`."""

    def saved(self) -> PassState | None:
        """Return the state to resume from, or None."""

    def offer(self, take: Callable[[], PassState]) -> None:
        """Store the state after a batch, if the last checkpoint is old enough."""

    def finish(self, take: Callable[[], PassState]) -> None:
        """Store the state at the end of the pass."""


def sums_state(sums: Mapping[str, Tensor | NystromSketch], prefix: str) -> ObserverState:
    """Return sums as an observer state, without the sketches' test matrices (they are redrawn from their seed).

    Args:
        sums: Full or sketched sums by layer name.
        prefix: Prefix of the tensor names, so that one state can hold several kinds of sums.
    """
    tensors = {
        f"{prefix}.{name}": total.image if isinstance(total, NystromSketch) else total for name, total in sums.items()
    }
    traces = {name: total.trace for name, total in sums.items() if isinstance(total, NystromSketch)}
    return ObserverState(tensors, {f"{prefix}.traces": traces})


def sums_from_state(state: ObserverState, prefix: str, seed: int) -> dict[str, Tensor | NystromSketch]:
    """Rebuild the sums stored by :func:`sums_state` under ``prefix``; ``seed`` is the seed of the sketches."""
    traces = state.facts[f"{prefix}.traces"]
    sums: dict[str, Tensor | NystromSketch] = {}
    sketches: dict[tuple[int, ...], NystromSketch] = {}  # sketches of one shape share a test matrix
    for key, tensor in state.tensors.items():
        if not key.startswith(f"{prefix}."):
            continue
        name = key.removeprefix(f"{prefix}.")
        if name in traces:
            shape = tuple(tensor.shape)
            if shape not in sketches:
                sketches[shape] = NystromSketch(*shape, seed=seed, like=tensor)
            sketch = sketches[shape].empty_copy()
            # copy_ keeps the memory layout: products of another layout round differently.
            sketch.image.copy_(tensor)
            sketch.trace = float(traces[name])
            sums[name] = sketch
        else:
            sums[name] = tensor
    return sums


class CheckpointStore(Protocol):
    """Stores the state of the passes of one fit; see :class:`lapora.storage.partial.Checkpoint`."""

    def next_pass(self, *, keep: bool) -> PassCheckpoint:
        """Return the storage of the next pass; ``keep`` retains it for a later pass that builds on it."""


@dataclass(frozen=True)
class CurvatureRun:
    """A model, its training rows and the settings of the curvature.

    Attributes:
        output_model: The network.
        layers: The Bayesian layers.
        batches: Returns a new iterator over the batches.
        targets: Label of each row, or None.
        classes: Number of outputs C.
        fisher: Fisher estimator.
        weight_sharing: ``expand`` or ``reduce``, for the Kronecker structures.
        rank: Rank of ``kron`` or ``lowrank``; None is the structure's default.
        seed: Random seed.
        progress: Progress callback: rows done, rows in total; restarts at zero for every pass.
        checkpoint: Stores the sums of interrupted passes.
        processes: The processes that share the rows.
        offload: Keep Kronecker sums in CPU memory.
        likelihood: Gives the Fisher's columns and the log-likelihood.
    """

    output_model: OutputModel
    layers: Sequence[BayesianLayer]
    batches: Callable[[], Iterable[Batch]]
    targets: Sequence[Any]
    classes: int
    fisher: FisherType = "exact"
    weight_sharing: WeightSharing = "expand"
    rank: int | None = None
    seed: int = 0
    progress: Progress | None = None
    checkpoint: CheckpointStore | None = None
    processes: Processes = SINGLE_PROCESS
    offload: bool = False
    likelihood: Likelihood = CATEGORICAL

    @property
    def columns(self) -> int:
        """Number of Fisher columns per example: those of the likelihood for the exact Fisher, else 1."""
        return self.classes - self.likelihood.uses_differences if self.fisher == "exact" else 1

    def observe(
        self, observer: Observer, directions: Directions | None = None, *, keep_state: bool = False
    ) -> DataPass:
        """Run one pass over the rows.

        Args:
            observer: Accumulates the curvature.
            directions: Replaces the Fisher columns as the directions to differentiate.
            keep_state: Retain the checkpoint of the finished pass, because a later pass builds on it.
        """
        return collect(
            self.output_model,
            self.layers,
            observer,
            self.batches(),
            targets=self.targets,
            fisher=directions or self.fisher,
            likelihood=self.likelihood,
            seed=self.seed,
            progress=self.progress,
            checkpoint=None if self.checkpoint is None else self.checkpoint.next_pass(keep=keep_state),
            processes=self.processes,
        )

    @property
    def parameters(self) -> int:
        """Number P of weights that can have a nonzero gradient."""
        return sum(rows * columns for rows, columns in (layer.gradient_shape(self.classes) for layer in self.layers))

    @property
    def working_dtype(self) -> torch.dtype:
        """Dtype of sums over rows: float64 if the adapter's weights are float64, else float32."""
        return torch.float64 if self.layers[0].module.weight.dtype == torch.float64 else torch.float32

    def describe_parameters(self) -> list[dict[str, object]]:
        """Return the manifest's ``parameters``, one entry per layer in order."""
        return [describe_parameter(layer.name, layer.role, layer.shape, layer.squared_norm) for layer in self.layers]
