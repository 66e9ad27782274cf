"""Eigendecomposition of Kronecker factors in float64, in parallel over threads (on a CPU) and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lapora.curvature.kfac import KronFactors, Sum, rank_of_side
from lapora.curvature.nystrom import NystromSketch
from lapora.distributed import SINGLE_PROCESS, Processes
from lapora.errors import NumericalError
from lapora.models.lora_layers import BayesianLayer
from lapora.posterior.gaussian import EigenBlock

# Eigenvalues of a sum of squares are >= 0; round-off in float32 can make them slightly negative.
_NEGATIVE_TOLERANCE = 1e-5


def decompose(
    layers: Sequence[BayesianLayer],
    factors: Mapping[str, KronFactors],
    rank: int | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> list[EigenBlock]:
    """Decompose each layer's Kronecker factors into eigenbases and ``λ_ij = scale · λ^g_i λ^a_j``.

    Of a truncated side the mean of the remaining eigenvalues is the last ``λ``. Shared input sums are decomposed once.
    Decompositions run in float64.

    Args:
        layers: The Bayesian layers.
        factors: Their Kronecker factors, by layer name.
        rank: Number of leading eigenvectors per side; None is the default, ``KRON_RANK``.
        processes: The processes that share the decompositions; each has all the sums.

    Returns:
        One block per layer, in the order of ``layers``.

    Raises:
        NumericalError: A sum contains NaN or infinity, or is not positive semi-definite; the layer is named.
    """
    sides: dict[str, Sum] = {}
    for layer in layers:
        layer_factors = factors[layer.name]
        sides.setdefault(f"{layer_factors.input_owner} (inputs)", layer_factors.input_sum)
        sides[f"{layer.name} (gradients)"] = layer_factors.gradient_sum
    eigen = _eigen_of_all(sides, rank, processes)
    blocks = []
    for layer in layers:
        layer_factors = factors[layer.name]
        input_owner = layer_factors.input_owner
        inputs, gradients = eigen[f"{input_owner} (inputs)"], eigen[f"{layer.name} (gradients)"]
        blocks.append(
            EigenBlock(
                name=layer.name,
                role=layer.role,
                shape=layer.shape,
                input_owner=input_owner,
                input_basis=inputs.vectors,
                gradient_basis=gradients.vectors,
                eigenvalues=layer_factors.scale * torch.outer(gradients.values, inputs.values),
                squared_norm=layer.squared_norm,
                retained_trace=inputs.retained_trace * gradients.retained_trace,
            )
        )
    return blocks


@dataclass(frozen=True, eq=False)
class Eigen:
    """Leading eigenpairs of a matrix of dimension d.

    Attributes:
        values: ``λ``, ``(k,)``, or ``(k + 1,)`` with the mean of the remaining eigenvalues last if ``k < d``.
        vectors: ``(d, k)``.
        retained_trace: Share of the trace within the k directions.
    """

    values: Tensor
    vectors: Tensor
    retained_trace: float

    @classmethod
    def of(cls, values: Tensor, vectors: Tensor, trace: float) -> Eigen:
        """Append the mean of the remaining eigenvalues, which follows from the trace of the whole matrix."""
        total, others = float(values.sum()), len(vectors) - len(values)
        if others:
            mean = max(trace - total, 0.0) / others
            values = torch.cat([values, values.new_full((1,), mean)])
        return cls(values, vectors, min(total / trace, 1.0) if others and trace else 1.0)


def _eigen_of_all(sides: Mapping[str, Sum], rank: int | None, processes: Processes) -> dict[str, Eigen]:
    """Decompose all sides, split over the processes, and return all of them on every process."""
    if processes.count == 1:
        return _eigen_of(sides, rank)
    assigned = _assign_to_ranks(sides, processes.count)[processes.rank]
    with processes.raise_together():
        own = _eigen_of({name: sides[name] for name in assigned}, rank)
    values = processes.all_gather_tensors({name: each.values for name, each in own.items()})
    vectors = processes.all_gather_tensors({name: each.vectors for name, each in own.items()})
    shares = processes.all_gather({name: each.retained_trace for name, each in own.items()})
    retained = {name: share for each in shares for name, share in each.items()}
    eigen = {}
    for name, total in sides.items():
        device = _device_of(total)
        eigen[name] = Eigen(values[name].to(device), vectors[name].to(device), retained[name])
    return eigen


def _assign_to_ranks(sides: Mapping[str, Sum], count: int) -> list[list[str]]:
    """Assign sides to ranks, largest first to the rank with the least work; the cost of a side is cubic."""
    assigned: list[list[str]] = [[] for _ in range(count)]
    work = [0.0] * count
    for name in sorted(sides, key=lambda name: (-_dimension(sides[name]), name)):
        least = work.index(min(work))
        assigned[least].append(name)
        work[least] += float(_dimension(sides[name])) ** 3
    return assigned


def _dimension(total: Sum) -> int:
    return len(total) if isinstance(total, Tensor) else len(total.image)


def _eigen_of(sides: Mapping[str, Sum], rank: int | None) -> dict[str, Eigen]:
    """Decompose sides; on a CPU in parallel with one thread each, which is faster than several threads for one."""

    def decompose_side(side: tuple[str, Sum]) -> Eigen:
        name, total = side
        return _eigen(total, name, rank)

    threads = torch.get_num_threads()
    if threads == 1 or any(_device_of(total).type != "cpu" for total in sides.values()):
        return {side[0]: decompose_side(side) for side in sides.items()}
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return dict(zip(sides, pool.map(decompose_side, sides.items()), strict=True))
    finally:
        torch.set_num_threads(threads)


def _device_of(total: Sum) -> torch.device:
    return total.device if isinstance(total, Tensor) else total.image.device


def _eigen(total: Sum, where: str, rank: int | None) -> Eigen:
    if isinstance(total, NystromSketch):
        try:
            values, vectors = total.leading(rank_of_side(len(total.image), rank))
        except NumericalError as error:
            raise NumericalError(f"{where}: {error}") from error
        return Eigen.of(values, vectors, total.trace)
    matrix = total.double()
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError(f"{where}: the curvature is not finite; try --dtype float32")
    values, vectors = torch.linalg.eigh(matrix)
    largest = float(values[-1]) if len(values) else 0.0
    if float(values[0]) < -_NEGATIVE_TOLERANCE * max(largest, 0.0) - 1e-30:
        raise NumericalError(
            f"{where}: the curvature is not positive semi-definite (smallest eigenvalue {float(values[0]):.3g}, "
            f"largest {largest:.3g}); try --dtype float32"
        )
    values = values.clamp(min=0.0)
    count = rank_of_side(len(values), rank)
    return Eigen.of(values[-count:], vectors[:, -count:], float(values.sum()))
