"""The posterior: a Gaussian over the Bayesian weights, in the eigenbasis of its curvature.

A precision is ``curvature + δ I``; in the eigenbasis the curvature is diagonal with entries ``λ``, so that every
later computation is elementwise in δ. Directions outside the basis have no curvature: they keep the prior.

Two shapes: :class:`BlockPosterior`, one block per layer (kron, ekfac, diag), and :class:`JointPosterior`, one
basis across all layers (full, lowrank).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapora.config import BASELESS_STRUCTURES, JOINT
from lapora.curvature.per_example import LayerBasis
from lapora.errors import NumericalError, PosteriorError
from lapora.models.lora_layers import BayesianLayer, Role, describe_parameter


@dataclass(frozen=True, eq=False)
class EigenBlock:
    """The posterior of one layer's weight W (o x i).

    Attributes:
        name: The layer's name.
        role: ``A``, ``B`` or ``head``.
        shape: ``(o, i)`` of the whole weight.
        input_owner: Name of the layer whose input basis this block shares.
        input_basis: ``U_a``, ``(i, i')``, columns are eigenvectors; None is the identity.
        gradient_basis: ``U_g``, ``(o', o'')``; ``o' < o`` where only the answers' rows have curvature; None is
            the identity.
        eigenvalues: ``λ``, ``(o'', i')`` in float64, the curvature's scale included.
        squared_norm: ``‖θ‖²`` of the whole weight at the MAP.
        kept: Share of the curvature's trace that the basis holds; 1 where it is complete.
    """

    name: str
    role: Role
    shape: tuple[int, int]
    input_owner: str
    input_basis: Tensor | None
    gradient_basis: Tensor | None
    eigenvalues: Tensor
    squared_norm: float
    kept: float = 1.0

    @property
    def basis(self) -> LayerBasis:
        """What per-example gradients are rotated into."""
        return LayerBasis(self.input_owner, self.input_basis, self.gradient_basis)

    def to(self, device: torch.device, dtype: torch.dtype) -> EigenBlock:
        """The block with its bases on a device and in a type; eigenvalues stay in float64."""
        return EigenBlock(
            self.name,
            self.role,
            self.shape,
            self.input_owner,
            None if self.input_basis is None else self.input_basis.to(device, dtype),
            None if self.gradient_basis is None else self.gradient_basis.to(device, dtype),
            self.eigenvalues.to(device),
            self.squared_norm,
            self.kept,
        )


@dataclass(frozen=True, eq=False)
class BlockPosterior:
    """Independent Gaussians, one per layer."""

    blocks: list[EigenBlock]

    def on_device(self, layers: Sequence[BayesianLayer], device: torch.device, dtype: torch.dtype) -> BlockPosterior:
        """As :meth:`EigenBlock.to`, each block on its layer's device, bases that blocks share still shared."""
        moved: dict[int, Tensor] = {}
        blocks = []
        for layer, block in zip(layers, self.blocks, strict=True):
            there = layer.module.weight.device
            basis = block.input_basis
            if basis is not None:
                basis = moved.setdefault(id(basis), basis.to(there, dtype))
            blocks.append(replace(block.to(there, dtype), input_basis=basis))
        return BlockPosterior(blocks)

    @property
    def eigenvalues(self) -> list[Tensor]:
        """``λ`` of each block."""
        return [block.eigenvalues for block in self.blocks]

    def parameters(self) -> list[dict[str, Any]]:
        """The manifest's ``parameters``."""
        return [
            describe_parameter(block.name, block.role, block.shape, block.squared_norm)
            | {"input_of": block.input_owner, "kept": block.kept}
            for block in self.blocks
        ]

    def tensors(self) -> dict[str, Tensor]:
        """What is written to disk, by name; a basis that is the identity is not."""
        found: dict[str, Tensor] = {}
        for block in self.blocks:
            found[f"{block.name}.eigenvalues"] = block.eigenvalues
            if block.gradient_basis is not None:
                found[f"{block.name}.gradient_basis"] = block.gradient_basis.float()
            if block.input_basis is not None:
                found.setdefault(f"{block.input_owner}.input_basis", block.input_basis.float())
        return found

    @classmethod
    def from_tensors(cls, parameters: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> BlockPosterior:
        """Read back what :meth:`parameters` and :meth:`tensors` gave.

        Raises:
            KeyError, TypeError, ValueError: They do not belong together.
        """
        return cls(
            [
                EigenBlock(
                    name=parameter["name"],
                    role=parameter["role"],
                    shape=tuple(parameter["shape"]),
                    input_owner=parameter["input_of"],
                    input_basis=tensors.get(f"{parameter['input_of']}.input_basis"),
                    gradient_basis=tensors.get(f"{parameter['name']}.gradient_basis"),
                    eigenvalues=tensors[f"{parameter['name']}.eigenvalues"],
                    squared_norm=float(parameter["squared_norm"]),
                    kept=float(parameter.get("kept", 1.0)),
                )
                for parameter in parameters
            ]
        )


@dataclass(frozen=True, eq=False)
class JointPosterior:
    """One Gaussian over the weights of all layers, correlations between layers included.

    Attributes:
        layers: The manifest's description of each layer, in the order of the basis's columns.
        basis: ``(M, P)``, orthonormal rows: directions with curvature.
        joint_eigenvalues: ``λ``, ``(M,)`` in float64.
        kept: Share of the curvature's trace that the basis holds; 1 for ``full``.
        linear_model: What adapted evidence needs, for ``full``: ``kernel`` ``(M', M')``, ``prior_mean``
            ``(N, C-1)`` and ``labels`` ``(N,)``; see :mod:`lapora.posterior.linearised_evidence`.
    """

    layers: list[dict[str, Any]]
    basis: Tensor
    joint_eigenvalues: Tensor
    kept: float = 1.0
    linear_model: dict[str, Tensor] = field(default_factory=dict)

    def on_device(self, layers: Sequence[BayesianLayer], device: torch.device, dtype: torch.dtype) -> JointPosterior:
        """The posterior with its basis on the model's device and in a type; eigenvalues stay in float64."""
        return replace(self, basis=self.basis.to(device, dtype), joint_eigenvalues=self.joint_eigenvalues.to(device))

    @property
    def eigenvalues(self) -> list[Tensor]:
        """``λ``, as one list's only item."""
        return [self.joint_eigenvalues]

    def parameters(self) -> list[dict[str, Any]]:
        """The manifest's ``parameters``."""
        return self.layers

    def tensors(self) -> dict[str, Tensor]:
        """What is written to disk, by name."""
        return {
            f"{JOINT}.basis": self.basis.float(),
            f"{JOINT}.eigenvalues": self.joint_eigenvalues,
            **{f"linear_model.{key}": value for key, value in self.linear_model.items()},
        }

    @classmethod
    def from_tensors(cls, parameters: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> JointPosterior:
        """Read back what :meth:`parameters` and :meth:`tensors` gave.

        Raises:
            KeyError, TypeError, ValueError: They do not belong together.
        """
        return cls(
            layers=[dict(parameter) for parameter in parameters],
            basis=tensors[f"{JOINT}.basis"],
            joint_eigenvalues=tensors[f"{JOINT}.eigenvalues"],
        )


Posterior = BlockPosterior | JointPosterior


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
            (f"{block.input_owner}.input_basis", block.input_basis, block.shape[1], columns, False),
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
