"""Block structures, one block for each layer: KFAC, its eigenbasis with exact second moments (EKFAC), diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lapora.curvature.collection import DataPass
from lapora.curvature.kron import KronObserver
from lapora.curvature.per_example import LayerBasis, SecondMomentObserver
from lapora.errors import NumericalError
from lapora.posterior.curvature_run import CurvatureRun
from lapora.posterior.decomposition import decompose
from lapora.posterior.gaussian import BlockPosterior, EigenBlock, Posterior


def fit_kron(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """KFAC: ``A ⊗ G`` of each layer, in its eigenbasis; one pass."""
    observer = KronObserver(run.weight_sharing, run.rank, run.seed, offload=run.offload)
    data = run.observe(observer)
    return BlockPosterior(decompose(run.layers, observer.factors(run.layers), run.rank, run.processes)), data


def fit_ekfac(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """KFAC's eigenbasis, then exact second moments in it: a second pass."""
    observer = KronObserver(run.weight_sharing, offload=run.offload)
    run.observe(observer, another=True)
    posterior = BlockPosterior(decompose(run.layers, observer.factors(run.layers), processes=run.processes))
    rotated = posterior.beside(run.layers, run.answers.device, run.working_dtype)
    bases = {block.name: block.basis for block in rotated.blocks}
    return _second_moments(run, posterior.blocks, SecondMomentObserver(bases, directions=run.columns))


def fit_diag(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """The curvature's diagonal: a sum of squared gradients for each weight."""
    blocks = [
        EigenBlock(
            name=layer.name,
            role=layer.role,
            shape=layer.shape,
            leader=layer.name,
            input_basis=None,
            gradient_basis=None,
            eigenvalues=torch.zeros(layer.gradient_shape(run.classes), dtype=torch.float64),
            squared_norm=layer.squared_norm,
        )
        for layer in run.layers
    ]
    bases = {layer.name: LayerBasis(layer.name) for layer in run.layers}
    return _second_moments(run, blocks, SecondMomentObserver(bases, directions=run.columns))


def _second_moments(
    run: CurvatureRun, blocks: Sequence[EigenBlock], observer: SecondMomentObserver
) -> tuple[Posterior, DataPass]:
    data = run.observe(observer)
    found = []
    for layer, block in zip(run.layers, blocks, strict=True):
        moments = observer.second_moments(layer)
        if moments is None:
            moments = torch.zeros_like(block.eigenvalues)
        if not bool(torch.isfinite(moments).all()):
            raise NumericalError(f"{layer.name}: the curvature is not finite; try --dtype float32")
        found.append(replace(block, eigenvalues=moments))
    return BlockPosterior(found), data
