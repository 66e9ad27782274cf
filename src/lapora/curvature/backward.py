"""One forward pass and K backward passes, with a layer's inputs and output gradients passed to an observer.

``fit`` and ``predict`` both use it. For K directions ``v_k`` in logit space and every Bayesian layer, the observer
gets the layer's input ``a_t`` and the gradient ``g_t`` of ``v_kᵀ f`` with respect to the layer's output. Neither is
stored here.

The backward pass is cut at the transformer blocks. All K directions go through one block before the next block
starts, so that an observer can combine the K gradients of one layer (a logit covariance needs all of them) and free
them: the model runs forward once, and gradients of only one block are in memory. No weight gradients are
computed, and the pass ends at the lowest Bayesian layer.

With ``recompute_blocks`` set on the output model (gradient checkpointing), a block stores its inputs only and is
recomputed in the backward pass; hooks on its layers then run during the recomputation.
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
"""Maps logits ``(B, C)`` to directions ``(K, B, C)``; K = 0 runs the forward pass only."""


class Observer(Protocol):
    """Receives the inputs and output gradients of one layer at a time.

    For every batch of B rows, T tokens and K directions the calls are ``begin``; ``observe_input`` once per layer,
    before its gradients; for each layer in turn ``observe_gradient`` K times and ``finish`` once; ``end``. A batch
    that runs out of memory never reaches ``end``: ``begin``, called for the smaller batch, must discard its sums.
    """

    def begin(self, batch: Batch) -> None:
        """Start a batch, and discard the sums of an unfinished one."""

    def observe_input(self, layer: BayesianLayer, input_owner: str, inputs: Tensor, mask: Tensor | None) -> Any:
        """Process the input of a layer.

        Args:
            layer: The layer.
            input_owner: Name of the first layer with the same input tensor (q, k and v projections share one).
            inputs: ``(B, T, in_features)``, float32 or float64.
            mask: ``(B, T)``, true at real tokens, or None without padding.

        Returns:
            A value to pass to ``observe_gradient``, or None if the gradient is sufficient.
        """

    def observe_gradient(self, layer: BayesianLayer, saved: Any, gradient: Tensor) -> None:
        """Process the output gradient of one direction.

        Args:
            layer: The layer.
            saved: The value returned by ``observe_input``.
            gradient: ``(B, T, out_features)``, float32 or float64, zero at padding.
        """

    def finish(self, layer: BayesianLayer) -> None:
        """Finish a layer after its K directions."""

    def end(self, rows: int, directions: int) -> None:
        """Finish a batch of ``rows`` examples, after all layers and directions."""


@dataclass
class _Boundary:
    """Cut of the graph after a block: the block's output, and the leaf tensor that the next block reads.

    A block to be recomputed has no output yet.
    """

    output: Tensor | RecomputedBlock
    leaf: Tensor
    upstream: list[Tensor] = field(default_factory=list)


class Linearisation:
    """Context manager that hooks a model's Bayesian layers.

    Args:
        output_model: The network.
        layers: The Bayesian layers to observe.
        observer: Receives their inputs and output gradients.
    """

    def __init__(self, output_model: OutputModel, layers: Sequence[BayesianLayer], observer: Observer) -> None:
        self.output_model = output_model
        self.layers = list(layers)
        self.observer = observer
        self.forward_calls = 0
        self.backward_calls = 0
        self._handles: list[RemovableHandle | ForwardOverride] = []
        self._batch: Batch | None = None
        self._boundaries: list[_Boundary] = []
        self._leaves: list[Tensor] = []
        self._last_source: tuple[Tensor, str] | None = None
        self._input_owner: dict[str, str] = {}
        self._open: dict[str, BayesianLayer] = {}
        self._finished: set[str] = set()
        self._called: set[str] = set()
        self._hooks_disabled = False

    def __enter__(self) -> Linearisation:
        for layer in self.layers:
            if layer.source is not layer.module:
                self._handles.append(layer.source.register_forward_pre_hook(self._source_hook(layer)))
            self._handles.append(layer.module.register_forward_hook(self._layer_hook(layer)))
        for block in blocks_of(self.output_model.network, self.layers):
            if self.output_model.recompute_blocks:
                self._handles.append(ForwardOverride(block, self._run_without_graph))
            else:
                self._handles.append(block.register_forward_hook(self._cut_graph))
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
        self._reset()

    def run(self, batch: Batch, directions: Directions) -> Tensor:
        """Run one batch forward, and backward along all directions.

        Args:
            batch: B rows.
            directions: Linear combinations of the logits to differentiate.

        Returns:
            Logits at the MAP, ``(B, C)``, detached.

        Raises:
            AdapterError: The model runs a layer twice, or carries gradients around its blocks.
            NonFiniteRowError: A logit is NaN or infinite.
        """
        self._reset()
        self._batch = batch
        self.observer.begin(batch)
        try:
            with torch.enable_grad():
                logits = self.output_model.logits(batch)
            self.forward_calls += 1
            along = directions(logits.detach()).to(logits.dtype)
            if len(along) and logits.requires_grad:
                self._backward(logits, along)
            self.observer.end(len(batch), len(along))
            return logits.detach()
        finally:
            self._reset()

    def _backward(self, logits: Tensor, along: Tensor) -> None:
        self.backward_calls += len(along)
        self._backward_through_block(logits, list(along))
        while self._boundaries:
            boundary = self._boundaries.pop()
            if boundary.upstream:
                source = boundary.output
                if isinstance(source, RecomputedBlock):
                    self._backward_through_block(source.output(), boundary.upstream, source.entries)
                else:
                    self._backward_through_block(source, boundary.upstream)

    def _backward_through_block(
        self, output: Tensor, gradients: list[Tensor], entries: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> None:
        """Run the backward pass of one block for all directions, then finish its layers."""
        for index, gradient in enumerate(gradients):
            retain = index < len(gradients) - 1
            output.backward(gradient, retain_graph=retain)
            for block_input, leaf in entries:
                if leaf.grad is not None:
                    block_input.backward(leaf.grad, retain_graph=retain)
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
        for layer in self._open.values():
            self.observer.finish(layer)
        self._finished |= self._open.keys()
        self._open = {}

    def _source_hook(self, layer: BayesianLayer) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if self._hooks_disabled:
                return
            source = arguments[0]
            if self._last_source is None or not _same_storage(self._last_source[0], source):
                self._last_source = (source, layer.name)
            self._input_owner[layer.name] = self._last_source[1]

        return hook

    def _layer_hook(self, layer: BayesianLayer) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            batch = self._batch
            if batch is None or self._hooks_disabled:
                return None
            if layer.name in self._called:
                raise AdapterError(
                    f"{layer.name}: the model runs this layer more than once per forward pass (shared weights), "
                    "which is not supported; use an adapter on layers that run once"
                )
            self._called.add(layer.name)
            inputs, mask = self.output_model.token_view(layer, arguments[0].detach(), batch)
            input_owner = self._input_owner.get(layer.name, layer.name)
            features = _with_bias_input(layer, _at_least_float32(inputs))
            saved = self.observer.observe_input(layer, input_owner, features, mask)
            if not output.requires_grad:
                output.requires_grad_()
                self._leaves.append(output)

            def gradient_hook(gradient: Tensor) -> None:
                if layer.name in self._finished:
                    raise AdapterError(
                        f"{layer.name}: the model carries gradients around its transformer blocks, which is not "
                        "supported; use a base model whose blocks run one after another"
                    )
                self._open[layer.name] = layer
                self.observer.observe_gradient(layer, saved, self._gradient_view(layer, gradient, batch))

            output.register_hook(gradient_hook)
            return output

        return hook

    def _gradient_view(self, layer: BayesianLayer, gradient: Tensor, batch: Batch) -> Tensor:
        view, mask = self.output_model.token_view(layer, gradient, batch)
        if layer.answer_rows_only:
            view = view[..., cast(Tensor, self.output_model.answer_token_ids).to(view.device)]
        view = _at_least_float32(view)
        return view if mask is None else view.masked_fill(~mask.unsqueeze(-1), 0.0)

    def _cut_graph(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        if self._batch is None or not hidden.requires_grad:
            return None
        leaf = hidden.detach().requires_grad_()
        self._boundaries.append(_Boundary(hidden, leaf))
        return leaf if isinstance(output, Tensor) else (leaf, *output[1:])

    def _run_without_graph(
        self, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        """Run a block without a graph, and store its inputs for recomputation."""
        if self._batch is None or not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        self._hooks_disabled = True
        try:
            with torch.no_grad():
                output = forward(*arguments, **keywords)
        finally:
            self._hooks_disabled = False
        hidden = output if isinstance(output, Tensor) else output[0]
        leaf = hidden.detach().requires_grad_()
        self._boundaries.append(_Boundary(RecomputedBlock(forward, arguments, keywords), leaf))
        return leaf if isinstance(output, Tensor) else (leaf, *output[1:])

    def _reset(self) -> None:
        self._batch = None
        self._boundaries = []
        self._leaves = []
        self._last_source = None
        self._open = {}
        self._finished = set()
        self._called = set()


def _same_storage(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    same = first.untyped_storage()._cdata == second.untyped_storage()._cdata
    layouts = [(each.shape, each.stride(), each.storage_offset()) for each in (first, second)]
    return same and layouts[0] == layouts[1]


def _at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32, in which sums are accumulated."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _with_bias_input(layer: BayesianLayer, inputs: Tensor) -> Tensor:
    if not layer.bias_as_input:
        return inputs
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1)
