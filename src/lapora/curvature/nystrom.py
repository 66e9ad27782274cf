"""Single-pass randomized Nyström approximation of ``M = Σ x xᵀ``, without storing M.

The sketch ``Y = M Ω``, with a random ``Ω`` ``(d, l)`` of orthonormal columns, takes one pass over the rows
and little more than dl numbers. Source: Tropp, Yurtsever, Udell, Cevher 2017, "Fixed-rank approximation of a
positive-semidefinite matrix from streaming data", Algorithm 3.

What is wanted is ``M ≈ U Λ Uᵀ + ρ (I - U Uᵀ)`` with k < l directions. The eigenvalues outside U add to Y, and make
Nyström's Λ too small: it is exact for a matrix of rank l, which M is not, and ``M - ρ I`` nearly is. ``M - s I`` has
the sketch ``Y - s Ω`` and the core ``Ωᵀ Y - s Ωᵀ Ω``, which ``s = ρ`` would make indefinite, since half of the
remaining eigenvalues are below their mean. Here s is ``ρ / 2``, and at most half of the core's eigenvalue in each of
the core's eigenvectors; ρ follows from the trace, which is summed exactly. Only inner products of Y and Ω are needed.
Errors on the factors of real adapters: docs/posteriors.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lapora.errors import NumericalError

_SHIFT = 0.5
"""Largest share of the mean remaining eigenvalue, and of an eigenvalue of the core, that is subtracted."""
ROWS_AT_A_TIME = 8192
"""Number of rows of a sketch that are converted to float64 at a time."""
TEST_MATRIX = "block-diagonal"
"""Kind of test matrix; sketches with another kind cannot be added."""
_BLOCKS = 4
"""Largest number of diagonal blocks of a test matrix."""
_COLUMNS_OF_BLOCK = 24
"""Smallest number of columns of a block, for the leading eigenvectors that have most of their entries in it."""
_RUN = 16
"""Largest number of consecutive rows of Ω that belong to one block; a power of two."""


def block_count(dimension: int, width: int) -> int:
    """Return the number of diagonal blocks of a test matrix ``(d, l)``."""
    count = _BLOCKS
    while count > 1 and (dimension % count or width % count or width < _COLUMNS_OF_BLOCK * count):
        count //= 2
    return count


class TestMatrix:
    """A random block-diagonal Ω, ``(d, l)``, whose rows are dealt out to the blocks in runs of 16.

    A product with G blocks takes a G-th of the time of one with a dense matrix. Adjacent coordinates, such as those of
    an attention head, are spread over all blocks. Sketches with dense matrices have the same accuracy
    (docs/posteriors.md).

    Args:
        dimension: Number of rows d.
        width: Number of columns l, at most d.
        seed: Random seed.
        like: A tensor with the dtype and device of the matrix.

    Attributes:
        blocks: ``(G, d/G, l/G)``.
        run: Number of consecutive rows of Ω that belong to one block.
    """

    __test__ = False

    def __init__(self, dimension: int, width: int, *, seed: int, like: Tensor) -> None:
        count = block_count(dimension, width)
        self.run = math.gcd(dimension // count, _RUN)
        generator = torch.Generator().manual_seed(seed)
        shape = (count, dimension // count, width // count)
        self.blocks = torch.randn(shape, generator=generator, dtype=torch.float32).to(like)
        factor = self.blocks.new_zeros(count, 0, shape[2], dtype=torch.float64)
        for chunk in self.blocks.split(ROWS_AT_A_TIME, dim=1):
            factor = torch.linalg.qr(torch.cat([factor, chunk.double()], dim=1), mode="r").R
        for chunk in self.blocks.split(ROWS_AT_A_TIME, dim=1):
            chunk.copy_(torch.linalg.solve_triangular(factor, chunk.double(), upper=True, left=False))

    @property
    def shape(self) -> tuple[int, int]:
        """``(d, l)``."""
        count, rows, columns = self.blocks.shape
        return count * rows, count * columns

    def products(self, rows: Tensor) -> Tensor:
        """Return ``rows Ω``, ``(n, l)``, for ``rows`` ``(n, d)``."""
        count, length, _ = self.blocks.shape
        if count == 1:
            return rows @ self.blocks[0]
        dealt = rows.unflatten(1, (length // self.run, count, self.run)).permute(2, 0, 1, 3)
        return torch.bmm(dealt.reshape(count, len(rows), length), self.blocks).transpose(0, 1).flatten(1)

    def transposed_products(self, image: Tensor, start: int) -> Tensor:
        """Return ``Ωᵀ image``, ``(l, m)``, for the rows of Ω from ``start`` on.

        Args:
            image: ``(n, m)``.
            start: A multiple of ``G * run``, as is ``start + n`` unless it is d.
        """
        blocks = self._part(start, start + len(image), image)
        count, length, _ = blocks.shape
        dealt = image.unflatten(0, (length // self.run, count, self.run)).transpose(0, 1)
        return torch.bmm(blocks.mT, dealt.reshape(count, length, -1)).flatten(0, 1)

    def combinations(self, weights: Tensor, start: int, stop: int) -> Tensor:
        """Return ``Ω weights`` for some rows of Ω, ``(stop - start, m)``, for ``weights`` ``(l, m)``."""
        blocks = self._part(start, stop, weights)
        count = len(blocks)
        dealt = torch.bmm(blocks, weights.unflatten(0, (count, -1))).unflatten(1, (-1, self.run))
        return dealt.transpose(0, 1).flatten(0, 2)

    def _part(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Return the blocks' part in some rows of Ω, ``(G, (stop - start)/G, l/G)``, in the dtype of ``like``."""
        count = len(self.blocks)
        return self.blocks[:, start // count : stop // count].to(like)


class NystromSketch:
    """Sketch ``Y = Σ x xᵀ Ω`` and trace of ``Σ x xᵀ``, for rows x of length d.

    Args:
        dimension: Length d of the rows.
        width: Number of columns l; oversampling (l above the rank) makes the leading eigenpairs more accurate.
        seed: Random seed of Ω.
        like: A tensor with the dtype and device of the sketch.
    """

    def __init__(self, dimension: int, width: int, *, seed: int, like: Tensor) -> None:
        self.test_matrix = TestMatrix(dimension, min(width, dimension), seed=seed, like=like)
        self.image = like.new_zeros(self.test_matrix.shape)
        self.trace = 0.0

    def add(self, rows: Tensor) -> None:
        """Add the outer products of ``rows``, ``(n, d)``."""
        self.image.addmm_(rows.T, self.test_matrix.products(rows))
        for part in rows.split(ROWS_AT_A_TIME, dim=1):  # float32 is accurate enough for sums of this length
            self.trace += float(torch.linalg.vector_norm(part, dim=1).double().square().sum())

    def empty_copy(self) -> NystromSketch:
        """Return an empty sketch with the same Ω, which can be merged into this one."""
        sketch = NystromSketch.__new__(NystromSketch)
        sketch.test_matrix, sketch.image, sketch.trace = self.test_matrix, torch.zeros_like(self.image), 0.0
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
        if not (math.isfinite(self.trace) and bool(torch.isfinite(self.image).all())):
            raise NumericalError("the curvature is not finite; try --dtype float32")
        dimension, width = self.image.shape
        accuracy = torch.finfo(self.image.dtype).eps
        precise = self.image.dtype == torch.float64  # inner products would lose half of the digits
        core, gram = (self.image.new_zeros(width, width, dtype=torch.float64) for _ in range(2))
        factor = core[:0]
        for start, image in self._chunks():
            core += self.test_matrix.transposed_products(image, start)
            if precise:
                factor = torch.linalg.qr(torch.cat([factor, image]), mode="r").R
            else:
                gram += image.T @ image
        norm = float(factor.norm()) if precise else float(gram.trace()) ** 0.5
        if norm == 0.0:
            return gram.new_zeros(0), self.image[:, :0]
        # Rounding errors of Y make the core indefinite; this much is added to M. Tiny numbers have an absolute error.
        tiny = torch.finfo(self.image.dtype).tiny * self.image.numel() ** 0.5
        added = accuracy * max(norm, tiny)
        values, vectors = torch.linalg.eigh((core + core.T) / 2 + added * torch.eye(width).to(core))
        values, vectors = values[values > 0.5 * added], vectors[:, values > 0.5 * added]
        factor = factor @ vectors
        gram = factor.T @ factor if precise else vectors.T @ gram @ vectors

        def half(remainder: float) -> tuple[Tensor, Tensor, Tensor]:
            """``Hᵀ H``, c and root of ``H = (Y V + Ω V c) root``; ``H Hᵀ`` approximates M less the shift."""
            shift = _SHIFT * torch.minimum(values, values.new_tensor(remainder))
            root, c = (values - shift).rsqrt(), added - shift
            inner = gram + torch.diag(c * (2.0 * (values - added) + c))
            return root.unsqueeze(1) * inner * root, c, root

        def remainder_after(remainder: float) -> float:
            eigenvalues = torch.linalg.eigvalsh(half(remainder)[0]).flip(0)[:rank] + _SHIFT * remainder - added
            return max(self.trace - float(eigenvalues.clamp(min=0.0).sum()), 0.0) / max(dimension - rank, 1)

        # The remainder is the fixed point of a nearly linear function.
        first = remainder_after(0.0)
        slope = (remainder_after(first) - first) / first if first else 0.0
        remainder = first / (1.0 - min(slope, 0.5))
        inner, c, root = half(remainder)
        squares, right = (part.flip(-1)[..., :rank] for part in torch.linalg.eigh(inner))
        eigenvalues = (squares + _SHIFT * remainder - added).clamp(min=0.0)
        count = int(((eigenvalues > 10 * accuracy * float(eigenvalues[0])) & (squares > 0.0)).sum())
        # A matrix of low rank has no remainder for the shift to be a part of.
        eigenvalues = eigenvalues[:count] * min(1.0, self.trace / max(float(eigenvalues.sum()), added))
        combination = root.unsqueeze(1) * (right[:, :count] / squares[:count].sqrt())
        of_test, of_image = vectors @ (c.unsqueeze(1) * combination), vectors @ combination
        directions = self.image.new_empty(dimension, count)
        for start, image in self._chunks():
            stop = start + len(image)
            directions[start:stop] = self.test_matrix.combinations(of_test, start, stop) + image @ of_image
        directions = _orthonormalised(directions)
        return eigenvalues[: directions.shape[1]], directions

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield row chunks of Y in float64, with their first row."""
        for start in range(0, len(self.image), ROWS_AT_A_TIME):
            yield start, self.image[start : start + ROWS_AT_A_TIME].double()


def _orthonormalised(directions: Tensor) -> Tensor:
    """Make nearly orthonormal columns ``(d, k)`` orthonormal, in place, each with respect to those before it.

    Rounding errors grow with the ratio of a sketch's eigenvalues, in the directions of the small ones, which are the
    last. Columns that depend on those before them are left out.
    """
    overlap = directions.new_zeros(directions.shape[1], directions.shape[1], dtype=torch.float64)
    for part in directions.split(ROWS_AT_A_TIME):
        overlap += part.mT.double() @ part.double()
    factor, dependent = torch.linalg.cholesky_ex(overlap, upper=True)
    if int(dependent):
        return _orthonormalised(directions[:, : int(dependent) - 1])
    for part in directions.split(ROWS_AT_A_TIME):
        part.copy_(torch.linalg.solve_triangular(factor, part.double(), upper=True, left=False))
    return directions
