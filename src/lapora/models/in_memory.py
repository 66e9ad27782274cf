"""A PEFT model that its owner goes on training: used as it stands, and left exactly as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn

from lapora.errors import AdapterError, UsageError
from lapora.models.adapter import Adapter, read_adapter
from lapora.models.fingerprint import fingerprint_of_tensors
from lapora.models.loading import LoadedModel, silence_libraries


@contextmanager
def prepared_for_fit(model: nn.Module, pad_token_id: int) -> Iterator[None]:
    """Put a model into eval mode with nothing that requires a gradient; put everything back, after errors too.

    Args:
        model: The model.
        pad_token_id: What batches are padded with: a decoder with a head finds the answer's position by it.
    """
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    text_config = cast(Any, model).config.get_text_config()
    padded_with = text_config.pad_token_id
    try:
        model.eval()
        model.requires_grad_(False)
        text_config.pad_token_id = pad_token_id
        yield
    finally:
        text_config.pad_token_id = padded_with
        for parameter, requires_grad in required.items():
            parameter.requires_grad_(requires_grad)
        for module, was_training in training.items():
            module.training = was_training


def adapter_in_memory(model: object, folder: Path) -> Adapter:
    """Save a model's active adapter, and read it: an adapter in memory is held to what one on disk is.

    Args:
        model: A PEFT model.
        folder: An empty folder.

    Raises:
        AdapterError: No PEFT model, or one that the posterior does not cover.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError(
            f"a {type(model).__name__} is not a PEFT model; give what get_peft_model returned, out of any wrapper "
            "(accelerator.unwrap_model)"
        )
    active = cast(str, model.active_adapter)
    if not isinstance(active, str):
        raise AdapterError(f"{len(active)} adapters are active; a posterior is over one: set_adapter(name)")
    with silence_libraries():
        model.save_pretrained(str(folder), selected_adapters=[active])
    return read_adapter(folder if active == "default" else folder / active)


def loaded_in_memory(model: PeftModel, tokenizer: Any, adapter: Adapter) -> LoadedModel:
    """Describe a model in memory as if it had been loaded.

    Raises:
        UsageError: The base is quantised.
    """
    base = cast(Any, model.get_base_model())
    if getattr(base, "is_quantized", False):
        raise UsageError("the base model is quantised: save the adapter, and fit from its folder with --quantize")
    weights = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in base.named_parameters()
        if not any(part in name for part in ("lora_", ".modules_to_save.", ".original_module."))
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
