"""A model without its weights: shapes alone, from the base's configuration and the adapter's files.

Nothing large is read or allocated, so that what a 70B model needs can be reckoned on a laptop.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lapora.config import ModelSettings, Quantization
from lapora.errors import AdapterError, first_line
from lapora.models.adapter import Adapter, ModelKind
from lapora.models.batches import Batch
from lapora.models.loading import ChosenBase, choose_base, loader_of, silence_libraries
from lapora.models.outputs import OutputModel
from lapora.models.quantization import modules_left_whole

# NF4 with double quantisation: 4 bits, and for 64 weights a byte of scale, whose own scale is 4 bytes for 256.
_BYTES_OF_4_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True, eq=False)
class MetaModel:
    """An adapter on its base model, as shapes.

    Attributes:
        model: The PEFT model on torch's ``meta`` device, in eval mode.
        kind: ``causal`` or ``classifier``.
        quantize: How the base is held.
        dtype: Type of what is not quantised.
        weights: Bytes that the weights take, by the type in which they are held.
        dequantised: Bytes of the largest quantised weight when it is unpacked for a product.
    """

    model: PeftModel
    kind: ModelKind
    quantize: Quantization
    dtype: torch.dtype
    weights: dict[str, int]
    dequantized: int


def build_meta_model(adapter: Adapter, how: ModelSettings, device: str) -> MetaModel:
    """Build an adapter on its base model without weights.

    Args:
        adapter: The adapter, as read from its directory.
        how: Base model, quantization and type.
        device: Type of the device that the model is to run on; it need not be there.

    Raises:
        AdapterError: The base's configuration cannot be read, or the adapter does not fit it.
        UsageError: An impossible combination.
    """
    with silence_libraries():
        chosen = choose_base(adapter, how, torch.device(device))
        model = _build(adapter, chosen, how.trust_remote_code)
    whole = adapter.config.get("modules_to_save") or ()
    weights, dequantized = _weights(model, chosen.quantize, chosen.element_type, whole)
    return MetaModel(model, adapter.kind, chosen.quantize, chosen.element_type, weights, dequantized)


def _build(adapter: Adapter, chosen: ChosenBase, trust_remote_code: bool) -> PeftModel:
    config, element_type, base_name = copy.deepcopy(chosen.config), chosen.element_type, chosen.name
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    loader = loader_of(adapter, config)
    settings = LoraConfig.from_pretrained(os.fspath(adapter.path))
    settings.inference_mode, settings.init_lora_weights = True, False
    try:
        with torch.device("meta"):
            base = loader.from_config(config, dtype=element_type, trust_remote_code=trust_remote_code)
            model = get_peft_model(base, settings)
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"{adapter.path}: peft cannot put it on base model {base_name} ({first_line(error)})"
        ) from error
    if element_type == torch.float64:
        model = model.double()
    text = base.config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = 0  # a decoder with a head asks for one
    _compare(adapter, model, base_name)
    return model.eval().requires_grad_(False)


def _compare(adapter: Adapter, model: PeftModel, base_name: str) -> None:
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = [
        f"{name} is {adapter.shapes[name]}, not {tuple(tensor.shape)}"
        if name in adapter.shapes
        else f"{name} is missing"
        for name, tensor in expected.items()
        if adapter.shapes.get(name) != tuple(tensor.shape)
    ]
    if wrong:
        raise AdapterError(f"{adapter.path}: the adapter does not fit base model {base_name}: {'; '.join(wrong[:4])}")


def _weights(
    model: PeftModel, quantize: Quantization, element_type: torch.dtype, whole: Any
) -> tuple[dict[str, int], int]:
    left = modules_left_whole(whole)
    quantised: set[int] = set()
    total: dict[str, int] = defaultdict(int)
    largest = 0
    for path, module in model.named_modules():
        if quantize == "none" or not isinstance(module, nn.Linear) or "lora_" in path or left & set(path.split(".")):
            continue
        weight = module.weight
        quantised.add(id(weight))
        total[quantize] += (
            weight.numel() + 4 * len(weight) if quantize == "8bit" else round(weight.numel() * _BYTES_OF_4_BITS)
        )
        largest = max(largest, weight.numel() * element_type.itemsize)
    for tensor in _unique([*model.parameters(), *model.buffers()]):
        if id(tensor) not in quantised:
            total[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return dict(total), largest


def _unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


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
def fake_tensors(model: nn.Module) -> Iterator[None]:
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


class MetaOutputModel(OutputModel):
    """An :class:`OutputModel` that never looks at a number: no row is padded, and all answers stand last."""

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
    """A batch of that shape; call it within :func:`fake_tensors`."""
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    return Batch(ids, torch.zeros_like(ids), None, tuple(range(rows)), has_padding=False)
