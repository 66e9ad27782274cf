"""Per-example gradients of one layer at a time, in a basis of the caller's choice.

``R = U_gᵀ G U_a`` with ``G = Σ_t g_t a_tᵀ``, the gradient of one logit combination in one layer of one
example. Gradients of a layer are handed on as soon as all its directions are there, and dropped.

A basis may be the whole space (square, or the identity) or a subspace (rectangular). For a subspace the part
of G outside it is handed on as well, computed by projecting inputs and gradients rather than as a difference
of squares, which would cancel in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapora.curvature.passes import ObserverState
from lapora.models.batches import Batch
from lapora.models.lora_layers import BayesianLayer


@dataclass(frozen=True, eq=False)
class LayerBasis:
    """Orthonormal columns for both sides of a weight W (o x i); None is the identity.

    Attributes:
        leader: Name of the layer whose input basis this layer shares.
        inputs: ``U_a``, ``(i, i')``, or None.
        gradients: ``U_g``, ``(o', o'')``, or None; ``o' < o`` where only the answers' rows have a gradient.
    """

    leader: str
    inputs: Tensor | None = None
    gradients: Tensor | None = None

    @property
    def truncated(self) -> bool:
        """Whether either side spans a subspace only."""
        return any(side is not None and side.shape[1] < side.shape[0] for side in (self.inputs, self.gradients))


@dataclass(frozen=True, eq=False)
class LayerGradient:
    """One direction's gradient in one layer, for B examples.

    Attributes:
        inside: ``R``, ``(B, o'', i')``.
        outside: Orthogonal pieces of the rest, each ``(B, ., .)``; none where the basis is complete.
    """

    inside: Tensor
    outside: tuple[Tensor, ...] = ()


class PerExampleObserver:
    """Joins the K gradients of each layer and hands them to :meth:`join`; a base class of observers.

    See :class:`lapora.curvature.backward.Observer`.

    Args:
        bases: Basis of each layer, by name, on the model's device.
        directions: K, how many directions a batch will have; decides which rotation is cheaper.
    """

    def __init__(self, bases: Mapping[str, LayerBasis], *, directions: int = 1) -> None:
        self._bases = bases
        self._directions = directions
        self._followers: dict[str, int] = {}
        for basis in bases.values():
            self._followers[basis.leader] = self._followers.get(basis.leader, 0) + 1
        self._inputs: dict[str, Any] = {}
        self._readers: dict[str, set[str]] = {}
        self._gradients: dict[str, list[LayerGradient]] = {}

    def join(self, layer: BayesianLayer, gradients: Sequence[LayerGradient]) -> None:
        """Take in all K gradients of one layer; each kind of observer does something else with them."""
        raise NotImplementedError

    def begin(self, batch: Batch) -> None:
        """Forget the last batch."""
        self._inputs, self._readers = {}, {}
        self._gradients = {}

    def observe_input(self, layer: BayesianLayer, leader: str, inputs: Tensor, mask: Tensor | None) -> Any:
        """Keep the layer's input, rotated at once where that is cheaper; once for layers that share it."""
        basis = self._bases[layer.name]
        shared = basis.leader == leader
        key = leader if shared else layer.name
        if key not in self._inputs:
            self._inputs[key] = self._prepare(basis, inputs, leader if shared else None)
        self._readers.setdefault(key, set()).add(layer.name)
        return self._inputs[key]

    def _prepare(self, basis: LayerBasis, inputs: Tensor, leader: str | None) -> _Inputs:
        rotation = basis.inputs
        if rotation is None:
            return _Inputs(inputs, rotated=True)
        if basis.truncated:
            coordinates = inputs @ rotation
            complete = rotation.shape[1] == rotation.shape[0]
            return _Inputs(coordinates, True, None if complete else inputs - coordinates @ rotation.T)
        # Either the T tokens are rotated once, or every direction's gradient rows of every follower.
        sides = basis.gradients
        rows = None if sides is None else len(sides) * self._directions * self._followers.get(leader or "", 1)
        early = leader is not None and (rows is None or inputs.shape[1] <= rows)
        return _Inputs(inputs @ rotation if early else inputs, rotated=early)

    def observe_gradient(self, layer: BayesianLayer, kept: Any, gradient: Tensor) -> None:
        """Rotate one direction's gradient into the layer's basis."""
        basis = self._bases[layer.name]
        found = _truncated(basis, kept, gradient) if basis.truncated else _complete(basis, kept, gradient)
        self._gradients.setdefault(layer.name, []).append(found)

    def finish(self, layer: BayesianLayer) -> None:
        """Hand on the layer's K gradients, and drop them; and its input, if no other layer has need of it."""
        self.join(layer, self._gradients.pop(layer.name))
        for key in (layer.name, self._bases[layer.name].leader):
            readers = self._readers.get(key, set())
            readers.discard(layer.name)
            if not readers:
                self._inputs.pop(key, None)

    def end(self, rows: int, directions: int) -> None:
        """Nothing is left to do where layers are independent."""


@dataclass(frozen=True, eq=False)
class _Inputs:
    """A layer's input ``(B, T, i')``, whether it is in the basis already, and what lies outside the basis."""

    tokens: Tensor
    rotated: bool
    outside: Tensor | None = None


def _complete(basis: LayerBasis, kept: _Inputs, gradient: Tensor) -> LayerGradient:
    tokens, columns = gradient.shape[1], kept.tokens.shape[2]
    rotation = basis.gradients
    if rotation is None:
        inside = gradient.transpose(1, 2) @ kept.tokens
    elif tokens <= columns:  # fewer tokens than columns: rotate the gradient's tokens
        inside = (gradient @ rotation).transpose(1, 2) @ kept.tokens
    else:  # one product for all examples: a batched product of a matrix with narrow ones is several times slower
        inside = ((kept.tokens.transpose(1, 2) @ gradient) @ rotation).transpose(1, 2)
    return LayerGradient(inside if kept.rotated or basis.inputs is None else inside @ basis.inputs)


def _truncated(basis: LayerBasis, kept: _Inputs, gradient: Tensor) -> LayerGradient:
    rotation = basis.gradients
    coordinates = gradient if rotation is None else gradient @ rotation
    pieces = []
    if kept.outside is not None:
        pieces.append(coordinates.transpose(1, 2) @ kept.outside)
    if rotation is not None and rotation.shape[1] < rotation.shape[0]:
        rest = (gradient - coordinates @ rotation.T).transpose(1, 2)
        pieces.append(rest @ kept.tokens)
        if kept.outside is not None:
            pieces.append(rest @ kept.outside)
    return LayerGradient(coordinates.transpose(1, 2) @ kept.tokens, tuple(pieces))


class SecondMomentObserver(PerExampleObserver):
    """Adds up ``Σ_ns R_ns²`` elementwise: EKFAC's eigenvalues in a Kronecker eigenbasis, diag's in none.

    Source: George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis".
    """

    def __init__(self, bases: Mapping[str, LayerBasis], *, directions: int = 1) -> None:
        super().__init__(bases, directions=directions)
        self._sums: dict[str, Tensor] = {}
        self._batch: dict[str, Tensor] = {}

    def begin(self, batch: Batch) -> None:
        """Forget the last batch, and what it has left if it was not ended."""
        super().begin(batch)
        self._batch = {}

    def join(self, layer: BayesianLayer, gradients: Sequence[LayerGradient]) -> None:
        """The batch's squares, summed over examples in float64."""
        total = sum(gradient.inside.square().sum(dim=0, dtype=torch.float64) for gradient in gradients)
        assert isinstance(total, Tensor)
        self._batch[layer.name] = total

    def end(self, rows: int, directions: int) -> None:
        """Add the batch's sums to the pass's."""
        for name, found in self._batch.items():
            total = self._sums.setdefault(name, found)
            if total is not found:
                total += found.to(total.device)
        self._batch = {}

    def state(self) -> ObserverState:
        """The sums."""
        return ObserverState(dict(self._sums))

    def restore(self, state: ObserverState) -> None:
        """Go on from what :meth:`state` gave."""
        self._sums = dict(state.tensors)

    def second_moments(self, layer: BayesianLayer) -> Tensor | None:
        """``(o'', i')`` in float64, or None for a layer that no logit depends on."""
        return self._sums.get(layer.name)


class JacobianObserver(PerExampleObserver):
    """Keeps a batch's gradients of all layers, for structures that know of correlations between layers.

    Args:
        layers: The layers, in the order of the Jacobian's columns.
        classes: Number of answers: a layer that writes vocabulary logits has a gradient in their rows alone.
    """

    def __init__(self, layers: Sequence[BayesianLayer], classes: int) -> None:
        super().__init__({layer.name: LayerBasis(layer.name) for layer in layers})
        self._places: dict[str, slice] = {}
        start = 0
        for layer in layers:
            rows, columns = layer.gradient_shape(classes)
            self._places[layer.name] = slice(start, start + rows * columns)
            start += rows * columns
        self.parameters = start
        self._jacobian: Tensor | None = None

    def begin(self, batch: Batch) -> None:
        """Forget the last batch."""
        super().begin(batch)
        self._jacobian = None

    def join(self, layer: BayesianLayer, gradients: Sequence[LayerGradient]) -> None:
        """Put them in their columns."""
        if self._jacobian is None:
            first = gradients[0].inside
            self._jacobian = first.new_zeros(len(gradients), len(first), self.parameters)
        for index, gradient in enumerate(gradients):
            self._jacobian[index, :, self._places[layer.name]] = gradient.inside.flatten(1)

    def jacobian(self, rows: int, directions: int) -> Tensor:
        """Gradients of the batch just run: ``(K, B, P)``; a layer that no logit depends on has zeros."""
        if self._jacobian is None:
            return torch.zeros(directions, rows, self.parameters)
        return self._jacobian
