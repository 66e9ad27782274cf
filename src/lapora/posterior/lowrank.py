"""The leading eigenvectors of the curvature over all weights, from a sketch: one pass, no Jacobian kept."""

from __future__ import annotations

from lapora.config import DEFAULT_RANK
from lapora.curvature.collection import DataPass
from lapora.curvature.per_example import JacobianObserver
from lapora.curvature.resuming import ObserverState, sums_from_state, sums_state
from lapora.curvature.sketch import NystromSketch
from lapora.errors import UsageError
from lapora.posterior.curvature_run import CurvatureRun
from lapora.posterior.gaussian import JointPosterior, Posterior
from lapora.posterior.memory import available_memory


class _SketchObserver(JacobianObserver):
    """Sketches ``Σ_ns j_ns j_nsᵀ``."""

    def __init__(self, run: CurvatureRun, rank: int) -> None:
        super().__init__(run.layers, run.classes)
        self.seed = run.seed
        like = run.layers[0].module.weight.new_zeros((), dtype=run.working_dtype)
        self.sketch = NystromSketch(self.parameters, 2 * rank, seed=run.seed, like=like)

    def end(self, rows: int, directions: int) -> None:
        """Add the batch's rows."""
        self.sketch.add(self.jacobian(rows, directions).flatten(0, 1).to(self.sketch.image))

    def state(self) -> ObserverState:
        """The sketch."""
        return sums_state({"rows": self.sketch}, "sketch")

    def restore(self, state: ObserverState) -> None:
        """Go on from what :meth:`state` gave."""
        sketch = sums_from_state(state, "sketch", self.seed)["rows"]
        assert isinstance(sketch, NystromSketch)
        self.sketch = sketch


def fit_lowrank(run: CurvatureRun) -> tuple[Posterior, DataPass]:
    """The R leading eigenvectors of ``Σ_ns j_ns j_nsᵀ`` over all weights at once, by a Nyström sketch in one pass.

    Raises:
        UsageError: The sketch does not fit in memory.
    """
    rank = run.rank or DEFAULT_RANK
    with run.processes.in_step():
        _refuse_what_does_not_fit(run, rank)
    observer = _SketchObserver(run, rank)
    data = run.observe(observer)
    values, vectors = observer.sketch.leading(rank)
    trace = observer.sketch.trace
    kept = min(1.0, float(values.sum()) / trace) if trace else 1.0
    described = [{**parameter, "kept": kept} for parameter in run.describe_parameters()]
    return JointPosterior(described, vectors.T.contiguous(), values, kept), data


def _refuse_what_does_not_fit(run: CurvatureRun, rank: int) -> None:
    needed, available = 5 * rank * run.parameters * run.working_dtype.itemsize, available_memory()
    if needed > available:
        raise UsageError(
            f"--structure lowrank --rank {rank} needs {needed / 2**30:.1f} GiB for {run.parameters:,} parameters, and "
            f"{available / 2**30:.1f} GiB are free; use a smaller --rank, or --structure kron"
        )
