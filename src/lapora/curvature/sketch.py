"""Low-rank eigendecomposition of a sum of outer products that is seen once, row by row, and never stored.

The randomised Nyström approximation of a positive semi-definite matrix M keeps ``Y = M Ω`` for a random
``Ω`` with orthonormal columns, which needs one pass and 2dl numbers. It never exceeds M, so that a posterior
made of it is never too narrow. Source: Tropp, Yurtsever, Udell, Cevher 2017, "Fixed-rank approximation of a
positive-semidefinite matrix from streaming data", Algorithm 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lapora.errors import NumericalError


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
        gaussian = torch.randn(dimension, width, generator=generator, dtype=torch.float32)
        self.test_matrix = torch.linalg.qr(gaussian.to(like.device, torch.float64)).Q.to(like.dtype)
        self.image = torch.zeros_like(self.test_matrix)
        self.trace = 0.0

    def add(self, rows: Tensor) -> None:
        """Add the outer products of ``rows``, ``(n, d)``."""
        self.image.addmm_(rows.T, rows @ self.test_matrix)
        self.trace += float(rows.square().sum(dtype=torch.float64))

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """The leading eigenpairs of the approximation.

        Args:
            rank: How many, at most the sketch's width.

        Returns:
            Eigenvalues ``(k,)``, falling, and eigenvectors ``(d, k)``, in float64; ``k <= rank``, less where
            the matrix has no more directions.

        Raises:
            NumericalError: The rows held NaN or infinity.
        """
        image, test = self.image.double(), self.test_matrix.double()
        if not bool(torch.isfinite(image).all()):
            raise NumericalError("the curvature is not finite; try --dtype float32")
        norm = float(torch.linalg.matrix_norm(image))
        if norm == 0.0:
            return image.new_zeros(0), image.new_zeros(len(image), 0)
        # The shift makes the core positive definite; it is taken off the eigenvalues again.
        accuracy = torch.finfo(self.image.dtype).eps
        shift = accuracy * norm
        core = test.T @ image + shift * (test.T @ test)
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        kept = values > 0.5 * shift
        root = vectors[:, kept] / values[kept].sqrt()
        basis, singular, _ = torch.linalg.svd((image + shift * test) @ root, full_matrices=False)
        found = (singular.square() - shift).clamp(min=0.0)
        count = min(rank, int((found > 10 * accuracy * float(found[0])).sum())) if len(found) else 0
        return found[:count], basis[:, :count]
