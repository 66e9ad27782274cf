"""A model and its rows, ready for the passes that a structure of the curvature is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from lapora.config import FisherType, Progress, WeightSharing
from lapora.curvature.collection import DataPass, collect
from lapora.curvature.linearisation import Directions, Observer
from lapora.model.answers import AnswerModel
from lapora.model.batches import Batch
from lapora.model.bayesian_layers import BayesianLayer
from lapora.posterior.checkpoint import Checkpoint
from lapora.posterior.gaussian import describe_parameter
from lapora.processes import ALONE, Processes


@dataclass(frozen=True)
class CurvatureRun:
    """A model and its rows, ready to be passed over.

    Attributes:
        answers: The network.
        layers: The Bayesian layers.
        batches: Gives the batches, afresh each time.
        targets: Label of each row.
        classes: Number of answers C.
        fisher: Which Fisher.
        weight_sharing: ``expand`` or ``reduce``, for the Kronecker structures.
        rank: Of ``kron`` and ``lowrank``; None is the structure's own default.
        seed: Of whatever is random.
        progress: Told of rows done, from the start again for every pass.
        checkpoint: Keeps the sums on disk as they grow.
        processes: Those that share the rows.
        offload: Keep Kronecker sums in the host's memory.
    """

    answers: AnswerModel
    layers: Sequence[BayesianLayer]
    batches: Callable[[], Iterable[Batch]]
    targets: Sequence[int | None]
    classes: int
    fisher: FisherType = "exact"
    weight_sharing: WeightSharing = "expand"
    rank: int | None = None
    seed: int = 0
    progress: Progress | None = None
    checkpoint: Checkpoint | None = None
    processes: Processes = ALONE
    offload: bool = False

    @property
    def columns(self) -> int:
        """Fisher columns of one example: C-1 exact ones, or a single one."""
        return self.classes - 1 if self.fisher == "exact" else 1

    def observe(self, observer: Observer, directions: Directions | None = None, *, another: bool = False) -> DataPass:
        """One pass; ``another`` says that a further one builds on it."""
        return collect(
            self.answers,
            self.layers,
            observer,
            self.batches(),
            targets=self.targets,
            fisher=directions or self.fisher,
            seed=self.seed,
            progress=self.progress,
            keeper=None if self.checkpoint is None else self.checkpoint.next_pass(keep=another),
            processes=self.processes,
        )

    @property
    def parameters(self) -> int:
        """How many weights can have a gradient."""
        return sum(rows * columns for rows, columns in (layer.gradient_shape(self.classes) for layer in self.layers))

    @property
    def working_dtype(self) -> torch.dtype:
        """Type of sums over rows: float64 where the adapter's weights are, else float32."""
        return torch.float64 if self.layers[0].module.weight.dtype == torch.float64 else torch.float32

    def describe_parameters(self) -> list[dict[str, object]]:
        """The manifest's entries of the layers' weights, in order."""
        return [describe_parameter(layer.name, layer.role, layer.shape, layer.squared_norm) for layer in self.layers]
