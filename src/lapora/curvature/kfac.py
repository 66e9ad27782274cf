"""KFAC: one Kronecker product per layer, summed over a pass of the data.

For a layer with inputs ``a_nt`` and gradients ``g_nts`` (example n, token t, Fisher column s):

* expand: ``F ≈ 1/(Σ_n T_n) · (Σ_nt a_nt a_ntᵀ) ⊗ (Σ_nts g_nts g_ntsᵀ)``
* reduce: ``F ≈ 1/N · (Σ_n ā_n ā_nᵀ) ⊗ (Σ_ns ĝ_ns ĝ_nsᵀ)``, with ``ā_n = mean_t a_nt``, ``ĝ_ns = Σ_t g_nts``

Source: Eschenhagen et al. 2023, "Kronecker-factored approximate curvature for modern neural network
architectures"; Laplace-LoRA (Yang et al. 2024), section 3. Tokens are counted per layer: a head that reads
one position counts one per example. What is kept is the two sums and the count, so that sums of several
processes add up and the scaling is applied in one place, :attr:`KronFactors.scale`. Wide sums may be kept as
streaming sketches of low rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lapora.config import WHOLE_WIDTH, WIDE_RANK, WeightSharing
from lapora.curvature.nystrom import NystromSketch
from lapora.curvature.passes import ObserverState, sums_from_state, sums_state
from lapora.models.batches import Batch
from lapora.models.lora_layers import BayesianLayer

Sum = Tensor | NystromSketch
"""``Σ x xᵀ``, whole or sketched."""


def rank_of_side(dimension: int, other: int, rank: int | None) -> int:
    """How many leading eigenvectors of a side of a Kronecker block are kept: all of the smaller side, if not wide.

    Args:
        dimension: Of this side.
        other: Of the other side.
        rank: What was asked for; None keeps sides up to ``WHOLE_WIDTH`` whole.
    """
    if dimension <= WHOLE_WIDTH and (rank is None or dimension < other):
        return dimension
    return min(WIDE_RANK if rank is None else rank, dimension)


@dataclass(frozen=True)
class KronFactors:
    """The two sums of one layer.

    Attributes:
        input_sum: ``Σ a aᵀ``, ``(i, i)``; layers that share one input share this very tensor.
        gradient_sum: ``Σ g gᵀ``, ``(o, o)``.
        count: ``Σ_n T_n`` for expand, N for reduce.
        leader: Name of the layer under which the input sum was taken.
    """

    input_sum: Sum
    gradient_sum: Sum
    count: int
    leader: str

    @property
    def scale(self) -> float:
        """What the Kronecker product of the two sums is multiplied by."""
        return 1.0 / self.count if self.count else 0.0


@dataclass(frozen=True, eq=False)
class _BatchSums:
    """The sums of one batch: a batch that runs out of memory half way must leave nothing behind."""

    inputs: dict[str, Sum] = field(default_factory=dict)
    gradients: dict[str, Sum] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class KronObserver:
    """Accumulates the two sums of every layer; see :class:`lapora.curvature.backward.Observer`.

    Args:
        weight_sharing: ``expand`` or ``reduce``.
        rank: Sides wider than twice this are sketched; None sketches only sides wider than ``WHOLE_WIDTH``.
        seed: Of the sketches.
        offload: Keep the sums in the host's memory, where each batch's are added as soon as they are complete.
    """

    def __init__(
        self, weight_sharing: WeightSharing, rank: int | None = None, seed: int = 0, *, offload: bool = False
    ) -> None:
        if weight_sharing == "asdl":
            raise ValueError("asdl is another engine's scaling; see lapora.laplace_torch")
        self.weight_sharing = weight_sharing
        self.rank = rank
        self.seed = seed
        self.offload = offload
        self._sketches: dict[tuple[object, ...], NystromSketch] = {}
        self._input_sums: dict[str, Sum] = {}
        self._gradient_sums: dict[str, Sum] = {}
        self._counts: dict[str, int] = {}
        self._leaders: dict[str, str] = {}
        self._batch = _BatchSums()

    def begin(self, batch: Batch) -> None:
        """Forget what a batch that was not ended has left."""
        self._batch = _BatchSums()

    def observe_input(self, layer: BayesianLayer, leader: str, inputs: Tensor, mask: Tensor | None) -> None:
        """Add ``Σ a aᵀ``, once per shared input; nothing needs to be kept for the backward pass."""
        if self._leaders.setdefault(layer.name, leader) != leader:
            raise AssertionError(f"{layer.name} shares its input in one batch and not in another")
        rows, tokens, _ = inputs.shape
        if self.weight_sharing == "expand":
            self._batch.counts[layer.name] = rows * tokens if mask is None else int(mask.sum())
        else:
            self._batch.counts[layer.name] = rows
        if leader != layer.name:
            return
        if self.weight_sharing == "expand":
            features = inputs.flatten(0, 1) if mask is None else inputs[mask]
        else:
            features = inputs.mean(dim=1) if mask is None else _masked_mean(inputs, mask)
        self._add(self._batch.inputs, layer.name, features, layer.shape[0])
        self._put_aside(self._batch.inputs, layer.name)

    def observe_gradient(self, layer: BayesianLayer, kept: object, gradient: Tensor) -> None:
        """Add ``Σ g gᵀ`` of one Fisher column."""
        rows = gradient.flatten(0, 1) if self.weight_sharing == "expand" else gradient.sum(dim=1)
        self._add(self._batch.gradients, layer.name, rows, layer.shape[1])

    def finish(self, layer: BayesianLayer) -> None:
        """Sums need no closing, but may have to leave the device."""
        self._put_aside(self._batch.gradients, layer.name)

    def end(self, rows: int, directions: int) -> None:
        """Add the batch's sums to the pass's."""
        _merge(self._input_sums, self._batch.inputs)
        _merge(self._gradient_sums, self._batch.gradients)
        for name, count in self._batch.counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        self._batch = _BatchSums()

    def _put_aside(self, sums: dict[str, Sum], name: str) -> None:
        if self.offload:
            found = sums[name]
            sums[name] = found.on_host() if isinstance(found, NystromSketch) else found.cpu()

    def _add(self, sums: dict[str, Sum], name: str, rows: Tensor, other: int) -> None:
        if name not in sums:
            sums[name] = self._empty(rows, other)
        found = sums[name]
        if isinstance(found, NystromSketch):
            found.add(rows)
        else:
            found.addmm_(rows.T, rows)

    def _empty(self, rows: Tensor, other: int) -> Sum:
        dimension = rows.shape[1]
        width = 2 * rank_of_side(dimension, other, self.rank)
        if dimension <= width:
            return rows.new_zeros(dimension, dimension)
        # Sketches of one shape have one test matrix: it is half of their memory.
        key = (dimension, width, rows.device, rows.dtype)
        if key not in self._sketches:
            self._sketches[key] = NystromSketch(dimension, width, seed=self.seed, like=rows)
        return self._sketches[key].another()

    def state(self) -> ObserverState:
        """All sums, counts and who shares whose input."""
        inputs, gradients = sums_state(self._input_sums, "input"), sums_state(self._gradient_sums, "gradient")
        facts = {**inputs.facts, **gradients.facts, "counts": self._counts, "leaders": self._leaders}
        return ObserverState({**inputs.tensors, **gradients.tensors}, facts)

    def restore(self, state: ObserverState) -> None:
        """Go on from what :meth:`state` gave."""
        self._input_sums = sums_from_state(state, "input", self.seed)
        self._gradient_sums = sums_from_state(state, "gradient", self.seed)
        if self.offload:
            for sums in (self._input_sums, self._gradient_sums):
                for name in sums:
                    self._put_aside(sums, name)
        self._counts = dict(state.facts["counts"])
        self._leaders = dict(state.facts["leaders"])

    def factors(self, layers: Sequence[BayesianLayer]) -> dict[str, KronFactors]:
        """The sums of each layer, in the layers' order.

        A layer that the model never ran, or that no logit depends on, has sums of zero: its posterior is
        its prior.
        """
        return {layer.name: self._factors_of(layer) for layer in layers}

    def _factors_of(self, layer: BayesianLayer) -> KronFactors:
        rows, columns = layer.shape
        leader = self._leaders.get(layer.name, layer.name)
        like = layer.module.weight.new_zeros(())
        like = like if like.dtype == torch.float64 else like.float()
        like = like.cpu() if self.offload else like
        input_sum = self._input_sums.get(leader)
        gradient_sum = self._gradient_sums.get(layer.name)
        return KronFactors(
            input_sum=like.new_zeros(columns, columns) if input_sum is None else input_sum,
            gradient_sum=like.new_zeros(rows, rows) if gradient_sum is None else gradient_sum,
            count=self._counts.get(layer.name, 0),
            leader=leader,
        )


def _merge(totals: dict[str, Sum], sums: dict[str, Sum]) -> None:
    for name, found in sums.items():
        total = totals.get(name)
        if total is None:
            totals[name] = found
        elif isinstance(total, NystromSketch):
            assert isinstance(found, NystromSketch)
            total.merge(found)
        else:
            assert isinstance(found, Tensor)
            total += found.to(total.device)


def _masked_mean(inputs: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(inputs).unsqueeze(-1)
    return inputs.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1) / weights.sum(dim=1)
