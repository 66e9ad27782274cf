"""KFAC: one Kronecker product per layer, summed over a pass of the data.

For a layer with inputs ``a_nt`` and gradients ``g_nts`` (example n, token t, Fisher column s):

* expand: ``F ≈ 1/(Σ_n T_n) · (Σ_nt a_nt a_ntᵀ) ⊗ (Σ_nts g_nts g_ntsᵀ)``
* reduce: ``F ≈ 1/N · (Σ_n ā_n ā_nᵀ) ⊗ (Σ_ns ĝ_ns ĝ_nsᵀ)``, with ``ā_n = mean_t a_nt``, ``ĝ_ns = Σ_t g_nts``

Source: Eschenhagen et al. 2023, "Kronecker-factored approximate curvature for modern neural network
architectures"; Laplace-LoRA (Yang et al. 2024), section 3. Tokens are counted per layer: a head that reads
one position counts one per example. The two sums are stored unscaled with the count, so that they can be
all-reduced; the scale is applied in one place, :attr:`KronFactors.scale`. Wide sums are stored as Nyström sketches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lapora.config import KRON_RANK, WeightSharing
from lapora.curvature.nystrom import NystromSketch
from lapora.curvature.passes import ObserverState, sums_from_state, sums_state
from lapora.models.batches import Batch
from lapora.models.lora_layers import BayesianLayer

Sum = Tensor | NystromSketch
"""``Σ x xᵀ``, as a full matrix or as a sketch."""


_OVERSAMPLING = 3
"""Columns of a sketch for each eigenvector that is kept."""


def rank_of_side(dimension: int, rank: int | None) -> int:
    """Return the number of leading eigenvectors that a side of a Kronecker product keeps.

    Args:
        dimension: Dimension of the side.
        rank: The requested rank; None is the default.
    """
    return min(dimension, KRON_RANK if rank is None else rank)


def width_of_sum(dimension: int, rank: int | None) -> int:
    """Return the number of columns in which the sum of a side is stored; below ``dimension`` it is a sketch.

    Args:
        dimension: Dimension of the side.
        rank: The requested rank; None is the default.
    """
    return min(dimension, _OVERSAMPLING * rank_of_side(dimension, rank))


@dataclass(frozen=True)
class KronFactors:
    """The unscaled Kronecker factors of one layer, weight ``(o, i)``.

    Attributes:
        input_sum: ``Σ a aᵀ``, ``(i, i)``; layers with the same input share one tensor.
        gradient_sum: ``Σ g gᵀ``, ``(o, o)``.
        count: ``Σ_n T_n`` for expand, N for reduce.
        input_owner: Name of the first layer with the same input, under which the input sum is stored.
    """

    input_sum: Sum
    gradient_sum: Sum
    count: int
    input_owner: str

    @property
    def scale(self) -> float:
        """Factor of the Kronecker product: ``1/Σ_n T_n`` for expand, ``1/N`` for reduce."""
        return 1.0 / self.count if self.count else 0.0


@dataclass(frozen=True, eq=False)
class _BatchSums:
    """The sums of one batch, kept apart so that a batch that runs out of memory can be discarded."""

    inputs: dict[str, Sum] = field(default_factory=dict)
    gradients: dict[str, Sum] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class KronObserver:
    """Accumulates the Kronecker factors of every layer; see :class:`lapora.curvature.backward.Observer`.

    Args:
        weight_sharing: ``expand`` or ``reduce``.
        rank: Number of leading eigenvectors per side; None is the default. Sides much wider than this are sketched.
        seed: Random seed of the sketches.
        offload: Keep the sums in CPU memory, and add each batch's sums there.

    Raises:
        ValueError: ``weight_sharing`` is ``asdl``, which is the scaling of another engine.
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
        self._input_owners: dict[str, str] = {}
        self._batch = _BatchSums()

    def begin(self, batch: Batch) -> None:
        """Discard the sums of an unfinished batch."""
        self._batch = _BatchSums()

    def observe_input(self, layer: BayesianLayer, input_owner: str, inputs: Tensor, mask: Tensor | None) -> None:
        """Add ``Σ a aᵀ``, once per shared input; nothing is saved for the backward pass."""
        if self._input_owners.setdefault(layer.name, input_owner) != input_owner:
            raise AssertionError(f"{layer.name} shares its input in one batch and not in another")
        rows, tokens, _ = inputs.shape
        if self.weight_sharing == "expand":
            self._batch.counts[layer.name] = rows * tokens if mask is None else int(mask.sum())
        else:
            self._batch.counts[layer.name] = rows
        if input_owner != layer.name:
            return
        if self.weight_sharing == "expand":
            features = inputs.flatten(0, 1) if mask is None else inputs[mask]
        else:
            features = inputs.mean(dim=1) if mask is None else _masked_mean(inputs, mask)
        self._add(self._batch.inputs, layer.name, features)
        self._offload_sum(self._batch.inputs, layer.name)

    def observe_gradient(self, layer: BayesianLayer, saved: object, gradient: Tensor) -> None:
        """Add ``Σ g gᵀ`` of one Fisher column."""
        rows = gradient.flatten(0, 1) if self.weight_sharing == "expand" else gradient.sum(dim=1)
        self._add(self._batch.gradients, layer.name, rows)

    def finish(self, layer: BayesianLayer) -> None:
        """Offload the layer's sums, if requested."""
        self._offload_sum(self._batch.gradients, layer.name)

    def end(self, rows: int, directions: int) -> None:
        """Add the sums of the batch to those of the pass."""
        _merge(self._input_sums, self._batch.inputs)
        _merge(self._gradient_sums, self._batch.gradients)
        for name, count in self._batch.counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        self._batch = _BatchSums()

    def _offload_sum(self, sums: dict[str, Sum], name: str) -> None:
        if self.offload:
            total = sums[name]
            sums[name] = total.to_cpu() if isinstance(total, NystromSketch) else total.cpu()

    def _add(self, sums: dict[str, Sum], name: str, rows: Tensor) -> None:
        if name not in sums:
            sums[name] = self._empty(rows)
        total = sums[name]
        if isinstance(total, NystromSketch):
            total.add(rows)
        else:
            total.addmm_(rows.T, rows)

    def _empty(self, rows: Tensor) -> Sum:
        dimension = rows.shape[1]
        width = width_of_sum(dimension, self.rank)
        if dimension == width:
            return rows.new_zeros(dimension, dimension)
        # Sketches of one shape share a test matrix, which is half of their memory.
        key = (dimension, width, rows.device, rows.dtype)
        if key not in self._sketches:
            self._sketches[key] = NystromSketch(dimension, width, seed=self.seed, like=rows)
        return self._sketches[key].empty_copy()

    def state(self) -> ObserverState:
        """Return the sums, the counts and the owner of each layer's input."""
        inputs, gradients = sums_state(self._input_sums, "input"), sums_state(self._gradient_sums, "gradient")
        facts = {**inputs.facts, **gradients.facts, "counts": self._counts, "leaders": self._input_owners}
        return ObserverState({**inputs.tensors, **gradients.tensors}, facts)

    def restore(self, state: ObserverState) -> None:
        """Restore a state returned by :meth:`state`."""
        self._input_sums = sums_from_state(state, "input", self.seed)
        self._gradient_sums = sums_from_state(state, "gradient", self.seed)
        if self.offload:
            for sums in (self._input_sums, self._gradient_sums):
                for name in sums:
                    self._offload_sum(sums, name)
        self._counts = dict(state.facts["counts"])
        self._input_owners = dict(state.facts["leaders"])

    def factors(self, layers: Sequence[BayesianLayer]) -> dict[str, KronFactors]:
        """Return the factors of each layer, in the order of ``layers``.

        A layer that did not run, or on which no logit depends, has zero sums: its posterior is its prior.
        """
        return {layer.name: self._factors_of(layer) for layer in layers}

    def _factors_of(self, layer: BayesianLayer) -> KronFactors:
        rows, columns = layer.shape
        input_owner = self._input_owners.get(layer.name, layer.name)
        like = layer.module.weight.new_zeros(())
        like = like if like.dtype == torch.float64 else like.float()
        like = like.cpu() if self.offload else like
        input_sum = self._input_sums.get(input_owner)
        gradient_sum = self._gradient_sums.get(layer.name)
        return KronFactors(
            input_sum=self._empty(like.new_zeros(1, columns)) if input_sum is None else input_sum,
            gradient_sum=self._empty(like.new_zeros(1, rows)) if gradient_sum is None else gradient_sum,
            count=self._counts.get(layer.name, 0),
            input_owner=input_owner,
        )


def _merge(totals: dict[str, Sum], sums: dict[str, Sum]) -> None:
    for name, batch_sum in sums.items():
        total = totals.get(name)
        if total is None:
            totals[name] = batch_sum
        elif isinstance(total, NystromSketch):
            assert isinstance(batch_sum, NystromSketch)
            total.merge(batch_sum)
        else:
            assert isinstance(batch_sum, Tensor)
            total += batch_sum.to(total.device)


def _masked_mean(inputs: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(inputs).unsqueeze(-1)
    return inputs.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1) / weights.sum(dim=1)
