"""Single-pass randomized Nyström approximation of ``M = Σ x xᵀ``, without storing M.

The sketch ``Y = M Ω``, with a random ``Ω`` ``(d, l)`` of (nearly) orthonormal columns, takes one pass over the rows
and 2dl numbers. The approximation is never larger than M (in the Loewner order), so that its posterior covariance is
never too small. Source: Tropp, Yurtsever, Udell, Cevher 2017, "Fixed-rank approximation of a positive-semidefinite
matrix from streaming data", Algorithm 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lapora.errors import NumericalError

_WELL_CONDITIONED = 4
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
        """Compute the leading eigenpairs of the approximation; overwrites the sketch.

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
        width = self.image.shape[1]
        norm = math.sqrt(sum(float(image.square().sum()) for image, _ in self._chunks()))
        if norm == 0.0:
            return self._double(0), self._double(len(self.image), 0)
        # The shift makes the core positive definite; it is subtracted from the eigenvalues below.
        accuracy = torch.finfo(self.image.dtype).eps
        shift = accuracy * norm
        core = self._double(width, width)
        for image, test in self._chunks():
            core += test.T @ image + shift * (test.T @ test)
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        positive = values > 0.5 * shift
        root = vectors[:, positive] / values[positive].sqrt()
        # half halfᵀ is the approximation; half overwrites the image to save memory.
        gram = self._double(root.shape[1], root.shape[1])
        for start, (image, test) in zip(range(0, len(self.image), ROWS_AT_A_TIME), self._chunks(), strict=True):
            half = (image + shift * test) @ root
            gram += half.T @ half
            self.image[start : start + ROWS_AT_A_TIME, : root.shape[1]] = half.to(self.image.dtype)
        squares, right = torch.linalg.eigh(gram)
        squares, right = squares.flip(0), right.flip(1)
        eigenvalues = (squares - shift).clamp(min=0.0)
        count = min(rank, int((eigenvalues > 10 * accuracy * float(eigenvalues[0])).sum())) if len(eigenvalues) else 0
        combination = (right[:, :count] / squares[:count].sqrt()).to(self.image.dtype)
        return eigenvalues[:count], self.image[:, : root.shape[1]] @ combination

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield row chunks of Y and Ω in float64."""
        for start in range(0, len(self.image), ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            yield self.image[rows].double(), self.test_matrix[rows].to(self.image.device).double()

    def _double(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.image.device)
