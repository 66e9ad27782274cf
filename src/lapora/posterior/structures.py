"""From passes over the data to a posterior: one function for each structure of the curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from lapora.config import DEFAULT_RANK, FisherType, Progress, Structure, WeightSharing
from lapora.curvature.collection import DataPass, collect
from lapora.curvature.fisher import difference_columns, exact_columns
from lapora.curvature.kron import KronObserver
from lapora.curvature.linearisation import Directions, Observer
from lapora.curvature.per_example import JacobianObserver, LayerBasis, SecondMomentObserver
from lapora.curvature.resuming import ObserverState, sums_from_state, sums_state
from lapora.curvature.sketch import NystromSketch
from lapora.errors import NumericalError, UsageError
from lapora.model.answers import AnswerModel
from lapora.model.batches import Batch
from lapora.model.bayesian_layers import BayesianLayer
from lapora.posterior.checkpoint import Checkpoint
from lapora.posterior.gaussian import (
    BlockPosterior,
    EigenBlock,
    JointPosterior,
    Posterior,
    decompose,
    describe_parameter,
)


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
    """

    answers: AnswerModel
    layers: Sequence[BayesianLayer]
    batches: Callable[[], Iterable[Batch]]
    targets: Sequence[int | None]
    classes: int
    fisher: FisherType = "exact"
    weight_sharing: WeightSharing = "expand"
    rank: int | None = None
    seed: int = 0
    progress: Progress | None = None
    checkpoint: Checkpoint | None = None

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
            keeper=None if self.checkpoint is None else self.checkpoint.next_pass(keep=another),
        )


