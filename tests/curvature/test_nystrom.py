"""Sketches of sums of outer products, against the sums themselves."""

import pytest
import torch

from lapora.curvature import nystrom
from lapora.curvature.nystrom import NystromSketch, TestMatrix, block_count
from lapora.errors import NumericalError

FLOAT64 = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize(
    ("dimension", "width", "blocks", "run"),
    [
        (576, 96, 4, 16),
        (192, 96, 4, 16),
        (1000, 96, 4, 2),
        (100, 48, 2, 2),
        (576, 90, 2, 16),
        (577, 96, 1, 1),
        (64, 24, 1, 16),
        (30, 30, 1, 2),
        (20000, 96, 4, 8),
    ],
)
def test_a_test_matrix_is_block_diagonal_and_orthonormal(monkeypatch, dimension, width, blocks, run):
    monkeypatch.setattr(nystrom, "ROWS_AT_A_TIME", 128)
    matrix = TestMatrix(dimension, width, seed=3, like=FLOAT64)
    assert (len(matrix.blocks), matrix.run, matrix.shape) == (blocks, run, (dimension, width))
    assert blocks == block_count(dimension, width)
    dense = matrix.products(torch.eye(dimension).double())
    torch.testing.assert_close(dense.T @ dense, torch.eye(width).double(), atol=1e-9, rtol=0)
    row, column = torch.arange(dimension), torch.arange(width)
    same = (row // run % blocks).unsqueeze(1) == (column * blocks // width).unsqueeze(0)
    assert torch.equal(dense != 0, same)
    rows = torch.randn(7, dimension, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(matrix.products(rows), rows @ dense)
    middle = 2 * blocks * run
    for start, stop in ((0, middle), (middle, dimension)):
        image, weights = rows.T[start:stop], rows[:, :width].T
        torch.testing.assert_close(matrix.transposed_products(image, start), dense[start:stop].T @ image)
        torch.testing.assert_close(matrix.combinations(weights, start, stop), dense[start:stop] @ weights)


def test_a_test_matrix_depends_on_its_seed_alone():
    first, second = (TestMatrix(192, 96, seed=5, like=FLOAT64) for _ in range(2))
    assert torch.equal(first.blocks, second.blocks)
    assert not torch.equal(first.blocks, TestMatrix(192, 96, seed=6, like=FLOAT64).blocks)


@pytest.mark.parametrize("head", range(3))
def test_directions_within_one_attention_head_are_found(head):
    """All leading eigenvectors are among 64 adjacent coordinates of 192: more than the columns of a block."""
    generator = torch.Generator().manual_seed(head)
    data = 0.03 * torch.randn(2000, 192, generator=generator)
    data[:, 64 * head : 64 * (head + 1)] += torch.randn(2000, 64, generator=generator) * 0.93 ** torch.arange(64)
    total = (data.T @ data).double()
    values, vectors = sketch_of(data, 96).leading(32)
    exact = torch.linalg.eigvalsh(total).flip(0)[:32]
    assert float((values / exact - 1).abs().mean()) < 0.015
    vectors = vectors.double()
    assert float((vectors.T @ total @ vectors).trace()) > 0.999 * float(exact.sum())


def test_sketches_in_chunks_are_those_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(500, 576, generator=generator).double() @ torch.diag(0.97 ** torch.arange(576).double())
    whole = sketch_of(data, 96)
    values, vectors = whole.leading(32)
    monkeypatch.setattr(nystrom, "ROWS_AT_A_TIME", 64)
    chunked = sketch_of(data, 96)
    assert chunked.trace == pytest.approx(whole.trace, rel=1e-12)
    values_of_chunks, vectors_of_chunks = chunked.leading(32)
    torch.testing.assert_close(values_of_chunks, values)
    torch.testing.assert_close(vectors_of_chunks @ vectors_of_chunks.T, vectors @ vectors.T)


def sketch_of(data, width, seed=1):
    sketch = NystromSketch(data.shape[1], width, seed=seed, like=data)
    for part in data.split(7):
        sketch.add(part)
    return sketch


def test_a_sketch_of_enough_width_is_exact():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(40, 30, generator=generator).double() @ torch.diag(0.7 ** torch.arange(30).double())
    sketch = sketch_of(data, 30)
    values, vectors = sketch.leading(30)
    torch.testing.assert_close(vectors * values @ vectors.T, data.T @ data, atol=1e-8, rtol=1e-6)
    assert sketch.trace == pytest.approx(float(data.square().sum()))


@pytest.mark.parametrize("decay", [0.7, 0.9, 0.97])
def test_a_narrow_sketch_has_the_leading_directions(decay):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(400, 100, generator=generator).double() @ torch.diag(decay ** torch.arange(100).double())
    total = data.T @ data
    values, vectors = sketch_of(data, 36).leading(12)
    exact = torch.linalg.eigvalsh(total).flip(0)[:12]
    assert len(values) == 12
    assert float(values.sum()) == pytest.approx(float(exact.sum()), rel=0.06)
    assert float((vectors.T @ total @ vectors).trace()) > 0.97 * float(exact.sum())


def test_subtracting_the_remainder_makes_eigenvalues_less_biased(monkeypatch):
    """Leading directions above a flat remainder, in which plain Nyström loses a part of every eigenvalue."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.cat([torch.linspace(6.0, 2.0, 8), torch.linspace(1.2, 0.8, 192)]).double()
    data = torch.randn(2000, 200, generator=generator).double() * scale
    exact = torch.linalg.eigvalsh(data.T @ data).flip(0)[:8]
    errors = []
    for share in (0.5, 0.0):
        monkeypatch.setattr(nystrom, "_SHIFT", share)
        errors.append(float((sketch_of(data, 24).leading(8)[0] / exact - 1).abs().mean()))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_eigenvalues_of_a_matrix_of_low_rank_never_exceed_its_trace(rank):
    generator = torch.Generator().manual_seed(rank)
    data = torch.randn(rank, 200, generator=generator)
    sketch = sketch_of(data, 12)
    values, _ = sketch.leading(6)
    assert len(values) == min(6, rank)
    assert float(values.sum()) <= sketch.trace * (1 + 1e-6)


def test_a_zero_sketch_has_no_direction():
    sketch = NystromSketch(5, 3, seed=0, like=torch.zeros(()))
    sketch.add(torch.zeros(4, 5))
    assert [len(part) for part in sketch.leading(3)] == [0, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rows_of",
    [
        lambda normal: normal(200, 192) * 0.5 ** torch.arange(192),
        lambda normal: normal(1, 192).expand(1200, 192),
        lambda normal: normal(800, 192) + 1e3 * normal(1, 192),
        lambda normal: normal(800, 192) + 1e5 * normal(1, 192),
        lambda normal: normal(200, 192) * 10.0 ** (-8 * torch.rand(200, 1)),
    ],
    ids=["decaying", "equal rows", "one large direction", "one huge direction", "rows of all sizes"],
)
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e-21])
def test_directions_are_orthonormal(rows_of, scale, dtype):
    """However far apart the eigenvalues are: a saved basis that is not orthonormal is refused when it is loaded."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    rows = scale * rows_of(lambda *shape: torch.randn(*shape, generator=generator).to(dtype)).to(dtype)
    sketch = sketch_of(rows, 96)
    values, directions = sketch.leading(32)
    product = directions.double().T @ directions.double()
    torch.testing.assert_close(product, torch.eye(len(values)).double(), atol=2e-6, rtol=0)
    total = rows.double().T @ rows.double()
    if len(values):
        leading = directions[:, 0].double()
        assert float(leading @ total @ leading) == pytest.approx(float(torch.linalg.eigvalsh(total)[-1]), rel=1e-3)
        assert bool((values > 0).all()) and float(values.sum()) <= sketch.trace * (1 + 1e-6)


@pytest.mark.parametrize("scale", [3e18, 3e19, 3e38])
def test_rows_whose_squares_are_not_finite_are_reported(scale):
    sketch = NystromSketch(97, 24, seed=0, like=torch.zeros(()))
    sketch.add(scale * torch.ones(2, 97))
    with pytest.raises(NumericalError, match="not finite"):
        sketch.leading(8)
