"""Kronecker sums turned into eigenbases, in float64: side by side on a CPU, shared out over the processes of a run."""

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

# Eigenvalues of a sum of squares are >= 0; round-off may push them below by a few units of float32.
_NEGATIVE_TOLERANCE = 1e-5


def decompose(
    layers: Sequence[BayesianLayer],
    factors: Mapping[str, KronFactors],
    rank: int | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> list[EigenBlock]:
    """Turn each layer's Kronecker sums into an eigenbasis and ``λ_ij = scale · λ^g_i λ^a_j``.

    Shared input sums are decomposed once. Decompositions run in float64.

    Args:
        layers: The layers.
        factors: Their sums.
        rank: Leading eigenvectors kept of each side; None keeps sides up to ``WHOLE_WIDTH`` whole.
        processes: Those that share the decompositions; each of them has all the sums.

    Raises:
        NumericalError: A sum holds NaN or infinity, or is not positive semi-definite; the layer is named.
    """
    sides: dict[str, _Side] = {}
    for layer in layers:
        found = factors[layer.name]
        sides.setdefault(f"{found.input_owner} (inputs)", (found.input_sum, layer.shape[0]))
        sides[f"{layer.name} (gradients)"] = (found.gradient_sum, layer.shape[1])
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
                kept=inputs.kept * gradients.kept,
            )
        )
    return blocks


_Side = tuple[Sum, int]
"""A sum, and the dimension of the Kronecker product's other side."""


@dataclass(frozen=True, eq=False)
class _Eigen:
    values: Tensor
    vectors: Tensor
    kept: float


def _eigen_of_all(sides: Mapping[str, _Side], rank: int | None, processes: Processes) -> dict[str, _Eigen]:
    """Decompose every side, each process some of them, and give all of them to every process."""
    if processes.count == 1:
        return _eigen_of(sides, rank)
    mine = _dealt_out(sides, processes.count)[processes.rank]
    with processes.raise_together():
        own = _eigen_of({name: sides[name] for name in mine}, rank)
    values = processes.all_gather_tensors({name: each.values for name, each in own.items()})
    vectors = processes.all_gather_tensors({name: each.vectors for name, each in own.items()})
    shares = processes.all_gather({name: each.kept for name, each in own.items()})
    kept = {name: share for each in shares for name, share in each.items()}
    found = {}
    for name, (total, _) in sides.items():
        here = _device_of(total)
        found[name] = _Eigen(values[name].to(here), vectors[name].to(here), kept[name])
    return found


def _dealt_out(sides: Mapping[str, _Side], count: int) -> list[list[str]]:
    """Sides for each process, the greatest first to whoever has the least to do; a decomposition is cubic."""
    hands: list[list[str]] = [[] for _ in range(count)]
    work = [0.0] * count
    for name in sorted(sides, key=lambda name: (-_dimension(sides[name][0]), name)):
        least = work.index(min(work))
        hands[least].append(name)
        work[least] += float(_dimension(sides[name][0])) ** 3
    return hands


def _dimension(total: Sum) -> int:
    return len(total) if isinstance(total, Tensor) else len(total.test_matrix)


def _eigen_of(sides: Mapping[str, _Side], rank: int | None) -> dict[str, _Eigen]:
    """On a CPU several at once, each by one thread, which is faster than one by several."""

    def decomposed(side: tuple[str, _Side]) -> _Eigen:
        name, (total, other) = side
        return _eigen(total, name, other, rank)

    threads = torch.get_num_threads()
    if threads == 1 or any(_device_of(total).type != "cpu" for total, _ in sides.values()):
        return {side[0]: decomposed(side) for side in sides.items()}
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return dict(zip(sides, pool.map(decomposed, sides.items()), strict=True))
    finally:
        torch.set_num_threads(threads)


def _device_of(total: Sum) -> torch.device:
    return total.device if isinstance(total, Tensor) else total.image.device


def _eigen(total: Sum, where: str, other: int, rank: int | None) -> _Eigen:
    if isinstance(total, NystromSketch):
        try:
            values, vectors = total.leading(rank_of_side(len(total.test_matrix), other, rank))
        except NumericalError as error:
            raise NumericalError(f"{where}: {error}") from error
        return _Eigen(values, vectors, float(values.sum()) / total.trace if total.trace else 1.0)
    wide = total.double()
    if not bool(torch.isfinite(wide).all()):
        raise NumericalError(f"{where}: the curvature is not finite; try --dtype float32")
    values, vectors = torch.linalg.eigh(wide)
    largest = float(values[-1]) if len(values) else 0.0
    if float(values[0]) < -_NEGATIVE_TOLERANCE * max(largest, 0.0) - 1e-30:
        raise NumericalError(
            f"{where}: the curvature is not positive semi-definite "
            f"(least eigenvalue {float(values[0]):.3g}, greatest {largest:.3g})"
        )
    values = values.clamp(min=0.0)
    kept = rank_of_side(len(values), other, rank)
    if kept == len(values):
        return _Eigen(values, vectors, 1.0)
    trace = float(values.sum())
    values, vectors = values[-kept:], vectors[:, -kept:]
    return _Eigen(values, vectors, float(values.sum()) / trace if trace else 1.0)
