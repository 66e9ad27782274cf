"""Whether tensors read from a disk are a posterior at all: shapes that fit together, bases that are bases.

Reading checks each tensor against its digest, so what is caught here was written wrong. The checks cost a few
passes over the tensors, no product of two matrices.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lapora.errors import NumericalError, PosteriorError
from lapora.posterior.gaussian import BlockPosterior, JointPosterior

# Bases are kept in float32; a column that is off by more than this is no rounding.
_ORTHONORMAL_TOLERANCE = 1e-3


def check_blocks(posterior: BlockPosterior, file: Path) -> None:
    """Check every layer's tensors against each other and against the shape of its weight.

    Raises:
        PosteriorError: A shape does not fit; the tensor is named.
        NumericalError: A basis is not orthonormal.
    """
    checked: set[int] = set()
    for block in posterior.blocks:
        rows, columns = block.shape
        sizes = (
            ("gradient_basis", block.name, block.gradient_basis, rows, block.eigenvalues.shape[:1]),
            ("input_basis", block.leader, block.input_basis, columns, block.eigenvalues.shape[1:]),
        )
        if block.eigenvalues.dim() != 2:
            raise PosteriorError(f"{file}: tensor {block.name}.eigenvalues is no matrix; fit again with --overwrite")
        for side, name, basis, size, found in sizes:
            # A language-model head has curvature in its answers' rows alone: fewer, and no basis of the whole.
            fits = found[0] <= size if basis is None else basis.dim() == 2 and tuple(found) == basis.shape[1:]
            if side == "input_basis" and fits and (size != found[0] if basis is None else size != len(basis)):
                fits = False
            if not fits or (basis is not None and not basis.shape[1] <= basis.shape[0] <= size):
                raise PosteriorError(
                    f"{file}: tensors {block.name}.eigenvalues and {name}.{side} do not have the shapes of a "
                    f"{rows} x {columns} weight; fit again with --overwrite"
                )
            if basis is not None and id(basis) not in checked:
                checked.add(id(basis))
                _check_orthonormal(basis, f"{file}: tensor {name}.{side}")


def check_joint(posterior: JointPosterior, file: Path) -> None:
    """Check the shapes of a basis that spans all layers.

    Raises:
        PosteriorError: They do not fit; the tensor is named.
    """
    basis, values = posterior.basis, posterior.joint_eigenvalues
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in posterior.layers)
    if basis.dim() != 2 or values.dim() != 1 or len(values) != len(basis) or basis.shape[1] > weights:
        raise PosteriorError(
            f"{file}: tensors joint.basis {list(basis.shape)} and joint.eigenvalues {list(values.shape)} do not fit "
            f"{weights} weights; fit again with --overwrite"
        )


def _check_orthonormal(basis: Tensor, where: str) -> None:
    """``QᵀQ x = x`` for one fixed random x: a basis that is none fails it."""
    probe = torch.randn(basis.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(basis)
    back = basis.T @ (basis @ probe)
    if float((back - probe).abs().max()) > _ORTHONORMAL_TOLERANCE * max(1.0, float(probe.abs().max())):
        raise NumericalError(f"{where} is no orthonormal basis; fit again with --overwrite")
