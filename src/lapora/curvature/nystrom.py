"""Single-pass randomized Nyström approximation of ``M = Σ x xᵀ``, without storing M.

The sketch ``Y = M Ω``, with a random ``Ω`` ``(d, l)`` of (nearly) orthonormal columns, takes one pass over the rows
and 2dl numbers. Source: Tropp, Yurtsever, Udell, Cevher 2017, "Fixed-rank approximation of a positive-semidefinite
matrix from streaming data", Algorithm 3.

What is wanted is ``M ≈ U Λ Uᵀ + ρ (I - U Uᵀ)`` with k < l directions. The eigenvalues outside U add to Y, and make
Nyström's Λ too small: it is exact for a matrix of rank l, which M is not, and ``M - ρ I`` nearly is. ``M - s I`` has
the sketch ``Y - s Ω`` and the core ``Ωᵀ Y - s Ωᵀ Ω``, which ``s = ρ`` would make indefinite, since half of the
remaining eigenvalues are below their mean. Here s is ``ρ / 2``, and at most half of the core's eigenvalue in each of
the core's eigenvectors; ρ follows from the trace, which is summed exactly, in a few iterations on l x l matrices.
Errors on the factors of real adapters: docs/posteriors.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lapora.errors import NumericalError

_WELL_CONDITIONED = 4
_SHIFT = 0.5
"""Largest share of the mean remaining eigenvalue, and of an eigenvalue of the core, that is subtracted."""
_ITERATIONS, _CONVERGED = 6, 0.01
ROWS_AT_A_TIME = 8192
"""Number of rows of a sketch that are converted to float64 at a time."""


class NystromSketch:
    """Sketch ``Y = Σ x xᵀ Ω`` and trace of ``Σ x xᵀ``, for rows x of length d.

    Args:
        dimension: Length d of the rows.
        width: Number of columns l; oversampling (l above the rank) makes the leading eigenpairs more accurate.
        seed: Random seed of Ω.
        like: A tensor with the dtype and device of the sketch.
    """

    def __init__(self, dimension: int, width: int, *, seed: int, like: Tensor) -> None:
        width = min(width, dimension)
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(dimension, width, generator=generator, dtype=torch.float32).to(like.device)
        if dimension < _WELL_CONDITIONED * width:
            gaussian = torch.linalg.qr(gaussian.double()).Q
        else:  # random columns with d >> l are nearly orthogonal
            gaussian = gaussian / math.sqrt(dimension)
        self.test_matrix = gaussian.to(like.dtype)
        self.image = torch.zeros_like(self.test_matrix)
        self.trace = 0.0

    def add(self, rows: Tensor) -> None:
        """Add the outer products of ``rows``, ``(n, d)``."""
        self.image.addmm_(rows.T, rows @ self.test_matrix)
        self.trace += float(rows.square().sum(dtype=torch.float64))

    def empty_copy(self) -> NystromSketch:
        """Return an empty sketch with the same Ω, which can be merged into this one."""
        sketch = NystromSketch.__new__(NystromSketch)
        sketch.test_matrix, sketch.image, sketch.trace = self.test_matrix, torch.zeros_like(self.test_matrix), 0.0
        return sketch

    def to_cpu(self) -> NystromSketch:
        """Return a copy with Y in CPU memory; Ω stays on the device of the rows."""
        sketch = self.empty_copy()
        sketch.image, sketch.trace = self.image.cpu(), self.trace
        return sketch

    def merge(self, other: NystromSketch) -> None:
        """Add another sketch with the same Ω."""
        self.image += other.image.to(self.image.device)
        self.trace += other.trace

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """Compute the leading eigenpairs of the approximation.

        Args:
            rank: Number of eigenpairs, at most the sketch's width.

        Returns:
            Eigenvalues ``(k,)``, descending, in float64, and eigenvectors ``(d, k)`` in the rows' dtype; ``k`` is
            below ``rank`` if the matrix has a lower rank.

        Raises:
            NumericalError: The rows contain NaN or infinity.
        """
        if not bool(torch.isfinite(self.image).all()):
            raise NumericalError("the curvature is not finite; try --dtype float32")
        dimension, width = self.image.shape
        # The triangular factor of [Ω Y] has the inner products of its columns, in 2l rows. With its first block R, the
        # columns of Ω R⁻¹ are orthonormal, and their images are Y R⁻¹.
        factor = self._double(0, 2 * width)
        for chunk in self._chunks():
            factor = torch.linalg.qr(torch.cat([factor, chunk]), mode="r").R
        scale, images = factor[:width, :width], factor[:, width:]
        images = torch.linalg.solve_triangular(scale, images, upper=True, left=False)
        tests = torch.eye(len(factor), width, dtype=torch.float64, device=factor.device)
        accuracy = torch.finfo(self.image.dtype).eps
        # Rounding errors of Y make the core indefinite; this much is added to M.
        added = accuracy * float(images.norm())
        if added == 0.0:
            return self._double(0), self.image[:, :0]
        core = images[:width] + added * tests[:width]
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        values, vectors = values[values > 0.5 * added], vectors[:, values > 0.5 * added]
        images, tests = images @ vectors, tests @ vectors
        remainder, others = 0.0, max(dimension - rank, 1)
        for _ in range(_ITERATIONS):
            shift = _SHIFT * torch.minimum(values, values.new_tensor(remainder))
            root = (values - shift).rsqrt()
            half = (images + (added - shift) * tests) * root  # half halfᵀ approximates M - shift
            squares, right = torch.linalg.eigh(half.T @ half)
            squares, right = squares.flip(0)[:rank], right.flip(1)[:, :rank]
            eigenvalues = (squares + _SHIFT * remainder - added).clamp(min=0.0)
            previous = remainder
            remainder = max(self.trace - float(eigenvalues.sum()), 0.0) / others
            if abs(remainder - previous) <= _CONVERGED * remainder:
                break
        # A matrix of low rank has no remainder for the shift to be a part of.
        eigenvalues = eigenvalues * min(1.0, self.trace / float(eigenvalues.sum()))
        count = int((eigenvalues > 10 * accuracy * float(eigenvalues[0])).sum())
        combination = right[:, :count] / squares[:count].sqrt()
        combination = root.unsqueeze(1) * combination
        of_both = vectors @ torch.cat([(added - shift).unsqueeze(1) * combination, combination], dim=1)
        of_both = torch.linalg.solve_triangular(scale, of_both, upper=True)
        combination = torch.cat(of_both.split(count, dim=1))
        directions = self.image.new_empty(dimension, count)
        for part, chunk in zip(directions.split(ROWS_AT_A_TIME), self._chunks(), strict=True):
            part.copy_(chunk @ combination)
        return eigenvalues[:count], directions

    def _chunks(self) -> Iterator[Tensor]:
        """Yield row chunks of ``[Ω Y]`` in float64."""
        for start in range(0, len(self.image), ROWS_AT_A_TIME):
            image = self.image[start : start + ROWS_AT_A_TIME]
            test = self.test_matrix[start : start + ROWS_AT_A_TIME].to(image.device)
            yield torch.cat([test, image], dim=1).double()

    def _double(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.image.device)
