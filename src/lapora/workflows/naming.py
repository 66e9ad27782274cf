"""Errors about a row of a batch, said of the example that the user knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lapora.errors import NonFiniteRowError, NumericalError


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
