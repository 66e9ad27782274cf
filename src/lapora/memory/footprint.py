"""Memory and disk space of a curvature structure, from the shapes of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lapora.config import DEFAULT_RANK, Structure
from lapora.curvature.kfac import rank_of_side, width_of_sum
from lapora.curvature.nystrom import ROWS_AT_A_TIME as SKETCH_ROWS
from lapora.curvature.nystrom import block_count
from lapora.models.lora_layers import BayesianLayer

_DOUBLE = 8
_FLOAT = 4
# Workspace of an eigendecomposition in float64, in copies of the matrix: matrix, eigenvectors and LAPACK's 2 n².
_EIGEN_COPIES = 4


@dataclass(frozen=True)
class StructureShape:
    """Inputs that determine the size of a structure's sums.

    Attributes:
        structure: Curvature structure.
        layers: The Bayesian layers; only shapes are read.
        input_owners: For every layer, the name of the first layer with the same input.
        classes: Number of answers C.
        columns: Number of Fisher columns per row.
        rows: Number of rows N.
        rank: Rank of the bases; None is the default.
        item: Bytes per element of a sum: 4, or 8 if the model runs in float64.
        offload: Kronecker sums are in CPU memory.
        threads: Number of decompositions that run in parallel.
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
        """Number P of weights that can have a nonzero gradient."""
        return sum(rows * columns for rows, columns in (layer.gradient_shape(self.classes) for layer in self.layers))


@dataclass(frozen=True)
class Footprint:
    """Memory of a structure, in bytes.

    Attributes:
        by_layer: Sums of each layer; a shared input is counted for the first layer with it.
        sums: Total of all layers.
        passing: Additional memory during a pass: a batch's sums before they are added, test matrices of sketches.
        deciding: Additional memory during decomposition: bases and workspace.
        host: Part of the above that is in CPU memory on any device.
        artifact: Size of the posterior on disk.
        second_pass: Memory besides the batch in a second pass: bases in the model's dtype, and sums in them.
        bases: What a second pass holds as well, where the decomposition is: bases in float64.
    """

    by_layer: dict[str, int]
    sums: int
    passing: int
    deciding: int
    host: int
    artifact: int
    second_pass: int = 0
    bases: int = 0


def footprint(shape: StructureShape) -> Footprint:
    """Compute the memory of a structure, and the size of its file with a digest of each row."""
    found = _of_structure(shape)
    return replace(found, artifact=found.artifact + shape.rows * _DOUBLE)


def _of_structure(shape: StructureShape) -> Footprint:
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
        test_matrix = image // block_count(parameters, width)
        deciding = test_matrix + 2 * basis + _sketch_workspace(parameters, width)
        return Footprint(share, image, test_matrix, deciding, 0, basis + (rank + 1) * _DOUBLE)
    jacobian_rows = shape.rows * shape.columns
    jacobian = jacobian_rows * parameters * shape.item
    kernel = jacobian_rows**2 * _DOUBLE
    retained = min(jacobian_rows, parameters)
    basis = retained * parameters * shape.item
    share = {name: size // _DOUBLE * jacobian_rows * shape.item for name, size in by_layer.items()}
    artifact = retained * (parameters * _FLOAT + _DOUBLE) + kernel + shape.rows * shape.classes * _DOUBLE
    return Footprint(share, jacobian, 0, 4 * kernel + basis, jacobian + 4 * kernel + basis, artifact)


def _sketch_workspace(dimension: int, width: int) -> int:
    """Return the workspace of decomposing a sketch: matrices of its width, and copies of row chunks in float64."""
    return (2 * _EIGEN_COPIES * width + 3 * min(dimension, SKETCH_ROWS)) * width * _DOUBLE


def _eigenvalues_of_side(dimension: int, rank: int | None) -> int:
    """Return the number of eigenvalues of a side, that of the directions outside its basis included."""
    return min(dimension, rank_of_side(dimension, rank) + 1)


def _kronecker(shape: StructureShape) -> Footprint:
    by_layer: dict[str, int] = {}
    test_matrices: dict[tuple[int, int], int] = {}
    largest_side = largest_eigen = bases = moments = artifact = 0
    for layer in shape.layers:
        rows, columns = layer.gradient_shape(shape.classes)
        sides = [rows]
        owns_input = shape.input_owners.get(layer.name, layer.name) == layer.name
        if owns_input:
            sides.append(columns)
        by_layer[layer.name] = 0
        for dimension in sides:
            retained, width = rank_of_side(dimension, shape.rank), width_of_sum(dimension, shape.rank)
            size = dimension * width * shape.item
            by_layer[layer.name] += size
            largest_side = max(largest_side, size)
            if width < dimension:
                test_matrices[dimension, width] = size // block_count(dimension, width)
                bases += dimension * retained * shape.item
                largest_eigen = max(largest_eigen, size + _sketch_workspace(dimension, width))
            else:
                bases += dimension**2 * _DOUBLE  # dropped columns are freed only after saving
                largest_eigen = max(largest_eigen, _EIGEN_COPIES * dimension**2 * _DOUBLE)
            artifact += dimension * retained * _FLOAT
        values = _eigenvalues_of_side(rows, shape.rank) * _eigenvalues_of_side(columns, shape.rank) * _DOUBLE
        moments += values
        artifact += values
    total = sum(by_layer.values())
    passing = total + sum(test_matrices.values())
    deciding = bases + moments + shape.threads * largest_eigen
    second_pass = 0
    if shape.structure == "ekfac":
        second_pass = bases * shape.item // _DOUBLE + 2 * moments  # those of all batches, and of one
    else:
        bases = 0
    if shape.offload:
        # The device holds one side at a time; the host holds the sums, a batch's sums and the decompositions.
        passing = sum(test_matrices.values()) + 2 * largest_side
        return Footprint(by_layer, total, passing, deciding, 2 * total, artifact, second_pass, bases)
    return Footprint(by_layer, total, passing, deciding, 0, artifact, second_pass, bases)
