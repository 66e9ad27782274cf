"""Labels that are not one answer: numbers of a regression, sets of labels, and pairs of texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lapora.errors import DataError, listed, quoted

FIRST, SECOND = "first", "second"
"""The answers of a preference: which text is better."""

CHOSEN, REJECTED, PROMPT = "chosen", "rejected", "prompt"
"""Fields of a preference, as TRL names them."""

Target = int | tuple[float, ...]
"""Index of the right answer; the number of each output; or 1 for each label that is there, else 0."""

_NO_LABEL = (None, "")


def numbers_of(value: Any, outputs: Sequence[str], where: str) -> tuple[float, ...] | None:
    """Return the target of a regression, one number for each output, or None without one.

    Args:
        value: A number or its text; for several outputs a list of them, or a mapping by name.
        outputs: Names of the outputs.
        where: Name of the row in error messages.

    Raises:
        DataError: A value is not a finite number, or there are more or fewer than outputs.
    """
    if value in _NO_LABEL:
        return None
    if isinstance(value, Mapping):
        value = [value.get(name) for name in outputs]
    values = list(value) if isinstance(value, list | tuple) else [value]
    if len(values) != len(outputs):
        raise DataError(
            f"{where}: {len(values)} targets, not {len(outputs)} ({listed(list(outputs))}); name the outputs in "
            "doc_to_choice, and give one number for each"
        )
    return tuple(_number(each, where) for each in values)


def _number(value: Any, where: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        number = None
    if number is None:
        raise DataError(f"{where}: target {quoted(value)} is not a number; fix the row, or the task's doc_to_target")
    if not math.isfinite(number):
        raise DataError(f"{where}: target {quoted(value)} is not finite; remove the row, or leave the field empty")
    return number


def labels_of(value: Any, names: tuple[str, ...], where: str) -> tuple[float, ...] | None:
    """Return 1 for each label that a row has, else 0; None without a label.

    Args:
        value: A list of K values 0 or 1; a list of names; a list of indices from 0, not K long; or a mapping of names
            to 0 or 1.
        names: The K labels.
        where: Name of the row in error messages.

    Raises:
        DataError: It is none of these.
    """
    if value in _NO_LABEL:
        return None
    if isinstance(value, Mapping):
        unknown = [str(name) for name in value if name not in names]
        if unknown:
            raise _unknown(unknown[0], names, where)
        value = [value.get(name, 0) for name in names]
    if not isinstance(value, list | tuple):
        raise DataError(
            f"{where}: labels {quoted(value)} are not a list; doc_to_target must return a list of {len(names)} values "
            f"0 or 1, or a list of names{'; a text such as [0, 1] becomes one by `| literal`' * isinstance(value, str)}"
        )
    if all(isinstance(each, str) for each in value):
        for each in value:
            if each not in names:
                raise _unknown(each, names, where)
        return tuple(float(name in value) for name in names)
    if len(value) == len(names):
        for each in value:
            if each not in (0, 1):
                raise DataError(f"{where}: label value {quoted(each)} is not 0 or 1; fix the row, or doc_to_target")
        return tuple(float(each) for each in value)
    for each in value:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < len(names):
            raise _unknown(each, names, where)
    return tuple(float(index in value) for index in range(len(names)))


def _unknown(label: object, names: tuple[str, ...], where: str) -> DataError:
    return DataError(f"{where}: unknown label {quoted(label)}; the {len(names)} labels are {listed(list(names))}")
