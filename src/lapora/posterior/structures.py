"""The structures of the curvature by name; each is a function in a module of its own kind."""

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
from lapora.likelihoods.categorical import difference_columns, exact_columns
from lapora.models.batches import Batch
from lapora.models.device_map import available_memory
from lapora.models.lora_layers import BayesianLayer
from lapora.posterior.eigen import decompose
from lapora.posterior.gaussian import BlockPosterior, EigenBlock, JointPosterior, Posterior


def fit_kron(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """KFAC: ``A ⊗ G`` of each layer, in its eigenbasis; one pass."""
    observer = KronObserver(run.weight_sharing, run.rank, run.seed, offload=run.offload)
    data = run.observe(observer)
    return BlockPosterior(decompose(run.layers, observer.factors(run.layers), run.rank, run.processes)), data


def fit_ekfac(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """KFAC's eigenbasis, then exact second moments in it: a second pass."""
    observer = KronObserver(run.weight_sharing, offload=run.offload)
    run.observe(observer, keep_state=True)
    posterior = BlockPosterior(decompose(run.layers, observer.factors(run.layers), processes=run.processes))
    rotated = posterior.on_device(run.layers, run.output_model.device, run.working_dtype)
    bases = {block.name: block.basis for block in rotated.blocks}
    return _second_moments(run, posterior.blocks, SecondMomentObserver(bases, directions=run.columns))


def fit_diag(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """The curvature's diagonal: a sum of squared gradients for each weight."""
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
        found.append(replace(block, eigenvalues=moments))
    return BlockPosterior(found), data


class _RowsObserver(JacobianObserver):
    """Keeps every row of the Jacobian: ``(N, K, P)``, in the order of the rows."""

    def __init__(self, run: CurvatureRun) -> None:
        super().__init__(run.layers, run.classes)
        self.rows = torch.zeros(len(run.targets), run.columns, self.parameters, dtype=run.working_dtype)
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


def fit_full(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """The exact GGN over all weights, in the dual: only ``K = J Jᵀ`` is decomposed, N(C-1) square.

    With the exact Fisher the C-1 logit differences are differentiated and weighted afterwards, since adapted
    evidence needs them unweighted, and no weight can be divided out of a saturated row.

    Raises:
        UsageError: ``J`` does not fit in memory; the message says what does.
        NumericalError: The curvature is not finite.
    """
    with run.processes.raise_together():
        _refuse_full_that_does_not_fit(run)
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
            theta = _parameter_vector(run.layers, run.classes, run.output_model.answer_token_ids)
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
    return JointPosterior(run.describe_parameters(), basis, values, 1.0, linear_model), data


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


def _refuse_full_that_does_not_fit(run: CurvatureRun) -> None:
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
    """Sketches ``Σ_ns j_ns j_nsᵀ``."""

    def __init__(self, run: CurvatureRun, rank: int) -> None:
        super().__init__(run.layers, run.classes)
        self.seed = run.seed
        like = run.layers[0].module.weight.new_zeros((), dtype=run.working_dtype)
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


def fit_lowrank(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """The R leading eigenvectors of ``Σ_ns j_ns j_nsᵀ`` over all weights at once, by a Nyström sketch in one pass.

    Raises:
        UsageError: The sketch does not fit in memory.
    """
    rank = run.rank or DEFAULT_RANK
    with run.processes.raise_together():
        _refuse_rank_that_does_not_fit(run, rank)
    observer = _SketchObserver(run, rank)
    data = run.observe(observer)
    values, vectors = observer.sketch.leading(rank)
    trace = observer.sketch.trace
    kept = min(1.0, float(values.sum()) / trace) if trace else 1.0
    described = [{**parameter, "kept": kept} for parameter in run.describe_parameters()]
    return JointPosterior(described, vectors.T.contiguous(), values, kept), data


def _refuse_rank_that_does_not_fit(run: CurvatureRun, rank: int) -> None:
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
    """Compute the curvature and put it into its eigenbasis.

    Raises:
        UsageError: The structure does not fit in memory; the message says what does.
        NumericalError: The curvature is not finite, or not positive semi-definite.
    """
    return _STRUCTURES[structure](run)
