"""The exact curvature over all weights, in the dual: every Jacobian row is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lapora.config import DEFAULT_RANK
from lapora.curvature.collection import DataPass
from lapora.curvature.fisher import difference_columns, exact_columns
from lapora.curvature.per_example import JacobianObserver
from lapora.curvature.resuming import ObserverState
from lapora.errors import NumericalError, UsageError
from lapora.model.batches import Batch
from lapora.model.bayesian_layers import BayesianLayer
from lapora.posterior.curvature_run import CurvatureRun
from lapora.posterior.gaussian import JointPosterior, Posterior
from lapora.posterior.memory import available_memory


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
    with run.processes.in_step():
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


def _refuse_what_does_not_fit(run: CurvatureRun) -> None:
    rows = len(run.targets) * run.columns
    needed = 2 * rows * run.parameters * run.working_dtype.itemsize + 4 * rows * rows * 8
    available = available_memory()
    if needed > available:
        raise UsageError(
            f"--structure full needs {needed / 2**30:.1f} GiB for {rows:,} Jacobian rows of {run.parameters:,} "
            f"parameters, and {available / 2**30:.1f} GiB are free; use --structure lowrank --rank {DEFAULT_RANK}, "
            "--structure ekfac, or fewer rows with --limit"
        )
