"""Use a PEFT model in memory, during training, and restore its state afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn

from lapora.errors import AdapterError, UsageError
from lapora.models.adapter import Adapter, read_adapter
from lapora.models.fingerprint import fingerprint_of_tensors
from lapora.models.loading import LoadedModel, silence_libraries
from lapora.models.quantization import set_to_eval


@contextmanager
def outside_torch_contexts() -> Iterator[None]:
    """Leave the caller's inference mode, in which nothing has a gradient, and autocast, which rounds."""
    devices = [name for name in ("cpu", "cuda", "xpu", "mps") if torch.is_autocast_enabled(name)]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for name in devices:
            stack.enter_context(torch.autocast(name, enabled=False))
        yield


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_adding = threading.Lock()


@contextmanager
def prepared_for_fit(loaded: LoadedModel) -> Iterator[None]:
    """Set a model to eval mode, freeze its parameters and set its padding id, and restore its state on exit.

    A decoder with a classification head finds the last token by the padding id. Other threads wait for their turn.
    """
    with _adding:
        lock = _locks.setdefault(loaded.model, threading.RLock())
    with lock, _prepared(loaded):
        yield


@contextmanager
def _prepared(loaded: LoadedModel) -> Iterator[None]:
    model = loaded.model
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    text_config = cast(Any, model).config.get_text_config()
    original_pad_token_id = getattr(text_config, "pad_token_id", None)
    try:
        set_to_eval(model, loaded.quantize)
        model.requires_grad_(False)
        text_config.pad_token_id = loaded.pad_token_id
        yield
    finally:
        text_config.pad_token_id = original_pad_token_id
        for parameter, requires_grad in required.items():
            parameter.requires_grad_(requires_grad)
        for module, was_training in training.items():
            module.training = was_training


def adapter_in_memory(model: object, folder: Path) -> Adapter:
    """Save a model's active adapter and read it back, with the same checks as for an adapter on disk.

    Args:
        model: A PEFT model.
        folder: An empty folder.

    Raises:
        AdapterError: The object is not a PEFT model, or its adapter is not supported.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError(
            f"a {type(model).__name__} is not a PEFT model; pass the model returned by get_peft_model, unwrapped "
            "(accelerator.unwrap_model)"
        )
    active = cast(str, model.active_adapter)
    if not isinstance(active, str):
        raise AdapterError(f"{len(active)} adapters are active; activate one with set_adapter(name)")
    with silence_libraries():
        model.save_pretrained(str(folder), selected_adapters=[active])
    return read_adapter(folder if active == "default" else folder / active)


def loaded_in_memory(model: PeftModel, tokenizer: Any, adapter: Adapter) -> LoadedModel:
    """Return the description of a model in memory that :func:`lapora.models.loading.load_model` would give.

    Raises:
        UsageError: The base model is quantized.
    """
    base = cast(Any, model.get_base_model())
    if getattr(base, "is_quantized", False):
        raise UsageError("the base model is quantized; save the adapter, and fit from its folder with --quantize")
    # A module that the adapter replaces is left out: whether the base's files had it is not known here.
    adapters_own = ("lora_", ".modules_to_save.", ".original_module.", ".trainable_tokens_")
    weights = {
        name.replace(".token_adapter.", ".").replace(".base_layer.", "."): parameter
        for name, parameter in base.named_parameters()
        if not any(part in name for part in adapters_own)
    }
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        kind=adapter.kind,
        base_model=adapter.base_model or str(base.config.name_or_path),
        revision=adapter.revision,
        quantize="none",
        dtype=str(base.dtype).removeprefix("torch."),
        fingerprint=fingerprint_of_tensors(weights),
        number_of_labels=getattr(base.config, "num_labels", None) if adapter.kind == "classifier" else None,
        weights=weights,
    )
