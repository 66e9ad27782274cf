"""What a structure of the curvature takes in memory and on disk, from the shapes of its layers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lapora.config import DEFAULT_RANK, Structure
from lapora.curvature.kfac import rank_of_side
from lapora.curvature.nystrom import ROWS_AT_A_TIME as SKETCH_ROWS
from lapora.models.lora_layers import BayesianLayer

_DOUBLE = 8
_FLOAT = 4
# What an eigendecomposition in float64 works in, in copies of its matrix: the matrix, the vectors, LAPACK's own (2 n²).
_EIGEN_COPIES = 4


@dataclass(frozen=True)
class StructureShape:
    """What decides the size of a structure's sums.

    Attributes:
        structure: Which.
        layers: The Bayesian layers; shapes are looked at, weights never.
        input_owners: For every layer, the first that has the same input.
        classes: Number of answers C.
        columns: Fisher columns of one row.
        rows: N, for ``full``.
        rank: As asked for.
        item: Bytes of a number in a sum: 4, or 8 where the model runs in float64.
        offload: Kronecker sums are kept on the host.
        threads: Decompositions that run at a time.
    """

    structure: Structure
    layers: Sequence[BayesianLayer]
    input_owners: Mapping[str, str]
    classes: int
    columns: int
    rows: int
    rank: int | None = None
    item: int = _FLOAT
    offload: bool = False
    threads: int = 1

    @property
    def parameters(self) -> int:
        """How many weights can have a gradient."""
        return sum(rows * columns for rows, columns in (layer.gradient_shape(self.classes) for layer in self.layers))


@dataclass(frozen=True)
class Footprint:
    """Bytes.

    Attributes:
        by_layer: The sums of each layer; a shared input is counted under the first layer that has it.
        sums: All of them.
        passing: Beside the sums during a pass: a batch's own sums before they are added, random matrices of sketches.
        deciding: Beside the sums while they are decomposed: bases, workspace.
        host: Of all that, what is on the host whatever the device.
        artifact: The posterior on disk.
    """

    by_layer: dict[str, int]
    sums: int
    passing: int
    deciding: int
    host: int
    artifact: int


def footprint(shape: StructureShape) -> Footprint:
    """Reckon a structure's memory."""
    if shape.structure in ("kron", "ekfac"):
        return _kronecker(shape)
    parameters = shape.parameters
    by_layer = {
        layer.name: rows * columns * _DOUBLE
        for layer in shape.layers
        for rows, columns in [layer.gradient_shape(shape.classes)]
    }
    if shape.structure == "diag":
        total = sum(by_layer.values())
        return Footprint(by_layer, total, total, total, 0, total)
    if shape.structure == "lowrank":
        rank = min(shape.rank or DEFAULT_RANK, parameters)
        width = min(2 * rank, parameters)
        share = {name: size // _DOUBLE * width * shape.item for name, size in by_layer.items()}
        image = parameters * width * shape.item
        basis = parameters * rank * _FLOAT
        deciding = image + 2 * basis + _sketch_workspace(parameters, width)
        return Footprint(share, image, image, deciding, 0, basis + rank * _DOUBLE)
    jacobian_rows = shape.rows * shape.columns
    jacobian = jacobian_rows * parameters * shape.item
    kernel = jacobian_rows**2 * _DOUBLE
    kept = min(jacobian_rows, parameters)
    basis = kept * parameters * shape.item
    share = {name: size // _DOUBLE * jacobian_rows * shape.item for name, size in by_layer.items()}
    artifact = kept * (parameters * _FLOAT + _DOUBLE) + kernel + shape.rows * shape.classes * _DOUBLE
    return Footprint(share, jacobian, 0, 4 * kernel + basis, jacobian + 4 * kernel + basis, artifact)


def _sketch_workspace(dimension: int, width: int) -> int:
    """Small decompositions, and the sketch and what is made of it in float64, a few thousand rows at a time."""
    return (_EIGEN_COPIES * width + 4 * min(dimension, SKETCH_ROWS)) * width * _DOUBLE


def _kronecker(shape: StructureShape) -> Footprint:
    rank = shape.rank if shape.structure == "kron" else None
    by_layer: dict[str, int] = {}
    random: dict[tuple[int, int], int] = {}
    largest_side = largest_eigen = bases = moments = artifact = 0
    for layer in shape.layers:
        rows, columns = layer.gradient_shape(shape.classes)
        sides = [(rows, columns)]
        leads = shape.input_owners.get(layer.name, layer.name) == layer.name
        if leads:
            sides.append((columns, layer.shape[0]))
        by_layer[layer.name] = 0
        for dimension, other in sides:
            kept = rank_of_side(dimension, other, rank)
            width = min(2 * kept, dimension)
            size = dimension * width * shape.item
            by_layer[layer.name] += size
            largest_side = max(largest_side, size)
            if dimension > 2 * kept:
                random[dimension, width] = size
                bases += dimension * kept * shape.item
                largest_eigen = max(largest_eigen, size + _sketch_workspace(dimension, width))
            else:
                bases += dimension**2 * _DOUBLE  # columns that are left out are not freed before all is written
                largest_eigen = max(largest_eigen, _EIGEN_COPIES * dimension**2 * _DOUBLE)
            artifact += dimension * kept * _FLOAT
        values = rank_of_side(rows, columns, rank) * rank_of_side(columns, layer.shape[0], rank) * _DOUBLE
        moments += values
        artifact += values
    total = sum(by_layer.values())
    passing = total + sum(random.values())
    deciding = bases + moments + shape.threads * largest_eigen
    if shape.structure == "ekfac":
        deciding += bases // 2 + moments  # bases in the model's type, and a batch's moments
    if shape.offload:
        # The device holds one side at a time; the host the sums, a batch's sums, and the decompositions.
        return Footprint(by_layer, total, sum(random.values()) + 2 * largest_side, deciding, 2 * total, artifact)
    return Footprint(by_layer, total, passing, deciding, 0, artifact)
