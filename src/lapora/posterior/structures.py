"""Curvature structures by name: kron, ekfac, diag, full and lowrank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lapora.config import DEFAULT_RANK, Structure
from lapora.curvature.kfac import KronObserver
from lapora.curvature.nystrom import NystromSketch
from lapora.curvature.passes import CurvatureRun, DataPass, ObserverState, sums_from_state, sums_state
from lapora.curvature.per_example import JacobianObserver, LayerBasis, SecondMomentObserver
from lapora.errors import NumericalError, UsageError
from lapora.models.batches import Batch
from lapora.models.device_map import available_memory
from lapora.models.lora_layers import BayesianLayer
from lapora.posterior.eigen import Eigen, decompose
from lapora.posterior.gaussian import BlockPosterior, EigenBlock, JointPosterior, Posterior


def fit_kron(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """Fit KFAC in one pass: a Kronecker product per layer, in its eigenbasis.

    See :mod:`lapora.curvature.kfac`.
    """
    return _kfac(run)


def fit_ekfac(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """Fit EKFAC in two passes: KFAC's eigenbasis, then the exact second moments in it.

    Outside the basis the second moments are means over each eigenspace. See
    :class:`lapora.curvature.per_example.SecondMomentObserver`.
    """
    posterior, _ = _kfac(run, keep_state=True)
    rotated = posterior.on_device(run.layers, run.output_model.device, run.working_dtype)
    bases = {block.name: block.basis for block in rotated.blocks}
    return _second_moments(run, posterior.blocks, SecondMomentObserver(bases, directions=run.columns))


def _kfac(run: CurvatureRun, *, keep_state: bool = False) -> tuple[BlockPosterior, DataPass]:
    """Sum and decompose the factors; the sums are freed."""
    observer = KronObserver(run.weight_sharing, run.rank, run.seed, offload=run.offload)
    data = run.observe(observer, keep_state=keep_state)
    return BlockPosterior(decompose(run.layers, observer.factors(run.layers), run.rank, run.processes)), data


def fit_diag(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """Fit the diagonal of the curvature in one pass: ``Σ_ns G_ns²`` elementwise."""
    blocks = [
        EigenBlock(
            name=layer.name,
            role=layer.role,
            shape=layer.shape,
            input_owner=layer.name,
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
        counts = torch.from_numpy(block.spectrum.counts).to(moments.device)
        found.append(replace(block, eigenvalues=moments / counts))
    return BlockPosterior(found), data


class _RowsObserver(JacobianObserver):
    """Stores the Jacobian of all rows, ``(N, K, P)``, in the order of the rows."""

    def __init__(self, run: CurvatureRun) -> None:
        super().__init__(run.layers, run.classes)
        self.rows = torch.zeros(len(run.targets), run.columns, self.parameters, dtype=run.working_dtype)
        self._batch_rows: tuple[int, ...] = ()

    def begin(self, batch: Batch) -> None:
        """Discard the previous batch, and record the batch's row positions."""
        super().begin(batch)
        self._batch_rows = batch.rows

    def end(self, rows: int, directions: int) -> None:
        """Store the batch's rows."""
        jacobian = self.jacobian(rows, directions).transpose(0, 1)
        self.rows[list(self._batch_rows), :directions] = jacobian.to(self.rows)

    def state(self) -> ObserverState:
        """Return the rows."""
        return ObserverState({"rows": self.rows})

    def restore(self, state: ObserverState) -> None:
        """Restore a state returned by :meth:`state`."""
        self.rows = state.tensors["rows"].to(self.rows)


