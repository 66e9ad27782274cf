"""Per-example gradients, one layer at a time, in a given basis.

``R = U_gᵀ G U_a`` with ``G = Σ_t g_t a_tᵀ``, the gradient of one linear combination of logits with respect to one
layer's weight, for one example. The K gradients of a layer are passed on together, then freed.

A basis is complete (square, or the identity) or spans a subspace (rectangular). For a subspace, the components of G
outside it are returned too. They are computed by projection, and their inner products from them: a difference of two
norms would cancel in float32.
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
    """Orthonormal bases for both sides of a weight W ``(o, i)``; None is the identity.

    Attributes:
        input_owner: Name of the layer whose input basis this layer shares.
        inputs: ``U_a``, ``(i, i')``, or None.
        gradients: ``U_g``, ``(o', o'')``, or None; ``o' < o`` if only the rows of the answers have a gradient.
    """

    input_owner: str
    inputs: Tensor | None = None
    gradients: Tensor | None = None

    @property
    def truncated(self) -> bool:
        """Whether a side spans only a subspace."""
        return _is_subspace(self.inputs) or _is_subspace(self.gradients)


@dataclass(frozen=True, eq=False)
class LayerGradient:
    """Gradients of one direction with respect to one layer's weight, for B examples, split by the layer's basis.

    With ``P_a = I - U_a U_aᵀ`` and ``P_g = I - U_g U_gᵀ``; a component is None where its projection is zero.

    Attributes:
        inside: ``R = U_gᵀ G U_a``, ``(B, o'', i')``.
        right: ``U_gᵀ G P_a``, ``(B, o'', i)``.
        below: ``P_g G U_a``, ``(B, o', i')``.
        corner: ``P_g G P_a``, ``(B, o', i)``.
    """

    inside: Tensor
    right: Tensor | None = None
    below: Tensor | None = None
    corner: Tensor | None = None

    def products(self, other: LayerGradient) -> Tensor:
        """Return the inner products with another direction's gradients in each eigenspace of the layer's curvature.

        Returns:
            ``(B, o'' + 1, i' + 1)``: elementwise products in the basis; the last row and column are sums over the
            directions outside it. A side whose basis is complete has none.
        """
        found = self.inside * other.inside
        if self.right is not None and other.right is not None:
            found = torch.cat([found, (self.right * other.right).sum(dim=2, keepdim=True)], dim=2)
        if self.below is not None and other.below is not None:
            last = (self.below * other.below).sum(dim=1, keepdim=True)
            if self.corner is not None and other.corner is not None:
                last = torch.cat([last, (self.corner * other.corner).sum(dim=(1, 2)).reshape(-1, 1, 1)], dim=2)
            found = torch.cat([found, last], dim=1)
        return found


class PerExampleObserver:
    """Base class of observers that need the K gradients of each layer together; see :meth:`join`.

    Implements :class:`lapora.curvature.backward.Observer`.

    Args:
        bases: Basis of each layer, by name, on the model's device.
        directions: Number of directions K per batch; decides which order of products is cheaper.
    """

    def __init__(self, bases: Mapping[str, LayerBasis], *, directions: int = 1) -> None:
        self._bases = bases
        self._directions = directions
        self._layers_per_input: dict[str, int] = {}
        for basis in bases.values():
            self._layers_per_input[basis.input_owner] = self._layers_per_input.get(basis.input_owner, 0) + 1
        self._inputs: dict[str, Any] = {}
        self._readers: dict[str, set[str]] = {}
        self._gradients: dict[str, list[LayerGradient]] = {}

    def join(self, layer: BayesianLayer, gradients: Sequence[LayerGradient]) -> None:
        """Process the K gradients of one layer; implemented by subclasses."""
        raise NotImplementedError

    def begin(self, batch: Batch) -> None:
        """Discard the previous batch."""
        self._inputs, self._readers = {}, {}
        self._gradients = {}

    def observe_input(self, layer: BayesianLayer, input_owner: str, inputs: Tensor, mask: Tensor | None) -> Any:
        """Save the layer's input, rotated if that is cheaper; once for all layers that share it."""
        basis = self._bases[layer.name]
        shared = basis.input_owner == input_owner
        key = input_owner if shared else layer.name
        if key not in self._inputs:
            self._inputs[key] = self._prepare(basis, inputs, input_owner if shared else None)
        self._readers.setdefault(key, set()).add(layer.name)
        return self._inputs[key]

    def _prepare(self, basis: LayerBasis, inputs: Tensor, input_owner: str | None) -> _Inputs:
        rotation = basis.inputs
        if rotation is None:
            return _Inputs(inputs, rotated=True)
        if _is_subspace(rotation):
            return _Inputs(inputs, rotated=False)
        # Rotate either the T tokens once, or the gradient rows of every direction of every layer with this input.
        sides = basis.gradients
        sharing = self._layers_per_input.get(input_owner or "", 1)
        rows = None if sides is None else len(sides) * self._directions * sharing
        early = input_owner is not None and (rows is None or inputs.shape[1] <= rows)
        return _Inputs(inputs @ rotation if early else inputs, rotated=early)

    def observe_gradient(self, layer: BayesianLayer, saved: Any, gradient: Tensor) -> None:
        """Rotate one direction's gradient into the layer's basis."""
        basis = self._bases[layer.name]
        rotated = _truncated(basis, saved, gradient) if basis.truncated else _complete(basis, saved, gradient)
        self._gradients.setdefault(layer.name, []).append(rotated)

    def finish(self, layer: BayesianLayer) -> None:
        """Pass the layer's K gradients to :meth:`join`; free them, and the input after its last layer."""
        self.join(layer, self._gradients.pop(layer.name))
        for key in (layer.name, self._bases[layer.name].input_owner):
            readers = self._readers.get(key, set())
            readers.discard(layer.name)
            if not readers:
                self._inputs.pop(key, None)

    def end(self, rows: int, directions: int) -> None:
        """Do nothing: layers are independent."""


@dataclass(frozen=True, eq=False)
class _Inputs:
    """A layer's input ``(B, T, i)``, and whether it is already rotated."""

    tokens: Tensor
    rotated: bool


def _complete(basis: LayerBasis, saved: _Inputs, gradient: Tensor) -> LayerGradient:
    tokens, columns = gradient.shape[1], saved.tokens.shape[2]
    rotation = basis.gradients
    if rotation is None:
        inside = gradient.transpose(1, 2) @ saved.tokens
    elif tokens <= columns:  # fewer tokens than columns: rotate the gradient of each token
        inside = (gradient @ rotation).transpose(1, 2) @ saved.tokens
    else:  # one large product: a batched product with narrow matrices is several times slower
        inside = ((saved.tokens.transpose(1, 2) @ gradient) @ rotation).transpose(1, 2)
    return LayerGradient(inside if saved.rotated or basis.inputs is None else inside @ basis.inputs)


def _truncated(basis: LayerBasis, saved: _Inputs, gradient: Tensor) -> LayerGradient:
    tokens, columns, rows = saved.tokens, None if saved.rotated else basis.inputs, basis.gradients
    if columns is not None and not _is_subspace(columns):
        tokens, columns = tokens @ columns, None
    if rows is None or not _is_subspace(rows):
        rotated = gradient if rows is None else gradient @ rows
        return LayerGradient(*_split(rotated.transpose(1, 2) @ tokens, columns))
    upper, lower = _split(tokens.transpose(1, 2) @ gradient, rows)
    assert lower is not None
    return LayerGradient(*_split(upper.transpose(1, 2), columns), *_split(lower.transpose(1, 2), columns))


def _split(values: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return ``X U`` and ``X - X U Uᵀ`` for X ``(B, ., d)``; without a basis, X and None."""
    if basis is None:
        return values, None
    coordinates = values @ basis
    return coordinates, values - coordinates @ basis.T


def _is_subspace(basis: Tensor | None) -> bool:
    return basis is not None and basis.shape[1] < basis.shape[0]


class SecondMomentObserver(PerExampleObserver):
    """Accumulates ``Σ_ns R_ns²`` in each eigenspace: EKFAC's eigenvalues, or with identity bases the diagonal.

    Args:
        bases: Basis of each layer, by name.
        directions: Number of Fisher columns per example.

    Source: George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis".
    """

    def __init__(self, bases: Mapping[str, LayerBasis], *, directions: int = 1) -> None:
        super().__init__(bases, directions=directions)
        self._sums: dict[str, Tensor] = {}
        self._batch: dict[str, Tensor] = {}

    def begin(self, batch: Batch) -> None:
        """Discard the previous batch, and the sums of an unfinished one."""
        super().begin(batch)
        self._batch = {}

    def join(self, layer: BayesianLayer, gradients: Sequence[LayerGradient]) -> None:
        """Sum the batch's squared gradients over examples and directions, in float64."""
        total = sum(gradient.products(gradient).sum(dim=0, dtype=torch.float64) for gradient in gradients)
        assert isinstance(total, Tensor)
        self._batch[layer.name] = total

    def end(self, rows: int, directions: int) -> None:
        """Add the sums of the batch to those of the pass."""
        for name, batch_sum in self._batch.items():
            total = self._sums.setdefault(name, batch_sum)
            if total is not batch_sum:
                total += batch_sum.to(total.device)
        self._batch = {}

    def state(self) -> ObserverState:
        """Return the sums."""
        return ObserverState(dict(self._sums))

    def restore(self, state: ObserverState) -> None:
        """Restore a state returned by :meth:`state`."""
        self._sums = dict(state.tensors)

    def second_moments(self, layer: BayesianLayer) -> Tensor | None:
        """Return ``Σ_ns R_ns²`` in each eigenspace, in float64, or None if no logit depends on the layer.

        Its shape is that of :meth:`LayerGradient.products` without the examples.
        """
        return self._sums.get(layer.name)


class JacobianObserver(PerExampleObserver):
    """Collects a batch's gradients of all layers into a Jacobian, for structures with cross-layer terms.

    Args:
        layers: The layers, in the order of the Jacobian's columns.
        classes: Number of answers C; a layer that outputs vocabulary logits has a gradient only in their C rows.
    """

    def __init__(self, layers: Sequence[BayesianLayer], classes: int) -> None:
        super().__init__({layer.name: LayerBasis(layer.name) for layer in layers})
        self._columns: dict[str, slice] = {}
        start = 0
        for layer in layers:
            rows, columns = layer.gradient_shape(classes)
            self._columns[layer.name] = slice(start, start + rows * columns)
            start += rows * columns
        self.parameters = start
        self._jacobian: Tensor | None = None

    def begin(self, batch: Batch) -> None:
        """Discard the previous batch."""
        super().begin(batch)
        self._jacobian = None

    def join(self, layer: BayesianLayer, gradients: Sequence[LayerGradient]) -> None:
        """Copy the layer's gradients into its columns of the Jacobian."""
        if self._jacobian is None:
            first = gradients[0].inside
            self._jacobian = first.new_zeros(len(gradients), len(first), self.parameters)
        for index, gradient in enumerate(gradients):
            self._jacobian[index, :, self._columns[layer.name]] = gradient.inside.flatten(1)

    def jacobian(self, rows: int, directions: int) -> Tensor:
        """Return the Jacobian of the last batch, ``(K, B, P)``; a layer without influence on the logits has zeros."""
        if self._jacobian is None:
            return torch.zeros(directions, rows, self.parameters)
        return self._jacobian
