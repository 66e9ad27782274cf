"""Low-rank eigendecomposition of a sum of outer products that is seen once, row by row, and never stored.

The randomised Nyström approximation of a positive semi-definite matrix M keeps ``Y = M Ω`` for a random
``Ω`` with (nearly) orthonormal columns, which needs one pass and 2dl numbers. It never exceeds M, so that a posterior
made of it is never too narrow. Source: Tropp, Yurtsever, Udell, Cevher 2017, "Fixed-rank approximation of a
positive-semidefinite matrix from streaming data", Algorithm 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lapora.errors import NumericalError

_WELL_CONDITIONED = 4
ROWS_AT_A_TIME = 8192
"""Of a sketch, in float64 when it is decomposed."""


class NystromSketch:
    """``Y = Σ x xᵀ Ω`` and the trace of ``Σ x xᵀ``, of rows x of length d.

    Args:
        dimension: d.
        width: l, columns of the sketch; more than the rank wanted makes the leading directions more exact.
        seed: Of Ω.
        like: A tensor with the type and device to work in.
    """

    def __init__(self, dimension: int, width: int, *, seed: int, like: Tensor) -> None:
        width = min(width, dimension)
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(dimension, width, generator=generator, dtype=torch.float32).to(like.device)
        if dimension < _WELL_CONDITIONED * width:
            gaussian = torch.linalg.qr(gaussian.double()).Q
        else:  # long random columns are orthogonal enough
            gaussian = gaussian / math.sqrt(dimension)
        self.test_matrix = gaussian.to(like.dtype)
        self.image = torch.zeros_like(self.test_matrix)
        self.trace = 0.0

    def add(self, rows: Tensor) -> None:
        """Add the outer products of ``rows``, ``(n, d)``."""
        self.image.addmm_(rows.T, rows @ self.test_matrix)
        self.trace += float(rows.square().sum(dtype=torch.float64))

    def another(self) -> NystromSketch:
        """An empty sketch with the same Ω, whose sums may be merged into this one's."""
        sketch = NystromSketch.__new__(NystromSketch)
        sketch.test_matrix, sketch.image, sketch.trace = self.test_matrix, torch.zeros_like(self.test_matrix), 0.0
        return sketch

    def on_host(self) -> NystromSketch:
        """The same sums in the host's memory, Ω left where rows are added."""
        sketch = self.another()
        sketch.image, sketch.trace = self.image.cpu(), self.trace
        return sketch

    def merge(self, other: NystromSketch) -> None:
        """Add what another sketch with the same Ω has seen."""
        self.image += other.image.to(self.image.device)
        self.trace += other.trace

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """The leading eigenpairs of the approximation. Ends the sketch: its memory is worked in.

        Args:
            rank: How many, at most the sketch's width.

        Returns:
            Eigenvalues ``(k,)``, falling, in float64, and eigenvectors ``(d, k)`` in the rows' type; ``k <= rank``,
            less where the matrix has no more directions.

        Raises:
            NumericalError: The rows held NaN or infinity.
        """
        if not bool(torch.isfinite(self.image).all()):
            raise NumericalError("the curvature is not finite; try --dtype float32")
        width = self.image.shape[1]
        norm = math.sqrt(sum(float(image.square().sum()) for image, _ in self._chunks()))
        if norm == 0.0:
            return self._double(0), self._double(len(self.image), 0)
        # The shift makes the core positive definite; it is taken off the eigenvalues again.
        accuracy = torch.finfo(self.image.dtype).eps
        shift = accuracy * norm
        core = self._double(width, width)
        for image, test in self._chunks():
            core += test.T @ image + shift * (test.T @ test)
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = values > 0.5 * shift
        root = vectors[:, kept] / values[kept].sqrt()
        # half halfᵀ is the approximation; it takes the image's place.
        gram = self._double(root.shape[1], root.shape[1])
        for start, (image, test) in zip(range(0, len(self.image), ROWS_AT_A_TIME), self._chunks(), strict=True):
            half = (image + shift * test) @ root
            gram += half.T @ half
            self.image[start : start + ROWS_AT_A_TIME, : root.shape[1]] = half.to(self.image.dtype)
        squares, right = torch.linalg.eigh(gram)
        squares, right = squares.flip(0), right.flip(1)
        found = (squares - shift).clamp(min=0.0)
        count = min(rank, int((found > 10 * accuracy * float(found[0])).sum())) if len(found) else 0
        combination = (right[:, :count] / squares[:count].sqrt()).to(self.image.dtype)
        return found[:count], self.image[:, : root.shape[1]] @ combination

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Image and test matrix a few rows at a time, in float64."""
        for start in range(0, len(self.image), ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            yield self.image[rows].double(), self.test_matrix[rows].to(self.image.device).double()

    def _double(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.image.device)
