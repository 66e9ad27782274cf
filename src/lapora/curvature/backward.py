"""One forward pass and K backward passes, seen layer by layer.

This is the engine under both ``fit`` and ``predict``. For K directions ``v_k`` in logit space it hands an
observer, for every Bayesian layer, the layer's input ``a_t`` and the gradient ``g_t`` of ``v_kᵀ f`` with
respect to the layer's output, and forgets both as soon as the observer has seen them.

The backward pass is cut at the transformer blocks. Each block is crossed by all K directions before the
next is begun, so that an observer can join the K gradients of one layer (as a logit covariance must) and
drop them, without the model being run K times and without gradients of all layers standing in memory.
No weight gradients are computed, and the pass ends at the lowest Bayesian layer.

With ``rerun_blocks`` set on the answer model, blocks keep their inputs alone and are run again by the backward pass;
their layers are then shown during that second run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lapora.curvature.checkpointing import ForwardOverride, RecomputedBlock, blocks_of
from lapora.errors import AdapterError
from lapora.models.batches import Batch
from lapora.models.lora_layers import BayesianLayer
from lapora.models.outputs import OutputModel

Directions = Callable[[Tensor], Tensor]
"""From logits ``(B, C)`` to directions ``(K, B, C)``; K = 0 asks for the forward pass alone."""


class Observer(Protocol):
    """Sees a layer's inputs and output gradients, one layer at a time.

    For every batch of B rows, T tokens and K directions: ``begin``; ``see_input`` once per layer, before its gradients;
    for one layer after another, ``see_gradient`` K times and ``finish`` once; ``end``. A batch that runs out of
    memory is begun again, smaller, and was never ended: what it has left must be forgotten in ``begin``.
    """

    def begin(self, batch: Batch) -> None:
        """A new batch starts."""

    def observe_input(self, layer: BayesianLayer, leader: str, inputs: Tensor, mask: Tensor | None) -> Any:
        """The layer's input.

        Args:
            layer: The layer.
            leader: Name of the first layer that has this very input (q, k and v projections share one).
            inputs: ``(B, T, in_features)``, in float32 at least.
            mask: ``(B, T)``, true at real tokens, or None when all are real.

        Returns:
            What ``see_gradient`` is to be handed, or None when the gradient alone is enough.
        """

    def observe_gradient(self, layer: BayesianLayer, kept: Any, gradient: Tensor) -> None:
        """The gradient of one direction.

        Args:
            layer: The layer.
            kept: What ``see_input`` returned.
            gradient: ``(B, T, out_features)``, in float32 at least, zero at padding.
        """

    def finish(self, layer: BayesianLayer) -> None:
        """All K directions of this layer have been seen."""

    def end(self, rows: int, directions: int) -> None:
        """The batch of ``rows`` examples is done, all layers and directions."""


@dataclass
class _Boundary:
    """Where the backward pass is cut: a block's output, and the leaf that the next block reads.

    A block that is to be run again has no output yet.
    """

    output: Tensor | RecomputedBlock
    leaf: Tensor
    upstream: list[Tensor] = field(default_factory=list)


class Linearisation:
    """Hooks on a model's Bayesian layers; a context manager.

    Args:
        answer_model: The network.
        layers: The Bayesian layers to be seen.
        observer: Who sees them.
    """

    def __init__(self, answer_model: OutputModel, layers: Sequence[BayesianLayer], observer: Observer) -> None:
        self.answer_model = answer_model
        self.layers = list(layers)
        self.observer = observer
        self.forward_calls = 0
        self.backward_calls = 0
        self._handles: list[RemovableHandle | ForwardOverride] = []
        self._batch: Batch | None = None
        self._boundaries: list[_Boundary] = []
        self._leaves: list[Tensor] = []
        self._last_source: tuple[Tensor, str] | None = None
        self._leader: dict[str, str] = {}
        self._touched: dict[str, BayesianLayer] = {}
        self._seen: set[str] = set()
        self._called: set[str] = set()
        self._blind = False

    def __enter__(self) -> Linearisation:
        for layer in self.layers:
            if layer.source is not layer.module:
                self._handles.append(layer.source.register_forward_pre_hook(self._source_hook(layer)))
            self._handles.append(layer.module.register_forward_hook(self._layer_hook(layer)))
        for block in blocks_of(self.answer_model.network, self.layers):
            if self.answer_model.recompute_blocks:
                self._handles.append(ForwardOverride(block, self._run_without_graph))
            else:
                self._handles.append(block.register_forward_hook(self._cut))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._evict()

    def run(self, batch: Batch, directions: Directions) -> Tensor:
        """Run one batch.

        Args:
            batch: The rows.
            directions: Which combinations of logits to differentiate.

        Returns:
            The logits at the MAP, ``(B, C)``, detached.
        """
        self._evict()
        self._batch = batch
        self.observer.begin(batch)
        try:
            with torch.enable_grad():
                logits = self.answer_model.logits(batch)
            self.forward_calls += 1
            along = directions(logits.detach()).to(logits.dtype)
            if len(along) and logits.requires_grad:
                self._backward(logits, along)
            self.observer.end(len(batch), len(along))
            return logits.detach()
        finally:
            self._evict()

    def _backward(self, logits: Tensor, along: Tensor) -> None:
        self.backward_calls += len(along)
        self._cross(logits, list(along))
        while self._boundaries:
            boundary = self._boundaries.pop()
            if boundary.upstream:
                source = boundary.output
                if isinstance(source, RecomputedBlock):
                    self._cross(source.output(), boundary.upstream, source.entries)
                else:
                    self._cross(source, boundary.upstream)

    def _cross(self, output: Tensor, gradients: list[Tensor], entries: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """Take all directions through one block, then let the observer close its layers."""
        for index, gradient in enumerate(gradients):
            more = index < len(gradients) - 1
            output.backward(gradient, retain_graph=more)
            for entered, leaf in entries:
                if leaf.grad is not None:
                    entered.backward(leaf.grad, retain_graph=more)
                    leaf.grad = None
            for boundary in self._boundaries:
                if boundary.leaf.grad is None:
                    continue
                if len(boundary.upstream) <= index:
                    boundary.upstream.append(boundary.leaf.grad)
                else:
                    boundary.upstream[index] = boundary.upstream[index] + boundary.leaf.grad
                boundary.leaf.grad = None
            for leaf in self._leaves:
                leaf.grad = None
        for layer in self._touched.values():
            self.observer.finish(layer)
        self._seen |= self._touched.keys()
        self._touched = {}

    def _source_hook(self, layer: BayesianLayer) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if self._blind:
                return
            source = arguments[0]
            if self._last_source is None or not _same_storage(self._last_source[0], source):
                self._last_source = (source, layer.name)
            self._leader[layer.name] = self._last_source[1]

        return hook

    def _layer_hook(self, layer: BayesianLayer) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            batch = self._batch
            if batch is None or self._blind:
                return None
            if layer.name in self._called:
                raise AdapterError(
                    f"{layer.name}: the model runs this layer more than once in a pass (shared weights), "
                    "which the posterior does not cover"
                )
            self._called.add(layer.name)
            inputs, mask = self.answer_model.token_view(layer, arguments[0].detach(), batch)
            leader = self._leader.get(layer.name, layer.name)
            kept = self.observer.observe_input(layer, leader, _with_bias_input(layer, _wide(inputs)), mask)
            if not output.requires_grad:
                output.requires_grad_()
                self._leaves.append(output)

            def gradient_hook(gradient: Tensor) -> None:
                if layer.name in self._seen:
                    raise AdapterError(
                        f"{layer.name}: the model carries gradients around its blocks, which lapora cannot follow"
                    )
                self._touched[layer.name] = layer
                self.observer.observe_gradient(layer, kept, self._gradient_view(layer, gradient, batch))

            output.register_hook(gradient_hook)
            return output

        return hook

    def _gradient_view(self, layer: BayesianLayer, gradient: Tensor, batch: Batch) -> Tensor:
        view, mask = self.answer_model.token_view(layer, gradient, batch)
        if layer.answer_rows_only:
            view = view[..., cast(Tensor, self.answer_model.answer_token_ids).to(view.device)]
        view = _wide(view)
        return view if mask is None else view.masked_fill(~mask.unsqueeze(-1), 0.0)

    def _cut(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        if self._batch is None or not hidden.requires_grad:
            return None
        leaf = hidden.detach().requires_grad_()
        self._boundaries.append(_Boundary(hidden, leaf))
        return leaf if isinstance(output, Tensor) else (leaf, *output[1:])

    def _run_without_graph(self, forward: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run a block unseen, keeping what it was given, for the backward pass to run it again."""
        if self._batch is None or not torch.is_grad_enabled():
            return forward(*arguments, **named)
        self._blind = True
        try:
            with torch.no_grad():
                output = forward(*arguments, **named)
        finally:
            self._blind = False
        hidden = output if isinstance(output, Tensor) else output[0]
        leaf = hidden.detach().requires_grad_()

        self._boundaries.append(_Boundary(RecomputedBlock(forward, arguments, named), leaf))
        return leaf if isinstance(output, Tensor) else (leaf, *output[1:])

    def _evict(self) -> None:
        self._batch = None
        self._boundaries = []
        self._leaves = []
        self._last_source = None
        self._touched = {}
        self._seen = set()
        self._called = set()


def _same_storage(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    same = first.untyped_storage()._cdata == second.untyped_storage()._cdata
    layouts = [(each.shape, each.stride(), each.storage_offset()) for each in (first, second)]
    return same and layouts[0] == layouts[1]


def _wide(values: Tensor) -> Tensor:
    """Sums are taken in float32 at least, whatever the model runs in."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _with_bias_input(layer: BayesianLayer, inputs: Tensor) -> Tensor:
    if not layer.bias_as_input:
        return inputs
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1)