def fit_full(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """Fit the exact GGN over all weights in the dual: only ``K = J Jᵀ``, N(C-1) square, is decomposed.

    With the exact Fisher, the likelihood's directions (C-1 logit differences for softmax) are differentiated and
    weighted afterwards: the adapted evidence uses unweighted Jacobians, and dividing out the weights of a saturated row
    is impossible.

    Raises:
        UsageError: ``J`` does not fit in memory; the message suggests alternatives.
        NumericalError: The curvature is not finite.
    """
    with run.processes.raise_together():
        _check_memory_of_full(run)
    observer = _RowsObserver(run)
    exact = run.fisher == "exact"
    data = run.observe(observer, run.likelihood.directions if exact else None)
    jacobian = observer.rows.flatten(0, 1)
    kernel = _gram(jacobian)
    if not bool(torch.isfinite(kernel).all()):
        raise NumericalError("the curvature is not finite; try --dtype float32")
    linear_model: dict[str, Tensor] = {}
    weights = None
    if exact:
        weights = run.likelihood.column_weights(data.logits)  # (N, columns, directions)
        if (
            run.likelihood.uses_differences
            and all(target is not None for target in run.targets)
            and bool(torch.isfinite(data.logits).all())
        ):
            theta = _parameter_vector(run.layers, run.classes, run.output_model.answer_token_ids)
            differences = data.logits[:, 1:] - data.logits[:, :1]
            linear_model = {
                "kernel": kernel,
                "prior_mean": differences - _product(jacobian, theta).unflatten(0, differences.shape),
                "labels": torch.tensor(run.targets),
            }
        kernel = _weighted(_weighted(kernel, weights).T, weights)
    values, vectors = torch.linalg.eigh((kernel + kernel.T) / 2)
    positive = values > max(1e-12 * float(values[-1]), 1e-10)
    values, vectors = values[positive].flip(0), vectors[:, positive].flip(1)
    if weights is not None:
        vectors = _weighted_back(vectors, weights)
    basis = _rows_to_basis(jacobian, vectors / values.sqrt())
    values = torch.cat([values, values.new_zeros(int(len(basis) < basis.shape[1]))])
    return JointPosterior(run.describe_parameters(), basis, values, 1.0, linear_model), data


_CHUNK = 4096


def _gram(rows: Tensor) -> Tensor:
    """Compute ``J Jᵀ`` in float64, in chunks of columns."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for columns in rows.split(_CHUNK, dim=1):
        chunk = columns.double()
        total.addmm_(chunk, chunk.T)
    return total


def _product(rows: Tensor, vector: Tensor) -> Tensor:
    parts = zip(rows.split(_CHUNK, dim=1), vector.split(_CHUNK), strict=True)
    return torch.stack([columns.double() @ part for columns, part in parts]).sum(dim=0)


def _weighted(matrix: Tensor, weights: Tensor) -> Tensor:
    """Multiply by S: rows ``(N·D, M)`` of logit differences become rows ``(N·S, M)`` of Fisher columns."""
    examples, columns, differences = weights.shape
    return torch.bmm(weights, matrix.reshape(examples, differences, -1)).reshape(examples * columns, -1)


def _weighted_back(vectors: Tensor, weights: Tensor) -> Tensor:
    """Compute ``Sᵀ V``, so that ``Vᵀ (S J) = (Sᵀ V)ᵀ J``."""
    return _weighted(vectors, weights.transpose(1, 2))


def _rows_to_basis(rows: Tensor, combination: Tensor) -> Tensor:
    """Compute ``combinationᵀ J`` in float64, in chunks of columns; the result has J's dtype."""
    basis = rows.new_empty(combination.shape[1], rows.shape[1])
    for start in range(0, rows.shape[1], _CHUNK):
        columns = slice(start, start + _CHUNK)
        basis[:, columns] = combination.T @ rows[:, columns].double()
    return basis


def _parameter_vector(layers: Sequence[BayesianLayer], classes: int, answer_rows: Tensor | None) -> Tensor:
    """Return ``θ_MAP``, ``(P,)``, in the order of the Jacobian's columns, in float64 on the CPU."""
    parts = []
    for layer in layers:
        weight = layer.module.weight.detach().double().cpu()
        if layer.bias_as_input:
            weight = torch.cat([weight, layer.module.bias.detach().double().cpu().unsqueeze(1)], dim=1)
        if layer.answer_rows_only and answer_rows is not None:
            weight = weight[answer_rows.cpu()]
        parts.append(weight.flatten())
    return torch.cat(parts)


def _check_memory_of_full(run: CurvatureRun) -> None:
    rows = len(run.targets) * run.columns
    needed = 2 * rows * run.parameters * run.working_dtype.itemsize + 4 * rows * rows * 8
    available = available_memory()
    if needed > available:
        raise UsageError(
            f"--structure full needs {needed / 2**30:.1f} GiB for {rows:,} Jacobian rows of {run.parameters:,} "
            f"parameters, and {available / 2**30:.1f} GiB are free; use --structure lowrank --rank {DEFAULT_RANK}, "
            "--structure ekfac, or fewer rows with --limit"
        )


class _SketchObserver(JacobianObserver):
    """Accumulates a Nyström sketch of ``Σ_ns j_ns j_nsᵀ``."""

    def __init__(self, run: CurvatureRun, rank: int) -> None:
        super().__init__(run.layers, run.classes)
        self.seed = run.seed
        like = run.layers[0].module.weight.new_zeros((), dtype=run.working_dtype)
        self.sketch = NystromSketch(self.parameters, 2 * rank, seed=run.seed, like=like)

    def end(self, rows: int, directions: int) -> None:
        """Add the batch's rows to the sketch."""
        self.sketch.add(self.jacobian(rows, directions).flatten(0, 1).to(self.sketch.image))

    def state(self) -> ObserverState:
        """Return the sketch."""
        return sums_state({"rows": self.sketch}, "sketch")

    def restore(self, state: ObserverState) -> None:
        """Restore a state returned by :meth:`state`."""
        sketch = sums_from_state(state, "sketch", self.seed)["rows"]
        assert isinstance(sketch, NystromSketch)
        self.sketch = sketch


def fit_lowrank(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """Fit the leading eigenvectors of ``Σ_ns j_ns j_nsᵀ`` over all weights in one pass, by a Nyström sketch.

    All other directions have the mean of the remaining eigenvalues. See
    :class:`lapora.curvature.nystrom.NystromSketch`.

    Raises:
        UsageError: The sketch does not fit in memory.
        NumericalError: The curvature is not finite.
    """
    rank = run.rank or DEFAULT_RANK
    with run.processes.raise_together():
        _check_memory_of_lowrank(run, rank)
    observer = _SketchObserver(run, rank)
    data = run.observe(observer)
    found = Eigen.of(*observer.sketch.leading(rank), observer.sketch.trace)
    described = [{**parameter, "kept": found.retained_trace} for parameter in run.describe_parameters()]
    return JointPosterior(described, found.vectors.T.contiguous(), found.values, found.retained_trace), data


def _check_memory_of_lowrank(run: CurvatureRun, rank: int) -> None:
    needed, available = 5 * rank * run.parameters * run.working_dtype.itemsize, available_memory()
    if needed > available:
        raise UsageError(
            f"--structure lowrank --rank {rank} needs {needed / 2**30:.1f} GiB for {run.parameters:,} parameters, and "
            f"{available / 2**30:.1f} GiB are free; use a smaller --rank, or --structure kron"
        )


_STRUCTURES: dict[Structure, Callable[[CurvatureRun], tuple[Posterior, DataPass]]] = {
    "kron": fit_kron,
    "ekfac": fit_ekfac,
    "diag": fit_diag,
    "lowrank": fit_lowrank,
    "full": fit_full,
}


def fit_structure(structure: Structure, run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """Compute the curvature in its eigenbasis.

    Args:
        structure: Name of the structure.
        run: The model, its training rows and the settings of the curvature.

    Returns:
        The posterior without a prior, and the logits and log-likelihood of the last pass.

    Raises:
        UsageError: The structure does not fit in memory; the message suggests alternatives.
        NumericalError: The curvature is not finite, or not positive semi-definite.
    """
    return _STRUCTURES[structure](run)
