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
"""Name of the only group of a scalar prior."""


@dataclass(frozen=True)
class PriorPrecision:
    """Prior precisions δ of groups of layers.

    Attributes:
        structure: ``scalar`` (one group), ``kind`` (every ``lora_A``, every ``lora_B``, the head) or ``layer`` (each
            matrix).
        precisions: δ by group.
    """

    structure: PriorStructure
    precisions: dict[str, float]

    @classmethod
    def from_manifest(cls, prior: Mapping[str, Any]) -> PriorPrecision:
        """Read the manifest's ``prior``.

        Raises:
            KeyError, TypeError, ValueError: It is not valid; the message says why.
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
        """Return ``structure`` and ``precision``: a number for a scalar prior, else a number per group."""
        scalar = self.structure == "scalar"
        return {"structure": self.structure, "precision": self.precisions[ALL] if scalar else self.precisions}

    def per_layer(self, parameters: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """Return δ of each layer, in the manifest's order.

        Raises:
            KeyError: A layer's group has no precision.
        """
        return np.array([self.precisions[group_of(parameter, self.structure)] for parameter in parameters])

    def scaled(self, factor: float) -> PriorPrecision:
        """Return the prior with every δ multiplied by one factor."""
        return PriorPrecision(self.structure, {group: value * factor for group, value in self.precisions.items()})

    @property
    def mean(self) -> float:
        """Geometric mean of the groups' δ."""
        return math.exp(sum(math.log(value) for value in self.precisions.values()) / len(self.precisions))

    def on_grid(self, means: Sequence[float] | NDArray[np.float64]) -> list[PriorPrecision]:
        """Return this prior scaled to other geometric means; infinity is MAP."""
        return [self.scaled(float(mean) / self.mean) for mean in means]

    def describe(self) -> str:
        """Return δ in words: the number, or the range."""
        values = self.precisions.values()
        if self.structure == "scalar":
            return f"{self.precisions[ALL]:.4g}"
        if self.structure == "kind":
            return ", ".join(f"{group} {value:.4g}" for group, value in self.precisions.items())
        return f"{min(values):.4g} to {max(values):.4g} over {len(self.precisions)} layers"


def group_of(parameter: Mapping[str, Any], structure: PriorStructure) -> str:
    """Return the group of a layer of the manifest."""
    if structure == "scalar":
        return ALL
    return str(parameter["role"] if structure == "kind" else parameter["name"])
