"""Whether tensors read from a disk are a posterior at all: shapes that fit together, bases that are bases.

Reading checks each tensor against its digest, so what is caught here was written wrong. The checks cost a few
passes over the tensors, no product of two matrices.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lapora.config import BASELESS_STRUCTURES
from lapora.errors import NumericalError, PosteriorError
from lapora.posterior.gaussian import BlockPosterior, JointPosterior

# Bases are kept in float32; a column that is off by more than this is no rounding.
_ORTHONORMAL_TOLERANCE = 1e-3


def check_blocks(posterior: BlockPosterior, structure: str, answers: int, file: Path) -> None:
    """Check every layer's tensors against each other and against the shape of its weight.

    Args:
        posterior: The layers.
        structure: Some have no bases (``diag``); the others have two for every layer.
        answers: How many answers there are.
        file: Where they come from.

    Raises:
        PosteriorError: A tensor is missing, or its shape does not fit; it is named.
        NumericalError: A basis is not orthonormal.
    """
    checked: set[int] = set()
    for block in posterior.blocks:
        if block.eigenvalues.dim() != 2:
            raise PosteriorError(f"{file}: tensor {block.name}.eigenvalues is no matrix; fit again with --overwrite")
        rows, columns = block.eigenvalues.shape
        # A language-model head, saved whole or as LoRA's B, has curvature in its answers' rows alone.
        sides = (
            (f"{block.name}.gradient_basis", block.gradient_basis, block.shape[0], rows, block.role != "A"),
            (f"{block.leader}.input_basis", block.input_basis, block.shape[1], columns, False),
        )
        for name, basis, size, found, part in sides:
            if (basis is None) != (structure in BASELESS_STRUCTURES):
                what = "is missing" if basis is None else f"has no place in structure {structure}"
                raise PosteriorError(f"{file}: tensor {name} {what}; fit again with --overwrite")
            length = found if basis is None else len(basis)
            fits = length == size or (part and length == answers < size)
            if basis is not None:
                fits = fits and basis.dim() == 2 and basis.shape[1] == found <= length
            if not fits:
                raise PosteriorError(
                    f"{file}: tensors {block.name}.eigenvalues and {name} do not have the shapes of a "
                    f"{block.shape[0]} x {block.shape[1]} weight; fit again with --overwrite"
                )
            if basis is not None and id(basis) not in checked:
                checked.add(id(basis))
                _check_orthonormal(basis, f"{file}: tensor {name}")


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
