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

A layer that the model calls several times in one pass (shared weights) is shown to the observer once, with the tokens
of all calls one after another: ``G = Σ_calls Σ_t g_t a_tᵀ``. Which layers these are, and which read an input that all
rows share (embeddings of relative positions), is found by a forward pass of two equal rows before the first batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from lapora.curvature.checkpointing import ForwardOverride, RecomputedBlock, blocks_of
from lapora.errors import AdapterError
from lapora.likelihoods.base import Directions
from lapora.models.batches import Batch
from lapora.models.lora_layers import BayesianLayer, norm_overrides
from lapora.models.outputs import Layout, OutputModel


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

    A block to be recomputed has no output yet; ``calls`` are the numbers of calls of each layer before it.
    """

    output: Tensor | RecomputedBlock
    leaf: Tensor
    upstream: list[Tensor] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)


@dataclass
class _Call:
    """One call of a layer that runs several times: its input, and the output gradient of each direction."""

    inputs: Tensor
    mask: Tensor | None
    gradients: list[Tensor] = field(default_factory=list)


_FREED = "backward through the graph a second time"


class _GradientsAroundBlocksError(Exception):
    """A layer received a gradient after its block was finished."""


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
        self._open_calls: set[tuple[str, int]] = set()
        self._finished: set[tuple[str, int]] = set()
        self._calls: dict[str, int] = {}
        self._repeated: dict[str, dict[int, _Call]] = {}
        self._probed: dict[str, list[tuple[Layout, int]]] | None = None
        self._hooks_disabled = False

    def __enter__(self) -> Linearisation:
        for layer in self.layers:
            if layer.source is not layer.module:
                self._handles.append(layer.source.register_forward_pre_hook(self._source_hook(layer)))
                self._handles.append(layer.source.register_forward_hook(self._per_row_hook(layer)))
                self._handles.append(layer.module.register_forward_pre_hook(self._expand_hook(layer)))
                self._handles += [ForwardOverride(*each) for each in norm_overrides(layer)]
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
            directions: Linear combinations of the logits to differentiate; none runs the forward pass only.

        Returns:
            Logits at the MAP, ``(B, C)``, detached.

        Raises:
            AdapterError: The model carries gradients around blocks that are recomputed, or the logits have no gradient.
            NonFiniteRowError: A logit is NaN or infinite.
        """
        self.probe(batch)
        try:
            return self._run(batch, directions)
        except _GradientsAroundBlocksError as error:
            if self.output_model.recompute_blocks:
                raise AdapterError(
                    f"{error}: the model carries gradients around its transformer blocks, so they cannot be "
                    "recomputed; run without --gradient-checkpointing and without offloading"
                ) from None
            self.output_model.cut_blocks = False
        except RuntimeError as error:
            if self.output_model.retain_graphs or _FREED not in str(error):
                raise
            # Several blocks read the same tensors between blocks, such as an encoder's output.
            self.output_model.retain_graphs = True
        return self.run(batch, directions)

    def probe(self, batch: Batch) -> None:
        """Find how often, and on which layout of tokens, the model calls each layer; done once per model.

        Args:
            batch: Copies of its first row are run, without a graph.
        """
        layouts = self.output_model.layouts
        if all(layer.name in layouts for layer in self.layers):
            return
        calls = self._probe(batch, None)
        found = {name: [layout for layout, _ in each] for name, each in calls.items()}
        if any("shared" in each for each in found.values()):
            tokens = 3 if batch.input_ids.shape[1] == 2 else 2
            again = self._probe(batch, tokens)
            for name, each in found.items():
                for index, (one, other) in enumerate(zip(calls[name], again[name], strict=True)):
                    grows = one[1] != other[1] and other[1] in (2 * tokens - 1, 2 * tokens)
                    if each[index] == "shared" and grows:
                        each[index] = "distances"
        layouts.update(found)

    def _probe(self, batch: Batch, tokens: int | None) -> dict[str, list[tuple[Layout, int]]]:
        """Return layout and second dimension of the input in each call of each layer."""
        self._reset()
        self._probed = {layer.name: [] for layer in self.layers}
        try:
            with torch.no_grad():
                self.output_model.run_probe(batch, tokens)
            return self._probed
        finally:
            self._probed = None

    def _run(self, batch: Batch, directions: Directions) -> Tensor:
        self._reset()
        self._batch = batch
        self.observer.begin(batch)
        try:
            with torch.enable_grad():
                logits = self.output_model.logits(batch)
            self.forward_calls += 1
            along = directions(logits.detach()).to(logits.dtype)
            at_map, graph = logits.detach(), [logits]
            del logits
            if len(along) and not graph[0].requires_grad:
                raise AdapterError(
                    "the logits do not depend on any LoRA layer, or the code of the base model cuts their gradient "
                    "(reversible layers): this adapter on this base is not supported"
                )
            if len(along):
                self._backward(graph.pop(), along)
            self.observer.end(len(batch), len(along))
            return at_map
        finally:
            self._reset()

    def _backward(self, logits: Tensor, along: Tensor) -> None:
        self.backward_calls += len(along)
        self._backward_through_block(logits, list(along))
        del logits
        while self._boundaries:
            boundary = self._boundaries.pop()
            if boundary.upstream:
                source = boundary.output
                if isinstance(source, RecomputedBlock):
                    self._calls = dict(boundary.calls)
                    self._backward_through_block(source.output(), boundary.upstream, source.entries)
                else:
                    self._backward_through_block(source, boundary.upstream)
        for layer in self.layers:
            if layer.name in self._repeated:
                self._finish_repeated(layer, len(along))

    def _backward_through_block(
        self, output: Tensor, gradients: list[Tensor], entries: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> None:
        """Run the backward pass of one block for all directions, then finish its layers."""
        for index, gradient in enumerate(gradients):
            retain = index < len(gradients) - 1 or self.output_model.retain_graphs
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
        self._finished |= self._open_calls
        for layer in self._open.values():
            if not self._is_repeated(layer):
                self.observer.finish(layer)
            elif all((layer.name, call) in self._finished for call in range(len(self._layouts(layer)))):
                self._finish_repeated(layer, len(gradients))
        self._open, self._open_calls = {}, set()

    def _finish_repeated(self, layer: BayesianLayer, directions: int) -> None:
        """Show the observer a layer that runs several times, with the tokens of all calls one after another."""
        calls = [call for _, call in sorted(self._repeated.pop(layer.name).items())]
        inputs = torch.cat([call.inputs for call in calls], dim=1)
        masks = [inputs.new_ones(call.inputs.shape[:2]).bool() if call.mask is None else call.mask for call in calls]
        mask = None if all(call.mask is None for call in calls) else torch.cat(masks, dim=1)
        saved = self.observer.observe_input(layer, layer.name, inputs, mask)
        widths = {gradient.shape[2] for call in calls for gradient in call.gradients}
        if not widths:
            return
        for direction in range(directions):
            parts = [
                call.gradients[direction] if call.gradients else inputs.new_zeros(*call.inputs.shape[:2], *widths)
                for call in calls
            ]
            self.observer.observe_gradient(layer, saved, torch.cat(parts, dim=1))
        self.observer.finish(layer)

    def _layouts(self, layer: BayesianLayer) -> list[Layout]:
        return self.output_model.layouts[layer.name]

    def _is_repeated(self, layer: BayesianLayer) -> bool:
        return len(self._layouts(layer)) > 1

    def _expand_hook(self, layer: BayesianLayer) -> Callable[..., tuple[Any, ...] | None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            """Give each row its own copy of an input that all rows share, so that each has its own gradient."""
            if not self._is_shared(layer, arguments):
                return None
            return arguments[0].expand(len(cast(Batch, self._batch).input_ids), -1, -1), *arguments[1:]

        return hook

    def _per_row_hook(self, layer: BayesianLayer) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return output.as_subclass(_PerRow) if self._is_shared(layer, arguments) else None

        return hook

    def _is_shared(self, layer: BayesianLayer, arguments: tuple[Any, ...]) -> bool:
        if self._batch is None or self._hooks_disabled or len(self._batch.input_ids) == 1:
            return False
        shared = arguments[0].dim() == 3 and arguments[0].shape[0] == 1 and self._batch.input_ids.shape[1] > 1
        return shared and not {"shared", "distances"}.isdisjoint(self._layouts(layer))

    def _source_hook(self, layer: BayesianLayer) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if self._hooks_disabled or self._batch is None or self._is_repeated(layer):
                return
            source = arguments[0]
            if self._last_source is None or not _same_storage(self._last_source[0], source):
                self._last_source = (source, layer.name)
            self._input_owner[layer.name] = self._last_source[1]

        return hook

    def _layer_hook(self, layer: BayesianLayer) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._probed is not None:
                called = arguments[0]
                size = called.shape[1] if called.dim() > 1 else 0
                self._probed[layer.name].append((self.output_model.layout_of(called), size))
            batch = self._batch
            if batch is None:
                return None
            index = self._calls.get(layer.name, 0)
            self._calls[layer.name] = index + 1
            if self._hooks_disabled:
                return None
            layouts = self._layouts(layer) or ["rows"]
            if index >= len(layouts):
                raise AdapterError(
                    f"{layer.name}: the model runs this layer {len(layouts)} times for one row and more often for "
                    "another, which is not supported; leave it out of target_modules"
                )
            layout = layouts[index]
            inputs, mask = self.output_model.token_view(layer, arguments[0].detach(), batch, layout)
            features = _with_bias_input(layer, _at_least_float32(inputs))
            call, saved = None, None  # of one of them alone: the other would keep the input until the backward pass
            if self._is_repeated(layer):
                call = self._repeated.setdefault(layer.name, {})[index] = _Call(features, mask)
            else:
                input_owner = self._input_owner.get(layer.name, layer.name)
                saved = self.observer.observe_input(layer, input_owner, features, mask)
            if not output.requires_grad:
                output.requires_grad_()
                self._leaves.append(output)

            def gradient_hook(gradient: Tensor) -> None:
                if (layer.name, index) in self._finished:
                    raise _GradientsAroundBlocksError(layer.name)
                self._open[layer.name] = layer
                self._open_calls.add((layer.name, index))
                view = self._gradient_view(layer, gradient, batch, layout)
                if call is not None:
                    call.gradients.append(view)
                else:
                    self.observer.observe_gradient(layer, saved, view)

            output.register_hook(gradient_hook)
            return output

        return hook

    def _gradient_view(self, layer: BayesianLayer, gradient: Tensor, batch: Batch, layout: Layout) -> Tensor:
        view, mask = self.output_model.token_view(layer, gradient, batch, layout, are_gradients=True)
        if layer.answer_rows_only:
            view = view[..., cast(Tensor, self.output_model.answer_token_ids).to(view.device)]
        view = _at_least_float32(view)
        return view if mask is None else view.masked_fill(~mask.unsqueeze(-1), 0.0)

    def _cut_graph(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        if self._batch is None or not hidden.requires_grad or not self.output_model.cut_blocks:
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
        # A recomputed block would add its keys and values to the cache of a model that always makes one (XLM).
        keywords = {name: None if isinstance(value, Cache) else value for name, value in keywords.items()}
        calls = dict(self._calls)
        self._hooks_disabled = True
        try:
            with torch.no_grad():
                output = forward(*arguments, **keywords)
        finally:
            self._hooks_disabled = False
        hidden = output if isinstance(output, Tensor) else output[0]
        leaf = hidden.detach().requires_grad_()
        self._boundaries.append(_Boundary(RecomputedBlock(forward, arguments, keywords), leaf, calls=calls))
        return leaf if isinstance(output, Tensor) else (leaf, *output[1:])

    def _reset(self) -> None:
        self._batch = None
        self._boundaries = []
        self._leaves = []
        self._last_source = None
        self._open, self._open_calls = {}, set()
        self._finished = set()
        self._calls, self._repeated = {}, {}


class _PerRow(Tensor):
    """Output for each row of a layer whose input all rows share; repeating it over the rows changes nothing."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        """Skip ``repeat`` along the first dimension; keep the class under changes of layout."""
        if function is Tensor.repeat and all(times == 1 for times in arguments[2:]):
            return arguments[0].as_subclass(Tensor)
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*arguments, **(keywords or {}))
        return result.as_subclass(cls) if function in _CHANGES_OF_LAYOUT else result


_CHANGES_OF_LAYOUT = {Tensor.view, Tensor.reshape, Tensor.permute, Tensor.transpose, Tensor.contiguous}


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
