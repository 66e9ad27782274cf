"""Gaussian posteriors over the Bayesian weights, in the eigenbasis of the curvature.

The posterior precision is ``curvature + δ I``. In the eigenbasis the curvature is diagonal with entries ``λ``, so that
later computations are elementwise in δ. A truncated basis ``U`` has k of d directions. All others share one eigenvalue,
``U Λ Uᵀ + ρ (I - U Uᵀ)``, which makes the trace that of the whole curvature: ``ρ = (tr - Σ λ) / (d - k)``.

:class:`BlockPosterior` has one block per layer (kron, ekfac, diag); :class:`JointPosterior` has one basis for all
layers (full, lowrank).
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
from lapora.posterior.marglik import Spectrum


@dataclass(frozen=True, eq=False)
class EigenBlock:
    """The posterior of one layer's weight W ``(o, i)``.

    Attributes:
        name: Name of the layer.
        role: ``A``, ``B`` or ``head``.
        shape: ``(o, i)`` of the full weight.
        input_owner: Name of the layer whose input basis this block shares.
        input_basis: ``U_a``, ``(i, i')``, eigenvectors in columns; None is the identity.
        gradient_basis: ``U_g``, ``(o', o'')``; ``o' < o`` if only the rows of the answers have curvature; None is
            the identity.
        eigenvalues: ``λ``, ``(o'', i')`` in float64, including the curvature's scale. A truncated side has one more
            row or column, of the directions outside its basis.
        squared_norm: ``‖θ‖²`` of the full weight at the MAP.
        retained_trace: Share of the curvature's trace within the basis; 1 for a complete basis.
    """

    name: str
    role: Role
    shape: tuple[int, int]
    input_owner: str
    input_basis: Tensor | None
    gradient_basis: Tensor | None
    eigenvalues: Tensor
    squared_norm: float
    retained_trace: float = 1.0

    @property
    def basis(self) -> LayerBasis:
        """Basis for the per-example gradients of this layer."""
        return LayerBasis(self.input_owner, self.input_basis, self.gradient_basis)

    @property
    def spectrum(self) -> Spectrum:
        """Eigenvalues with their multiplicities."""
        bases = (self.gradient_basis, self.input_basis)
        return Spectrum.of(self.eigenvalues.cpu().numpy(), [None if basis is None else basis.shape for basis in bases])

    def to(self, device: torch.device, dtype: torch.dtype) -> EigenBlock:
        """Return the block with its bases on a device and in a dtype; eigenvalues stay in float64."""
        return EigenBlock(
            self.name,
            self.role,
            self.shape,
            self.input_owner,
            None if self.input_basis is None else self.input_basis.to(device, dtype),
            None if self.gradient_basis is None else self.gradient_basis.to(device, dtype),
            self.eigenvalues.to(device),
            self.squared_norm,
            self.retained_trace,
        )


@dataclass(frozen=True, eq=False)
class BlockPosterior:
    """Independent Gaussians, one per layer.

    Attributes:
        blocks: One block per layer.
    """

    blocks: list[EigenBlock]

    def on_device(self, layers: Sequence[BayesianLayer], device: torch.device, dtype: torch.dtype) -> BlockPosterior:
        """Return the posterior with each block on its layer's device; shared bases stay shared.

        Args:
            layers: The layers, in the order of the blocks.
            device: Ignored: layers may be on several devices.
            dtype: Dtype of the bases; eigenvalues stay in float64.
        """
        moved: dict[int, Tensor] = {}
        blocks = []
        for layer, block in zip(layers, self.blocks, strict=True):
            layer_device = layer.module.weight.device
            basis = block.input_basis
            if basis is not None:
                basis = moved.setdefault(id(basis), basis.to(layer_device, dtype))
            blocks.append(replace(block.to(layer_device, dtype), input_basis=basis))
        return BlockPosterior(blocks)

    @property
    def eigenvalues(self) -> list[Tensor]:
        """``λ`` of each block."""
        return [block.eigenvalues for block in self.blocks]

    @property
    def spectra(self) -> list[Spectrum]:
        """Eigenvalues of each block with their multiplicities."""
        return [block.spectrum for block in self.blocks]

    def parameters(self) -> list[dict[str, Any]]:
        """Return the manifest's ``parameters``."""
        return [
            describe_parameter(block.name, block.role, block.shape, block.squared_norm)
            | {"input_of": block.input_owner, "kept": block.retained_trace}
            for block in self.blocks
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, by name; identity bases are omitted."""
        tensors: dict[str, Tensor] = {}
        for block in self.blocks:
            tensors[f"{block.name}.eigenvalues"] = block.eigenvalues
            if block.gradient_basis is not None:
                tensors[f"{block.name}.gradient_basis"] = block.gradient_basis.float()
            if block.input_basis is not None:
                tensors.setdefault(f"{block.input_owner}.input_basis", block.input_basis.float())
        return tensors

    @classmethod
    def from_tensors(cls, parameters: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> BlockPosterior:
        """Rebuild a posterior from the values of :meth:`parameters` and :meth:`tensors`.

        Raises:
            KeyError, TypeError, ValueError: The parameters and the tensors do not match.
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
                    retained_trace=float(parameter.get("kept", 1.0)),
                )
                for parameter in parameters
            ]
        )


@dataclass(frozen=True, eq=False)
class JointPosterior:
    """One Gaussian over the weights of all layers, including correlations between layers.

    Attributes:
        layers: The manifest's description of each layer, in the order of the basis's columns.
        basis: ``(M, P)`` with orthonormal rows, the directions with curvature.
        joint_eigenvalues: ``λ``, ``(M + 1,)`` in float64; the last is that of all directions outside the basis, 0 for
            ``full``. Without it if the basis is complete.
        retained_trace: Share of the curvature's trace within the basis; 1 for ``full``.
        linear_model: Inputs of the adapted evidence, for ``full``: ``kernel`` ``(N(C-1), N(C-1))``, ``prior_mean``
            ``(N, C-1)`` and ``labels`` ``(N,)``; see :mod:`lapora.posterior.linearised_evidence`.
    """

    layers: list[dict[str, Any]]
    basis: Tensor
    joint_eigenvalues: Tensor
    retained_trace: float = 1.0
    linear_model: dict[str, Tensor] = field(default_factory=dict)

    def on_device(self, layers: Sequence[BayesianLayer], device: torch.device, dtype: torch.dtype) -> JointPosterior:
        """Return the posterior on a device, with its basis in a dtype; eigenvalues stay in float64."""
        return replace(self, basis=self.basis.to(device, dtype), joint_eigenvalues=self.joint_eigenvalues.to(device))

    @property
    def eigenvalues(self) -> list[Tensor]:
        """``λ``, as a list of one tensor."""
        return [self.joint_eigenvalues]

    @property
    def spectra(self) -> list[Spectrum]:
        """``λ`` with its multiplicities, as a list of one item."""
        return [Spectrum.of(self.joint_eigenvalues.cpu().numpy(), [self.basis.shape[::-1]])]

    def parameters(self) -> list[dict[str, Any]]:
        """Return the manifest's ``parameters``."""
        return self.layers

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, by name."""
        return {
            f"{JOINT}.basis": self.basis.float(),
            f"{JOINT}.eigenvalues": self.joint_eigenvalues,
            **{f"linear_model.{key}": value for key, value in self.linear_model.items()},
        }

    @classmethod
    def from_tensors(cls, parameters: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> JointPosterior:
        """Rebuild a posterior from the values of :meth:`parameters` and :meth:`tensors`.

        Raises:
            KeyError, TypeError, ValueError: The parameters and the tensors do not match.
        """
        return cls(
            layers=[dict(parameter) for parameter in parameters],
            basis=tensors[f"{JOINT}.basis"],
            joint_eigenvalues=tensors[f"{JOINT}.eigenvalues"],
        )


Posterior = BlockPosterior | JointPosterior


# Bases are stored in float32; larger deviations from orthonormality are not round-off.
_ORTHONORMAL_TOLERANCE = 1e-3


def check_blocks(posterior: BlockPosterior, structure: str, answers: int, file: Path) -> None:
    """Check the shapes of every layer's tensors, and that its bases are orthonormal.

    Args:
        posterior: The posterior.
        structure: Curvature structure; ``diag`` has no bases, the others have two per layer.
        answers: Number of answers C.
        file: File of the tensors, for error messages.

    Raises:
        PosteriorError: A tensor is missing or has a wrong shape; it is named.
        NumericalError: A basis is not orthonormal.
    """
    checked: set[int] = set()
    for block in posterior.blocks:
        if block.eigenvalues.dim() != 2:
            raise PosteriorError(f"{file}: tensor {block.name}.eigenvalues is not a matrix; fit again with --overwrite")
        rows, columns = block.eigenvalues.shape
        # A language-model head, saved in full or as LoRA's B, has curvature only in the rows of the answers.
        sides = (
            (f"{block.name}.gradient_basis", block.gradient_basis, block.shape[0], rows, block.role != "A"),
            (f"{block.input_owner}.input_basis", block.input_basis, block.shape[1], columns, False),
        )
        for name, basis, size, count, may_be_answers_only in sides:
            if (basis is None) != (structure in BASELESS_STRUCTURES):
                problem = "is missing" if basis is None else f"does not belong to structure {structure}"
                raise PosteriorError(f"{file}: tensor {name} {problem}; fit again with --overwrite")
            length = count if basis is None else len(basis)
            fits = length == size or (may_be_answers_only and length == answers < size)
            if basis is not None:
                fits = fits and basis.dim() == 2 and count == basis.shape[1] + (basis.shape[1] < length)
            if not fits:
                raise PosteriorError(
                    f"{file}: the shapes of tensors {block.name}.eigenvalues and {name} do not match a "
                    f"{block.shape[0]} x {block.shape[1]} weight; fit again with --overwrite"
                )
            if basis is not None and id(basis) not in checked:
                checked.add(id(basis))
                _check_orthonormal(basis, f"{file}: tensor {name}")


def check_joint(posterior: JointPosterior, file: Path) -> None:
    """Check the shapes of the joint basis and its eigenvalues.

    Raises:
        PosteriorError: The shapes do not match; the tensors are named.
    """
    basis, values = posterior.basis, posterior.joint_eigenvalues
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in posterior.layers)
    fits = basis.dim() == 2 and values.dim() == 1 and basis.shape[1] <= weights
    if not fits or len(values) != len(basis) + (len(basis) < basis.shape[1]):
        raise PosteriorError(
            f"{file}: tensors joint.basis {list(basis.shape)} and joint.eigenvalues {list(values.shape)} do not match "
            f"{weights} weights; fit again with --overwrite"
        )


def _check_orthonormal(basis: Tensor, where: str) -> None:
    """Check ``QᵀQ x = x`` for one fixed random x, which takes two products only."""
    if not basis.shape[1]:  # a factor that is zero has no direction
        return
    probe = torch.randn(basis.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(basis)
    projected = basis.T @ (basis @ probe)
    if float((projected - probe).abs().max()) > _ORTHONORMAL_TOLERANCE * max(1.0, float(probe.abs().max())):
        raise NumericalError(f"{where} is not an orthonormal basis; fit again with --overwrite")
