"""``lapora tune-prior``: the prior precision from the artifact alone; no model, no data, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lapora.config import PriorMethod
from lapora.posterior.artifact import SavedPosterior, posterior_folder
from lapora.posterior.evidence import Evidence


def tune_prior(root: Path, name: str, method: PriorMethod = "marglik") -> dict[str, Any]:
    """Choose δ by marginal likelihood and record it in the manifest.

    Args:
        root: The adapter's folder (or the output folder).
        name: The posterior's name.
        method: ``marglik``, the only one so far.

    Returns:
        The manifest's new ``prior``.

    Raises:
        PosteriorError: No such posterior, or a damaged one.
        NumericalError: Eigenvalues that no curvature has.
    """
    posterior = SavedPosterior(posterior_folder(root, name))
    log_likelihood = posterior.manifest["log_likelihood"]
    norms = [float(parameter["squared_norm"]) for parameter in posterior.manifest["parameters"]]
    best = Evidence(posterior.eigenvalues(), norms, log_likelihood or 0.0).maximise()
    prior = best.describe(log_likelihood is not None)
    posterior.rewrite_manifest({"prior": prior})
    return prior
