"""A model on the ``meta`` device: shapes without weights, from the base's configuration and the adapter's files.

Nothing large is read or allocated, so that the memory of a 70B model can be estimated on a laptop.
"""

from __future__ import annotations

import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from lapora.config import TOKEN_BUDGET, ModelSettings, Quantization
from lapora.errors import AdapterError, first_line
from lapora.models.adapter import Adapter, ModelKind
from lapora.models.batches import Batch, PlainAnswer, PlainRow
from lapora.models.batching import BatchFeed, BatchSize
from lapora.models.loading import ResolvedBase, empty_base, resize_embeddings, resolve_base, silence_libraries
from lapora.models.outputs import OutputModel
from lapora.models.quantization import quantized_layers, unquantized_modules

# NF4 with double quantization: 4 bits per weight, one byte of scale per 64 weights, and 4 bytes per 256 scales.
_BYTES_OF_4_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True, eq=False)
class MetaModel:
    """An adapter on its base model, without weights.

    Attributes:
        model: The PEFT model on torch's ``meta`` device, in eval mode.
        kind: ``causal`` or ``classifier``.
        quantize: Quantization of the base.
        dtype: Dtype of the unquantized weights.
        weights: Bytes of the weights, by storage type.
        dequantized: Bytes of the largest quantized weight after dequantization for a matrix product.
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
        device: Type of the target device, which this machine need not have.

    Raises:
        AdapterError: The base's configuration cannot be read, or the adapter does not fit it.
        UsageError: Options cannot be combined.
    """
    with silence_libraries():
        resolved = resolve_base(adapter, how, torch.device(device))
        model, quantized = _build(adapter, resolved, how.trust_remote_code)
    weights, dequantized = _weight_bytes(model, quantized, resolved.quantize, resolved.element_type)
    return MetaModel(model, adapter.kind, resolved.quantize, resolved.element_type, weights, dequantized)


def _build(adapter: Adapter, resolved: ResolvedBase, trust_remote_code: bool) -> tuple[PeftModel, Sequence[nn.Module]]:
    """Return the model, and the layers of the base that are quantized."""
    element_type, base_name = resolved.element_type, resolved.name
    settings = LoraConfig.from_pretrained(os.fspath(adapter.path))
    settings.inference_mode, settings.init_lora_weights = True, False
    quantized: Sequence[nn.Module] = ()
    try:
        with torch.device("meta"):
            base = empty_base(adapter, resolved, trust_remote_code)
            resize_embeddings(base, adapter)
            if resolved.quantize != "none":
                skipped = unquantized_modules(base, adapter.config.get("modules_to_save") or ())
                quantized = quantized_layers(base, skipped)
            model = get_peft_model(base, settings)
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"{adapter.path}: peft cannot attach it to base model {base_name} ({first_line(error)})"
        ) from error
    if element_type == torch.float64:
        model = model.double()
    text = base.config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0  # required by decoders with a classification head
    _check_shapes(adapter, model, base_name)
    return model.eval().requires_grad_(False), quantized


def _check_shapes(adapter: Adapter, model: PeftModel, base_name: str) -> None:
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = [
        f"{name} is {adapter.shapes[name]}, not {tuple(tensor.shape)}"
        if name in adapter.shapes
        else f"{name} is missing"
        for name, tensor in expected.items()
        if adapter.shapes.get(name) != tuple(tensor.shape)
    ]
    if wrong:
        raise AdapterError(
            f"{adapter.path}: the adapter does not fit base model {base_name}: {'; '.join(wrong[:4])}; "
            "check --base-model"
        )


def _weight_bytes(
    model: PeftModel, quantized: Sequence[nn.Module], quantize: Quantization, element_type: torch.dtype
) -> tuple[dict[str, int], int]:
    total: dict[str, int] = defaultdict(int)
    largest = 0
    weights = [cast(Tensor, layer.weight) for layer in quantized]
    for weight, layer in zip(weights, quantized, strict=True):
        outputs = weight.shape[1] if isinstance(layer, Conv1D) else len(weight)
        in_8_bits = weight.numel() + 4 * outputs
        total[quantize] += in_8_bits if quantize == "8bit" else round(weight.numel() * _BYTES_OF_4_BITS)
        largest = max(largest, weight.numel() * element_type.itemsize)
    counted = {id(weight) for weight in weights}
    for tensor in _unique([*model.parameters(), *model.buffers()]):
        if id(tensor) not in counted:
            total[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return dict(total), largest


def _unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


class LiveMemory(TorchDispatchMode):
    """Dispatch mode that counts the bytes of live tensors created under it, and their peak.

    Args:
        model: Its parameters and buffers are not counted.

    Attributes:
        current: Bytes of tensors that are alive now.
        peak: Maximum of ``current`` so far.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known = {_identity(each) for each in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        """Run an operation, and count the tensors that it returns."""
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
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._freed, identity, size)

    def _freed(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.current -= size


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def fake_tensors(model: nn.Module) -> Iterator[None]:
    """Run the model on fake tensors, which have shapes but no memory; the model must be on the ``meta`` device.

    Fake tensors are on the CPU, so that operations choose its kernels: attention without a ``T x T`` matrix, as on a
    GPU.
    """
    originals: list[tuple[dict[str, Any], str, Any]] = []
    replacements: dict[int, Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for store in cast("list[dict[str, Any]]", [module._parameters, module._buffers]):
                for name, value in store.items():
                    if value is None:
                        continue
                    originals.append((store, name, value))
                    if id(value) not in replacements:
                        empty = torch.empty(value.shape, dtype=value.dtype)
                        is_parameter = isinstance(value, nn.Parameter)
                        replacements[id(value)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
                    store[name] = replacements[id(value)]
        try:
            yield
        finally:
            for store, name, value in originals:
                store[name] = value


class MetaOutputModel(OutputModel):
    """OutputModel for fake tensors: assumes unpadded rows, so that no value is ever read.

    Whole answers are in one sequence if the network takes positions; whether it uses them cannot be checked.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.device = torch.device("cpu")
        self.packs_answers = self.takes_positions

    def logits(self, batch: Batch) -> Tensor:
        """Compute the outputs, ``(B, C)``, without checking their values."""
        return self._outputs(batch)

    def _outputs(self, batch: Batch) -> Tensor:
        logits = self._run_network(batch)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        arguments = super()._arguments(batch)
        if batch.answers is None or batch.answers.position_ids is None:
            arguments.pop("attention_mask", None)
        return arguments


def first_batch(
    meta_model: MetaModel,
    rows: int,
    tokens: int,
    *,
    answers: Sequence[int] = (),
    texts: int = 1,
    batch_size: int | None = None,
    bucketed: bool = False,
) -> Batch:
    """Return the first batch of a pass over equal rows of zeros.

    Args:
        meta_model: The model.
        rows: Number of rows.
        tokens: Tokens of a text; of the prompt and the longest answer that the network reads, if whole answers are
            scored.
        answers: Tokens of each answer then.
        texts: Number of texts of a row.
        batch_size: Rows per batch, or None for the token budget.
        bucketed: Whether the rows are padded as for a prediction.
    """
    prompt = max(1, tokens - max((length - 1 for length in answers), default=0))
    row = PlainRow([0] * prompt, [PlainAnswer([0] * length, length) for length in answers])
    row = replace(row, second=row) if texts == 2 else row
    outputs = MetaOutputModel(meta_model.model, meta_model.kind, 0)
    encoded = [row] * min(rows, batch_size or TOKEN_BUDGET)
    return next(iter(BatchFeed(outputs, encoded, BatchSize(batch_size), bucketed=bucketed)))
