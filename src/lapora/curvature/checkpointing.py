"""Transformer blocks, and blocks that are run again when the backward pass comes to them.

Such a block keeps its inputs alone (gradient checkpointing; Chen et al. 2016, "Training deep nets with sublinear
memory cost"): it runs once without a graph, and once more with one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lapora.models.lora_layers import BayesianLayer


def blocks_of(network: nn.Module, layers: Sequence[BayesianLayer]) -> list[nn.Module]:
    """The outermost repeated blocks that hold Bayesian layers: the items of the model's ModuleLists."""
    bayesian = {layer.module for layer in layers}
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            for block in module:
                members = set(block.modules())
                inside |= members
                if members & bayesian:
                    blocks.append(block)
    return blocks


class RecomputedBlock:
    """A block's forward with what it was given, to be run with a graph.

    Attributes:
        entries: What carried gradients into the block, and the leaf that stands in its place in this run.
    """

    def __init__(self, forward: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._forward, self._given = forward, (arguments, named)
        self.entries: list[tuple[Tensor, Tensor]] = []

    def output(self) -> Tensor:
        """Run the block."""
        arguments, named = tree_map(self._entry, self._given)
        with torch.enable_grad():
            found = self._forward(*arguments, **named)
        return found if isinstance(found, Tensor) else found[0]

    def _entry(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        self.entries.append((value, leaf))
        return leaf


class ForwardOverride:
    """Another forward in the place of a module's own, until removed.

    Args:
        module: The module.
        run: Called with the module's own forward, its arguments and its named arguments.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        self._module = module
        self._own = module.__dict__.get("forward")  # set where something else has wrapped it
        forward = module.forward
        module.forward = lambda *arguments, **named: run(forward, arguments, named)

    def remove(self) -> None:
        """Put the module's own forward back."""
        if self._own is None:
            del self._module.forward
        else:
            self._module.forward = self._own
