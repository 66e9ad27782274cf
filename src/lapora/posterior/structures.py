"""The structures of the curvature by name; each is a function in a module of its own kind."""

from __future__ import annotations

from collections.abc import Callable

from lapora.config import Structure
from lapora.curvature.collection import DataPass
from lapora.posterior.blocks import fit_diag, fit_ekfac, fit_kron
from lapora.posterior.curvature_run import CurvatureRun
from lapora.posterior.full import fit_full
from lapora.posterior.gaussian import Posterior
from lapora.posterior.lowrank import fit_lowrank

_STRUCTURES: dict[Structure, Callable[[CurvatureRun], tuple[Posterior, DataPass]]] = {
    "kron": fit_kron,
    "ekfac": fit_ekfac,
    "diag": fit_diag,
    "lowrank": fit_lowrank,
    "full": fit_full,
}


def fit_structure(structure: Structure, run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """Compute the curvature and put it into its eigenbasis.

    Raises:
        UsageError: The structure does not fit in memory; the message says what does.
        NumericalError: The curvature is not finite, or not positive semi-definite.
    """
    return _STRUCTURES[structure](run)
