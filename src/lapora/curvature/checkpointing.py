"""Gradient checkpointing by transformer block.

A block runs once without a graph and stores its inputs only; the backward pass recomputes it with a graph. Source:
Chen et al. 2016, "Training deep nets with sublinear memory cost".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lapora.models.lora_layers import BayesianLayer


def blocks_of(network: nn.Module, layers: Sequence[BayesianLayer]) -> list[nn.Module]:
    """Return the transformer blocks with Bayesian layers: the items of the model's outermost ModuleLists."""
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
    """A block's forward function and stored inputs, to be recomputed with a graph.

    Args:
        forward: The block's forward function.
        arguments: Its positional arguments.
        keywords: Its keyword arguments.

    Attributes:
        entries: Pairs of an input that requires a gradient and the leaf tensor that replaces it.
    """

    def __init__(self, forward: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._forward, self._inputs = forward, (arguments, keywords)
        self.entries: list[tuple[Tensor, Tensor]] = []

    def output(self) -> Tensor:
        """Recompute the block's hidden states, with a graph."""
        arguments, keywords = tree_map(self._entry, self._inputs)
        with torch.enable_grad():
            output = self._forward(*arguments, **keywords)
        return output if isinstance(output, Tensor) else output[0]

    def _entry(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        self.entries.append((value, leaf))
        return leaf


class ForwardOverride:
    """Replace a module's forward function, or another method, until :meth:`remove` is called.

    Args:
        module: The module.
        run: Called with the original function, the positional and the keyword arguments.
        name: The method's name.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any], name: str = "forward") -> None:
        self._module, self._name = module, name
        self._original = module.__dict__.get(name)  # set if another library has wrapped it (accelerate)
        original = getattr(module, name)
        setattr(module, name, lambda *arguments, **keywords: run(original, arguments, keywords))

    def remove(self) -> None:
        """Restore the module's function."""
        if self._original is None:
            delattr(self._module, self._name)
        else:
            setattr(self._module, self._name, self._original)
