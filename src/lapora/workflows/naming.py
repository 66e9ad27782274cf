"""Errors about a row of a batch, said of the example that the user knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lapora.errors import NonFiniteRowError, NumericalError
from lapora.model.batches import Batch


@contextmanager
def naming_examples(names: Sequence[str]) -> Iterator[None]:
    """Name the example in place of its position.

    Args:
        names: The examples' names, by position.

    Raises:
        NumericalError: The error met, with the example's name.
    """
    try:
        yield
    except NonFiniteRowError as error:
        raise NumericalError(f"{names[error.row]}: {error.reason}") from error


def refuse_infinite(covariance: Tensor, batch: Batch) -> None:
    """Logits may be finite where their gradients are not.

    Raises:
        NonFiniteRowError: A row's covariance holds NaN or infinity.
    """
    finite = torch.isfinite(covariance).flatten(1).all(dim=1)
    if not bool(finite.all()):
        row = batch.rows[int((~finite).nonzero()[0])]
        raise NonFiniteRowError(row, "the covariance of its logits is not finite; try --dtype float32")