def fit_structure(structure: Structure, run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """Compute the curvature and put it into its eigenbasis.

    Raises:
        UsageError: The structure does not fit in memory; the message says what does.
        NumericalError: The curvature is not finite, or not positive semi-definite.
    """
    return _STRUCTURES[structure](run)


def _kron(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    observer = KronObserver(run.weight_sharing, run.rank, run.seed)
    data = run.observe(observer)
    return BlockPosterior(decompose(run.layers, observer.factors(run.layers), run.rank)), data


def _ekfac(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """KFAC's eigenbasis, then exact second moments in it: a second pass."""
    observer = KronObserver(run.weight_sharing)
    run.observe(observer, another=True)
    posterior = BlockPosterior(decompose(run.layers, observer.factors(run.layers)))
    working = torch.float64 if run.layers[0].module.weight.dtype == torch.float64 else torch.float32
    rotated = posterior.to(run.answers.device, working)
    bases = {block.name: block.basis for block in rotated.blocks}
    return _second_moments(run, posterior.blocks, SecondMomentObserver(bases, directions=run.columns))


def _diag(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    blocks = [
        EigenBlock(
            name=layer.name,
            role=layer.role,
            shape=layer.shape,
            leader=layer.name,
            input_basis=None,
            gradient_basis=None,
            eigenvalues=torch.zeros(layer.gradient_shape(run.classes), dtype=torch.float64),
            squared_norm=layer.squared_norm,
        )
        for layer in run.layers
    ]
    bases = {layer.name: LayerBasis(layer.name) for layer in run.layers}
    return _second_moments(run, blocks, SecondMomentObserver(bases, directions=run.columns))


def _second_moments(
    run: CurvatureRun, blocks: Sequence[EigenBlock], observer: SecondMomentObserver
) -> tuple[Posterior, DataPass]:
    data = run.observe(observer)
    found = []
    for layer, block in zip(run.layers, blocks, strict=True):
        moments = observer.second_moments(layer)
        if moments is None:
            moments = torch.zeros_like(block.eigenvalues)
        if not bool(torch.isfinite(moments).all()):
            raise NumericalError(f"{layer.name}: the curvature is not finite; try --dtype float32")
        found.append(replace(block, eigenvalues=moments))
    return BlockPosterior(found), data


class _SketchObserver(JacobianObserver):
    """Sketches ``Σ_ns j_ns j_nsᵀ``."""

    def __init__(self, run: CurvatureRun, rank: int) -> None:
        super().__init__(run.layers, run.classes)
        self.seed = run.seed
        weight = run.layers[0].module.weight
        like = weight.new_zeros((), dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)
        self.sketch = NystromSketch(self.parameters, 2 * rank, seed=run.seed, like=like)

    def end(self, rows: int, directions: int) -> None:
        """Add the batch's rows."""
        self.sketch.add(self.jacobian(rows, directions).flatten(0, 1).to(self.sketch.image))

    def state(self) -> ObserverState:
        """The sketch."""
        return sums_state({"rows": self.sketch}, "sketch")

    def restore(self, state: ObserverState) -> None:
        """Go on from what :meth:`state` gave."""
        sketch = sums_from_state(state, "sketch", self.seed)["rows"]
        assert isinstance(sketch, NystromSketch)
        self.sketch = sketch


def _lowrank(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    rank = run.rank or DEFAULT_RANK
    _refuse_a_sketch_that_does_not_fit(run, rank)
    observer = _SketchObserver(run, rank)
    data = run.observe(observer)
    values, vectors = observer.sketch.leading(rank)
    trace = observer.sketch.trace
    kept = min(1.0, float(values.sum()) / trace) if trace else 1.0
    described = [{**parameter, "kept": kept} for parameter in _describe(run.layers)]
    return JointPosterior(described, vectors.T.contiguous(), values, kept), data


class _RowsObserver(JacobianObserver):
    """Keeps every row of the Jacobian: ``(N, K, P)``, in the order of the rows."""

    def __init__(self, run: CurvatureRun) -> None:
        super().__init__(run.layers, run.classes)
        weight = run.layers[0].module.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.rows = torch.zeros(len(run.targets), run.columns, self.parameters, dtype=dtype)
        self._batch_rows: tuple[int, ...] = ()

    def begin(self, batch: Batch) -> None:
        """Note whose rows these are."""
        super().begin(batch)
        self._batch_rows = batch.rows

    def end(self, rows: int, directions: int) -> None:
        """Keep the batch's rows."""
        self.rows[list(self._batch_rows)] = self.jacobian(rows, directions).transpose(0, 1).to(self.rows)

    def state(self) -> ObserverState:
        """The rows."""
        return ObserverState({"rows": self.rows})

    def restore(self, state: ObserverState) -> None:
        """Go on from what :meth:`state` gave."""
        self.rows = state.tensors["rows"].to(self.rows)


def _full(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """The exact GGN over all weights, in the dual: only ``K = J Jᵀ`` is decomposed, N(C-1) square.

    With the exact Fisher the C-1 logit differences are differentiated and weighted afterwards, since adapted
    evidence needs them unweighted, and no weight can be divided out of a saturated row.
    """
    _refuse_what_does_not_fit(run)
    observer = _RowsObserver(run)
    exact = run.fisher == "exact"
    data = run.observe(observer, difference_columns if exact else None)
    jacobian = observer.rows.flatten(0, 1)
    kernel = _gram(jacobian)
    if not bool(torch.isfinite(kernel).all()):
        raise NumericalError("the curvature is not finite; try --dtype float32")
    linear_model: dict[str, Tensor] = {}
    weights = None
    if exact:
        # A column of S sums to zero, so it is a combination of differences to the first class.
        weights = exact_columns(data.logits)[:, :, 1:].permute(1, 0, 2)  # (N, C-1 columns, C-1 differences)
        if all(target is not None for target in run.targets):
            theta = _parameter_vector(run.layers, run.classes, run.answers.answer_token_ids)
            differences = data.logits[:, 1:] - data.logits[:, :1]
            linear_model = {
                "kernel": kernel,
                "prior_mean": differences - _product(jacobian, theta).unflatten(0, differences.shape),
                "labels": torch.tensor(run.targets),
            }
        kernel = _weighted(_weighted(kernel, weights).T, weights)
    values, vectors = torch.linalg.eigh((kernel + kernel.T) / 2)
    kept = values > max(1e-12 * float(values[-1]), 1e-10)
    values, vectors = values[kept].flip(0), vectors[:, kept].flip(1)
    if weights is not None:
        vectors = _weighted_back(vectors, weights)
    basis = _rows_to_basis(jacobian, vectors / values.sqrt())
    return JointPosterior(_describe(run.layers), basis, values, 1.0, linear_model), data


_CHUNK = 4096


def _gram(rows: Tensor) -> Tensor:
    """``J Jᵀ`` in float64, a few columns at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for columns in rows.split(_CHUNK, dim=1):
        wide = columns.double()
        total.addmm_(wide, wide.T)
    return total


def _product(rows: Tensor, vector: Tensor) -> Tensor:
    parts = zip(rows.split(_CHUNK, dim=1), vector.split(_CHUNK), strict=True)
    return torch.stack([columns.double() @ part for columns, part in parts]).sum(dim=0)


def _weighted(matrix: Tensor, weights: Tensor) -> Tensor:
    """Rows ``(N·D, M)`` of differences turned into rows ``(N·S, M)`` of Fisher columns."""
    examples, columns, differences = weights.shape
    return torch.bmm(weights, matrix.reshape(examples, differences, -1)).reshape(examples * columns, -1)


def _weighted_back(vectors: Tensor, weights: Tensor) -> Tensor:
    """``Sᵀ V``: so that ``Vᵀ (S J) = (Sᵀ V)ᵀ J``."""
    return _weighted(vectors, weights.transpose(1, 2))


def _rows_to_basis(rows: Tensor, combination: Tensor) -> Tensor:
    """``combinationᵀ J``, in float64 a few columns at a time, kept in J's type."""
    basis = rows.new_empty(combination.shape[1], rows.shape[1])
    for start in range(0, rows.shape[1], _CHUNK):
        columns = slice(start, start + _CHUNK)
        basis[:, columns] = combination.T @ rows[:, columns].double()
    return basis


def _parameter_vector(layers: Sequence[BayesianLayer], classes: int, answer_rows: Tensor | None) -> Tensor:
    """``θ_MAP`` in the order of the Jacobian's columns, float64, on the CPU."""
    parts = []
    for layer in layers:
        weight = layer.module.weight.detach().double().cpu()
        if layer.bias_as_input:
            weight = torch.cat([weight, layer.module.bias.detach().double().cpu().unsqueeze(1)], dim=1)
        if layer.answer_rows_only and answer_rows is not None:
            weight = weight[answer_rows.cpu()]
        parts.append(weight.flatten())
    return torch.cat(parts)


def _describe(layers: Sequence[BayesianLayer]) -> list[dict[str, object]]:
    return [describe_parameter(layer.name, layer.role, layer.shape, layer.squared_norm) for layer in layers]


def _size(run: CurvatureRun) -> tuple[int, int]:
    """Parameters that can have a gradient, and bytes of one number."""
    parameters = sum(r * c for r, c in (layer.gradient_shape(run.classes) for layer in run.layers))
    return parameters, 8 if run.layers[0].module.weight.dtype == torch.float64 else 4


def _refuse_a_sketch_that_does_not_fit(run: CurvatureRun, rank: int) -> None:
    parameters, width = _size(run)
    needed, available = 5 * rank * parameters * width, _available_memory()
    if needed > available:
        raise UsageError(
            f"--structure lowrank --rank {rank} needs {needed / 2**30:.1f} GiB for {parameters:,} parameters, and "
            f"{available / 2**30:.1f} GiB are free; use a smaller --rank, or --structure kron"
        )


def _refuse_what_does_not_fit(run: CurvatureRun) -> None:
    rows = len(run.targets) * run.columns
    parameters, width = _size(run)
    needed = 2 * rows * parameters * width + 4 * rows * rows * 8
    available = _available_memory()
    if needed > available:
        raise UsageError(
            f"--structure full needs {needed / 2**30:.1f} GiB for {rows:,} Jacobian rows of {parameters:,} "
            f"parameters, and {available / 2**30:.1f} GiB are free; use --structure lowrank --rank {DEFAULT_RANK}, "
            "--structure ekfac, or fewer rows with --limit"
        )


def _available_memory() -> float:
    """Bytes that this process may still take, a container's limit included."""
    free = float(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, float(limit.read_text()) - float(used.read_text()))
    except (OSError, ValueError):  # no such files, or "max"
        return free


_STRUCTURES: dict[Structure, Callable[[CurvatureRun], tuple[Posterior, DataPass]]] = {
    "kron": _kron,
    "ekfac": _ekfac,
    "diag": _diag,
    "lowrank": _lowrank,
    "full": _full,
}
