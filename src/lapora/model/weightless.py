"""Running a model on tensors that have shapes and no memory, and counting the memory that they would take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lapora.model.answers import AnswerModel
from lapora.model.batches import Batch


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive and were made under this mode, and the most at a time.

    Args:
        model: Its own tensors are not counted.

    Attributes:
        alive: Bytes now.
        most: The greatest number of bytes so far.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.alive = 0
        self.most = 0
        self._known = {_identity(each) for each in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        """Run an operation, and count what it made."""
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        identity = _identity(tensor)
        if identity in self._known:
            return
        self._known.add(identity)
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._gone, identity, size)

    def _gone(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.alive -= size


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def without_memory(model: nn.Module) -> Iterator[None]:
    """Within this, tensors have no memory, and so have the model's; it must be on the ``meta`` device.

    Tensors seem to be on the CPU, so that operations choose the kernels that they would choose there: attention
    that keeps no ``T x T`` matrix, as on a GPU.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for store in cast("list[dict[str, Any]]", [module._parameters, module._buffers]):
                for name, value in store.items():
                    if value is None:
                        continue
                    before.append((store, name, value))
                    if id(value) not in made:
                        empty = torch.empty(value.shape, dtype=value.dtype)
                        is_parameter = isinstance(value, nn.Parameter)
                        made[id(value)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
                    store[name] = made[id(value)]
        try:
            yield
        finally:
            for store, name, value in before:
                store[name] = value


class WeightlessAnswers(AnswerModel):
    """An :class:`AnswerModel` that never looks at a number: no row is padded, and all answers stand last."""

    def logits(self, batch: Batch) -> Tensor:
        """Logits of the answers, ``(B, C)``."""
        arguments: dict[str, Any] = {"input_ids": batch.input_ids}
        if self._accepts["use_cache"]:
            arguments["use_cache"] = False
        causal = self.kind == "causal"
        found = self._answer_logits(batch, arguments) if causal else self.network(**arguments).logits
        return found if found.dtype == torch.float64 else found.float()

    def _answer_columns(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self._keeps_positions:
            return torch.zeros(1, dtype=torch.long), torch.zeros(len(batch), dtype=torch.long)
        last = torch.zeros(len(batch), dtype=torch.long)
        return last, last


def empty_batch(rows: int, tokens: int) -> Batch:
    """A batch of that shape; call it within :func:`without_memory`."""
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    return Batch(ids, torch.zeros_like(ids), None, tuple(range(rows)), has_padding=False)
