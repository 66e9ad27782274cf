"""The prior: an isotropic Gaussian with one precision for all weights, one per kind, or one per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapora.config import PriorStructure

ALL = "all"
"""The one group of a scalar prior."""


@dataclass(frozen=True)
class PriorPrecision:
    """δ of every group of layers that share one.

    Attributes:
        structure: ``scalar``, ``kind`` (one for every ``lora_A``, one for every ``lora_B``, one for a head) or
            ``layer`` (one for each matrix).
        precisions: δ by group.
    """

    structure: PriorStructure
    precisions: dict[str, float]

    @classmethod
    def from_manifest(cls, prior: Mapping[str, Any]) -> PriorPrecision:
        """Read the manifest's ``prior``.

        Raises:
            KeyError, TypeError, ValueError: It is not one; the message says why.
        """
        structure = prior["structure"]
        if structure not in ("scalar", "kind", "layer"):
            raise ValueError(f"structure is {structure!r}")
        found = prior["precision"]
        precisions = {ALL: found} if structure == "scalar" else dict(found)
        for group, value in precisions.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"precision of {group} is {value!r}, not a positive number")
        return cls(structure, {group: float(value) for group, value in precisions.items()})

    def to_manifest(self) -> dict[str, Any]:
        """``structure`` and ``precision``: a number for a scalar prior, else a number for each group."""
        scalar = self.structure == "scalar"
        return {"structure": self.structure, "precision": self.precisions[ALL] if scalar else self.precisions}

    def per_layer(self, parameters: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """δ of each layer, in the manifest's order.

        Raises:
            KeyError: A layer's group has no precision.
        """
        return np.array([self.precisions[group_of(parameter, self.structure)] for parameter in parameters])

    def scaled(self, factor: float) -> PriorPrecision:
        """Every δ times one factor: their ratios stay."""
        return PriorPrecision(self.structure, {group: value * factor for group, value in self.precisions.items()})

    @property
    def mean(self) -> float:
        """Geometric mean of the groups' δ."""
        return math.exp(sum(math.log(value) for value in self.precisions.values()) / len(self.precisions))

    def on_grid(self, means: Sequence[float] | NDArray[np.float64]) -> list[PriorPrecision]:
        """Return this prior scaled to other geometric means; infinity is MAP."""
        return [self.scaled(float(mean) / self.mean) for mean in means]

    def describe(self) -> str:
        """For a person: the number, or the range."""
        values = self.precisions.values()
        if self.structure == "scalar":
            return f"{self.precisions[ALL]:.4g}"
        if self.structure == "kind":
            return ", ".join(f"{group} {value:.4g}" for group, value in self.precisions.items())
        return f"{min(values):.4g} to {max(values):.4g} over {len(self.precisions)} layers"


def group_of(parameter: Mapping[str, Any], structure: PriorStructure) -> str:
    """Which group a layer of the manifest belongs to."""
    if structure == "scalar":
        return ALL
    return str(parameter["role"] if structure == "kind" else parameter["name"])
